#include "server/load_log.h"

#include <utility>
#include <vector>

#include "gtest/gtest.h"
#include "tests/testing/fake_clock.h"

namespace deltanet {
namespace {

TEST(LoadLog, AtMostOneASecondAndTheLast) {
  FakeClock clock;
  std::vector<std::pair<int64_t, absl::Duration>> reports;
  LoadLog log(&clock, [&](const ModelLoadProgress& progress, absl::Duration elapsed) {
    EXPECT_EQ(progress.total_bytes, 100);
    reports.emplace_back(progress.bytes, elapsed);
  });
  const auto read = [&](const char* directory, int64_t bytes, absl::Duration after) {
    clock.Advance(after);
    log.OnProgress({directory, bytes, 100});
  };
  read("a", 10, absl::ZeroDuration());
  read("a", 20, absl::Milliseconds(999));
  EXPECT_TRUE(reports.empty());
  read("a", 30, absl::Milliseconds(1));
  read("a", 40, absl::Milliseconds(999));
  read("a", 100, absl::ZeroDuration());
  // The next model begins anew.
  read("b", 50, absl::Seconds(7));
  read("b", 100, absl::Milliseconds(2));
  read("b", 50, absl::Seconds(3));  // The same directory again.
  read("b", 100, absl::Milliseconds(3));
  using Reports = std::vector<std::pair<int64_t, absl::Duration>>;
  EXPECT_EQ(reports, (Reports{{30, absl::Seconds(1)},
                              {100, absl::Milliseconds(1999)},
                              {100, absl::Milliseconds(2)},
                              {100, absl::Milliseconds(3)}}));
}

}  // namespace
}  // namespace deltanet
