// The operators of `delta_net` on a GPU: each through its door, on device memory, in float32 and bfloat16,
// against float64.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "gtest/gtest.h"
#include "model/ops/carry.h"
#include "model/ops/elementwise.h"
#include "model/ops/output_norm.h"
#include "model/ops/short_conv.h"
#include "tests/model/ops/carry_problem.h"
#include "tests/model/ops/cuda_test_util.h"
#include "tests/model/ops/norm_elementwise_problem.h"
#include "tests/model/ops/op_test_util.h"
#include "tests/model/ops/short_conv_problem.h"

namespace deltanet {
namespace {

const int64_t kWidths[] = {1, 3, 16, 17, 64, 100, 256, 1025, 2056};

class CudaShortConvTest : public CudaTest {};

// Holds the operator on the device to CheckShortConv.
void CheckOnDevice(const ShortConvProblem& problem) {
  CheckShortConv(problem, [&](ShortConvStep* step) {
    Mirror mirror(problem.aligned);
    ShortConvQkvArgs args = step->Args();
    args.z = mirror.Copy(step->z, problem.dtype);
    args.weight = mirror.Copy(problem.weight);
    if (args.bias != nullptr) args.bias = mirror.Copy(problem.bias);
    args.tail.pool = mirror.Map(&step->pool);
    args.out = mirror.Map(&step->out, problem.dtype);
    const absl::Status status = ShortConvQkv(mirror.Rows(step->ragged), args, mirror.context());
    ASSERT_TRUE(status.ok()) << status;
    mirror.Finish();
  });
}

TEST_P(CudaShortConvTest, MatchesTheReferenceHoweverItIsCut) {
  for (const bool aligned : {false, true}) {
    ForEachShortConvMixer(
        [&](const ShortConvMixer& mixer) { CheckOnDevice(ShortConvProblem(mixer, dtype(), aligned)); });
  }
}

// So many tokens that a thread takes long tiles of them, which begin and end anywhere in rows.
TEST_P(CudaShortConvTest, ManyTokensMatchTheReferenceHoweverTheyAreCut) {
  CheckOnDevice(ShortConvProblem({.heads = 2, .key_dim = 8, .value_dim = 8, .has_bias = true}, dtype(),
                                 /*aligned=*/true, {3, 12000, 0, 1, 15001, 40, 9002}));
}

TEST_P(CudaShortConvTest, ZeroKeysStayZeroAndExtremesAreRight) {
  Ragged ragged;
  ragged.Add(1, -1, 0, true);
  const auto run = [&](QkActivation activation, QkNorm norm, float a, float b) {
    Guarded out(6);
    Mirror mirror;
    EXPECT_TRUE(ShortConvQkv(mirror.Rows(ragged),
                             {.heads = 1,
                              .key_dim = 2,
                              .value_dim = 1,
                              .activation = activation,
                              .norm = norm,
                              .taps = 0,
                              .dtype = dtype(),
                              .z = mirror.Copy(std::vector<float>{a, b, a, b, 0, 0}, dtype()),
                              .z_stride = 6,
                              .out = mirror.Map(&out, dtype()),
                              .out_stride = 6},
                             mirror.context())
                    .ok());
    mirror.Finish();
    EXPECT_TRUE(SameBits(out.data(), out.data() + 2, 2));
    EXPECT_TRUE(out.GuardsIntact());
    return std::vector<float>{out[0], out[1]};
  };
  ExpectZeroKeysAndExtremes(run);
}

INSTANTIATE_TEST_SUITE_P(DTypes, CudaShortConvTest, BothDTypes(), DTypeParamName);

class CudaOutputNormTest : public CudaTest {};

TEST_P(CudaOutputNormTest, MatchesTheReference) {
  for (const bool aligned : {false, true}) {
    ForEachOutputNorm([&](int64_t groups, int64_t width, bool gated) {
      OutputNormProblem problem(groups, width, gated, dtype(), /*gate_padding=*/aligned ? 8 : 3);
      Mirror mirror(aligned);
      OutputNormArgs args = problem.Args();
      args.x = mirror.Copy(problem.x, dtype());
      args.scale = mirror.Copy(problem.scale);
      if (gated) args.gate = mirror.Copy(problem.gate, dtype());
      args.out = mirror.Map(&problem.out, dtype());
      const absl::Status status = OutputNorm(args, mirror.context());
      ASSERT_TRUE(status.ok()) << status;
      mirror.Finish();
      problem.Compare();
    });
  }
}

TEST_P(CudaOutputNormTest, InPlaceGivesTheSameBits) {
  for (const bool aligned : {false, true}) {
    ForEachOutputNorm([&](int64_t groups, int64_t width, bool gated) {
      OutputNormProblem problem(groups, width, gated, dtype(), /*gate_padding=*/aligned ? 8 : 3);
      Guarded in_place(problem.out.size());
      std::copy(problem.x.begin(), problem.x.end(), in_place.data());
      Mirror mirror(aligned);
      OutputNormArgs args = problem.Args();
      args.x = mirror.Copy(problem.x, dtype());
      args.scale = mirror.Copy(problem.scale);
      if (gated) args.gate = mirror.Copy(problem.gate, dtype());
      args.out = mirror.Map(&problem.out, dtype());
      ASSERT_TRUE(OutputNorm(args, mirror.context()).ok());
      args.x = args.out = mirror.Map(&in_place, dtype());
      ASSERT_TRUE(OutputNorm(args, mirror.context()).ok());
      mirror.Finish();
      EXPECT_TRUE(SameBits(in_place.data(), problem.out.data(), problem.out.size()));
      EXPECT_TRUE(in_place.GuardsIntact());
    });
  }
}

TEST_P(CudaOutputNormTest, NaNShowsInItsGroupAndClosedGatesGiveZero) {
  const auto run = [&](const std::vector<float>& x, const std::vector<float>& gate) {
    Guarded out(6);
    Mirror mirror;
    EXPECT_TRUE(OutputNorm({.rows = 1,
                            .groups = 3,
                            .width = 2,
                            .dtype = dtype(),
                            .x = mirror.Copy(x, dtype()),
                            .scale = mirror.Copy(std::vector<float>{1, 1}),
                            .gate = mirror.Copy(gate, dtype()),
                            .gate_stride = 6,
                            .out = mirror.Map(&out, dtype())},
                           mirror.context())
                    .ok());
    mirror.Finish();
    EXPECT_TRUE(out.GuardsIntact());
    return out.Values();
  };
  ExpectNaNAndClosedGates(run);
}

INSTANTIATE_TEST_SUITE_P(DTypes, CudaOutputNormTest, BothDTypes(), DTypeParamName);

class CudaEmbedTest : public CudaTest {};

TEST_P(CudaEmbedTest, CopiesRowsOfTheTableThatIdsOrSlotsName) {
  for (const int64_t width : kWidths) {
    for (const bool aligned : {false, true}) {
      EmbedProblem problem(width, dtype());
      Mirror mirror(aligned);
      EmbedArgs args = problem.Args();
      args.ids = mirror.Copy(problem.ids);
      args.sampled.pool = const_cast<float*>(mirror.Copy(problem.pool));
      args.table = mirror.Copy(problem.table, dtype());
      args.out = mirror.Map(&problem.out);
      const absl::Status status = Embed(mirror.Rows(problem.ragged), args, mirror.context());
      ASSERT_TRUE(status.ok()) << status;
      mirror.Finish();
      problem.Compare();
    }
  }
}

INSTANTIATE_TEST_SUITE_P(DTypes, CudaEmbedTest, BothDTypes(), DTypeParamName);

class CudaCarryTest : public CudaTest {};

TEST_P(CudaCarryTest, HandsOnTheLastTokenAndWhatWasCarriedBefore) {
  for (const int64_t width : kWidths) {
    SCOPED_TRACE(width);
    CarryProblem problem(width);
    Mirror mirror(/*aligned=*/width % 16 == 0);
    CarryArgs args = problem.Args();
    args.x = mirror.Map(&problem.x);
    args.carried.pool = mirror.Map(&problem.pool);
    const absl::Status status = Carry(mirror.Rows(problem.ragged), args, mirror.context());
    ASSERT_TRUE(status.ok()) << status;
    mirror.Finish();
    problem.Compare();
  }
}

INSTANTIATE_TEST_SUITE_P(DTypes, CudaCarryTest, testing::Values(DType::kFloat32), DTypeParamName);

// What the doors promise of a device without touching it: these need no GPU.
TEST(CudaFlaOpsContractTest, RefuseWhatTheyCannotDo) {
  const RaggedRows none;
  const auto refused = absl::StatusCode::kInvalidArgument;
  const DType half = DType::kFloat16;
  EXPECT_EQ(
      ShortConvQkv(none,
                   {.heads = 1, .key_dim = 2, .value_dim = 3, .dtype = half, .z_stride = 8, .out_stride = 8},
                   CudaContext())
          .code(),
      refused);
  EXPECT_EQ(ShortConvQkv(none, {.heads = 0}, CudaContext()).code(), refused);
  EXPECT_EQ(OutputNorm({.rows = 0, .groups = 1, .width = 1, .dtype = half}, CudaContext()).code(), refused);
  EXPECT_EQ(OutputNorm({.rows = 0, .groups = 0, .width = 1}, CudaContext()).code(), refused);
  EXPECT_EQ(Carry(none, {.width = 0}, CudaContext()).code(), refused);
}

TEST(CudaFlaOpsContractTest, NothingToDoIsDone) {
  const RaggedRows none;
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    EXPECT_TRUE(
        ShortConvQkv(
            none, {.heads = 1, .key_dim = 2, .value_dim = 3, .dtype = dtype, .z_stride = 8, .out_stride = 8},
            CudaContext())
            .ok());
    EXPECT_TRUE(OutputNorm({.rows = 0, .groups = 1, .width = 1, .dtype = dtype}, CudaContext()).ok());
    EXPECT_TRUE(Embed(none, {.width = 1, .dtype = dtype}, CudaContext()).ok());
  }
  EXPECT_TRUE(Carry(none, {.width = 1}, CudaContext()).ok());
}

}  // namespace
}  // namespace deltanet
