#include "client/latency.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

namespace deltanet {
namespace {

TEST(LatencyHistogramTest, EmptyIsZero) {
  const LatencyHistogram histogram;
  EXPECT_EQ(histogram.count(), 0);
  EXPECT_EQ(histogram.mean(), absl::ZeroDuration());
  EXPECT_EQ(histogram.max(), absl::ZeroDuration());
  EXPECT_EQ(histogram.Percentile(0.5), absl::ZeroDuration());
}

TEST(LatencyHistogramTest, SmallValuesAreExact) {
  LatencyHistogram histogram;
  for (int i = 1; i <= 100; ++i) histogram.Add(absl::Nanoseconds(i));
  EXPECT_EQ(histogram.count(), 100);
  EXPECT_EQ(histogram.mean(), absl::Nanoseconds(50.5));
  EXPECT_EQ(histogram.Percentile(0), absl::Nanoseconds(1));
  EXPECT_EQ(histogram.Percentile(0.5), absl::Nanoseconds(50));
  EXPECT_EQ(histogram.Percentile(0.99), absl::Nanoseconds(99));
  EXPECT_EQ(histogram.Percentile(1), absl::Nanoseconds(100));
}

TEST(LatencyHistogramTest, PercentilesAreWithinABucketOfTheTruth) {
  std::mt19937_64 random(1);
  std::lognormal_distribution<double> lognormal(13, 3);  // Around 0.4 ms, from nanoseconds to minutes.
  LatencyHistogram histogram;
  std::vector<int64_t> values;
  for (int i = 0; i < 20000; ++i) {
    values.push_back(static_cast<int64_t>(lognormal(random)));
    histogram.Add(absl::Nanoseconds(values.back()));
  }
  std::sort(values.begin(), values.end());
  for (const double fraction : {0.01, 0.25, 0.5, 0.9, 0.95, 0.99, 0.999, 1.0}) {
    const int64_t truth = values[static_cast<size_t>(std::ceil(fraction * 20000)) - 1];
    const int64_t found = absl::ToInt64Nanoseconds(histogram.Percentile(fraction));
    EXPECT_GE(found, truth) << fraction;
    EXPECT_LE(found, truth + truth / 128 + 1) << fraction;
  }
  EXPECT_EQ(histogram.max(), absl::Nanoseconds(values.back()));
}

TEST(LatencyHistogramTest, ExtremesAreClamped) {
  LatencyHistogram histogram;
  histogram.Add(-absl::Seconds(1));
  EXPECT_EQ(histogram.max(), absl::ZeroDuration());
  histogram.Add(absl::InfiniteDuration());
  EXPECT_EQ(histogram.max(), absl::Nanoseconds(int64_t{1} << 53));
  EXPECT_EQ(histogram.Percentile(1), histogram.max());
  EXPECT_EQ(histogram.Percentile(0.5), absl::ZeroDuration());
}

TEST(LatencyHistogramTest, MergeIsAddingToOne) {
  LatencyHistogram a, b, all;
  for (int i = 0; i < 1000; ++i) {
    const absl::Duration latency = absl::Microseconds(i * i);
    (i % 3 == 0 ? a : b).Add(latency);
    all.Add(latency);
  }
  a.Merge(b);
  EXPECT_EQ(a.count(), all.count());
  EXPECT_EQ(a.mean(), all.mean());
  EXPECT_EQ(a.Summary(), all.Summary());
}

TEST(LatencyHistogramTest, SummarySaysMilliseconds) {
  LatencyHistogram histogram;
  histogram.Add(absl::Microseconds(1500));
  EXPECT_EQ(histogram.Summary(), "p50 1.500 ms  p95 1.500 ms  p99 1.500 ms  max 1.500 ms");
}

}  // namespace
}  // namespace deltanet
