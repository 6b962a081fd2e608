#include "model/weights.h"

#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "model/base/check.h"
#include "model/base/status_macros.h"
#include "model/ops/gemm.h"
#include "model/torch_parallel.h"

namespace deltanet {
namespace {

constexpr int64_t kByteAlignment = 64;  // Of a weight.

int64_t RoundUp(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Reads one tensor after another from the file into the arena of `weights`. The first pass only counts, so
// that the arena is allocated once, with its exact size. What is written goes to host memory, and from there
// to the device as a whole; on the CPU the two are the same.
class Loader {
 public:
  Loader(const ModelConfig& config, const Checkpoint& file, DType dtype)
      : config_(config), file_(file), dtype_(dtype) {}

  absl::StatusOr<Weights> Load(const Device& device) {
    ASSIGN_OR_RETURN(Weights sized, Fill());
    arena_ = DeviceBuffer(device, used_);
    DeviceBuffer host_copy;
    if (device.type != DeviceType::kCpu) host_copy = DeviceBuffer(Device{}, used_);
    host_ = device.type == DeviceType::kCpu ? arena_.data() : host_copy.data();
    used_ = 0;
    ASSIGN_OR_RETURN(Weights weights, Fill());
    DeviceStream stream(device);
    stream.Copy(arena_.data(), host_, used_);
    stream.Synchronize();
    weights.arena = std::move(arena_);
    return weights;
  }

 private:
  bool counting() const { return host_ == nullptr; }

  // A weight's place: where to write it and where the device will find it. Both null while counting.
  struct Place {
    char* host = nullptr;
    char* device = nullptr;
  };
  Place Take(int64_t elements, DType dtype) {
    const int64_t begin = used_;
    used_ += RoundUp(elements * DTypeBytes(dtype), kByteAlignment);
    if (counting()) return {};
    return {host_ + begin, arena_.data() + begin};
  }
  struct FloatPlace {
    float* host = nullptr;
    float* device = nullptr;
  };
  FloatPlace TakeFloats(int64_t floats) {
    const Place place = Take(floats, DType::kFloat32);
    return {reinterpret_cast<float*>(place.host), reinterpret_cast<float*>(place.device)};
  }

  absl::StatusOr<std::vector<double>> Read(const std::string& name) const {
    ASSIGN_OR_RETURN(const SafetensorsEntry* entry, file_.Find(name));
    std::vector<char> raw(entry->bytes);
    RETURN_IF_ERROR(file_.Read(*entry, raw.data()));
    std::vector<double> values(NumElements(entry->shape));
    ConvertElements(raw.data(), entry->dtype, values.data(), DType::kFloat64, values.size());
    return values;
  }

  // A tensor as it is.
  absl::StatusOr<const float*> Plain(const std::string& name) {
    ASSIGN_OR_RETURN(const SafetensorsEntry* entry, file_.Find(name));
    const FloatPlace to = TakeFloats(NumElements(entry->shape));
    if (counting()) return nullptr;
    std::vector<char> raw(entry->bytes);
    RETURN_IF_ERROR(file_.Read(*entry, raw.data()));
    ConvertElements(raw.data(), entry->dtype, to.host, DType::kFloat32, NumElements(entry->shape));
    return to.device;
  }

  // Linear layers with the same input, one below the other: one product for all.
  absl::StatusOr<Linear> Stacked(const std::vector<std::string>& names, const std::string& bias_name = "") {
    Linear linear;
    for (const std::string& name : names) {
      ASSIGN_OR_RETURN(const SafetensorsEntry* entry, file_.Find(name));
      linear.inputs = entry->shape[1];
      linear.outputs += entry->shape[0];
    }
    const Place place = Take(linear.outputs * linear.inputs, dtype_);
    linear.matrix = place.device;
    if (!bias_name.empty()) {
      ASSIGN_OR_RETURN(linear.bias, Plain(bias_name));
    }
    if (counting()) return linear;
    char* to = place.host;
    for (const std::string& name : names) {
      ASSIGN_OR_RETURN(const SafetensorsEntry* entry, file_.Find(name));
      std::vector<char> raw(entry->bytes);
      RETURN_IF_ERROR(file_.Read(*entry, raw.data()));
      const int64_t elements = NumElements(entry->shape);
      ConvertElements(raw.data(), entry->dtype, to, dtype_, elements);
      to += elements * DTypeBytes(dtype_);
    }
    return linear;
  }

  // Tap j of conv3(linear(x)) is W_j (A x + a): W_j A goes into rows `first`... and the columns of tap j, W_j a
  // into tap_bias.
  absl::Status Compose(const std::string& linear_name, const std::string& conv_name, int64_t first,
                       float* matrix, float* bias, float* tap_bias, int64_t tap_bias_stride) const {
    const int64_t d = config_.d_model;
    ASSIGN_OR_RETURN(const std::vector<double> linear, Read(absl::StrCat(linear_name, ".weight")));  // [d, d]
    ASSIGN_OR_RETURN(const std::vector<double> linear_bias, Read(absl::StrCat(linear_name, ".bias")));  // [d]
    ASSIGN_OR_RETURN(const std::vector<double> conv, Read(absl::StrCat(conv_name, ".weight")));  // [d, d, 3]
    ASSIGN_OR_RETURN(const std::vector<double> conv_bias, Read(absl::StrCat(conv_name, ".bias")));  // [d]
    std::vector<double> transposed(d * d), tap(d * d), product(d * d);
    for (int64_t i = 0; i < d; ++i) {
      for (int64_t j = 0; j < d; ++j) transposed[j * d + i] = linear[i * d + j];
    }
    std::vector<double> total(conv_bias);
    for (int64_t j = 0; j < kConvTaps; ++j) {
      for (int64_t i = 0; i < d * d; ++i) tap[i] = conv[i * kConvTaps + j];
      GemmArgs gemm;
      gemm.dtype = gemm.c_dtype = DType::kFloat64;
      gemm.m = gemm.n = gemm.k = gemm.lda = gemm.ldb = gemm.ldc = d;
      gemm.a = tap.data();
      gemm.b = transposed.data();
      gemm.c = product.data();
      RETURN_IF_ERROR(Gemm(gemm, OpContext{Device{}, TorchParallelFor, nullptr}));
      for (int64_t o = 0; o < d; ++o) {
        double from_bias = 0;
        for (int64_t i = 0; i < d; ++i) {
          matrix[(first + o) * kConvTaps * d + j * d + i] = static_cast<float>(product[o * d + i]);
          from_bias += tap[o * d + i] * linear_bias[i];
        }
        tap_bias[j * tap_bias_stride + first + o] = static_cast<float>(from_bias);
        total[o] += from_bias;
      }
    }
    for (int64_t o = 0; o < d; ++o) bias[first + o] = static_cast<float>(total[o]);
    return absl::OkStatus();
  }

  // The mixer named `prefix`...: q, k, v, beta, out.
  absl::Status Mixer(const std::string& prefix, LayerWeights* layer) {
    const int64_t d = config_.d_model;
    const int64_t heads = config_.num_heads;
    const int64_t qkv = 3 * d;
    Linear& composed = layer->qkv;
    composed.inputs = kConvTaps * d;
    composed.outputs = qkv + heads;
    const Place place = Take(composed.outputs * composed.inputs, dtype_);
    const FloatPlace bias = TakeFloats(composed.outputs);
    const FloatPlace tap_bias = TakeFloats(kConvTaps * qkv);
    composed.matrix = place.device;
    composed.bias = bias.device;
    layer->tap_bias = tap_bias.device;
    if (!counting()) {
      std::vector<float> matrix(composed.outputs * composed.inputs);
      int64_t first = 0;
      for (const char* name : {"q", "k", "v"}) {
        RETURN_IF_ERROR(Compose(absl::StrCat(prefix, name, "_linear"), absl::StrCat(prefix, name, "_conv"),
                                first, matrix.data(), bias.host, tap_bias.host, qkv));
        first += d;
      }
      // beta sees the tap at the output's own position.
      ASSIGN_OR_RETURN(const std::vector<double> beta,
                       Read(absl::StrCat(prefix, "beta_linear.weight")));  // [H, d]
      ASSIGN_OR_RETURN(const std::vector<double> beta_bias,
                       Read(absl::StrCat(prefix, "beta_linear.bias")));  // [H]
      const int64_t centre = kConvTaps - 1 - config_.lookahead_per_layer();
      for (int64_t h = 0; h < heads; ++h) {
        for (int64_t i = 0; i < d; ++i) {
          matrix[(qkv + h) * composed.inputs + centre * d + i] = static_cast<float>(beta[h * d + i]);
        }
        bias.host[qkv + h] = static_cast<float>(beta_bias[h]);
      }
      ConvertElements(matrix.data(), DType::kFloat32, place.host, dtype_, matrix.size());
    }
    ASSIGN_OR_RETURN(layer->out_norm, Plain(absl::StrCat(prefix, "rms_norm.scale")));
    ASSIGN_OR_RETURN(layer->out, Stacked({absl::StrCat(prefix, "output_linear.weight")},
                                            absl::StrCat(prefix, "output_linear.bias")));
    return absl::OkStatus();
  }

  absl::StatusOr<Weights> Fill() {
    Weights weights;
    weights.config = config_;
    weights.dtype = dtype_;
    weights.heads = config_.num_heads;
    weights.key_dim = weights.value_dim = config_.d_model / config_.num_heads;
    weights.layers.resize(config_.num_layers);
    for (const TensorSpec& tensor : ExpectedTensors(config_)) weights.parameters += NumElements(tensor.shape);
    switch (config_.family) {
      case Family::kTransformerDeltaNet: {
        for (int64_t l = 0; l < config_.num_layers; ++l) {
          RETURN_IF_ERROR(Mixer(absl::StrCat("layers.", l, "."), &weights.layers[l]));
        }
        ASSIGN_OR_RETURN(weights.final_norm, Plain("final_rms_norm.scale"));
        break;
      }
      case Family::kTransformerBlock: {
        LayerWeights& layer = weights.layers[0];
        RETURN_IF_ERROR(Mixer("deltanet.", &layer));
        ASSIGN_OR_RETURN(layer.post_norm, Plain("norm1.scale"));
        layer.has_ff = true;
        layer.gate = GateKind::kSigmoidSecond;
        ASSIGN_OR_RETURN(layer.ff_in, Stacked({"ffn.0.weight"}, "ffn.0.bias"));
        ASSIGN_OR_RETURN(layer.ff_out, Stacked({"ffn.2.weight"}, "ffn.2.bias"));
        ASSIGN_OR_RETURN(layer.post_ff_norm, Plain("norm2.scale"));
        break;
      }
      case Family::kDeltaNetModel: {
        weights.activation = QkvActivation::kSilu;
        ASSIGN_OR_RETURN(const Linear embedding, Stacked({"embedding.weight"}));
        weights.embedding = embedding.matrix;
        for (int64_t l = 0; l < config_.num_layers; ++l) {
          const std::string prefix = absl::StrCat("layers.", l, ".");
          LayerWeights& layer = weights.layers[l];
          ASSIGN_OR_RETURN(layer.pre_norm, Plain(absl::StrCat(prefix, "norm1.scale")));
          RETURN_IF_ERROR(Mixer(absl::StrCat(prefix, "delta_net."), &layer));
          layer.has_ff = true;
          layer.gate = GateKind::kSiluFirst;
          ASSIGN_OR_RETURN(layer.ff_norm, Plain(absl::StrCat(prefix, "norm2.scale")));
          ASSIGN_OR_RETURN(layer.ff_in, Stacked({absl::StrCat(prefix, "mlp.w1.weight"),
                                                    absl::StrCat(prefix, "mlp.w2.weight")}));
          ASSIGN_OR_RETURN(layer.ff_out, Stacked({absl::StrCat(prefix, "mlp.w3.weight")}));
        }
        ASSIGN_OR_RETURN(weights.final_norm, Plain("norm_f.scale"));
        ASSIGN_OR_RETURN(weights.head, Stacked({"head.weight"}));
        break;
      }
    }
    return weights;
  }

  const ModelConfig& config_;
  const Checkpoint& file_;
  const DType dtype_;
  DeviceBuffer arena_;
  char* host_ = nullptr;
  int64_t used_ = 0;  // Bytes.
};

}  // namespace

absl::StatusOr<Weights> LoadWeights(const ModelConfig& config, const Checkpoint& file, const Device& device,
                                    DType dtype) {
  return Loader(config, file, dtype).Load(device);
}

}  // namespace deltanet
