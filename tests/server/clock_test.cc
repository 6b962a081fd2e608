#include "server/clock.h"

#include "absl/time/clock.h"
#include "gtest/gtest.h"
#include "model/base/mutex.h"
#include "server/executor.h"

namespace deltanet {
namespace {

TEST(RealClockTest, IsNearTheWallAndNeverGoesBack) {
  Clock* const clock = Clock::Real();
  absl::Time last = clock->Now();
  EXPECT_LT(absl::AbsDuration(last - absl::Now()), absl::Minutes(1));
  for (int i = 0; i < 1000; ++i) {
    const absl::Time now = clock->Now();
    ASSERT_GE(now, last);
    last = now;
  }
}

TEST(RealClockTest, AWaitEndsAtItsDeadline) {
  Clock* const clock = Clock::Real();
  Mutex mutex;
  CondVar condition;
  const absl::Time deadline = clock->Now() + absl::Milliseconds(5);
  MutexLock lock(&mutex);
  while (clock->Now() < deadline) clock->WaitUntil(&condition, &mutex, deadline);
  EXPECT_GE(clock->Now(), deadline);
}

TEST(RealClockTest, AWaitWithoutADeadlineEndsWhenNotified) {
  Clock* const clock = Clock::Real();
  Mutex mutex;
  CondVar condition;
  bool go = false;
  Thread notifier("notifier", [&] {
    MutexLock lock(&mutex);
    go = true;
    condition.NotifyAll();
  });
  MutexLock lock(&mutex);
  while (!go) clock->WaitUntil(&condition, &mutex, absl::InfiniteFuture());
  EXPECT_TRUE(go);
}

}  // namespace
}  // namespace deltanet
