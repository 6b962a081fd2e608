// A `delta_net` mixer on a GPU for rows of a few tokens, from z to what o_proj takes, in one kernel.
//
//   y = conv(z)      q, k = norm(act(y))      v = silu(y)      beta = sigmoid(z) * beta_scale
//   u = beta (v - S^T k)      o = scale (S^T q + (q k) u)      S += k u^T
//   out = o / rms(o) * scale_v [* silu(gate)]
//
// with S as it is before the token, so that one walk over it gives both S^T k and S^T q. Of a model without
// convolutions y is z.
//
// Tiling: a block is one head of one row: 2 D threads (D = K = V). S comes into shared memory by one bulk
// copy, asked for as soon as the row is known, then goes to registers, where it stays for all tokens of the
// row, and back by the way it came, a part of the rows as soon as its two warps (D = 64: one) have it. A
// thread has four columns and D / 8 neighbouring rows: half a warp has 64 columns, the other half the next
// rows of the same. For the front, a quarter of the threads each has q, k, v, two neighbouring channels a
// thread, and what the output is multiplied with, the norm's scale and the gate. A token takes two barriers:
// what the front made is in shared memory after the first (q and k before their norm, which is made up for in
// what is summed over them, with their warps' sums), the warps' sums over S after the second. The first D / 4
// threads make o, whose norm is then a matter of their lanes; the last token's when S is on its way already.
//
// Bytes a row and head: 8 D^2 for S, 18 D + 18 D for the tails (bfloat16); a token: 2 (3 D + 1) of z, D of
// the gate, D out, twice as much in float32. D = 128: 128 KiB + 4.5 KiB + 1 KiB a token. 16 heads and 64,
// 256, 1024 sessions of one token: 140, 560, 2239 MB: 33, 130, 521 us at 4.3 TB/s. FLOPs: 8 D^2 a token.
//
// The kernel begins while the one before it still runs (LaunchOverlapping). What it needs from slots, tails
// and S, is asked for before it waits for that one, which makes z, and S not waited for until the first
// barrier; with D = 128 two blocks fit a multiprocessor (128 registers a thread), 128 KiB on their way.
//
// What else counts is that a block waits for all at once: under load a way to the memory and back takes 2 us
// or more, a hit in the L2 not much less. So what is known of the row is one condition, the tails stay as
// they lie in memory until z has been asked for, and nothing is left to be asked for at the end. Neither may
// registers spill: what is reloaded queues behind S.
//
// Measured (27 November 2026, one H200, 16 heads of 128, a token of 1, 16, 64, 256, 1024 sessions, us, a
// graph of one call, delta_rule_cuda_bench): 8, 13, 43, 146, 561; 64 rows of 8 and 16 tokens 97, 153. A plain
// copy of the same states, without the tails, 6, 9, 39, 141, 546; with loads by each thread, scale and gate
// read at the end, this kernel took 9, 14, 48, 163, 625 and 125, 208. ncu, 64, 256, 1024 sessions: 39, 144,
// 555 us at 60, 77, 83 % of the memory's peak, the copy 34, 134, 540 us at 66, 79, 82 %. Of the copies that
// were tried, those with 48 to 64 KiB a multiprocessor on their way, in units of 8 to 16 KiB, are the best
// (38, 135, 525 us), and more on its way costs: 192 KiB 570 us at 1024 sessions; so do loads that are evicted
// first beside stores that are not (570), and slots side by side (541, 527 with those read in one half of the
// pool). With the tails copied too, 42, 145, 561. Without convolutions, which is what other delta rules for a
// token are measured by, and has no tails: 7, 11, 41, 139, 537, in a call where the whole took 8, 12, 43,
// 147, 560 and the copy 5, 9, 39, 139, 543.
//
// No gain, 64, 256, 1024 sessions, where this took 43, 145, 560 (each call on other sessions): stores from
// registers (43, 146, 560); three blocks a multiprocessor, S read from shared memory twice (43, 147, 566,
// several tokens slower by a tenth), and then S asked for after the front (42, 147, 563), or S and tails
// evicted first (43, 152, 595). With loads by each thread and some registers spilled: half a head or a
// quarter a block, in a cluster that sums up the norm (53, 188, 768 and more); the S of the blocks to come
// brought into the L2 (51, 174, 673). With half of S, a quarter or nothing of it asked for before z, a step
// of the 1.3B model took 0.01 to 0.02 ms more with one session; a half or a quarter took 0.005 ms less with
// 16, and as much with 64.
//
// By the device's clock, in a step of 64 (28 November 2026): of a block's 8.3 us 0.8 until it asks for S, 3.9
// until that is there, 2.2 until it is on its way back, 1.4 until the block ends; 1.5 until the next one
// begins in its place. Blocks that stay instead, two a multiprocessor, each with its share of rows and heads
// and with the next S asked for when this one is in registers, took 49, 167, 634 us (43, 152, 578 without
// convolutions): tails and z are then waited for once an item, and multiprocessors are not alike (of equal
// shares the first was done 19 us before the last). S of the second blocks brought into the L2 by the first
// ones while they wait for z, 16, 32 or 64 KiB each: 42, 42, 43 us without convolutions instead of 41, the
// step 0.01 to 0.05 ms more. What waits in the L2 is not cheaper than what comes from memory later.
#include <algorithm>
#include <cstdint>

#include "model/ops/cuda_kernels.h"
#include "model/ops/cuda_sm90.cuh"
#include "model/ops/cuda_util.cuh"
#include "model/ops/cuda_vector.cuh"
#include "model/ops/delta_rule_cuda.h"
#include "model/ops/short_conv_cuda.cuh"

namespace deltanet {
namespace {

constexpr int kMostTaps = 4;

// Whether S goes between the memories by bulk copies; else each thread copies its own part.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
constexpr bool kInBulk = true;
#else
constexpr bool kInBulk = false;
#endif

// Two neighbouring channels of q, k or v: their convolution, and the inputs that they remember. With no taps
// there is no convolution, and nothing to remember.
template <typename T, int kTaps>
class Channels {
 public:
  using Pair = Packed<T, 2>;
  static constexpr int kKept = kTaps > 0 ? kTaps - 1 : 0;

  // Asks for what `slot` remembers. Of a fresh row nothing is asked for: ForgetAll has to come before Next,
  // but behind all that is asked for besides, since it may wait for what was.
  __device__ Channels(const ShortConvQkvArgs& args, bool fresh, int32_t slot, int channel) {
    if (fresh || kKept == 0) return;
    const int width = static_cast<int>(QkvWidth(args));
    const T* const tail = TailOf<T>(args, slot) + channel;
#pragma unroll
    for (int j = 0; j < kKept; ++j) before_[j] = LoadPacked<2>(tail + j * width);
  }
  __device__ void ForgetAll() {
#pragma unroll
    for (int j = 0; j < kKept; ++j) before_[j] = {};
  }

  // Reads ahead: both are called a token before Next works on it.
  __device__ void FetchWeights(const ShortConvQkvArgs& args, int channel) {
    if (kTaps == 0) return;
    const int width = static_cast<int>(QkvWidth(args));
#pragma unroll
    for (int j = 0; j < kTaps; ++j)
      weight_[j] = *reinterpret_cast<const float2*>(args.weight + j * width + channel);
    bias_ = args.bias != nullptr ? *reinterpret_cast<const float2*>(args.bias + channel) : make_float2(0, 0);
  }
  __device__ void Fetch(const T* z) { next_ = LoadPacked<2>(z); }
  // The convolution at the token that was fetched.
  __device__ void Next(float (&y)[2]) {
    if constexpr (kTaps == 0) return Unpack(next_, y);
    y[0] = bias_.x, y[1] = bias_.y;
#pragma unroll
    for (int j = 0; j < kTaps; ++j) {
      float x[2];
      Unpack(j < kKept ? before_[j] : next_, x);
      y[0] = fmaf(weight_[j].x, x[0], y[0]);
      y[1] = fmaf(weight_[j].y, x[1], y[1]);
    }
#pragma unroll
    for (int j = 0; j + 1 < kKept; ++j) before_[j] = before_[j + 1];
    if constexpr (kKept > 0) before_[kKept - 1] = next_;
  }
  __device__ void StoreTail(const ShortConvQkvArgs& args, int32_t work_slot, int channel) const {
    const int width = static_cast<int>(QkvWidth(args));
    T* const tail = TailOf<T>(args, work_slot) + channel;
#pragma unroll
    for (int j = 0; j < kKept; ++j) *reinterpret_cast<Pair*>(tail + j * width) = before_[j];
  }

 private:
  Pair before_[std::max(1, kKept)];  // As they lie in memory: to convert one is to wait for it.
  Pair next_;
  float2 weight_[std::max(1, kTaps)];
  float2 bias_;
};

template <int kDim>
struct Shared {
  static constexpr int kWarps = 2 * kDim / 32;
  static constexpr int kHalves = kDim / 64;        // Of a row of S: a warp has 64 columns.
  static constexpr int kParts = kWarps / kHalves;  // Of the rows of S.
  static constexpr int kPartRows = kDim / kParts;  // Two threads' in a column.
  struct alignas(16) Token {
    float q[kDim], k[kDim];  // Before their norm.
    float v[kDim];
    float factor[kDim];      // Of the output: the norm's scale and the gate.
    float sums[kWarps / 2];  // Of q's warps, then of k's, for their norm.
  };

  float4 s[kDim * kDim / 4];
  Token tokens[2];                      // By turns: the threads that are ahead write the next one's.
  float4 remembered[kParts][kDim / 4];  // S^T k
  float4 answered[kParts][kDim / 4];    // S^T q
  float products[kParts];               // q k
  uint64_t there;                       // A barrier: S has come.
};

__device__ inline float4 PlusTimes(const float4& x, float a, const float4& b) {
  return make_float4(fmaf(a, b.x, x.x), fmaf(a, b.y, x.y), fmaf(a, b.z, x.z), fmaf(a, b.w, x.w));
}
__device__ inline float4 Times(float a, const float4& x) {
  return make_float4(a * x.x, a * x.y, a * x.z, a * x.w);
}
template <int kCount>
__device__ inline float4 Sum(const float4* x, int stride) {
  float4 sum = x[0];
#pragma unroll
  for (int i = 1; i < kCount; ++i) sum = PlusTimes(sum, 1.0f, x[i * stride]);
  return sum;
}
// Of this lane and the one 16 from it.
__device__ inline float OfBoth(float x) { return x + __shfl_xor_sync(0xffffffffu, x, 16); }
__device__ inline float4 OfBoth(const float4& x) {
  return make_float4(OfBoth(x.x), OfBoth(x.y), OfBoth(x.z), OfBoth(x.w));
}
__device__ inline float At(const float4& x, int i) {
  return i == 0 ? x.x : i == 1 ? x.y : i == 2 ? x.z : x.w;
}
// Zero, or NaN if one of these or `before` is not finite.
__device__ inline float Zeros(const float4& x, float before) {
  return fmaf(x.x, 0.0f, fmaf(x.y, 0.0f, fmaf(x.z, 0.0f, fmaf(x.w, 0.0f, before))));
}

template <typename T, int kDim, int kTaps>
__global__ void __launch_bounds__(2 * kDim, kDim == 128 ? 2 : 5)
    DeltaNetStepKernel(RaggedRows rows, DeltaNetMixerArgs args) {
  using L = Shared<kDim>;
  constexpr int kNormWarps = kDim / 64;    // That hold q, and k.
  constexpr int kRows = L::kPartRows / 2;  // Of S, that a thread works on,
  constexpr int kPitch = kDim / 4;         // each so many float4.
  L& shared = *reinterpret_cast<L*>(DynamicSharedMemory());

  LetNextBegin();
  const ShortConvQkvArgs& conv = args.conv;
  const OutputNormArgs& norm = args.norm;
  const int heads = static_cast<int>(conv.heads);
  const int row = blockIdx.x / heads, head = blockIdx.x % heads;
  const int32_t begin = rows.offsets[row], end = rows.offsets[row + 1];
  const int32_t base_slot = rows.base_slot[row], work_slot = rows.work_slot[row];
  const bool fresh = rows.fresh[row] != 0;
  const int count = end - begin;
  // All in one condition, or they are not asked for together.
  if ((count > kDeltaRuleFewTokens) | (work_slot < 0) | ((base_slot < 0) & !fresh)) {
    AwaitEarlier();
    return;
  }
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int part = warp / L::kHalves, column = warp % L::kHalves * 16 + lane % 16;
  const int first_row = (2 * part + lane / 16) * kRows;
  float4* const place = shared.s + first_row * kPitch + column;  // Of the thread's part of S.
  const auto state_at = [&](int32_t slot) {
    return args.rule.state.at(slot) + int64_t{head} * (kDim * kDim);
  };
  const int in_state = first_row * kDim + 4 * column;

  const uint32_t there = SharedAddress(&shared.there);
  if constexpr (kInBulk) {
    if (thread == 0 && !fresh) {
      BarrierInit(there, 1);
      BarrierInitFence();
      BarrierArriveExpecting(there, sizeof(shared.s));
      CopyBulk(SharedAddress(shared.s), state_at(base_slot), sizeof(shared.s), there);
    }
  }
  const int first = head * kDim, third = heads * kDim;
  // A quarter of the threads each: q, k, v, and the factors of the output.
  const int quarter = thread / (kDim / 2), in_head = thread % (kDim / 2) * 2;
  const bool has_channels = quarter < 3;
  const int channel = (has_channels ? quarter : 0) * third + first + in_head;
  Channels<T, kTaps> channels(conv, fresh, base_slot, channel);
  channels.FetchWeights(conv, channel);
  float2 scale = make_float2(0, 0);
  if (!has_channels) scale = make_float2(norm.scale[in_head], norm.scale[in_head + 1]);
  float4 s[kRows];
  if (fresh || !kInBulk) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      s[i] = fresh ? make_float4(0, 0, 0, 0)
                   : *reinterpret_cast<const float4*>(state_at(base_slot) + in_state + i * kDim);
    }
  }
  const auto await_state = [&] {
    if constexpr (kInBulk) {
      if (fresh) return;
      BarrierWait(there, 0);
#pragma unroll
      for (int i = 0; i < kRows; ++i) s[i] = place[i * kPitch];
    }
  };

  AwaitEarlier();
  T next_beta{}, next_gate[2] = {};
  const auto fetch = [&](int t) {
    const T* const z = static_cast<const T*>(conv.z) + (begin + t) * conv.z_stride;
    if (has_channels) {
      channels.Fetch(z + channel);
    } else if (norm.gate != nullptr) {
      const T* const gate =
          static_cast<const T*>(norm.gate) + (begin + t) * norm.gate_stride + first + in_head;
      next_gate[0] = gate[0];
      next_gate[1] = gate[1];
    }
    if (conv.has_beta) next_beta = z[3 * third + head];
  };
  if (count > 0) fetch(0);
  if (fresh) channels.ForgetAll();
  const auto store_tails = [&] {
    if (has_channels) channels.StoreTail(conv, work_slot, channel);
  };

  // The warps of a part store it together.
  constexpr int kPartThreads = 32 * L::kHalves;
  const bool stores_part = thread % kPartThreads == 0;
  const auto store_state = [&] {
    float zeros = 0;
#pragma unroll
    for (int i = 0; i < kRows; ++i) zeros = Zeros(s[i], zeros);
    if (zeros != 0.0f) args.rule.nonfinite[row] = 1;  // NaN.
    float* const to = state_at(work_slot);
    if constexpr (kInBulk) {
      constexpr int kFloats = L::kPartRows * kDim;
#pragma unroll
      for (int i = 0; i < kRows; ++i) place[i * kPitch] = s[i];
      FenceAsyncProxy();
      NamedBarrier(1 + part, kPartThreads);
      if (stores_part)
        CopyBulkOut(to + part * kFloats, SharedAddress(shared.s) + part * kFloats * 4, kFloats * 4);
    } else {
#pragma unroll
      for (int i = 0; i < kRows; ++i) *reinterpret_cast<float4*>(to + in_state + i * kDim) = s[i];
    }
  };

  const bool l2 = conv.norm == QkNorm::kL2;
  for (int t = 0; t < count; ++t) {
    typename L::Token& token = shared.tokens[t % 2];
    if (has_channels) {
      float y[2];
      channels.Next(y);
      const QkActivation activation = quarter < 2 ? conv.activation : QkActivation::kSilu;
      y[0] = Activated<T>(activation, y[0]), y[1] = Activated<T>(activation, y[1]);
      float* const to = quarter == 0 ? token.q : quarter == 1 ? token.k : token.v;
      *reinterpret_cast<float2*>(to + in_head) = make_float2(y[0], y[1]);
      if (quarter < 2) {
        const float sum = WarpSum(l2 ? fmaf(y[0], y[0], y[1] * y[1]) : y[0] + y[1]);
        if (lane == 0) token.sums[warp] = sum;
      }
    } else {
      float2 factor = scale;
      if (norm.gate != nullptr) {
        const float gate[2] = {ToFloat(next_gate[0]), ToFloat(next_gate[1])};
        factor.x *= gate[0] * Sigmoid(gate[0]);
        factor.y *= gate[1] * Sigmoid(gate[1]);
      }
      *reinterpret_cast<float2*>(token.factor + in_head) = factor;
    }
    const float beta = conv.beta_scale * (conv.has_beta ? Sigmoid(ToFloat(next_beta)) : 1.0f);
    if (t + 1 < count) {
      fetch(t + 1);
    } else {
      store_tails();
    }
    __syncthreads();

    if (t == 0) await_state();
    float4 from_k = make_float4(0, 0, 0, 0), from_q = from_k;
    float product = 0;
    const float4* const k = reinterpret_cast<const float4*>(token.k + first_row);
    const float4* const q = reinterpret_cast<const float4*>(token.q + first_row);
#pragma unroll
    for (int i = 0; i < kRows; i += 4) {
      const float4 k4 = k[i / 4], q4 = q[i / 4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        from_k = PlusTimes(from_k, At(k4, j), s[i + j]);
        from_q = PlusTimes(from_q, At(q4, j), s[i + j]);
        product = fmaf(At(q4, j), At(k4, j), product);
      }
    }
    from_k = OfBoth(from_k);
    from_q = OfBoth(from_q);
    product = OfBoth(product);
    (lane < 16 ? shared.remembered : shared.answered)[part][column] = lane < 16 ? from_k : from_q;
    if (lane == 0 && warp % L::kHalves == 0) shared.products[part] = product;
    float q_sum = 0, k_sum = 0;
#pragma unroll
    for (int w = 0; w < kNormWarps; ++w) {
      q_sum += token.sums[w];
      k_sum += token.sums[kNormWarps + w];
    }
    // q and k are linear in all that follows, so that their norm can be made up for afterwards.
    const float q_factor = 1.0f / (l2 ? sqrtf(q_sum + 1e-6f) : q_sum);
    const float k_factor = 1.0f / (l2 ? sqrtf(k_sum + 1e-6f) : k_sum);
    __syncthreads();

    // u of four columns.
    const auto wrong = [&](int column) {
      const float4 sum = Sum<L::kParts>(&shared.remembered[0][column], kPitch);
      return Times(beta, PlusTimes(reinterpret_cast<const float4*>(token.v)[column], -k_factor, sum));
    };
    const float4 change = Times(k_factor, wrong(column));
#pragma unroll
    for (int i = 0; i < kRows; i += 4) {
      const float4 k4 = k[i / 4];
#pragma unroll
      for (int j = 0; j < 4; ++j) s[i + j] = PlusTimes(s[i + j], At(k4, j), change);
    }
    if (t + 1 < count) {
      channels.FetchWeights(conv, channel);
    } else {
      store_state();
    }
    if (thread >= kPitch) continue;

    float q_k = 0;
#pragma unroll
    for (int p = 0; p < L::kParts; ++p) q_k += shared.products[p];
    const float4 answer = Sum<L::kParts>(&shared.answered[0][thread], kPitch);
    const float4 o = Times(args.rule.scale * q_factor, PlusTimes(answer, k_factor * q_k, wrong(thread)));
    float squares = fmaf(o.x, o.x, fmaf(o.y, o.y, fmaf(o.z, o.z, o.w * o.w)));
#pragma unroll
    for (int offset = kPitch / 2; offset > 0; offset /= 2) {
      squares += __shfl_xor_sync(kPitch == 32 ? 0xffffffffu : (1u << (kPitch % 32)) - 1, squares, offset);
    }
    const float factor = 1.0f / (sqrtf(squares / kDim + norm.epsilon.inside) + norm.epsilon.after);
    const float4 scaled = Times(factor, o), factors = reinterpret_cast<const float4*>(token.factor)[thread];
    T* const out = static_cast<T*>(norm.out) + int64_t{begin + t} * third + first + 4 * thread;
    out[0] = FromFloat<T>(scaled.x * factors.x);
    out[1] = FromFloat<T>(scaled.y * factors.y);
    out[2] = FromFloat<T>(scaled.z * factors.z);
    out[3] = FromFloat<T>(scaled.w * factors.w);
  }

  if (count == 0) {
    store_tails();
    __syncthreads();  // The barrier is there.
    await_state();
    store_state();
  }
  if constexpr (kInBulk) {
    if (stores_part) CopyOutWait();
  }
}

bool Aligned(const SlotView& slots) {
  return Aligned16({slots.pool}) && slots.slot_stride % 4 == 0 && slots.offset % 4 == 0;
}

template <typename T, int kDim, int kTaps>
absl::Status Launch(const RaggedRows& rows, const DeltaNetMixerArgs& args, cudaStream_t stream) {
  const auto kernel = DeltaNetStepKernel<T, kDim, kTaps>;
  constexpr int kBytes = sizeof(Shared<kDim>);
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes) != cudaSuccess) {
    return LaunchStatus("DeltaNetStepKernel");
  }
  const auto blocks = static_cast<unsigned>(rows.rows * args.conv.heads);
  return LaunchOverlapping("DeltaNetStepKernel", kernel,
                           {.grid = dim3(blocks), .threads = 2 * kDim, .shared_bytes = kBytes}, stream, rows,
                           args);
}

template <typename T, int kDim>
absl::Status Launch(const RaggedRows& rows, const DeltaNetMixerArgs& args, cudaStream_t stream) {
  return args.conv.taps == 0 ? Launch<T, kDim, 0>(rows, args, stream)
                             : Launch<T, kDim, kMostTaps>(rows, args, stream);
}

template <typename T>
absl::Status Launch(const RaggedRows& rows, const DeltaNetMixerArgs& args, cudaStream_t stream) {
  return args.conv.key_dim == 64 ? Launch<T, 64>(rows, args, stream) : Launch<T, 128>(rows, args, stream);
}

}  // namespace

bool DeltaNetStepCudaTakes(const DeltaNetMixerArgs& args) {
  const int64_t dim = args.conv.key_dim;
  return (dim == 64 || dim == 128) && args.conv.value_dim == dim &&
         (args.conv.taps == kMostTaps || args.conv.taps == 0) && args.norm.groups == args.conv.heads &&
         Aligned(args.rule.state) && Aligned(args.conv.tail) &&
         Aligned16({args.conv.z, args.conv.weight, args.conv.bias}) && args.conv.z_stride % 2 == 0;
}

absl::Status DeltaNetStepCuda(const RaggedRows& rows, const DeltaNetMixerArgs& args, void* stream) {
  if (rows.rows == 0) return absl::OkStatus();
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  return args.conv.dtype == DType::kBFloat16 ? Launch<__nv_bfloat16>(rows, args, cuda_stream)
                                             : Launch<float>(rows, args, cuda_stream);
}

}  // namespace deltanet
