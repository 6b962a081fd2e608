#include "model/ops/rms_norm.h"
