#include "model/ops/delta_rule.h"
