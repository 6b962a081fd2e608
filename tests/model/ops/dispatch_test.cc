#include "model/ops/cpu/dispatch.h"

#include "gtest/gtest.h"
#include "tests/model/ops/op_test_util.h"

namespace deltanet {
namespace {

TEST(DispatchTest, GenericIsAlwaysThere) {
  ASSERT_NE(CpuKernelsFor(CpuIsa::kGeneric), nullptr);
  EXPECT_STREQ(CpuKernelsFor(CpuIsa::kGeneric)->name, "generic");
}

TEST(DispatchTest, TheWidestIsActiveUnlessATestSaysOtherwise) {
  const CpuKernels* widest = CpuKernelsFor(CpuIsa::kAvx512);
  if (widest == nullptr) widest = CpuKernelsFor(CpuIsa::kAvx2);
  if (widest == nullptr) widest = CpuKernelsFor(CpuIsa::kGeneric);
  EXPECT_EQ(&ActiveCpuKernels(), widest);
  {
    IsaScope isa(CpuIsa::kGeneric);
    EXPECT_EQ(&ActiveCpuKernels(), CpuKernelsFor(CpuIsa::kGeneric));
  }
  EXPECT_EQ(&ActiveCpuKernels(), widest);
}

TEST(DispatchTest, TokensAndUnitsFindTheirRow) {
  Ragged ragged;
  for (int64_t tokens : {0, 0, 3, 0, 1, 2, 0}) ragged.Add(tokens, 0, 0);
  const RaggedRows rows = ragged.rows();
  for (int64_t r = 0, n = 0, unit = 0; r < rows.rows; ++r) {
    EXPECT_EQ(FirstUnit(rows, r), unit);
    EXPECT_EQ(RowOfUnit(rows, unit++), r);
    for (; n < rows.offsets[r + 1]; ++n) {
      EXPECT_EQ(RowOfToken(rows, n), r) << "token " << n;
      EXPECT_EQ(RowOfUnit(rows, unit++), r) << "token " << n;
    }
  }
}

TEST(DispatchTest, GrainHoldsTheLeastWork) {
  EXPECT_EQ(GrainFor(100, 30), 4);
  EXPECT_EQ(GrainFor(100, 100), 1);
  EXPECT_EQ(GrainFor(100, 1000), 1);
}

}  // namespace
}  // namespace deltanet
