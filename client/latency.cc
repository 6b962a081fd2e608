#include "client/latency.h"

#include <algorithm>
#include <bit>
#include <cmath>

#include "absl/strings/str_format.h"

namespace deltanet {
namespace {

constexpr int kSubBits = 7;
constexpr int64_t kSubBuckets = int64_t{1} << kSubBits;
constexpr int kMaxBits = 53;

// Values below 2 * kSubBuckets have a bucket each; above, the top kSubBits + 1 bits choose one.
int64_t BucketOf(int64_t value) {
  const int shift =
      std::max(0, static_cast<int>(std::bit_width(static_cast<uint64_t>(value))) - (kSubBits + 1));
  return shift * kSubBuckets + (value >> shift);
}

// The largest value of a bucket.
int64_t UpperEdge(int64_t bucket) {
  const int64_t shift = std::max<int64_t>(0, bucket / kSubBuckets - 1);
  return ((bucket - shift * kSubBuckets + 1) << shift) - 1;
}

double Milliseconds(absl::Duration duration) { return absl::ToDoubleMilliseconds(duration); }

}  // namespace

LatencyHistogram::LatencyHistogram() : buckets_(BucketOf(int64_t{1} << kMaxBits) + 1) {}

void LatencyHistogram::Add(absl::Duration latency) {
  const int64_t value = std::clamp<int64_t>(absl::ToInt64Nanoseconds(latency), 0, int64_t{1} << kMaxBits);
  ++buckets_[BucketOf(value)];
  ++count_;
  sum_ += static_cast<double>(value);
  max_ = std::max(max_, value);
}

void LatencyHistogram::Merge(const LatencyHistogram& other) {
  for (size_t i = 0; i < buckets_.size(); ++i) buckets_[i] += other.buckets_[i];
  count_ += other.count_;
  sum_ += other.sum_;
  max_ = std::max(max_, other.max_);
}

absl::Duration LatencyHistogram::mean() const {
  return count_ == 0 ? absl::ZeroDuration() : absl::Nanoseconds(sum_ / static_cast<double>(count_));
}

absl::Duration LatencyHistogram::Percentile(double fraction) const {
  const int64_t wanted =
      std::clamp<int64_t>(static_cast<int64_t>(std::ceil(fraction * static_cast<double>(count_))), 1, count_);
  int64_t seen = 0;
  for (size_t i = 0; i < buckets_.size(); ++i) {
    seen += buckets_[i];
    if (seen >= wanted) return absl::Nanoseconds(std::min(UpperEdge(static_cast<int64_t>(i)), max_));
  }
  return absl::ZeroDuration();
}

std::string LatencyHistogram::Summary() const {
  return absl::StrFormat("p50 %.3f ms  p95 %.3f ms  p99 %.3f ms  max %.3f ms", Milliseconds(Percentile(0.5)),
                         Milliseconds(Percentile(0.95)), Milliseconds(Percentile(0.99)), Milliseconds(max()));
}

}  // namespace deltanet
