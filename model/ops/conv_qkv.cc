#include "model/ops/conv_qkv.h"
