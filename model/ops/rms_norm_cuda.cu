// Residual addition and RMSNorm on a GPU, a block an output row: x and delta are read once for the sum of
// squares and again (from the L1) for the result.
#include <cstdint>

#include "model/ops/cuda_kernels.h"
#include "model/ops/cuda_util.cuh"

namespace deltanet {
namespace {

template <typename X, typename T>
__global__ void AddRmsNormKernel(AddRmsNormArgs args) {
  __shared__ float scratch[32];
  const int64_t n = blockIdx.x;
  const int64_t d = args.width;
  const int64_t from = args.gather != nullptr ? args.gather[n] : n;
  const X* x = static_cast<const X*>(args.x) + from * d;
  const T* delta = args.delta != nullptr ? static_cast<const T*>(args.delta) + from * d : nullptr;
  const auto value = [&](int64_t i) {
    float sum = ToFloat(x[i]);
    if (delta != nullptr) sum += ToFloat(delta[i]);
    if (args.bias != nullptr) sum += args.bias[i];
    return sum;
  };
  float factor = 1.0f;
  if (args.scale != nullptr) {
    float squares = 0;
    for (int64_t i = threadIdx.x; i < d; i += blockDim.x) {
      const float sum = value(i);
      squares = fmaf(sum, sum, squares);
    }
    const float mean = BlockSum(squares, scratch) / static_cast<float>(d);
    factor = 1.0f / (sqrtf(mean + args.epsilon.inside) + args.epsilon.after);
  }
  // A thread writes only where it alone reads, after it has read, so sum and normed may be x or delta.
  for (int64_t i = threadIdx.x; i < d; i += blockDim.x) {
    const float sum = value(i);
    if (args.sum != nullptr) args.sum[n * d + i] = sum;
    if (args.normed == nullptr) continue;
    const float normed = args.scale != nullptr ? sum * factor * args.scale[i] : sum;
    if (args.normed_dtype == DType::kBFloat16) {
      static_cast<__nv_bfloat16*>(args.normed)[n * d + i] = FromFloat<__nv_bfloat16>(normed);
    } else {
      static_cast<float*>(args.normed)[n * d + i] = normed;
    }
  }
}

template <typename X>
void Launch(const AddRmsNormArgs& args, cudaStream_t stream) {
  const int threads = BlockThreads(args.width);
  if (args.delta_dtype == DType::kBFloat16) {
    AddRmsNormKernel<X, __nv_bfloat16><<<args.rows, threads, 0, stream>>>(args);
  } else {
    AddRmsNormKernel<X, float><<<args.rows, threads, 0, stream>>>(args);
  }
}

}  // namespace

absl::Status AddRmsNormCuda(const AddRmsNormArgs& args, void* stream) {
  if (args.rows == 0) return absl::OkStatus();
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  if (args.x_dtype == DType::kBFloat16) {
    Launch<__nv_bfloat16>(args, cuda_stream);
  } else {
    Launch<float>(args, cuda_stream);
  }
  return LaunchStatus("AddRmsNormKernel");
}

}  // namespace deltanet
