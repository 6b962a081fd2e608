// Where and in what the engine's tests run it.
#ifndef DELTANET_TESTS_MODEL_ENGINE_MODES_H_
#define DELTANET_TESTS_MODEL_ENGINE_MODES_H_

#include <ostream>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "model/base/tensor_view.h"
#include "model/device.h"

namespace deltanet {

struct Mode {
  std::string name;
  Device device;
  DType dtype = DType::kFloat32;

  friend void PrintTo(const Mode& mode, std::ostream* out) { *out << mode.name; }
};

inline std::vector<Mode> Modes() {
  std::vector<Mode> modes = {{"cpu_float32", {DeviceType::kCpu, 0}, DType::kFloat32}};
#ifdef DELTANET_CUDA
  modes.push_back({"cuda_float32", {DeviceType::kCuda, 0}, DType::kFloat32});
  modes.push_back({"cuda_bfloat16", {DeviceType::kCuda, 0}, DType::kBFloat16});
#endif
  return modes;
}

#define SKIP_WITHOUT_DEVICE(mode)                                           \
  if (const absl::Status there = CheckDevice((mode).device); !there.ok()) { \
    GTEST_SKIP() << there.message();                                        \
  }                                                                         \
  static_assert(true)

}  // namespace deltanet

#endif  // DELTANET_TESTS_MODEL_ENGINE_MODES_H_
