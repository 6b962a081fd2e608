#include "model/base/config.h"

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <memory>
#include <set>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "model/base/check.h"
#include "model/base/json_handler.h"
#include "model/base/status_macros.h"

namespace deltanet {
namespace {

constexpr int64_t kMaxSize = int64_t{1} << 20;
constexpr int64_t kMaxLayers = 4096;  // Each is a score of tensors to name before the weights are looked at.
constexpr int64_t kMaxFileBytes = int64_t{1} << 20;

constexpr Family kFamilies[] = {Family::kTransformerDeltaNet, Family::kTransformerBlock,
                                Family::kDeltaNetModel};

// An integer key of a family's config.json.
struct SizeKey {
  absl::string_view name;
  int64_t ModelConfig::*field;
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

absl::Span<const SizeKey> SizeKeys(Family family) {
  switch (family) {
    case Family::kTransformerDeltaNet:
      return kTransformerDeltaNetKeys;
    case Family::kTransformerBlock:
      return kTransformerBlockKeys;
    case Family::kDeltaNetModel:
      return kDeltaNetModelKeys;
  }
  DELTANET_CHECK(false, "unknown family");
}

constexpr absl::string_view kModelType = "model_type";
constexpr absl::string_view kConvPadding = "conv_padding";
constexpr absl::string_view kMlpRatio = "mlp_ratio";
constexpr absl::string_view kCentered = "centered";
constexpr absl::string_view kCausal = "causal";

// A value of config.json: a number or a string.
struct Value {
  enum class Kind { kInteger, kReal, kString } kind;
  int64_t integer = 0;
  double real = 0;   // Also of an integer.
  std::string text;  // Of a string; else as found in the file, for messages.

  std::string ForMessage() const { return kind == Kind::kString ? Quoted(text) : text; }
};
using Values = std::map<std::string, Value>;

// Collects the values of one flat object.
class ConfigHandler : public JsonHandler {
 public:
  const Values& values() const { return values_; }

  bool start_object(std::size_t) override {
    if (started_) return Unexpected("an object");
    started_ = true;
    return true;
  }
  bool end_object() override { return true; }
  bool key(std::string& name) override {
    key_ = name;
    if (values_.count(name) != 0) return Fail(absl::StrCat(Quoted(name), " appears twice"));
    return true;
  }
  bool string(std::string& value) override { return Add({Value::Kind::kString, 0, 0, value}); }
  bool number_integer(int64_t value) override {
    return Add({Value::Kind::kInteger, value, static_cast<double>(value), absl::StrCat(value)});
  }
  bool number_unsigned(uint64_t value) override {
    if (value > INT64_MAX) return Unexpected(absl::StrCat(value));
    return number_integer(static_cast<int64_t>(value));
  }
  bool number_float(double value, const std::string& text) override {
    return Add({Value::Kind::kReal, 0, value, text.substr(0, 100)});
  }

 protected:
  bool Unexpected(absl::string_view found) override {
    if (!started_) return Fail(absl::StrCat("found ", found, ", want an object"));
    return Fail(absl::StrCat(Quoted(key_), " is ", found, ", want a number or a string"));
  }

 private:
  bool Add(Value value) {
    if (!started_) return Unexpected(value.ForMessage());
    values_.emplace(key_, std::move(value));
    return true;
  }

  bool started_ = false;
  std::string key_;
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

// Sets mlp_ratio and with it ff_hidden_dim of a deltanet_model.
absl::Status ParseMlpRatio(const Values& values, ModelConfig* config) {
  const Value* const found = FindValue(values, kMlpRatio);
  if (found != nullptr) {
    if (found->kind == Value::Kind::kString) return WantError(kMlpRatio, found, "a number");
    config->mlp_ratio = found->real;
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

absl::Status CheckKeys(const Values& values, Family family) {
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

// The tensors of one DeltaNet mixer.
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
  }
  DELTANET_CHECK(false, "unknown family");
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
  if (config.family == Family::kDeltaNetModel) RETURN_IF_ERROR(ParseMlpRatio(values, &config));
  if (const Value* const padding = FindValue(values, kConvPadding); padding != nullptr) {
    if (padding->kind != Value::Kind::kString || (padding->text != kCentered && padding->text != kCausal)) {
      return WantError(kConvPadding, padding, absl::StrCat("'", kCentered, "' or '", kCausal, "'"));
    }
    config.conv_padding = padding->text == kCausal ? ConvPadding::kCausal : ConvPadding::kCentered;
  }
  return config;
}

absl::StatusOr<ModelConfig> ReadModelConfig(const std::string& directory) {
  const std::string path = absl::StrCat(directory, "/config.json");
  const std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(std::fopen(path.c_str(), "rbe"), &std::fclose);
  if (file == nullptr) {
    const std::string message = absl::StrCat("cannot open ", path, ": ", std::strerror(errno));
    return errno == ENOENT || errno == ENOTDIR ? absl::NotFoundError(message)
                                               : absl::PermissionDeniedError(message);
  }
  std::string json(kMaxFileBytes + 1, '\0');
  json.resize(std::fread(json.data(), 1, json.size(), file.get()));
  if (std::ferror(file.get()) != 0) return absl::InvalidArgumentError(absl::StrCat(path, " cannot be read"));
  if (static_cast<int64_t>(json.size()) > kMaxFileBytes) {
    return absl::InvalidArgumentError(
        absl::StrCat(path, " is too large, want at most ", kMaxFileBytes, " bytes"));
  }
  absl::StatusOr<ModelConfig> config = ParseModelConfig(json);
  if (!config.ok())
    return absl::Status(config.status().code(), absl::StrCat(path, ": ", config.status().message()));
  return config;
}

std::string ModelConfigJson(const ModelConfig& config) {
  nlohmann::ordered_json json;
  const auto set = [&json](absl::string_view key, auto value) { json[std::string(key)] = value; };
  set(kModelType, std::string(FamilyName(config.family)));
  for (const SizeKey& key : SizeKeys(config.family)) set(key.name, config.*key.field);
  if (config.family == Family::kDeltaNetModel) set(kMlpRatio, config.mlp_ratio);
  set(kConvPadding, std::string(config.conv_padding == ConvPadding::kCausal ? kCausal : kCentered));
  return json.dump(2) + "\n";
}

absl::Status ResolveHeads(const std::map<std::string, SafetensorsEntry>& entries, ModelConfig* config) {
  if (config->family != Family::kDeltaNetModel) return absl::OkStatus();
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
