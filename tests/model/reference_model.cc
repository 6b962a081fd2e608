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
    const double rms = config_.family == Family::kDeltaNet ? std::sqrt(squares / width + config_.norm_eps)
                                                           : std::sqrt(squares / width) + 1e-8;
    for (int64_t i = 0; i < width; ++i) y[row + i] = x[row + i] / rms * s[i];
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
  Matrix rounded(beta);
  for (double& value : rounded) value = Sigmoid(value);
  rounded = Round(std::move(rounded));
  const Matrix mixed = DeltaRule(qkv["q"], qkv["k"], qkv["v"], rounded, 1.0);
  return Linear(Norm(mixed, prefix + "rms_norm.scale"), d, prefix + "output_linear.weight",
                prefix + "output_linear.bias");
}

ReferenceModel::Matrix ReferenceModel::DeltaRule(const Matrix& q, const Matrix& k, const Matrix& v,
                                                 const Matrix& beta, double scale) const {
  const int64_t heads = config_.num_heads;
  const int64_t tokens = static_cast<int64_t>(beta.size()) / heads;
  const int64_t key_dim = static_cast<int64_t>(q.size()) / (tokens * heads);
  const int64_t value_dim = static_cast<int64_t>(v.size()) / (tokens * heads);
  const auto head_of = [&](const Matrix& all, int64_t head, int64_t width) {
    Matrix one;
    for (int64_t t = 0; t < tokens; ++t) {
      const double* row = &all[(t * heads + head) * width];
      one.insert(one.end(), row, row + width);
    }
    return one;
  };
  Matrix mixed(v.size());
  for (int64_t h = 0; h < heads; ++h) {
    Matrix state(key_dim * value_dim), out(tokens * value_dim);
    DeltaRuleReference<double>(tokens, key_dim, value_dim, head_of(q, h, key_dim).data(),
                               head_of(k, h, key_dim).data(), head_of(v, h, value_dim).data(),
                               head_of(beta, h, 1).data(), scale, state.data(), out.data());
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t i = 0; i < value_dim; ++i) mixed[(t * heads + h) * value_dim + i] = out[t * value_dim + i];
    }
  }
  return Round(std::move(mixed));
}

// Depthwise, causal.
ReferenceModel::Matrix ReferenceModel::ShortConv(const Matrix& x, const std::string& name,
                                                 int64_t channels) const {
  if (!config_.use_short_conv) return x;
  const int64_t taps = config_.conv_size;
  const int64_t tokens = static_cast<int64_t>(x.size()) / channels;
  const Matrix& w = Tensor(name + ".weight");  // [C, 1, taps]
  Matrix y(x.size());
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t c = 0; c < channels; ++c) {
      double sum = config_.conv_bias ? Tensor(name + ".bias")[c] : 0;
      for (int64_t j = 0; j < taps; ++j) {
        const int64_t from = t - (taps - 1) + j;
        if (from >= 0) sum += w[c * taps + j] * x[from * channels + c];
      }
      y[t * channels + c] = sum;
    }
  }
  return Round(std::move(y));
}

// A head's q or k, `width` wide, activated and normed.
ReferenceModel::Matrix ReferenceModel::QkNormed(Matrix x, int64_t width) const {
  for (double& value : x) {
    if (config_.qk_activation == "silu") value = Silu(value);
    if (config_.qk_activation == "relu") value = std::max(value, 0.0);
    if (config_.qk_activation == "elu") value = value > 0 ? value + 1 : std::exp(value);
  }
  x = Round(std::move(x));
  for (size_t row = 0; row < x.size(); row += width) {
    double sum = 0, squares = 0;
    for (int64_t i = 0; i < width; ++i) {
      sum += x[row + i];
      squares += x[row + i] * x[row + i];
    }
    const double norm = config_.qk_norm == "sum" ? sum : std::sqrt(squares + 1e-6);
    for (int64_t i = 0; i < width; ++i) x[row + i] /= norm;
  }
  return Round(std::move(x));
}

ReferenceModel::Matrix ReferenceModel::DeltaNetMixer(const Matrix& x, const std::string& prefix) const {
  const int64_t d = config_.d_model;
  const int64_t heads = config_.num_heads;
  const int64_t tokens = static_cast<int64_t>(x.size()) / d;
  const int64_t key_width = config_.key_width(), value_width = config_.value_width();
  const int64_t key_dim = key_width / heads;
  const auto front = [&](const std::string& name, int64_t width) {
    return ShortConv(Linear(x, d, prefix + name + "_proj.weight", ""), prefix + name + "_conv1d", width);
  };
  const Matrix q = QkNormed(front("q", key_width), key_dim);
  const Matrix k = QkNormed(front("k", key_width), key_dim);
  Matrix v = front("v", value_width);
  for (double& value : v) value = Silu(value);
  v = Round(std::move(v));
  Matrix beta(tokens * heads, 1.0);
  if (config_.use_beta) {
    beta = Linear(x, d, prefix + "b_proj.weight", "");
    for (double& value : beta) value = Sigmoid(value);
  }
  if (config_.allow_neg_eigval) {
    for (double& value : beta) value *= 2;
  }
  beta = Round(std::move(beta));
  Matrix mixed =
      Norm(DeltaRule(q, k, v, beta, 1 / std::sqrt(static_cast<double>(key_dim))), prefix + "o_norm.weight");
  if (config_.use_gate) {
    const Matrix gate = Linear(x, d, prefix + "g_proj.weight", "");
    for (size_t i = 0; i < mixed.size(); ++i) mixed[i] *= Silu(gate[i]);
    mixed = Round(std::move(mixed));
  }
  return Linear(mixed, value_width, prefix + "o_proj.weight", "");
}

ReferenceModel::Matrix ReferenceModel::Embedded(const Matrix& ids, const std::string& table) const {
  const int64_t d = config_.d_model;
  Matrix x;
  for (const double id : ids) {
    const double* row = &Tensor(table)[static_cast<int64_t>(id) * d];
    x.insert(x.end(), row, row + d);
  }
  return x;
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
      x = Embedded(input, "embedding.weight");
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
    case Family::kDeltaNet: {
      x = Embedded(input, "model.embeddings.weight");
      const int64_t f = config_.ff_hidden_dim;
      for (int64_t l = 0; l < config_.num_layers; ++l) {
        const std::string prefix = absl::StrCat("model.layers.", l, ".");
        add(&x, DeltaNetMixer(Norm(x, prefix + "attn_norm.weight"), prefix + "attn."));
        const Matrix y = Norm(x, prefix + "mlp_norm.weight");
        const Matrix gate = Linear(y, d, prefix + "mlp.gate_proj.weight", "");  // Fused: up after it.
        const Matrix up = config_.fused_gate_up ? Matrix() : Linear(y, d, prefix + "mlp.up_proj.weight", "");
        Matrix gated;
        for (size_t row = 0; row < y.size() / d; ++row) {
          for (int64_t i = 0; i < f; ++i) {
            gated.push_back(config_.fused_gate_up ? Silu(gate[row * 2 * f + i]) * gate[row * 2 * f + f + i]
                                                  : Silu(gate[row * f + i]) * up[row * f + i]);
          }
        }
        add(&x, Linear(Round(gated), f, prefix + "mlp.down_proj.weight", ""));
      }
      return Linear(Norm(x, "model.norm.weight"), d,
                    config_.tie_word_embeddings ? "model.embeddings.weight" : "lm_head.weight", "");
    }
  }
  return {};
}

}  // namespace deltanet
