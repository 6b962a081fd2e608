// Time, as the server sees it; tests hold it in their hands (tests/testing/fake_clock.h).
#ifndef DELTANET_SERVER_CLOCK_H_
#define DELTANET_SERVER_CLOCK_H_

#include "absl/time/time.h"
#include "model/base/mutex.h"

namespace deltanet {

// Thread-safe. Outlives everything that was given it.
class Clock {
 public:
  virtual ~Clock() = default;

  // Never goes backwards.
  virtual absl::Time Now() = 0;

  // Blocks until `condition` is notified or Now() >= `deadline` (which may be infinite); may also return
  // early for no reason. `mutex` is held on entry and on return.
  virtual void WaitUntil(CondVar* condition, Mutex* mutex, absl::Time deadline)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex) = 0;

  // The real one: wall-clock time at the start, advanced by the monotonic clock. Lives for ever.
  static Clock* Real();
};

}  // namespace deltanet

#endif  // DELTANET_SERVER_CLOCK_H_
