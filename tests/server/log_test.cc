#include "server/log.h"

#include "gtest/gtest.h"

namespace deltanet {
namespace {

TEST(Log, OneLineOfKeysAndValues) {
  EXPECT_EQ(
      FormatLogLine(absl::FromUnixMillis(1769860800123), LogLevel::kInfo, "listening", {{"port", "50051"}}),
      "2026-01-31T12:00:00.123Z INFO listening port=50051");
  EXPECT_EQ(FormatLogLine(absl::UnixEpoch(), LogLevel::kError, "failed", {}),
            "1970-01-01T00:00:00.000Z ERROR failed");
}

TEST(Log, WhatAClientSendsCannotBreakTheLine) {
  EXPECT_EQ(
      FormatLogLine(absl::UnixEpoch(), LogLevel::kWarning, "e",
                    {{"a", ""}, {"b", "two words"}, {"c", "x\ny\"z\\"}, {"d", "k=v"}, {"e", "\x7F"}}),
      "1970-01-01T00:00:00.000Z WARNING e a=\"\" b=\"two words\" c=\"x\\ny\\\"z\\\\\" d=\"k=v\" e=\"\\177\"");
}

}  // namespace
}  // namespace deltanet
