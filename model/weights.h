// A model's weights on the device, in the one layer structure that the engine runs; a family is a way to fill
// it.
//
// For each layer, with x the residual stream, res its row at the position that the output has, N RMSNorms
// (absent: identity):
//
//   m   = DeltaNet mixer of pre_norm(x)         qkv, out_norm (and output gate), out
//   x   = post_norm(res + m)
//   x   = post_ff_norm(x + W_o gate(W_i ff_norm(x)))          where the layer has a feed-forward
//   y   = [head] final_norm(x)                                after the last layer
#ifndef DELTANET_MODEL_WEIGHTS_H_
#define DELTANET_MODEL_WEIGHTS_H_

#include <cstdint>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/statusor.h"
#include "model/base/checkpoint.h"
#include "model/base/config.h"
#include "model/device.h"
#include "model/ops/conv_qkv.h"
#include "model/ops/elementwise.h"
#include "model/ops/rms_norm.h"
#include "model/ops/short_conv.h"

namespace deltanet {

// A weight of a matrix product as PyTorch keeps it, y = x * matrix^T + bias.
struct Linear {
  const void* matrix = nullptr;  // [outputs, inputs], of Weights::dtype.
  int64_t inputs = 0;
  int64_t outputs = 0;
  const float* bias = nullptr;  // [outputs], or null.
};

struct LayerWeights {
  const float* pre_norm = nullptr;  // [d]
  // To q, k, v, beta, and after them the output gate [HV] where there is one. MixerKind::kComposed: from taps
  // [3d], with its bias for all taps valid. kShortConv: from the token alone; a few outputs behind these may
  // be zero.
  Linear qkv;
  const float* tap_bias = nullptr;     // kComposed: [3, 2HK + HV] What each tap's linear bias adds.
  const float* conv_weight = nullptr;  // kShortConv: [taps, 2HK + HV], or null: no convolution.
  const float* conv_bias = nullptr;    // kShortConv: [2HK + HV], or null.
  const float* out_norm = nullptr;     // [HV], or [V] where Weights::norm_per_head.
  Linear out;                          // HV to d
  const float* post_norm = nullptr;  // [d]
  bool has_ff = false;
  const float* ff_norm = nullptr;  // [d]
  Linear ff_in;                    // d to 2f
  GateKind gate = GateKind::kSigmoidSecond;
  Linear ff_out;                        // f to d
  const float* post_ff_norm = nullptr;  // [d]
};

// What is before the delta rule.
enum class MixerKind {
  kComposed,   // ops/conv_qkv.h: the README families.
  kShortConv,  // ops/short_conv.h: `delta_net`.
};

struct Weights {
  ModelConfig config;
  DType dtype = DType::kFloat32;                  // Of matrices; everything else is float32.
  int64_t heads = 0, key_dim = 0, value_dim = 0;  // H, K, V
  float scale = 1.0f;                             // Of the delta rule's output.
  RmsEpsilon epsilon;
  MixerKind mixer = MixerKind::kComposed;
  QkvActivation activation = QkvActivation::kRelu;  // kComposed.
  // kShortConv.
  int64_t conv_taps = 0;  // 0: no convolution.
  QkActivation qk_activation = QkActivation::kSilu;
  QkNorm qk_norm = QkNorm::kL2;
  bool has_beta = true;
  float beta_scale = 1.0f;
  bool has_output_gate = false;
  bool norm_per_head = false;
  const void* embedding = nullptr;  // [vocabulary, d] of dtype; null: the input is values.
  std::vector<LayerWeights> layers;
  const float* final_norm = nullptr;  // [d]
  Linear head;                        // d to vocabulary; matrix null: the output is the residual stream.
  int64_t parameters = 0;             // In the file.
  DeviceBuffer arena;                 // Owns all of the above.
};

// Told of each piece of the checkpoint that has been read: bytes so far, and of all tensors together.
using LoadObserver = absl::FunctionRef<void(int64_t bytes, int64_t total_bytes)>;

// Loads the tensors of `config` (resolved, tensors checked) from `file` and composes each convolution of the
// README families with its linear layer, in float64; matrices are rounded to `dtype` (float32 or bfloat16)
// once, at the end. What is as it is in the file is read straight to its place, or through a few pinned
// pieces. INVALID_ARGUMENT if a tied head is in the file and differs from the embedding; DATA_LOSS if a file
// cannot be read. Throws what LibTorch throws.
absl::StatusOr<Weights> LoadWeights(const ModelConfig& config, const Checkpoint& file, const Device& device,
                                    DType dtype, LoadObserver observer);

}  // namespace deltanet

#endif  // DELTANET_MODEL_WEIGHTS_H_
