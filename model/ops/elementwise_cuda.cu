// Gated units and the embedding lookup on a GPU: a thread a value, each read and written once.
#include <cstdint>

#include "model/ops/cuda_kernels.h"
#include "model/ops/cuda_util.cuh"

namespace deltanet {
namespace {

constexpr int kThreads = 256;

template <typename T>
__global__ void GatedUnitKernel(GatedUnitArgs args) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= args.rows * args.width) return;
  const int64_t n = index / args.width, i = index % args.width;
  const T* x = static_cast<const T*>(args.x) + n * 2 * args.width;
  float first = ToFloat(x[i]), second = ToFloat(x[args.width + i]);
  if (args.bias != nullptr) {
    first += args.bias[i];
    second += args.bias[args.width + i];
  }
  const float out =
      args.kind == GateKind::kSigmoidSecond ? first * Sigmoid(second) : first * Sigmoid(first) * second;
  static_cast<T*>(args.out)[index] = FromFloat<T>(out);
}

__global__ void EmbedKernel(EmbedArgs args) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= args.rows * args.width) return;
  args.out[index] = args.table[args.ids[index / args.width] * args.width + index % args.width];
}

unsigned Blocks(int64_t values) { return static_cast<unsigned>((values + kThreads - 1) / kThreads); }

}  // namespace

absl::Status GatedUnitCuda(const GatedUnitArgs& args, void* stream) {
  if (args.rows == 0) return absl::OkStatus();
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  if (args.dtype == DType::kBFloat16) {
    GatedUnitKernel<__nv_bfloat16><<<Blocks(args.rows * args.width), kThreads, 0, cuda_stream>>>(args);
  } else {
    GatedUnitKernel<float><<<Blocks(args.rows * args.width), kThreads, 0, cuda_stream>>>(args);
  }
  return LaunchStatus("GatedUnitKernel");
}

absl::Status EmbedCuda(const EmbedArgs& args, void* stream) {
  if (args.rows == 0) return absl::OkStatus();
  EmbedKernel<<<Blocks(args.rows * args.width), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(args);
  return LaunchStatus("EmbedKernel");
}

}  // namespace deltanet
