// How kernels use several threads without owning any.
#ifndef DELTANET_MODEL_BASE_PARALLEL_H_
#define DELTANET_MODEL_BASE_PARALLEL_H_

#include <cstdint>

#include "absl/functional/function_ref.h"

namespace deltanet {

// Calls body(begin, end) over disjoint ranges that cover [0, n), on the caller's thread and perhaps others,
// and returns when all are done. Ranges are at least `grain` long (except the last), so a small n stays on
// the caller's thread.
using ParallelFor = absl::FunctionRef<void(int64_t n, int64_t grain,
                                           absl::FunctionRef<void(int64_t begin, int64_t end)> body)>;

}  // namespace deltanet

#endif  // DELTANET_MODEL_BASE_PARALLEL_H_
