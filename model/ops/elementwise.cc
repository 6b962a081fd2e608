#include "model/ops/elementwise.h"
