// Writes a model directory with random weights, for tests.
#ifndef DELTANET_TESTS_TESTING_RANDOM_MODEL_H_
#define DELTANET_TESTS_TESTING_RANDOM_MODEL_H_

#include <cstdint>
#include <string>

#include "model/base/config.h"

namespace deltanet {

// Uniform weights within gain/sqrt(fan-in), norm scales around 1, stored as `dtype`. Returns the directory, a
// new one under the test's temporary directory.
std::string WriteRandomModel(const ModelConfig& config, uint64_t seed, DType dtype = DType::kFloat32,
                             double gain = 1);

}  // namespace deltanet

#endif  // DELTANET_TESTS_TESTING_RANDOM_MODEL_H_
