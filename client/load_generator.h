// The load behind `deltanet-client bench`.
#ifndef DELTANET_CLIENT_LOAD_GENERATOR_H_
#define DELTANET_CLIENT_LOAD_GENERATOR_H_

#include <cstdint>
#include <functional>
#include <optional>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "client/client.h"
#include "client/latency.h"

namespace deltanet {

struct LoadOptions {
  std::string server;
  ClientOptions client;
  std::string model;
  int64_t sessions = 1;     // Streams of one session each; with `unary`, calls that may run at a time.
  int64_t connections = 1;  // TCP connections, with a thread each; at most `sessions`.
  bool unary = false;       // Stateless Forward calls instead of streams.
  Tensor input;             // Of every message: [T, width] or [T]; with `unary` also with a B.

  // Stop after this time or this many messages, whichever comes first; at least one is given.
  absl::Duration duration = absl::InfiniteDuration();
  std::optional<int64_t> count;
  // Messages a second in all, sent at their time whether or not answers have come (open loop); a latency then
  // begins at the time that was meant. Nothing: each session sends when it has been answered (closed loop).
  std::optional<double> rate;
};

// What came back. Warming up, one message a session, is not in it.
struct LoadReport {
  int64_t answered = 0;    // Messages.
  int64_t errors = 0;      // Messages answered with an error; not in `answered`.
  int64_t unanswered = 0;  // Open loop: meant to be sent in time, and not answered soon after.
  std::string first_error;
  absl::Duration elapsed;  // To the last answer.
  LatencyHistogram latencies;
  absl::Duration mean_queued;  // In the server, by its own account.
  absl::Duration mean_computing;
};

struct LoadProgress {
  absl::Duration elapsed;
  int64_t answered = 0;  // So far.
  int64_t errors = 0;
};

// Runs the load and blocks until it is over. `progress` is called about every second, from the calling
// thread. Fails if a session cannot be warmed up, or if all have broken; errors in the midst of it are
// counted in the report.
absl::StatusOr<LoadReport> GenerateLoad(const LoadOptions& options,
                                        const std::function<void(const LoadProgress&)>& progress);

}  // namespace deltanet

#endif  // DELTANET_CLIENT_LOAD_GENERATOR_H_
