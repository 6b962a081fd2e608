#include "model/base/safetensors.h"
