// Every family in float64, written as its author's equations read: linear layers, convolutions, norms, then
// the delta rule token by token. Nothing is composed, batched or cut; what the engine is measured against.
#ifndef DELTANET_TESTS_MODEL_REFERENCE_MODEL_H_
#define DELTANET_TESTS_MODEL_REFERENCE_MODEL_H_

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "model/base/config.h"

namespace deltanet {

class ReferenceModel {
 public:
  // kBFloat16: weights and the result of every operation are rounded, as plain PyTorch code in bfloat16 does;
  // how far that is from float64 is the measure for a bfloat16 engine.
  enum class Rounding { kNone, kBFloat16 };

  // Reads DIRECTORY's config.json and model.safetensors; ends the process if they cannot be read.
  explicit ReferenceModel(const std::string& directory, Rounding rounding = Rounding::kNone);

  const ModelConfig& config() const { return config_; }

  // One whole sequence: values [T, d] (or ids [T] as doubles in models over tokens) to [T, output width].
  std::vector<double> Forward(const std::vector<double>& input) const;

 private:
  using Matrix = std::vector<double>;  // [T, width], row-major.

  // Rounds `x` if the model rounds.
  Matrix Round(Matrix x) const;
  const Matrix& Tensor(const std::string& name) const;
  Matrix Linear(const Matrix& x, int64_t inputs, const std::string& weight, const std::string& bias) const;
  Matrix Conv(const Matrix& x, const std::string& name) const;
  Matrix Norm(const Matrix& x, const std::string& scale) const;
  Matrix Mixer(const Matrix& x, const std::string& prefix) const;
  // delta_net's.
  Matrix ShortConv(const Matrix& x, const std::string& name, int64_t channels) const;
  Matrix QkNormed(Matrix x, int64_t width) const;
  Matrix DeltaNetMixer(const Matrix& x, const std::string& prefix) const;
  // S of each head run over q, k [T, H*K], v [T, H*V] and beta [T, H], all as they enter the rule: [T, H*V].
  Matrix DeltaRule(const Matrix& q, const Matrix& k, const Matrix& v, const Matrix& beta, double scale) const;
  // The rows of `table` that `ids` name.
  Matrix Embedded(const Matrix& ids, const std::string& table) const;

  const Rounding rounding_;
  ModelConfig config_;
  std::map<std::string, Matrix> tensors_;
};

}  // namespace deltanet

#endif  // DELTANET_TESTS_MODEL_REFERENCE_MODEL_H_
