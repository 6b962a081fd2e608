// The front of a DeltaNet mixer as flash-linear-attention writes it (`delta_net`): a short depthwise causal
// convolution over each channel of q, k and v, then
//
//   q, k = norm(act(conv(z)))   per head        v = silu(conv(z))        beta = sigmoid(z) * beta_scale
//
//   conv(z)_t[c] = bias[c] + sum_j weight[j][c] z_{t - (taps-1) + j}[c],   z of positions before the start: 0
//
// Source: fla/layers/delta_net.py of github.com/fla-org/flash-linear-attention. A session remembers the last
// taps - 1 raw z of each channel.
#ifndef DELTANET_MODEL_OPS_SHORT_CONV_H_
#define DELTANET_MODEL_OPS_SHORT_CONV_H_

#include <cstdint>

#include "absl/status/status.h"
#include "model/ops/rows.h"

namespace deltanet {

enum class QkActivation { kSilu, kRelu, kEluPlusOne, kIdentity };  // kEluPlusOne: x + 1, exp(x) where x < 0.
enum class QkNorm {
  kL2,   // x / sqrt(sum(x^2) + 1e-6)
  kSum,  // x / sum(x)
};

// A kernel of more taps is refused when a model is loaded.
inline constexpr int64_t kMaxShortConvTaps = 8;

struct ShortConvQkvArgs {
  int64_t heads = 0;      // H
  int64_t key_dim = 0;    // K: q and k are H*K wide
  int64_t value_dim = 0;  // V
  QkActivation activation = QkActivation::kSilu;
  QkNorm norm = QkNorm::kL2;
  bool has_beta = true;     // Else beta is beta_scale.
  float beta_scale = 1.0f;  // 2 allows negative eigenvalues.
  int64_t taps = 4;         // 1 ... kMaxShortConvTaps; 0: no convolution, no weight, bias or tail.
  DType dtype = DType::kFloat32;  // Of z and out: float32, on CUDA also bfloat16.
  // Raw projections. Token n at z + n * z_stride: [q (H*K), k (H*K), v (H*V)], and [beta (H)] if has_beta.
  const void* z = nullptr;
  int64_t z_stride = 0;           // Elements.
  const float* weight = nullptr;  // [taps, 2HK + HV], the oldest tap first.
  const float* bias = nullptr;    // [2HK + HV], or null.
  SlotView tail;  // [taps - 1, 2HK + HV] of `dtype` a slot: the last raw z, oldest first; zero before the start.
  // Token n at out + n * out_stride: [q (H*K), k (H*K), v (H*V), beta (H)]; must not overlap z.
  void* out = nullptr;
  int64_t out_stride = 0;
  // On CUDA: the tails of rows of this many tokens or fewer are left alone, their `out` is not defined.
  int64_t longer_than = -1;
};

// Fills `out` from z and the base slots' tails (zeros where fresh), then writes the work slots' tails (a row
// without tokens copies its tail). Safe when a row's base and work slot are the same. Bytes a token: z read
// and out written once, the tail read and written once a row; FLOPs: 2 taps a channel. INVALID_ARGUMENT on
// sizes, dtype or device.
absl::Status ShortConvQkv(const RaggedRows& rows, const ShortConvQkvArgs& args, const OpContext& context);

}  // namespace deltanet

#endif  // DELTANET_MODEL_OPS_SHORT_CONV_H_
