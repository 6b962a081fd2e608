// The load behind `deltanet-client bench --generate`.
#ifndef DELTANET_CLIENT_GENERATE_LOAD_H_
#define DELTANET_CLIENT_GENERATE_LOAD_H_

#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "client/client.h"
#include "client/latency.h"

namespace deltanet {

// A number of tokens, drawn for each request: all from `min` to `max` alike.
struct LengthRange {
  int64_t min = 1;
  int64_t max = 1;
};
// "128", or "uniform:64:512" with both ends; at least 1. INVALID_ARGUMENT says what is wanted, after "is".
absl::StatusOr<LengthRange> ParseLengthRange(const std::string& text);

struct GenerateLoadOptions {
  std::string server;
  ClientOptions client;
  std::string model;
  int64_t vocab_size = 0;  // Prompts are of random ids below this.
  LengthRange prompt_tokens;
  LengthRange output_tokens;  // Generated whatever comes: end-of-sequence ids are ignored.
  SamplingOptions sampling;   // A seed is added to each request's number.
  uint64_t seed = 1;          // Of prompts, lengths and arrivals: the same requests each time.

  // How many requests are under way at a time, each followed by the next (closed loop)...
  int64_t concurrency = 1;
  // ...or how many arrive a second, in a Poisson process, whatever is still under way (open loop). Times then
  // begin at the arrival that was meant.
  std::optional<double> rate;
  int64_t connections = 1;  // TCP connections, with a thread each; in a closed loop at most `concurrency`.
  int64_t warm_up =
      0;  // Requests before the measured ones; at most `concurrency` at a time, or all in an open loop.

  // Begin no more requests after this time or this many, whichever comes first; at least one is given.
  absl::Duration duration = absl::InfiniteDuration();
  std::optional<int64_t> requests;
  // Give up a connection's requests if nothing has come for any of them for so long.
  absl::Duration silence = absl::Minutes(1);
};

// When requests arrive, in seconds from the start: a Poisson process of `rate` a second. Not thread-safe.
class Arrivals {
 public:
  Arrivals(double rate, uint64_t seed) : random_(seed), gap_(rate) {}

  double Next() { return time_ += gap_(random_); }

 private:
  std::mt19937_64 random_;
  std::exponential_distribution<double> gap_;
  double time_ = 0;
};

// The number `index` of the requests: the warm-up's count down from -1.
struct PlannedRequest {
  std::vector<int64_t> prompt;
  int64_t output_tokens = 0;
};
PlannedRequest PlanRequest(const GenerateLoadOptions& options, int64_t index);

// What came back, the warm-up left out. What has been begun is awaited, also past the duration, and its times
// count; rates are of what came until the duration was over.
struct GenerateLoadReport {
  int64_t answered = 0;                   // Requests that got all their tokens.
  std::map<std::string, int64_t> errors;  // Requests that did not, by the error's reason.
  std::string first_error;
  int64_t unanswered = 0;  // Given up, because of silence.
  absl::Duration
      elapsed;  // What rates are of: the duration, or the time to the last answer if that was sooner.
  double requests_per_second = 0;
  double prompt_tokens_per_second = 0;  // Counted with the first token.
  double output_tokens_per_second = 0;
  LatencyHistogram first_token;     // From the start of each request that got one.
  LatencyHistogram between_tokens;  // Each gap; zero where tokens came in one message.
  LatencyHistogram whole;           // Requests that got all.
  absl::Duration mean_queued;       // In the server, by its own account.
  absl::Duration mean_computing;
};

struct GenerateLoadProgress {
  absl::Duration elapsed;
  int64_t answered = 0;  // So far.
  int64_t errors = 0;
  int64_t tokens = 0;
  int64_t running = 0;  // Now.
};

// Runs the load and blocks until it is over. `progress` is called about every second, from the calling
// thread. Fails if a request of the warm-up does, or after 100 errors in a row; other errors are counted in
// the report.
absl::StatusOr<GenerateLoadReport> RunGenerateLoad(
    const GenerateLoadOptions& options, const std::function<void(const GenerateLoadProgress&)>& progress);

}  // namespace deltanet

#endif  // DELTANET_CLIENT_GENERATE_LOAD_H_
