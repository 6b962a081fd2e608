// Latencies, counted in buckets: any number of them in a fixed few kilobytes.
#ifndef DELTANET_CLIENT_LATENCY_H_
#define DELTANET_CLIENT_LATENCY_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/time/time.h"

namespace deltanet {

// Between two powers of two lie 128 buckets of one width, so that a percentile is at most 0.8 % too high and
// never too low. Mean and maximum are exact. Thread-compatible.
class LatencyHistogram {
 public:
  LatencyHistogram();

  // Negative counts as zero, and more than 2^53 ns (104 days) as that.
  void Add(absl::Duration latency);
  void Merge(const LatencyHistogram& other);

  int64_t count() const { return count_; }
  // Zero where nothing was added, as all below.
  absl::Duration mean() const;
  absl::Duration max() const { return absl::Nanoseconds(max_); }
  // At least `fraction` (in [0, 1]) of what was added is at most this: the upper edge of a bucket, at most
  // max().
  absl::Duration Percentile(double fraction) const;

  // "p50 0.52 ms  p95 0.61 ms  p99 0.70 ms  max 1.02 ms"
  std::string Summary() const;

 private:
  std::vector<int64_t> buckets_;
  int64_t count_ = 0;
  double sum_ = 0;   // Nanoseconds.
  int64_t max_ = 0;  // Nanoseconds.
};

}  // namespace deltanet

#endif  // DELTANET_CLIENT_LATENCY_H_
