// What a model directory's config.json says, and which tensors model.safetensors must then hold. Free of
// LibTorch, so that the client's make-model and the loader read the same source.
//
// Families (see README): the layer they share is, with A the DeltaNet mixer and N an RMSNorm,
//   transformer_deltanet   x += A(x) for each layer;                      y = N_f(x)
//   transformer_block      z = N1(x + A(x));                              y = N2(z + FFN(z))
//   deltanet_model         x += A(N1(x)); x += FFN(N2(x)) for each layer; y = head(N_f(x))
#ifndef DELTANET_MODEL_BASE_CONFIG_H_
#define DELTANET_MODEL_BASE_CONFIG_H_

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "model/base/safetensors.h"
#include "model/base/tensor_view.h"

namespace deltanet {

enum class Family { kTransformerDeltaNet, kTransformerBlock, kDeltaNetModel };

// "transformer_deltanet", "transformer_block", "deltanet_model": the value of config.json's `model_type`.
absl::string_view FamilyName(Family family);

enum class ConvPadding {
  kCentered,  // padding=1 of a kernel of 3: a token sees one ahead; streams lag one token per layer.
  kCausal,    // All padding on the left.
};

struct ModelConfig {
  Family family = Family::kTransformerDeltaNet;
  int64_t d_model = 0;        // Width; `dim` in deltanet_model.
  int64_t chunk_size = 0;     // Cuts the author's prefill; never changes a number. Kept to be written back.
  int64_t num_layers = 1;     // `depth` in deltanet_model; 1 for transformer_block.
  int64_t num_heads = 1;      // deltanet_model only; see ResolveHeads.
  int64_t ff_hidden_dim = 0;  // transformer_block: as given; deltanet_model: int(dim * mlp_ratio); else 0.
  int64_t vocab_size = 0;     // deltanet_model only.
  double mlp_ratio = 4.0;     // deltanet_model only.
  ConvPadding conv_padding = ConvPadding::kCentered;  // The author's code, where the key is absent.

  bool takes_tokens() const { return family == Family::kDeltaNetModel; }  // int64 ids in, logits out.
  // Tokens of the future that one layer sees: 1 for centred convolutions.
  int64_t lookahead_per_layer() const { return conv_padding == ConvPadding::kCentered ? 1 : 0; }
};

// Keys are the constructor's argument names plus `model_type` and `conv_padding`; `num_layers` (1),
// `num_heads` (8), `mlp_ratio` (4.0), `chunk_size` (64) may be absent. INVALID_ARGUMENT for JSON that does
// not parse, an unknown `model_type`, an unknown, missing, repeated or mistyped key, a size that is not in
// [1, 2^20] or a number of layers that is not in [1, 4096]; the message names the key, the value found and
// the value wanted. Whether `num_heads` divides the width is for ResolveHeads to say: the author's code runs
// with any.
absl::StatusOr<ModelConfig> ParseModelConfig(absl::string_view json);

// Reads DIRECTORY/config.json. NOT_FOUND if absent, PERMISSION_DENIED if it cannot be opened; otherwise as
// ParseModelConfig (also INVALID_ARGUMENT for more than 1 MiB), the message naming the file.
absl::StatusOr<ModelConfig> ReadModelConfig(const std::string& directory);

// The config.json that parses back to `config`.
std::string ModelConfigJson(const ModelConfig& config);

// In the author's deltanet_model code the attention has 8 heads whatever `num_heads` says, so the file
// decides: sets config->num_heads to the rows of `layers.0.delta_net.beta_linear.weight`. Does nothing for
// other families. INVALID_ARGUMENT if that tensor is missing or misshapen or its rows do not divide the
// width; *config is then as it was.
absl::Status ResolveHeads(const std::map<std::string, SafetensorsEntry>& entries, ModelConfig* config);

struct TensorSpec {
  std::string name;
  Shape shape;
};

// Every tensor that model.safetensors must hold for `config`, in the order of layers.
std::vector<TensorSpec> ExpectedTensors(const ModelConfig& config);

// OK if `entries` holds exactly `expected`, each float32, float16 or bfloat16. INVALID_ARGUMENT otherwise;
// the message lists (up to 5 of each) what is missing, extra, misshapen (shape found and wanted) or of the
// wrong dtype.
absl::Status CheckTensors(const std::map<std::string, SafetensorsEntry>& entries,
                          const std::vector<TensorSpec>& expected);

}  // namespace deltanet

#endif  // DELTANET_MODEL_BASE_CONFIG_H_
