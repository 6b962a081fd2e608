// A model's weights on the device, in the one layer structure that the engine runs; a family is a way to fill
// it.
//
// For each layer, with x the residual stream, res its row at the position that the output has, N RMSNorms
// (absent: identity):
//
//   m   = DeltaNet mixer of pre_norm(x)         composed, out_norm, out (see ops/conv_qkv.h)
//   x   = post_norm(res + m)
//   x   = post_ff_norm(x + W_o gate(W_i ff_norm(x)))          where the layer has a feed-forward
//   y   = [head] final_norm(x)                                after the last layer
#ifndef DELTANET_MODEL_WEIGHTS_H_
#define DELTANET_MODEL_WEIGHTS_H_

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "model/base/config.h"
#include "model/base/safetensors.h"
#include "model/device.h"
#include "model/ops/conv_qkv.h"
#include "model/ops/elementwise.h"

namespace deltanet {

// A weight of a matrix product, [rows, columns] row-major with `stride` elements a row: y = x * matrix +
// bias.
struct Linear {
  const void* matrix = nullptr;  // Of Weights::dtype.
  int64_t rows = 0;              // Inputs.
  int64_t columns = 0;           // Outputs.
  int64_t stride = 0;
  const float* bias = nullptr;  // [columns], or null.
};

struct LayerWeights {
  const float* pre_norm = nullptr;  // [d]
  // Taps to q, k, v, beta: [3d, 2HK + HV + H], its bias with all taps valid, and what each tap's linear bias
  // adds [3, ...].
  Linear composed;
  const float* tap_bias = nullptr;
  const float* out_norm = nullptr;   // [HV]
  Linear out;                        // [HV, d]
  const float* post_norm = nullptr;  // [d]
  bool has_ff = false;
  const float* ff_norm = nullptr;  // [d]
  Linear ff_in;                    // [d, 2f]
  GateKind gate = GateKind::kSigmoidSecond;
  Linear ff_out;                        // [f, d]
  const float* post_ff_norm = nullptr;  // [d]
};

struct Weights {
  ModelConfig config;
  DType dtype = DType::kFloat32;                  // Of matrices; everything else is float32.
  int64_t heads = 0, key_dim = 0, value_dim = 0;  // H, K, V
  QkvActivation activation = QkvActivation::kRelu;
  const float* embedding = nullptr;  // [vocabulary, d]; null: the input is values.
  std::vector<LayerWeights> layers;
  const float* final_norm = nullptr;  // [d]
  Linear head;                        // [d, vocabulary]; matrix null: the output is the residual stream.
  int64_t parameters = 0;             // In the file.
  DeviceBuffer arena;                 // Owns all of the above.
};

// Loads the tensors of `config` (heads resolved, tensors checked) from `file` and composes each convolution
// with its linear layer, in float64; matrices are rounded to `dtype` (float32 or bfloat16) once, at the end.
// DATA_LOSS if the file cannot be read. Throws what LibTorch throws.
absl::StatusOr<Weights> LoadWeights(const ModelConfig& config, const SafetensorsReader& file,
                                    const Device& device, DType dtype);

}  // namespace deltanet

#endif  // DELTANET_MODEL_WEIGHTS_H_
