// Built with -fopenmp: at::parallel_for is a header template over `#pragma omp parallel`.
#include "model/torch_parallel.h"

#include <ATen/Parallel.h>

namespace deltanet {

void SetTorchThreads(int threads) {
  thread_local int current = 0;
  if (current == threads) return;
  at::set_num_threads(threads);
  current = threads;
}

void TorchParallelFor(int64_t n, int64_t grain, absl::FunctionRef<void(int64_t, int64_t)> body) {
  at::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) { body(begin, end); });
}

}  // namespace deltanet
