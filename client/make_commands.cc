// make-model, make-input and compare: random files to try the service with, and a judge of what comes out.
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <random>
#include <system_error>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/strip.h"
#include "absl/types/span.h"
#include "client/command.h"
#include "client/sequences.h"
#include "model/base/checkpoint.h"
#include "model/base/config.h"
#include "model/base/safetensors.h"
#include "model/base/status_macros.h"

namespace deltanet {
namespace {

// Makes the elements of a tensor, in their order, as often as it is called.
using Fill = std::function<void(absl::Span<float> values)>;

template <typename Make>
Fill OneByOne(Make make) {
  return [make](absl::Span<float> values) mutable {
    for (float& value : values) value = static_cast<float>(make());
  };
}

// Random numbers as fast as they can be written: a weyl sequence through SplitMix64's finalizer.
class FastRandom {
 public:
  explicit FastRandom(uint64_t seed) : state_(seed) {}

  uint64_t operator()() {
    state_ += 0x9e3779b97f4a7c15;
    uint64_t z = state_;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
  }
  // Normal but for its tails, which end at 3.46: the sum of four uniform numbers, of mean 0 and variance 1.
  float Normal() {
    const uint64_t bits = (*this)();
    const int32_t sum = static_cast<int32_t>((bits & 0xffff) + ((bits >> 16) & 0xffff) +
                                             ((bits >> 32) & 0xffff) + (bits >> 48));
    constexpr float kDeviation = 37837.227f;  // sqrt(4 (2^32 - 1) / 12)
    return static_cast<float>(sum - 2 * 0xffff) * (1 / kDeviation);
  }

 private:
  uint64_t state_;
};

// Writes one file of a checkpoint a block at a time.
absl::Status WriteRandom(const std::string& path, absl::Span<const TensorSpec> specs, DType dtype,
                         const std::function<Fill(const TensorSpec&)>& fill_of) {
  std::vector<SafetensorsWriter::Tensor> tensors;
  for (const TensorSpec& spec : specs) tensors.push_back({spec.name, spec.shape, dtype});
  ASSIGN_OR_RETURN(SafetensorsWriter writer, SafetensorsWriter::Create(path, tensors));
  constexpr int64_t kBlock = int64_t{1} << 18;
  std::vector<float> values(kBlock);
  std::vector<char> converted(kBlock * DTypeBytes(dtype));
  for (const TensorSpec& spec : specs) {
    const Fill fill = fill_of(spec);
    int64_t left = NumElements(spec.shape);
    while (left > 0) {
      const int64_t count = std::min(left, kBlock);
      fill({values.data(), static_cast<size_t>(count)});
      ConvertElements(values.data(), DType::kFloat32, converted.data(), dtype, count);
      RETURN_IF_ERROR(writer.Append(converted.data(), count * DTypeBytes(dtype)));
      left -= count;
    }
  }
  return writer.Finish();
}

absl::Status WriteText(const std::string& path, const std::string& text) {
  std::ofstream file(path);
  file << text;
  file.close();
  if (!file) return absl::InternalError(absl::StrCat("cannot write ", path, ": ", std::strerror(errno)));
  return absl::OkStatus();
}

class MakeModelCommand : public Command {
 public:
  void AddFlags(FlagSet* flags) override {
    flags->AddChoice("family", {"transformer_deltanet", "transformer_block", "deltanet_model", "delta_net"},
                     "the model's family", &family_);
    flags->Require("family");
    flags->Add("output", "DIRECTORY", "where config.json and the weights go; made if it is not there",
               &output_);
    flags->Require("output");
    flags->Add("if-empty", "leave a directory that holds anything as it is", &if_empty_);
    flags->Add("d-model", "N", "width", 1, &d_model_);
    flags->Add("num-layers", "N", "layers (not transformer_block, which is one)", 1, &num_layers_);
    flags->Add("num-heads", "N", "heads, which divide the width (deltanet_model, delta_net)", 1, &num_heads_);
    flags->Add("vocab-size", "N", "vocabulary (deltanet_model, delta_net)", 1, &vocab_size_);
    flags->Add("ff-hidden-dim", "N", "hidden width of the feed-forward layer (transformer_block)", 1,
               &ff_hidden_dim_);
    flags->Add("mlp-ratio", "X", "hidden width of the feed-forward layers by the width (deltanet_model)",
               &mlp_ratio_);
    flags->Add(
        "intermediate-size", "N",
        "hidden width of the feed-forward layers (delta_net); absent: 8/3 of the width, up to a multiple "
        "of 256",
        1, &intermediate_size_);
    flags->Add("expand-k", "X", "width of the keys by the width (delta_net)", &expand_k_);
    flags->Add("expand-v", "X", "width of the values by the width (delta_net)", &expand_v_);
    flags->Add("conv-size", "N", "taps of the short convolutions (delta_net)", 1, &conv_size_);
    flags->Add("use-gate", "gate the mixer's output (delta_net)", &use_gate_);
    flags->Add("tie-word-embeddings", "the embedding is the head too (delta_net)", &tie_word_embeddings_);
    flags->Add("chunk-size", "N", "chunk_size to write; changes no output (not delta_net)", 1, &chunk_size_);
    flags->AddChoice("conv-padding", {"centered", "causal"},
                     "whether convolutions see one token ahead (not delta_net)", &conv_padding_);
    flags->Add("dtype", "of the weights", &dtype_);
    flags->Add("shard-bytes", "N",
               "spread the weights over files of at most so many bytes (a tensor is whole)", 1,
               &shard_bytes_);
    flags->Add("seed", "N", "of the random numbers", 0, &seed_);
  }

  absl::Status CheckFlags(const FlagSet& flags) const override {
    const bool delta_net = family_ == "delta_net";
    const bool tokens = family_ == "deltanet_model" || delta_net;
    const std::pair<const char*, bool> applies[] = {{"num-layers", family_ != "transformer_block"},
                                                    {"num-heads", tokens},
                                                    {"vocab-size", tokens},
                                                    {"ff-hidden-dim", family_ == "transformer_block"},
                                                    {"mlp-ratio", family_ == "deltanet_model"},
                                                    {"intermediate-size", delta_net},
                                                    {"expand-k", delta_net},
                                                    {"expand-v", delta_net},
                                                    {"conv-size", delta_net},
                                                    {"use-gate", delta_net},
                                                    {"tie-word-embeddings", delta_net},
                                                    {"chunk-size", !delta_net},
                                                    {"conv-padding", !delta_net}};
    for (const auto& [name, used] : applies) {
      if (!used && flags.given(name)) {
        return absl::InvalidArgumentError(absl::StrCat("--", name, " is not for family ", family_));
      }
    }
    // The file's own rules, before anything is written.
    if (const absl::Status status = ParseModelConfig(ModelConfigJson(Config())).status(); !status.ok()) {
      return status;
    }
    if (family_ == "deltanet_model" && d_model_ % num_heads_ != 0) {
      return absl::InvalidArgumentError(
          absl::StrCat("--num-heads is ", num_heads_, ", want a divisor of --d-model ", d_model_));
    }
    return absl::OkStatus();
  }

  absl::Status Run(const Output& output) override {
    if (if_empty_) {
      std::error_code error;  // Reading what is no directory fails, and making it says so below.
      if (std::filesystem::directory_iterator(output_, error) != std::filesystem::directory_iterator()) {
        output.out << output_ << " is not empty: left as it is\n";
        return absl::OkStatus();
      }
    }
    ASSIGN_OR_RETURN(const ModelConfig config, ParseModelConfig(ModelConfigJson(Config())));
    if (::mkdir(output_.c_str(), 0777) != 0 && errno != EEXIST) {
      return absl::ErrnoToStatus(errno, absl::StrCat("making the directory ", output_));
    }
    const std::vector<TensorSpec> specs = ExpectedTensors(config);
    int64_t parameters = 0;
    for (const TensorSpec& spec : specs) parameters += NumElements(spec.shape);
    RETURN_IF_ERROR(WriteWeights(specs));
    RETURN_IF_ERROR(WriteText(absl::StrCat(output_, "/config.json"), ModelConfigJson(config)));
    output.out << family_ << " of " << parameters << " parameters in " << output_ << "\n";
    return absl::OkStatus();
  }

 private:
  ModelConfig Config() const {
    ModelConfig config;
    for (const Family family : {Family::kTransformerDeltaNet, Family::kTransformerBlock,
                                Family::kDeltaNetModel, Family::kDeltaNet}) {
      if (FamilyName(family) == family_) config.family = family;
    }
    config.d_model = d_model_;
    config.chunk_size = chunk_size_;
    config.num_layers = num_layers_;
    config.num_heads = num_heads_;
    config.ff_hidden_dim =
        config.family == Family::kDeltaNet ? intermediate_size_.value_or(0) : ff_hidden_dim_;
    config.expand_k = expand_k_;
    config.expand_v = expand_v_;
    config.conv_size = conv_size_;
    config.use_gate = use_gate_;
    config.tie_word_embeddings = tie_word_embeddings_;
    config.vocab_size = vocab_size_;
    config.mlp_ratio = mlp_ratio_;
    config.conv_padding = conv_padding_ == "causal" ? ConvPadding::kCausal : ConvPadding::kCentered;
    return config;
  }

  // One file, or several and their index. What was there in the other form goes.
  absl::Status WriteWeights(const std::vector<TensorSpec>& specs) const {
    std::vector<absl::Span<const TensorSpec>> shards;
    int64_t total = 0, shard_bytes = 0;
    for (size_t i = 0; i < specs.size(); ++i) {
      const int64_t bytes = NumElements(specs[i].shape) * DTypeBytes(dtype_);
      if (shards.empty() || (shard_bytes_ && shard_bytes + bytes > *shard_bytes_)) {
        shards.push_back({&specs[i], 0});
        shard_bytes = 0;
      }
      shards.back() = {shards.back().data(), shards.back().size() + 1};
      shard_bytes += bytes;
      total += bytes;
    }
    const std::function<Fill(const TensorSpec&)> fill_of =
        family_ == "delta_net" ? FlaWeights() : ReadmeWeights(specs);
    const std::string single = absl::StrCat(output_, "/", kCheckpointFile);
    const std::string index = absl::StrCat(output_, "/", kCheckpointIndex);
    std::error_code unused;
    if (shards.size() == 1) {
      RETURN_IF_ERROR(WriteRandom(single, specs, dtype_, fill_of));
      std::filesystem::remove(index, unused);
      return absl::OkStatus();
    }
    std::map<std::string, std::string> file_of;
    for (size_t i = 0; i < shards.size(); ++i) {
      const std::string name = absl::StrFormat("model-%05d-of-%05d.safetensors", i + 1, shards.size());
      RETURN_IF_ERROR(WriteRandom(absl::StrCat(output_, "/", name), shards[i], dtype_, fill_of));
      for (const TensorSpec& spec : shards[i]) file_of[spec.name] = name;
    }
    RETURN_IF_ERROR(WriteText(index, CheckpointIndexJson(file_of, total)));
    std::filesystem::remove(single, unused);
    return absl::OkStatus();
  }

  // As PyTorch begins: linear and convolution layers, their biases too, uniform within 1/sqrt(inputs of an
  // output); an embedding normal; the scales of norms 1.
  std::function<Fill(const TensorSpec&)> ReadmeWeights(const std::vector<TensorSpec>& specs) const {
    std::map<std::string, int64_t> fan_in;  // By a layer's name, without ".weight".
    for (const TensorSpec& spec : specs) {
      absl::string_view layer = spec.name;
      if (absl::ConsumeSuffix(&layer, ".weight")) {
        fan_in[std::string(layer)] = NumElements(spec.shape) / spec.shape[0];
      }
    }
    const auto random = std::make_shared<std::mt19937_64>(seed_);  // All tensors draw from one.
    return [fan_in, random](const TensorSpec& spec) {
      if (absl::EndsWith(spec.name, ".scale")) return OneByOne([] { return 1.0f; });
      if (spec.name == "embedding.weight") {
        return OneByOne(
            [random, normal = std::normal_distribution<float>()]() mutable { return normal(*random); });
      }
      absl::string_view layer = spec.name;
      if (!absl::ConsumeSuffix(&layer, ".weight")) absl::ConsumeSuffix(&layer, ".bias");
      const float bound = 1.0f / std::sqrt(static_cast<float>(fan_in.at(std::string(layer))));
      std::uniform_real_distribution<float> uniform(-bound, bound);
      return OneByOne([random, uniform]() mutable { return uniform(*random); });
    };
  }

  // As flash-linear-attention begins, all normal, of deviation 0.02; but convolutions, of 1/sqrt(taps), so
  // that little models see the past as well. The scales of norms 1.
  std::function<Fill(const TensorSpec&)> FlaWeights() const {
    const auto random = std::make_shared<FastRandom>(seed_);
    return [random](const TensorSpec& spec) {
      if (absl::EndsWith(spec.name, "norm.weight")) return OneByOne([] { return 1.0f; });
      const bool convolution = absl::EndsWith(spec.name, "_conv1d.weight");
      const float deviation = convolution ? 1.0f / std::sqrt(static_cast<float>(spec.shape.back())) : 0.02f;
      return OneByOne([random, deviation] { return deviation * random->Normal(); });
    };
  }

  std::string family_;
  std::string output_;
  bool if_empty_ = false;
  int64_t d_model_ = 64;
  int64_t num_layers_ = 1;
  int64_t num_heads_ = 8;
  int64_t vocab_size_ = 256;
  int64_t ff_hidden_dim_ = 256;
  double mlp_ratio_ = 4.0;
  std::optional<int64_t> intermediate_size_;
  double expand_k_ = 1.0;
  double expand_v_ = 1.0;
  int64_t conv_size_ = 4;
  bool use_gate_ = false;
  bool tie_word_embeddings_ = false;
  int64_t chunk_size_ = 64;
  std::string conv_padding_ = "centered";
  DType dtype_ = DType::kFloat32;
  std::optional<int64_t> shard_bytes_;
  int64_t seed_ = 0;
};

class MakeInputCommand : public Command {
 public:
  void AddFlags(FlagSet* flags) override {
    flags->Add("shape", "B,T[,d]", "sizes; with --server only T or B,T, and the model says the rest", 1,
               &shape_);
    flags->Require("shape");
    server_.AddTo(flags);
    AddModelFlag(flags, &model_);
    flags->Add("vocab", "N", "ids in [0, N) instead of normally distributed values", 1, &vocab_);
    flags->Add("seed", "N", "of the random numbers", 0, &seed_);
    flags->Add("output", "FILE", "safetensors file to write tensor 'input' to", &output_);
    flags->Require("output");
  }

  absl::Status CheckFlags(const FlagSet& flags) const override {
    if (server_.server.empty() && flags.given("model"))
      return absl::InvalidArgumentError("--model wants --server");
    if (!server_.server.empty() && vocab_)
      return absl::InvalidArgumentError("--vocab and --server exclude each other");
    double elements = 1;
    for (const int64_t size : shape_) elements *= static_cast<double>(size);
    if (elements > static_cast<double>(int64_t{1} << 40)) {
      return absl::InvalidArgumentError(
          absl::StrCat("--shape has ", elements, " elements, want at most 2^40"));
    }
    return absl::OkStatus();
  }

  absl::Status Run(const Output& output) override {
    Shape shape(shape_.begin(), shape_.end());
    std::optional<int64_t> vocab = vocab_;
    if (!server_.server.empty()) {
      ASSIGN_OR_RETURN(const Client client, server_.Connect());
      ASSIGN_OR_RETURN(const ModelInfo model, client.GetModel(model_));
      if (model.vocab_size > 0) {
        vocab = model.vocab_size;
      } else {
        shape.push_back(model.input_width);
      }
    }
    std::mt19937_64 random(seed_);
    Tensor input;
    if (vocab) {
      std::uniform_int_distribution<int64_t> uniform(0, *vocab - 1);
      input = {DType::kInt64, shape, std::string(NumElements(shape) * sizeof(int64_t), '\0')};
      for (size_t at = 0; at < input.data.size(); at += sizeof(int64_t)) {
        const int64_t id = uniform(random);
        std::memcpy(input.data.data() + at, &id, sizeof(id));
      }
    } else {
      std::normal_distribution<float> normal;
      std::vector<float> values(NumElements(shape));
      for (float& value : values) value = normal(random);
      input = {DType::kFloat32, shape, std::string(values.size() * sizeof(float), '\0')};
      std::memcpy(input.data.data(), values.data(), input.data.size());
    }
    RETURN_IF_ERROR(Sequences::Of(input.view()).status());
    RETURN_IF_ERROR(WriteTensor(output_, "input", input));
    output.out << "input " << DTypeName(input.dtype) << ShapeString(input.shape) << "\n";
    return absl::OkStatus();
  }

 private:
  std::vector<int64_t> shape_;
  ServerFlags server_{.server = ""};  // Asked what its model takes.
  std::string model_;
  std::optional<int64_t> vocab_;
  int64_t seed_ = 0;
  std::string output_;
};

class CompareCommand : public Command {
 public:
  void AddFlags(FlagSet* flags) override {
    flags->Add("a", "FILE", "one safetensors file", &a_);
    flags->Require("a");
    flags->Add("b", "FILE", "the other", &b_);
    flags->Require("b");
    flags->Add("tolerance", "X", "largest difference that is agreement, relative to the largest magnitude",
               &tolerance_);
  }

  absl::Status Run(const Output& output) override {
    ASSIGN_OR_RETURN(const Tensor a, ReadTensor(a_, "output"));
    ASSIGN_OR_RETURN(const Tensor b, ReadTensor(b_, "output"));
    ASSIGN_OR_RETURN(const Difference difference, Compare(a, b));
    const bool agree = difference.relative() <= tolerance_;
    output.out << absl::StrFormat(
        "%s %s: largest difference %.3g of the largest magnitude %.3g, relative %.3g\n", ShapeString(a.shape),
        agree ? "agree" : "differ", difference.largest, difference.magnitude, difference.relative());
    if (agree) return absl::OkStatus();
    return absl::OutOfRangeError(
        absl::StrFormat("relative difference is %.3g, want at most %.3g", difference.relative(), tolerance_));
  }

 private:
  std::string a_;
  std::string b_;
  double tolerance_ = 1e-4;
};

}  // namespace

std::unique_ptr<Command> NewMakeModelCommand() { return std::make_unique<MakeModelCommand>(); }
std::unique_ptr<Command> NewMakeInputCommand() { return std::make_unique<MakeInputCommand>(); }
std::unique_ptr<Command> NewCompareCommand() { return std::make_unique<CompareCommand>(); }

}  // namespace deltanet
