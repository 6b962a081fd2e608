// The mixer of `delta_net` on a GPU, with and without its kernel for rows of a few tokens.
#include "gtest/gtest.h"
#include "model/ops/delta_net_mixer.h"
#include "tests/model/ops/cuda_test_util.h"
#include "tests/model/ops/delta_net_mixer_problem.h"

namespace deltanet {
namespace {

class CudaMixerTest : public CudaTest {};

TEST_P(CudaMixerTest, MatchesTheReferenceHoweverItIsCut) {
  for (const bool aligned : {false, true}) {
    ForEachDeltaNetMixer([&](const DeltaNetMixerCase& mixer) {
      const DeltaNetMixerProblem problem(mixer, dtype(), aligned);
      CheckDeltaNetMixer(problem, [&](DeltaNetMixerStep* step) {
        Mirror mirror(aligned);
        DeltaNetMixerArgs args = step->Args();
        step->PointAt(mirror.Map(&step->pool), mirror.Map(&step->qkv, dtype()),
                      mirror.Map(&step->mixed, dtype()), mirror.Map(&step->out, dtype()),
                      mirror.Map(&step->nonfinite), &args);
        args.conv.z = mirror.Copy(step->z, dtype());
        args.conv.weight = mirror.Copy(problem.front.weight);
        if (args.conv.bias != nullptr) args.conv.bias = mirror.Copy(problem.front.bias);
        args.norm.scale = mirror.Copy(problem.norm_scale);
        if (args.norm.gate != nullptr) args.norm.gate = mirror.Copy(step->gate, dtype());
        const absl::Status status = DeltaNetMixer(
            mirror.Rows(step->ragged, dtype(), mixer.front.heads, mixer.front.key_dim, mixer.front.value_dim), args,
            mirror.context());
        ASSERT_TRUE(status.ok()) << status;
        mirror.Finish();
      });
    });
  }
}

INSTANTIATE_TEST_SUITE_P(DTypes, CudaMixerTest, BothDTypes(), DTypeParamName);

}  // namespace
}  // namespace deltanet
