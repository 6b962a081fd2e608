#include "model/ops/delta_rule.h"

#include <cmath>
#include <cstdint>
#include <numeric>
#include <random>
#include <string>
#include <tuple>
#include <vector>

#include "gtest/gtest.h"
#include "tests/model/ops/delta_rule_problem.h"
#include "tests/model/ops/op_test_util.h"

namespace deltanet {
namespace {

// Every size of head with one and with many rows, of awkward lengths, in one and in two slots.
class DeltaRuleShapeTest : public testing::TestWithParam<std::tuple<CpuIsa, DeltaRuleSizes>> {
 protected:
  void SetUp() override {
    if (!isa_.supported()) GTEST_SKIP() << "this machine has no " << IsaName(std::get<0>(GetParam()));
  }
  DeltaRuleSizes sizes() const { return std::get<1>(GetParam()); }

 private:
  const IsaScope isa_{std::get<0>(GetParam())};
};

TEST_P(DeltaRuleShapeTest, OneRowMatchesTheReference) {
  for (int64_t tokens : {1, 2, 3, 15, 16, 17, 63, 100}) {
    SCOPED_TRACE(tokens);
    Ragged ragged;
    ragged.Add(tokens, 1, 1);
    DeltaRuleProblem(sizes(), ragged, 3, 17).RunAndCompare(SerialContext());
  }
}

TEST_P(DeltaRuleShapeTest, SevenRowsMatchTheReference) {
  DeltaRuleProblem(sizes(), SevenRows(), 12, 18).RunAndCompare(SerialContext());
  DeltaRuleProblem(sizes(), SevenRows(), 12, 18).RunAndCompare(ThreadedContext());
}

TEST_P(DeltaRuleShapeTest, AnySplitGivesTheSameState) {
  constexpr int64_t kTokens = 41;
  Ragged whole;
  whole.Add(kTokens, 0, 1);
  for (const std::vector<int64_t>& pieces : Splits(kTokens)) {
    DeltaRuleProblem problem(sizes(), whole, 2, 19);
    std::vector<float> plain_state, plain_out;
    std::vector<double> exact_state, exact_out;
    problem.AppendReference(0, &plain_state, &plain_out);
    problem.AppendReference(0, &exact_state, &exact_out);
    int64_t done = 0;
    for (int64_t tokens : pieces) {
      Ragged piece;
      piece.Add(tokens, done == 0 ? 0 : 1, 1);
      ASSERT_TRUE(DeltaRule(piece.rows(), problem.Args(done), SerialContext()).ok());
      done += tokens;
    }
    ASSERT_EQ(done, kTokens);
    ExpectAsGoodAsPlain(problem.slot(1), plain_state.data(), exact_state.data(), problem.StateSize(),
                        "state");
    ExpectAsGoodAsPlain(problem.out(0), plain_out.data(), exact_out.data(), kTokens * problem.OutWidth(),
                        "out");
  }
}

TEST_P(DeltaRuleShapeTest, CutsAtMultiplesOf64ChangeNoBit) {
  constexpr int64_t kTokens = 200;
  for (const std::vector<int64_t>& zeros :
       {std::vector<int64_t>{}, {0}, {0, 1, 2}, {0, 63, 64, 65, 199}, {127}, {128, 130}}) {
    for (const std::vector<int64_t>& pieces :
         {std::vector<int64_t>{64, 64, 72}, {64, 136}, {128, 72}, {192, 8}}) {
      Ragged row;
      row.Add(kTokens, 0, 1);
      DeltaRuleProblem whole(sizes(), row, 2, 31), cut(sizes(), row, 2, 31);
      for (const int64_t n : zeros) whole.SetBeta(n, 0), cut.SetBeta(n, 0);
      whole.Run();
      int64_t done = 0;
      for (const int64_t tokens : pieces) {
        Ragged piece;
        piece.Add(tokens, done == 0 ? 0 : 1, 1);
        ASSERT_TRUE(DeltaRule(piece.rows(), cut.Args(done), SerialContext()).ok());
        done += tokens;
      }
      EXPECT_TRUE(SameBits(cut.slot(1), whole.slot(1), whole.StateSize()));
      EXPECT_TRUE(SameBits(cut.out(0), whole.out(0), kTokens * whole.OutWidth()));
    }
  }
}

TEST_P(DeltaRuleShapeTest, RowsDoNotDependOnBatchMatesOrderSlotOrThreads) {
  const std::vector<int64_t> lengths = {5, 1, 33, 0, 2, 64, 1};
  Ragged ragged;
  for (size_t r = 0; r < lengths.size(); ++r)
    ragged.Add(lengths[r], static_cast<int32_t>(r), static_cast<int32_t>(r + 7));
  DeltaRuleProblem batch(sizes(), ragged, 14, 20);
  batch.Run(ThreadedContext());
  for (size_t r = 0; r < lengths.size(); ++r) {
    DeltaRuleProblem inputs(sizes(), ragged, 14, 20);  // The same numbers.
    const int32_t start = ragged.offsets[r];
    Ragged alone;
    const int32_t slot = static_cast<int32_t>(r);
    alone.Add(lengths[r], slot, slot);  // Its base slot, in place.
    ASSERT_TRUE(DeltaRule(alone.rows(), inputs.Args(start), SerialContext()).ok());
    EXPECT_TRUE(SameBits(inputs.slot(slot), batch.slot(slot + 7), batch.StateSize())) << "row " << r;
    EXPECT_TRUE(SameBits(inputs.out(start), batch.out(start), lengths[r] * batch.OutWidth())) << "row " << r;
  }
}

TEST_P(DeltaRuleShapeTest, ZeroBetaChangesNoBit) {
  for (const int32_t work : {0, 1}) {
    for (const int64_t tokens : {1, 5}) {
      Ragged ragged;
      ragged.Add(tokens, 0, work);
      DeltaRuleProblem problem(sizes(), ragged, 2, 21);
      for (int64_t n = 0; n < tokens; ++n) problem.SetBeta(n, n % 2 == 0 ? 0.0f : -0.0f);
      problem.slot(0)[0] = -0.0f;
      const std::vector<float> before(problem.slot(0), problem.slot(0) + problem.StateSize());
      problem.Run();
      EXPECT_TRUE(SameBits(problem.slot(work), before.data(), problem.StateSize()));
      for (float x : problem.out().Values()) EXPECT_TRUE(std::isfinite(x));
    }
  }
}

// Tokens before the start and after the end of a sequence have beta = 0, and one in the middle may.
TEST_P(DeltaRuleShapeTest, ZeroBetaAmongOthers) {
  for (const std::vector<int64_t>& zeros :
       {std::vector<int64_t>{0, 1, 2}, {20, 21}, {0, 19, 20, 21}, {0, 1, 2, 9, 21}, {1}, {20}}) {
    for (const bool fresh : {false, true}) {
      Ragged ragged;
      ragged.Add(22, 0, 1, fresh);
      DeltaRuleProblem problem(sizes(), ragged, 2, 29);
      for (int64_t n : zeros) problem.SetBeta(n, 0.0f);
      problem.RunAndCompare(SerialContext());
    }
  }
}

TEST_P(DeltaRuleShapeTest, AWrittenValueReadsBack) {
  Ragged ragged;
  ragged.Add(9, 0, 0);
  DeltaRuleProblem problem(sizes(), ragged, 1, 22);
  problem.scale = 1.0f;
  for (int64_t h = 0; h < sizes().heads; ++h) {
    *problem.beta(8, h) = 1.0f;
    std::copy_n(problem.k(8, h), sizes().key_dim, problem.q(8, h));
  }
  problem.Run();
  for (int64_t h = 0; h < sizes().heads; ++h) {
    // |k|^2 is 1 to within its own rounding, K sums are rounded, and the state is of size 1.
    EXPECT_LE(MaxError(problem.out(8) + h * sizes().value_dim, problem.v(8, h), sizes().value_dim),
              8 * kEpsilon * std::sqrt(static_cast<double>(sizes().key_dim)) + 4 * kEpsilon);
  }
}

TEST_P(DeltaRuleShapeTest, OnlySlotsOfTheRowsAreWritten) {
  Ragged ragged;
  ragged.Add(3, 0, 2);
  ragged.Add(0, 4, 5);
  DeltaRuleProblem problem(sizes(), ragged, 7, 23);
  DeltaRuleProblem before(sizes(), ragged, 7, 23);
  problem.Run(ThreadedContext());
  for (int64_t slot : {0, 1, 3, 4, 6}) {
    EXPECT_TRUE(SameBits(problem.slot(slot), before.slot(slot), before.StateSize() + 3)) << "slot " << slot;
  }
  EXPECT_TRUE(SameBits(problem.slot(5), before.slot(4), before.StateSize()));
}

TEST_P(DeltaRuleShapeTest, PaddingTouchesNothing) {
  CheckPadding(sizes(), /*aligned=*/false, [](DeltaRuleProblem* problem) { problem->Run(ThreadedContext()); });
}

TEST_P(DeltaRuleShapeTest, NonFiniteStateIsToldOfItsOwnRowOnly) {
  Ragged ragged;
  for (int32_t r = 0; r < 5; ++r) ragged.Add(r == 3 ? 0 : 4, r, r + 5);
  DeltaRuleProblem healthy(sizes(), ragged, 10, 24);
  healthy.Run();
  DeltaRuleProblem problem(sizes(), ragged, 10, 24);
  const int64_t h = sizes().heads - 1;
  problem.v(ragged.offsets[1], h)[sizes().value_dim - 1] = std::numeric_limits<float>::infinity();
  problem.slot(3)[problem.StateSize() - 1] = kNaN;
  problem.Run(ThreadedContext());
  EXPECT_EQ(problem.nonfinite(), (std::vector<int32_t>{0, 1, 0, 1, 0}));
  for (int64_t r : {0, 2, 4}) {
    EXPECT_TRUE(SameBits(problem.slot(r + 5), healthy.slot(r + 5), healthy.StateSize()));
    EXPECT_TRUE(
        SameBits(problem.out(ragged.offsets[r]), healthy.out(ragged.offsets[r]), 4 * healthy.OutWidth()));
  }
}

// Keys that say nearly the same over and over, and corrections that overshoot as far as they may.
TEST_P(DeltaRuleShapeTest, CorrelatedKeysAndBetaNearTwo) {
  constexpr int64_t kRows = 6, kTokens = 100;
  Ragged ragged;
  for (int32_t r = 0; r < kRows; ++r) ragged.Add(kTokens, r, r, r % 2 == 1);
  DeltaRuleProblem problem(sizes(), ragged, kRows, 25);
  problem.CorrelateKeys();
  for (int64_t n = 0; n < kRows * kTokens; ++n) problem.SetBeta(n, 1.99f);
  problem.RunAndCompare(SerialContext());
}

INSTANTIATE_TEST_SUITE_P(
    Sizes, DeltaRuleShapeTest,
    testing::Combine(EveryIsa(), testing::Values(DeltaRuleSizes{1, 1, 1}, DeltaRuleSizes{2, 5, 3},
                                                 DeltaRuleSizes{1, 16, 16}, DeltaRuleSizes{3, 17, 31},
                                                 DeltaRuleSizes{2, 32, 48}, DeltaRuleSizes{1, 64, 64},
                                                 DeltaRuleSizes{1, 100, 75}, DeltaRuleSizes{2, 48, 128},
                                                 DeltaRuleSizes{1, 256, 40})),
    [](const auto& info) {
      return IsaName(std::get<0>(info.param)) + "_" + SizesName(std::get<1>(info.param));
    });

class DeltaRuleTest : public IsaTest {};

TEST_P(DeltaRuleTest, LongRowKeepsItsAccuracy) {
  Ragged ragged;
  ragged.Add(32768, 0, 0);
  DeltaRuleProblem(DeltaRuleSizes{1, 16, 16}, ragged, 1, 26).RunAndCompare(SerialContext());
}

INSTANTIATE_TEST_SUITE_P(Isa, DeltaRuleTest, EveryIsa(),
                         [](const auto& info) { return IsaName(info.param); });

TEST(DeltaRuleContractTest, AnEmptyBatchDoesNothing) {
  DeltaRuleProblem problem(DeltaRuleSizes{1, 4, 4}, Ragged(), 1, 27);
  problem.Run(ThreadedContext());
}

TEST(DeltaRuleContractTest, RefusesWhatItCannotDo) {
  Ragged ragged;
  ragged.Add(2, 0, 0);
  DeltaRuleProblem problem(DeltaRuleSizes{1, 4, 4}, ragged, 1, 28);
  const std::vector<float> before(problem.slot(0), problem.slot(0) + problem.StateSize());
  const auto code = [&](auto change, const OpContext& context = SerialContext()) {
    DeltaRuleArgs args = problem.Args();
    change(&args);
    return DeltaRule(ragged.rows(), args, context).code();
  };
  EXPECT_EQ(code([](DeltaRuleArgs* args) { args->heads = 0; }), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(code([](DeltaRuleArgs* args) { args->key_dim = 0; }), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(code([](DeltaRuleArgs* args) { args->value_dim = -1; }), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(code([](DeltaRuleArgs* args) { args->dtype = DType::kBFloat16; }),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(code([](DeltaRuleArgs* args) { args->token_stride = 3; }), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(code([](DeltaRuleArgs* args) { args->state.slot_stride = 15; }),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(code([](DeltaRuleArgs* args) { args->out_bfloat16 = args->out; }),
            absl::StatusCode::kInvalidArgument);
#ifndef DELTANET_CUDA
  EXPECT_EQ(code([](DeltaRuleArgs*) {}, CudaContext()), absl::StatusCode::kFailedPrecondition);
#endif
  EXPECT_TRUE(SameBits(problem.slot(0), before.data(), problem.StateSize()));
  for (float x : problem.out().Values()) EXPECT_TRUE(std::isnan(x));
}

}  // namespace
}  // namespace deltanet
