#include "model/ops/delta_net_mixer.h"

#include "gtest/gtest.h"
#include "tests/model/ops/delta_net_mixer_problem.h"
#include "tests/model/ops/op_test_util.h"

namespace deltanet {
namespace {

class DeltaNetMixerTest : public IsaTest {};

TEST_P(DeltaNetMixerTest, MatchesTheReferenceHoweverItIsCut) {
  ForEachDeltaNetMixer([](const DeltaNetMixerCase& mixer) {
    CheckDeltaNetMixer(DeltaNetMixerProblem(mixer, DType::kFloat32, /*aligned=*/false),
                       [](DeltaNetMixerStep* step) {
                         const absl::Status status =
                             DeltaNetMixer(step->ragged.rows(), step->Args(), ThreadedContext());
                         ASSERT_TRUE(status.ok()) << status;
                       });
  });
}

INSTANTIATE_TEST_SUITE_P(Isas, DeltaNetMixerTest, EveryIsa(),
                         [](const auto& info) { return IsaName(info.param); });

TEST(DeltaNetMixer, RefusesPartsThatDoNotFit) {
  const DeltaNetMixerProblem problem({.front = {.heads = 2, .key_dim = 4, .value_dim = 4}}, DType::kFloat32,
                                     /*aligned=*/false);
  const auto status = [&](auto change) {
    DeltaNetMixerStep step(problem);
    step.MakeOutputs();
    DeltaNetMixerArgs args = step.Args();
    change(&args);
    return DeltaNetMixer(step.ragged.rows(), args, SerialContext()).code();
  };
  EXPECT_EQ(status([](DeltaNetMixerArgs*) {}), absl::StatusCode::kOk);
  EXPECT_EQ(status([](DeltaNetMixerArgs* args) { args->rule.heads = 1; }), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(status([](DeltaNetMixerArgs* args) { args->rule.key_dim = 8; }),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(status([](DeltaNetMixerArgs* args) { args->norm.width = 3; }), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(status([](DeltaNetMixerArgs* args) { args->norm.dtype = DType::kBFloat16; }),
            absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace deltanet
