// What the tests of the operators on a GPU share.
#ifndef DELTANET_TESTS_MODEL_OPS_CUDA_TEST_UTIL_H_
#define DELTANET_TESTS_MODEL_OPS_CUDA_TEST_UTIL_H_

#include <cstdint>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "model/device.h"
#include "model/ops/delta_rule.h"
#include "model/ops/delta_rule_plan.h"
#include "model/ops/rows.h"
#include "tests/model/ops/op_test_util.h"

namespace deltanet {

inline constexpr Device kDevice{DeviceType::kCuda, 0};

// The device's side of a test: memory that mirrors the host's, and the stream on which operators run.
class Mirror {
 public:
  // Arrays start at a multiple of 64 bytes if `aligned`, else anywhere that an element may.
  explicit Mirror(bool aligned = false) : aligned_(aligned), stream_(kDevice) {}
  ~Mirror() { stream_.Synchronize(); }

  // A copy of `host`, to be read.
  template <typename T>
  const T* Copy(const std::vector<T>& host) {
    return reinterpret_cast<const T*>(
        Upload(host.data(), static_cast<int64_t>(host.size() * sizeof(T)), 0, sizeof(T)));
  }
  // The same, held in `dtype`.
  const char* Copy(const std::vector<float>& host, DType dtype) {
    const std::vector<char> raw = Raw(host, dtype);
    return Upload(raw.data(), static_cast<int64_t>(raw.size()), 0, DTypeBytes(dtype));
  }

  // Memory that holds `host` (guards and all) in `dtype`, and goes back there in Finish.
  char* Map(Guarded* host, DType dtype) {
    const std::vector<char> raw = Raw(host->with_guards(), dtype);
    const int64_t bytes = static_cast<int64_t>(raw.size()), guard = Guarded::kGuard * DTypeBytes(dtype);
    char* const data = Upload(raw.data(), bytes, guard, DTypeBytes(dtype));
    mapped_.push_back({host, dtype, data - guard, bytes});
    return data;
  }
  float* Map(Guarded* host) { return reinterpret_cast<float*>(Map(host, DType::kFloat32)); }

  int32_t* Map(std::vector<int32_t>* host) {
    int32_t* const data = const_cast<int32_t*>(Copy(*host));
    flags_.push_back({host, data});
    return data;
  }

  RaggedRows Rows(const Ragged& ragged) {
    RaggedRows rows = ragged.rows();
    std::vector<int32_t> token_row;
    for (int32_t r = 0; r < rows.rows; ++r) token_row.resize(ragged.offsets[r + 1], r);
    rows.offsets = Copy(ragged.offsets);
    rows.token_row = Copy(token_row);
    rows.base_slot = Copy(ragged.base_slot);
    rows.work_slot = Copy(ragged.work_slot);
    rows.fresh = Copy(ragged.fresh);
    rows.position = Copy(ragged.position);
    rows.end = Copy(ragged.end);
    return rows;
  }

  // The same with a plan for the chunk kernel, where the device has one for these sizes.
  RaggedRows Rows(const Ragged& ragged, DType dtype, int64_t heads, int64_t key_dim, int64_t value_dim) {
    RaggedRows rows = Rows(ragged);
    const int64_t blocks = DeltaRuleChunkBlocks(kDevice, dtype, key_dim, value_dim);
    if (blocks == 0) return rows;
    std::vector<int32_t> plan(MaxChunkPlanSize(rows.rows, heads, value_dim, blocks));
    rows.chunks = PlanChunks(ragged.offsets, heads, value_dim, blocks, /*splits=*/true, plan.data());
    rows.chunks.numbers = Copy(plan);
    return rows;
  }

  OpContext context() const {
    return {.device = kDevice, .parallel_for = RunSerially, .stream = stream_.handle()};
  }

  // Waits for the operators and brings back what is mapped.
  void Finish() {
    for (const Mapped& mapped : mapped_) {
      std::vector<char> raw(mapped.bytes);
      stream_.Copy(raw.data(), mapped.data, mapped.bytes);
      stream_.Synchronize();
      std::vector<float>& host = mapped.host->with_guards();
      ConvertElements(raw.data(), mapped.dtype, host.data(), DType::kFloat32,
                      static_cast<int64_t>(host.size()));
    }
    for (const auto& [host, data] : flags_) {
      stream_.Copy(host->data(), data, static_cast<int64_t>(host->size() * sizeof(int32_t)));
    }
    stream_.Synchronize();
  }

 private:
  struct Mapped {
    Guarded* host;
    DType dtype;
    const char* data;
    int64_t bytes;
  };
  struct Flags {
    std::vector<int32_t>* host;
    const int32_t* data;
  };

  static std::vector<char> Raw(const std::vector<float>& values, DType dtype) {
    std::vector<char> raw(values.size() * DTypeBytes(dtype));
    ConvertElements(values.data(), DType::kFloat32, raw.data(), dtype, static_cast<int64_t>(values.size()));
    return raw;
  }

  // Copies `bytes` bytes; returns where byte `first` of them is, which is aligned as the mirror is.
  char* Upload(const void* data, int64_t bytes, int64_t first, int64_t element) {
    int64_t pad = (64 - first % 64) % 64;
    if (!aligned_) pad += element;
    buffers_.emplace_back(kDevice, pad + bytes + 64);
    char* const at = buffers_.back().data() + pad;
    stream_.Copy(at, data, bytes);
    return at + first;
  }

  const bool aligned_;
  std::vector<DeviceBuffer> buffers_;
  DeviceStream stream_;
  std::vector<Mapped> mapped_;
  std::vector<Flags> flags_;
};

class CudaTest : public testing::TestWithParam<DType> {
 protected:
  void SetUp() override {
    if (const absl::Status there = CheckDevice(kDevice); !there.ok()) GTEST_SKIP() << there.message();
  }
  DType dtype() const { return GetParam(); }
};

inline auto BothDTypes() { return testing::Values(DType::kFloat32, DType::kBFloat16); }
inline std::string DTypeParamName(const testing::TestParamInfo<DType>& info) {
  return std::string(DTypeName(info.param));
}

}  // namespace deltanet

#endif  // DELTANET_TESTS_MODEL_OPS_CUDA_TEST_UTIL_H_
