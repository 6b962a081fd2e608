#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "model/ops/elementwise.h"
#include "model/ops/output_norm.h"
#include "model/ops/rms_norm.h"
#include "tests/model/ops/norm_elementwise_problem.h"
#include "tests/model/ops/op_test_util.h"

namespace deltanet {
namespace {

const int64_t kWidths[] = {1, 3, 4, 7, 16, 17, 64, 100, 129};

class AddRmsNormTest : public IsaTest {};

TEST_P(AddRmsNormTest, MatchesTheReferenceWithAndWithoutEachPart) {
  for (const int64_t d : kWidths) {
    for (int parts = 0; parts < NormProblem::kPartsEnd; ++parts) {
      SCOPED_TRACE("width " + std::to_string(d) + " parts " + std::to_string(parts));
      NormProblem problem(d, parts);
      ASSERT_TRUE(AddRmsNorm(problem.args, ThreadedContext()).ok());
      problem.Compare();
    }
  }
}

TEST_P(AddRmsNormTest, InPlaceGivesTheSameBits) {
  for (const int64_t d : kWidths) {
    constexpr int64_t kRows = 5;
    const std::vector<float> x = RandomNormal(kRows * d, 5), bias = RandomNormal(d, 7),
                             scale = RandomNormal(d, 8);
    std::vector<float> sum(kRows * d), normed(kRows * d);
    const AddRmsNormArgs apart{.rows = kRows,
                               .width = d,
                               .x = x.data(),
                               .bias = bias.data(),
                               .sum = sum.data(),
                               .scale = scale.data(),
                               .normed = normed.data()};
    ASSERT_TRUE(AddRmsNorm(apart, SerialContext()).ok());
    for (const bool sum_in_place : {false, true}) {
      SCOPED_TRACE(sum_in_place);
      std::vector<float> a = x, b(kRows * d);
      AddRmsNormArgs args = apart;
      args.x = a.data();
      args.sum = sum_in_place ? a.data() : nullptr;
      args.normed = sum_in_place ? b.data() : a.data();
      ASSERT_TRUE(AddRmsNorm(args, SerialContext()).ok());
      EXPECT_TRUE(SameBits(sum_in_place ? b.data() : a.data(), normed.data(), kRows * d));
      EXPECT_TRUE(!sum_in_place || SameBits(a.data(), sum.data(), kRows * d));
    }
  }
}

TEST_P(AddRmsNormTest, WithoutAScaleOnlyTheSumIsWritten) {
  for (const int64_t d : kWidths) {
    const std::vector<float> x = RandomNormal(3 * d, 13), bias = RandomNormal(d, 14);
    Guarded sum(3 * d), normed(3 * d);
    AddRmsNormArgs args{.rows = 3, .width = d, .x = x.data(), .bias = bias.data(), .sum = sum.data()};
    ASSERT_TRUE(AddRmsNorm(args, SerialContext()).ok());
    args.sum = nullptr;
    args.normed = normed.data();
    ASSERT_TRUE(AddRmsNorm(args, SerialContext()).ok());
    for (int64_t i = 0; i < 3 * d; ++i) {
      EXPECT_EQ(sum[i], x[i] + bias[i % d]);
      EXPECT_EQ(normed[i], sum[i]);
    }
    EXPECT_TRUE(sum.GuardsIntact() && normed.GuardsIntact());
  }
}

TEST_P(AddRmsNormTest, ZerosStayZero) {
  const std::vector<float> x(20, 0.0f), scale(20, 3.0f);
  Guarded normed(20);
  ASSERT_TRUE(
      AddRmsNorm({.rows = 1, .width = 20, .x = x.data(), .scale = scale.data(), .normed = normed.data()},
                 SerialContext())
          .ok());
  EXPECT_EQ(normed.Values(), x);
}

INSTANTIATE_TEST_SUITE_P(Isa, AddRmsNormTest, EveryIsa(),
                         [](const auto& info) { return IsaName(info.param); });

TEST(AddRmsNormContractTest, RefusesWhatItCannotDo) {
  float x[4] = {1, 2, 3, 4}, scale[4] = {1, 1, 1, 1}, out[4] = {};
  const AddRmsNormArgs good{.rows = 1, .width = 4, .x = x, .scale = scale, .normed = out};
  const auto code = [](const AddRmsNormArgs& args, const OpContext& context = SerialContext()) {
    return AddRmsNorm(args, context).code();
  };
  EXPECT_EQ(code(good), absl::StatusCode::kOk);
  AddRmsNormArgs bad = good;
  bad.width = 0;
  EXPECT_EQ(code(bad), absl::StatusCode::kInvalidArgument);
  bad = good;
  bad.rows = -1;
  EXPECT_EQ(code(bad), absl::StatusCode::kInvalidArgument);
  bad = good;
  bad.normed = nullptr;  // A scale and nothing to scale.
  EXPECT_EQ(code(bad), absl::StatusCode::kInvalidArgument);
  bad.scale = nullptr;  // Nothing to write.
  EXPECT_EQ(code(bad), absl::StatusCode::kInvalidArgument);
  bad = good;
  bad.normed_dtype = DType::kBFloat16;
  EXPECT_EQ(code(bad), absl::StatusCode::kInvalidArgument);
#ifndef DELTANET_CUDA
  EXPECT_EQ(code(good, CudaContext()), absl::StatusCode::kFailedPrecondition);
#endif
  bad = good;
  bad.rows = 0;
  bad.x = nullptr;
  EXPECT_EQ(code(bad), absl::StatusCode::kOk);
}

class GatedUnitTest : public IsaTest {};

TEST_P(GatedUnitTest, MatchesTheReference) {
  for (const int64_t f : kWidths) {
    constexpr int64_t kRows = 6;
    const std::vector<float> x = RandomNormal(kRows * 2 * f, 9, 3.0f), bias = RandomNormal(2 * f, 10);
    for (GateKind kind : {GateKind::kSigmoidSecond, GateKind::kSiluFirst}) {
      for (const float* b : {static_cast<const float*>(nullptr), bias.data()}) {
        Guarded out(kRows * f);
        ASSERT_TRUE(
            GatedUnit({.kind = kind, .rows = kRows, .width = f, .x = x.data(), .bias = b, .out = out.data()},
                      ThreadedContext())
                .ok());
        ExpectAsGoodAsPlain(out.data(), GatedReference<float>(kind, kRows, f, x, b).data(),
                            GatedReference<double>(kind, kRows, f, x, b).data(), kRows * f,
                            std::to_string(f));
        EXPECT_TRUE(out.GuardsIntact());
      }
    }
  }
}

// The sigmoid alone, over all that a float32 can tell from 0 and 1: relative error, down to the smallest
// normal number.
TEST_P(GatedUnitTest, SigmoidKeepsItsRelativeAccuracy) {
  constexpr int64_t kPoints = 200001;
  std::vector<float> x(2 * kPoints, 1.0f);
  for (int64_t i = 0; i < kPoints; ++i) x[kPoints + i] = -100.0f + 0.001f * static_cast<float>(i);
  Guarded out(kPoints);
  ASSERT_TRUE(
      GatedUnit(
          {.kind = GateKind::kSigmoidSecond, .rows = 1, .width = kPoints, .x = x.data(), .out = out.data()},
          SerialContext())
          .ok());
  double worst = 0;
  for (int64_t i = 0; i < kPoints; ++i) {
    const double exact = 1 / (1 + std::exp(-static_cast<double>(x[kPoints + i])));
    const double floor = 2 * std::numeric_limits<float>::min();
    worst = std::max(worst, (std::fabs(out[i] - exact) - floor) / exact);
  }
  EXPECT_LE(worst, 2.5 * kEpsilon);
}

TEST_P(GatedUnitTest, ExtremesAndNonFiniteValues) {
  const auto [second, want] = ExtremesOfSigmoid();
  const int64_t f = static_cast<int64_t>(second.size());
  std::vector<float> x(f, 2.0f);
  x.insert(x.end(), second.begin(), second.end());
  Guarded out(f);
  ASSERT_TRUE(
      GatedUnit({.kind = GateKind::kSigmoidSecond, .rows = 1, .width = f, .x = x.data(), .out = out.data()},
                SerialContext())
          .ok());
  for (int64_t i = 0; i < f; ++i) {
    if (std::isnan(want[i])) {
      EXPECT_TRUE(std::isnan(out[i]));
    } else {
      EXPECT_NEAR(out[i], want[i], 1e-37) << second[i];
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Isa, GatedUnitTest, EveryIsa(),
                         [](const auto& info) { return IsaName(info.param); });

class OutputNormTest : public IsaTest {};

TEST_P(OutputNormTest, MatchesTheReference) {
  ForEachOutputNorm([](int64_t groups, int64_t width, bool gated) {
    OutputNormProblem problem(groups, width, gated);
    ASSERT_TRUE(OutputNorm(problem.Args(), ThreadedContext()).ok());
    problem.Compare();
  });
}

TEST_P(OutputNormTest, InPlaceGivesTheSameBits) {
  ForEachOutputNorm([](int64_t groups, int64_t width, bool gated) {
    OutputNormProblem problem(groups, width, gated);
    ASSERT_TRUE(OutputNorm(problem.Args(), SerialContext()).ok());
    std::vector<float> in_place = problem.x;
    OutputNormArgs args = problem.Args();
    args.x = args.out = in_place.data();
    ASSERT_TRUE(OutputNorm(args, SerialContext()).ok());
    EXPECT_TRUE(SameBits(in_place.data(), problem.out.data(), problem.out.size()));
  });
}

TEST_P(OutputNormTest, NaNShowsInItsGroupAndClosedGatesGiveZero) {
  const auto run = [](const std::vector<float>& x, const std::vector<float>& gate) {
    const std::vector<float> scale = {1, 1};
    Guarded out(6);
    EXPECT_TRUE(OutputNorm({.rows = 1,
                            .groups = 3,
                            .width = 2,
                            .x = x.data(),
                            .scale = scale.data(),
                            .gate = gate.data(),
                            .gate_stride = 6,
                            .out = out.data()},
                           SerialContext())
                    .ok());
    EXPECT_TRUE(out.GuardsIntact());
    return out.Values();
  };
  ExpectNaNAndClosedGates(run);
}

INSTANTIATE_TEST_SUITE_P(Isa, OutputNormTest, EveryIsa(),
                         [](const auto& info) { return IsaName(info.param); });

TEST(EmbedTest, CopiesRowsOfTheTableThatIdsOrSlotsName) {
  for (const int64_t width : kWidths) {
    for (const bool threads : {false, true}) {
      SCOPED_TRACE(width);
      EmbedProblem problem(width);
      ASSERT_TRUE(
          Embed(problem.ragged.rows(), problem.Args(), threads ? ThreadedContext() : SerialContext()).ok());
      problem.Compare();
    }
  }
}

TEST(OutputNormContractTest, RefusesWhatItCannotDo) {
  const OutputNormArgs good{.rows = 0, .groups = 2, .width = 3, .gate_stride = 5};
  const auto code = [&](auto change, const OpContext& context = SerialContext()) {
    OutputNormArgs args = good;
    change(&args);
    return OutputNorm(args, context).code();
  };
  using Args = OutputNormArgs;
  const auto refused = absl::StatusCode::kInvalidArgument;
  const float gate = 0;
  EXPECT_EQ(code([](Args*) {}), absl::StatusCode::kOk);
  EXPECT_EQ(code([](Args* args) { args->rows = -1; }), refused);
  EXPECT_EQ(code([](Args* args) { args->groups = 0; }), refused);
  EXPECT_EQ(code([](Args* args) { args->width = 0; }), refused);
  EXPECT_EQ(code([&](Args* args) { args->gate = &gate; }), refused);  // Its stride is short by one.
  EXPECT_EQ(code([](Args* args) { args->dtype = DType::kBFloat16; }), refused);
#ifndef DELTANET_CUDA
  EXPECT_EQ(code([](Args*) {}, CudaContext()), absl::StatusCode::kFailedPrecondition);
#endif
}

TEST(ElementwiseContractTest, RefuseWhatTheyCannotDo) {
  EXPECT_EQ(GatedUnit({.rows = 1, .width = 0}, SerialContext()).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(GatedUnit({.rows = -1, .width = 1}, SerialContext()).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(GatedUnit({.rows = 1, .width = 1, .dtype = DType::kBFloat16}, SerialContext()).code(),
            absl::StatusCode::kInvalidArgument);
#ifndef DELTANET_CUDA
  EXPECT_EQ(GatedUnit({.rows = 1, .width = 1}, CudaContext()).code(), absl::StatusCode::kFailedPrecondition);
#endif
  EXPECT_TRUE(GatedUnit({.rows = 0, .width = 1}, SerialContext()).ok());
  const RaggedRows none;
  EXPECT_EQ(Embed(none, {.width = 0}, SerialContext()).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(Embed(none, {.width = 1, .dtype = DType::kBFloat16}, SerialContext()).code(),
            absl::StatusCode::kInvalidArgument);
#ifndef DELTANET_CUDA
  EXPECT_EQ(Embed(none, {.width = 1}, CudaContext()).code(), absl::StatusCode::kFailedPrecondition);
#endif
  EXPECT_TRUE(Embed(none, {.width = 1}, SerialContext()).ok());
}

}  // namespace
}  // namespace deltanet
