// What one client may cost, and that what it held is free when it is gone.
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/e2e/tcp_proxy.h"
#include "tests/e2e/test_server.h"

namespace deltanet {
namespace {

using ::testing::HasSubstr;

// Blocks until the server counts `sessions` of model m; the test's time limit ends it.
void AwaitSessions(const TestServer& server, int64_t sessions) {
  while (server.client().GetModel("m")->sessions != sessions) {
  }
}

// Blocks until so many streams have ended, and expects that each was given up by its client.
void ExpectGivenUp(const TestServer& server, int streams) {
  const auto ended = [&](const std::string& code) {
    return server.Metric("deltanet_requests_total{code=\"" + code + "\",method=\"StreamForward\"}");
  };
  while (ended("OK") + ended("CANCELLED") != streams) {
  }
  ASSERT_EQ(ended("CANCELLED"), streams);
  while (server.Metric("deltanet_errors_total{reason=\"CANCELLED\"}") != streams) {
  }
}

TEST(Limits, AHalfOpenConnectionIsNoticedAndItsSessionsAreFreed) {
  ServerOptions options;
  options.connections.keepalive_time = absl::Seconds(1);
  options.connections.keepalive_timeout = absl::Milliseconds(500);
  TestServer server(FakeModelOptions{}, options);
  TcpProxy proxy(server.server().port());
  const auto client = Client::Connect(absl::StrCat("127.0.0.1:", proxy.port()), {});
  ASSERT_TRUE(client.ok());
  const std::vector<float> input = RandomValues(1, 4);
  const auto stream = client->OpenStream({});
  StreamResponse response;
  ASSERT_TRUE(stream->Write({.session = SessionChoice{"named", true}, .input = AllTokens(input)}) &&
              stream->Read(&response));
  ASSERT_TRUE(stream->Write({.input = AllTokens(input)}) && stream->Read(&response));
  EXPECT_EQ(server.client().GetModel("m")->sessions, 2);
  proxy.Freeze();  // Nobody closes anything.
  AwaitSessions(server, 1);
  // The named one outlives its stream and is free for others.
  const auto again =
      server.client().Forward(AllTokens(input), {.session = SessionChoice{"named"}, .expected_position = 4});
  EXPECT_TRUE(again.ok()) << again.status();
  EXPECT_EQ(server.Metric("deltanet_slots_free{model=\"m\"}"), 8 - 1);
  ExpectGivenUp(server, 1);
  stream->Cancel();
}

TEST(Limits, AClientWhoseConnectionBreaksIsGoneAtOnce) {
  TestServer server(FakeModelOptions{});
  auto proxy = std::make_unique<TcpProxy>(server.server().port());
  const auto client = Client::Connect(absl::StrCat("127.0.0.1:", proxy->port()), {});
  ASSERT_TRUE(client.ok());
  const auto stream = client->OpenStream({});
  const std::vector<float> input = RandomValues(1, 4);
  StreamResponse response;
  ASSERT_TRUE(stream->Write({.input = AllTokens(input)}) && stream->Read(&response));
  proxy.reset();
  AwaitSessions(server, 0);
  EXPECT_EQ(server.Metric("deltanet_slots_free{model=\"m\"}"), 8);
  ExpectGivenUp(server, 1);
  EXPECT_FALSE(stream->Read(&response));
  EXPECT_EQ(stream->Finish().code(), absl::StatusCode::kUnavailable);
}

TEST(Limits, AnIdleStreamThatItsClientCancelsIsCountedAsSuch) {
  TestServer server(FakeModelOptions{});
  const std::vector<float> input = RandomValues(1, 4);
  constexpr int kStreams = 20;  // What the server sees first is not always the same.
  for (int i = 0; i < kStreams; ++i) {
    const auto stream = server.client().OpenStream({});
    StreamResponse response;
    ASSERT_TRUE(stream->Write({.input = AllTokens(input)}) && stream->Read(&response));
    stream->Cancel();
  }
  ExpectGivenUp(server, kStreams);
  AwaitSessions(server, 0);
  EXPECT_EQ(server.Metric("deltanet_slots_free{model=\"m\"}"), 8);
}

TEST(Limits, MoreStreamsThanAConnectionMayHaveWaitAtTheClient) {
  ServerOptions options;
  options.connections.max_concurrent_streams = 2;
  TestServer server(FakeModelOptions{}, options);
  const Client client = server.Connect();
  const std::vector<float> input = RandomValues(1, 4);
  StreamResponse response;
  const auto first = client.OpenStream({});
  const auto second = client.OpenStream({});
  for (const auto& stream : {first.get(), second.get()}) {
    ASSERT_TRUE(stream->Write({.input = AllTokens(input)}) && stream->Read(&response));
  }
  const absl::Status third = client.Forward(AllTokens(input), {.timeout = absl::Milliseconds(100)}).status();
  EXPECT_EQ(third.code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_TRUE(server.client().Forward(AllTokens(input), {}).ok()) << "other connections have their own limit";
  EXPECT_TRUE(first->Finish().ok());
  EXPECT_TRUE(client.Forward(AllTokens(input), {}).ok());
}

TEST(Limits, AnOldConnectionIsReplacedAndItsCallsAreCutAfterTheGrace) {
  ServerOptions options;
  options.connections.max_age = absl::Milliseconds(200);
  options.connections.max_age_grace = absl::Milliseconds(200);
  TestServer server(FakeModelOptions{}, options);
  const std::vector<float> input = RandomValues(1, 4);
  StreamResponse response;
  const auto stream = server.client().OpenStream({});
  ASSERT_TRUE(stream->Write({.input = AllTokens(input)}) && stream->Read(&response));
  EXPECT_FALSE(stream->Read(&response));
  EXPECT_FALSE(stream->Finish().ok());
  AwaitSessions(server, 0);
}

TEST(Limits, SessionsOfOneClient) {
  ServerOptions options;
  options.sessions.max_per_peer = 2;
  TestServer server(FakeModelOptions{.num_slots = 16}, options);
  const std::vector<float> input = RandomValues(1, 4);
  const auto create = [&](const std::string& id) {
    return server.client().Forward(AllTokens(input), {.session = SessionChoice{id, true}}).status();
  };
  EXPECT_TRUE(create("a").ok());
  const auto stream = server.client().OpenStream({});
  StreamResponse response;
  ASSERT_TRUE(stream->Write({.input = AllTokens(input)}) && stream->Read(&response));
  EXPECT_TRUE(response.status.ok());
  const absl::Status refused = create("b");
  EXPECT_EQ(refused.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(ErrorReason(refused), reason::kSessionsFull);
  EXPECT_THAT(std::string(refused.message()), HasSubstr("this client has 2 sessions, its limit is 2"));
  EXPECT_TRUE(server.client().Forward(AllTokens(input), {}).ok()) << "stateless work needs none";
  EXPECT_TRUE(server.client().EndSession("a").ok());
  EXPECT_TRUE(create("b").ok());
}

TEST(Limits, ResponsesAreWeighedBeforeTheyAreComputed) {
  ServerOptions options;
  options.max_response_bytes = 10 * kOutputWidth * 4;
  TestServer server(FakeModelOptions{}, options);
  EXPECT_EQ(server.client().GetModel("m")->max_response_bytes, 10 * kOutputWidth * 4);
  EXPECT_TRUE(server.client().Forward(AllTokens(RandomValues(1, 10)), {}).ok());
  const std::vector<float> input = RandomValues(1, 11);
  const absl::Status refused = server.client().Forward(AllTokens(input), {}).status();
  EXPECT_EQ(refused.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(ErrorReason(refused), reason::kResponseTooLarge);
  EXPECT_EQ(server.model().launched().size(), 1u);
  EXPECT_TRUE(server.client().Forward(AllTokens(input), {.output_dtype = DType::kFloat16}).ok());
}

}  // namespace
}  // namespace deltanet
