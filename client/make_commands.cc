// make-model, make-input and compare: random files to try the service with, and a judge of what comes out.
#include <sys/stat.h>

#include <cerrno>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <random>
#include <system_error>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/strip.h"
#include "client/command.h"
#include "client/sequences.h"
#include "model/base/config.h"
#include "model/base/safetensors.h"
#include "model/base/status_macros.h"

namespace deltanet {
namespace {

// Fills a tensor of floats from values made one by one, in float32.
template <typename Make>
Tensor RandomTensor(DType dtype, const Shape& shape, Make make) {
  std::vector<float> values(NumElements(shape));
  for (float& value : values) value = static_cast<float>(make());
  Tensor tensor{dtype, shape, std::string(values.size() * DTypeBytes(dtype), '\0')};
  ConvertElements(values.data(), DType::kFloat32, tensor.data.data(), dtype,
                  static_cast<int64_t>(values.size()));
  return tensor;
}

class MakeModelCommand : public Command {
 public:
  void AddFlags(FlagSet* flags) override {
    flags->AddChoice("family", {"transformer_deltanet", "transformer_block", "deltanet_model"},
                     "the model's family", &family_);
    flags->Require("family");
    flags->Add("output", "DIRECTORY", "where config.json and model.safetensors go; made if it is not there",
               &output_);
    flags->Require("output");
    flags->Add("if-empty", "leave a directory that holds anything as it is", &if_empty_);
    flags->Add("d-model", "N", "width", 1, &d_model_);
    flags->Add("num-layers", "N", "layers (not transformer_block, which is one)", 1, &num_layers_);
    flags->Add("num-heads", "N", "heads, which divide the width (deltanet_model)", 1, &num_heads_);
    flags->Add("vocab-size", "N", "vocabulary (deltanet_model)", 1, &vocab_size_);
    flags->Add("ff-hidden-dim", "N", "hidden width of the feed-forward layer (transformer_block)", 1,
               &ff_hidden_dim_);
    flags->Add("mlp-ratio", "X", "hidden width of the feed-forward layers by the width (deltanet_model)",
               &mlp_ratio_);
    flags->Add("chunk-size", "N", "chunk_size to write; changes no output", 1, &chunk_size_);
    flags->AddChoice("conv-padding", {"centered", "causal"}, "whether convolutions see one token ahead",
                     &conv_padding_);
    flags->Add("dtype", "of the weights", &dtype_);
    flags->Add("seed", "N", "of the random numbers", 0, &seed_);
  }

  absl::Status CheckFlags(const FlagSet& flags) const override {
    const std::pair<const char*, bool> applies[] = {{"num-layers", family_ != "transformer_block"},
                                                    {"num-heads", family_ == "deltanet_model"},
                                                    {"vocab-size", family_ == "deltanet_model"},
                                                    {"ff-hidden-dim", family_ == "transformer_block"},
                                                    {"mlp-ratio", family_ == "deltanet_model"}};
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
    std::vector<Tensor> tensors = RandomWeights(specs);
    std::vector<std::pair<std::string, TensorView>> views;
    int64_t parameters = 0;
    for (size_t i = 0; i < specs.size(); ++i) {
      views.emplace_back(specs[i].name, tensors[i].view());
      parameters += NumElements(specs[i].shape);
    }
    RETURN_IF_ERROR(WriteSafetensors(absl::StrCat(output_, "/model.safetensors"), views));
    const std::string path = absl::StrCat(output_, "/config.json");
    std::ofstream file(path);
    file << ModelConfigJson(config);
    file.close();
    if (!file) return absl::InternalError(absl::StrCat("cannot write ", path, ": ", std::strerror(errno)));
    output.out << family_ << " of " << parameters << " parameters in " << output_ << "\n";
    return absl::OkStatus();
  }

 private:
  ModelConfig Config() const {
    ModelConfig config;
    for (const Family family :
         {Family::kTransformerDeltaNet, Family::kTransformerBlock, Family::kDeltaNetModel}) {
      if (FamilyName(family) == family_) config.family = family;
    }
    config.d_model = d_model_;
    config.chunk_size = chunk_size_;
    config.num_layers = num_layers_;
    config.num_heads = num_heads_;
    config.ff_hidden_dim = ff_hidden_dim_;
    config.vocab_size = vocab_size_;
    config.mlp_ratio = mlp_ratio_;
    config.conv_padding = conv_padding_ == "causal" ? ConvPadding::kCausal : ConvPadding::kCentered;
    return config;
  }

  // As PyTorch begins: linear and convolution layers, their biases too, uniform within 1/sqrt(inputs of an
  // output); an embedding normal; the scales of norms 1.
  std::vector<Tensor> RandomWeights(const std::vector<TensorSpec>& specs) const {
    std::map<absl::string_view, int64_t> fan_in;  // By a layer's name, without ".weight".
    for (const TensorSpec& spec : specs) {
      absl::string_view layer = spec.name;
      if (absl::ConsumeSuffix(&layer, ".weight")) fan_in[layer] = NumElements(spec.shape) / spec.shape[0];
    }
    std::mt19937_64 random(seed_);
    std::vector<Tensor> tensors;
    for (const TensorSpec& spec : specs) {
      absl::string_view layer = spec.name;
      if (absl::EndsWith(spec.name, ".scale")) {
        tensors.push_back(RandomTensor(dtype_, spec.shape, [] { return 1.0f; }));
      } else if (spec.name == "embedding.weight") {
        std::normal_distribution<float> normal;
        tensors.push_back(RandomTensor(dtype_, spec.shape, [&] { return normal(random); }));
      } else {
        if (!absl::ConsumeSuffix(&layer, ".weight")) absl::ConsumeSuffix(&layer, ".bias");
        const float bound = 1.0f / std::sqrt(static_cast<float>(fan_in.at(layer)));
        std::uniform_real_distribution<float> uniform(-bound, bound);
        tensors.push_back(RandomTensor(dtype_, spec.shape, [&] { return uniform(random); }));
      }
    }
    return tensors;
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
  int64_t chunk_size_ = 64;
  std::string conv_padding_ = "centered";
  DType dtype_ = DType::kFloat32;
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
      input = RandomTensor(DType::kFloat32, shape, [&] { return normal(random); });
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
