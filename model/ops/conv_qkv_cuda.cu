// The front of the mixer on a GPU. A block is a token: up to 256 threads over its width.
//
// GatherTaps reads up to three inputs a token (two of them again, from the L2) and writes 3d values; tails
// follow in a kernel of their own, because a row's last block may run before its first has read the old tail.
// ConvQkvActivation reads and writes a token's 2HK + HV + H values once; a warp takes a head for the norms of
// q and k.
#include <cstdint>

#include "model/ops/cuda_kernels.h"
#include "model/ops/cuda_util.cuh"

namespace deltanet {
namespace {

// The input `back` tokens before token n of `row` (0: its own), which may be the one before its first: from
// x, or from the base slot's tail; null where its position is invalid.
__device__ inline const float* InputAt(const RaggedRows& rows, const GatherTapsArgs& args, int row, int64_t n,
                                       int64_t back) {
  const int64_t in_row = n - rows.offsets[row];
  const int64_t position = rows.position[row] + in_row - args.lag - back;
  if (position < 0 || position >= rows.end[row]) return nullptr;
  if (back <= in_row) return args.x + (n - back) * args.width;
  if (rows.fresh[row] != 0) return nullptr;
  return args.tail.at(rows.base_slot[row]) + (kConvTaps - 1 - (back - in_row)) * args.width;
}

template <typename T>
__global__ void GatherTapsKernel(RaggedRows rows, GatherTapsArgs args) {
  __shared__ float scratch[32];
  const int64_t n = blockIdx.x;
  const int row = rows.token_row[n];
  const int64_t d = args.width;
  T* taps = static_cast<T*>(args.taps) + n * kConvTaps * d;
  for (int64_t j = 0; j < kConvTaps; ++j) {
    const float* from = InputAt(rows, args, row, n, kConvTaps - 1 - j);
    float factor = 1.0f;
    if (from != nullptr && args.norm_scale != nullptr) {  // The same for all threads of the block.
      float squares = 0;
      for (int64_t i = threadIdx.x; i < d; i += blockDim.x) squares = fmaf(from[i], from[i], squares);
      factor = 1.0f / (sqrtf(BlockSum(squares, scratch) / static_cast<float>(d)) + RmsEpsilon{}.after);
    }
    for (int64_t i = threadIdx.x; i < d; i += blockDim.x) {
      float value = 0.0f;
      if (from != nullptr)
        value = args.norm_scale != nullptr ? from[i] * factor * args.norm_scale[i] : from[i];
      taps[j * d + i] = FromFloat<T>(value);
    }
  }
  if (args.centre != nullptr) {
    const float* from = InputAt(rows, args, row, n, 1);
    for (int64_t i = threadIdx.x; i < d; i += blockDim.x) {
      args.centre[n * d + i] = from != nullptr ? from[i] : 0.0f;
    }
  }
}

// A block is a row. Every thread reads its elements of both inputs before it writes, so base may be work.
__global__ void TailKernel(RaggedRows rows, GatherTapsArgs args) {
  const int row = blockIdx.x;
  if (rows.work_slot[row] < 0) return;
  const int64_t d = args.width;
  const int64_t last = static_cast<int64_t>(rows.offsets[row + 1]) - 1;  // Before the row, if that is empty.
  const float* older = InputAt(rows, args, row, last, 1);
  const float* newer = InputAt(rows, args, row, last, 0);
  float* to = args.tail.at(rows.work_slot[row]);
  for (int64_t i = threadIdx.x; i < d; i += blockDim.x) {
    const float older_value = older != nullptr ? older[i] : 0.0f;
    const float newer_value = newer != nullptr ? newer[i] : 0.0f;
    to[i] = older_value;
    to[d + i] = newer_value;
  }
}

template <typename T>
__global__ void ConvQkvActivationKernel(RaggedRows rows, ConvQkvActivationArgs args) {
  const int64_t n = blockIdx.x;
  const int row = rows.token_row[n];
  const int64_t qk = args.heads * args.key_dim, v = args.heads * args.value_dim;
  const int64_t qkv = 2 * qk + v;
  T* z = static_cast<T*>(args.z) + n * args.z_stride;
  const int64_t newest = rows.position[row] + (n - rows.offsets[row]) - args.lag;
  bool valid[kConvTaps];
  for (int64_t j = 0; j < kConvTaps; ++j) {
    const int64_t position = newest - (kConvTaps - 1 - j);
    valid[j] = position >= 0 && position < rows.end[row];
  }
  const auto activated = [&](int64_t i) {
    float value = ToFloat(z[i]) + args.bias[i];
    for (int64_t j = 0; j < kConvTaps; ++j) {
      if (!valid[j]) value -= args.tap_bias[j * qkv + i];
    }
    return args.activation == QkvActivation::kRelu ? (value < 0 ? 0.0f : value) : value * Sigmoid(value);
  };
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  for (int64_t head = warp; head < 2 * args.heads; head += warps) {  // Of q, then of k.
    const int64_t first = head * args.key_dim;
    float squares = 0;
    for (int64_t i = lane; i < args.key_dim; i += 32) {
      const float value = activated(first + i);
      squares = fmaf(value, value, squares);
    }
    const float factor = 1.0f / (sqrtf(WarpSum(squares)) + 1e-6f);
    for (int64_t i = lane; i < args.key_dim; i += 32)
      z[first + i] = FromFloat<T>(activated(first + i) * factor);
  }
  for (int64_t i = 2 * qk + threadIdx.x; i < qkv; i += blockDim.x) z[i] = FromFloat<T>(activated(i));
  for (int64_t h = threadIdx.x; h < args.heads; h += blockDim.x) {
    const float beta = valid[args.centre_tap] ? Sigmoid(ToFloat(z[qkv + h]) + args.bias[qkv + h]) : 0.0f;
    z[qkv + h] = FromFloat<T>(beta);
  }
}

}  // namespace

absl::Status GatherTapsCuda(const RaggedRows& rows, const GatherTapsArgs& args, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const int threads = BlockThreads(args.width);
  if (rows.tokens > 0) {
    if (args.dtype == DType::kBFloat16) {
      GatherTapsKernel<__nv_bfloat16><<<rows.tokens, threads, 0, cuda_stream>>>(rows, args);
    } else {
      GatherTapsKernel<float><<<rows.tokens, threads, 0, cuda_stream>>>(rows, args);
    }
    if (absl::Status status = LaunchStatus("GatherTapsKernel"); !status.ok()) return status;
  }
  if (rows.rows == 0) return absl::OkStatus();
  TailKernel<<<rows.rows, threads, 0, cuda_stream>>>(rows, args);
  return LaunchStatus("TailKernel");
}

absl::Status ConvQkvActivationCuda(const RaggedRows& rows, const ConvQkvActivationArgs& args, void* stream) {
  if (rows.tokens == 0) return absl::OkStatus();
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const int threads = BlockThreads(args.heads * args.value_dim);
  if (args.dtype == DType::kBFloat16) {
    ConvQkvActivationKernel<__nv_bfloat16><<<rows.tokens, threads, 0, cuda_stream>>>(rows, args);
  } else {
    ConvQkvActivationKernel<float><<<rows.tokens, threads, 0, cuda_stream>>>(rows, args);
  }
  return LaunchStatus("ConvQkvActivationKernel");
}

}  // namespace deltanet
