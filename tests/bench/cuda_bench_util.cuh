// What the benchmarks of kernels on a GPU share: memory, and the time of a call. Errors end the program.
#ifndef DELTANET_TESTS_BENCH_CUDA_BENCH_UTIL_CUH_
#define DELTANET_TESTS_BENCH_CUDA_BENCH_UTIL_CUH_

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"

namespace deltanet {

inline void Check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}
inline void Check(const absl::Status& status) {
  if (status.ok()) return;
  std::fprintf(stderr, "%s\n", status.ToString().c_str());
  std::exit(1);
}

inline void NotOnTheHost(int64_t, int64_t, absl::FunctionRef<void(int64_t, int64_t)>) {}

template <typename T>
class Array {
 public:
  explicit Array(int64_t size) : size_(size) { Check(cudaMalloc(&data_, size * sizeof(T)), "cudaMalloc"); }
  explicit Array(const std::vector<T>& host) : Array(static_cast<int64_t>(host.size())) {
    Check(cudaMemcpy(data_, host.data(), size_ * sizeof(T), cudaMemcpyHostToDevice), "cudaMemcpy");
  }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  ~Array() { cudaFree(data_); }
  T* data() const { return data_; }
  std::vector<T> Host() const {
    std::vector<T> host(size_);
    Check(cudaMemcpy(host.data(), data_, size_ * sizeof(T), cudaMemcpyDeviceToHost), "cudaMemcpy");
    return host;
  }

 private:
  int64_t size_;
  T* data_ = nullptr;
};

// The median time of a CUDA graph that holds what `call` queues on `stream`.
inline double MedianMicroseconds(cudaStream_t stream, int replays, absl::FunctionRef<absl::Status()> call) {
  Check(call());  // Loads the kernel, raises its shared memory.
  Check(cudaStreamSynchronize(stream), "the first call");
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  Check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "begin capture");
  Check(call());
  Check(cudaStreamEndCapture(stream, &graph), "end capture");
  Check(cudaGraphInstantiate(&exec, graph, 0), "instantiate");
  cudaEvent_t begin, end;
  Check(cudaEventCreate(&begin), "event");
  Check(cudaEventCreate(&end), "event");
  std::vector<float> times;
  for (int i = 0; i < replays + 3; ++i) {
    Check(cudaEventRecord(begin, stream), "record");
    Check(cudaGraphLaunch(exec, stream), "launch");
    Check(cudaEventRecord(end, stream), "record");
    Check(cudaEventSynchronize(end), "a replay");
    float milliseconds = 0;
    Check(cudaEventElapsedTime(&milliseconds, begin, end), "elapsed");
    if (i >= 3) times.push_back(1000 * milliseconds);
  }
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  cudaGraphExecDestroy(exec);
  cudaGraphDestroy(graph);
  std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
  return times[times.size() / 2];
}

}  // namespace deltanet

#endif  // DELTANET_TESTS_BENCH_CUDA_BENCH_UTIL_CUH_
