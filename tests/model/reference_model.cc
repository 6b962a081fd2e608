#include "tests/model/reference_model.h"

#include <cmath>

#include "absl/strings/str_cat.h"
#include "model/base/check.h"
#include "model/base/safetensors.h"
#include "model/ops/delta_rule.h"

namespace deltanet {
namespace {

double Sigmoid(double x) { return 1 / (1 + std::exp(-x)); }
double Silu(double x) { return x * Sigmoid(x); }

}  // namespace

ReferenceModel::ReferenceModel(const std::string& directory, Rounding rounding) : rounding_(rounding) {
  auto config = ReadModelConfig(directory);
  DELTANET_CHECK(config.ok(), "config.json");
  config_ = *config;
  auto file = SafetensorsReader::Open(directory + "/model.safetensors");
  DELTANET_CHECK(file.ok(), "model.safetensors");
  DELTANET_CHECK(ResolveFromFile(file->entries(), &config_).ok(), "heads");
  for (const auto& [name, entry] : file->entries()) {
    std::string raw(entry.bytes, '\0');
    DELTANET_CHECK(file->Read(entry, raw.data()).ok(), "tensor");
    Matrix values(NumElements(entry.shape));
    ConvertElements(raw.data(), entry.dtype, values.data(), DType::kFloat64, values.size());
    tensors_[name] = Round(std::move(values));
  }
}

ReferenceModel::Matrix ReferenceModel::Round(Matrix x) const {
  if (rounding_ == Rounding::kNone) return x;
  std::vector<uint16_t> rounded(x.size());
  ConvertElements(x.data(), DType::kFloat64, rounded.data(), DType::kBFloat16, x.size());
  ConvertElements(rounded.data(), DType::kBFloat16, x.data(), DType::kFloat64, x.size());
  return x;
}

const ReferenceModel::Matrix& ReferenceModel::Tensor(const std::string& name) const {
  const auto found = tensors_.find(name);
  DELTANET_CHECK(found != tensors_.end(), "the reference asks for a tensor that is not there");
  return found->second;
}

ReferenceModel::Matrix ReferenceModel::Linear(const Matrix& x, int64_t inputs, const std::string& weight,
                                              const std::string& bias) const {
  const Matrix& w = Tensor(weight);  // [outputs, inputs]
  const int64_t outputs = static_cast<int64_t>(w.size()) / inputs;
  const int64_t tokens = static_cast<int64_t>(x.size()) / inputs;
  Matrix y(tokens * outputs);
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t o = 0; o < outputs; ++o) {
      double sum = bias.empty() ? 0 : Tensor(bias)[o];
      for (int64_t i = 0; i < inputs; ++i) sum += w[o * inputs + i] * x[t * inputs + i];
      y[t * outputs + o] = sum;
    }
  }
  return Round(std::move(y));
}

ReferenceModel::Matrix ReferenceModel::Conv(const Matrix& x, const std::string& name) const {
  const int64_t d = config_.d_model;
  const int64_t tokens = static_cast<int64_t>(x.size()) / d;
  const Matrix& w = Tensor(name + ".weight");  // [d, d, 3]
  const Matrix& b = Tensor(name + ".bias");
  const int64_t left = config_.conv_padding == ConvPadding::kCentered ? 1 : 2;
  Matrix y(tokens * d);
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t o = 0; o < d; ++o) {
      double sum = b[o];
      for (int64_t j = 0; j < 3; ++j) {
        const int64_t from = t - left + j;
        if (from < 0 || from >= tokens) continue;
        for (int64_t i = 0; i < d; ++i) sum += w[(o * d + i) * 3 + j] * x[from * d + i];
      }
      y[t * d + o] = sum;
    }
  }
  return Round(std::move(y));
}

ReferenceModel::Matrix ReferenceModel::Norm(const Matrix& x, const std::string& scale) const {
  const Matrix& s = Tensor(scale);
  const int64_t width = static_cast<int64_t>(s.size());
  Matrix y(x.size());
  for (size_t row = 0; row < x.size(); row += width) {
    double squares = 0;
    for (int64_t i = 0; i < width; ++i) squares += x[row + i] * x[row + i];
    const double rms = std::sqrt(squares / width);
    for (int64_t i = 0; i < width; ++i) y[row + i] = x[row + i] / (rms + 1e-8) * s[i];
  }
  return Round(std::move(y));
}

ReferenceModel::Matrix ReferenceModel::Mixer(const Matrix& x, const std::string& prefix) const {
  const int64_t d = config_.d_model;
  const int64_t heads = config_.num_heads;
  const int64_t width = d / heads;
  const int64_t tokens = static_cast<int64_t>(x.size()) / d;
  const bool silu = config_.family == Family::kDeltaNetModel;
  std::map<std::string, Matrix> qkv;
  for (const std::string name : {"q", "k", "v"}) {
    Matrix y = Conv(Linear(x, d, prefix + name + "_linear.weight", prefix + name + "_linear.bias"),
                    prefix + name + "_conv");
    for (double& value : y) value = silu ? Silu(value) : std::max(value, 0.0);
    y = Round(std::move(y));
    if (name != "v") {
      for (int64_t row = 0; row < tokens * heads; ++row) {
        double squares = 0;
        for (int64_t i = 0; i < width; ++i) squares += y[row * width + i] * y[row * width + i];
        for (int64_t i = 0; i < width; ++i) y[row * width + i] /= std::sqrt(squares) + 1e-6;
      }
    }
    qkv[name] = Round(std::move(y));
  }
  const Matrix beta = Linear(x, d, prefix + "beta_linear.weight", prefix + "beta_linear.bias");  // [T, H]
  Matrix mixed(tokens * d);
  for (int64_t h = 0; h < heads; ++h) {
    std::map<std::string, Matrix> head;
    for (const auto& [name, all] : qkv) {
      for (int64_t t = 0; t < tokens; ++t) {
        head[name].insert(head[name].end(), &all[t * d + h * width], &all[t * d + h * width] + width);
      }
    }
    Matrix head_beta(tokens), state(width * width), out(tokens * width);
    for (int64_t t = 0; t < tokens; ++t) head_beta[t] = Sigmoid(beta[t * heads + h]);
    head_beta = Round(std::move(head_beta));
    DeltaRuleReference<double>(tokens, width, width, head["q"].data(), head["k"].data(), head["v"].data(),
                               head_beta.data(), 1.0, state.data(), out.data());
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t i = 0; i < width; ++i) mixed[t * d + h * width + i] = out[t * width + i];
    }
  }
  mixed = Round(std::move(mixed));
  return Linear(Norm(mixed, prefix + "rms_norm.scale"), d, prefix + "output_linear.weight",
                prefix + "output_linear.bias");
}

std::vector<double> ReferenceModel::Forward(const std::vector<double>& input) const {
  const int64_t d = config_.d_model;
  const auto add = [this](Matrix* x, const Matrix& y) {
    for (size_t i = 0; i < x->size(); ++i) (*x)[i] += y[i];
    *x = Round(std::move(*x));
  };
  Matrix x = config_.takes_tokens() ? input : Round(input);
  switch (config_.family) {
    case Family::kTransformerDeltaNet:
      for (int64_t l = 0; l < config_.num_layers; ++l) add(&x, Mixer(x, absl::StrCat("layers.", l, ".")));
      return Norm(x, "final_rms_norm.scale");
    case Family::kTransformerBlock: {
      add(&x, Mixer(x, "deltanet."));
      x = Norm(x, "norm1.scale");
      const Matrix hidden = Linear(x, d, "ffn.0.weight", "ffn.0.bias");
      const int64_t f = config_.ff_hidden_dim;
      Matrix gated;
      for (size_t row = 0; row < hidden.size(); row += 2 * f) {
        for (int64_t i = 0; i < f; ++i) gated.push_back(hidden[row + i] * Sigmoid(hidden[row + f + i]));
      }
      add(&x, Linear(Round(gated), f, "ffn.2.weight", "ffn.2.bias"));
      return Norm(x, "norm2.scale");
    }
    case Family::kDeltaNetModel: {
      const Matrix& table = Tensor("embedding.weight");
      x.clear();
      for (const double id : input) {
        const double* row = &table[static_cast<int64_t>(id) * d];
        x.insert(x.end(), row, row + d);
      }
      for (int64_t l = 0; l < config_.num_layers; ++l) {
        const std::string prefix = absl::StrCat("layers.", l, ".");
        add(&x, Mixer(Norm(x, prefix + "norm1.scale"), prefix + "delta_net."));
        const Matrix y = Norm(x, prefix + "norm2.scale");
        Matrix first = Linear(y, d, prefix + "mlp.w1.weight", "");
        const Matrix second = Linear(y, d, prefix + "mlp.w2.weight", "");
        for (size_t i = 0; i < first.size(); ++i) first[i] = Silu(first[i]) * second[i];
        add(&x, Linear(Round(first), config_.ff_hidden_dim, prefix + "mlp.w3.weight", ""));
      }
      return Linear(Norm(x, "norm_f.scale"), d, "head.weight", "");
    }
  }
  return {};
}

}  // namespace deltanet
