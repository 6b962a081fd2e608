#include "model/weights.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <type_traits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "model/base/check.h"
#include "model/base/mutex.h"
#include "model/base/round_up.h"
#include "model/base/status_macros.h"
#include "model/ops/gemm.h"
#include "model/torch_parallel.h"
#include "model/upload.h"

namespace deltanet {
namespace {

constexpr int64_t kByteAlignment = 256;  // Of a weight: what cuBLAS looks at.

constexpr char kEmbeddings[] = "model.embeddings.weight";
constexpr char kLmHead[] = "lm_head.weight";

static_assert(ModelConfig::kMaxConvSize <= kMaxShortConvTaps, "what config.json may ask for can be run");

QkActivation QkActivationOf(absl::string_view name) {
  if (name == "relu") return QkActivation::kRelu;
  if (name == "elu") return QkActivation::kEluPlusOne;
  if (name == "identity") return QkActivation::kIdentity;
  DELTANET_CHECK(name == "silu", "ParseModelConfig lets no other pass");
  return QkActivation::kSilu;
}

// Elements that a thread reads and converts at a time.
constexpr int64_t kReadElements = int64_t{1} << 16;

// Elements [first, first + count) of a tensor, converted to `dtype`, by several threads: each reads a part.
absl::Status ReadConverted(const Checkpoint& file, const SafetensorsEntry& entry, int64_t first,
                           int64_t count, DType dtype, char* to) {
  const int64_t from_bytes = DTypeBytes(entry.dtype), to_bytes = DTypeBytes(dtype);
  Mutex mu;
  absl::Status status;
  TorchParallelFor(count, kReadElements, [&](int64_t begin, int64_t end) {
    std::vector<char> raw(entry.dtype == dtype ? 0 : std::min(end - begin, kReadElements) * from_bytes);
    for (int64_t at = begin; at < end; at += kReadElements) {
      const int64_t elements = std::min(end - at, kReadElements);
      char* const target = to + at * to_bytes;
      const absl::Status read = file.ReadRange(entry, (first + at) * from_bytes, elements * from_bytes,
                                               raw.empty() ? target : raw.data());
      if (!read.ok()) {
        const MutexLock lock(&mu);
        status.Update(read);
        return;
      }
      if (!raw.empty()) ConvertElements(raw.data(), entry.dtype, target, dtype, elements);
    }
  });
  return status;
}

// Writes one tensor after another of the file into the arena of `weights`. The first pass only counts, so
// that the arena is allocated once, with its exact size.
class Loader {
 public:
  Loader(const ModelConfig& config, const Checkpoint& file, const Device& device, DType dtype,
         LoadObserver observer)
      : config_(config), file_(file), device_(device), dtype_(dtype), observer_(observer) {}

  absl::StatusOr<Weights> Load() {
    for (const TensorSpec& tensor : ExpectedTensors(config_)) {
      ASSIGN_OR_RETURN(const SafetensorsEntry* entry, file_.Find(tensor.name));
      total_bytes_ += entry->bytes;
    }
    ASSIGN_OR_RETURN(Weights sized, Fill());
    arena_ = DeviceBuffer(device_, used_);
    used_ = 0;
    Uploader uploader(device_);
    uploader_ = &uploader;
    ASSIGN_OR_RETURN(Weights weights, Fill());
    uploader.Finish();
    weights.arena = std::move(arena_);
    return weights;
  }

 private:
  bool counting() const { return uploader_ == nullptr; }

  // Room for a weight, on the device; null while counting.
  char* Take(int64_t elements, DType dtype) {
    const int64_t begin = used_;
    used_ += RoundUp(elements * DTypeBytes(dtype), kByteAlignment);
    return counting() ? nullptr : arena_.data() + begin;
  }

  // Puts `values` at `to`, of `dtype`.
  absl::Status Put(const std::vector<float>& values, DType dtype, char* to) {
    const int64_t element = DTypeBytes(dtype);
    return uploader_->Write(
        to, static_cast<int64_t>(values.size()) * element, [&](int64_t offset, int64_t bytes, char* piece) {
          ConvertElements(values.data() + offset / element, DType::kFloat32, piece, dtype, bytes / element);
          return absl::OkStatus();
        });
  }
  // A place for `values`, and they in it; `count` of them, as there are none while counting.
  absl::StatusOr<const float*> PutFloats(int64_t count, const std::vector<float>& values) {
    char* const to = Take(count, DType::kFloat32);
    if (counting()) return nullptr;
    DELTANET_CHECK(static_cast<int64_t>(values.size()) == count, "as many as there is room for");
    RETURN_IF_ERROR(Put(values, DType::kFloat32, to));
    return reinterpret_cast<const float*>(to);
  }

  // Puts a tensor of the file at `to`, of `dtype`.
  absl::Status PutTensor(const SafetensorsEntry& entry, DType dtype, char* to) {
    const int64_t element = DTypeBytes(dtype);
    return uploader_->Write(
        to, NumElements(entry.shape) * element, [&](int64_t offset, int64_t bytes, char* piece) {
          RETURN_IF_ERROR(ReadConverted(file_, entry, offset / element, bytes / element, dtype, piece));
          Count(bytes / element * DTypeBytes(entry.dtype));
          return absl::OkStatus();
        });
  }

  // Tells that `bytes` more of the file have been read.
  void Count(int64_t bytes) {
    read_bytes_ += bytes;
    observer_(read_bytes_, total_bytes_);
  }

  // For what is computed with before it is put anywhere.
  template <typename T>
  absl::StatusOr<std::vector<T>> Read(const std::string& name) {
    constexpr DType kDType = std::is_same_v<T, double> ? DType::kFloat64 : DType::kFloat32;
    ASSIGN_OR_RETURN(const SafetensorsEntry* entry, file_.Find(name));
    std::vector<T> values(NumElements(entry->shape));
    RETURN_IF_ERROR(ReadConverted(file_, *entry, 0, static_cast<int64_t>(values.size()), kDType,
                                  reinterpret_cast<char*>(values.data())));
    Count(entry->bytes);
    return values;
  }

  // A tensor as it is.
  absl::StatusOr<const float*> Plain(const std::string& name) {
    ASSIGN_OR_RETURN(const SafetensorsEntry* entry, file_.Find(name));
    char* const to = Take(NumElements(entry->shape), DType::kFloat32);
    if (counting()) return nullptr;
    RETURN_IF_ERROR(PutTensor(*entry, DType::kFloat32, to));
    return reinterpret_cast<const float*>(to);
  }

  // Linear layers with the same input, one below the other: one product for all. Outputs that nobody wants,
  // zeros, may make up a multiple of `multiple_of`.
  absl::StatusOr<Linear> Stacked(const std::vector<std::string>& names, const std::string& bias_name = "",
                                 int64_t multiple_of = 1) {
    Linear linear;
    std::vector<const SafetensorsEntry*> entries;
    for (const std::string& name : names) {
      ASSIGN_OR_RETURN(entries.emplace_back(), file_.Find(name));
      linear.inputs = entries.back()->shape[1];
      linear.outputs += entries.back()->shape[0];
    }
    const int64_t padding = RoundUp(linear.outputs, multiple_of) - linear.outputs;
    linear.outputs += padding;
    char* to = Take(linear.outputs * linear.inputs, dtype_);
    linear.matrix = to;
    if (!bias_name.empty()) {
      ASSIGN_OR_RETURN(linear.bias, Plain(bias_name));
    }
    if (counting()) return linear;
    for (const SafetensorsEntry* entry : entries) {
      RETURN_IF_ERROR(PutTensor(*entry, dtype_, to));
      to += NumElements(entry->shape) * DTypeBytes(dtype_);
    }
    if (padding > 0) RETURN_IF_ERROR(Put(std::vector<float>(padding * linear.inputs), dtype_, to));
    return linear;
  }

  // Tap j of conv3(linear(x)) is W_j (A x + a): W_j A goes into rows `first`... and the columns of tap j, W_j
  // a into tap_bias.
  absl::Status Compose(const std::string& linear_name, const std::string& conv_name, int64_t first,
                       float* matrix, float* bias, float* tap_bias, int64_t tap_bias_stride) {
    const int64_t d = config_.d_model;
    ASSIGN_OR_RETURN(const std::vector<double> linear,
                     Read<double>(absl::StrCat(linear_name, ".weight")));  // [d, d]
    ASSIGN_OR_RETURN(const std::vector<double> linear_bias,
                     Read<double>(absl::StrCat(linear_name, ".bias")));  // [d]
    ASSIGN_OR_RETURN(const std::vector<double> conv,
                     Read<double>(absl::StrCat(conv_name, ".weight")));  // [d, d, 3]
    ASSIGN_OR_RETURN(const std::vector<double> conv_bias,
                     Read<double>(absl::StrCat(conv_name, ".bias")));  // [d]
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
    char* const to = Take(composed.outputs * composed.inputs, dtype_);
    composed.matrix = to;
    std::vector<float> bias, tap_bias;
    if (!counting()) {
      std::vector<float> matrix(composed.outputs * composed.inputs);
      bias.resize(composed.outputs);
      tap_bias.resize(kConvTaps * qkv);
      int64_t first = 0;
      for (const char* name : {"q", "k", "v"}) {
        RETURN_IF_ERROR(Compose(absl::StrCat(prefix, name, "_linear"), absl::StrCat(prefix, name, "_conv"),
                                first, matrix.data(), bias.data(), tap_bias.data(), qkv));
        first += d;
      }
      // beta sees the tap at the output's own position.
      ASSIGN_OR_RETURN(const std::vector<float> beta,
                       Read<float>(absl::StrCat(prefix, "beta_linear.weight")));  // [H, d]
      ASSIGN_OR_RETURN(const std::vector<float> beta_bias,
                       Read<float>(absl::StrCat(prefix, "beta_linear.bias")));  // [H]
      const int64_t centre = kConvTaps - 1 - config_.lookahead_per_layer();
      for (int64_t h = 0; h < heads; ++h) {
        for (int64_t i = 0; i < d; ++i) {
          matrix[(qkv + h) * composed.inputs + centre * d + i] = beta[h * d + i];
        }
        bias[qkv + h] = beta_bias[h];
      }
      RETURN_IF_ERROR(Put(matrix, dtype_, to));
    }
    ASSIGN_OR_RETURN(composed.bias, PutFloats(composed.outputs, bias));
    ASSIGN_OR_RETURN(layer->tap_bias, PutFloats(kConvTaps * qkv, tap_bias));
    ASSIGN_OR_RETURN(layer->out_norm, Plain(absl::StrCat(prefix, "rms_norm.scale")));
    ASSIGN_OR_RETURN(layer->out, Stacked({absl::StrCat(prefix, "output_linear.weight")},
                                         absl::StrCat(prefix, "output_linear.bias")));
    return absl::OkStatus();
  }

  // What q, k and v have each of a depthwise convolution, [channels, 1, taps] or [channels], as one [taps,
  // 2HK
  // + HV].
  absl::StatusOr<const float*> Channels(const std::string& prefix, absl::string_view suffix, int64_t taps) {
    const int64_t channels = 2 * config_.key_width() + config_.value_width();
    std::vector<float> all;
    if (!counting()) {
      all.resize(taps * channels);
      int64_t first = 0;
      for (const char* name : {"q", "k", "v"}) {
        ASSIGN_OR_RETURN(const std::vector<float> part, Read<float>(absl::StrCat(prefix, name, suffix)));
        const int64_t width = static_cast<int64_t>(part.size()) / taps;
        for (int64_t c = 0; c < width; ++c) {
          for (int64_t j = 0; j < taps; ++j) all[j * channels + first + c] = part[c * taps + j];
        }
        first += width;
      }
    }
    return PutFloats(taps * channels, all);
  }

  // A layer of delta_net.
  absl::Status DeltaNetLayer(const std::string& prefix, LayerWeights* layer) {
    const std::string attn = absl::StrCat(prefix, "attn."), mlp = absl::StrCat(prefix, "mlp.");
    ASSIGN_OR_RETURN(layer->pre_norm, Plain(absl::StrCat(prefix, "attn_norm.weight")));
    std::vector<std::string> front;
    for (const char* name : {"q", "k", "v", "b", "g"}) {
      if ((*name == 'b' && !config_.use_beta) || (*name == 'g' && !config_.use_gate)) continue;
      front.push_back(absl::StrCat(attn, name, "_proj.weight"));
    }
    // For the kernels of ops/gemm_lt_cuda.cu, which want such a multiple; at most 2 % more.
    const bool pads = dtype_ == DType::kBFloat16 && 2 * config_.key_width() + config_.value_width() >= 3072;
    ASSIGN_OR_RETURN(layer->qkv, Stacked(front, "", pads ? 64 : 1));
    if (config_.use_short_conv) {
      ASSIGN_OR_RETURN(layer->conv_weight, Channels(attn, "_conv1d.weight", config_.conv_size));
      if (config_.conv_bias) {
        ASSIGN_OR_RETURN(layer->conv_bias, Channels(attn, "_conv1d.bias", 1));
      }
    }
    ASSIGN_OR_RETURN(layer->out_norm, Plain(absl::StrCat(attn, "o_norm.weight")));
    ASSIGN_OR_RETURN(layer->out, Stacked({absl::StrCat(attn, "o_proj.weight")}));
    layer->has_ff = true;
    layer->gate = GateKind::kSiluFirst;
    ASSIGN_OR_RETURN(layer->ff_norm, Plain(absl::StrCat(prefix, "mlp_norm.weight")));
    std::vector<std::string> gate_up = {absl::StrCat(mlp, "gate_proj.weight")};
    if (!config_.fused_gate_up) gate_up.push_back(absl::StrCat(mlp, "up_proj.weight"));
    ASSIGN_OR_RETURN(layer->ff_in, Stacked(gate_up));
    ASSIGN_OR_RETURN(layer->ff_out, Stacked({absl::StrCat(mlp, "down_proj.weight")}));
    return absl::OkStatus();
  }

  // INVALID_ARGUMENT if a tied head that is in the file all the same is not the embedding.
  absl::Status CheckTiedHead() {
    ASSIGN_OR_RETURN(const SafetensorsEntry* head, file_.Find(kLmHead));
    ASSIGN_OR_RETURN(const SafetensorsEntry* embedding, file_.Find(kEmbeddings));
    bool same = head->dtype == embedding->dtype;
    std::vector<char> a(std::min(head->bytes, Uploader::kPieceBytes)), b(a.size());
    for (int64_t at = 0; same && at < head->bytes; at += static_cast<int64_t>(a.size())) {
      const int64_t bytes = std::min(head->bytes - at, static_cast<int64_t>(a.size()));
      RETURN_IF_ERROR(file_.ReadRange(*head, at, bytes, a.data()));
      RETURN_IF_ERROR(file_.ReadRange(*embedding, at, bytes, b.data()));
      same = std::memcmp(a.data(), b.data(), bytes) == 0;
      Count(bytes);
    }
    if (same) return absl::OkStatus();
    return absl::InvalidArgumentError(absl::StrCat(file_.path(),
                                                   ": 'tie_word_embeddings' is true, but tensor ", kLmHead,
                                                   " differs from ", kEmbeddings, ", want the same or none"));
  }

  // What delta_net has the same in every layer.
  void DescribeDeltaNet(Weights* weights) const {
    weights->mixer = MixerKind::kShortConv;
    weights->key_dim = config_.key_width() / config_.num_heads;
    weights->value_dim = config_.value_width() / config_.num_heads;
    weights->scale = static_cast<float>(1 / std::sqrt(static_cast<double>(weights->key_dim)));
    weights->epsilon = {.after = 0.0f, .inside = static_cast<float>(config_.norm_eps)};
    weights->conv_taps = config_.use_short_conv ? config_.conv_size : 0;
    weights->qk_activation = QkActivationOf(config_.qk_activation);
    weights->qk_norm = config_.qk_norm == "sum" ? QkNorm::kSum : QkNorm::kL2;
    weights->has_beta = config_.use_beta;
    weights->beta_scale = config_.allow_neg_eigval ? 2.0f : 1.0f;
    weights->has_output_gate = config_.use_gate;
    weights->norm_per_head = true;
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
      case Family::kDeltaNet: {
        DescribeDeltaNet(&weights);
        ASSIGN_OR_RETURN(const Linear embedding, Stacked({kEmbeddings}));
        weights.embedding = embedding.matrix;
        for (int64_t l = 0; l < config_.num_layers; ++l) {
          RETURN_IF_ERROR(DeltaNetLayer(absl::StrCat("model.layers.", l, "."), &weights.layers[l]));
        }
        ASSIGN_OR_RETURN(weights.final_norm, Plain("model.norm.weight"));
        if (!config_.tie_word_embeddings) {
          ASSIGN_OR_RETURN(weights.head, Stacked({kLmHead}));
          break;
        }
        weights.head = embedding;
        if (config_.lm_head_beside_tied) {
          weights.parameters -= embedding.inputs * embedding.outputs;
          if (!counting()) RETURN_IF_ERROR(CheckTiedHead());
        }
        break;
      }
    }
    return weights;
  }

  const ModelConfig& config_;
  const Checkpoint& file_;
  const Device device_;
  const DType dtype_;
  const LoadObserver observer_;
  int64_t total_bytes_ = 0;  // Of the file, to be read.
  int64_t read_bytes_ = 0;
  DeviceBuffer arena_;
  int64_t used_ = 0;              // Bytes of the arena.
  Uploader* uploader_ = nullptr;  // While counting, none.
};

}  // namespace

absl::StatusOr<Weights> LoadWeights(const ModelConfig& config, const Checkpoint& file, const Device& device,
                                    DType dtype, LoadObserver observer) {
  return Loader(config, file, device, dtype, observer).Load();
}

}  // namespace deltanet
