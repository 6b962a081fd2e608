// The front of a `delta_net` mixer on a GPU. A block takes kTile tokens through one head of q, k or v (the
// last block of a tile: through beta), a warp a token, lanes over channels, so that z is read and out written
// in whole lines; older inputs and the weights come from the L1. Between the head's sum and its norm, values
// are kept in registers, up to kHeld a lane; wider heads compute them again.
//
// Bytes a token: (2HK + HV + H) values of z and of out. Tails follow in a kernel of their own, because a
// row's last block may run before its first has read the old tail.
#include <cstdint>

#include "model/ops/cuda_kernels.h"
#include "model/ops/cuda_util.cuh"
#include "model/ops/short_conv_cuda.cuh"

namespace deltanet {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kTile = 16;
constexpr int kHeld = 8;  // Heads of up to 32 * kHeld channels are kept in registers.

__device__ inline int64_t QkvWidth(const ShortConvQkvArgs& args) {
  return args.heads * (2 * args.key_dim + args.value_dim);
}

// Input `i` of the row (negative: of those before it), channel c; zero before the start.
template <typename T>
__device__ inline float InputAt(const RaggedRows& rows, const ShortConvQkvArgs& args, int row, int64_t i,
                                int64_t c) {
  if (i >= 0) return ToFloat(static_cast<const T*>(args.z)[(rows.offsets[row] + i) * args.z_stride + c]);
  if (rows.fresh[row] != 0) return 0.0f;
  return args.tail.at(rows.base_slot[row])[(args.taps - 1 + i) * QkvWidth(args) + c];
}

// The convolution at token `i` of the row, channel c.
template <typename T>
__device__ inline float Convolved(const RaggedRows& rows, const ShortConvQkvArgs& args, int row, int64_t i,
                                  int64_t c) {
  if (args.taps == 0) return InputAt<T>(rows, args, row, i, c);
  float y = args.bias != nullptr ? args.bias[c] : 0.0f;
  const int64_t width = QkvWidth(args);
  for (int64_t j = 0; j < args.taps; ++j) {
    y = fmaf(args.weight[j * width + c], InputAt<T>(rows, args, row, i - (args.taps - 1) + j, c), y);
  }
  return y;
}

template <typename T>
__global__ void ShortConvKernel(RaggedRows rows, ShortConvQkvArgs args) {
  const int64_t parts = 3 * args.heads + 1;
  const int64_t part = blockIdx.x % parts, tile = blockIdx.x / parts * kTile;
  const int64_t tile_end = tile + kTile < rows.tokens ? tile + kTile : rows.tokens;
  const int64_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  T* const out = static_cast<T*>(args.out);
  if (part == 3 * args.heads) {
    const int64_t first = QkvWidth(args);
    for (int64_t n = tile + warp; n < tile_end; n += kWarps) {
      for (int64_t h = lane; h < args.heads; h += 32) {
        float beta = args.beta_scale;
        if (args.has_beta) {
          beta *= Sigmoid(ToFloat(static_cast<const T*>(args.z)[n * args.z_stride + first + h]));
        }
        out[n * args.out_stride + first + h] = FromFloat<T>(beta);
      }
    }
    return;
  }
  const bool is_value = part >= 2 * args.heads;
  const int64_t channels = is_value ? args.value_dim : args.key_dim;
  const int64_t first = is_value ? 2 * args.heads * args.key_dim + (part - 2 * args.heads) * args.value_dim
                                 : part * args.key_dim;
  const QkActivation activation = is_value ? QkActivation::kSilu : args.activation;
  for (int64_t n = tile + warp; n < tile_end; n += kWarps) {
    const int row = rows.token_row[n];
    const int64_t i = n - rows.offsets[row];
    const auto value = [&](int64_t c) {
      return Activated(activation, Convolved<T>(rows, args, row, i, first + c));
    };
    T* const to = out + n * args.out_stride + first;
    if (is_value) {
      for (int64_t c = lane; c < channels; c += 32) to[c] = FromFloat<T>(value(c));
      continue;
    }
    const bool l2 = args.norm == QkNorm::kL2;
    float held[kHeld];
    float sum = 0.0f;
    const auto add = [&](float y) { sum = l2 ? fmaf(y, y, sum) : sum + y; };
    const bool holds = channels <= 32 * kHeld;
    if (holds) {
#pragma unroll
      for (int h = 0; h < kHeld; ++h) {
        const int64_t c = lane + 32 * h;
        held[h] = c < channels ? value(c) : 0.0f;
        add(held[h]);
      }
    } else {
      for (int64_t c = lane; c < channels; c += 32) add(value(c));
    }
    sum = WarpSum(sum);
    const float inverse = l2 ? 1.0f / sqrtf(sum + 1e-6f) : 0.0f;
    const auto normed = [&](float y) { return FromFloat<T>(l2 ? y * inverse : y / sum); };
    if (holds) {
#pragma unroll
      for (int h = 0; h < kHeld; ++h) {
        const int64_t c = lane + 32 * h;
        if (c < channels) to[c] = normed(held[h]);
      }
    } else {
      for (int64_t c = lane; c < channels; c += 32) to[c] = normed(value(c));
    }
  }
}

// A thread is a channel of a row. It reads all that it keeps before it writes, so base may be work.
template <typename T>
__global__ void ShortConvTailKernel(RaggedRows rows, ShortConvQkvArgs args) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t width = QkvWidth(args);
  if (index >= rows.rows * width) return;
  const int row = static_cast<int>(index / width);
  const int64_t tokens = rows.offsets[row + 1] - rows.offsets[row];
  if (rows.work_slot[row] < 0 || tokens <= args.longer_than) return;
  const int64_t c = index % width;
  const int64_t kept = args.taps - 1;
  const int64_t from = tokens - kept;
  float inputs[kMaxShortConvTaps - 1];
#pragma unroll
  for (int i = 0; i < kMaxShortConvTaps - 1; ++i) {
    if (i < kept) inputs[i] = InputAt<T>(rows, args, row, from + i, c);
  }
  float* const to = args.tail.at(rows.work_slot[row]);
#pragma unroll
  for (int i = 0; i < kMaxShortConvTaps - 1; ++i) {
    if (i < kept) to[i * width + c] = inputs[i];
  }
}

template <typename T>
absl::Status Launch(const RaggedRows& rows, const ShortConvQkvArgs& args, cudaStream_t stream) {
  if (rows.tokens > 0) {
    const int64_t blocks = (rows.tokens + kTile - 1) / kTile * (3 * args.heads + 1);
    ShortConvKernel<T><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(rows, args);
    if (absl::Status status = LaunchStatus("ShortConvKernel"); !status.ok()) return status;
  }
  if (rows.rows == 0 || args.taps < 2) return absl::OkStatus();
  const int64_t channels = rows.rows * args.heads * (2 * args.key_dim + args.value_dim);
  ShortConvTailKernel<T>
      <<<static_cast<unsigned>((channels + kThreads - 1) / kThreads), kThreads, 0, stream>>>(rows, args);
  return LaunchStatus("ShortConvTailKernel");
}

}  // namespace

absl::Status ShortConvQkvCuda(const RaggedRows& rows, const ShortConvQkvArgs& args, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  return args.dtype == DType::kBFloat16 ? Launch<__nv_bfloat16>(rows, args, cuda_stream)
                                        : Launch<float>(rows, args, cuda_stream);
}

}  // namespace deltanet
