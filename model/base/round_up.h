#ifndef DELTANET_MODEL_BASE_ROUND_UP_H_
#define DELTANET_MODEL_BASE_ROUND_UP_H_

#include <cstdint>

namespace deltanet {

// The smallest multiple of `multiple` (above 0) that is not below `n` (not below 0).
constexpr int64_t RoundUp(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

}  // namespace deltanet

#endif  // DELTANET_MODEL_BASE_ROUND_UP_H_
