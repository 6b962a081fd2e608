// The threads that LibTorch's own operators use, lent to our kernels: one pool in the process, never two that
// fight for the cores.
#ifndef DELTANET_MODEL_TORCH_PARALLEL_H_
#define DELTANET_MODEL_TORCH_PARALLEL_H_

#include <cstdint>

#include "absl/functional/function_ref.h"

namespace deltanet {

// How many threads LibTorch and TorchParallelFor use when called on this thread, itself included. OpenMP
// keeps that for each calling thread, so a step says it before it starts; cheap when nothing changes.
void SetTorchThreads(int threads);

// A ParallelFor (model/base/parallel.h) over those threads.
void TorchParallelFor(int64_t n, int64_t grain, absl::FunctionRef<void(int64_t begin, int64_t end)> body);

}  // namespace deltanet

#endif  // DELTANET_MODEL_TORCH_PARALLEL_H_
