// The readout on a GPU: through its door, on device memory, against the definition in float64 and against
// itself.
#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "model/device.h"
#include "model/ops/readout.h"
#include "tests/model/ops/op_test_util.h"
#include "tests/model/ops/readout_problem.h"

namespace deltanet {
namespace {

const Device kDevice{DeviceType::kCuda, 0};

class CudaReadoutTest : public testing::Test {
 protected:
  void SetUp() override {
    if (const absl::Status there = CheckDevice(kDevice); !there.ok()) GTEST_SKIP() << there.message();
  }

  // Runs it on copies of its arrays, `times` times over, and brings them back.
  static void Run(ReadoutProblem* problem, int times = 1) {
    struct Copied {
      char* host;
      int64_t bytes;
    };
    DeviceStream stream(kDevice);
    std::vector<Copied> copied;
    std::vector<DeviceBuffer> buffers;
    const ReadoutArgs args = problem->Args([&](auto* array) {
      const int64_t bytes = static_cast<int64_t>(array->size() * sizeof((*array)[0]));
      copied.push_back({reinterpret_cast<char*>(array->data()), bytes});
      buffers.emplace_back(kDevice, bytes);
      stream.Copy(buffers.back().data(), array->data(), bytes);
      return reinterpret_cast<decltype(array->data())>(buffers.back().data());
    });
    const OpContext context{.device = kDevice, .parallel_for = RunSerially, .stream = stream.handle()};
    for (int i = 0; i < times; ++i) {
      const absl::Status status = Readout(args, context);
      ASSERT_TRUE(status.ok()) << status;
    }
    for (size_t i = 0; i < copied.size(); ++i) {
      stream.Copy(copied[i].host, buffers[i].data(), copied[i].bytes);
    }
    stream.Synchronize();
  }
};

TEST_F(CudaReadoutTest, MatchesTheDefinition) {
  for (const int64_t W : {1, 2, 3, 5, 31, 32, 33, 63, 64, 65, 100, 511, 512, 513, 1025, 2500}) {
    for (const LogitKind kind : kLogitKinds) {
      SCOPED_TRACE("kind " + std::to_string(static_cast<int>(kind)));
      ReadoutProblem problem = EveryRequest(W, W % 2 == 0 ? 0 : 13, kind);
      Run(&problem);
      problem.Compare();
    }
  }
}

TEST_F(CudaReadoutTest, MatchesTheDefinitionOverRealVocabularies) {
  for (const int64_t W : {32007, 151936}) {
    for (const LogitKind kind : {LogitKind::kNormal, LogitKind::kTies, LogitKind::kEqual}) {
      SCOPED_TRACE("kind " + std::to_string(static_cast<int>(kind)));
      ReadoutProblem problem(W, 4000);
      for (int32_t m = 0; m < 12; ++m) {
        problem.Add(Logits(kind, W, m), {.target = m % 4 == 0 ? 31999 + m / 2 : -1,
                                         .top = m % 3 == 0 ? 20 : 0,
                                         .sample = 1,
                                         .sampled_slot = m,
                                         .temperature = m % 2 == 0 ? 0.8f : 1.0f,
                                         .top_k = m % 6 == 1   ? 50
                                                  : m % 6 == 2 ? 20000
                                                               : 0,
                                         .top_p = m % 5 < 2 ? 0.9f : 1.0f,
                                         .seed = 11,
                                         .counter = m});
      }
      Run(&problem);
      problem.Compare();
    }
  }
}

TEST_F(CudaReadoutTest, AFlatRowGivesTheUniformNumber) {
  constexpr int64_t kIds = 1000;
  ReadoutProblem problem(kIds);
  for (int64_t m = 0; m < 3000; ++m) {
    problem.Add(std::vector<float>(kIds, 4.5f), {.sample = 1, .temperature = 1.3f, .seed = 77, .counter = m});
  }
  Run(&problem);
  for (int64_t m = 0; m < problem.rows(); ++m) {
    EXPECT_EQ(problem.id(m), static_cast<int32_t>(std::floor(kIds * ReadoutUniform(77, m)))) << m;
  }
}

TEST_F(CudaReadoutTest, AtABoundaryTheUpperIdIsSampled) {
  std::vector<int32_t> ids;
  ReadoutProblem problem = BoundaryRows(&ids);
  Run(&problem);
  for (int64_t m = 0; m < problem.rows(); ++m) EXPECT_EQ(problem.id(m), ids[m]);
}

TEST_F(CudaReadoutTest, RowsThatAreNotFiniteSaySoAndStayInRange) {
  for (const int64_t W : {1, 7, 64, 300, 1025}) {
    ReadoutProblem problem = NonFiniteRows(W);
    Run(&problem);
    problem.Compare();
  }
}

// More rows than the GPU has room for at once, of all kinds, in either order: whoever comes first in the
// atomics changes no bit.
TEST_F(CudaReadoutTest, ARowDependsNeitherOnItsNeighboursNorOnItsPlaceNorOnTime) {
  constexpr int64_t kIds = 5000, kRows = 600;
  const auto add = [](ReadoutProblem* problem, int64_t which) {
    AddOfAllKinds(which, kIds, 64, problem);
  };
  ReadoutProblem forwards(kIds), again(kIds), backwards(kIds, 5);
  for (int64_t m = 0; m < kRows; ++m) {
    add(&forwards, m);
    add(&again, m);
    add(&backwards, kRows - 1 - m);
  }
  Run(&forwards);
  Run(&again, 20);
  Run(&backwards);
  EXPECT_TRUE(forwards.Results() == again.Results());
  for (int64_t m = 0; m < kRows; ++m) {
    EXPECT_TRUE(backwards.Results(kRows - 1 - m) == forwards.Results(m)) << m;
  }
  ReadoutProblem alone(kIds);
  add(&alone, 12);
  Run(&alone);
  EXPECT_TRUE(alone.Results(0) == forwards.Results(12));
}

// The CPU's samples and the GPU's differ only where u is within a rounding of a boundary.
TEST_F(CudaReadoutTest, SamplesAsTheCpuDoes) {
  constexpr int64_t kIds = 3000, kRows = 500;
  ReadoutProblem on_gpu(kIds), on_cpu(kIds);
  for (int64_t m = 0; m < kRows; ++m) {
    const std::vector<float> logits = Logits(LogitKind::kNormal, kIds, static_cast<uint32_t>(m));
    for (ReadoutProblem* problem : {&on_gpu, &on_cpu}) {
      problem->Add(logits, {.sample = 1,
                            .temperature = 0.9f,
                            .top_k = m % 3 == 0 ? 200 : 0,
                            .top_p = m % 2 == 0 ? 0.9f : 1.0f,
                            .seed = 21,
                            .counter = m});
    }
  }
  Run(&on_gpu);
  ASSERT_TRUE(Readout(on_cpu.Args(), SerialContext()).ok());
  int64_t different = 0;
  for (int64_t m = 0; m < kRows; ++m) different += on_gpu.id(m) != on_cpu.id(m);
  EXPECT_LE(different, 2);
}

}  // namespace
}  // namespace deltanet
