#include "tests/testing/fake_clock.h"

#include <utility>
#include <vector>

namespace deltanet {

absl::Time FakeClock::Now() {
  MutexLock lock(&mu_);
  return now_;
}

void FakeClock::WaitUntil(CondVar* condition, Mutex* mutex, absl::Time deadline) {
  Waiter waiter{condition, mutex, deadline};
  std::list<Waiter*>::iterator place;
  {
    MutexLock lock(&mu_);
    if (now_ >= deadline) return;
    place = waiters_.insert(waiters_.end(), &waiter);
  }
  changed_.NotifyAll();
  // Whoever notifies `condition` takes `mutex` first, so nothing is missed between here and there.
  condition->Wait(mutex);
  {
    MutexLock lock(&mu_);
    waiters_.erase(place);
  }
  changed_.NotifyAll();
}

void FakeClock::Advance(absl::Duration duration) {
  std::vector<std::pair<CondVar*, Mutex*>> due;
  {
    MutexLock lock(&mu_);
    now_ += duration;
    for (Waiter* waiter : waiters_) {
      if (waiter->woken || waiter->deadline > now_) continue;
      waiter->woken = true;
      due.emplace_back(waiter->condition, waiter->mutex);
    }
  }
  for (const auto& [condition, mutex] : due) {
    MutexLock lock(mutex);
    condition->NotifyAll();
  }
}

int FakeClock::BlockedLocked(bool timed_only) const {
  int blocked = 0;
  for (const Waiter* waiter : waiters_) {
    if (!waiter->woken && (!timed_only || waiter->deadline != absl::InfiniteFuture())) ++blocked;
  }
  return blocked;
}

void FakeClock::WaitUntilBlocked(int threads, bool timed_only) {
  MutexLock lock(&mu_);
  while (BlockedLocked(timed_only) != threads) changed_.Wait(&mu_);
}
void FakeClock::WaitUntilBlocked(int threads) { WaitUntilBlocked(threads, false); }
void FakeClock::WaitUntilTimedBlocked(int threads) { WaitUntilBlocked(threads, true); }

}  // namespace deltanet
