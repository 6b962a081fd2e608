// The delta rule by chunks on a GPU, in bfloat16: through the door, on device memory, against float64.
//
// The bound. The inputs are bfloat16 numbers, so the exact result is that of float64 on them. Plain code in
// the same dtype stores every value (u, S, o) in bfloat16 and sums in float32; keys that say nearly the same
// over and over are held to twice its error, plus one rounding to bfloat16. For other keys that would be
// generous: they are held to twice the error of code with float32 state that rounds operands only, plus the
// rounding.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "absl/functional/function_ref.h"
#include "gtest/gtest.h"
#include "model/ops/delta_rule.h"
#include "model/ops/delta_rule_cuda.h"
#include "tests/model/ops/cuda_test_util.h"
#include "tests/model/ops/delta_rule_on_device.h"
#include "tests/model/ops/delta_rule_problem.h"
#include "tests/model/ops/op_test_util.h"

namespace deltanet {
namespace {

constexpr double kRounding = 1.0 / 256;  // Half the distance of bfloat16 numbers, of the smaller.

float ToBfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u;
  std::memcpy(&x, &bits, sizeof(bits));
  return x;
}

enum class Plain { kAllBfloat16, kBfloat16Operands };

// The definition for one head, in bfloat16; as DeltaRuleReference.
void PlainDeltaRule(Plain plain, int64_t tokens, int64_t K, int64_t V, const float* q, const float* k,
                    const float* v, const float* beta, float scale, float* state, float* out) {
  const bool all = plain == Plain::kAllBfloat16;
  const auto stored = [&](float x) { return all ? ToBfloat16(x) : x; };
  std::vector<float> rounded(K * V), u(V), sum(V);
  for (int64_t i = 0; i < K * V; ++i) rounded[i] = ToBfloat16(state[i]);
  if (all) std::copy(rounded.begin(), rounded.end(), state);
  for (int64_t t = 0; t < tokens; ++t) {
    std::fill(sum.begin(), sum.end(), 0.0f);
    for (int64_t i = 0; i < K; ++i) {
      for (int64_t j = 0; j < V; ++j) sum[j] += rounded[i * V + j] * k[t * K + i];
    }
    for (int64_t j = 0; j < V; ++j) u[j] = ToBfloat16(beta[t] * stored(v[t * V + j] - stored(sum[j])));
    std::fill(sum.begin(), sum.end(), 0.0f);
    for (int64_t i = 0; i < K; ++i) {
      for (int64_t j = 0; j < V; ++j) {
        state[i * V + j] = stored(state[i * V + j] + stored(k[t * K + i] * u[j]));
        rounded[i * V + j] = ToBfloat16(state[i * V + j]);
        sum[j] += rounded[i * V + j] * q[t * K + i];
      }
    }
    for (int64_t j = 0; j < V; ++j) out[t * V + j] = stored(scale * stored(sum[j]));
  }
}

// Row r's state and outputs by plain code, appended; call before the run.
void AppendPlain(Plain plain, DeltaRuleProblem* problem, int64_t r, std::vector<float>* states,
                 std::vector<float>* outs) {
  const DeltaRuleSizes& sizes = problem->sizes();
  const int64_t H = sizes.heads, K = sizes.key_dim, V = sizes.value_dim;
  const Ragged& ragged = problem->ragged();
  const int64_t start = ragged.offsets[r], tokens = ragged.offsets[r + 1] - start;
  std::vector<float> state(H * K * V, 0.0f), out(tokens * H * V);
  if (!ragged.fresh[r]) std::copy_n(problem->slot(ragged.base_slot[r]), H * K * V, state.begin());
  for (int64_t h = 0; h < H; ++h) {
    std::vector<float> q, k, v, beta, head_out(tokens * V);
    for (int64_t n = start; n < start + tokens; ++n) {
      q.insert(q.end(), problem->q(n, h), problem->q(n, h) + K);
      k.insert(k.end(), problem->k(n, h), problem->k(n, h) + K);
      v.insert(v.end(), problem->v(n, h), problem->v(n, h) + V);
      beta.push_back(*problem->beta(n, h));
    }
    PlainDeltaRule(plain, tokens, K, V, q.data(), k.data(), v.data(), beta.data(), problem->scale,
                   state.data() + h * K * V, head_out.data());
    for (int64_t t = 0; t < tokens; ++t) std::copy_n(&head_out[t * V], V, &out[(t * H + h) * V]);
  }
  states->insert(states->end(), state.begin(), state.end());
  outs->insert(outs->end(), out.begin(), out.end());
}

void ExpectWithin(const float* fast, const std::vector<float>& plain, const std::vector<double>& exact,
                  const std::string& what) {
  const int64_t count = static_cast<int64_t>(exact.size());
  if (count == 0) return;
  const double error = MaxError(fast, exact.data(), count);
  EXPECT_FALSE(std::isnan(error)) << what << " has an unwritten element";
  EXPECT_LE(error,
            2 * MaxError(plain.data(), exact.data(), count) + kRounding * MaxMagnitude(exact.data(), count))
      << what;
}

const DeltaRuleSizes kHeadSizes[] = {{2, 64, 64}, {2, 128, 128}, {2, 256, 256}};

// Outputs in float32 or bfloat16, which are ways of their own out of the kernel.
class CudaDeltaRuleChunksTest : public testing::TestWithParam<DType> {
 protected:
  void SetUp() override {
    if (const absl::Status there = CheckDevice(kDevice); !there.ok()) GTEST_SKIP() << there.message();
    const DeltaRuleArgs args{.heads = 1, .key_dim = 64, .value_dim = 64, .dtype = DType::kBFloat16};
    if (!DeltaRuleChunkCudaTakes(args)) GTEST_SKIP() << "the chunk kernel is for another GPU";
    SetDeltaRuleCudaPathForTesting(DeltaRuleCudaPath::kChunks);
  }
  void TearDown() override { SetDeltaRuleCudaPathForTesting(DeltaRuleCudaPath::kDefault); }

  void Run(DeltaRuleProblem* problem) {
    DeltaRuleOnDevice on_device(problem, DType::kBFloat16, /*aligned=*/true, GetParam());
    on_device.Step(problem->ragged(), 0);
    on_device.Finish();
  }

  // Holds all rows together to the bound.
  void RunAndCompare(Plain plain, DeltaRuleProblem* problem) {
    RunAndCompare(plain, problem, [&] { Run(problem); });
  }
  static void RunAndCompare(Plain plain, DeltaRuleProblem* problem, absl::FunctionRef<void()> run) {
    problem->inputs() = Rounded(problem->inputs(), DType::kBFloat16);
    std::vector<float> plain_states, plain_outs, states;
    std::vector<double> exact_states, exact_outs;
    const int64_t R = problem->ragged().rows().rows;
    for (int64_t r = 0; r < R; ++r) {
      AppendPlain(plain, problem, r, &plain_states, &plain_outs);
      problem->AppendReference(r, &exact_states, &exact_outs);
    }
    run();
    for (int64_t r = 0; r < R; ++r) {
      const float* const state = problem->slot(problem->ragged().work_slot[r]);
      states.insert(states.end(), state, state + problem->StateSize());
    }
    ExpectWithin(states.data(), plain_states, exact_states, "state");
    ExpectWithin(problem->out().data(), plain_outs, exact_outs, "out");
    EXPECT_EQ(problem->nonfinite(), std::vector<int32_t>(R, 0));
  }

  static DeltaRuleProblem Problem(const DeltaRuleSizes& sizes, const Ragged& ragged, int64_t slots,
                                  uint32_t seed) {
    return DeltaRuleProblem(sizes, ragged, slots, seed, /*aligned=*/true);
  }
};

TEST_P(CudaDeltaRuleChunksTest, OneRow) {
  for (const DeltaRuleSizes& sizes : kHeadSizes) {
    for (const int64_t tokens :
         {0, 1, 15, 16, 17, 31, 33, 48, 63, 64, 65, 100, 127, 128, 129, 192, 1000, 2048}) {
      for (const bool fresh : {false, true}) {
        SCOPED_TRACE(SizesName(sizes) + " tokens " + std::to_string(tokens) + (fresh ? " fresh" : ""));
        Ragged ragged;
        ragged.Add(tokens, 1, tokens % 2 == 0 ? 1 : 2, fresh);
        DeltaRuleProblem problem = Problem(sizes, ragged, 3, 41);
        RunAndCompare(Plain::kBfloat16Operands, &problem);
      }
    }
  }
}

// (B, T, H, D) that flash-linear-attention tests, and one of few heads that is split.
TEST_P(CudaDeltaRuleChunksTest, ShapesOfFlashLinearAttention) {
  struct Shape {
    int64_t B, T, H, D;
  };
  for (const Shape& shape :
       {Shape{1, 63, 1, 64}, Shape{2, 100, 4, 60}, Shape{2, 1000, 3, 128}, Shape{2, 1024, 4, 128},
        Shape{3, 2000, 4, 128}, Shape{4, 2048, 8, 64}, Shape{2, 500, 4, 256}, Shape{1, 4096, 16, 128}}) {
    const DeltaRuleSizes sizes{shape.H, shape.D, shape.D};
    SCOPED_TRACE(SizesName(sizes) + " tokens " + std::to_string(shape.T));
    Ragged ragged;
    for (int32_t r = 0; r < shape.B; ++r) ragged.Add(shape.T, r, r);
    DeltaRuleProblem problem = Problem(sizes, ragged, shape.B, 42);
    RunAndCompare(Plain::kBfloat16Operands, &problem);
  }
}

TEST_P(CudaDeltaRuleChunksTest, RowsOfEveryKind) {
  for (const DeltaRuleSizes& sizes : kHeadSizes) {
    SCOPED_TRACE(SizesName(sizes));
    DeltaRuleProblem problem = Problem(sizes, SevenRows(), 12, 43);
    RunAndCompare(Plain::kBfloat16Operands, &problem);
  }
}

// More pieces of work than blocks, of all lengths: blocks take several, of which some are much shorter.
TEST_P(CudaDeltaRuleChunksTest, ManyRaggedRows) {
  std::mt19937 generator(7);
  for (const DeltaRuleSizes& sizes :
       {DeltaRuleSizes{9, 64, 64}, DeltaRuleSizes{7, 128, 128}, DeltaRuleSizes{3, 256, 256}}) {
    SCOPED_TRACE(SizesName(sizes));
    Ragged ragged;
    constexpr int32_t kRows = 43;
    for (int32_t r = 0; r < kRows; ++r) {
      const int64_t tokens = r % 11 == 3 ? 0 : r % 7 == 0 ? generator() % 700 : generator() % 130;
      ragged.Add(tokens, 2 * r, 2 * r + static_cast<int32_t>(generator() % 2), generator() % 4 == 0);
    }
    DeltaRuleProblem problem = Problem(sizes, ragged, 2 * kRows, 44);
    RunAndCompare(Plain::kBfloat16Operands, &problem);
  }
}

// Thousands of rows, most of them short.
TEST_P(CudaDeltaRuleChunksTest, ThousandsOfRows) {
  Ragged ragged;
  constexpr int32_t kRows = 2100;
  for (int32_t r = 0; r < kRows; ++r) ragged.Add(r % 97 == 5 || r > 2090 ? 20 + r % 60 : r % 5, r, r);
  DeltaRuleProblem problem = Problem({1, 64, 64}, ragged, kRows, 45);
  RunAndCompare(Plain::kBfloat16Operands, &problem);
}

TEST_P(CudaDeltaRuleChunksTest, AnySplitGivesTheSameState) {
  constexpr int64_t kTokens = 250;
  Ragged whole;
  whole.Add(kTokens, 0, 1);
  std::vector<std::vector<int64_t>> splits = {
      {128, 122}, {64, 64, 64, 58}, {1, 249}, {100, 17, 16, 117}, {17, 200, 33}};
  for (const DeltaRuleSizes& sizes : kHeadSizes) {
    for (const std::vector<int64_t>& pieces : splits) {
      SCOPED_TRACE(SizesName(sizes) + " first " + std::to_string(pieces[0]));
      DeltaRuleProblem problem = Problem(sizes, whole, 2, 46);
      RunAndCompare(Plain::kBfloat16Operands, &problem, [&] {
        DeltaRuleOnDevice on_device(&problem, DType::kBFloat16, /*aligned=*/true, GetParam());
        int64_t done = 0;
        for (const int64_t tokens : pieces) {
          // A piece starts at any token; the kernel wants its inputs at multiples of 16 bytes, as all tokens
          // are.
          Ragged piece;
          piece.Add(tokens, done == 0 ? 0 : 1, 1);
          on_device.Step(piece, done);
          done += tokens;
        }
        on_device.Finish();
        ASSERT_EQ(done, kTokens);
      });
    }
  }
}

TEST_P(CudaDeltaRuleChunksTest, ZeroBetaLeavesTheStateAsItWas) {
  for (const DeltaRuleSizes& sizes : kHeadSizes) {
    for (const int32_t work : {0, 1}) {
      for (const int64_t tokens : {17, 64, 200, 2000}) {
        SCOPED_TRACE(SizesName(sizes) + " tokens " + std::to_string(tokens));
        Ragged ragged;
        ragged.Add(tokens, 0, work);
        DeltaRuleProblem problem = Problem(sizes, ragged, 2, 47);
        for (int64_t n = 0; n < tokens; ++n) problem.SetBeta(n, n % 2 == 0 ? 0.0f : -0.0f);
        const std::vector<float> before(problem.slot(0), problem.slot(0) + problem.StateSize());
        Run(&problem);
        EXPECT_EQ(MaxError(problem.slot(work), before.data(), problem.StateSize()), 0.0);
        for (const float x : problem.out().Values()) ASSERT_TRUE(std::isfinite(x));
      }
    }
  }
}

TEST_P(CudaDeltaRuleChunksTest, ZeroAndOneBetaAmongOthers) {
  for (const DeltaRuleSizes& sizes : kHeadSizes) {
    for (const bool fresh : {false, true}) {
      SCOPED_TRACE(SizesName(sizes));
      Ragged ragged;
      ragged.Add(150, 0, 1, fresh);
      DeltaRuleProblem problem = Problem(sizes, ragged, 2, 48);
      for (const int64_t n : {0, 1, 2, 20, 63, 64, 88, 89, 149}) problem.SetBeta(n, 0.0f);
      for (const int64_t n : {3, 21, 22, 62, 65, 87, 148}) problem.SetBeta(n, 1.0f);
      RunAndCompare(Plain::kBfloat16Operands, &problem);
    }
  }
}

// With beta = 1 and a unit key that no other key of the chunk is near, a written value reads back.
TEST_P(CudaDeltaRuleChunksTest, AWrittenValueReadsBack) {
  for (const DeltaRuleSizes& sizes : kHeadSizes) {
    SCOPED_TRACE(SizesName(sizes));
    Ragged ragged;
    ragged.Add(64, 0, 0, /*fresh=*/true);
    DeltaRuleProblem problem = Problem(sizes, ragged, 1, 49);
    problem.inputs() = Rounded(problem.inputs(), DType::kBFloat16);
    problem.scale = 1;
    for (int64_t n = 0; n < 64; ++n) {
      problem.SetBeta(n, 1.0f);
      for (int64_t h = 0; h < sizes.heads; ++h) {
        for (int64_t i = 0; i < sizes.key_dim; ++i)
          problem.k(n, h)[i] = problem.q(n, h)[i] = i == n ? 1.0f : 0.0f;
      }
    }
    Run(&problem);
    for (int64_t n = 0; n < 64; ++n) {
      for (int64_t h = 0; h < sizes.heads; ++h) {
        EXPECT_TRUE(SameBits(problem.out(n) + h * sizes.value_dim, problem.v(n, h), sizes.value_dim)) << n;
      }
    }
  }
}

// Corrections that overshoot as far as they may, of keys that say nearly the same.
TEST_P(CudaDeltaRuleChunksTest, CorrelatedKeysAndBetaNearTwo) {
  for (const auto& [rows, tokens] :
       {std::pair<int32_t, int64_t>(6, 300), std::pair<int32_t, int64_t>(2, 2500)}) {
    Ragged ragged;
    for (int32_t r = 0; r < rows; ++r) ragged.Add(tokens, r, r, r % 2 == 1);
    for (const DeltaRuleSizes& sizes : kHeadSizes) {
      for (const bool below : {false, true}) {
        SCOPED_TRACE(SizesName(sizes) + " tokens " + std::to_string(tokens));
        DeltaRuleProblem problem = Problem(sizes, ragged, rows, 50);
        problem.CorrelateKeys();
        for (int64_t n = 0; n < rows * tokens; ++n)
          problem.SetBeta(n, below ? 2 * *problem.beta(n, 0) : 1.99f);
        RunAndCompare(Plain::kAllBfloat16, &problem);
      }
    }
  }
}

// One key over and over: what a chunk has to invert is as far from 1 as it gets.
TEST_P(CudaDeltaRuleChunksTest, TheSameKeyOverAndOver) {
  for (const DeltaRuleSizes& sizes : kHeadSizes) {
    for (const float beta : {0.5f, 1.0f, 1.5f, 1.99f, 2.0f}) {
      for (const int64_t tokens : {64, 130, 2048}) {
        SCOPED_TRACE(SizesName(sizes) + " beta " + std::to_string(beta) + " tokens " +
                     std::to_string(tokens));
        Ragged ragged;
        ragged.Add(tokens, 0, 1);
        DeltaRuleProblem problem = Problem(sizes, ragged, 2, 51);
        for (int64_t n = 0; n < tokens; ++n) {
          problem.SetBeta(n, beta);
          for (int64_t h = 0; h < sizes.heads; ++h)
            std::copy_n(problem.k(0, h), sizes.key_dim, problem.k(n, h));
        }
        RunAndCompare(Plain::kAllBfloat16, &problem);
      }
    }
  }
}

TEST_P(CudaDeltaRuleChunksTest, LongRowKeepsItsAccuracy) {
  for (const DeltaRuleSizes& sizes :
       {DeltaRuleSizes{1, 64, 64}, DeltaRuleSizes{1, 128, 128}, DeltaRuleSizes{1, 256, 256}}) {
    SCOPED_TRACE(SizesName(sizes));
    Ragged ragged;
    ragged.Add(sizes.key_dim > 128 ? 8192 : 32768, 0, 0);  // The host's arithmetic takes its time.
    DeltaRuleProblem problem = Problem(sizes, ragged, 1, 52);
    RunAndCompare(Plain::kBfloat16Operands, &problem);
  }
}

TEST_P(CudaDeltaRuleChunksTest, OnlySlotsOfTheRowsAreWritten) {
  for (const DeltaRuleSizes& sizes : kHeadSizes) {
    for (const int64_t tokens : {70, 2000}) {
      SCOPED_TRACE(SizesName(sizes) + " tokens " + std::to_string(tokens));
      Ragged ragged;
      ragged.Add(tokens, 0, 2);
      ragged.Add(0, 4, 5);
      DeltaRuleProblem problem = Problem(sizes, ragged, 7, 53), before = Problem(sizes, ragged, 7, 53);
      Run(&problem);
      for (const int64_t slot : {0, 1, 3, 4, 6}) {
        EXPECT_TRUE(SameBits(problem.slot(slot), before.slot(slot), before.slot_stride())) << "slot " << slot;
      }
      EXPECT_TRUE(SameBits(problem.slot(5), before.slot(4), before.StateSize()));
    }
  }
}

// A row's bits do not depend on the rows beside it, though their number decides how the work is cut.
TEST_P(CudaDeltaRuleChunksTest, BatchMatesDoNotMatter) {
  for (const DeltaRuleSizes& sizes : kHeadSizes) {
    SCOPED_TRACE(SizesName(sizes));
    Ragged together;
    constexpr int32_t kRows = 80;
    for (int32_t r = 0; r < kRows; ++r) together.Add(17 + (r * 37) % 200, r, r);
    DeltaRuleProblem all = Problem(sizes, together, kRows, 54), apart = Problem(sizes, together, kRows, 54);
    Run(&all);
    DeltaRuleOnDevice on_device(&apart, DType::kBFloat16, /*aligned=*/true, GetParam());
    for (int32_t r = 0; r < kRows; ++r) {
      Ragged alone;
      alone.Add(together.offsets[r + 1] - together.offsets[r], r, r);
      on_device.Step(alone, together.offsets[r]);
    }
    on_device.Finish();
    EXPECT_TRUE(SameBits(all.out().data(), apart.out().data(), all.out().size()));
    for (int32_t r = 0; r < kRows; ++r) {
      EXPECT_TRUE(SameBits(all.slot(r), apart.slot(r), all.StateSize())) << "row " << r;
    }
  }
}

TEST_P(CudaDeltaRuleChunksTest, NonFiniteStateIsToldOfItsOwnRowOnly) {
  for (const DeltaRuleSizes& sizes : kHeadSizes) {
    SCOPED_TRACE(SizesName(sizes));
    Ragged ragged;
    // Row 2 ends within a chunk whose other tokens would be row 3's, which are infinite.
    for (int32_t r = 0; r < 5; ++r) ragged.Add(r == 4 ? 0 : 74 + 10 * r, r, r + 5);
    DeltaRuleProblem healthy = Problem(sizes, ragged, 10, 55), problem = Problem(sizes, ragged, 10, 55);
    Run(&healthy);
    EXPECT_EQ(healthy.nonfinite(), (std::vector<int32_t>{0, 0, 0, 0, 0}));
    for (int64_t h = 0; h < sizes.heads; ++h) {
      problem.v(ragged.offsets[3], h)[sizes.value_dim - 1] = std::numeric_limits<float>::infinity();
      problem.k(ragged.offsets[3], h)[0] = kNaN;
      problem.q(ragged.offsets[3], h)[1] = kNaN;
      *problem.beta(ragged.offsets[3], h) = kNaN;
    }
    problem.slot(1)[problem.StateSize() - 1] = kNaN;
    problem.nonfinite()[4] = 7;  // Where all is well it is left alone.
    Run(&problem);
    EXPECT_EQ(problem.nonfinite(), (std::vector<int32_t>{0, 1, 0, 1, 7}));
    for (const int64_t r : {0, 2, 4}) {
      EXPECT_TRUE(SameBits(problem.slot(r + 5), healthy.slot(r + 5), healthy.StateSize())) << "row " << r;
      EXPECT_TRUE(SameBits(problem.out(ragged.offsets[r]), healthy.out(ragged.offsets[r]),
                           (ragged.offsets[r + 1] - ragged.offsets[r]) * healthy.OutWidth()))
          << "row " << r;
    }
  }
}

const DeltaRuleSizes kSplitSizes[] = {{2, 64, 64}, {2, 128, 128}};

// Long rows, whose ends are within chunks, beside short ones.
TEST_P(CudaDeltaRuleChunksTest, SplitRowsBesideOthers) {
  std::mt19937 generator(8);
  Ragged ragged;
  constexpr int32_t kRows = 20;
  for (int32_t r = 0; r < kRows; ++r) {
    const int64_t tokens = r == 3 ? 3001 : r == 12 ? 2500 : r == 13 ? 900 : generator() % 200;
    ragged.Add(tokens, 2 * r, 2 * r + r % 2, r % 4 == 0);
  }
  for (const DeltaRuleSizes& sizes : kSplitSizes) {
    SCOPED_TRACE(SizesName(sizes));
    std::vector<int32_t> plan(MaxChunkPlanSize(kRows, sizes.heads, sizes.value_dim, 132));
    EXPECT_GE(PlanChunks(ragged.offsets, sizes.heads, sizes.value_dim, 132, /*splits=*/true, plan.data())
                  .split_rows,
              2);
    DeltaRuleProblem problem = Problem(sizes, ragged, 2 * kRows, 56);
    RunAndCompare(Plain::kBfloat16Operands, &problem);
  }
}

// Row 1's state is not finite from the start, row 2's from a token between its ends on.
TEST_P(CudaDeltaRuleChunksTest, SplitRowsTellOfANonFiniteState) {
  for (const DeltaRuleSizes& sizes : kSplitSizes) {
    SCOPED_TRACE(SizesName(sizes));
    Ragged ragged;
    for (int32_t r = 0; r < 4; ++r) ragged.Add(1700, r, r + 4);
    DeltaRuleProblem healthy = Problem(sizes, ragged, 8, 57), problem = Problem(sizes, ragged, 8, 57);
    Run(&healthy);
    EXPECT_EQ(healthy.nonfinite(), (std::vector<int32_t>{0, 0, 0, 0}));
    problem.slot(1)[problem.StateSize() - 1] = kNaN;
    problem.v(ragged.offsets[2] + 800, 0)[0] = std::numeric_limits<float>::infinity();
    Run(&problem);
    EXPECT_EQ(problem.nonfinite(), (std::vector<int32_t>{0, 1, 1, 0}));
    for (const int64_t r : {0, 3}) {
      EXPECT_TRUE(SameBits(problem.slot(r + 4), healthy.slot(r + 4), healthy.StateSize())) << "row " << r;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Outputs, CudaDeltaRuleChunksTest, BothDTypes(), DTypeParamName);

}  // namespace
}  // namespace deltanet
