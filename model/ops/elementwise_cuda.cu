// Gated units, the embedding lookup and what is carried between steps on a GPU: a thread a value, each read
// and written once.
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

template <typename T>
__global__ void SiluGateKernel(SiluGateArgs args) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= args.rows * args.width) return;
  const int64_t n = index / args.width, i = index % args.width;
  const float gate = ToFloat(static_cast<const T*>(args.gate)[n * args.gate_stride + i]);
  T* x = static_cast<T*>(args.x) + index;
  *x = FromFloat<T>(ToFloat(*x) * (gate * Sigmoid(gate)));
}

template <typename T>
__global__ void EmbedKernel(RaggedRows rows, EmbedArgs args) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= rows.tokens * args.width) return;
  const int64_t n = index / args.width;
  int64_t id = args.ids[n];
  if (id == kSampledId) id = __float_as_int(*args.sampled.at(rows.base_slot[rows.token_row[n]]));
  args.out[index] = ToFloat(static_cast<const T*>(args.table)[id * args.width + index % args.width]);
}

// A thread alone reads and writes its value of each place, so base may be work.
__global__ void CarryKernel(RaggedRows rows, CarryArgs args) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= rows.rows * args.width) return;
  const int64_t r = index / args.width, i = index % args.width;
  const float before = rows.fresh[r] != 0 ? 0.0f : args.carried.at(rows.base_slot[r])[i];
  args.x[rows.tokens * args.width + index] = before;
  if (rows.work_slot[r] < 0) return;
  const int64_t end = rows.offsets[r + 1];
  args.carried.at(rows.work_slot[r])[i] = end > rows.offsets[r] ? args.x[(end - 1) * args.width + i] : before;
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

absl::Status SiluGateCuda(const SiluGateArgs& args, void* stream) {
  if (args.rows == 0) return absl::OkStatus();
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  if (args.dtype == DType::kBFloat16) {
    SiluGateKernel<__nv_bfloat16><<<Blocks(args.rows * args.width), kThreads, 0, cuda_stream>>>(args);
  } else {
    SiluGateKernel<float><<<Blocks(args.rows * args.width), kThreads, 0, cuda_stream>>>(args);
  }
  return LaunchStatus("SiluGateKernel");
}

absl::Status EmbedCuda(const RaggedRows& rows, const EmbedArgs& args, void* stream) {
  if (rows.tokens == 0) return absl::OkStatus();
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  if (args.dtype == DType::kBFloat16) {
    EmbedKernel<__nv_bfloat16><<<Blocks(rows.tokens * args.width), kThreads, 0, cuda_stream>>>(rows, args);
  } else {
    EmbedKernel<float><<<Blocks(rows.tokens * args.width), kThreads, 0, cuda_stream>>>(rows, args);
  }
  return LaunchStatus("EmbedKernel");
}

absl::Status CarryCuda(const RaggedRows& rows, const CarryArgs& args, void* stream) {
  if (rows.rows == 0) return absl::OkStatus();
  CarryKernel<<<Blocks(rows.rows * args.width), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(rows, args);
  return LaunchStatus("CarryKernel");
}

}  // namespace deltanet
