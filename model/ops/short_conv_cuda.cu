// The front of a `delta_net` mixer on a GPU, by one of two kernels.
//
// Tails. With strips, the block that has a row's last token writes what is kept of it, where that is another
// slot than the row's own; else it might do so before the row's first block has read the old tail. Those that
// this leaves, and rows without tokens, follow in a kernel of their own, if the host knows of any; after the
// other kernel all do.
//
// Strips, for four taps and heads of a power of two of 8-channel strips, up to 32 (K of 8 to 256), all of it
// aligned: a thread walks along a tile of tokens with 8 neighbouring channels, whose weights and last three
// inputs it keeps in registers, so that z is read once but for three tokens at a tile's beginning. It works
// on 64 bytes of tokens together (4 of bfloat16) while the next ones are on their way. Lanes that are
// neighbours have a head of q or k, and sum it up by shuffles. A block is 128 strips of a tile, a tile's
// first block its betas; tiles are long where tokens are many, to read weights seldom, and short where they
// are few, to keep the device busy. A token's bits do not depend on where tiles begin. The kernel begins, and
// reads its weights, while the one before it ends (LaunchOverlapping), and so does that of the tails, which
// took 4 to 8 us.
//
// Heads, for all else: a block takes kTile tokens through one head of q, k or v (the last block of a tile:
// through beta), a warp a token, lanes over channels, so that z is read and out written in whole lines; older
// inputs and the weights come from the L1. Between the head's sum and its norm, values are kept in registers,
// up to kHeld a lane; wider heads compute them again.
//
// Bytes a token: (2HK + HV + H) values of z and of out: 24 KiB of bfloat16 for 16 heads of 128, 404 MB for
// 16,384 tokens, which take 94 us at 4.3 TB/s; for a row, its tail read and written, 72 KiB there. Measured
// on an H200: 126 us, 0.78 of a plain copy's rate (beside products that take the device's power 150 and
// more). It is bound by the multiprocessors: some 160 instructions a warp's token, 16 of them exponentials
// and inverses, which were 240, and 152 us. Neither a ring in shared memory, filled ahead, nor five blocks a
// multiprocessor, nor tiles of 32 to 128 tokens made a difference.
//
// ncu (27 November 2026, one H200, at clocks of its own), 16,384 tokens of 16 heads of 128: 116 us at 70 % of
// the memory's peak, the schedulers busy for 52 % of their cycles with 23 % of the warps that fit: a warp
// waits for its loads, its exponentials and its sums in turn, and too few others are there (four blocks, for
// the registers' sake). The tails' kernel 4.5 us with 8 rows, at 1 %: hardly more than its launch.
#include <algorithm>
#include <cstdint>

#include "model/base/status_macros.h"
#include "model/ops/cuda_kernels.h"
#include "model/ops/cuda_util.cuh"
#include "model/ops/cuda_vector.cuh"
#include "model/ops/short_conv_cuda.cuh"

namespace deltanet {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kTile = 16;
constexpr int kHeld = 8;  // Heads of up to 32 * kHeld channels are kept in registers.

constexpr int kStrip = 8;  // Channels of a thread.
constexpr int kStripTaps = 4;
constexpr int kPast = kStripTaps - 1;
constexpr int kMostTile = 64;  // Tokens of a tile.
constexpr int kBlocks = 1056;  // That keep a device busy: eight for each of an H100's multiprocessors.

// Input `i` of the row (negative: of those before it), channel c; zero before the start.
template <typename T>
__device__ inline float InputAt(const RaggedRows& rows, const ShortConvQkvArgs& args, int row, int64_t i,
                                int64_t c) {
  if (i >= 0) return ToFloat(static_cast<const T*>(args.z)[(rows.offsets[row] + i) * args.z_stride + c]);
  if (rows.fresh[row] != 0) return 0.0f;
  return ToFloat(TailOf<T>(args, rows.base_slot[row])[(args.taps - 1 + i) * QkvWidth(args) + c]);
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

// Tokens that a thread works on together, as many as make 64 bytes, with the next ones on their way.
template <typename T>
constexpr int kTogether = 64 / (kStrip * static_cast<int>(sizeof(T)));

// All of strips; the choice once.
template <typename T, int kTokens>
__device__ inline void Activate(QkActivation activation, float (&y)[kTokens][kStrip]) {
  const auto apply = [&](auto function) {
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
#pragma unroll
      for (int c = 0; c < kStrip; ++c) y[t][c] = function(y[t][c]);
    }
  };
  if (activation == QkActivation::kSilu) {
    apply([](float x) { return x * SigmoidFor<T>(x); });
  } else if (activation != QkActivation::kIdentity) {
    apply([&](float x) { return Activated<T>(activation, x); });
  }
}

// The beta of token n and head h.
template <typename T>
__device__ inline void WriteBeta(const ShortConvQkvArgs& args, int64_t n, int64_t h) {
  const int64_t first = QkvWidth(args);
  float beta = args.beta_scale;
  if (args.has_beta) {
    beta *= SigmoidFor<T>(ToFloat(static_cast<const T*>(args.z)[n * args.z_stride + first + h]));
  }
  static_cast<T*>(args.out)[n * args.out_stride + first + h] = FromFloat<T>(beta);
}

// Whether a row's tail is written by the strips.
__device__ inline bool StripsKeepTail(const RaggedRows& rows, int row) {
  return rows.fresh[row] != 0 || rows.base_slot[row] != rows.work_slot[row];
}

// Grid (tiles, a block of betas and those of strips).
template <typename T>
__global__ void __launch_bounds__(kThreads, 4)
    ShortConvStripKernel(RaggedRows rows, ShortConvQkvArgs args, int tile_tokens) {
  LetNextBegin();
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * tile_tokens;
  const int64_t end = begin + tile_tokens < rows.tokens ? begin + tile_tokens : rows.tokens;
  if (blockIdx.y == 0) {
    AwaitEarlier();
    const int heads = static_cast<int>(args.heads), betas = static_cast<int>(end - begin) * heads;
    for (int i = threadIdx.x; i < betas; i += kThreads) WriteBeta<T>(args, begin + i / heads, i % heads);
    return;
  }
  const int width = static_cast<int>(QkvWidth(args)), qk = static_cast<int>(2 * args.heads * args.key_dim);
  const int lanes = static_cast<int>(args.key_dim) / kStrip;  // Of a head of q or k.
  const int strip = static_cast<int>((blockIdx.y - 1) * kThreads + threadIdx.x);
  // Where a warp has a head to sum up, all its lanes take part: those behind the last channel do the first
  // strip's work, for nothing.
  const bool there = strip * kStrip < width;
  const int channel = there ? strip * kStrip : 0;
  const bool is_key = channel < qk;
  const bool warp_has_keys = (strip - static_cast<int>(threadIdx.x % 32)) * kStrip < qk;
  const QkActivation activation = is_key ? args.activation : QkActivation::kSilu;
  const bool l2 = args.norm == QkNorm::kL2;

  float weight[kStripTaps][kStrip];
#pragma unroll
  for (int j = 0; j < kStripTaps; ++j) Load<kStrip>(args.weight + j * width + channel, weight[j]);
  AwaitEarlier();

  constexpr int kTokens = kTogether<T>;
  const T* const z = static_cast<const T*>(args.z) + channel;
  T* const out = static_cast<T*>(args.out) + channel;
  const int z_stride = static_cast<int>(args.z_stride), out_stride = static_cast<int>(args.out_stride);
  int row = rows.token_row[begin];
  for (int64_t n = begin; n < end; ++row) {  // The tile's part of a row at a time.
    const int64_t row_begin = rows.offsets[row], row_end = rows.offsets[row + 1];
    const int64_t part_end = row_end < end ? row_end : end;
    if (row_end - row_begin <= args.longer_than) n = part_end;
    if (n == part_end) continue;  // A row without tokens, or with so few.
    int left = static_cast<int>(part_end - n);
    const T* from = z + n * args.z_stride;  // The next of the part's `left` tokens.
    T* to = out + n * args.out_stride;
    n = part_end;
    Packed<T, kStrip> next[kTokens];
    // In the place of tokens behind the part's end is its last.
    const auto load_next = [&](const T* first, int tokens) {
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        next[t] = LoadPacked<kStrip>(first + static_cast<int64_t>(min(t, tokens - 1)) * z_stride);
      }
    };
    load_next(from, left);
    float past[kPast][kStrip];  // The inputs before the next token, oldest first.
    const auto past_from = [&](const T* first, int stride) {
#pragma unroll
      for (int j = 0; j < kPast; ++j) Load<kStrip>(first + j * stride, past[j]);
    };
    const int before = static_cast<int>(part_end - row_begin) - left;  // Tokens of the row.
    if (before >= kPast) {
      past_from(from - kPast * z_stride, z_stride);
    } else {
      if (rows.fresh[row] == 0) {
        past_from(TailOf<T>(args, rows.base_slot[row]) + channel, width);
      } else {
#pragma unroll
        for (int j = 0; j < kPast; ++j) {
#pragma unroll
          for (int c = 0; c < kStrip; ++c) past[j][c] = 0.0f;
        }
      }
#pragma unroll 1
      for (int i = before; i > 0; --i) {
#pragma unroll
        for (int j = 0; j + 1 < kPast; ++j) {
#pragma unroll
          for (int c = 0; c < kStrip; ++c) past[j][c] = past[j + 1][c];
        }
        Load<kStrip>(from - i * z_stride, past[kPast - 1]);
      }
    }
    for (; left > 0; left -= kTokens) {
      float y[kTokens][kStrip], bias[kStrip] = {};
      if (args.bias != nullptr) Load<kStrip>(args.bias + channel, bias);
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        float input[kStrip];
        Unpack(next[t], input);
#pragma unroll
        for (int c = 0; c < kStrip; ++c) {
          y[t][c] = bias[c];
#pragma unroll
          for (int j = 0; j < kPast; ++j) y[t][c] = fmaf(weight[j][c], past[j][c], y[t][c]);
          y[t][c] = fmaf(weight[kPast][c], input[c], y[t][c]);
#pragma unroll
          for (int j = 0; j + 1 < kPast; ++j) past[j][c] = past[j + 1][c];
          past[kPast - 1][c] = input[c];
        }
      }
      from += kTokens * z_stride;
      load_next(from, left - kTokens);
      Activate<T>(activation, y);
      if (warp_has_keys) {
        float sum[kTokens] = {};
        const auto add = [&](auto to_sum) {
#pragma unroll
          for (int t = 0; t < kTokens; ++t) {
#pragma unroll
            for (int c = 0; c < kStrip; ++c) sum[t] = to_sum(y[t][c], sum[t]);
          }
        };
        if (l2) {
          add([](float x, float sum_before) { return fmaf(x, x, sum_before); });
        } else {
          add([](float x, float sum_before) { return sum_before + x; });
        }
#pragma unroll 1
        for (int offset = lanes / 2; offset > 0; offset /= 2) {
#pragma unroll
          for (int t = 0; t < kTokens; ++t) sum[t] += __shfl_xor_sync(0xffffffffu, sum[t], offset);
        }
        if (is_key) {
#pragma unroll
          for (int t = 0; t < kTokens; ++t) {
            const float factor = l2 ? InverseRootFor<T>(sum[t] + 1e-6f) : 1.0f / sum[t];
#pragma unroll
            for (int c = 0; c < kStrip; ++c) y[t][c] *= factor;
          }
        }
      }
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        if (there && t < left) Store<kStrip>(y[t], to + t * out_stride);
      }
      to += kTokens * out_stride;
    }
    if (part_end < row_end || !there || rows.work_slot[row] < 0 || !StripsKeepTail(rows, row)) continue;
    Packed<T, kStrip> kept[kPast];
#pragma unroll
    for (int j = 0; j < kPast; ++j) {
      const int64_t token = row_end - kPast + j;
      if (token >= row_begin) {
        kept[j] = LoadPacked<kStrip>(z + token * z_stride);
      } else if (rows.fresh[row] == 0) {
        kept[j] = LoadPacked<kStrip>(TailOf<T>(args, rows.base_slot[row]) +
                                     (token - row_begin + kPast) * width + channel);
      } else {
        kept[j] = {};
      }
    }
    T* const tail = TailOf<T>(args, rows.work_slot[row]) + channel;
#pragma unroll
    for (int j = 0; j < kPast; ++j) *reinterpret_cast<Packed<T, kStrip>*>(tail + j * width) = kept[j];
  }
}

bool TakesStrips(const ShortConvQkvArgs& args) {
  constexpr int64_t kMostStride = int64_t{1} << 28;  // A few of them are an int.
  const int64_t lanes = args.key_dim / kStrip;
  return args.taps == kStripTaps && args.key_dim % kStrip == 0 && args.value_dim % kStrip == 0 &&
         lanes <= 32 && (lanes & (lanes - 1)) == 0 && args.z_stride % kStrip == 0 &&
         args.z_stride < kMostStride && args.out_stride % kStrip == 0 && args.out_stride < kMostStride &&
         args.tail.slot_stride % 4 == 0 && args.tail.offset % 4 == 0 &&
         Aligned16({args.z, args.out, args.weight, args.bias, args.tail.pool});
}

template <typename T>
absl::Status LaunchStrips(const RaggedRows& rows, const ShortConvQkvArgs& args, cudaStream_t stream) {
  const int64_t strips = QkvWidth(args) / kStrip;
  const int64_t blocks = Pieces(strips, kThreads);
  const int64_t tile = std::clamp<int64_t>(Pieces(rows.tokens * blocks, kBlocks), 1, kMostTile);
  const dim3 grid(static_cast<unsigned>(Pieces(rows.tokens, tile)), static_cast<unsigned>(blocks + 1));
  return LaunchOverlapping("ShortConvStripKernel", ShortConvStripKernel<T>, {.grid = grid, .threads = kThreads}, stream,
                           rows, args, static_cast<int>(tile));
}

template <typename T>
__global__ void ShortConvHeadKernel(RaggedRows rows, ShortConvQkvArgs args) {
  const int64_t parts = 3 * args.heads + 1;
  const int64_t part = blockIdx.x % parts, tile = blockIdx.x / parts * kTile;
  const int64_t tile_end = tile + kTile < rows.tokens ? tile + kTile : rows.tokens;
  const int64_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  T* const out = static_cast<T*>(args.out);
  if (part == 3 * args.heads) {
    for (int64_t n = tile + warp; n < tile_end; n += kWarps) {
      for (int64_t h = lane; h < args.heads; h += 32) WriteBeta<T>(args, n, h);
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
      return Activated<T>(activation, Convolved<T>(rows, args, row, i, first + c));
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

// The tails of all rows, or of those that the strips have left. A thread is a channel of a row. It reads all that it
// keeps before it writes, so base may be work.
template <typename T>
__global__ void ShortConvTailKernel(RaggedRows rows, ShortConvQkvArgs args, bool after_strips) {
  LetNextBegin();
  AwaitEarlier();
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t width = QkvWidth(args);
  if (index >= rows.rows * width) return;
  const int row = static_cast<int>(index / width);
  const int64_t tokens = rows.offsets[row + 1] - rows.offsets[row];
  if (rows.work_slot[row] < 0 || tokens <= args.longer_than) return;
  if (after_strips && tokens > 0 && StripsKeepTail(rows, row)) return;
  const int64_t c = index % width;
  const int64_t kept = args.taps - 1;
  const int64_t from = tokens - kept;
  float inputs[kMaxShortConvTaps - 1];
#pragma unroll
  for (int i = 0; i < kMaxShortConvTaps - 1; ++i) {
    if (i < kept) inputs[i] = InputAt<T>(rows, args, row, from + i, c);
  }
  T* const to = TailOf<T>(args, rows.work_slot[row]);
#pragma unroll
  for (int i = 0; i < kMaxShortConvTaps - 1; ++i) {
    if (i < kept) to[i * width + c] = FromFloat<T>(inputs[i]);
  }
}

template <typename T>
absl::Status Launch(const RaggedRows& rows, const ShortConvQkvArgs& args, cudaStream_t stream) {
  const bool strips = rows.tokens > 0 && TakesStrips(args);
  if (strips) {
    RETURN_IF_ERROR(LaunchStrips<T>(rows, args, stream));
  } else if (rows.tokens > 0) {
    const int64_t blocks = Pieces(rows.tokens, kTile) * (3 * args.heads + 1);
    ShortConvHeadKernel<T><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(rows, args);
    RETURN_IF_ERROR(LaunchStatus("ShortConvHeadKernel"));
  }
  if (rows.rows == 0 || args.taps < 2) return absl::OkStatus();
  if (strips && !rows.in_place && rows.shortest > 0) return absl::OkStatus();  // No tail is left.
  const int64_t channels = rows.rows * QkvWidth(args);
  const dim3 grid(static_cast<unsigned>(Pieces(channels, kThreads)));
  return LaunchOverlapping("ShortConvTailKernel", ShortConvTailKernel<T>, {.grid = grid, .threads = kThreads}, stream,
                           rows, args, strips);
}

}  // namespace

absl::Status ShortConvQkvCuda(const RaggedRows& rows, const ShortConvQkvArgs& args, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  return args.dtype == DType::kBFloat16 ? Launch<__nv_bfloat16>(rows, args, cuda_stream)
                                        : Launch<float>(rows, args, cuda_stream);
}

}  // namespace deltanet
