// The operators on a GPU: each through its door, on device memory, in float32 and bfloat16, against float64.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "absl/functional/function_ref.h"
#include "gtest/gtest.h"
#include "model/ops/conv_qkv.h"
#include "model/ops/delta_rule.h"
#include "model/ops/delta_rule_cuda.h"
#include "model/ops/elementwise.h"
#include "model/ops/rms_norm.h"
#include "tests/model/ops/conv_qkv_problem.h"
#include "tests/model/ops/cuda_test_util.h"
#include "tests/model/ops/delta_rule_on_device.h"
#include "tests/model/ops/delta_rule_problem.h"
#include "tests/model/ops/norm_elementwise_problem.h"
#include "tests/model/ops/op_test_util.h"

namespace deltanet {
namespace {

// The kernel that goes token by token; cuda_delta_rule_test.cc has the other one.
class CudaDeltaRuleTest : public CudaTest {
 protected:
  CudaDeltaRuleTest() { SetDeltaRuleCudaPathForTesting(DeltaRuleCudaPath::kTokens); }
  ~CudaDeltaRuleTest() override { SetDeltaRuleCudaPathForTesting(DeltaRuleCudaPath::kDefault); }

  void Run(DeltaRuleProblem* problem, bool aligned = false) {
    DeltaRuleOnDevice on_device(problem, dtype(), aligned);
    on_device.Step(problem->ragged(), 0);
    on_device.Finish();
  }
  void RunAndCompare(DeltaRuleProblem* problem, bool aligned = false) {
    problem->inputs() = Rounded(problem->inputs(), dtype());
    problem->RunAndCompare([&] { Run(problem, aligned); });
  }

  // Calls `test` for heads of every size class, with memory as the engine lays it out and any other.
  static void ForEach(absl::FunctionRef<void(const DeltaRuleSizes&, bool aligned)> test) {
    for (const DeltaRuleSizes& sizes :
         {DeltaRuleSizes{1, 1, 1}, DeltaRuleSizes{2, 5, 3}, DeltaRuleSizes{3, 16, 31},
          DeltaRuleSizes{1, 32, 32}, DeltaRuleSizes{2, 33, 48}, DeltaRuleSizes{1, 64, 64},
          DeltaRuleSizes{2, 100, 75}, DeltaRuleSizes{2, 128, 128}, DeltaRuleSizes{1, 256, 40},
          DeltaRuleSizes{1, 300, 33}}) {
      for (const bool aligned : {false, true}) {
        SCOPED_TRACE(SizesName(sizes) + (aligned ? " aligned" : ""));
        test(sizes, aligned);
      }
    }
  }
};

TEST_P(CudaDeltaRuleTest, OneRowMatchesTheReference) {
  ForEach([&](const DeltaRuleSizes& sizes, bool aligned) {
    for (const int64_t tokens : {0, 1, 16, 17, 63, 64, 65, 100}) {
      SCOPED_TRACE(tokens);
      Ragged ragged;
      ragged.Add(tokens, 1, 1);
      DeltaRuleProblem problem(sizes, ragged, 3, 17, aligned);
      RunAndCompare(&problem, aligned);
    }
  });
}

TEST_P(CudaDeltaRuleTest, SevenRowsMatchTheReference) {
  ForEach([&](const DeltaRuleSizes& sizes, bool aligned) {
    DeltaRuleProblem problem(sizes, SevenRows(), 12, 18, aligned);
    RunAndCompare(&problem, aligned);
  });
}

TEST_P(CudaDeltaRuleTest, AnySplitGivesTheSameState) {
  constexpr int64_t kTokens = 150;
  Ragged whole;
  whole.Add(kTokens, 0, 1);
  ForEach([&](const DeltaRuleSizes& sizes, bool aligned) {
    for (const std::vector<int64_t>& pieces : Splits(kTokens)) {
      DeltaRuleProblem problem(sizes, whole, 2, 19, aligned);
      problem.inputs() = Rounded(problem.inputs(), dtype());
      problem.RunAndCompare([&] {
        DeltaRuleOnDevice on_device(&problem, dtype(), aligned);
        int64_t done = 0;
        for (const int64_t tokens : pieces) {
          Ragged piece;
          piece.Add(tokens, done == 0 ? 0 : 1, 1);
          on_device.Step(piece, done);
          done += tokens;
        }
        on_device.Finish();
        ASSERT_EQ(done, kTokens);
      });
    }
  });
}

TEST_P(CudaDeltaRuleTest, ZeroBetaLeavesTheStateAsItWas) {
  ForEach([&](const DeltaRuleSizes& sizes, bool aligned) {
    for (const int32_t work : {0, 1}) {
      for (const int64_t tokens : {1, 5, 70}) {
        Ragged ragged;
        ragged.Add(tokens, 0, work);
        DeltaRuleProblem problem(sizes, ragged, 2, 21, aligned);
        for (int64_t n = 0; n < tokens; ++n) problem.SetBeta(n, n % 2 == 0 ? 0.0f : -0.0f);
        const std::vector<float> before(problem.slot(0), problem.slot(0) + problem.StateSize());
        Run(&problem, aligned);
        EXPECT_EQ(MaxError(problem.slot(work), before.data(), problem.StateSize()), 0.0);
        for (const float x : problem.out().Values()) ASSERT_TRUE(std::isfinite(x));
      }
    }
  });
}

// Tokens before the start and after the end of a sequence have beta = 0, and one in the middle may; beta = 1
// replaces what a key stood for.
TEST_P(CudaDeltaRuleTest, ZeroAndOneBetaAmongOthers) {
  ForEach([&](const DeltaRuleSizes& sizes, bool aligned) {
    for (const bool fresh : {false, true}) {
      Ragged ragged;
      ragged.Add(90, 0, 1, fresh);
      DeltaRuleProblem problem(sizes, ragged, 2, 29, aligned);
      for (const int64_t n : {0, 1, 2, 20, 63, 64, 88, 89}) problem.SetBeta(n, 0.0f);
      for (const int64_t n : {3, 21, 22, 62, 65, 87}) problem.SetBeta(n, 1.0f);
      RunAndCompare(&problem, aligned);
    }
  });
}

// Corrections that overshoot as far as they may, of keys that say nearly the same.
TEST_P(CudaDeltaRuleTest, CorrelatedKeysAndBetaNearTwo) {
  constexpr int64_t kRows = 6, kTokens = 100;
  Ragged ragged;
  for (int32_t r = 0; r < kRows; ++r) ragged.Add(kTokens, r, r, r % 2 == 1);
  ForEach([&](const DeltaRuleSizes& sizes, bool aligned) {
    DeltaRuleProblem problem(sizes, ragged, kRows, 25, aligned);
    problem.CorrelateKeys();
    for (int64_t n = 0; n < kRows * kTokens; ++n) problem.SetBeta(n, 1.99f);
    RunAndCompare(&problem, aligned);
  });
}

// One key over and over, written in full each time: what a chunk has to invert is as far from 1 as it gets.
TEST_P(CudaDeltaRuleTest, TheSameKeyOverAndOver) {
  Ragged ragged;
  ragged.Add(130, 0, 1);
  ForEach([&](const DeltaRuleSizes& sizes, bool aligned) {
    DeltaRuleProblem problem(sizes, ragged, 2, 31, aligned);
    for (int64_t n = 0; n < 130; ++n) {
      problem.SetBeta(n, 1.0f);
      for (int64_t h = 0; h < sizes.heads; ++h) std::copy_n(problem.k(0, h), sizes.key_dim, problem.k(n, h));
    }
    RunAndCompare(&problem, aligned);
  });
}

TEST_P(CudaDeltaRuleTest, OnlySlotsOfTheRowsAreWritten) {
  ForEach([&](const DeltaRuleSizes& sizes, bool aligned) {
    Ragged ragged;
    ragged.Add(3, 0, 2);
    ragged.Add(0, 4, 5);
    DeltaRuleProblem problem(sizes, ragged, 7, 23, aligned), before(sizes, ragged, 7, 23, aligned);
    Run(&problem, aligned);
    for (const int64_t slot : {0, 1, 3, 4, 6}) {
      EXPECT_TRUE(SameBits(problem.slot(slot), before.slot(slot), before.slot_stride())) << "slot " << slot;
    }
    const int64_t state = before.StateSize(), padding = before.slot_stride() - state;
    EXPECT_TRUE(SameBits(problem.slot(5), before.slot(4), state));
    for (const int64_t slot : {2, 5}) {
      EXPECT_TRUE(SameBits(problem.slot(slot) + state, before.slot(slot) + state, padding))
          << "after " << slot;
    }
  });
}

TEST_P(CudaDeltaRuleTest, PaddingTouchesNothing) {
  ForEach([&](const DeltaRuleSizes& sizes, bool aligned) {
    CheckPadding(sizes, aligned, [&](DeltaRuleProblem* problem) { Run(problem, aligned); });
  });
}

TEST_P(CudaDeltaRuleTest, NonFiniteStateIsToldOfItsOwnRowOnly) {
  ForEach([&](const DeltaRuleSizes& sizes, bool aligned) {
    Ragged ragged;
    for (int32_t r = 0; r < 5; ++r) ragged.Add(r == 3 ? 0 : 4 + 70 * (r % 2), r, r + 5);
    DeltaRuleProblem healthy(sizes, ragged, 10, 24, aligned), problem(sizes, ragged, 10, 24, aligned);
    Run(&healthy, aligned);
    EXPECT_EQ(healthy.nonfinite(), (std::vector<int32_t>{0, 0, 0, 0, 0}));
    problem.v(ragged.offsets[1], sizes.heads - 1)[sizes.value_dim - 1] =
        std::numeric_limits<float>::infinity();
    problem.slot(3)[problem.StateSize() - 1] = kNaN;
    problem.nonfinite()[4] = 7;  // Where all is well it is left alone.
    Run(&problem, aligned);
    EXPECT_EQ(problem.nonfinite(), (std::vector<int32_t>{0, 1, 0, 1, 7}));
    for (const int64_t r : {0, 2, 4}) {
      EXPECT_TRUE(SameBits(problem.slot(r + 5), healthy.slot(r + 5), healthy.StateSize())) << "row " << r;
      EXPECT_TRUE(SameBits(problem.out(ragged.offsets[r]), healthy.out(ragged.offsets[r]),
                           (ragged.offsets[r + 1] - ragged.offsets[r]) * healthy.OutWidth()))
          << "row " << r;
    }
  });
}

TEST_P(CudaDeltaRuleTest, LongRowKeepsItsAccuracy) {
  Ragged ragged;
  ragged.Add(32768, 0, 0);
  for (const DeltaRuleSizes& sizes : {DeltaRuleSizes{1, 16, 16}, DeltaRuleSizes{1, 64, 64}}) {
    SCOPED_TRACE(SizesName(sizes));
    DeltaRuleProblem problem(sizes, ragged, 1, 26);
    RunAndCompare(&problem);
  }
}

TEST_P(CudaDeltaRuleTest, AnEmptyBatchDoesNothing) {
  DeltaRuleProblem problem(DeltaRuleSizes{1, 4, 4}, Ragged(), 1, 27);
  const std::vector<float> before(problem.slot(0), problem.slot(0) + problem.slot_stride());
  Run(&problem);
  EXPECT_TRUE(SameBits(problem.slot(0), before.data(), problem.slot_stride()));
}

INSTANTIATE_TEST_SUITE_P(DTypes, CudaDeltaRuleTest, BothDTypes(), DTypeParamName);

class CudaConvQkvTest : public CudaTest {};

TEST_P(CudaConvQkvTest, AnySplitSeesTheWholeSequence) {
  // With many tokens a block has more than one tap.
  constexpr struct {
    int64_t width, unit, most;
  } kCases[] = {{1, 4, 4}, {16, 4, 4}, {37, 4, 4}, {300, 4, 4}, {37, 40, 120}, {300, 40, 240}};
  for (const auto& [width, unit, most] : kCases) {
    for (const int64_t lag : {0, 1, 5}) {
      for (const bool normed : {false, true}) {
        SCOPED_TRACE("width " + std::to_string(width) + " lag " + std::to_string(lag) + " up to " +
                     std::to_string(most) + " tokens" + (normed ? " normed" : ""));
        const std::vector<float> scale = RandomNormal(width, 99);
        std::vector<float> fast, plain;  // Of all normed taps together.
        std::vector<double> exact;
        StreamTaps(
            SevenTapSequences(width, lag, unit), normed ? scale.data() : nullptr, /*with_centre=*/lag != 5,
            static_cast<uint32_t>(width + lag),
            [&](TapStep* step) {
              Mirror mirror;
              GatherTapsArgs args = step->args;
              args.dtype = dtype();
              args.x = mirror.Copy(step->x);
              if (normed) args.norm_scale = mirror.Copy(scale);
              args.tail.pool = mirror.Map(step->pool);
              args.taps = mirror.Map(&step->taps, dtype());
              if (args.centre != nullptr) args.centre = mirror.Map(&step->centre);
              const absl::Status status = GatherTaps(mirror.Rows(step->ragged), args, mirror.context());
              ASSERT_TRUE(status.ok()) << status;
              mirror.Finish();
            },
            [&](const TapSequence& sequence, int64_t position, const float* got) {
              const std::vector<float> raw = sequence.Raw(position);
              if (!normed || !sequence.Valid(position)) {
                ASSERT_TRUE(SameBits(got, Rounded(raw, dtype()).data(), width));
                return;
              }
              const std::vector<float> by_plain = RmsNormReference(raw, 1, width, scale.data());
              const std::vector<double> by_exact =
                  RmsNormReference(std::vector<double>(raw.begin(), raw.end()), 1, width, scale.data());
              fast.insert(fast.end(), got, got + width);
              plain.insert(plain.end(), by_plain.begin(), by_plain.end());
              exact.insert(exact.end(), by_exact.begin(), by_exact.end());
            },
            most);
        ExpectAsGoodAsPlain(fast.data(), plain.data(), exact.data(), static_cast<int64_t>(fast.size()),
                            "normed taps", dtype());
      }
    }
  }
}

TEST_P(CudaConvQkvTest, FreshRowsReadNoSlot) {
  Ragged ragged;
  ragged.Add(1, -1, 0, true);
  ragged.Add(0, -1, 1, true);
  const std::vector<float> x = {5, 6};
  Guarded pool(8), taps(6);
  Mirror mirror;
  ASSERT_TRUE(GatherTaps(mirror.Rows(ragged),
                         {.width = 2,
                          .x = mirror.Copy(x),
                          .tail = {.pool = mirror.Map(&pool), .slot_stride = 4},
                          .dtype = dtype(),
                          .taps = mirror.Map(&taps, dtype())},
                         mirror.context())
                  .ok());
  mirror.Finish();
  EXPECT_EQ(taps.Values(), (std::vector<float>{0, 0, 0, 0, 5, 6}));
  EXPECT_EQ(pool.Values(), (std::vector<float>{0, 0, 5, 6, 0, 0, 0, 0}));
}

TEST_P(CudaConvQkvTest, ActivationMatchesTheReference) {
  ForEachMixer([&](const Mixer& mixer, int64_t lag, int64_t centre_tap) {
    for (const int64_t longest : {63, 180, 500}) {  // A token has the fewer blocks, the more there are.
      const bool aligned = longest != 180;
      MixerProblem problem(mixer, lag, centre_tap, dtype(), longest);
      Mirror mirror(aligned);
      ConvQkvActivationArgs args = problem.Args();
      args.z = mirror.Map(&problem.z(), dtype());
      args.bias = mirror.Copy(problem.bias);
      args.tap_bias = mirror.Copy(problem.tap_bias);
      const absl::Status status = ConvQkvActivation(mirror.Rows(problem.ragged()), args, mirror.context());
      ASSERT_TRUE(status.ok()) << status;
      mirror.Finish();
      problem.Compare();
    }
  });
}

TEST_P(CudaConvQkvTest, KeysOfZeroStayZeroAndNaNShows) {
  Ragged ragged;
  ragged.Add(2, 0, 0, false, 10);
  // Token 0: q = k = -1, which ReLU makes zero. Token 1: a NaN in v.
  const std::vector<float> z = {-1, -1, -1, -1, 3, -3, 0, -1, -1, -1, -1, kNaN, -3, 0};
  Guarded out(14);
  std::copy(z.begin(), z.end(), out.data());
  Mirror mirror;
  ASSERT_TRUE(ConvQkvActivation(mirror.Rows(ragged),
                                {.heads = 1,
                                 .key_dim = 2,
                                 .value_dim = 2,
                                 .centre_tap = 2,
                                 .dtype = dtype(),
                                 .z = mirror.Map(&out, dtype()),
                                 .z_stride = 7,
                                 .bias = mirror.Copy(std::vector<float>(7, 0.0f)),
                                 .tap_bias = mirror.Copy(std::vector<float>(18, 0.0f))},
                                mirror.context())
                  .ok());
  mirror.Finish();
  const std::vector<float> got = out.Values();
  EXPECT_EQ(std::vector<float>(got.begin(), got.begin() + 7), (std::vector<float>{0, 0, 0, 0, 3, 0, 0.5f}));
  EXPECT_TRUE(std::isnan(got[11]));
}

INSTANTIATE_TEST_SUITE_P(DTypes, CudaConvQkvTest, BothDTypes(), DTypeParamName);

// Those of which a thread holds one, two, four or eight vectors, full and not, and those that are too wide.
const int64_t kNormWidths[] = {1,    3,    16,   17,   64,   100,  300,  1025,
                               1024, 1028, 2048, 2052, 3000, 5004, 8192, 8196};

class CudaNormTest : public CudaTest {};

TEST_P(CudaNormTest, MatchesTheReferenceWithAndWithoutEachPart) {
  for (const int64_t d : kNormWidths) {
    for (int parts = 0; parts < 2 * NormProblem::kPartsEnd; ++parts) {
      const bool aligned = parts >= NormProblem::kPartsEnd;
      SCOPED_TRACE("width " + std::to_string(d) + " parts " + std::to_string(parts) +
                   (aligned ? " aligned" : ""));
      NormProblem problem(d, parts % NormProblem::kPartsEnd, dtype());
      Mirror mirror(aligned);
      AddRmsNormArgs args = problem.args;
      args.x = mirror.Copy(problem.x);
      if (args.gather != nullptr) args.gather = mirror.Copy(problem.gather);
      if (args.bias != nullptr) args.bias = mirror.Copy(problem.bias);
      args.scale = mirror.Copy(problem.scale);
      if (args.sum != nullptr) args.sum = mirror.Map(&problem.sum);
      args.normed = mirror.Map(&problem.normed, dtype());
      const absl::Status status = AddRmsNorm(args, mirror.context());
      ASSERT_TRUE(status.ok()) << status;
      mirror.Finish();
      problem.Compare();
    }
  }
}

TEST_P(CudaNormTest, InPlaceGivesTheSameBits) {
  constexpr int64_t kRows = 5;
  for (const int64_t d : kNormWidths) {
    const std::vector<float> x = RandomNormal(kRows * d, 5), bias = RandomNormal(d, 7),
                             scale = RandomNormal(d, 8);
    // Runs with sum and normed apart, or the sum in x, or nothing but what is normed (in float32) there.
    enum Place { kApart, kSumInX, kNormedInX };
    struct Result {
      Guarded x, sum, normed;
    };
    const auto run = [&](Place place, bool aligned) {
      Result result{Guarded(kRows * d), Guarded(kRows * d), Guarded(kRows * d)};
      std::copy(x.begin(), x.end(), result.x.data());
      Mirror mirror(aligned);
      float* const mapped = mirror.Map(&result.x);
      AddRmsNormArgs args{.rows = kRows,
                          .width = d,
                          .x = mapped,
                          .bias = mirror.Copy(bias),
                          .sum = mirror.Map(&result.sum),
                          .scale = mirror.Copy(scale),
                          .normed_dtype = place == kNormedInX ? DType::kFloat32 : dtype(),
                          .normed = mirror.Map(&result.normed, dtype())};
      if (place == kSumInX) args.sum = mapped;
      if (place == kNormedInX) args.sum = nullptr, args.normed = mapped;
      EXPECT_TRUE(AddRmsNorm(args, mirror.context()).ok());
      mirror.Finish();
      EXPECT_TRUE(result.x.GuardsIntact() && result.sum.GuardsIntact() && result.normed.GuardsIntact());
      return result;
    };
    const int64_t values = kRows * d;
    for (const bool aligned : {false, true}) {
      SCOPED_TRACE("width " + std::to_string(d) + (aligned ? " aligned" : ""));
      Result apart = run(kApart, aligned), sum_in_x = run(kSumInX, aligned),
             normed_in_x = run(kNormedInX, aligned);
      EXPECT_TRUE(SameBits(sum_in_x.x.data(), apart.sum.data(), values));
      EXPECT_TRUE(SameBits(sum_in_x.normed.data(), apart.normed.data(), values));
      EXPECT_EQ(Rounded(normed_in_x.x.Values(), dtype()), apart.normed.Values());
    }
  }
}

TEST_P(CudaNormTest, WithoutAScaleOnlyTheSumIsWritten) {
  for (const int64_t d : kNormWidths) {
    const std::vector<float> x = RandomNormal(3 * d, 13), bias = RandomNormal(d, 14);
    std::vector<float> want(3 * d);
    for (int64_t i = 0; i < 3 * d; ++i) want[i] = x[i] + bias[i % d];
    Guarded sum(3 * d), normed(3 * d);
    Mirror mirror(/*aligned=*/d % 4 == 0);
    AddRmsNormArgs args{
        .rows = 3, .width = d, .x = mirror.Copy(x), .bias = mirror.Copy(bias), .sum = mirror.Map(&sum)};
    ASSERT_TRUE(AddRmsNorm(args, mirror.context()).ok());
    args.sum = nullptr;
    args.normed_dtype = dtype();
    args.normed = mirror.Map(&normed, dtype());
    ASSERT_TRUE(AddRmsNorm(args, mirror.context()).ok());
    mirror.Finish();
    EXPECT_EQ(sum.Values(), want);
    EXPECT_EQ(normed.Values(), Rounded(want, dtype()));
    EXPECT_TRUE(sum.GuardsIntact() && normed.GuardsIntact());
  }
}

TEST_P(CudaNormTest, ZerosStayZero) {
  const std::vector<float> x(20, 0.0f), scale(20, 3.0f);
  Guarded normed(20);
  Mirror mirror;
  ASSERT_TRUE(AddRmsNorm({.rows = 1,
                          .width = 20,
                          .x = mirror.Copy(x),
                          .scale = mirror.Copy(scale),
                          .normed_dtype = dtype(),
                          .normed = mirror.Map(&normed, dtype())},
                         mirror.context())
                  .ok());
  mirror.Finish();
  EXPECT_EQ(normed.Values(), x);
}

INSTANTIATE_TEST_SUITE_P(DTypes, CudaNormTest, BothDTypes(), DTypeParamName);

class CudaElementwiseTest : public CudaTest {
 protected:
  // Runs over [rows, 2f] values, which `dtype()` holds.
  Guarded Gated(GateKind kind, int64_t rows, int64_t f, const std::vector<float>& x, const float* bias,
                bool aligned = false) {
    Guarded out(rows * f);
    Mirror mirror(aligned);
    EXPECT_TRUE(
        GatedUnit({.kind = kind,
                   .rows = rows,
                   .width = f,
                   .dtype = dtype(),
                   .x = mirror.Copy(x, dtype()),
                   .bias = bias != nullptr ? mirror.Copy(std::vector<float>(bias, bias + 2 * f)) : nullptr,
                   .out = mirror.Map(&out, dtype())},
                  mirror.context())
            .ok());
    mirror.Finish();
    EXPECT_TRUE(out.GuardsIntact());
    return out;
  }
};

TEST_P(CudaElementwiseTest, GatedUnitMatchesTheReference) {
  for (const int64_t f : {1, 3, 7, 8, 12, 16, 17, 64, 100, 129, 256, 300, 1025, 1028, 2056}) {
    constexpr int64_t kRows = 6;
    const std::vector<float> x = Rounded(RandomNormal(kRows * 2 * f, 9, 3.0f), dtype()),
                             bias = RandomNormal(2 * f, 10);
    for (const GateKind kind : {GateKind::kSigmoidSecond, GateKind::kSiluFirst}) {
      for (const float* b : {static_cast<const float*>(nullptr), bias.data()}) {
        for (const bool aligned : {false, true}) {
          Guarded out = Gated(kind, kRows, f, x, b, aligned);
          ExpectAsGoodAsPlain(out.data(), GatedReference<float>(kind, kRows, f, x, b).data(),
                              GatedReference<double>(kind, kRows, f, x, b).data(), kRows * f,
                              std::to_string(f), dtype());
        }
      }
    }
  }
}

// The sigmoid alone, over all that a float32 can tell from 0 and 1: relative error, down to the smallest
// normal number, against twice that of plain code.
TEST_P(CudaElementwiseTest, SigmoidKeepsItsRelativeAccuracy) {
  constexpr int64_t kPoints = 200001;
  std::vector<float> x(2 * kPoints, 1.0f);
  for (int64_t i = 0; i < kPoints; ++i) x[kPoints + i] = -100.0f + 0.001f * static_cast<float>(i);
  x = Rounded(x, dtype());
  Guarded out = Gated(GateKind::kSigmoidSecond, 1, kPoints, x, nullptr);
  const std::vector<float> plain = GatedReference<float>(GateKind::kSigmoidSecond, 1, kPoints, x, nullptr);
  const std::vector<double> exact = GatedReference<double>(GateKind::kSigmoidSecond, 1, kPoints, x, nullptr);
  const auto worst = [&](const float* values) {
    double worst = 0;
    for (int64_t i = 0; i < kPoints; ++i) {
      const double error = std::fabs(values[i] - exact[i]) - 2 * std::numeric_limits<float>::min();
      if (!(error / exact[i] <= worst)) worst = error / exact[i];
    }
    return worst;
  };
  const double rounding = dtype() == DType::kBFloat16 ? 1.0 / 256 : 0;
  EXPECT_LE(worst(out.data()), 2 * worst(plain.data()) + kEpsilon + rounding);
}

TEST_P(CudaElementwiseTest, ExtremesAndNonFiniteValues) {
  const auto [second, want] = ExtremesOfSigmoid();
  const int64_t f = static_cast<int64_t>(second.size());
  std::vector<float> x(f, 2.0f);
  x.insert(x.end(), second.begin(), second.end());
  for (const bool aligned : {false, true}) {
    Guarded out = Gated(GateKind::kSigmoidSecond, 1, f, x, nullptr, aligned);
    for (int64_t i = 0; i < f; ++i) {
      if (std::isnan(want[i])) {
        EXPECT_TRUE(std::isnan(out[i]));
      } else {
        EXPECT_NEAR(out[i], want[i], 1e-37) << second[i];
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(DTypes, CudaElementwiseTest, BothDTypes(), DTypeParamName);

// What the doors promise of a device without touching it: these need no GPU.
TEST(CudaOpsContractTest, RefuseWhatTheyCannotDo) {
  const RaggedRows none;
  const auto refused = absl::StatusCode::kInvalidArgument;
  const DType half = DType::kFloat16;
  EXPECT_EQ(
      DeltaRule(none, {.heads = 1, .key_dim = 2, .value_dim = 2, .dtype = half, .state = {.slot_stride = 4}},
                CudaContext())
          .code(),
      refused);
  EXPECT_EQ(DeltaRule(none, {.heads = 0}, CudaContext()).code(), refused);
  EXPECT_EQ(GatherTaps(none, {.width = 1, .dtype = half}, CudaContext()).code(), refused);
  EXPECT_EQ(GatherTaps(none, {.width = 0}, CudaContext()).code(), refused);
  ConvQkvActivationArgs mixer{.heads = 1, .key_dim = 2, .value_dim = 3, .dtype = half, .z_stride = 8};
  EXPECT_EQ(ConvQkvActivation(none, mixer, CudaContext()).code(), refused);
  float value = 0;
  const AddRmsNormArgs norm{.rows = 0, .width = 4, .scale = &value, .normed_dtype = half, .normed = &value};
  EXPECT_EQ(AddRmsNorm(norm, CudaContext()).code(), refused);
  EXPECT_EQ(GatedUnit({.rows = 0, .width = 1, .dtype = half}, CudaContext()).code(), refused);
  EXPECT_EQ(Embed(none, {.width = 0}, CudaContext()).code(), refused);
  EXPECT_EQ(Embed(none, {.width = 1, .dtype = half}, CudaContext()).code(), refused);
}

TEST(CudaOpsContractTest, NothingToDoIsDone) {
  const RaggedRows none;
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    EXPECT_TRUE(GatherTaps(none, {.width = 1, .dtype = dtype}, CudaContext()).ok());
    EXPECT_TRUE(ConvQkvActivation(none,
                                  {.heads = 1, .key_dim = 2, .value_dim = 3, .dtype = dtype, .z_stride = 8},
                                  CudaContext())
                    .ok());
    float value = 0;
    EXPECT_TRUE(
        AddRmsNorm({.rows = 0, .width = 4, .normed_dtype = dtype, .normed = &value}, CudaContext()).ok());
    EXPECT_TRUE(GatedUnit({.rows = 0, .width = 1, .dtype = dtype}, CudaContext()).ok());
  }
  EXPECT_TRUE(Embed(none, {.width = 1}, CudaContext()).ok());
}

}  // namespace
}  // namespace deltanet
