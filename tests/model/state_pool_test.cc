#include "model/state_pool.h"

#include <gtest/gtest.h>

#include <set>
#include <thread>
#include <utility>
#include <vector>

namespace deltanet {
namespace {

TEST(StatePool, HandsOutEverySlotOnceAndThenSaysSo) {
  StatePool pool(3);
  std::vector<StateSlot> slots;
  std::set<int32_t> indices;
  for (int i = 0; i < 3; ++i) {
    auto slot = pool.Acquire();
    ASSERT_TRUE(slot.ok());
    EXPECT_TRUE(*slot);
    indices.insert(slot->index());
    slots.push_back(*std::move(slot));
  }
  EXPECT_EQ(indices, (std::set<int32_t>{0, 1, 2}));
  EXPECT_EQ(pool.free_slots(), 0);
  EXPECT_EQ(pool.Acquire().status().code(), absl::StatusCode::kResourceExhausted);
  slots.clear();
  EXPECT_EQ(pool.free_slots(), 3);
}

TEST(StateSlot, IsGivenBackOnceHoweverItMoves) {
  StatePool pool(2);
  StateSlot first = *pool.Acquire();
  const int32_t index = first.index();
  StateSlot moved = std::move(first);
  EXPECT_FALSE(first);
  EXPECT_EQ(first.index(), -1);
  EXPECT_EQ(moved.index(), index);
  StateSlot second = *pool.Acquire();
  moved = std::move(second);  // Gives `index` back.
  EXPECT_EQ(pool.free_slots(), 1);
  moved.Release();
  moved.Release();
  EXPECT_EQ(pool.free_slots(), 2);
}

TEST(StatePoolDeathTest, ASlotMustNotOutliveItsPool) {
  EXPECT_DEATH(
      {
        StateSlot slot;
        StatePool pool(1);
        slot = *pool.Acquire();
        pool.~StatePool();
      },
      "outlived its pool");
}

TEST(StatePool, CountsRightUnderThreads) {
  StatePool pool(8);
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&] {
      for (int i = 0; i < 2000; ++i) {
        auto one = pool.Acquire();
        auto two = pool.Acquire();
        ASSERT_TRUE(one.ok() && two.ok());
        ASSERT_NE(one->index(), two->index());
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(pool.free_slots(), 8);
}

}  // namespace
}  // namespace deltanet
