// What the operators' tests share: every instruction set, threads, memory that shows what was not or wrongly
// written.
#ifndef DELTANET_TESTS_MODEL_OPS_OP_TEST_UTIL_H_
#define DELTANET_TESTS_MODEL_OPS_OP_TEST_UTIL_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "gtest/gtest.h"
#include "model/base/tensor_view.h"
#include "model/ops/cpu/dispatch.h"
#include "model/ops/rows.h"
#include "tests/testing/max_error.h"
#include "tests/testing/same_bits.h"

namespace deltanet {

inline constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
inline constexpr double kEpsilon = std::numeric_limits<float>::epsilon();

inline void RunSerially(int64_t n, int64_t, absl::FunctionRef<void(int64_t, int64_t)> body) {
  if (n > 0) body(0, n);
}

// Cuts into up to seven ranges, each on a thread, whatever the grain: every boundary is a place to go wrong.
inline void RunInShreds(int64_t n, int64_t, absl::FunctionRef<void(int64_t, int64_t)> body) {
  const int64_t ranges = std::min<int64_t>(n, 7);
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < ranges; ++i) {
    threads.emplace_back([=] { body(n * i / ranges, n * (i + 1) / ranges); });
  }
  for (std::thread& thread : threads) thread.join();
}

inline OpContext SerialContext() { return OpContext{.device = {}, .parallel_for = RunSerially}; }
inline OpContext ThreadedContext() { return OpContext{.device = {}, .parallel_for = RunInShreds}; }
inline OpContext CudaContext() {
  return OpContext{.device = {.type = DeviceType::kCuda, .index = 0}, .parallel_for = RunSerially};
}

inline std::string IsaName(CpuIsa isa) {
  switch (isa) {
    case CpuIsa::kGeneric:
      return "generic";
    case CpuIsa::kAvx2:
      return "avx2";
    case CpuIsa::kAvx512:
      return "avx512";
  }
  return "unknown";
}

inline auto EveryIsa() { return testing::Values(CpuIsa::kGeneric, CpuIsa::kAvx2, CpuIsa::kAvx512); }

// Runs a test with one build of the kernels.
class IsaScope {
 public:
  explicit IsaScope(CpuIsa isa) : kernels_(CpuKernelsFor(isa)) { SetCpuKernelsForTesting(kernels_); }
  ~IsaScope() { SetCpuKernelsForTesting(nullptr); }
  bool supported() const { return kernels_ != nullptr; }

 private:
  const CpuKernels* const kernels_;
};

class IsaTest : public testing::TestWithParam<CpuIsa> {
 protected:
  void SetUp() override {
    if (!isa_.supported()) GTEST_SKIP() << "this machine has no " << IsaName(GetParam());
  }

 private:
  const IsaScope isa_{GetParam()};
};

// Floats with a guard band on either side, all NaN at first. Starts off every alignment but a float's. What
// it holds in the bands survives a conversion to bfloat16 and back.
class Guarded {
 public:
  explicit Guarded(int64_t size) : size_(size), floats_(size + 2 * kGuard, kNaN) {
    for (int64_t i = 0; i < kGuard; ++i) floats_[i] = floats_[kGuard + size + i] = kSentinel;
  }
  static constexpr int64_t kGuard = 67;  // Floats in a band.

  float* data() { return floats_.data() + kGuard; }
  int64_t size() const { return size_; }
  std::vector<float>& with_guards() { return floats_; }
  float& operator[](int64_t i) { return data()[i]; }
  std::vector<float> Values() const { return {floats_.begin() + kGuard, floats_.begin() + kGuard + size_}; }
  bool GuardsIntact() const {
    const auto intact = [](float x) { return x == kSentinel; };
    return std::all_of(floats_.begin(), floats_.begin() + kGuard, intact) &&
           std::all_of(floats_.begin() + kGuard + size_, floats_.end(), intact);
  }

 private:
  static constexpr float kSentinel = 12352.0f;
  int64_t size_;
  std::vector<float> floats_;
};

inline std::vector<float> RandomNormal(int64_t count, uint32_t seed, float deviation = 1.0f) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal(0.0f, deviation);
  std::vector<float> values(count);
  for (float& value : values) value = normal(generator);
  return values;
}

// `values` as `dtype` holds them.
inline std::vector<float> Rounded(const std::vector<float>& values, DType dtype) {
  const int64_t count = static_cast<int64_t>(values.size());
  std::vector<char> raw(count * DTypeBytes(dtype));
  std::vector<float> rounded(count);
  ConvertElements(values.data(), DType::kFloat32, raw.data(), dtype, count);
  ConvertElements(raw.data(), dtype, rounded.data(), DType::kFloat32, count);
  return rounded;
}

// The bound that the fast operators are held to: against float64, at most twice the error of plain float32
// code, plus one rounding of the largest value; where the result is of a coarser `dtype`, plus each element's
// own rounding to it.
inline void ExpectAsGoodAsPlain(const float* fast, const float* plain, const double* exact, int64_t count,
                                const std::string& what, DType dtype = DType::kFloat32) {
  const double bound = 2 * MaxError(plain, exact, count) + kEpsilon * MaxMagnitude(exact, count);
  const double rounding = dtype == DType::kBFloat16 ? 1.0 / 256 : 0;
  double error = 0;
  for (int64_t i = 0; i < count; ++i) {
    const double beyond =
        std::fabs(static_cast<double>(fast[i]) - exact[i]) - rounding * (std::fabs(exact[i]) + bound);
    KeepLargest(beyond, &error);
  }
  EXPECT_FALSE(std::isnan(error)) << what << " has an unwritten element";
  EXPECT_LE(error, bound) << what;
}

// The arrays of a RaggedRows.
struct Ragged {
  std::vector<int32_t> offsets{0};
  std::vector<int32_t> base_slot, work_slot;
  std::vector<uint8_t> fresh;
  std::vector<int64_t> position, end;

  void Add(int64_t tokens, int32_t base, int32_t work, bool is_fresh = false, int64_t at = 0,
           int64_t length = std::numeric_limits<int64_t>::max()) {
    offsets.push_back(offsets.back() + static_cast<int32_t>(tokens));
    base_slot.push_back(base);
    work_slot.push_back(work);
    fresh.push_back(is_fresh);
    position.push_back(at);
    end.push_back(length);
  }
  RaggedRows rows() const {
    int64_t shortest = std::numeric_limits<int64_t>::max(), longest = 0;
    bool in_place = false;
    for (size_t r = 0; r + 1 < offsets.size(); ++r) {
      in_place = in_place || (fresh[r] == 0 && base_slot[r] == work_slot[r]);
      shortest = std::min<int64_t>(shortest, offsets[r + 1] - offsets[r]);
      longest = std::max<int64_t>(longest, offsets[r + 1] - offsets[r]);
    }
    return RaggedRows{.rows = static_cast<int64_t>(fresh.size()),
                      .tokens = offsets.back(),
                      .shortest = shortest,
                      .longest = longest,
                      .offsets = offsets.data(),
                      .base_slot = base_slot.data(),
                      .work_slot = work_slot.data(),
                      .fresh = fresh.data(),
                      .in_place = in_place,
                      .position = position.data(),
                      .end = end.data()};
  }
};

}  // namespace deltanet

#endif  // DELTANET_TESTS_MODEL_OPS_OP_TEST_UTIL_H_
