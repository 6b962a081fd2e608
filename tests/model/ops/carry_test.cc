#include "model/ops/carry.h"

#include <cstdint>

#include "gtest/gtest.h"
#include "tests/model/ops/carry_problem.h"
#include "tests/model/ops/op_test_util.h"

namespace deltanet {
namespace {

TEST(CarryTest, HandsOnTheLastTokenAndWhatWasCarriedBefore) {
  for (const int64_t width : {1, 3, 16, 100, 1025}) {
    for (const bool threads : {false, true}) {
      SCOPED_TRACE(width);
      CarryProblem problem(width);
      const absl::Status status =
          Carry(problem.ragged.rows(), problem.Args(), threads ? ThreadedContext() : SerialContext());
      ASSERT_TRUE(status.ok()) << status;
      problem.Compare();
    }
  }
}

TEST(CarryTest, RefusesWhatItCannotDo) {
  const RaggedRows none;
  EXPECT_TRUE(Carry(none, {.width = 1}, SerialContext()).ok());
  EXPECT_EQ(Carry(none, {.width = 0}, SerialContext()).code(), absl::StatusCode::kInvalidArgument);
#ifndef DELTANET_CUDA
  EXPECT_EQ(Carry(none, {.width = 1}, CudaContext()).code(), absl::StatusCode::kFailedPrecondition);
#endif
}

}  // namespace
}  // namespace deltanet
