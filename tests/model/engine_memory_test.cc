// What the engine holds on to: nothing, however many sessions come and go and whatever is refused.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <deque>
#include <exception>
#include <fstream>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "model/base/config.h"
#include "model/device.h"
#include "model/model.h"
#include "model/state_pool.h"
#include "tests/model/engine_modes.h"
#include "tests/testing/random_model.h"

#ifdef __SANITIZE_ADDRESS__
// What malloc refuses is to be refused, as without the sanitizer, not to end the process.
extern "C" const char* __asan_default_options() { return "allocator_may_return_null=1"; }
constexpr bool kAddressSanitizer = true;
#else
constexpr bool kAddressSanitizer = false;
#endif

namespace deltanet {
namespace {

constexpr int64_t kTokens = 3, kWidth = 16, kMaxStepTokens = 64;

int64_t ResidentBytes() {
  int64_t pages = 0, resident_pages = 0;
  std::ifstream("/proc/self/statm") >> pages >> resident_pages;
  return resident_pages * 4096;
}

class EngineMemoryTest : public testing::TestWithParam<Mode> {
 protected:
  void SetUp() override {
    SKIP_WITHOUT_DEVICE(GetParam());
    ModelConfig config;
    config.family = Family::kTransformerDeltaNet;
    config.d_model = kWidth;
    config.chunk_size = 4;
    config.num_layers = 2;
    config.conv_padding = ConvPadding::kCausal;
    directory_ = WriteRandomModel(config, 3);
    options_.device = GetParam().device;
    options_.dtype = GetParam().dtype;
    options_.max_step_tokens = kMaxStepTokens;
    options_.max_step_rows = 4;
    options_.pool_bytes = int64_t{1} << 20;
    options_.max_slots = 5;
    for (size_t i = 0; i < input_.size(); ++i) input_[i] = 0.1f * static_cast<float>(i % 7);
  }

  void Load() {
    auto model = LoadModel(directory_, options_);
    ASSERT_TRUE(model.ok()) << model.status();
    model_ = *std::move(model);
  }

  StepRow Row(int32_t slot, int64_t tokens) {
    StepRow row;
    row.work_slot = slot;
    row.fresh = true;
    row.tokens = tokens;
    row.input = input_.data();
    row.output = output_.data();
    return row;
  }

  // One step of one fresh session in `slot`; every session says the same, whoever had its slot before.
  void RunSession(int32_t slot) {
    const StepRow row = Row(slot, kTokens);
    const auto ticket = model_->Prepare({&row, 1});
    ASSERT_TRUE(ticket.ok()) << ticket.status();
    ASSERT_TRUE(model_->Launch(*ticket).ok());
    const auto result = model_->Wait(*ticket);
    ASSERT_TRUE(result.ok()) << result.status();
    ASSERT_TRUE(result->rows[0].ok()) << result->rows[0];
    if (first_output_.empty()) first_output_ = output_;
    ASSERT_EQ(std::memcmp(output_.data(), first_output_.data(), kTokens * kWidth * sizeof(float)), 0);
  }

  std::string directory_;
  ModelOptions options_;
  std::unique_ptr<Model> model_;
  std::vector<float> input_ = std::vector<float>((kMaxStepTokens + 1) * kWidth);
  std::vector<float> output_ = input_;
  std::vector<float> first_output_;
};
INSTANTIATE_TEST_SUITE_P(Modes, EngineMemoryTest, testing::ValuesIn(Modes()),
                         [](const auto& info) { return info.param.name; });

TEST_P(EngineMemoryTest, StaysFlatOverTenThousandSessions) {
  ASSERT_NO_FATAL_FAILURE(Load());
  StatePool slots(model_->description().num_slots);
  std::deque<StateSlot> open;  // Closed in the order of opening, so that sessions go round the slots.
  const auto sessions = [&](int count) {
    for (int i = 0; i < count; ++i) {
      if (open.size() == 4) open.pop_front();
      auto slot = slots.Acquire();
      ASSERT_TRUE(slot.ok()) << slot.status();
      ASSERT_NO_FATAL_FAILURE(RunSession(slot->index()));
      if (i % 10 == 0) {
        const StepRow large = Row(slot->index(), kMaxStepTokens + 1);
        ASSERT_EQ(model_->Prepare({&large, 1}).status().code(), absl::StatusCode::kInvalidArgument);
      }
      open.push_back(*std::move(slot));
    }
  };
  ASSERT_NO_FATAL_FAILURE(sessions(500));
  const int64_t free_before = FreeDeviceBytes(GetParam().device), resident_before = ResidentBytes();
  ASSERT_NO_FATAL_FAILURE(sessions(10000));
  EXPECT_GE(FreeDeviceBytes(GetParam().device), free_before);
  // AddressSanitizer keeps what is freed for a while, and finds leaks by itself. 100 bytes a session show.
  if (!kAddressSanitizer) {
    EXPECT_LE(ResidentBytes() - resident_before, 1000000);
  }
}

TEST_P(EngineMemoryTest, APoolBeyondTheMemoryIsRefusedAndTheNextLoadWorks) {
  ASSERT_NO_FATAL_FAILURE(Load());  // What the process allocates once is there.
  model_.reset();
  const int64_t free_before = FreeDeviceBytes(GetParam().device);
  ModelOptions absurd = options_;
  absurd.pool_bytes = int64_t{1} << 50;
  absurd.max_slots = absurd.pool_bytes;
  const absl::Status refused = LoadModel(directory_, absurd).status();
  EXPECT_EQ(refused.code(), absl::StatusCode::kResourceExhausted) << refused;
  EXPECT_GE(FreeDeviceBytes(GetParam().device), free_before);
  ASSERT_NO_FATAL_FAILURE(Load());
  RunSession(0);
}

// What products and graphs of another model have stays when one goes.
TEST_P(EngineMemoryTest, AModelThatGoesTakesNothingFromAnother) {
  ASSERT_NO_FATAL_FAILURE(Load());
  const auto fed_alone = [&] {
    const StepRow row = Row(1, 1);
    const auto ticket = model_->Prepare({&row, 1});
    ASSERT_TRUE(ticket.ok()) << ticket.status();
    ASSERT_TRUE(model_->Launch(*ticket).ok());
    ASSERT_TRUE(model_->Wait(*ticket).ok());
  };
  ASSERT_NO_FATAL_FAILURE(RunSession(0));
  ASSERT_NO_FATAL_FAILURE(fed_alone());
  const std::vector<float> want = output_;
  {
    auto other = LoadModel(directory_, options_);
    ASSERT_TRUE(other.ok()) << other.status();
  }
  // Who wrote to what was given back would write here.
  const DeviceBuffer others(GetParam().device, int64_t{100} << 20);
  for (int i = 0; i < 4; ++i) {
    ASSERT_NO_FATAL_FAILURE(RunSession(0));
    std::fill(output_.begin(), output_.end(), 0.0f);
    ASSERT_NO_FATAL_FAILURE(fed_alone());
    EXPECT_EQ(std::memcmp(output_.data(), want.data(), kWidth * sizeof(float)), 0);
  }
}

// A step takes no memory of the device's: with all of it gone, steps of every size work, and sessions go on.
TEST_P(EngineMemoryTest, StepsOfEverySizeWorkWhenTheDeviceIsFull) {
  if (GetParam().device.type == DeviceType::kCpu)
    GTEST_SKIP() << "a GPU's memory can be used up, a host's must not be";
  ASSERT_NO_FATAL_FAILURE(Load());
  const auto outputs = [&] {
    std::vector<float> all;
    for (int64_t tokens = 1; tokens <= kMaxStepTokens; ++tokens) {
      StepRow row = Row(0, tokens);
      row.fresh = tokens == 1;
      row.base_slot = 0;
      const auto ticket = model_->Prepare({&row, 1});
      EXPECT_TRUE(ticket.ok()) << ticket.status();
      EXPECT_TRUE(model_->Launch(*ticket).ok());
      const auto result = model_->Wait(*ticket);
      EXPECT_TRUE(result.ok() && result->rows[0].ok()) << result.status() << " after " << tokens << " tokens";
      all.insert(all.end(), output_.begin(), output_.begin() + tokens * kWidth);
    }
    return all;
  };
  const std::vector<float> want = outputs();
  FreeDeviceBytes(GetParam().device);  // Gives back what LibTorch's allocator keeps.
  std::vector<DeviceBuffer> all;
  for (int64_t bytes = int64_t{64} << 30; bytes >= int64_t{2} << 20;) {
    try {
      all.emplace_back(GetParam().device, bytes);
    } catch (const std::exception&) {
      bytes /= 2;
    }
  }
  EXPECT_LT(FreeDeviceBytes(GetParam().device), int64_t{32} << 20);
  ModelOptions more = options_;
  more.pool_bytes = int64_t{1} << 30;
  more.max_slots = more.pool_bytes;  // As many as these bytes hold.
  EXPECT_EQ(LoadModel(directory_, more).status().code(), absl::StatusCode::kResourceExhausted);
  const std::vector<float> got = outputs();
  EXPECT_EQ(std::memcmp(got.data(), want.data(), want.size() * sizeof(float)), 0);
}

// A graph works on the memory that it was captured over, as it is when it is launched.
TEST(DeviceGraph, ReplaysWhatWasCaptured) {
  const Device cuda{DeviceType::kCuda, 0};
  EXPECT_FALSE(DeviceGraph::Supported({DeviceType::kCpu, 0}));
  if (!CheckDevice(cuda).ok()) GTEST_SKIP() << CheckDevice(cuda).message();
  ASSERT_TRUE(DeviceGraph::Supported(cuda));
  const DeviceBuffer from = DeviceBuffer::HostFor(cuda, 64), to = DeviceBuffer::HostFor(cuda, 64);
  const DeviceBuffer on_device(cuda, 64);
  DeviceStream stream(cuda);
  const auto work = [&] {
    stream.Copy(on_device.data(), from.data(), 64);
    stream.Copy(to.data(), on_device.data(), 64);
    return absl::OkStatus();
  };
  ASSERT_TRUE(work().ok());
  stream.Synchronize();
  std::memset(to.data(), 0, 64);
  std::memset(from.data(), 1, 64);
  auto graph = stream.Capture(work);
  ASSERT_TRUE(graph.ok()) << graph.status();
  stream.Synchronize();
  EXPECT_EQ(to.data()[5], 0);
  for (char value = 2; value < 5; ++value) {
    std::memset(from.data(), value, 64);
    stream.Launch(*graph);
    stream.Synchronize();
    EXPECT_EQ(to.data()[63], value);
  }
  // What fails leaves the stream as it was, and so does what allocates.
  EXPECT_EQ(stream.Capture([&] { return absl::InternalError("no"); }).status(), absl::InternalError("no"));
  EXPECT_FALSE(stream
                   .Capture([&] {
                     const DeviceBuffer buffer(cuda, 64);
                     return work();
                   })
                   .ok());
  std::memset(from.data(), 9, 64);
  stream.Launch(*graph);
  stream.Synchronize();
  EXPECT_EQ(to.data()[0], 9);
}

TEST(DeviceMemory, OfADeviceThatHasItsOwn) {
  EXPECT_FALSE(QueryDeviceMemory({DeviceType::kCpu, 0}));
  const Device cuda{DeviceType::kCuda, 0};
  if (!CheckDevice(cuda).ok()) {
    EXPECT_FALSE(QueryDeviceMemory(cuda));
    GTEST_SKIP() << CheckDevice(cuda).message();
  }
  EXPECT_FALSE(QueryDeviceMemory({DeviceType::kCuda, 99}));
  constexpr int64_t kBytes = int64_t{256} << 20;
  FreeDeviceBytes(cuda);  // Nothing is left in LibTorch's cache for the buffer to come from.
  const std::optional<DeviceMemory> before = QueryDeviceMemory(cuda);
  const DeviceBuffer buffer(cuda, kBytes);
  std::optional<DeviceMemory> with;
  std::thread([&] { with = QueryDeviceMemory(cuda); }).join();
  ASSERT_TRUE(before && with);
  EXPECT_LE(before->free_bytes, before->total_bytes);
  EXPECT_EQ(with->total_bytes, before->total_bytes);
  EXPECT_LE(with->free_bytes, before->free_bytes - kBytes);
  EXPECT_GT(with->free_bytes, 0);
}

}  // namespace
}  // namespace deltanet
