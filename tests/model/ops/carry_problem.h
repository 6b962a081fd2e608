// A step of Carry and what it has to leave behind.
#ifndef DELTANET_TESTS_MODEL_OPS_CARRY_PROBLEM_H_
#define DELTANET_TESTS_MODEL_OPS_CARRY_PROBLEM_H_

#include <algorithm>
#include <cstdint>
#include <vector>

#include "gtest/gtest.h"
#include "model/ops/carry.h"
#include "tests/model/ops/op_test_util.h"

namespace deltanet {

// Rows with and without tokens, fresh or not, in one slot or from one to another, and padding among them.
struct CarryProblem {
  static constexpr int64_t kSlots = 9, kOffset = 2;

  explicit CarryProblem(int64_t width)
      : width(width), slot_stride(width + 5), pool(kSlots * slot_stride), x(0) {
    ragged.Add(3, 0, 1);
    ragged.Add(0, 2, 2);
    ragged.Add(1, -1, 3, true);
    ragged.Add(0, -1, 4, true);
    ragged.Add(2, 5, 5);
    ragged.Add(1, -1, -1, true);  // Padding.
    ragged.Add(0, 6, 7);
    const std::vector<float> slots = RandomNormal(pool.size(), 70);
    std::copy(slots.begin(), slots.end(), pool.data());
    const int64_t N = ragged.offsets.back(), R = ragged.rows().rows;
    x = Guarded((N + R) * width);
    const std::vector<float> tokens = RandomNormal(N * width, 71);
    std::copy(tokens.begin(), tokens.end(), x.data());
    pool_before = pool.Values();
    x_before = x.Values();
  }

  CarryArgs Args() {
    return {.width = width,
            .x = x.data(),
            .carried = {.pool = pool.data(), .slot_stride = slot_stride, .offset = kOffset}};
  }

  // After the operator ran.
  void Compare() {
    std::vector<float> want_x = x_before, want_pool = pool_before;
    const int64_t N = ragged.offsets.back();
    for (int64_t r = 0; r < ragged.rows().rows; ++r) {
      if (ragged.work_slot[r] < 0) {
        std::copy_n(x.data() + (N + r) * width, width, want_x.begin() + (N + r) * width);
        continue;
      }
      std::vector<float> before(width, 0.0f);
      if (!ragged.fresh[r]) {
        std::copy_n(pool_before.begin() + ragged.base_slot[r] * slot_stride + kOffset, width, before.begin());
      }
      std::copy(before.begin(), before.end(), want_x.begin() + (N + r) * width);
      std::vector<float> last = before;
      if (ragged.offsets[r + 1] > ragged.offsets[r]) {
        std::copy_n(x_before.begin() + (ragged.offsets[r + 1] - 1) * width, width, last.begin());
      }
      std::copy(last.begin(), last.end(), want_pool.begin() + ragged.work_slot[r] * slot_stride + kOffset);
    }
    EXPECT_EQ(x.Values(), want_x);
    EXPECT_EQ(pool.Values(), want_pool);
    EXPECT_TRUE(x.GuardsIntact() && pool.GuardsIntact());
  }

  const int64_t width, slot_stride;
  Ragged ragged;
  Guarded pool, x;
  std::vector<float> pool_before, x_before;
};

}  // namespace deltanet

#endif  // DELTANET_TESTS_MODEL_OPS_CARRY_PROBLEM_H_
