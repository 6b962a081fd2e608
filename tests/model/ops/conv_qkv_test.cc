#include "model/ops/conv_qkv.h"

#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "tests/model/ops/conv_qkv_problem.h"
#include "tests/model/ops/op_test_util.h"

namespace deltanet {
namespace {

class GatherTapsTest : public IsaTest {};

TEST_P(GatherTapsTest, AnySplitSeesTheWholeSequence) {
  for (const int64_t width : {1, 16, 37}) {
    for (const int64_t lag : {0, 1, 5}) {
      for (const bool normed : {false, true}) {
        for (const bool threads : {false, true}) {
          SCOPED_TRACE("width " + std::to_string(width) + " lag " + std::to_string(lag) +
                       (normed ? " normed" : ""));
          const std::vector<float> scale = RandomNormal(width, 99);
          StreamTaps(
              SevenTapSequences(width, lag), normed ? scale.data() : nullptr, /*with_centre=*/lag != 5,
              static_cast<uint32_t>(width + lag),
              [&](TapStep* step) {
                ASSERT_TRUE(
                    GatherTaps(step->ragged.rows(), step->args, threads ? ThreadedContext() : SerialContext())
                        .ok());
              },
              [&](const TapSequence& sequence, int64_t position, const float* got) {
                std::vector<float> want = sequence.Raw(position);
                if (normed && sequence.Valid(position)) {
                  const std::vector<float> raw = want;
                  const AddRmsNormArgs args{.rows = 1,
                                            .width = width,
                                            .x = raw.data(),
                                            .scale = scale.data(),
                                            .normed = want.data()};
                  ASSERT_TRUE(AddRmsNorm(args, SerialContext()).ok());
                }
                ASSERT_TRUE(SameBits(got, want.data(), width));
              });
        }
      }
    }
  }
}

TEST_P(GatherTapsTest, FreshRowsReadNoSlot) {
  Ragged ragged;
  ragged.Add(1, -1, 0, true);
  ragged.Add(0, -1, 1, true);
  const std::vector<float> x = {5, 6};
  Guarded pool(8), taps(6);
  ASSERT_TRUE(
      GatherTaps(
          ragged.rows(),
          {.width = 2, .x = x.data(), .tail = {.pool = pool.data(), .slot_stride = 4}, .taps = taps.data()},
          SerialContext())
          .ok());
  EXPECT_EQ(taps.Values(), (std::vector<float>{0, 0, 0, 0, 5, 6}));
  EXPECT_EQ(pool.Values(), (std::vector<float>{0, 0, 5, 6, 0, 0, 0, 0}));
}

INSTANTIATE_TEST_SUITE_P(Isa, GatherTapsTest, EveryIsa(),
                         [](const auto& info) { return IsaName(info.param); });

class ConvQkvActivationTest : public IsaTest {};

TEST_P(ConvQkvActivationTest, MatchesTheReference) {
  ForEachMixer([](const Mixer& mixer, int64_t lag, int64_t centre_tap) {
    for (const bool threads : {false, true}) {
      MixerProblem problem(mixer, lag, centre_tap);
      ASSERT_TRUE(ConvQkvActivation(problem.ragged().rows(), problem.Args(),
                                    threads ? ThreadedContext() : SerialContext())
                      .ok());
      problem.Compare();
    }
  });
}

TEST_P(ConvQkvActivationTest, KeysOfZeroStayZeroAndNaNShows) {
  Ragged ragged;
  ragged.Add(2, 0, 0, false, 10);
  // Token 0: q = k = -1, which ReLU makes zero. Token 1: a NaN in v.
  std::vector<float> z = {-1, -1, -1, -1, 3, -3, 0, -1, -1, -1, -1, kNaN, -3, 0};
  const std::vector<float> bias(7, 0.0f), tap_bias(18, 0.0f);
  ASSERT_TRUE(ConvQkvActivation(ragged.rows(),
                                {.heads = 1,
                                 .key_dim = 2,
                                 .value_dim = 2,
                                 .centre_tap = 2,
                                 .z = z.data(),
                                 .z_stride = 7,
                                 .bias = bias.data(),
                                 .tap_bias = tap_bias.data()},
                                SerialContext())
                  .ok());
  EXPECT_EQ(std::vector<float>(z.begin(), z.begin() + 7), (std::vector<float>{0, 0, 0, 0, 3, 0, 0.5f}));
  EXPECT_TRUE(std::isnan(z[11]));
}

INSTANTIATE_TEST_SUITE_P(Isa, ConvQkvActivationTest, EveryIsa(),
                         [](const auto& info) { return IsaName(info.param); });

TEST(ConvQkvContractTest, RefuseWhatTheyCannotDo) {
  const RaggedRows none;
  EXPECT_EQ(GatherTaps(none, {.width = 0}, SerialContext()).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(GatherTaps(none, {.width = 1, .lag = -1}, SerialContext()).code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(GatherTaps(none, {.width = 1, .dtype = DType::kBFloat16}, SerialContext()).code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_TRUE(GatherTaps(none, {.width = 1}, SerialContext()).ok());

  const ConvQkvActivationArgs good{.heads = 1, .key_dim = 2, .value_dim = 3, .centre_tap = 1, .z_stride = 8};
  const auto code = [&](auto change, const OpContext& context = SerialContext()) {
    ConvQkvActivationArgs args = good;
    change(&args);
    return ConvQkvActivation(none, args, context).code();
  };
  EXPECT_EQ(code([](ConvQkvActivationArgs*) {}), absl::StatusCode::kOk);
  EXPECT_EQ(code([](ConvQkvActivationArgs* args) { args->heads = 0; }), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(code([](ConvQkvActivationArgs* args) { args->key_dim = 0; }), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(code([](ConvQkvActivationArgs* args) { args->value_dim = 0; }),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(code([](ConvQkvActivationArgs* args) { args->lag = -1; }), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(code([](ConvQkvActivationArgs* args) { args->centre_tap = 3; }),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(code([](ConvQkvActivationArgs* args) { args->z_stride = 7; }),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(code([](ConvQkvActivationArgs* args) { args->dtype = DType::kBFloat16; }),
            absl::StatusCode::kInvalidArgument);
#ifndef DELTANET_CUDA
  EXPECT_EQ(GatherTaps(none, {.width = 1}, CudaContext()).code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(code([](ConvQkvActivationArgs*) {}, CudaContext()), absl::StatusCode::kFailedPrecondition);
#endif
}

}  // namespace
}  // namespace deltanet
