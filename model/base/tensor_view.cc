#include "model/base/tensor_view.h"
