// What a model directory's config.json says, and which tensors its checkpoint must then hold. Free of
// LibTorch, so that the client's make-model and the loader read the same source.
//
// Families (see README): the layer they share is, with A the DeltaNet mixer and N an RMSNorm,
//   transformer_deltanet   x += A(x) for each layer;                      y = N_f(x)
//   transformer_block      z = N1(x + A(x));                              y = N2(z + FFN(z))
//   deltanet_model         x += A(N1(x)); x += FFN(N2(x)) for each layer; y = head(N_f(x))
//   delta_net              the same, with A as flash-linear-attention has it: DeltaNetForCausalLM
#ifndef DELTANET_MODEL_BASE_CONFIG_H_
#define DELTANET_MODEL_BASE_CONFIG_H_

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "model/base/safetensors.h"
#include "model/base/tensor_view.h"

namespace deltanet {

enum class Family { kTransformerDeltaNet, kTransformerBlock, kDeltaNetModel, kDeltaNet };

// "transformer_deltanet", "transformer_block", "deltanet_model", "delta_net": the value of config.json's
// `model_type`.
absl::string_view FamilyName(Family family);

enum class ConvPadding {
  kCentered,  // padding=1 of a kernel of 3: a token sees one ahead; streams lag one token per layer.
  kCausal,    // All padding on the left.
};

struct ModelConfig {
  // Taps of the longest short convolution that runs here.
  static constexpr int64_t kMaxConvSize = 8;

  Family family = Family::kTransformerDeltaNet;
  int64_t d_model = 0;        // Width; `dim` in deltanet_model, `hidden_size` in delta_net.
  int64_t chunk_size = 0;     // Cuts the author's prefill; never changes a number. Kept to be written back.
  int64_t num_layers = 1;     // `depth`, `num_hidden_layers`; 1 for transformer_block.
  int64_t num_heads = 1;      // deltanet_model (see ResolveFromFile) and delta_net.
  int64_t ff_hidden_dim = 0;  // transformer_block: as given; deltanet_model: int(dim * mlp_ratio); delta_net:
                              // `intermediate_size`, or what FLA makes of `hidden_ratio`; else 0.
  int64_t vocab_size = 0;     // Of models over tokens.
  double mlp_ratio = 4.0;     // deltanet_model only.
  // README families: the author's code, where the key is absent. delta_net sees nothing ahead.
  ConvPadding conv_padding = ConvPadding::kCentered;

  // delta_net only: FLA's own names and defaults.
  double expand_k = 1.0;
  double expand_v = 1.0;
  bool use_gate = false;
  bool use_beta = true;
  bool use_short_conv = true;
  bool conv_bias = false;
  bool allow_neg_eigval = false;
  bool tie_word_embeddings = false;
  int64_t conv_size = 4;
  std::string qk_norm = "l2";          // Or "sum".
  std::string qk_activation = "silu";  // Or "relu", "elu", "identity".
  double norm_eps = 1e-6;
  // What only the file says (see ResolveFromFile).
  bool fused_gate_up = false;        // Early files: mlp.gate_proj holds up_proj's rows after its own.
  bool lm_head_beside_tied = false;  // Tied, and lm_head.weight is there all the same.

  // Of models over tokens, where their files say any. In the order of the file, none twice.
  std::optional<int64_t> bos_id;
  std::vector<int64_t> eos_ids;

  // int64 ids in, logits out.
  bool takes_tokens() const { return family == Family::kDeltaNetModel || family == Family::kDeltaNet; }
  // Tokens of the future that one layer sees: 1 for centred convolutions.
  int64_t lookahead_per_layer() const {
    return family != Family::kDeltaNet && conv_padding == ConvPadding::kCentered ? 1 : 0;
  }
  // Channels of the keys (H*K) and of the values (H*V).
  int64_t key_width() const;
  int64_t value_width() const;
};

// README families: keys are the constructor's argument names plus `model_type` and `conv_padding`;
// `num_layers` (1), `num_heads` (8), `mlp_ratio` (4.0), `chunk_size` (64) may be absent. delta_net: keys come
// in three lists, in config.cc: those that are honoured (where absent, FLA's defaults), those that change
// nothing that is computed here, and those that must be off (null, false or empty); any other could change a
// number, and is refused. INVALID_ARGUMENT for JSON that does not parse, an unknown `model_type`, an unknown,
// missing, repeated or mistyped key, a size that is not in [1, 2^20], a number of layers that is not in
// [1, 4096], a token id outside the vocabulary or, in delta_net, a width that the heads do not divide; the
// message names the key, the value found and the value wanted. Whether deltanet_model's `num_heads` divides
// the width is for ResolveFromFile to say: the author's code runs with any.
absl::StatusOr<ModelConfig> ParseModelConfig(absl::string_view json);

// Takes `bos_token_id` and `eos_token_id` (a number, a list or null), where they are there, from the text of
// a generation_config.json; its other keys are for the clients. INVALID_ARGUMENT as ParseModelConfig; *config
// is then as it was.
absl::Status MergeGenerationConfig(absl::string_view json, ModelConfig* config);

// Reads DIRECTORY/config.json and, of a model over tokens, DIRECTORY/generation_config.json where it is
// there, which has the last word on the ids. NOT_FOUND if config.json is absent, PERMISSION_DENIED if one
// cannot be opened; otherwise as the functions above (also INVALID_ARGUMENT for more than 1 MiB), the message
// naming the file.
absl::StatusOr<ModelConfig> ReadModelConfig(const std::string& directory);

// The config.json that parses back to `config`. In delta_net one that Hugging Face reads too; ff_hidden_dim 0
// leaves it to FLA's rule.
std::string ModelConfigJson(const ModelConfig& config);

// Sets what config.json leaves to the checkpoint, whose tensors are `entries`:
// - deltanet_model: num_heads is the rows of `layers.0.delta_net.beta_linear.weight`, as in the author's code
//   the attention has 8 heads whatever `num_heads` says. INVALID_ARGUMENT if that tensor is missing or
//   misshapen or its rows do not divide the width; *config is then as it was.
// - delta_net: fused_gate_up and lm_head_beside_tied; and conv_bias is dropped where there are no such
//   tensors at all, as FLA's model ignores the key.
// Does nothing for other families.
absl::Status ResolveFromFile(const std::map<std::string, SafetensorsEntry>& entries, ModelConfig* config);

struct TensorSpec {
  std::string name;
  Shape shape;
};

// Every tensor that the checkpoint must hold for `config`, in the order of layers.
std::vector<TensorSpec> ExpectedTensors(const ModelConfig& config);

// OK if `entries` holds exactly `expected`, each float32, float16 or bfloat16. INVALID_ARGUMENT otherwise;
// the message lists (up to 5 of each) what is missing, extra, misshapen (shape found and wanted) or of the
// wrong dtype.
absl::Status CheckTensors(const std::map<std::string, SafetensorsEntry>& entries,
                          const std::vector<TensorSpec>& expected);

}  // namespace deltanet

#endif  // DELTANET_MODEL_BASE_CONFIG_H_
