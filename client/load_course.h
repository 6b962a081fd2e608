// What the connections of a load generator share. Each has one thread that sends, polls its completion queue
// and counts; all begin together.
#ifndef DELTANET_CLIENT_LOAD_COURSE_H_
#define DELTANET_CLIENT_LOAD_COURSE_H_

#include <grpcpp/completion_queue.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <optional>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "model/base/mutex.h"

namespace deltanet {

using SteadyClock = std::chrono::steady_clock;
using Instant = SteadyClock::time_point;

// A connection gives up after so many errors without an answer between them: the server is gone, or refuses
// everything.
inline constexpr int kMaxErrorsInARow = 100;

// Takes an event off the queue. False if none has come by `wake` (or a little earlier).
bool NextEvent(grpc::CompletionQueue* queue, Instant wake, void** tag, bool* ok);

// The common start, the number of requests, the progress. Thread-safe.
class Course {
 public:
  // `count`: of all requests, or nothing: no limit.
  Course(int64_t connections, std::optional<int64_t> count) : connections_(connections), count_(count) {}

  // A connection is warm, or has failed. Blocks until all are warm and returns the start; nothing if one has
  // failed.
  std::optional<Instant> AwaitStart(const absl::Status& warm) ABSL_LOCKS_EXCLUDED(mu_);
  void Leave() ABSL_LOCKS_EXCLUDED(mu_);

  // Blocks until all connections have left, calling `progress` with the time since the start about every
  // second; returns a failure to warm up.
  absl::Status AwaitEnd(const std::function<void(absl::Duration elapsed)>& progress) ABSL_LOCKS_EXCLUDED(mu_);

  // Closed loop: the number, from 0, of one more request that may be sent; nothing if there are none left.
  std::optional<int64_t> Claim();

  std::atomic<int64_t> answered{0};
  std::atomic<int64_t> errors{0};

 private:
  const int64_t connections_;
  const std::optional<int64_t> count_;
  std::atomic<int64_t> claimed_{0};

  Mutex mu_;
  CondVar changed_;
  int64_t arrived_ ABSL_GUARDED_BY(mu_) = 0;
  int64_t left_ ABSL_GUARDED_BY(mu_) = 0;
  Instant start_ ABSL_GUARDED_BY(mu_);
  absl::Status failure_ ABSL_GUARDED_BY(mu_);
};

}  // namespace deltanet

#endif  // DELTANET_CLIENT_LOAD_COURSE_H_
