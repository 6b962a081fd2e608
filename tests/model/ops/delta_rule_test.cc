#include "model/ops/delta_rule.h"

#include <cmath>
#include <cstdint>
#include <numeric>
#include <random>
#include <string>
#include <tuple>
#include <vector>

#include "gtest/gtest.h"
#include "tests/model/ops/op_test_util.h"

namespace deltanet {
namespace {

struct Sizes {
  int64_t heads, key_dim, value_dim;
};

// Inputs of a ragged batch in the layout of the engine (q, k, v and beta of a token side by side), and slots.
class Problem {
 public:
  // Unit keys and queries, betas in (0, 1).
  Problem(const Sizes& sizes, const Ragged& ragged, int64_t slots, uint32_t seed)
      : sizes_(sizes),
        ragged_(ragged),
        stride_(sizes.heads * (2 * sizes.key_dim + sizes.value_dim + 1) + 5),
        slot_stride_(StateSize() + 3),
        inputs_(RandomNormal(ragged.offsets.back() * stride_, seed)),
        pool_(slots * slot_stride_),
        out_(ragged.offsets.back() * sizes.heads * sizes.value_dim),
        nonfinite_(ragged.fresh.size(), 0) {
    std::mt19937 generator(seed + 1);
    std::uniform_real_distribution<float> uniform(0.0f, 1.0f);
    for (int64_t n = 0; n < ragged_.offsets.back(); ++n) {
      for (int64_t h = 0; h < sizes_.heads; ++h) {
        *beta(n, h) = uniform(generator);
        for (float* x : {q(n, h), k(n, h)}) {
          double squares = 0;
          for (int64_t i = 0; i < sizes_.key_dim; ++i) squares += double{x[i]} * x[i];
          for (int64_t i = 0; i < sizes_.key_dim; ++i) x[i] /= static_cast<float>(std::sqrt(squares));
        }
      }
    }
    // Between the slots NaN stays, to show who reads there.
    for (int64_t slot = 0; slot < slots; ++slot) {
      const std::vector<float> state =
          RandomNormal(StateSize(), seed + 2 + static_cast<uint32_t>(slot), 0.3f);
      std::copy(state.begin(), state.end(), this->slot(slot));
    }
  }

  int64_t StateSize() const { return sizes_.heads * sizes_.key_dim * sizes_.value_dim; }
  int64_t OutWidth() const { return sizes_.heads * sizes_.value_dim; }
  float* q(int64_t n, int64_t h) { return inputs_.data() + n * stride_ + h * sizes_.key_dim; }
  float* k(int64_t n, int64_t h) { return q(n, 0) + (sizes_.heads + h) * sizes_.key_dim; }
  float* v(int64_t n, int64_t h) {
    return q(n, 0) + 2 * sizes_.heads * sizes_.key_dim + h * sizes_.value_dim;
  }
  float* beta(int64_t n, int64_t h) {
    return q(n, 0) + sizes_.heads * (2 * sizes_.key_dim + sizes_.value_dim) + h;
  }
  float* slot(int64_t s) { return pool_.data() + s * slot_stride_; }
  float* out(int64_t n) { return out_.data() + n * OutWidth(); }
  Guarded& out() { return out_; }
  Guarded& pool() { return pool_; }
  Ragged& ragged() { return ragged_; }
  std::vector<int32_t>& nonfinite() { return nonfinite_; }
  float scale = 0.7f;

  // Of a step whose token 0 is token n of the batch.
  DeltaRuleArgs Args(int64_t n = 0) {
    return DeltaRuleArgs{.heads = sizes_.heads,
                         .key_dim = sizes_.key_dim,
                         .value_dim = sizes_.value_dim,
                         .q = q(n, 0),
                         .k = k(n, 0),
                         .v = v(n, 0),
                         .beta = beta(n, 0),
                         .token_stride = stride_,
                         .scale = scale,
                         .state = {.pool = pool_.data(), .slot_stride = slot_stride_, .offset = 0},
                         .out = out(n),
                         .nonfinite = nonfinite_.data()};
  }
  void Run(const OpContext& context = SerialContext()) {
    ASSERT_TRUE(DeltaRule(ragged_.rows(), Args(), context).ok());
    EXPECT_TRUE(out_.GuardsIntact());
    EXPECT_TRUE(pool_.GuardsIntact());
  }

  // Appends row r's state and outputs by the reference in T; call before Run.
  template <typename T>
  void AppendReference(int64_t r, std::vector<T>* states, std::vector<T>* outs) {
    const int64_t H = sizes_.heads, K = sizes_.key_dim, V = sizes_.value_dim;
    const int64_t start = ragged_.offsets[r], tokens = ragged_.offsets[r + 1] - start;
    std::vector<T> state(StateSize(), 0), out(tokens * OutWidth());
    if (!ragged_.fresh[r]) std::copy_n(slot(ragged_.base_slot[r]), StateSize(), state.begin());
    for (int64_t h = 0; h < H; ++h) {
      std::vector<T> head_q, head_k, head_v, head_beta, head_out(tokens * V);
      for (int64_t n = start; n < start + tokens; ++n) {
        head_q.insert(head_q.end(), q(n, h), q(n, h) + K);
        head_k.insert(head_k.end(), k(n, h), k(n, h) + K);
        head_v.insert(head_v.end(), v(n, h), v(n, h) + V);
        head_beta.push_back(*beta(n, h));
      }
      DeltaRuleReference<T>(tokens, K, V, head_q.data(), head_k.data(), head_v.data(), head_beta.data(),
                            scale, state.data() + h * K * V, head_out.data());
      for (int64_t t = 0; t < tokens; ++t) {
        std::copy_n(head_out.begin() + t * V, V, out.begin() + t * OutWidth() + h * V);
      }
    }
    states->insert(states->end(), state.begin(), state.end());
    outs->insert(outs->end(), out.begin(), out.end());
  }

  // Runs, and holds all rows together to the bound: of few numbers the largest error is a matter of luck.
  void RunAndCompare(const OpContext& context) {
    std::vector<float> plain_states, plain_outs, states;
    std::vector<double> exact_states, exact_outs;
    const int64_t R = ragged_.rows().rows;
    for (int64_t r = 0; r < R; ++r) {
      AppendReference(r, &plain_states, &plain_outs);
      AppendReference(r, &exact_states, &exact_outs);
    }
    Run(context);
    for (int64_t r = 0; r < R; ++r) {
      const float* state = slot(ragged_.work_slot[r]);
      states.insert(states.end(), state, state + StateSize());
    }
    ExpectAsGoodAsPlain(states.data(), plain_states.data(), exact_states.data(), R * StateSize(), "state");
    ExpectAsGoodAsPlain(out_.data(), plain_outs.data(), exact_outs.data(), out_.size(), "out");
    EXPECT_EQ(nonfinite_, std::vector<int32_t>(R, 0));
  }

 private:
  Sizes sizes_;
  Ragged ragged_;
  int64_t stride_;
  int64_t slot_stride_;
  std::vector<float> inputs_;
  Guarded pool_;
  Guarded out_;
  std::vector<int32_t> nonfinite_;
};

// Every size of head with one and with many rows, of awkward lengths, in one and in two slots.
class DeltaRuleShapeTest : public testing::TestWithParam<std::tuple<CpuIsa, Sizes>> {
 protected:
  void SetUp() override {
    if (!isa_.supported()) GTEST_SKIP() << "this machine has no " << IsaName(std::get<0>(GetParam()));
  }
  Sizes sizes() const { return std::get<1>(GetParam()); }

 private:
  const IsaScope isa_{std::get<0>(GetParam())};
};

TEST_P(DeltaRuleShapeTest, OneRowMatchesTheReference) {
  for (int64_t tokens : {1, 2, 3, 15, 16, 17, 63, 100}) {
    SCOPED_TRACE(tokens);
    Ragged ragged;
    ragged.Add(tokens, 1, 1);
    Problem(sizes(), ragged, 3, 17).RunAndCompare(SerialContext());
  }
}

TEST_P(DeltaRuleShapeTest, SevenRowsMatchTheReference) {
  Ragged ragged;
  ragged.Add(1, 0, 0);
  ragged.Add(63, 2, 3);
  ragged.Add(0, 4, 5);
  ragged.Add(17, 6, 7, true);
  ragged.Add(0, 8, 9, true);
  ragged.Add(2, 2, 10);  // The same base as another row: only work slots are a row's own.
  ragged.Add(100, 11, 11);
  Problem(sizes(), ragged, 12, 18).RunAndCompare(SerialContext());
  Problem(sizes(), ragged, 12, 18).RunAndCompare(ThreadedContext());
}

TEST_P(DeltaRuleShapeTest, AnySplitGivesTheSameState) {
  constexpr int64_t kTokens = 41;
  Ragged whole;
  whole.Add(kTokens, 0, 1);
  for (const std::vector<int64_t>& pieces : {std::vector<int64_t>{kTokens},
                                             std::vector<int64_t>(kTokens, 1),
                                             {7, 7, 7, 7, 7, 6},
                                             {16, 16, 9},
                                             {1, 0, 31, 2, 7}}) {
    Problem problem(sizes(), whole, 2, 19);
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

TEST_P(DeltaRuleShapeTest, RowsDoNotDependOnBatchMatesOrderSlotOrThreads) {
  const std::vector<int64_t> lengths = {5, 1, 33, 0, 2, 64, 1};
  Ragged ragged;
  for (size_t r = 0; r < lengths.size(); ++r)
    ragged.Add(lengths[r], static_cast<int32_t>(r), static_cast<int32_t>(r + 7));
  Problem batch(sizes(), ragged, 14, 20);
  batch.Run(ThreadedContext());
  for (size_t r = 0; r < lengths.size(); ++r) {
    Problem inputs(sizes(), ragged, 14, 20);  // The same numbers.
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
      Problem problem(sizes(), ragged, 2, 21);
      for (int64_t n = 0; n < tokens; ++n) {
        for (int64_t h = 0; h < sizes().heads; ++h) *problem.beta(n, h) = n % 2 == 0 ? 0.0f : -0.0f;
      }
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
      Problem problem(sizes(), ragged, 2, 29);
      for (int64_t n : zeros) {
        for (int64_t h = 0; h < sizes().heads; ++h) *problem.beta(n, h) = 0.0f;
      }
      problem.RunAndCompare(SerialContext());
    }
  }
}

TEST_P(DeltaRuleShapeTest, AWrittenValueReadsBack) {
  Ragged ragged;
  ragged.Add(9, 0, 0);
  Problem problem(sizes(), ragged, 1, 22);
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
  Problem problem(sizes(), ragged, 7, 23);
  Problem before(sizes(), ragged, 7, 23);
  problem.Run(ThreadedContext());
  for (int64_t slot : {0, 1, 3, 4, 6}) {
    EXPECT_TRUE(SameBits(problem.slot(slot), before.slot(slot), before.StateSize() + 3)) << "slot " << slot;
  }
  EXPECT_TRUE(SameBits(problem.slot(5), before.slot(4), before.StateSize()));
}

TEST_P(DeltaRuleShapeTest, NonFiniteStateIsToldOfItsOwnRowOnly) {
  Ragged ragged;
  for (int32_t r = 0; r < 5; ++r) ragged.Add(r == 3 ? 0 : 4, r, r + 5);
  Problem healthy(sizes(), ragged, 10, 24);
  healthy.Run();
  Problem problem(sizes(), ragged, 10, 24);
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
  Problem problem(sizes(), ragged, kRows, 25);
  for (int64_t n = 0; n < kRows * kTokens; ++n) {
    for (int64_t h = 0; h < sizes().heads; ++h) {
      *problem.beta(n, h) = 1.99f;
      if (n % kTokens == 0) continue;
      double squares = 0;
      for (int64_t i = 0; i < sizes().key_dim; ++i) {
        float* key = problem.k(n, h) + i;
        *key = problem.k(n - 1, h)[i] + (n % 3 == 0 ? 0.0f : 0.01f * *key);
        squares += double{*key} * *key;
      }
      for (int64_t i = 0; i < sizes().key_dim; ++i)
        problem.k(n, h)[i] /= static_cast<float>(std::sqrt(squares));
    }
  }
  problem.RunAndCompare(SerialContext());
}

INSTANTIATE_TEST_SUITE_P(
    Sizes, DeltaRuleShapeTest,
    testing::Combine(EveryIsa(), testing::Values(Sizes{1, 1, 1}, Sizes{2, 5, 3}, Sizes{1, 16, 16},
                                                 Sizes{3, 17, 31}, Sizes{2, 32, 48}, Sizes{1, 64, 64},
                                                 Sizes{1, 100, 75}, Sizes{2, 48, 128}, Sizes{1, 256, 40})),
    [](const auto& info) {
      const Sizes& sizes = std::get<1>(info.param);
      return IsaName(std::get<0>(info.param)) + "_H" + std::to_string(sizes.heads) + "_K" +
             std::to_string(sizes.key_dim) + "_V" + std::to_string(sizes.value_dim);
    });

class DeltaRuleTest : public IsaTest {};

TEST_P(DeltaRuleTest, LongRowKeepsItsAccuracy) {
  Ragged ragged;
  ragged.Add(32768, 0, 0);
  Problem(Sizes{1, 16, 16}, ragged, 1, 26).RunAndCompare(SerialContext());
}

INSTANTIATE_TEST_SUITE_P(Isa, DeltaRuleTest, EveryIsa(),
                         [](const auto& info) { return IsaName(info.param); });

TEST(DeltaRuleContractTest, AnEmptyBatchDoesNothing) {
  Problem problem(Sizes{1, 4, 4}, Ragged(), 1, 27);
  problem.Run(ThreadedContext());
}

TEST(DeltaRuleContractTest, RefusesWhatItCannotDo) {
  Ragged ragged;
  ragged.Add(2, 0, 0);
  Problem problem(Sizes{1, 4, 4}, ragged, 1, 28);
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
  EXPECT_EQ(code([](DeltaRuleArgs*) {}, CudaContext()), absl::StatusCode::kFailedPrecondition);
  EXPECT_TRUE(SameBits(problem.slot(0), before.data(), problem.StateSize()));
  for (float x : problem.out().Values()) EXPECT_TRUE(std::isnan(x));
}

}  // namespace
}  // namespace deltanet
