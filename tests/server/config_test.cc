#include "server/config.h"

#include <map>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/str_split.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace deltanet {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Pair;

absl::StatusOr<ServerConfig> Parse(const std::vector<std::string>& arguments,
                                   const std::map<std::string, std::string>& environment = {}) {
  return ParseServerConfig(arguments, [&](const char* name) -> const char* {
    const auto found = environment.find(name);
    return found == environment.end() ? nullptr : found->second.c_str();
  });
}

TEST(Config, DefaultsAreThoseOfTheHelp) {
  const auto config = Parse({"--model", "m=/models/m"});
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_THAT(config->models, ElementsAre(Pair("m", "/models/m")));
  EXPECT_EQ(config->device, DeviceType::kCpu);
  EXPECT_EQ(config->listen.host, "0.0.0.0");
  EXPECT_EQ(config->listen.port, 50051);
  EXPECT_EQ(config->metrics_listen.port, 9464);
  EXPECT_EQ(config->max_message_bytes, 64 << 20);
  EXPECT_EQ(config->drain_timeout, absl::Seconds(30));
  EXPECT_EQ(config->state_memory_bytes, 0);
  EXPECT_EQ(config->state_memory_percent, 0) << "the device decides";
  const std::string help = ServerHelp();
  for (const char* text :
       {"--model NAME=DIR", "--listen HOST:PORT", "(default 0.0.0.0:50051)", "(default 0.0.0.0:9464)",
        "(default 64MiB)", "(default 30s)", "(default 25% or 90%)", "(default 2048)", "(default 1048576)"}) {
    EXPECT_THAT(help, HasSubstr(text));
  }
}

TEST(Config, EveryFlag) {
  const auto config = Parse(absl::StrSplit(
      "--model=b=dir=with=equals --model a=x --device cuda --dtype bfloat16 --listen=[::1]:0 "
      "--metrics-listen localhost:1 --max-sessions 5 --state-memory 2GiB --max-step-tokens 128 "
      "--max-step-rows 3 --max-queued-requests 7 --max-queued-tokens 9 --session-ttl 1m30s "
      "--max-session-ttl 2h --deterministic --max-message-bytes 1MiB --drain-timeout 0 --step-timeout 5m "
      "--threads 4 "
      "--max-sessions-per-peer 11 --max-response-bytes 1KiB --max-concurrent-streams 12 "
      "--keepalive-time 13s --keepalive-timeout 14s --max-connection-age 15s "
      "--max-connection-age-grace 16s --mixed-step-tokens 192 --max-generated-tokens 1000 "
      "--default-generated-tokens 17 --tls-cert c.pem --tls-key k.pem --tls-client-ca r.pem",
      ' '));
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_THAT(config->models, ElementsAre(Pair("b", "dir=with=equals"), Pair("a", "x")));
  EXPECT_EQ(config->device, DeviceType::kCuda);
  EXPECT_EQ(config->dtype, DType::kBFloat16);
  EXPECT_TRUE(config->deterministic);
  EXPECT_EQ(config->listen.host, "::1");
  EXPECT_EQ(config->listen.port, 0);
  EXPECT_EQ(config->metrics_listen.host, "localhost");
  EXPECT_EQ(config->max_sessions, 5);
  EXPECT_EQ(config->state_memory_bytes, int64_t{2} << 30);
  EXPECT_EQ(config->max_step_tokens, 128);
  EXPECT_EQ(config->max_step_rows, 3);
  EXPECT_EQ(config->max_queued_requests, 7);
  EXPECT_EQ(config->max_queued_tokens, 9);
  EXPECT_EQ(config->session_ttl, absl::Seconds(90));
  EXPECT_EQ(config->max_session_ttl, absl::Hours(2));
  EXPECT_EQ(config->max_message_bytes, 1 << 20);
  EXPECT_EQ(config->drain_timeout, absl::ZeroDuration());
  EXPECT_EQ(config->step_timeout, absl::Minutes(5));
  EXPECT_EQ(config->threads, 4);
  EXPECT_EQ(config->max_sessions_per_peer, 11);
  EXPECT_EQ(config->max_response_bytes, 1024);
  EXPECT_EQ(config->max_concurrent_streams, 12);
  EXPECT_EQ(config->keepalive_time, absl::Seconds(13));
  EXPECT_EQ(config->keepalive_timeout, absl::Seconds(14));
  EXPECT_EQ(config->max_connection_age, absl::Seconds(15));
  EXPECT_EQ(config->max_connection_age_grace, absl::Seconds(16));
  EXPECT_EQ(config->mixed_step_tokens, 192);
  EXPECT_EQ(config->max_generated_tokens, 1000);
  EXPECT_EQ(config->default_generated_tokens, 17);
  EXPECT_EQ(config->tls.certificate, "c.pem");
  EXPECT_EQ(config->tls.key, "k.pem");
  EXPECT_EQ(config->tls.client_ca, "r.pem");
}

TEST(Config, TheEnvironmentCountsWhereTheCommandLineSaysNothing) {
  const auto config = Parse({"--max-sessions", "5"}, {{"DELTANET_MODEL", "a=1,b=2"},
                                                      {"DELTANET_MAX_SESSIONS", "9"},
                                                      {"DELTANET_STATE_MEMORY", "12.5%"},
                                                      {"DELTANET_DETERMINISTIC", "1"}});
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_THAT(config->models, ElementsAre(Pair("a", "1"), Pair("b", "2")));
  EXPECT_EQ(config->max_sessions, 5);
  EXPECT_EQ(config->state_memory_percent, 12.5);
  EXPECT_TRUE(config->deterministic);
  EXPECT_FALSE(
      Parse({"--model", "m=x", "--deterministic=0"}, {{"DELTANET_DETERMINISTIC", "1"}})->deterministic);
  const auto wrong = Parse({"--model", "m=x"}, {{"DELTANET_THREADS", "many"}});
  EXPECT_THAT(std::string(wrong.status().message()), HasSubstr("DELTANET_THREADS is \"many\", want"));
}

TEST(Config, HelpAndVersionNeedNoModel) {
  EXPECT_TRUE(Parse({"--help"})->help);
  EXPECT_TRUE(Parse({"--version"})->version);
}

struct Wrong {
  std::vector<std::string> arguments;
  const char* message;
};

class ConfigErrors : public ::testing::TestWithParam<Wrong> {};

TEST_P(ConfigErrors, NameFlagFoundAndWanted) {
  std::vector<std::string> arguments = {"--model", "m=x"};
  arguments.insert(arguments.end(), GetParam().arguments.begin(), GetParam().arguments.end());
  const auto config = Parse(arguments);
  EXPECT_EQ(config.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(config.status().message()), HasSubstr(GetParam().message));
}

INSTANTIATE_TEST_SUITE_P(
    Cases, ConfigErrors,
    ::testing::Values(
        Wrong{{"model"}, "\"model\" is no flag"}, Wrong{{"--modle", "x"}, "unknown flag --modle"},
        Wrong{{"--model"}, "--model has no value, want NAME=DIR"},
        Wrong{{"--model", "x"}, "--model is \"x\", want NAME=DIRECTORY"},
        Wrong{{"--model", "a b=x"}, "want NAME=DIRECTORY"},
        Wrong{{"--model", "m=y"}, "--model is \"m=y\", want names that differ"},
        Wrong{{"--device", "gpu"}, "--device is \"gpu\", want cpu or cuda"},
        Wrong{{"--deterministic=yes"}, "--deterministic is \"yes\", want 0 or 1"},
        Wrong{{"--deterministic", "1"}, "\"1\" is no flag"},
        Wrong{{"--listen", "50051"}, "--listen is \"50051\", want HOST:PORT"},
        Wrong{{"--listen", ":50051"}, "want HOST:PORT"}, Wrong{{"--listen", "h:65536"}, "want HOST:PORT"},
        Wrong{{"--listen", "::1:50051"}, "want HOST:PORT"},
        Wrong{{"--max-sessions", "-1"}, "--max-sessions is \"-1\", want a whole number from 0"},
        Wrong{{"--max-step-tokens", "79"}, "from 80"}, Wrong{{"--mixed-step-tokens", "79"}, "from 80"},
        Wrong{{"--max-generated-tokens", "0"}, "from 1"},
        Wrong{{"--default-generated-tokens", "0"}, "from 1"},
        Wrong{{"--state-memory", "0"}, "--state-memory is \"0\", want bytes"},
        Wrong{{"--state-memory", "101%"}, "want bytes"}, Wrong{{"--state-memory", "nan%"}, "want bytes"},
        Wrong{{"--state-memory", "9223372036854775807KiB"}, "want bytes"},
        Wrong{{"--session-ttl", "10"}, "--session-ttl is \"10\", want a duration"},
        Wrong{{"--session-ttl", "25h"}, "want at most --max-session-ttl, 24h"},
        Wrong{{"--keepalive-time", "1ms"}, "--keepalive-time is \"1ms\", want a duration from 1s"},
        Wrong{{"--max-concurrent-streams", "0"}, "--max-concurrent-streams is \"0\", want a whole number"},
        Wrong{{"--max-response-bytes", "many"}, "--max-response-bytes is \"many\", want bytes"},
        Wrong{{"--max-message-bytes", "3GiB"}, "--max-message-bytes is \"3GiB\""},
        Wrong{{"--tls-cert", "c.pem"},
              "--tls-cert is c.pem and --tls-key is not given, want both or neither"},
        Wrong{{"--tls-client-ca", "c.pem"}, "--tls-cert is not given and --tls-key is not given, want both"},
        Wrong{{"--tls-key", ""}, "--tls-key is \"\", want the path of a PEM file"},
        Wrong{{"--step-timeout", "0"}, "--step-timeout is \"0\", want a duration from 1s"},
        Wrong{{"--threads", "2", "--threads", "3"}, "--threads is given twice"},
        Wrong{{"--help=yes"}, "--help is \"yes\", want no value"}));

TEST(Config, NoModelIsAnError) {
  EXPECT_THAT(std::string(Parse({}).status().message()), HasSubstr("--model is not given"));
}

TEST(Config, MutatedArgumentsParseOrSayWhy) {
  const std::vector<std::string> good = {
      "--model", "m=/models/m",   "--listen", "127.0.0.1:50051",          "--state-memory",
      "25%",     "--session-ttl", "10m",      "--max-message-bytes=64MiB"};
  std::mt19937 random(7);
  int accepted = 0;
  for (int i = 0; i < 20000; ++i) {
    std::vector<std::string> arguments = good;
    for (int n = static_cast<int>(random() % 3) + 1; n > 0; --n) {
      std::string* argument = &arguments[random() % arguments.size()];
      const size_t at = argument->empty() ? 0 : random() % argument->size();
      switch (random() % 3) {
        case 0:
          argument->insert(at, 1, static_cast<char>(random()));
          break;
        case 1:
          argument->erase(at, 1);
          break;
        default:
          if (!argument->empty()) (*argument)[at] = static_cast<char>(random());
      }
    }
    const auto config = Parse(arguments);
    accepted += config.ok() ? 1 : 0;
    if (!config.ok()) {
      EXPECT_EQ(config.status().code(), absl::StatusCode::kInvalidArgument);
      EXPECT_FALSE(config.status().message().empty());
    }
  }
  EXPECT_GT(accepted, 0);
}

}  // namespace
}  // namespace deltanet
