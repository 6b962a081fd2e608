#include "model/ops/short_conv.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "gtest/gtest.h"
#include "tests/model/ops/op_test_util.h"
#include "tests/model/ops/short_conv_problem.h"

namespace deltanet {
namespace {

class ShortConvTest : public IsaTest {};

TEST_P(ShortConvTest, MatchesTheReferenceHoweverItIsCut) {
  ForEachShortConvMixer([](const ShortConvMixer& mixer) {
    for (const bool threads : {false, true}) {
      CheckShortConv(ShortConvProblem(mixer), [&](ShortConvStep* step) {
        const absl::Status status = ShortConvQkv(step->ragged.rows(), step->Args(),
                                                 threads ? ThreadedContext() : SerialContext());
        ASSERT_TRUE(status.ok()) << status;
      });
    }
  });
}

// One head of two keys and one value, two taps, by hand.
TEST_P(ShortConvTest, ByHand) {
  Ragged ragged;
  ragged.Add(2, 0, 0);
  const std::vector<float> z = {3, 0, 0, -1, /**/ 1, -2, 0, 0, /**/ 2, -9, 0, 0, 0, 0, 0, 0};
  const std::vector<float> weight = {10, 1, 1, 1, 1, 1, 1, 1, 1, 1};
  Guarded pool(5), out(12);
  const float tail[] = {0.4f, 4, 0, 1, 0};
  std::copy_n(tail, 5, pool.data());
  ShortConvQkvArgs args{.heads = 1,
                        .key_dim = 2,
                        .value_dim = 1,
                        .activation = QkActivation::kIdentity,
                        .norm = QkNorm::kSum,
                        .beta_scale = 2.0f,
                        .taps = 2,
                        .z = z.data(),
                        .z_stride = 8,
                        .weight = weight.data(),
                        .tail = {.pool = pool.data(), .slot_stride = 5},
                        .out = out.data(),
                        .out_stride = 6};
  ASSERT_TRUE(ShortConvQkv(ragged.rows(), args, SerialContext()).ok());
  // q of token 0: 10 * 0.4 + 3 = 7 and 4 + 0 = 4; its k: 0 and 1 - 1 = 0, whose sum is 0; v: 0 + 1 = 1.
  EXPECT_FLOAT_EQ(out[0], 7.0f / 11);
  EXPECT_FLOAT_EQ(out[1], 4.0f / 11);
  EXPECT_TRUE(std::isnan(out[2]) && std::isnan(out[3]));
  EXPECT_FLOAT_EQ(out[4], 1 / (1 + std::exp(-1.0f)));
  EXPECT_FLOAT_EQ(out[5], 2 / (1 + std::exp(2.0f)));
  // q of token 1: 30 + 2 = 32 and 0 - 9 = -9; its k: 0 and -1 + 0 = -1; v: 1 + 0 = 1.
  EXPECT_FLOAT_EQ(out[6], 32.0f / 23);
  EXPECT_FLOAT_EQ(out[7], -9.0f / 23);
  EXPECT_FLOAT_EQ(out[8], 0.0f);
  EXPECT_FLOAT_EQ(out[9], 1.0f);
  EXPECT_FLOAT_EQ(out[10], 1 / (1 + std::exp(-1.0f)));
  EXPECT_FLOAT_EQ(out[11], 1.0f);
  EXPECT_EQ(pool.Values(), (std::vector<float>{2, -9, 0, 0, 0}));
}

TEST_P(ShortConvTest, ZeroKeysStayZeroAndExtremesAreRight) {
  Ragged ragged;
  ragged.Add(1, -1, 0, true);
  const auto run = [&](QkActivation activation, QkNorm norm, float a, float b) {
    const std::vector<float> z = {a, b, a, b, 0, 0};
    Guarded out(6);
    EXPECT_TRUE(ShortConvQkv(ragged.rows(),
                             {.heads = 1,
                              .key_dim = 2,
                              .value_dim = 1,
                              .activation = activation,
                              .norm = norm,
                              .taps = 0,
                              .z = z.data(),
                              .z_stride = 6,
                              .out = out.data(),
                              .out_stride = 6},
                             SerialContext())
                    .ok());
    EXPECT_TRUE(SameBits(out.data(), out.data() + 2, 2));
    EXPECT_TRUE(out.GuardsIntact());
    return std::vector<float>{out[0], out[1]};
  };
  ExpectZeroKeysAndExtremes(run);
}

// What one session feeds shows in none of the others, and not in its own other heads.
TEST_P(ShortConvTest, NaNStaysInItsRowAndHead) {
  const ShortConvMixer mixer{.heads = 2, .key_dim = 20, .value_dim = 9};
  const ShortConvProblem healthy(mixer);
  ShortConvProblem sick(mixer);
  constexpr int64_t kSick = 5, kAt = 3;
  sick.sequences[kSick][kAt * mixer.z_width() + mixer.key_dim + 2] = kNaN;  // In q of head 1.
  const auto run = [](const ShortConvProblem& problem) {
    ShortConvStep step(problem);
    step.Start();
    for (int32_t s = 0; s < 7; ++s) step.Add(s, 0, problem.lengths[s], -1, 2 * s, true);
    step.out = Guarded(step.ragged.offsets.back() * problem.out_stride());
    EXPECT_TRUE(ShortConvQkv(step.ragged.rows(), step.Args(), ThreadedContext()).ok());
    return step;
  };
  ShortConvStep want = run(healthy), got = run(sick);
  for (int64_t r = 0; r < 7; ++r) {
    for (int64_t n = want.ragged.offsets[r]; n < want.ragged.offsets[r + 1]; ++n) {
      const int64_t t = n - want.ragged.offsets[r];
      for (int64_t i = 0; i < mixer.out_width(); ++i) {
        const int64_t at = n * healthy.out_stride() + i;
        if (r == kSick && t >= kAt && t < kAt + mixer.taps && i >= mixer.key_dim && i < 2 * mixer.key_dim) {
          ASSERT_TRUE(std::isnan(got.out[at])) << "token " << t << " value " << i;
        } else {
          ASSERT_EQ(got.out[at], want.out[at]) << "row " << r << " token " << t << " value " << i;
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Isa, ShortConvTest, EveryIsa(),
                         [](const auto& info) { return IsaName(info.param); });

TEST(ShortConvContractTest, RefusesWhatItCannotDo) {
  const RaggedRows none;
  const ShortConvQkvArgs good{
      .heads = 2, .key_dim = 2, .value_dim = 3, .taps = 4, .z_stride = 16, .out_stride = 16};
  const auto code = [&](auto change, const OpContext& context = SerialContext()) {
    ShortConvQkvArgs args = good;
    change(&args);
    return ShortConvQkv(none, args, context).code();
  };
  using Args = ShortConvQkvArgs;
  const auto refused = absl::StatusCode::kInvalidArgument;
  EXPECT_EQ(code([](Args*) {}), absl::StatusCode::kOk);
  EXPECT_EQ(code([](Args* args) { args->heads = 0; }), refused);
  EXPECT_EQ(code([](Args* args) { args->key_dim = 0; }), refused);
  EXPECT_EQ(code([](Args* args) { args->value_dim = 0; }), refused);
  EXPECT_EQ(code([](Args* args) { args->taps = -1; }), refused);
  EXPECT_EQ(code([](Args* args) { args->taps = kMaxShortConvTaps + 1; }), refused);
  EXPECT_EQ(code([](Args* args) { args->z_stride = 15; }), refused);
  EXPECT_EQ(code([](Args* args) { args->out_stride = 15; }), refused);
  EXPECT_EQ(code([](Args* args) { args->dtype = DType::kBFloat16; }), refused);
  // Without a beta, z has none.
  EXPECT_EQ(code([](Args* args) { args->has_beta = false, args->z_stride = 14; }), absl::StatusCode::kOk);
  EXPECT_EQ(code([](Args* args) { args->has_beta = false, args->z_stride = 13; }), refused);
  EXPECT_EQ(code([](Args* args) { args->has_beta = false, args->out_stride = 15; }), refused);
#ifndef DELTANET_CUDA
  EXPECT_EQ(code([](Args*) {}, CudaContext()), absl::StatusCode::kFailedPrecondition);
#endif
}

}  // namespace
}  // namespace deltanet
