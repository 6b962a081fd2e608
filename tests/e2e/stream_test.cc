// StreamForward: order, sessions, errors in the stream, recovery, backpressure, disconnects.
#include <algorithm>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/e2e/test_server.h"

namespace deltanet {
namespace {

using ::testing::HasSubstr;

// Sends one message and waits for its answer.
StreamResponse Exchange(ForwardStream* stream, const StreamRequest& request) {
  StreamResponse response;
  EXPECT_TRUE(stream->Write(request));
  if (!stream->Read(&response)) response.status = absl::UnknownError("the stream has ended");
  return response;
}

std::vector<float> Slice(const std::vector<float>& output, int64_t begin, int64_t end) {
  return {output.begin() + begin * kOutputWidth, output.begin() + end * kOutputWidth};
}

struct Chunks {
  int64_t lookahead;
  std::vector<int64_t> sizes;  // Used in turn.
};

class StreamChunks : public ::testing::TestWithParam<Chunks> {};

TEST_P(StreamChunks, JoinedAreTheOneShotOutput) {
  TestServer server(FakeModelOptions{.lookahead = GetParam().lookahead});
  constexpr int64_t kTokens = 300;
  const std::vector<float> input = RandomValues(5, kTokens);
  const auto stream = server.client().OpenStream({});
  std::vector<float> output;
  int64_t position = 0;
  for (int64_t i = 0; position < kTokens; ++i) {
    const int64_t end = std::min(kTokens, position + GetParam().sizes[i % GetParam().sizes.size()]);
    const std::string id = absl::StrCat("r", i);
    const StreamResponse response = Exchange(
        stream.get(),
        {.request_id = id, .input = Tokens(input, position, end), .end_of_sequence = end == kTokens});
    ASSERT_TRUE(response.status.ok()) << response.status;
    EXPECT_EQ(response.request_id, id);
    EXPECT_EQ(response.output_position, static_cast<int64_t>(output.size()) / kOutputWidth);
    EXPECT_EQ(response.committed_position, end);
    Append(Floats(response.output), &output);
    position = end;
  }
  EXPECT_EQ(output, server.model().ExpectedOutput(input));
  EXPECT_TRUE(stream->Finish().ok());
}

INSTANTIATE_TEST_SUITE_P(Sizes, StreamChunks,
                         ::testing::Values(Chunks{0, {1}}, Chunks{0, {7}}, Chunks{0, {64}}, Chunks{0, {300}},
                                           Chunks{6, {1}}, Chunks{6, {7}}, Chunks{6, {64}},
                                           Chunks{6, {1, 299}}, Chunks{6, {300}}, Chunks{6, {5, 1, 90, 3}}));

TEST(Stream, EachMessageSaysWhatIsMadeOfItsOutputs) {
  TestServer server(FakeModelOptions{.takes_tokens = true});
  const std::vector<int64_t> ids = {3, 1, 4, 1, 5, 2, 6, 5, 3, 5};
  const auto part = [&](int64_t begin, int64_t end) {
    return TensorView{ids.data() + begin, {end - begin}, DType::kInt64};
  };
  const auto logits = [&](size_t tokens) {
    return server.model().ExpectedLogits(absl::MakeSpan(ids).subspan(0, tokens));
  };
  const auto stream = server.client().OpenStream({});
  StreamResponse response = Exchange(
      stream.get(), {.input = part(0, 2), .output_options = {.kind = OutputKind::kScores, .top_tokens = 2}});
  ASSERT_TRUE(response.status.ok()) << response.status;
  EXPECT_EQ(response.output_position, 1);
  EXPECT_EQ(response.log_probs, std::vector<float>{LogProb(logits(1), 1)});
  EXPECT_EQ(response.top.ids.size(), 2u);
  EXPECT_EQ(response.top.ids[0], MostLikely(logits(1), 1)[0].id);
  EXPECT_TRUE(response.output.data.empty());
  response = Exchange(stream.get(), {.input = part(2, 4), .output_options = {.kind = OutputKind::kScores}});
  ASSERT_TRUE(response.status.ok()) << response.status;
  EXPECT_EQ(response.output_position, 2);
  EXPECT_EQ(response.log_probs, (std::vector<float>{LogProb(logits(2), 4), LogProb(logits(3), 1)}));
  response = Exchange(stream.get(),
                      {.input = part(4, 8),
                       .output_options = {.kind = OutputKind::kTop, .last_only = true, .top_tokens = 1}});
  ASSERT_TRUE(response.status.ok()) << response.status;
  EXPECT_EQ(response.output_position, 7);
  EXPECT_EQ(response.top.ids, std::vector<int64_t>{MostLikely(logits(8), 1)[0].id});
  EXPECT_TRUE(response.log_probs.empty());
  response = Exchange(stream.get(), {.input = part(8, 10), .output_options = {.last_only = true}});
  ASSERT_TRUE(response.status.ok()) << response.status;
  EXPECT_EQ(Floats(response.output), logits(10));
  EXPECT_EQ(response.output_position, 9);
  EXPECT_EQ(server.Metric("deltanet_stream_output_interval_seconds_count"), 3) << "each gave output";

  const StreamResponse bad = Exchange(
      stream.get(), {.input = part(0, 1), .output_options = {.kind = OutputKind::kTop, .top_tokens = 9}});
  EXPECT_EQ(ErrorReason(bad.status), reason::kInvalidRequest);
  EXPECT_EQ(bad.committed_position, 10);
}

TEST(Stream, PipelinedMessagesOfManySessionsKeepTheirOrder) {
  TestServer server(FakeModelOptions{.lookahead = 2, .num_slots = 64});
  constexpr uint32_t kSessions = 20;
  constexpr int64_t kTokens = 60;
  std::vector<std::vector<float>> inputs;
  for (uint32_t s = 0; s < kSessions; ++s) inputs.push_back(RandomValues(s, kTokens));
  const auto stream = server.client().OpenStream({});
  std::thread writer([&] {
    std::mt19937 random(6);
    std::vector<int64_t> position(kSessions);
    std::vector<uint32_t> open;
    for (uint32_t s = 0; s < kSessions; ++s) open.push_back(s);
    while (!open.empty()) {
      const size_t pick = random() % open.size();
      const uint32_t s = open[pick];
      const int64_t end = std::min<int64_t>(kTokens, position[s] + 1 + random() % 20);
      EXPECT_TRUE(stream->Write({.stream_session = s,
                                 .input = Tokens(inputs[s], position[s], end),
                                 .end_of_sequence = end == kTokens}));
      position[s] = end;
      if (end == kTokens) open.erase(open.begin() + pick);
    }
    stream->WritesDone();
  });
  std::vector<std::vector<float>> outputs(kSessions);
  StreamResponse response;
  while (stream->Read(&response)) {
    ASSERT_TRUE(response.status.ok()) << response.status;
    std::vector<float>* output = &outputs[response.stream_session];
    EXPECT_EQ(response.output_position, static_cast<int64_t>(output->size()) / kOutputWidth);
    Append(Floats(response.output), output);
  }
  writer.join();
  EXPECT_TRUE(stream->Finish().ok());
  for (uint32_t s = 0; s < kSessions; ++s) EXPECT_EQ(outputs[s], server.model().ExpectedOutput(inputs[s]));
}

// So many that their answers are written by other threads than the one that computes.
TEST(Stream, ManyAnswersAtOnceKeepTheirOrder) {
  TestServer server(FakeModelOptions{.num_slots = 200, .max_step_tokens = 1024, .max_step_rows = 128});
  constexpr uint32_t kSessions = 60;  // In a stream's window.
  constexpr int64_t kTokens = 30;
  std::vector<std::unique_ptr<ForwardStream>> streams;
  for (int i = 0; i < 2; ++i) streams.push_back(server.client().OpenStream({}));
  const auto input = [&](size_t stream, uint32_t s) { return RandomValues(stream * 1000 + s, kTokens); };
  std::map<std::pair<size_t, uint32_t>, std::vector<float>> outputs;
  for (int64_t position = 0; position < kTokens; ++position) {
    const int64_t held = static_cast<int64_t>(server.model().launched().size());
    server.model().Hold(held);  // So that the step behind it has all the rest.
    for (size_t i = 0; i < streams.size(); ++i) {
      for (uint32_t s = 0; s < kSessions; ++s) {
        ASSERT_TRUE(streams[i]->Write({.stream_session = s,
                                       .input = Tokens(input(i, s), position, position + 1),
                                       .end_of_sequence = position + 1 == kTokens}));
      }
    }
    server.model().WaitUntilHeld(held);
    const double in_step = static_cast<double>(server.model().launched().back().size());
    while (in_step + server.Metric("deltanet_queued_works") < 2 * kSessions) continue;
    server.model().Release(held);
    for (size_t i = 0; i < streams.size(); ++i) {
      for (uint32_t s = 0; s < kSessions; ++s) {
        StreamResponse response;
        ASSERT_TRUE(streams[i]->Read(&response));
        ASSERT_TRUE(response.status.ok()) << response.status;
        EXPECT_EQ(response.output_position, position);
        Append(Floats(response.output), &outputs[{i, response.stream_session}]);
      }
    }
  }
  size_t most = 0;
  for (const auto& rows : server.model().launched()) most = std::max(most, rows.size());
  EXPECT_GE(most, 32u);
  for (size_t i = 0; i < streams.size(); ++i) {
    EXPECT_TRUE(streams[i]->Finish().ok());
    for (uint32_t s = 0; s < kSessions; ++s) {
      EXPECT_EQ((outputs[{i, s}]), server.model().ExpectedOutput(input(i, s)));
    }
  }
}

TEST(Stream, ANumberBeginsAnewAfterEndOfSequenceEvenPipelined) {
  TestServer server(FakeModelOptions{});
  const auto stream = server.client().OpenStream({});
  std::vector<std::vector<float>> inputs;
  for (int i = 0; i < 10; ++i) {
    inputs.push_back(RandomValues(i, 5));
    ASSERT_TRUE(stream->Write({.input = Tokens(inputs[i], 0, 3)}));
    ASSERT_TRUE(stream->Write({.input = Tokens(inputs[i], 3, 5), .end_of_sequence = true}));
  }
  stream->WritesDone();
  for (int i = 0; i < 10; ++i) {
    StreamResponse first, last;
    ASSERT_TRUE(stream->Read(&first) && stream->Read(&last));
    ASSERT_TRUE(first.status.ok() && last.status.ok()) << first.status << last.status;
    std::vector<float> output = Floats(first.output);
    Append(Floats(last.output), &output);
    EXPECT_EQ(output, server.model().ExpectedOutput(inputs[i]));
  }
  EXPECT_TRUE(stream->Finish().ok());
}

TEST(Stream, AfterAFailedEndOfSequenceTheSessionGoesOn) {
  TestServer server(FakeModelOptions{});
  server.model().Hold(0);
  server.model().FailRow(1, 0);
  const std::vector<float> input = RandomValues(1, 10);
  const auto stream = server.client().OpenStream({});
  ASSERT_TRUE(stream->Write({.input = Tokens(input, 0, 4)}));
  server.model().WaitUntilHeld(0);
  ASSERT_TRUE(stream->Write({.input = Tokens(input, 4, 8), .end_of_sequence = true}));
  // Meant for a new session, or for the old one? That is known only when the one before is answered.
  ASSERT_TRUE(stream->Write({.input = Tokens(input, 8, 9)}));
  server.model().Release(0);
  StreamResponse response;
  ASSERT_TRUE(stream->Read(&response));
  EXPECT_TRUE(response.status.ok());
  ASSERT_TRUE(stream->Read(&response));
  EXPECT_EQ(ErrorReason(response.status), reason::kNonFinite);
  EXPECT_EQ(response.committed_position, 4);
  ASSERT_TRUE(stream->Read(&response));
  EXPECT_EQ(ErrorReason(response.status), reason::kSessionOutOfStep);
  response = Exchange(stream.get(),
                      {.input = Tokens(input, 4, 10), .end_of_sequence = true, .expected_position = 4});
  ASSERT_TRUE(response.status.ok()) << response.status;
  EXPECT_EQ(Floats(response.output), Slice(server.model().ExpectedOutput(input), 4, 10));
}

TEST(Stream, ABadMessageIsAnsweredInTheStreamAndNothingIsAppliedWithAGap) {
  TestServer server(FakeModelOptions{});
  const std::vector<float> input = RandomValues(1, 50);
  const auto stream = server.client().OpenStream({});
  ASSERT_TRUE(stream->Write({.request_id = "a", .input = Tokens(input, 0, 10)}));
  ASSERT_TRUE(stream->Write({.request_id = "b", .input = {input.data(), {10, 5}}}));  // Wrong width.
  ASSERT_TRUE(stream->Write({.request_id = "c", .input = Tokens(input, 20, 30)}));    // Behind the lost one.
  ASSERT_TRUE(stream->Write({.request_id = "d", .stream_session = 1, .input = Tokens(input, 0, 1)}));
  std::map<std::string, StreamResponse> responses;
  for (int i = 0; i < 4; ++i) {
    StreamResponse response;
    ASSERT_TRUE(stream->Read(&response));
    responses[response.request_id] = response;
  }
  EXPECT_TRUE(responses["a"].status.ok()) << responses["a"].status;
  EXPECT_EQ(responses["b"].status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(responses["b"].status.message()), HasSubstr("[10,5]"));
  EXPECT_EQ(responses["b"].committed_position, 10);
  EXPECT_EQ(ErrorReason(responses["c"].status), reason::kSessionOutOfStep);
  EXPECT_EQ(ErrorMetadata(responses["c"].status, "committed_position"), "10");
  EXPECT_TRUE(responses["d"].status.ok()) << "another session of the stream is not touched";

  StreamResponse wrong = Exchange(stream.get(), {.input = Tokens(input, 20, 30), .expected_position = 20});
  EXPECT_EQ(ErrorReason(wrong.status), reason::kPositionMismatch);
  const StreamResponse right =
      Exchange(stream.get(), {.input = Tokens(input, 10, 50), .expected_position = 10});
  ASSERT_TRUE(right.status.ok()) << right.status;
  EXPECT_EQ(Floats(right.output), Slice(server.model().ExpectedOutput(input), 10, 50));
  EXPECT_TRUE(stream->Finish().ok());
}

TEST(Stream, ASessionWhoseFirstMessageIsBadStaysOutOfStep) {
  TestServer server(FakeModels{{"a", {}}, {"b", {}}});
  const std::vector<float> input = RandomValues(1, 2);
  const auto stream = server.client().OpenStream({});
  ASSERT_TRUE(stream->Write({.model = "nobody", .input = Tokens(input, 0, 1)}));
  ASSERT_TRUE(stream->Write({.model = "a", .input = Tokens(input, 1, 2)}));
  StreamResponse response;
  ASSERT_TRUE(stream->Read(&response));
  EXPECT_EQ(ErrorReason(response.status), reason::kModelNotFound);
  ASSERT_TRUE(stream->Read(&response));
  EXPECT_EQ(ErrorReason(response.status), reason::kSessionOutOfStep);
  response = Exchange(stream.get(), {.model = "a", .input = Tokens(input, 0, 2), .expected_position = 0});
  ASSERT_TRUE(response.status.ok()) << response.status;
  EXPECT_EQ(Floats(response.output), server.model(0).ExpectedOutput(input));
}

TEST(Stream, ALostCreationIsNotTakenForSomebodyElsesSession) {
  TestServer server(FakeModelOptions{});
  const std::vector<float> input = RandomValues(1, 2);
  ASSERT_TRUE(server.client().Forward(AllTokens(input), {.session = SessionChoice{"s", true}}).ok());
  const auto stream = server.client().OpenStream({});
  ASSERT_TRUE(stream->Write({.session = SessionChoice{"s", true}, .input = Tokens(input, 0, 1)}));
  ASSERT_TRUE(stream->Write({.session = SessionChoice{"s"}, .input = Tokens(input, 1, 2)}));
  StreamResponse response;
  ASSERT_TRUE(stream->Read(&response));
  EXPECT_EQ(ErrorReason(response.status), reason::kSessionExists);
  ASSERT_TRUE(stream->Read(&response));
  EXPECT_EQ(ErrorReason(response.status), reason::kSessionOutOfStep);
  EXPECT_EQ((*server.client().ListSessions(""))[0].committed_position, 2);
}

TEST(Stream, MessagesThatNameNoSessionAreAnsweredToo) {
  TestServer server(FakeModelOptions{});
  const std::vector<float> input = RandomValues(1, 1);
  const auto stream = server.client().OpenStream({});
  StreamResponse response =
      Exchange(stream.get(), {.session = SessionChoice{"a b"}, .input = AllTokens(input)});
  EXPECT_EQ(response.status.code(), absl::StatusCode::kInvalidArgument);
  response = Exchange(stream.get(), {.session = SessionChoice{"unknown"}, .input = AllTokens(input)});
  EXPECT_EQ(ErrorReason(response.status), reason::kSessionNotFound);
  EXPECT_EQ(response.session_id, "unknown");
  response = Exchange(stream.get(), {.input = AllTokens(input)});
  EXPECT_TRUE(response.status.ok()) << response.status;
  EXPECT_TRUE(stream->Finish().ok());
}

TEST(Stream, ANamedSessionIsAttachedUntilTheStreamEnds) {
  TestServer server(FakeModelOptions{});
  const std::vector<float> input = RandomValues(1, 30);
  const auto first = server.client().OpenStream({});
  StreamResponse response =
      Exchange(first.get(), {.session = SessionChoice{"s", true}, .input = Tokens(input, 0, 10)});
  ASSERT_TRUE(response.status.ok()) << response.status;
  EXPECT_EQ(response.session_id, "s");
  EXPECT_TRUE((*server.client().ListSessions(""))[0].attached);

  const auto second = server.client().OpenStream({});
  response = Exchange(second.get(), {.session = SessionChoice{"s"}, .input = Tokens(input, 10, 20)});
  EXPECT_EQ(response.status.code(), absl::StatusCode::kAborted);
  EXPECT_EQ(ErrorReason(response.status), reason::kSessionAttached);
  const auto unary = server.client().Forward(Tokens(input, 10, 20), {.session = SessionChoice{"s"}});
  EXPECT_EQ(ErrorReason(unary.status()), reason::kSessionAttached);

  ASSERT_TRUE(first->Finish().ok());
  response = Exchange(
      second.get(), {.session = SessionChoice{"s"}, .input = Tokens(input, 10, 20), .expected_position = 10});
  ASSERT_TRUE(response.status.ok()) << response.status;
  ASSERT_TRUE(second->Finish().ok());
  const auto last = server.client().Forward(Tokens(input, 20, 30),
                                            {.session = SessionChoice{"s"}, .end_of_sequence = true});
  ASSERT_TRUE(last.ok()) << last.status();
  EXPECT_EQ(Floats(last->output), Slice(server.model().ExpectedOutput(input), 20, 30));
}

TEST(Stream, AServerMadeIdCanBeUsedAtOnce) {
  TestServer server(FakeModelOptions{});
  const std::vector<float> input = RandomValues(1, 2);
  const auto stream = server.client().OpenStream({});
  StreamResponse response =
      Exchange(stream.get(), {.session = SessionChoice{"", true}, .input = Tokens(input, 0, 1)});
  ASSERT_TRUE(response.status.ok()) << response.status;
  EXPECT_EQ(response.session_id.size(), 32u);
  // Number 0 of the stream's own is another session.
  EXPECT_EQ(Exchange(stream.get(), {.input = Tokens(input, 0, 1)}).committed_position, 1);
  response =
      Exchange(stream.get(), {.session = SessionChoice{response.session_id}, .input = Tokens(input, 1, 2)});
  EXPECT_EQ(response.committed_position, 2) << response.status;
  EXPECT_EQ(Floats(response.output), Slice(server.model().ExpectedOutput(input), 1, 2));
}

TEST(Stream, ASessionBelongsToOneModelAndCreatesOnce) {
  TestServer server(FakeModels{{"a", {}}, {"b", {}}});
  const std::vector<float> input = RandomValues(1, 1);
  const auto stream = server.client().OpenStream({});
  ASSERT_TRUE(Exchange(stream.get(), {.model = "b", .input = AllTokens(input)}).status.ok());
  EXPECT_EQ(ErrorReason(Exchange(stream.get(), {.model = "a", .input = AllTokens(input)}).status),
            reason::kSessionModel);
  // Without a name it is the model of the stream's first message.
  EXPECT_TRUE(Exchange(stream.get(), {.stream_session = 1, .input = AllTokens(input)}).status.ok());
  EXPECT_EQ(server.client().GetModel("b")->sessions, 2);
  ASSERT_TRUE(
      Exchange(stream.get(), {.session = SessionChoice{"s", true}, .input = AllTokens(input)}).status.ok());
  EXPECT_EQ(
      ErrorReason(
          Exchange(stream.get(), {.session = SessionChoice{"s", true}, .input = AllTokens(input)}).status),
      reason::kSessionExists);
}

TEST(Stream, AnOperatorMayEndWhatAStreamHolds) {
  TestServer server(FakeModelOptions{});
  const std::vector<float> input = RandomValues(1, 1);
  const auto stream = server.client().OpenStream({});
  ASSERT_TRUE(
      Exchange(stream.get(), {.session = SessionChoice{"s", true}, .input = AllTokens(input)}).status.ok());
  const auto position = server.client().EndSession("s");
  ASSERT_TRUE(position.ok()) << position.status();
  EXPECT_EQ(*position, 1);
  EXPECT_EQ(
      ErrorReason(Exchange(stream.get(), {.session = SessionChoice{"s"}, .input = AllTokens(input)}).status),
      reason::kSessionEnded);
  EXPECT_EQ(Exchange(stream.get(), {.session = SessionChoice{"s", true}, .input = AllTokens(input)})
                .committed_position,
            1)
      << "it can be made again";
}

TEST(Stream, AMessageHasItsOwnTimeout) {
  TestServer server(FakeModelOptions{});
  server.model().Hold(0);
  const std::vector<float> input = RandomValues(1, 4);
  const auto stream = server.client().OpenStream({});
  ASSERT_TRUE(stream->Write({.stream_session = 1, .input = Tokens(input, 0, 1)}));
  server.model().WaitUntilHeld(0);
  ASSERT_TRUE(
      stream->Write({.request_id = "late", .input = Tokens(input, 0, 2), .timeout = absl::Nanoseconds(1)}));
  ASSERT_TRUE(stream->Write({.request_id = "behind", .input = Tokens(input, 2, 4)}));
  server.model().Release(0);
  std::map<std::string, StreamResponse> responses;
  for (int i = 0; i < 3; ++i) {
    StreamResponse response;
    ASSERT_TRUE(stream->Read(&response));
    responses[response.request_id] = response;
  }
  EXPECT_EQ(responses["late"].status.code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_EQ(ErrorReason(responses["late"].status), reason::kDeadline);
  EXPECT_EQ(ErrorReason(responses["behind"].status), reason::kSessionOutOfStep);
  EXPECT_TRUE(Exchange(stream.get(), {.input = Tokens(input, 0, 4), .expected_position = 0}).status.ok());
}

TEST(Stream, HalfClosingAnswersWhatIsPending) {
  TestServer server(FakeModelOptions{});
  server.model().Hold(0);
  const std::vector<float> input = RandomValues(1, 40);
  const auto stream = server.client().OpenStream({});
  for (int64_t i = 0; i < 40; ++i) ASSERT_TRUE(stream->Write({.input = Tokens(input, i, i + 1)}));
  stream->WritesDone();
  server.model().WaitUntilHeld(0);
  server.model().Release(0);
  std::vector<float> output;
  StreamResponse response;
  while (stream->Read(&response)) Append(Floats(response.output), &output);
  EXPECT_EQ(output, server.model().ExpectedOutput(input));
  EXPECT_TRUE(stream->Finish().ok());
  EXPECT_EQ(server.client().GetModel("")->sessions, 0) << "the stream's own session has gone with it";
}

TEST(Stream, AnEmptyStreamEndsWell) {
  TestServer server(FakeModelOptions{});
  EXPECT_TRUE(server.client().OpenStream({})->Finish().ok());
}

TEST(Stream, ADisconnectFreesItsSessionsAndGivesUpItsWork) {
  TestServer server(FakeModelOptions{.num_slots = 8});
  server.model().Hold(2);
  const std::vector<float> input = RandomValues(1, 10);
  {
    const auto stream = server.client().OpenStream({});
    ASSERT_TRUE(Exchange(stream.get(), {.input = Tokens(input, 0, 2)}).status.ok());
    ASSERT_TRUE(Exchange(stream.get(), {.session = SessionChoice{"s", true}, .input = Tokens(input, 0, 2)})
                    .status.ok());
    ASSERT_TRUE(stream->Write({.session = SessionChoice{"s"}, .input = Tokens(input, 2, 4)}));
    server.model().WaitUntilHeld(2);
    ASSERT_TRUE(stream->Write({.session = SessionChoice{"s"}, .input = Tokens(input, 4, 6)}));
    stream->Cancel();
    EXPECT_EQ(stream->Finish().code(), absl::StatusCode::kCancelled);
  }
  server.model().Release(2);
  while (server.Metric("deltanet_sessions{model=\"m\"}") > 1)
    continue;  // The server hears of it when it does.
  // The named one is free for others, where the work that was given up left it.
  const auto sessions = server.client().ListSessions("");
  ASSERT_EQ(sessions->size(), 1u);
  EXPECT_FALSE((*sessions)[0].attached);
  const int64_t position = (*sessions)[0].committed_position;
  EXPECT_TRUE(position == 2 || position == 4 || position == 6) << position;
  const auto rest = server.client().Forward(
      Tokens(input, position, 10),
      {.session = SessionChoice{"s"}, .end_of_sequence = true, .expected_position = position});
  ASSERT_TRUE(rest.ok()) << rest.status();
  EXPECT_EQ(Floats(rest->output), Slice(server.model().ExpectedOutput(input), position, 10));
  EXPECT_EQ(server.Metric("deltanet_slots_free{model=\"m\"}"), 8);
}

TEST(Stream, ASlowReaderPausesOnlyItself) {
  ServerOptions options;
  options.stream_window_messages = 4;
  TestServer server(FakeModelOptions{.num_slots = 16, .max_step_tokens = 8192}, options);
  constexpr int kMessages = 100;
  constexpr int64_t kTokens = 20000;  // 640 KB of output a message: far more than the transport holds.
  const std::vector<float> input = RandomValues(1, kTokens);
  const auto slow = server.client().OpenStream({});
  std::thread writer([&] {
    for (uint32_t i = 0; i < kMessages; ++i) {
      EXPECT_TRUE(slow->Write({.stream_session = i % 5, .input = AllTokens(input), .end_of_sequence = true}));
    }
    slow->WritesDone();
  });
  const Client other = server.Connect();
  const auto quick = other.OpenStream({});
  const std::vector<float> small = RandomValues(2, 50);
  std::vector<float> output;
  for (int64_t i = 0; i < 50; ++i) {
    const StreamResponse response = Exchange(quick.get(), {.input = Tokens(small, i, i + 1)});
    ASSERT_TRUE(response.status.ok()) << response.status;
    Append(Floats(response.output), &output);
  }
  EXPECT_EQ(output, server.model().ExpectedOutput(small));
  EXPECT_LT(server.Metric("deltanet_stream_messages_total{code=\"OK\"}"), 50 + kMessages);

  const std::vector<float> expected = server.model().ExpectedOutput(input);
  StreamResponse response;
  int answered = 0;
  while (slow->Read(&response)) {
    EXPECT_EQ(Floats(response.output), expected);
    ++answered;
  }
  writer.join();
  EXPECT_EQ(answered, kMessages);
  EXPECT_TRUE(slow->Finish().ok());
}

TEST(Stream, SessionsOfAStreamAreBoundedByTheSlots) {
  ServerOptions options;
  options.max_sessions = 3;
  TestServer server(FakeModelOptions{.num_slots = 8}, options);
  const std::vector<float> input = RandomValues(1, 1);
  const auto stream = server.client().OpenStream({});
  for (uint32_t s = 0; s < 3; ++s) {
    ASSERT_TRUE(Exchange(stream.get(), {.stream_session = s, .input = AllTokens(input)}).status.ok());
  }
  EXPECT_EQ(ErrorReason(Exchange(stream.get(), {.stream_session = 3, .input = AllTokens(input)}).status),
            reason::kSessionsFull);
  ASSERT_TRUE(
      Exchange(stream.get(), {.stream_session = 0, .input = AllTokens(input), .end_of_sequence = true})
          .status.ok());
  EXPECT_TRUE(Exchange(stream.get(), {.stream_session = 3, .input = AllTokens(input), .expected_position = 0})
                  .status.ok());
}

TEST(Stream, TooManySessionsEndTheStream) {
  TestServer server(FakeModelOptions{});
  const std::vector<float> input = RandomValues(1, 1);
  const auto stream = server.client().OpenStream({});
  std::thread writer([&] {
    for (int i = 0; i < 20000; ++i) {
      if (!stream->Write({.session = SessionChoice{absl::StrCat("s", i)}, .input = AllTokens(input)})) break;
    }
  });
  StreamResponse response;
  int answered = 0;
  while (stream->Read(&response)) {
    EXPECT_EQ(ErrorReason(response.status),
              answered < 10000 ? reason::kSessionNotFound : reason::kSessionsFull);
    ++answered;
  }
  writer.join();
  EXPECT_EQ(answered, 10001);
  EXPECT_EQ(ErrorReason(stream->Finish()), reason::kSessionsFull);
}

}  // namespace
}  // namespace deltanet
