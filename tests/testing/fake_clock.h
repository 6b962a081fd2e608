// A clock that stands still until a test moves it.
#ifndef DELTANET_TESTS_TESTING_FAKE_CLOCK_H_
#define DELTANET_TESTS_TESTING_FAKE_CLOCK_H_

#include <list>

#include "absl/time/time.h"
#include "model/base/mutex.h"
#include "server/clock.h"

namespace deltanet {

// Thread-safe.
class FakeClock : public Clock {
 public:
  FakeClock() = default;

  absl::Time Now() override;
  void WaitUntil(CondVar* condition, Mutex* mutex, absl::Time deadline) override
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex);

  // Moves the time on by `duration` and wakes the waits whose deadline has come. What those wait on outlives
  // the call.
  void Advance(absl::Duration duration);

  // Blocks until exactly `threads` threads are in WaitUntil, of which those that Advance has woken do not
  // count.
  void WaitUntilBlocked(int threads);
  // The same, counting only waits with a finite deadline.
  void WaitUntilTimedBlocked(int threads);

 private:
  struct Waiter {
    CondVar* condition;
    Mutex* mutex;
    absl::Time deadline;
    bool woken = false;
  };

  int BlockedLocked(bool timed_only) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void WaitUntilBlocked(int threads, bool timed_only);

  // Never held while a waiter's mutex is taken.
  Mutex mu_;
  CondVar changed_;  // `waiters_` has changed.
  absl::Time now_ ABSL_GUARDED_BY(mu_) = absl::FromUnixSeconds(1'000'000'000);
  std::list<Waiter*> waiters_ ABSL_GUARDED_BY(mu_);
};

}  // namespace deltanet

#endif  // DELTANET_TESTS_TESTING_FAKE_CLOCK_H_
