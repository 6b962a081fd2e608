#include "tests/testing/random_model.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <fstream>
#include <random>
#include <utility>
#include <vector>

#include "model/base/check.h"
#include "model/base/safetensors.h"

namespace deltanet {

std::string WriteRandomModel(const ModelConfig& config, uint64_t seed, DType dtype, double gain) {
  std::string directory = testing::TempDir() + "/model-XXXXXX";
  DELTANET_CHECK(mkdtemp(directory.data()) != nullptr, "no temporary directory");
  std::ofstream(directory + "/config.json") << ModelConfigJson(config);

  std::mt19937_64 random(seed);
  std::vector<std::pair<std::string, std::vector<char>>> bytes;
  std::vector<std::pair<std::string, TensorView>> tensors;
  for (const TensorSpec& spec : ExpectedTensors(config)) {
    const int64_t count = NumElements(spec.shape);
    const bool is_scale = spec.name.ends_with("scale") || spec.name.ends_with("norm.weight");
    const double fan_in = spec.shape.size() > 1 ? static_cast<double>(count) / spec.shape[0] : 16;
    const double bound = is_scale ? 0.2 : gain / std::sqrt(fan_in);
    std::uniform_real_distribution<float> uniform(-bound, bound);
    std::vector<float> values(count);
    for (float& value : values) value = uniform(random) + (is_scale ? 1.0f : 0.0f);
    std::vector<char> raw(count * DTypeBytes(dtype));
    ConvertElements(values.data(), DType::kFloat32, raw.data(), dtype, count);
    bytes.emplace_back(spec.name, std::move(raw));
    tensors.emplace_back(spec.name, TensorView{bytes.back().second.data(), spec.shape, dtype, Device{}});
  }
  DELTANET_CHECK(WriteSafetensors(directory + "/model.safetensors", tensors).ok(), "model.safetensors");
  return directory;
}

}  // namespace deltanet
