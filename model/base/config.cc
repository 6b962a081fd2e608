#include "model/base/config.h"
