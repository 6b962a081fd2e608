// The front of the mixer on a GPU. Where tokens are many a block is a token: up to 256 threads over its
// width. Where they are few, up to kFewBlocks blocks share them out: a block of GatherTaps has one tap or two
// of a token then.
//
// GatherTaps reads up to three inputs a token (two of them again, from the L2) and writes 3d values; tails
// follow in a kernel of their own, because a row's last block may run before its first has read the old tail.
// ConvQkvActivation reads and writes a token's 2HK + HV + H values once; a warp takes a head of q or k, for
// its norm, or kValues values of v.
//
// On an H200 (27 November 2026), bfloat16, d = 2048, 16 heads of 128. ncu, 256 tokens, a block a token: taps
// 18 us at 3 % of the memory's peak (256 rows of one token 20 us, 7 %), tails of 16 rows 7 us at 1 % (of 256
// rows 8 us, 11 %), activation 23 us at 3 %. That is far from any limit: there are 4 MB to read, a block
// waits for the row's numbers, then for inputs, and walks over its heads one after another, and a quarter of
// the warps that fit are there. So with fewer tokens more blocks: a step of 1, 16, 64 sessions through two
// layers takes 165, 199, 313 us instead of 206, 236, 352, of 24 layers 1.85, 2.25, 3.63 ms instead
// of 2.42, 2.78, 4.14. With 256 tokens two blocks a token were no gain (16 rows of 16: 426 us through two
// layers instead of 401; 256 rows of one: 729 instead of 742), and 13 blocks of four warps took 37 us for the
// activation.
#include <algorithm>
#include <cstdint>

#include "model/ops/cuda_kernels.h"
#include "model/ops/cuda_util.cuh"

namespace deltanet {
namespace {

constexpr int kWarps = kMostThreads / 32;  // Of a block of ConvQkvActivationKernel.
constexpr int kValues = 128;               // Of v, that a warp of it has.
constexpr int64_t kFewBlocks = 448;        // With so many the device is busy.

// Blocks for each of `tokens` tokens, at most `most` and no more than it takes to keep the device busy.
unsigned BlocksOfToken(int64_t tokens, int64_t most) {
  return static_cast<unsigned>(std::clamp<int64_t>(kFewBlocks / tokens, 1, most));
}

// Of a token's z, for a warp each: the heads of q, those of k, v by kValues.
__host__ __device__ inline int64_t Parts(const ConvQkvActivationArgs& args) {
  return 2 * args.heads + (args.heads * args.value_dim + kValues - 1) / kValues;
}

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
  for (int64_t j = blockIdx.y; j < kConvTaps; j += gridDim.y) {
    const float* from = InputAt(rows, args, row, n, kConvTaps - 1 - j);
    const bool normed =
        from != nullptr && args.norm_scale != nullptr;  // The same for all threads of the block.
    float factor = 1.0f;
    if (normed) {
      float squares = 0;
      for (int64_t i = threadIdx.x; i < d; i += blockDim.x) squares = fmaf(from[i], from[i], squares);
      factor = 1.0f / (sqrtf(BlockSum(squares, scratch) / static_cast<float>(d)) + RmsEpsilon{}.after);
    }
    T* taps = static_cast<T*>(args.taps) + (n * kConvTaps + j) * d;
    float* centre = args.centre != nullptr && j == kConvTaps - 2 ? args.centre + n * d : nullptr;
    for (int64_t i = threadIdx.x; i < d; i += blockDim.x) {
      const float input = from != nullptr ? from[i] : 0.0f;
      taps[i] = FromFloat<T>(normed ? input * factor * args.norm_scale[i] : input);
      if (centre != nullptr) centre[i] = input;
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
  const int lane = threadIdx.x % 32;
  const int64_t parts = Parts(args);
  for (int64_t part = static_cast<int64_t>(blockIdx.y) * kWarps + threadIdx.x / 32; part < parts;
       part += gridDim.y * kWarps) {
    if (part < 2 * args.heads) {  // A head of q, or then of k.
      const int64_t first = part * args.key_dim;
      float squares = 0;
      for (int64_t i = lane; i < args.key_dim; i += 32) {
        const float value = activated(first + i);
        squares = fmaf(value, value, squares);
      }
      const float factor = 1.0f / (sqrtf(WarpSum(squares)) + 1e-6f);
      for (int64_t i = lane; i < args.key_dim; i += 32)
        z[first + i] = FromFloat<T>(activated(first + i) * factor);
    } else {
      const int64_t first = 2 * qk + (part - 2 * args.heads) * kValues;
      const int64_t end = first + kValues < qkv ? first + kValues : qkv;
      for (int64_t i = first + lane; i < end; i += 32) z[i] = FromFloat<T>(activated(i));
    }
  }
  if (blockIdx.y < gridDim.y - 1) return;
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
    const dim3 grid(static_cast<unsigned>(rows.tokens), BlocksOfToken(rows.tokens, kConvTaps));
    if (args.dtype == DType::kBFloat16) {
      GatherTapsKernel<__nv_bfloat16><<<grid, threads, 0, cuda_stream>>>(rows, args);
    } else {
      GatherTapsKernel<float><<<grid, threads, 0, cuda_stream>>>(rows, args);
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
  const dim3 grid(static_cast<unsigned>(rows.tokens),
                  BlocksOfToken(rows.tokens, Pieces(Parts(args), kWarps)));
  if (args.dtype == DType::kBFloat16) {
    ConvQkvActivationKernel<__nv_bfloat16><<<grid, 32 * kWarps, 0, cuda_stream>>>(rows, args);
  } else {
    ConvQkvActivationKernel<float><<<grid, 32 * kWarps, 0, cuda_stream>>>(rows, args);
  }
  return LaunchStatus("ConvQkvActivationKernel");
}

}  // namespace deltanet
