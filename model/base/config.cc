#include "model/base/config.h"

#include <algorithm>
#include <cmath>
#include <set>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "model/base/check.h"
#include "model/base/json_handler.h"
#include "model/base/round_up.h"
#include "model/base/small_file.h"
#include "model/base/status_macros.h"

namespace deltanet {
namespace {

constexpr int64_t kMaxSize = int64_t{1} << 20;
constexpr int64_t kMaxLayers = 4096;  // Each is a score of tensors to name before the weights are looked at.
constexpr int64_t kMaxFileBytes = int64_t{1} << 20;

constexpr Family kFamilies[] = {Family::kTransformerDeltaNet, Family::kTransformerBlock,
                                Family::kDeltaNetModel, Family::kDeltaNet};

// An integer key of a family's config.json.
struct SizeKey {
  absl::string_view name;
  int64_t ModelConfig::* field;
  int64_t fallback;  // Where the key is absent; 0: it must be there.
  int64_t limit = kMaxSize;
};
constexpr SizeKey kTransformerDeltaNetKeys[] = {{"d_model", &ModelConfig::d_model, 0},
                                                {"chunk_size", &ModelConfig::chunk_size, 64},
                                                {"num_layers", &ModelConfig::num_layers, 1, kMaxLayers}};
constexpr SizeKey kTransformerBlockKeys[] = {{"d_model", &ModelConfig::d_model, 0},
                                             {"chunk_size", &ModelConfig::chunk_size, 64},
                                             {"ff_hidden_dim", &ModelConfig::ff_hidden_dim, 0}};
constexpr SizeKey kDeltaNetModelKeys[] = {{"vocab_size", &ModelConfig::vocab_size, 0},
                                          {"dim", &ModelConfig::d_model, 0},
                                          {"depth", &ModelConfig::num_layers, 0, kMaxLayers},
                                          {"num_heads", &ModelConfig::num_heads, 8},
                                          {"chunk_size", &ModelConfig::chunk_size, 64}};
constexpr SizeKey kDeltaNetKeys[] = {{"hidden_size", &ModelConfig::d_model, 2048},
                                     {"num_hidden_layers", &ModelConfig::num_layers, 24, kMaxLayers},
                                     {"num_heads", &ModelConfig::num_heads, 16},
                                     {"conv_size", &ModelConfig::conv_size, 4, ModelConfig::kMaxConvSize},
                                     {"vocab_size", &ModelConfig::vocab_size, 32000}};

absl::Span<const SizeKey> SizeKeys(Family family) {
  switch (family) {
    case Family::kTransformerDeltaNet:
      return kTransformerDeltaNetKeys;
    case Family::kTransformerBlock:
      return kTransformerBlockKeys;
    case Family::kDeltaNetModel:
      return kDeltaNetModelKeys;
    case Family::kDeltaNet:
      return kDeltaNetKeys;
  }
  DELTANET_CHECK(false, "unknown family");
}

constexpr absl::string_view kModelType = "model_type";
constexpr absl::string_view kConvPadding = "conv_padding";
constexpr absl::string_view kMlpRatio = "mlp_ratio";
constexpr absl::string_view kCentered = "centered";
constexpr absl::string_view kCausal = "causal";
constexpr absl::string_view kBosTokenId = "bos_token_id";
constexpr absl::string_view kEosTokenId = "eos_token_id";

// The keys of delta_net. First, those that are honoured: kDeltaNetKeys, kDeltaNetSwitches and these.
constexpr absl::string_view kExpandK = "expand_k";
constexpr absl::string_view kExpandV = "expand_v";
constexpr absl::string_view kQkNorm = "qk_norm";
constexpr absl::string_view kQkActivation = "qk_activation";
constexpr absl::string_view kNormEps = "norm_eps";
constexpr absl::string_view kHiddenAct = "hidden_act";
constexpr absl::string_view kHiddenRatio = "hidden_ratio";
constexpr absl::string_view kIntermediateSize = "intermediate_size";
constexpr absl::string_view kDeltaNetOthers[] = {kExpandK,    kExpandV,   kQkNorm,      kQkActivation,
                                                 kNormEps,    kHiddenAct, kHiddenRatio, kIntermediateSize,
                                                 kBosTokenId, kEosTokenId};

struct SwitchKey {
  absl::string_view name;
  bool ModelConfig::* field;
};
constexpr SwitchKey kDeltaNetSwitches[] = {{"use_gate", &ModelConfig::use_gate},
                                           {"use_beta", &ModelConfig::use_beta},
                                           {"use_short_conv", &ModelConfig::use_short_conv},
                                           {"conv_bias", &ModelConfig::conv_bias},
                                           {"allow_neg_eigval", &ModelConfig::allow_neg_eigval},
                                           {"tie_word_embeddings", &ModelConfig::tie_word_embeddings}};

// Second, those that change nothing that is computed here, whatever they hold. FLA's own:
constexpr absl::string_view kInertOfFla[] = {
    "attn_mode",  // Which of its kernels runs.
    "chunk_size",
    "max_position_embeddings",  // Of its hybrids' attention.
    "use_output_norm",          // Its layer never looks at it: the norm is always there.
    "use_cache",
    "initializer_range",
    "fuse_norm",
    "fuse_swiglu",
    "fuse_cross_entropy",
    "fuse_linear_cross_entropy",
    "use_l2warp",
};
// What Hugging Face's PretrainedConfig writes, or once wrote: of other kinds of model, of training, of what a
// call returns, and defaults of a generation, which here are the request's.
constexpr absl::string_view kInertOfHuggingFace[] = {
    "_attn_implementation",
    "_attn_implementation_autoset",
    "_commit_hash",
    "_name_or_path",
    "architectures",
    "attn_implementation",
    "auto_map",
    "bad_words_ids",
    "begin_suppress_tokens",
    "chunk_size_feed_forward",
    "cross_attention_hidden_size",
    "decoder_start_token_id",
    "diversity_penalty",
    "do_sample",
    "dtype",
    "early_stopping",
    "encoder_no_repeat_ngram_size",
    "exponential_decay_length_penalty",
    "finetuning_task",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "gradient_checkpointing",
    "id2label",
    "is_decoder",
    "label2id",
    "length_penalty",
    "max_length",
    "min_length",
    "name_or_path",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_labels",
    "num_return_sequences",
    "output_attentions",
    "output_hidden_states",
    "output_scores",
    "pad_token_id",
    "prefix",
    "problem_type",
    "remove_invalid_values",
    "repetition_penalty",
    "return_dict",
    "return_dict_in_generate",
    "sep_token_id",
    "suppress_tokens",
    "task_specific_params",
    "temperature",
    "tf_legacy_loss",
    "tie_encoder_decoder",
    "tokenizer_class",
    "top_k",
    "top_p",
    "torch_dtype",
    "torchscript",
    "transformers_version",
    "typical_p",
    "use_bfloat16",
};
// Third, those that must be off (null, false or empty): what they switch on is not here.
struct OffKey {
  absl::string_view name;
  absl::string_view what;
};
constexpr OffKey kMustBeOff[] = {
    {"attn", "layers of softmax attention (hybrids)"},
    {"attnres_block_size", "attention over residuals"},
    {"quantization_config", "quantised weights"},
    {"pruned_heads", "pruned heads"},
    {"is_encoder_decoder", "encoders"},
    {"add_cross_attention", "cross attention"},
    {"norm_first", "the norms of early files, under other names,"},
    {"share_conv_kernel", "one convolution for q, k and v, of early files,"},
    {"use_rope", "rotary embeddings, of early files,"},
};

// A value of config.json.
struct Value {
  enum class Kind { kNull, kBool, kInteger, kReal, kString, kArray, kObject } kind = Kind::kNull;
  int64_t integer = 0;            // 0 or 1 of kBool.
  double real = 0;                // Also of an integer.
  std::string text = "null";      // Of a string; else as found in the file, for messages.
  std::vector<int64_t> integers;  // Of an array.
  bool all_integers = true;       // An array holds nothing else.
  bool empty = true;              // An array, object or string holds nothing.

  std::string ForMessage() const { return kind == Kind::kString ? Quoted(text) : text; }
  bool is_off() const {
    switch (kind) {
      case Kind::kNull:
        return true;
      case Kind::kBool:
        return integer == 0;
      case Kind::kString:
      case Kind::kArray:
      case Kind::kObject:
        return empty;
      default:
        return false;
    }
  }
};
using Values = std::map<std::string, Value>;

// Collects the values of one object. Of what lies deeper only the integers of a list are kept.
class ConfigHandler : public JsonHandler {
 public:
  const Values& values() const { return values_; }

  bool start_object(std::size_t) override {
    if (depth_ == 0) {
      ++depth_;
      return true;
    }
    return Open({.kind = Value::Kind::kObject, .text = "an object"});
  }
  bool end_object() override { return Close(); }
  bool start_array(std::size_t) override { return Open({.kind = Value::Kind::kArray, .text = "an array"}); }
  bool end_array() override { return Close(); }
  bool key(std::string& name) override {
    if (depth_ > 1) {
      current_->empty = false;
      return true;
    }
    key_ = name;
    if (values_.count(name) != 0) return Fail(absl::StrCat(Quoted(name), " appears twice"));
    return true;
  }
  bool null() override { return Add({}); }
  bool boolean(bool value) override {
    return Add({.kind = Value::Kind::kBool, .integer = value, .text = value ? "true" : "false"});
  }
  bool string(std::string& value) override {
    return Add({.kind = Value::Kind::kString, .text = value, .empty = value.empty()});
  }
  bool number_integer(int64_t value) override {
    return Add({.kind = Value::Kind::kInteger,
                .integer = value,
                .real = static_cast<double>(value),
                .text = absl::StrCat(value)});
  }
  bool number_unsigned(uint64_t value) override {
    if (value <= INT64_MAX) return number_integer(static_cast<int64_t>(value));
    return Add({.kind = Value::Kind::kReal, .real = static_cast<double>(value), .text = absl::StrCat(value)});
  }
  bool number_float(double value, const std::string& text) override {
    return Add({.kind = Value::Kind::kReal, .real = value, .text = text.substr(0, 100)});
  }

 protected:
  bool Unexpected(absl::string_view found) override {
    return Fail(absl::StrCat("found ", found, ", want an object"));
  }

 private:
  bool Add(Value value) {
    if (depth_ == 0) return Unexpected(value.ForMessage());
    if (depth_ > 1) {
      current_->empty = false;
      if (depth_ == 2 && value.kind == Value::Kind::kInteger) {
        current_->integers.push_back(value.integer);
      } else {
        current_->all_integers = false;
      }
      return true;
    }
    current_ = &values_.emplace(key_, std::move(value)).first->second;
    return true;
  }
  bool Open(Value value) {
    if (!Add(std::move(value))) return false;
    ++depth_;
    return true;
  }
  bool Close() {
    --depth_;
    return true;
  }

  int64_t depth_ = 0;  // Of nesting: 1 in the object itself.
  std::string key_;
  Value* current_ = nullptr;  // The last of depth 1.
  Values values_;
};

// The value of `key`, or null.
const Value* FindValue(const Values& values, absl::string_view key) {
  const auto found = values.find(std::string(key));
  return found == values.end() ? nullptr : &found->second;
}

absl::Status WantError(absl::string_view key, const Value* found, absl::string_view want) {
  if (found == nullptr)
    return absl::InvalidArgumentError(absl::StrCat("'", key, "' is missing, want ", want));
  return absl::InvalidArgumentError(absl::StrCat("'", key, "' is ", found->ForMessage(), ", want ", want));
}

absl::StatusOr<Family> ParseFamily(const Values& values) {
  const Value* const found = FindValue(values, kModelType);
  if (found != nullptr && found->kind == Value::Kind::kString) {
    for (const Family family : kFamilies) {
      if (FamilyName(family) == found->text) return family;
    }
  }
  return WantError(kModelType, found, absl::StrJoin(kFamilies, ", ", [](std::string* out, Family family) {
                     absl::StrAppend(out, "'", FamilyName(family), "'");
                   }));
}

absl::StatusOr<int64_t> ParseSize(const Values& values, const SizeKey& key) {
  const Value* const found = FindValue(values, key.name);
  if (found == nullptr && key.fallback != 0) return key.fallback;
  if (found == nullptr || found->kind != Value::Kind::kInteger || found->integer < 1 ||
      found->integer > key.limit) {
    return WantError(key.name, found, absl::StrCat("an integer from 1 to ", key.limit));
  }
  return found->integer;
}

// Nothing where `key` is absent.
absl::StatusOr<std::optional<double>> ParseNumber(const Values& values, absl::string_view key) {
  const Value* const found = FindValue(values, key);
  if (found == nullptr) return std::nullopt;
  if (found->kind != Value::Kind::kInteger && found->kind != Value::Kind::kReal) {
    return WantError(key, found, "a number");
  }
  return found->real;
}

// Sets mlp_ratio and with it ff_hidden_dim of a deltanet_model.
absl::Status ParseMlpRatio(const Values& values, ModelConfig* config) {
  const Value* const found = FindValue(values, kMlpRatio);
  if (found != nullptr) {
    ASSIGN_OR_RETURN(const std::optional<double> given, ParseNumber(values, kMlpRatio));
    config->mlp_ratio = *given;
  }
  const double hidden = static_cast<double>(config->d_model) * config->mlp_ratio;
  if (!(hidden >= 1 && hidden < static_cast<double>(kMaxSize) + 1)) {
    return absl::InvalidArgumentError(absl::StrCat("'", kMlpRatio, "' is ", config->mlp_ratio,
                                                   ", which makes ", hidden, " hidden units, want from 1 to ",
                                                   kMaxSize));
  }
  config->ff_hidden_dim = static_cast<int64_t>(hidden);
  return absl::OkStatus();
}

absl::Status CheckDeltaNetKeys(const Values& values) {
  std::set<absl::string_view> known = {kModelType};
  for (const SizeKey& key : kDeltaNetKeys) known.insert(key.name);
  for (const SwitchKey& key : kDeltaNetSwitches) known.insert(key.name);
  known.insert(std::begin(kDeltaNetOthers), std::end(kDeltaNetOthers));
  known.insert(std::begin(kInertOfFla), std::end(kInertOfFla));
  known.insert(std::begin(kInertOfHuggingFace), std::end(kInertOfHuggingFace));
  for (const OffKey& key : kMustBeOff) {
    known.insert(key.name);
    const Value* const found = FindValue(values, key.name);
    if (found != nullptr && !found->is_off()) {
      return WantError(key.name, found, absl::StrCat("null: ", key.what, " cannot be served"));
    }
  }
  for (const auto& [key, value] : values) {
    if (known.count(key) != 0) continue;
    return absl::InvalidArgumentError(
        absl::StrCat("unknown key ", Quoted(key), " for model_type '", FamilyName(Family::kDeltaNet),
                     "': it could change what the model computes, want only keys that are known"));
  }
  return absl::OkStatus();
}

absl::Status CheckKeys(const Values& values, Family family) {
  if (family == Family::kDeltaNet) return CheckDeltaNetKeys(values);
  std::set<absl::string_view> known = {kModelType, kConvPadding};
  for (const SizeKey& key : SizeKeys(family)) known.insert(key.name);
  if (family == Family::kDeltaNetModel) known.insert(kMlpRatio);
  for (const auto& [key, value] : values) {
    if (known.count(key) != 0) continue;
    return absl::InvalidArgumentError(absl::StrCat("unknown key ", Quoted(key), " for model_type '",
                                                   FamilyName(family), "', want any of ",
                                                   absl::StrJoin(known, ", ")));
  }
  return absl::OkStatus();
}

// Sets *text to the value of `key`, one of `choices`, if it is there.
absl::Status ParseChoice(const Values& values, absl::string_view key,
                         const std::vector<absl::string_view>& choices, std::string* text) {
  const Value* const found = FindValue(values, key);
  if (found == nullptr) return absl::OkStatus();
  for (const absl::string_view choice : choices) {
    if (found->kind != Value::Kind::kString || found->text != choice) continue;
    *text = std::string(choice);
    return absl::OkStatus();
  }
  return WantError(key, found, absl::StrJoin(choices, ", ", [](std::string* out, absl::string_view choice) {
                     absl::StrAppend(out, "'", choice, "'");
                   }));
}

// Sets the ids that `values` says, null being none. *config is as it was after an error.
absl::Status ParseTokenIds(const Values& values, ModelConfig* config) {
  const auto in_vocabulary = [&](int64_t id) { return id >= 0 && id < config->vocab_size; };
  const std::string want = absl::StrCat("an integer from 0 to ", config->vocab_size - 1);
  std::optional<int64_t> bos_id = config->bos_id;
  if (const Value* const found = FindValue(values, kBosTokenId); found != nullptr) {
    bos_id.reset();
    if (found->kind != Value::Kind::kNull) {
      if (found->kind != Value::Kind::kInteger || !in_vocabulary(found->integer)) {
        return WantError(kBosTokenId, found, absl::StrCat(want, " or null"));
      }
      bos_id = found->integer;
    }
  }
  if (const Value* const found = FindValue(values, kEosTokenId); found != nullptr) {
    std::vector<int64_t> eos_ids;
    if (found->kind == Value::Kind::kInteger) {
      eos_ids.push_back(found->integer);
    } else if (found->kind == Value::Kind::kArray && found->all_integers) {
      std::set<int64_t> seen;
      for (const int64_t id : found->integers) {
        if (seen.insert(id).second) eos_ids.push_back(id);
      }
    } else if (found->kind != Value::Kind::kNull) {
      return WantError(kEosTokenId, found, absl::StrCat(want, ", a list of those or null"));
    }
    for (const int64_t id : eos_ids) {
      if (in_vocabulary(id)) continue;
      return absl::InvalidArgumentError(absl::StrCat("'", kEosTokenId, "' has ", id, ", want ", want));
    }
    config->eos_ids = std::move(eos_ids);
  }
  config->bos_id = bos_id;
  return absl::OkStatus();
}

// Sets *expansion, and checks the channels that it makes.
absl::Status ParseExpansion(const Values& values, absl::string_view key, const ModelConfig& config,
                            double* expansion) {
  ASSIGN_OR_RETURN(const std::optional<double> given, ParseNumber(values, key));
  *expansion = given.value_or(1.0);
  const double channels = static_cast<double>(config.d_model) * *expansion;
  if (!(channels >= 1 && channels < static_cast<double>(kMaxSize) + 1)) {
    return absl::InvalidArgumentError(absl::StrCat("'", key, "' is ", *expansion, ", which makes ", channels,
                                                   " channels of 'hidden_size' ", config.d_model,
                                                   ", want from 1 to ", kMaxSize));
  }
  if (static_cast<int64_t>(channels) % config.num_heads != 0) {
    return absl::InvalidArgumentError(absl::StrCat("'", key, "' is ", *expansion, ", which makes ",
                                                   static_cast<int64_t>(channels),
                                                   " channels of 'hidden_size' ", config.d_model,
                                                   ", want a multiple of 'num_heads' ", config.num_heads));
  }
  return absl::OkStatus();
}

// Sets ff_hidden_dim of a delta_net.
absl::Status ParseIntermediateSize(const Values& values, ModelConfig* config) {
  const Value* const found = FindValue(values, kIntermediateSize);
  if (found != nullptr && found->kind != Value::Kind::kNull) {
    ASSIGN_OR_RETURN(config->ff_hidden_dim, ParseSize(values, {kIntermediateSize, nullptr, 0}));
    return absl::OkStatus();
  }
  // FLA's rule.
  double ratio = 4;
  if (const Value* const given = FindValue(values, kHiddenRatio);
      given != nullptr && given->kind != Value::Kind::kNull) {
    ASSIGN_OR_RETURN(const std::optional<double> number, ParseNumber(values, kHiddenRatio));
    ratio = *number;
  }
  const double hidden = static_cast<double>(config->d_model) * ratio * 2 / 3;
  if (!(hidden >= 1 && hidden <= static_cast<double>(kMaxSize))) {
    return absl::InvalidArgumentError(absl::StrCat("'", kHiddenRatio, "' is ", ratio, ", which makes ",
                                                   hidden, " hidden units, want from 1 to ", kMaxSize));
  }
  config->ff_hidden_dim = RoundUp(static_cast<int64_t>(hidden), 256);
  return absl::OkStatus();
}

// What delta_net has beside its sizes.
absl::Status ParseDeltaNet(const Values& values, ModelConfig* config) {
  for (const SwitchKey& key : kDeltaNetSwitches) {
    const Value* const found = FindValue(values, key.name);
    if (found == nullptr) continue;
    if (found->kind != Value::Kind::kBool) return WantError(key.name, found, "true or false");
    config->*key.field = found->integer != 0;
  }
  RETURN_IF_ERROR(ParseExpansion(values, kExpandK, *config, &config->expand_k));
  RETURN_IF_ERROR(ParseExpansion(values, kExpandV, *config, &config->expand_v));
  RETURN_IF_ERROR(ParseChoice(values, kQkNorm, {"l2", "sum"}, &config->qk_norm));
  RETURN_IF_ERROR(
      ParseChoice(values, kQkActivation, {"silu", "relu", "elu", "identity"}, &config->qk_activation));
  std::string activation;  // Two names of one function.
  RETURN_IF_ERROR(ParseChoice(values, kHiddenAct, {"swish", "silu"}, &activation));
  ASSIGN_OR_RETURN(const std::optional<double> epsilon, ParseNumber(values, kNormEps));
  if (epsilon) config->norm_eps = *epsilon;
  if (!(config->norm_eps >= 0 && config->norm_eps <= 1)) {
    return WantError(kNormEps, FindValue(values, kNormEps), "a number from 0 to 1");
  }
  RETURN_IF_ERROR(ParseIntermediateSize(values, config));
  // FLA's defaults, where the vocabulary has them.
  if (config->vocab_size > 1) config->bos_id = 1;
  if (config->vocab_size > 2) config->eos_ids = {2};
  return ParseTokenIds(values, config);
}

// The tensors of one mixer of the README families.
void AddMixer(const ModelConfig& config, absl::string_view prefix, std::vector<TensorSpec>* specs) {
  const int64_t d = config.d_model;
  for (const absl::string_view projection : {"q", "k", "v"}) {
    specs->push_back({absl::StrCat(prefix, projection, "_linear.weight"), {d, d}});
    specs->push_back({absl::StrCat(prefix, projection, "_linear.bias"), {d}});
    specs->push_back({absl::StrCat(prefix, projection, "_conv.weight"), {d, d, 3}});
    specs->push_back({absl::StrCat(prefix, projection, "_conv.bias"), {d}});
  }
  specs->push_back({absl::StrCat(prefix, "beta_linear.weight"), {config.num_heads, d}});
  specs->push_back({absl::StrCat(prefix, "beta_linear.bias"), {config.num_heads}});
  specs->push_back({absl::StrCat(prefix, "rms_norm.scale"), {d}});
  specs->push_back({absl::StrCat(prefix, "output_linear.weight"), {d, d}});
  specs->push_back({absl::StrCat(prefix, "output_linear.bias"), {d}});
}

// The tensors of one layer of delta_net.
void AddDeltaNetLayer(const ModelConfig& config, absl::string_view prefix, std::vector<TensorSpec>* specs) {
  const int64_t d = config.d_model, f = config.ff_hidden_dim, heads = config.num_heads;
  const auto add = [&](absl::string_view name, const Shape& shape) {
    specs->push_back({absl::StrCat(prefix, name), shape});
  };
  const std::pair<absl::string_view, int64_t> projections[] = {
      {"q", config.key_width()}, {"k", config.key_width()}, {"v", config.value_width()}};
  add("attn_norm.weight", {d});
  for (const auto& [name, width] : projections) {
    add(absl::StrCat("attn.", name, "_proj.weight"), {width, d});
    if (!config.use_short_conv) continue;
    add(absl::StrCat("attn.", name, "_conv1d.weight"), {width, 1, config.conv_size});
    if (config.conv_bias) add(absl::StrCat("attn.", name, "_conv1d.bias"), {width});
  }
  if (config.use_beta) add("attn.b_proj.weight", {heads, d});
  if (config.use_gate) add("attn.g_proj.weight", {config.value_width(), d});
  add("attn.o_norm.weight", {config.value_width() / heads});
  add("attn.o_proj.weight", {d, config.value_width()});
  add("mlp_norm.weight", {d});
  add("mlp.gate_proj.weight", {config.fused_gate_up ? 2 * f : f, d});
  if (!config.fused_gate_up) add("mlp.up_proj.weight", {f, d});
  add("mlp.down_proj.weight", {d, f});
}

absl::Status ResolveHeads(const std::map<std::string, SafetensorsEntry>& entries, ModelConfig* config) {
  constexpr char kBeta[] = "layers.0.delta_net.beta_linear.weight";
  const auto found = entries.find(kBeta);
  if (found == entries.end())
    return absl::InvalidArgumentError(absl::StrCat("tensor ", kBeta, " is missing"));
  const Shape& shape = found->second.shape;
  if (shape.size() != 2 || shape[0] < 1 || shape[1] != config->d_model) {
    return absl::InvalidArgumentError(
        absl::StrCat("tensor ", kBeta, " is ", ShapeString(shape), ", want [heads,", config->d_model, "]"));
  }
  if (config->d_model % shape[0] != 0) {
    return absl::InvalidArgumentError(absl::StrCat(
        "tensor ", kBeta, " has ", shape[0], " rows (heads), want a divisor of the width ", config->d_model));
  }
  config->num_heads = shape[0];
  return absl::OkStatus();
}

void ResolveDeltaNet(const std::map<std::string, SafetensorsEntry>& entries, ModelConfig* config) {
  constexpr char kMlp[] = "model.layers.0.mlp.";
  const auto gate = entries.find(absl::StrCat(kMlp, "gate_proj.weight"));
  config->fused_gate_up = entries.count(absl::StrCat(kMlp, "up_proj.weight")) == 0 && gate != entries.end() &&
                          gate->second.shape == Shape({2 * config->ff_hidden_dim, config->d_model});
  config->lm_head_beside_tied = config->tie_word_embeddings && entries.count("lm_head.weight") != 0;
  if (config->conv_bias) {
    config->conv_bias = std::any_of(entries.begin(), entries.end(), [](const auto& entry) {
      return absl::EndsWith(entry.first, "_conv1d.bias");
    });
  }
}

// One kind of complaint of CheckTensors: how many, and the first few in words.
class Complaints {
 public:
  explicit Complaints(absl::string_view kind) : kind_(kind) {}

  void Add(absl::string_view complaint) {
    if (++count_ <= kListed) listed_.emplace_back(complaint);
  }
  void AppendTo(std::vector<std::string>* all) const {
    if (count_ == 0) return;
    std::string text = absl::StrCat(kind_, ": ", absl::StrJoin(listed_, ", "));
    if (count_ > kListed) absl::StrAppend(&text, " and ", count_ - kListed, " more");
    all->push_back(std::move(text));
  }

 private:
  static constexpr int64_t kListed = 5;

  const absl::string_view kind_;
  int64_t count_ = 0;
  std::vector<std::string> listed_;
};

}  // namespace

absl::string_view FamilyName(Family family) {
  switch (family) {
    case Family::kTransformerDeltaNet:
      return "transformer_deltanet";
    case Family::kTransformerBlock:
      return "transformer_block";
    case Family::kDeltaNetModel:
      return "deltanet_model";
    case Family::kDeltaNet:
      return "delta_net";
  }
  DELTANET_CHECK(false, "unknown family");
}

int64_t ModelConfig::key_width() const {
  return static_cast<int64_t>(static_cast<double>(d_model) * expand_k);
}
int64_t ModelConfig::value_width() const {
  return static_cast<int64_t>(static_cast<double>(d_model) * expand_v);
}

absl::StatusOr<ModelConfig> ParseModelConfig(absl::string_view json) {
  ConfigHandler handler;
  RETURN_IF_ERROR(handler.Parse(json));
  const Values& values = handler.values();

  ModelConfig config;
  ASSIGN_OR_RETURN(config.family, ParseFamily(values));
  RETURN_IF_ERROR(CheckKeys(values, config.family));
  for (const SizeKey& key : SizeKeys(config.family)) {
    ASSIGN_OR_RETURN(config.*key.field, ParseSize(values, key));
  }
  if (config.family == Family::kDeltaNet) {
    RETURN_IF_ERROR(ParseDeltaNet(values, &config));
    return config;
  }
  if (config.family == Family::kDeltaNetModel) RETURN_IF_ERROR(ParseMlpRatio(values, &config));
  if (const Value* const padding = FindValue(values, kConvPadding); padding != nullptr) {
    if (padding->kind != Value::Kind::kString || (padding->text != kCentered && padding->text != kCausal)) {
      return WantError(kConvPadding, padding, absl::StrCat("'", kCentered, "' or '", kCausal, "'"));
    }
    config.conv_padding = padding->text == kCausal ? ConvPadding::kCausal : ConvPadding::kCentered;
  }
  return config;
}

absl::Status MergeGenerationConfig(absl::string_view json, ModelConfig* config) {
  ConfigHandler handler;
  RETURN_IF_ERROR(handler.Parse(json));
  return ParseTokenIds(handler.values(), config);
}

absl::StatusOr<ModelConfig> ReadModelConfig(const std::string& directory) {
  const auto in_file = [](const std::string& path, const absl::Status& status) {
    return absl::Status(status.code(), absl::StrCat(path, ": ", status.message()));
  };
  const std::string path = absl::StrCat(directory, "/config.json");
  ASSIGN_OR_RETURN(const std::string json, ReadSmallFile(path, kMaxFileBytes));
  absl::StatusOr<ModelConfig> config = ParseModelConfig(json);
  if (!config.ok()) return in_file(path, config.status());
  if (!config->takes_tokens()) return config;

  const std::string generation_path = absl::StrCat(directory, "/generation_config.json");
  const absl::StatusOr<std::string> generation = ReadSmallFile(generation_path, kMaxFileBytes);
  if (absl::IsNotFound(generation.status())) return config;
  RETURN_IF_ERROR(generation.status());
  if (const absl::Status status = MergeGenerationConfig(*generation, &*config); !status.ok()) {
    return in_file(generation_path, status);
  }
  return config;
}

std::string ModelConfigJson(const ModelConfig& config) {
  nlohmann::ordered_json json;
  const auto set = [&json](absl::string_view key, auto value) { json[std::string(key)] = value; };
  set(kModelType, std::string(FamilyName(config.family)));
  if (config.family == Family::kDeltaNet)
    set("architectures", std::vector<std::string>{"DeltaNetForCausalLM"});
  for (const SizeKey& key : SizeKeys(config.family)) set(key.name, config.*key.field);
  if (config.family == Family::kDeltaNet) {
    for (const SwitchKey& key : kDeltaNetSwitches) set(key.name, config.*key.field);
    set(kExpandK, config.expand_k);
    set(kExpandV, config.expand_v);
    set(kQkNorm, config.qk_norm);
    set(kQkActivation, config.qk_activation);
    set(kNormEps, config.norm_eps);
    set(kIntermediateSize, nlohmann::ordered_json());
    if (config.ff_hidden_dim > 0) set(kIntermediateSize, config.ff_hidden_dim);
    set(kBosTokenId, nlohmann::ordered_json());
    if (config.bos_id) set(kBosTokenId, *config.bos_id);
    set(kEosTokenId, nlohmann::ordered_json());
    if (config.eos_ids.size() == 1) set(kEosTokenId, config.eos_ids[0]);
    if (config.eos_ids.size() > 1) set(kEosTokenId, config.eos_ids);
    return json.dump(2) + "\n";
  }
  if (config.family == Family::kDeltaNetModel) set(kMlpRatio, config.mlp_ratio);
  set(kConvPadding, std::string(config.conv_padding == ConvPadding::kCausal ? kCausal : kCentered));
  return json.dump(2) + "\n";
}

absl::Status ResolveFromFile(const std::map<std::string, SafetensorsEntry>& entries, ModelConfig* config) {
  if (config->family == Family::kDeltaNetModel) return ResolveHeads(entries, config);
  if (config->family == Family::kDeltaNet) ResolveDeltaNet(entries, config);
  return absl::OkStatus();
}

std::vector<TensorSpec> ExpectedTensors(const ModelConfig& config) {
  const int64_t d = config.d_model, f = config.ff_hidden_dim;
  std::vector<TensorSpec> specs;
  switch (config.family) {
    case Family::kTransformerDeltaNet:
      for (int64_t layer = 0; layer < config.num_layers; ++layer) {
        AddMixer(config, absl::StrCat("layers.", layer, "."), &specs);
      }
      specs.push_back({"final_rms_norm.scale", {d}});
      return specs;
    case Family::kTransformerBlock:
      AddMixer(config, "deltanet.", &specs);
      specs.push_back({"norm1.scale", {d}});
      specs.push_back({"ffn.0.weight", {2 * f, d}});
      specs.push_back({"ffn.0.bias", {2 * f}});
      specs.push_back({"ffn.2.weight", {d, f}});
      specs.push_back({"ffn.2.bias", {d}});
      specs.push_back({"norm2.scale", {d}});
      return specs;
    case Family::kDeltaNetModel:
      specs.push_back({"embedding.weight", {config.vocab_size, d}});
      for (int64_t layer = 0; layer < config.num_layers; ++layer) {
        const std::string prefix = absl::StrCat("layers.", layer, ".");
        specs.push_back({prefix + "norm1.scale", {d}});
        AddMixer(config, prefix + "delta_net.", &specs);
        specs.push_back({prefix + "norm2.scale", {d}});
        specs.push_back({prefix + "mlp.w1.weight", {f, d}});
        specs.push_back({prefix + "mlp.w2.weight", {f, d}});
        specs.push_back({prefix + "mlp.w3.weight", {d, f}});
      }
      specs.push_back({"norm_f.scale", {d}});
      specs.push_back({"head.weight", {config.vocab_size, d}});
      return specs;
    case Family::kDeltaNet:
      specs.push_back({"model.embeddings.weight", {config.vocab_size, d}});
      for (int64_t layer = 0; layer < config.num_layers; ++layer) {
        AddDeltaNetLayer(config, absl::StrCat("model.layers.", layer, "."), &specs);
      }
      specs.push_back({"model.norm.weight", {d}});
      if (!config.tie_word_embeddings || config.lm_head_beside_tied) {
        specs.push_back({"lm_head.weight", {config.vocab_size, d}});
      }
      return specs;
  }
  DELTANET_CHECK(false, "unknown family");
}

absl::Status CheckTensors(const std::map<std::string, SafetensorsEntry>& entries,
                          const std::vector<TensorSpec>& expected) {
  Complaints missing("missing"), extra("extra"), misshapen("misshapen"), wrong_dtype("of the wrong dtype");
  std::set<absl::string_view> names;
  for (const TensorSpec& spec : expected) {
    names.insert(spec.name);
    const auto found = entries.find(spec.name);
    if (found == entries.end()) {
      missing.Add(spec.name);
      continue;
    }
    const SafetensorsEntry& entry = found->second;
    if (entry.shape != spec.shape) {
      misshapen.Add(
          absl::StrCat(spec.name, " is ", ShapeString(entry.shape), ", want ", ShapeString(spec.shape)));
    }
    if (entry.dtype != DType::kFloat32 && entry.dtype != DType::kFloat16 && entry.dtype != DType::kBFloat16) {
      wrong_dtype.Add(
          absl::StrCat(spec.name, " is ", DTypeName(entry.dtype), ", want float32, float16 or bfloat16"));
    }
  }
  for (const auto& [name, entry] : entries) {
    if (names.count(name) == 0) extra.Add(Quoted(name));
  }
  std::vector<std::string> all;
  for (const Complaints* kind : {&missing, &extra, &misshapen, &wrong_dtype}) kind->AppendTo(&all);
  if (all.empty()) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("tensors ", absl::StrJoin(all, "; ")));
}

}  // namespace deltanet
