// A `delta_net` mixer on a GPU for rows of a few tokens, from z to what o_proj takes, in one kernel.
//
//   y = conv(z)      q, k = norm(act(y))      v = silu(y)      beta = sigmoid(z) * beta_scale
//   u = beta (v - S^T k)      o = scale (S^T q + (q k) u)      S += k u^T
//   out = o / rms(o) * scale_v [* silu(gate)]
//
// with S as it is before the token, so that one walk over it gives both S^T k and S^T q.
//
// Tiling: a block is one head of one row: 2 D threads (D = K = V), which hold S in registers. Thread t has
// columns 4 (t % (D/4)) to +3 of the state rows g, g + 8, ..., where g = t / (D/4) is one of eight groups: a
// group reads and writes whole rows of S, 4 D bytes. For the front, thread t has channel t of q and k
// (q: t < D), and of v, with the last three inputs of each. A token takes two barriers: what the front made
// is in shared memory after the first (q and k before their norm, with their warps' sums), the groups' sums
// over S after the second. The first group alone makes o, whose norm is then a matter of its lanes.
//
// Bytes a row and head: 8 D^2 for S, 18 D + 18 D for the tails (bfloat16); a token: 2 (3 D + 1) of z, D of
// the gate, D out, twice as much in float32. D = 128: 128 KiB + 4.5 KiB + 1 KiB a token. 16 heads and 64,
// 256, 1024 sessions of one token: 140, 560, 2239 MB: 33, 130, 521 us at 4.3 TB/s. FLOPs: 8 D^2 a token.
//
// The kernel begins while the one before it still runs (LaunchOverlapping). What it needs from slots, tails
// and S, is asked for before it waits for that one, which makes z, and S not waited for until the first
// barrier; with D = 128 two blocks fit a multiprocessor (128 registers a thread), 128 KiB on their way.
//
// Measured (27 November 2026, one H200, 16 heads of 128, a token of 1, 16, 64, 256, 1024 sessions, us, a
// graph of one call): 8, 12, 44, 163, 629 with tails in float32, 141 KiB a head; a plain copy of the same
// states from slot to slot 5, 9, 39, 145, 569, and of all its forms that were tried (units of 4 to 64 KiB,
// through registers or in bulk, 8 to 26 MB on their way) none took less than 37.5, 137 and 532. ncu, tails in
// bfloat16, 256 and 1024 sessions: 160 and 619 us at 69 and 74 % of the memory's peak, the copy 133 and 540 us
// at 80 and 82 %. In turn with this: S in shared memory, three blocks a multiprocessor, 51, 163, 607; a block
// for many heads, the next one's S on its way to shared memory, 50, 172, 656.
#include <cstdint>

#include "model/ops/cuda_kernels.h"
#include "model/ops/cuda_util.cuh"
#include "model/ops/cuda_vector.cuh"
#include "model/ops/delta_rule_cuda.h"
#include "model/ops/short_conv_cuda.cuh"

namespace deltanet {
namespace {

constexpr int kGroups = 8;
constexpr int kTaps = 4;

// One channel of q, k or v: its convolution, and the inputs that it remembers.
template <typename T>
class Channel {
 public:
  // From `token` on; `base_slot` is not looked at if `fresh`.
  __device__ Channel(const ShortConvQkvArgs& args, int64_t token, bool fresh, int32_t base_slot,
                     int64_t channel)
      : z_(static_cast<const T*>(args.z) + token * args.z_stride + channel), stride_(args.z_stride) {
    const int64_t width = QkvWidth(args);
    const T* const tail = TailOf<T>(args, base_slot) + channel;
#pragma unroll
    for (int j = 0; j < kTaps - 1; ++j) before_[j] = fresh ? 0.0f : ToFloat(tail[j * width]);
#pragma unroll
    for (int j = 0; j < kTaps; ++j) weight_[j] = args.weight[j * width + channel];
    bias_ = args.bias != nullptr ? args.bias[channel] : 0.0f;
  }

  // Reads ahead: a token's input is asked for before the token before it is worked on.
  __device__ void Fetch() {
    next_ = *z_;
    z_ += stride_;
  }
  // The convolution at the token that was fetched last.
  __device__ float Next() {
    const float x = ToFloat(next_);
    float y = bias_;
#pragma unroll
    for (int j = 0; j < kTaps - 1; ++j) y = fmaf(weight_[j], before_[j], y);
    y = fmaf(weight_[kTaps - 1], x, y);
#pragma unroll
    for (int j = 0; j + 1 < kTaps - 1; ++j) before_[j] = before_[j + 1];
    before_[kTaps - 2] = x;
    return y;
  }
  __device__ void StoreTail(const ShortConvQkvArgs& args, int32_t work_slot, int64_t channel) const {
    const int64_t width = QkvWidth(args);
    T* const tail = TailOf<T>(args, work_slot) + channel;
#pragma unroll
    for (int j = 0; j < kTaps - 1; ++j) tail[j * width] = FromFloat<T>(before_[j]);
  }

 private:
  const T* z_;
  const int64_t stride_;
  float before_[kTaps - 1];
  float weight_[kTaps];
  float bias_;
  T next_;
};

template <typename T, int kDim>
__global__ void __launch_bounds__(2 * kDim, kDim == 128 ? 2 : 6)
    DeltaNetStepKernel(RaggedRows rows, DeltaNetMixerArgs args) {
  constexpr int kLanes = kDim / 4;       // Of a group.
  constexpr int kRows = kDim / kGroups;  // Of S, that a thread holds.
  constexpr int kNormWarps = kDim / 32;  // That hold q, and k.
  struct Token {
    float q[kDim], k[kDim], v[kDim];
    float sums[2 * kNormWarps];  // Of q's warps, then of k's.
  };
  // A token's own, by turns: the threads that are ahead write the next one's.
  __shared__ Token tokens[2];
  // The groups' sums.
  __shared__ float4 remembered[kGroups][kLanes];  // S^T k
  __shared__ float4 answered[kGroups][kLanes];    // S^T q
  __shared__ float products[kGroups];             // q k

  LetNextBegin();
  const ShortConvQkvArgs& conv = args.conv;
  const int heads = static_cast<int>(conv.heads);
  const int row = blockIdx.x / heads, head = blockIdx.x % heads;
  // Together, for each is a way to the memory and back.
  const int32_t begin = rows.offsets[row], end = rows.offsets[row + 1];
  const int32_t base_slot = rows.base_slot[row], work_slot = rows.work_slot[row];
  const bool fresh = rows.fresh[row] != 0;
  const int count = end - begin;
  if (count > kDeltaRuleFewTokens || work_slot < 0) return;
  const int thread = threadIdx.x, lane = thread % kLanes, group = thread / kLanes;

  // The front's own reads first: they are waited for first.
  const int64_t first = int64_t{head} * kDim, third = int64_t{heads} * kDim;
  const int64_t qk_channel = (thread < kDim ? 0 : third - kDim) + first + thread;
  const int64_t v_channel = 2 * third + first + thread;
  const bool has_v = thread < kDim;
  Channel<T> qk(conv, begin, fresh, base_slot, qk_channel);
  Channel<T> v(conv, begin, fresh, base_slot, has_v ? v_channel : qk_channel);

  float4 s[kRows];
  const int64_t in_slot = int64_t{head} * (kDim * kDim) + group * kDim + 4 * lane;
  if (fresh) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) s[i] = make_float4(0, 0, 0, 0);
  } else {
    const float* const from = args.rule.state.at(base_slot) + in_slot;
#pragma unroll
    for (int i = 0; i < kRows; ++i) s[i] = __ldcs(reinterpret_cast<const float4*>(from + i * kGroups * kDim));
  }
  AwaitEarlier();
  if (count > 0) {
    qk.Fetch();
    v.Fetch();
  }

  const bool l2 = conv.norm == QkNorm::kL2;
  const T* const z = static_cast<const T*>(conv.z) + begin * conv.z_stride;
  for (int t = 0; t < count; ++t) {
    Token& token = tokens[t % 2];
    const float y = Activated<T>(conv.activation, qk.Next());
    *(thread < kDim ? &token.q[thread] : &token.k[thread - kDim]) = y;
    const float sum = WarpSum(l2 ? y * y : y);
    if (thread % 32 == 0) token.sums[thread / 32] = sum;
    if (has_v) token.v[thread] = Activated<T>(QkActivation::kSilu, v.Next());
    float beta = conv.beta_scale;
    if (conv.has_beta) beta *= Sigmoid(ToFloat(z[t * conv.z_stride + 3 * third + head]));
    if (t + 1 < count) {
      qk.Fetch();
      v.Fetch();
    }
    __syncthreads();

    float q_sum = 0, k_sum = 0;
#pragma unroll
    for (int w = 0; w < kNormWarps; ++w) {
      q_sum += token.sums[w];
      k_sum += token.sums[kNormWarps + w];
    }
    const auto normed = [l2](float x, float sum, float inverse) { return l2 ? x * inverse : x / sum; };
    const float q_inverse = 1.0f / sqrtf(q_sum + 1e-6f), k_inverse = 1.0f / sqrtf(k_sum + 1e-6f);
    float4 from_k = make_float4(0, 0, 0, 0), from_q = from_k;
    float product = 0;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const float k_i = normed(token.k[group + i * kGroups], k_sum, k_inverse);
      const float q_i = normed(token.q[group + i * kGroups], q_sum, q_inverse);
      product = fmaf(q_i, k_i, product);
      from_k.x = fmaf(s[i].x, k_i, from_k.x), from_q.x = fmaf(s[i].x, q_i, from_q.x);
      from_k.y = fmaf(s[i].y, k_i, from_k.y), from_q.y = fmaf(s[i].y, q_i, from_q.y);
      from_k.z = fmaf(s[i].z, k_i, from_k.z), from_q.z = fmaf(s[i].z, q_i, from_q.z);
      from_k.w = fmaf(s[i].w, k_i, from_k.w), from_q.w = fmaf(s[i].w, q_i, from_q.w);
    }
    remembered[group][lane] = from_k;
    answered[group][lane] = from_q;
    if (lane == 0) products[group] = product;
    __syncthreads();

    float u[4] = {0, 0, 0, 0};
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const float4 part = remembered[g][lane];
      u[0] += part.x, u[1] += part.y, u[2] += part.z, u[3] += part.w;
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) u[e] = beta * (token.v[4 * lane + e] - u[e]);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const float k_i = normed(token.k[group + i * kGroups], k_sum, k_inverse);
      s[i].x = fmaf(k_i, u[0], s[i].x);
      s[i].y = fmaf(k_i, u[1], s[i].y);
      s[i].z = fmaf(k_i, u[2], s[i].z);
      s[i].w = fmaf(k_i, u[3], s[i].w);
    }
    if (group != 0) continue;

    float o[4] = {0, 0, 0, 0}, q_k = 0;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const float4 part = answered[g][lane];
      o[0] += part.x, o[1] += part.y, o[2] += part.z, o[3] += part.w;
      q_k += products[g];
    }
    float squares = 0;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      o[e] = args.rule.scale * fmaf(q_k, u[e], o[e]);
      squares = fmaf(o[e], o[e], squares);
    }
#pragma unroll
    for (int offset = kLanes / 2; offset > 0; offset /= 2) {
      squares += __shfl_xor_sync(kLanes == 32 ? 0xffffffffu : (1u << (kLanes % 32)) - 1, squares, offset);
    }
    const OutputNormArgs& norm = args.norm;
    const float factor = 1.0f / (sqrtf(squares / kDim + norm.epsilon.inside) + norm.epsilon.after);
    const int64_t column = first + 4 * lane;
    T* const out = static_cast<T*>(norm.out) + (begin + t) * third + column;
    const T* const gate = norm.gate == nullptr
                              ? nullptr
                              : static_cast<const T*>(norm.gate) + (begin + t) * norm.gate_stride + column;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      float x = o[e] * factor * norm.scale[4 * lane + e];
      if (gate != nullptr) {
        const float g = ToFloat(gate[e]);
        x *= g * Sigmoid(g);
      }
      out[e] = FromFloat<T>(x);
    }
  }

  qk.StoreTail(conv, work_slot, qk_channel);
  if (has_v) v.StoreTail(conv, work_slot, v_channel);
  float* const to = args.rule.state.at(work_slot) + in_slot;
  bool finite = true;
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    finite &= isfinite(s[i].x) && isfinite(s[i].y) && isfinite(s[i].z) && isfinite(s[i].w);
    __stcs(reinterpret_cast<float4*>(to + i * kGroups * kDim), s[i]);
  }
  if (!finite) args.rule.nonfinite[row] = 1;
}

bool Aligned(const SlotView& slots) {
  return Aligned16({slots.pool}) && slots.slot_stride % 4 == 0 && slots.offset % 4 == 0;
}

template <typename T, int kDim>
absl::Status Launch(const RaggedRows& rows, const DeltaNetMixerArgs& args, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(rows.rows * args.conv.heads);
  return LaunchOverlapping("DeltaNetStepKernel", DeltaNetStepKernel<T, kDim>,
                           {.grid = dim3(blocks), .threads = 2 * kDim}, stream, rows, args);
}

template <typename T>
absl::Status Launch(const RaggedRows& rows, const DeltaNetMixerArgs& args, cudaStream_t stream) {
  return args.conv.key_dim == 64 ? Launch<T, 64>(rows, args, stream) : Launch<T, 128>(rows, args, stream);
}

}  // namespace

bool DeltaNetStepCudaTakes(const DeltaNetMixerArgs& args) {
  const int64_t dim = args.conv.key_dim;
  return (dim == 64 || dim == 128) && args.conv.value_dim == dim && args.conv.taps == kTaps &&
         args.norm.groups == args.conv.heads && Aligned(args.rule.state);
}

absl::Status DeltaNetStepCuda(const RaggedRows& rows, const DeltaNetMixerArgs& args, void* stream) {
  if (rows.rows == 0) return absl::OkStatus();
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  return args.conv.dtype == DType::kBFloat16 ? Launch<__nv_bfloat16>(rows, args, cuda_stream)
                                             : Launch<float>(rows, args, cuda_stream);
}

}  // namespace deltanet
