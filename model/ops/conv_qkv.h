// The front of a DeltaNet mixer with channel-mixing convolutions (the README families):
//
//   q, k, v = act(conv3(linear(x)))   split into heads, q and k divided by (L2 norm + 1e-6)   beta =
//   sigmoid(linear(x))
//
// A convolution of three taps over a linear layer is one matrix product over three neighbouring inputs, with
// weights composed once at load time (W_j A for tap j). So the front is: GatherTaps, one product z = taps [N,
// 3d] x composed [3d, 3D+H], and ConvQkvActivation in place on z; and only raw inputs are remembered from one
// step to the next, not three projections of them.
#ifndef DELTANET_MODEL_OPS_CONV_QKV_H_
#define DELTANET_MODEL_OPS_CONV_QKV_H_

#include <cstdint>

#include "absl/status/status.h"
#include "model/ops/rms_norm.h"
#include "model/ops/rows.h"

namespace deltanet {

// Taps of the convolution, and so inputs remembered between steps: kConvTaps - 1.
inline constexpr int64_t kConvTaps = 3;

struct GatherTapsArgs {
  int64_t width = 0;         // d
  int64_t lag = 0;           // Position of the newest input = time - lag.
  const float* x = nullptr;  // [N, d] The layer's raw input.
  const float* norm_scale =
      nullptr;    // [d] RMSNorm applied to what the taps see (pre-norm families); null: none.
  SlotView tail;  // [2, d] a slot: the last two raw inputs, older first. Fresh rows: position < 0, unread.
  DType dtype = DType::kFloat32;  // Of taps: float32, on CUDA also bfloat16.
  void* taps = nullptr;           // [N, 3, d] oldest first; zero where the position is invalid.
  float* centre = nullptr;  // [N, d] Raw input one before the newest (zero if there is none): the residual of
                            // a centred convolution. Null: not wanted.
};

// Fills `taps` (and `centre`) from x and the base slots' tails, then writes the work slots' tails. Safe when
// a row's base and work slot are the same. Bytes a token: 4d read, 12d (16d) written. INVALID_ARGUMENT on
// sizes or device.
absl::Status GatherTaps(const RaggedRows& rows, const GatherTapsArgs& args, const OpContext& context);

enum class QkvActivation { kRelu, kSilu };

struct ConvQkvActivationArgs {
  int64_t heads = 0;      // H
  int64_t key_dim = 0;    // K: q and k are H*K wide
  int64_t value_dim = 0;  // V
  QkvActivation activation = QkvActivation::kRelu;
  int64_t lag = 0;  // As in GatherTaps.
  int64_t centre_tap =
      0;  // Tap whose position the output has: 1 centred, 2 causal. beta is zero where it is invalid.
  DType dtype = DType::kFloat32;  // Of z: float32, on CUDA also bfloat16.
  void* z = nullptr;  // Token n at z + n * z_stride: [q (H*K), k (H*K), v (H*V), beta (H)], in place.
  int64_t z_stride = 0;
  const float* bias = nullptr;  // [2HK + HV + H] With all taps valid.
  const float* tap_bias =
      nullptr;  // [3, 2HK + HV] What tap j's linear bias adds: taken away where tap j is invalid.
};

// z += bias; q, k, v = activation; q, k /= (L2 norm per head + 1e-6); beta = sigmoid. INVALID_ARGUMENT on
// sizes or device.
absl::Status ConvQkvActivation(const RaggedRows& rows, const ConvQkvActivationArgs& args,
                               const OpContext& context);

}  // namespace deltanet

#endif  // DELTANET_MODEL_OPS_CONV_QKV_H_
