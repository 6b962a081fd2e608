#include "client/client.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <thread>
#include <utility>
#include <vector>

#include "client/messages.h"
#include "proto/wire.h"
#include "tests/client/fake_service.h"

namespace deltanet {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::StartsWith;

Tensor FloatTensor(const Shape& shape, const std::vector<float>& values) {
  return {DType::kFloat32, shape,
          std::string(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(float))};
}

std::vector<float> Values(const Tensor& tensor) {
  std::vector<float> values(tensor.data.size() / sizeof(float));
  if (!values.empty()) std::memcpy(values.data(), tensor.data.data(), tensor.data.size());
  return values;
}

class ClientTest : public testing::Test {
 protected:
  ClientTest() : client_(*Client::Connect(service_.address(), {})) {}

  FakeService service_;
  Client client_;
};

TEST(ClientConnectTest, RefusesWrongOptions) {
  EXPECT_EQ(Client::Connect("", {}).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(Client::Connect("localhost:1", {.max_message_bytes = 0}).status().code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(Client::Connect("localhost:1", {.max_message_bytes = int64_t{1} << 31}).status().code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(Client::Connect("localhost:1", {.timeout = absl::ZeroDuration()}).status().code(),
            absl::StatusCode::kInvalidArgument);
}

TEST(ClientConnectTest, ServerThatIsNotThereIsUnavailable) {
  std::string address;
  {
    FakeService service;
    address = service.address();
  }
  absl::StatusOr<Client> client = Client::Connect(address, {});
  ASSERT_TRUE(client.ok());
  EXPECT_EQ(client->ListModels().status().code(), absl::StatusCode::kUnavailable);
  const std::unique_ptr<ForwardStream> stream = client->OpenStream({});
  StreamResponse response;
  EXPECT_FALSE(stream->Read(&response));
  EXPECT_EQ(stream->Finish().code(), absl::StatusCode::kUnavailable);
}

TEST_F(ClientTest, ForwardStateless) {
  const Tensor input = FloatTensor({2, 2, 2}, {1, 2, 3, 4, 5, 6, 7, 8});
  const absl::StatusOr<ForwardResult> result = client_.Forward(input.view(), {.request_id = "r7"});
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(result->request_id, "r7");
  EXPECT_EQ(result->output.shape, (Shape{2, 2, 2}));
  EXPECT_THAT(Values(result->output), ElementsAre(4, 6, 4, 6, 12, 14, 12, 14));
  EXPECT_EQ(result->committed_position, 2);
  EXPECT_EQ(result->session_id, "");
  EXPECT_EQ(result->queued, absl::Microseconds(20));
  EXPECT_EQ(result->computing, absl::Microseconds(300));
  EXPECT_THAT(service_.user_agent(), StartsWith("deltanet-client/" + std::string(ClientVersion())));
}

TEST_F(ClientTest, ForwardContinuesASession) {
  const Tensor first = FloatTensor({1, 2}, {1, 2}), second = FloatTensor({1, 2}, {3, 4});
  absl::StatusOr<ForwardResult> result = client_.Forward(first.view(), {.session = SessionChoice{"", true}});
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(result->session_id, "made-1");
  EXPECT_EQ(result->output.shape, (Shape{0, 2}));
  EXPECT_EQ(result->committed_position, 1);

  result = client_.Forward(second.view(), {.session = SessionChoice{"made-1"}, .expected_position = 0});
  EXPECT_EQ(result.status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(ErrorReason(result.status()), reason::kPositionMismatch);

  result = client_.Forward(
      second.view(), {.session = SessionChoice{"made-1"}, .end_of_sequence = true, .expected_position = 1});
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_THAT(Values(result->output), ElementsAre(4, 6, 4, 6));
  EXPECT_EQ(result->output_position, 0);
  EXPECT_EQ(result->committed_position, 2);
}

TEST_F(ClientTest, ErrorsKeepReasonAndMetadata) {
  const Tensor input = FloatTensor({1, 2}, {1, 2});
  const absl::Status status = client_.Forward(input.view(), {.session = SessionChoice{"nobody"}}).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(status.message(), "no session 'nobody'");
  EXPECT_EQ(ErrorReason(status), reason::kSessionNotFound);
  EXPECT_EQ(ErrorMetadata(status, "committed_position"), "0");
}

TEST_F(ClientTest, ForwardTimesOut) {
  const Tensor input = FloatTensor({1, 2}, {1, 2});
  const absl::Status status =
      client_.Forward(input.view(), {.request_id = FakeService::kHold, .timeout = absl::Milliseconds(50)})
          .status();
  EXPECT_EQ(status.code(), absl::StatusCode::kDeadlineExceeded);
}

TEST_F(ClientTest, StreamAnswersInOrder) {
  const std::unique_ptr<ForwardStream> stream = client_.OpenStream({});
  for (int i = 0; i < 3; ++i) {
    const Tensor chunk = FloatTensor({1, 2}, {1, 10});
    ASSERT_TRUE(
        stream->Write({.request_id = std::to_string(i), .input = chunk.view(), .end_of_sequence = i == 2}));
  }
  stream->WritesDone();
  const std::vector<std::vector<float>> outputs = {{}, {2, 20}, {3, 30, 3, 30}};
  StreamResponse response;
  for (int i = 0; i < 3; ++i) {
    ASSERT_TRUE(stream->Read(&response));
    ASSERT_TRUE(response.status.ok()) << response.status;
    EXPECT_EQ(response.request_id, std::to_string(i));
    EXPECT_EQ(Values(response.output), outputs[i]);
    EXPECT_EQ(response.output_position, i == 2 ? 1 : 0);
    EXPECT_EQ(response.committed_position, i + 1);
    EXPECT_EQ(response.computing, absl::Microseconds(300));
  }
  EXPECT_FALSE(stream->Read(&response));
  EXPECT_TRUE(stream->Finish().ok());
  EXPECT_TRUE(stream->Finish().ok());
}

TEST_F(ClientTest, StreamCarriesSeveralSessions) {
  const std::unique_ptr<ForwardStream> stream = client_.OpenStream({});
  const Tensor one = FloatTensor({1, 2}, {1, 1}), two = FloatTensor({1, 2}, {2, 2});
  ASSERT_TRUE(stream->Write({.stream_session = 5, .input = one.view(), .end_of_sequence = true}));
  ASSERT_TRUE(stream->Write({.session = SessionChoice{"mine", true}, .input = two.view()}));
  StreamResponse response;
  ASSERT_TRUE(stream->Read(&response));
  EXPECT_EQ(response.stream_session, 5u);
  EXPECT_EQ(response.session_id, "");
  EXPECT_THAT(Values(response.output), ElementsAre(1, 1));
  ASSERT_TRUE(stream->Read(&response));
  EXPECT_EQ(response.session_id, "mine");
  EXPECT_TRUE(stream->Finish().ok());

  // The named one has outlived its stream.
  const absl::StatusOr<ForwardResult> rest =
      client_.Forward(two.view(), {.session = SessionChoice{"mine"}, .end_of_sequence = true});
  ASSERT_TRUE(rest.ok()) << rest.status();
  EXPECT_THAT(Values(rest->output), ElementsAre(4, 4, 4, 4));
}

TEST_F(ClientTest, StreamGoesOnAfterAnErrorInIt) {
  const std::unique_ptr<ForwardStream> stream = client_.OpenStream({});
  const Tensor good = FloatTensor({1, 2}, {1, 1}), bad = FloatTensor({1, 2}, {FakeService::kBadValue, 1});
  ASSERT_TRUE(stream->Write({.input = good.view()}));
  ASSERT_TRUE(stream->Write({.input = bad.view()}));
  ASSERT_TRUE(stream->Write({.input = good.view()}));
  ASSERT_TRUE(stream->Write({.input = good.view(), .end_of_sequence = true, .expected_position = 1}));
  StreamResponse response;
  ASSERT_TRUE(stream->Read(&response));
  EXPECT_TRUE(response.status.ok());
  ASSERT_TRUE(stream->Read(&response));
  EXPECT_EQ(response.status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(ErrorReason(response.status), reason::kInvalidRequest);
  EXPECT_EQ(response.committed_position, 1);
  EXPECT_EQ(response.output.data, "");
  ASSERT_TRUE(stream->Read(&response));
  EXPECT_EQ(ErrorReason(response.status), reason::kSessionOutOfStep);
  ASSERT_TRUE(stream->Read(&response));
  EXPECT_TRUE(response.status.ok());
  EXPECT_THAT(Values(response.output), ElementsAre(2, 2, 2, 2));
  EXPECT_TRUE(stream->Finish().ok());
}

TEST_F(ClientTest, OneThreadWritesWhileAnotherReads) {
  constexpr int kMessages = 500;
  const std::unique_ptr<ForwardStream> stream = client_.OpenStream({});
  std::thread writer([&stream] {
    const Tensor chunk = FloatTensor({1, 2}, {1, 2});
    for (int i = 0; i < kMessages; ++i) {
      stream->Write({.stream_session = static_cast<uint32_t>(i % 7), .input = chunk.view()});
    }
    stream->WritesDone();
  });
  int answers = 0;
  StreamResponse response;
  while (stream->Read(&response)) answers += response.status.ok() ? 1 : 0;
  writer.join();
  EXPECT_EQ(answers, kMessages);
  EXPECT_TRUE(stream->Finish().ok());
}

TEST_F(ClientTest, WriteAfterWritesDoneIsRefused) {
  const std::unique_ptr<ForwardStream> stream = client_.OpenStream({});
  const Tensor chunk = FloatTensor({1, 2}, {1, 2});
  stream->WritesDone();
  stream->WritesDone();
  EXPECT_FALSE(stream->Write({.input = chunk.view()}));
  EXPECT_TRUE(stream->Finish().ok());
}

TEST_F(ClientTest, FinishDropsWhatWasNotRead) {
  const std::unique_ptr<ForwardStream> stream = client_.OpenStream({});
  const Tensor chunk = FloatTensor({1, 2}, {1, 2});
  for (int i = 0; i < 10; ++i) ASSERT_TRUE(stream->Write({.input = chunk.view()}));
  EXPECT_TRUE(stream->Finish().ok());
}

TEST_F(ClientTest, CancelFreesABlockedReader) {
  const std::unique_ptr<ForwardStream> stream = client_.OpenStream({});
  const Tensor chunk = FloatTensor({1, 2}, {1, 2});
  ASSERT_TRUE(stream->Write({.request_id = FakeService::kHold, .input = chunk.view()}));
  std::thread canceller([&] {
    service_.AwaitHeld(1);
    stream->Cancel();
  });
  StreamResponse response;
  EXPECT_FALSE(stream->Read(&response));
  canceller.join();
  EXPECT_EQ(stream->Finish().code(), absl::StatusCode::kCancelled);
  service_.Release();
  service_.AwaitCancelled();
}

TEST_F(ClientTest, DestroyingAStreamCancelsIt) {
  std::unique_ptr<ForwardStream> stream = client_.OpenStream({});
  const Tensor chunk = FloatTensor({1, 2}, {1, 2});
  ASSERT_TRUE(stream->Write({.request_id = FakeService::kHold, .input = chunk.view()}));
  service_.AwaitHeld(1);
  stream.reset();
  service_.Release();
  service_.AwaitCancelled();
}

TEST_F(ClientTest, StreamOutlivesItsClient) {
  std::unique_ptr<ForwardStream> stream;
  {
    absl::StatusOr<Client> other = Client::Connect(service_.address(), {});
    ASSERT_TRUE(other.ok());
    stream = other->OpenStream({});
  }
  const Tensor chunk = FloatTensor({1, 2}, {1, 2});
  ASSERT_TRUE(stream->Write({.input = chunk.view(), .end_of_sequence = true}));
  StreamResponse response;
  ASSERT_TRUE(stream->Read(&response));
  EXPECT_THAT(Values(response.output), ElementsAre(1, 2));
}

TEST_F(ClientTest, StreamTimesOut) {
  const std::unique_ptr<ForwardStream> stream = client_.OpenStream({.timeout = absl::Milliseconds(50)});
  const Tensor chunk = FloatTensor({1, 2}, {1, 2});
  stream->Write({.request_id = FakeService::kHold, .input = chunk.view()});
  StreamResponse response;
  EXPECT_FALSE(stream->Read(&response));
  EXPECT_EQ(stream->Finish().code(), absl::StatusCode::kDeadlineExceeded);
}

TEST_F(ClientTest, StreamThatTheServerEndsSaysWhy) {
  const std::unique_ptr<ForwardStream> stream = client_.OpenStream({});
  const Tensor chunk = FloatTensor({1, 2}, {1, 2});
  ASSERT_TRUE(stream->Write({.request_id = FakeService::kBreak, .input = chunk.view()}));
  StreamResponse response;
  EXPECT_FALSE(stream->Read(&response));
  EXPECT_FALSE(stream->Write({.input = chunk.view()}));
  const absl::Status status = stream->Finish();
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(ErrorReason(status), reason::kDraining);
}

TEST_F(ClientTest, LargeResponsesNeedRoom) {
  absl::StatusOr<Client> small = Client::Connect(service_.address(), {.max_message_bytes = 1000});
  ASSERT_TRUE(small.ok());
  const Tensor input = FloatTensor({200, 2}, std::vector<float>(400, 1.0f));
  EXPECT_EQ(small->Forward(input.view(), {}).status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_TRUE(client_.Forward(input.view(), {}).ok());
}

TEST_F(ClientTest, DescribesModels) {
  const absl::StatusOr<ModelInfo> model = client_.GetModel("");
  ASSERT_TRUE(model.ok()) << model.status();
  EXPECT_EQ(model->name, "sum");
  EXPECT_EQ(model->family, "transformer_deltanet");
  EXPECT_THAT(model->input_dtypes, ElementsAre(DType::kFloat32, DType::kBFloat16));
  EXPECT_EQ(model->input_width, FakeService::kWidth);
  EXPECT_EQ(model->vocab_size, 0);
  EXPECT_EQ(model->output_width, FakeService::kWidth);
  EXPECT_THAT(model->output_dtypes, ElementsAre(DType::kFloat32));
  EXPECT_EQ(model->parameters, 7);
  EXPECT_EQ(model->compute_dtype, DType::kFloat32);
  EXPECT_TRUE(model->deterministic);
  EXPECT_EQ(model->device, "cpu");
  EXPECT_EQ(model->lookahead, FakeService::kLookahead);
  EXPECT_EQ(model->bytes_per_session, 100);
  EXPECT_EQ(model->sessions, 3);
  EXPECT_EQ(model->sessions_free, 61);
  EXPECT_EQ(model->max_response_bytes, 1 << 20);

  EXPECT_EQ(ErrorReason(client_.GetModel("other").status()), reason::kModelNotFound);
  const absl::StatusOr<std::vector<ModelInfo>> models = client_.ListModels();
  ASSERT_TRUE(models.ok());
  ASSERT_EQ(models->size(), 1u);
  EXPECT_EQ((*models)[0].name, "sum");
  EXPECT_EQ(*client_.ServerVersion(), "9.8.7");
}

TEST_F(ClientTest, JoinsThePagesOfSessions) {
  const Tensor input = FloatTensor({3, 2}, {1, 2, 3, 4, 5, 6});
  for (const char* id : {"e", "b", "a", "d", "c"}) {
    ASSERT_TRUE(client_.Forward(input.view(), {.session = SessionChoice{id, true}}).ok());
  }
  const absl::StatusOr<std::vector<SessionInfo>> sessions = client_.ListSessions("");
  ASSERT_TRUE(sessions.ok()) << sessions.status();
  std::string ids;
  for (const SessionInfo& session : *sessions) {
    ids += session.id;
    EXPECT_EQ(session.model, "sum");
    EXPECT_EQ(session.committed_position, 3);
    EXPECT_EQ(session.idle, absl::Milliseconds(1500));
    EXPECT_EQ(session.idle_ttl, absl::Minutes(10));
  }
  EXPECT_EQ(ids, "abcde");
}

TEST_F(ClientTest, EndsSessions) {
  const Tensor input = FloatTensor({3, 2}, {1, 2, 3, 4, 5, 6});
  ASSERT_TRUE(client_.Forward(input.view(), {.session = SessionChoice{"a", true}}).ok());
  const absl::StatusOr<int64_t> position = client_.EndSession("a");
  ASSERT_TRUE(position.ok()) << position.status();
  EXPECT_EQ(*position, 3);
  EXPECT_EQ(ErrorReason(client_.EndSession("a").status()), reason::kSessionNotFound);
}

TEST_F(ClientTest, ChecksHealth) {
  EXPECT_EQ(*client_.CheckHealth(""), HealthStatus::kServing);
  service_.health()->SetServingStatus("sum", false);
  EXPECT_EQ(*client_.CheckHealth("sum"), HealthStatus::kNotServing);
  EXPECT_EQ(client_.CheckHealth("nobody").status().code(), absl::StatusCode::kNotFound);
}

TEST_F(ClientTest, IsThreadSafe) {
  std::vector<std::thread> threads;
  std::vector<int> failures(4);
  for (int thread = 0; thread < 4; ++thread) {
    threads.emplace_back([this, thread, &failures] {
      for (int i = 0; i < 50; ++i) {
        const float value = static_cast<float>(thread * 1000 + i);
        const Tensor input = FloatTensor({1, 2}, {value, value});
        const absl::StatusOr<ForwardResult> result = client_.Forward(input.view(), {});
        if (!result.ok() || Values(result->output) != std::vector<float>{value, value}) ++failures[thread];
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_THAT(failures, ElementsAre(0, 0, 0, 0));
}

class LettersTest : public testing::Test {
 protected:
  LettersTest() : client_(*Client::Connect(service_.address(), {})) {}

  // The letters that follow `ids`.
  static std::vector<int64_t> Continue(std::vector<int64_t> ids, int count) {
    std::vector<int64_t> made;
    for (int i = 0; i < count; ++i) {
      made.push_back(FakeService::Expected(ids));
      ids.push_back(made.back());
    }
    return made;
  }
  static std::vector<int64_t> Ids(const std::vector<TokenResult>& tokens) {
    std::vector<int64_t> ids;
    for (const TokenResult& token : tokens) ids.push_back(token.id);
    return ids;
  }
  static std::string Text(const std::vector<int64_t>& ids) { return std::string(ids.begin(), ids.end()); }

  FakeService service_{FakeService::Model::kLetters};
  Client client_;
};

TEST_F(LettersTest, GeneratesFromIds) {
  std::vector<size_t> sizes;
  const absl::StatusOr<Generated> generated = client_.Generate(
      {.request_id = "r7", .model = "letters", .prompt = std::vector<int64_t>{5, 6}, .max_tokens = 4},
      [&](const Generated& response) {
        EXPECT_EQ(response.request_id, "r7");
        EXPECT_EQ(response.finish_reason, sizes.size() == 3 ? FinishReason::kLength : FinishReason::kNone);
        sizes.push_back(response.tokens.size());
        return true;
      });
  ASSERT_TRUE(generated.ok()) << generated.status();
  EXPECT_THAT(sizes, ElementsAre(1, 1, 1, 1));
  EXPECT_EQ(Ids(generated->tokens), Continue({5, 6}, 4));
  EXPECT_EQ(generated->text, Text(Continue({5, 6}, 4)));
  EXPECT_EQ(generated->tokens[0].log_prob, 0);
  EXPECT_TRUE(generated->tokens[0].top_ids.empty());
  EXPECT_EQ(generated->finish_reason, FinishReason::kLength);
  EXPECT_EQ(generated->prompt_tokens, 2);
  EXPECT_EQ(generated->generated_tokens, 4);
  EXPECT_EQ(generated->time_to_first_token, absl::Microseconds(1500));
  EXPECT_EQ(generated->computing, absl::Microseconds(300));
  EXPECT_EQ(generated->session_id, "");
  EXPECT_EQ(generated->seed, 0u);
}

TEST_F(LettersTest, GeneratesFromATextInASession) {
  const absl::StatusOr<Generated> first =
      client_.Generate({.session = SessionChoice{"", true}, .prompt = "ab", .max_tokens = 3}, nullptr);
  ASSERT_TRUE(first.ok()) << first.status();
  std::vector<int64_t> all = {FakeService::kBos, 'a', 'b'};
  EXPECT_EQ(Ids(first->tokens), Continue(all, 3));
  EXPECT_EQ(first->session_id, "made-1");
  EXPECT_EQ(first->prompt_tokens, 3);
  EXPECT_EQ(first->committed_position, 6);
  for (const int64_t id : Ids(first->tokens)) all.push_back(id);

  // On from there, without a prompt.
  const absl::StatusOr<Generated> second = client_.Generate(
      {.session = SessionChoice{"made-1"}, .max_tokens = 5, .expected_position = 6}, nullptr);
  ASSERT_TRUE(second.ok()) << second.status();
  EXPECT_EQ(Ids(second->tokens), Continue(all, 5));
  EXPECT_EQ(second->prompt_tokens, 0);
  EXPECT_EQ(second->committed_position, 11);

  const absl::Status wrong =
      client_.Generate({.session = SessionChoice{"made-1"}, .expected_position = 6}, nullptr).status();
  EXPECT_EQ(wrong.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(ErrorReason(wrong), reason::kPositionMismatch);
}

TEST_F(LettersTest, GenerationEndsWhereItIsTold) {
  const std::vector<int64_t> made = Continue({FakeService::kBos, 'a'}, 30);
  // Up to the first of an id.
  const auto until = [&made](int64_t id) {
    return std::vector<int64_t>(made.begin(), std::find(made.begin(), made.end(), id) + 1);
  };
  const absl::StatusOr<Generated> by_id =
      client_.Generate({.prompt = "a", .max_tokens = 30, .stop_ids = {3, made[7]}}, nullptr);
  ASSERT_TRUE(by_id.ok()) << by_id.status();
  EXPECT_EQ(Ids(by_id->tokens), until(made[7]));
  EXPECT_EQ(by_id->finish_reason, FinishReason::kStopId);

  const std::string stop = Text({made[7], made[8], made[9]});
  const size_t cut = Text(made).find(stop);
  const absl::StatusOr<Generated> by_text =
      client_.Generate({.prompt = "a", .max_tokens = 30, .stop = {"nowhere", stop}}, nullptr);
  ASSERT_TRUE(by_text.ok()) << by_text.status();
  EXPECT_EQ(by_text->text, Text(made).substr(0, cut));
  EXPECT_EQ(Ids(by_text->tokens), std::vector<int64_t>(made.begin(), made.begin() + cut + 3));
  EXPECT_EQ(by_text->finish_reason, FinishReason::kStopText);
  EXPECT_EQ(by_text->matched_stop, stop);
  EXPECT_EQ(FinishReasonName(by_text->finish_reason), "stop_text");

  absl::StatusOr<Generated> by_eos = client_.Generate({.prompt = "a", .max_tokens = 60}, nullptr);
  ASSERT_TRUE(by_eos.ok()) << by_eos.status();
  EXPECT_EQ(by_eos->finish_reason, FinishReason::kStopId);
  EXPECT_EQ(by_eos->tokens.back().id, FakeService::kEos);
  by_eos = client_.Generate({.prompt = "a", .max_tokens = 60, .ignore_eos = true}, nullptr);
  ASSERT_TRUE(by_eos.ok()) << by_eos.status();
  EXPECT_EQ(by_eos->finish_reason, FinishReason::kLength);
  EXPECT_EQ(by_eos->generated_tokens, 60);
}

TEST_F(LettersTest, GenerationSaysSeedAndLogProbabilities) {
  GenerateOptions options{.prompt = std::vector<int64_t>{9}, .max_tokens = 2};
  options.sampling.temperature = 0.5f;
  options.top_log_probs = 2;
  absl::StatusOr<Generated> generated = client_.Generate(options, nullptr);
  ASSERT_TRUE(generated.ok()) << generated.status();
  EXPECT_EQ(generated->seed, FakeService::kSeed);
  const int64_t expected = FakeService::Expected({9});
  EXPECT_EQ(generated->tokens[0].log_prob, FakeService::LogProb({9}, generated->tokens[0].id));
  EXPECT_THAT(generated->tokens[0].top_ids, ElementsAre(expected, expected + 1));
  EXPECT_THAT(generated->tokens[0].top_log_probs, ElementsAre(-0.25f, -0.5f));

  options.sampling.seed = uint64_t{1} << 63;
  options.top_log_probs = 0;
  generated = client_.Generate(options, nullptr);
  ASSERT_TRUE(generated.ok()) << generated.status();
  EXPECT_EQ(generated->seed, uint64_t{1} << 63);
  EXPECT_NE(generated->tokens[0].log_prob, 0);
  EXPECT_TRUE(generated->tokens[0].top_ids.empty());
}

TEST_F(LettersTest, TheCallbackCancels) {
  const absl::StatusOr<Generated> kept =
      client_.Generate({.session = SessionChoice{"s", true}, .prompt = "a", .max_tokens = 1}, nullptr);
  ASSERT_TRUE(kept.ok()) << kept.status();
  int responses = 0;
  const auto refuse = [&responses](const Generated&) { return ++responses == 0; };
  const absl::Status held =
      client_
          .Generate({.request_id = FakeService::kHold, .session = SessionChoice{"s"}, .prompt = "b"}, refuse)
          .status();
  EXPECT_EQ(held.code(), absl::StatusCode::kCancelled);
  EXPECT_EQ(responses, 1);
  service_.AwaitCancelled();
  EXPECT_EQ(*client_.EndSession("s"), kept->committed_position);

  // It is not asked again where more has come already; the last response it comes too late for.
  EXPECT_EQ(client_.Generate({.prompt = "b", .max_tokens = 20}, refuse).status().code(),
            absl::StatusCode::kCancelled);
  EXPECT_EQ(responses, 2);
  EXPECT_TRUE(client_.Generate({.prompt = "b", .max_tokens = 1}, refuse).ok());
}

TEST_F(LettersTest, AnotherThreadCancelsGeneration) {
  const std::unique_ptr<GenerationStream> generation =
      client_.OpenGeneration({.request_id = FakeService::kHold, .prompt = "a"});
  Generated response;
  ASSERT_TRUE(generation->Read(&response));
  std::thread canceller([&] {
    service_.AwaitHeld(1);
    generation->Cancel();
  });
  EXPECT_FALSE(generation->Read(&response));
  canceller.join();
  EXPECT_EQ(generation->Finish().code(), absl::StatusCode::kCancelled);
  service_.AwaitCancelled();
}

TEST_F(LettersTest, DestroyingAGenerationCancelsIt) {
  std::unique_ptr<GenerationStream> generation =
      client_.OpenGeneration({.request_id = FakeService::kHold, .prompt = "a"});
  service_.AwaitHeld(1);
  generation.reset();
  service_.AwaitCancelled();
}

TEST_F(LettersTest, GenerationThatFailsSaysWhy) {
  int responses = 0;
  const absl::Status status = client_
                                  .Generate({.request_id = FakeService::kBreak, .prompt = "a"},
                                            [&](const Generated&) { return ++responses > 0; })
                                  .status();
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(ErrorReason(status), reason::kDraining);
  EXPECT_EQ(responses, 1);
  EXPECT_EQ(
      client_
          .Generate({.request_id = FakeService::kHold, .prompt = "a", .timeout = absl::Milliseconds(50)},
                    nullptr)
          .status()
          .code(),
      absl::StatusCode::kDeadlineExceeded);
}

TEST_F(ClientTest, ModelsOverValuesDoNotGenerate) {
  EXPECT_EQ(ErrorReason(client_.Generate({.prompt = "a"}, nullptr).status()), reason::kNotGenerative);
  EXPECT_EQ(ErrorReason(client_.Tokenize("", "a", false).status()), reason::kNoTokenizer);
  EXPECT_EQ(ErrorReason(client_.Detokenize("", {5}).status()), reason::kNoTokenizer);
}

TEST_F(LettersTest, ScoresIds) {
  absl::StatusOr<ForwardResult> scores = client_.Score({7, 8, 9}, 2, {.session = SessionChoice{"s", true}});
  ASSERT_TRUE(scores.ok()) << scores.status();
  EXPECT_EQ(scores->output_position, 1);
  EXPECT_EQ(scores->committed_position, 3);
  EXPECT_THAT(scores->log_probs, ElementsAre(FakeService::LogProb({7}, 8), FakeService::LogProb({7, 8}, 9)));
  EXPECT_EQ(scores->top.k, 2);
  const int64_t first = FakeService::Expected({7}), second = FakeService::Expected({7, 8});
  EXPECT_THAT(scores->top.ids, ElementsAre(first, first + 1, second, second + 1));
  EXPECT_THAT(scores->top.log_probs, ElementsAre(-0.25f, -0.5f, -0.25f, -0.5f));
  EXPECT_EQ(NumElements(scores->output.shape), 0);

  // Later in the session the first id has something before it.
  scores = client_.Score({10}, 0, {.session = SessionChoice{"s"}});
  ASSERT_TRUE(scores.ok()) << scores.status();
  EXPECT_EQ(scores->output_position, 3);
  EXPECT_THAT(scores->log_probs, ElementsAre(FakeService::LogProb({7, 8, 9}, 10)));
  EXPECT_EQ(scores->top.k, 0);
}

TEST_F(LettersTest, SaysTheMostLikelyNextIds) {
  const absl::StatusOr<ForwardResult> top = client_.Top({7, 8}, 3, {});
  ASSERT_TRUE(top.ok()) << top.status();
  const int64_t expected = FakeService::Expected({7, 8});
  EXPECT_EQ(top->output_position, 1);
  EXPECT_THAT(top->top.ids, ElementsAre(expected, expected + 1, expected + 2));
  EXPECT_THAT(top->top.log_probs, ElementsAre(-0.25f, -0.5f, -0.75f));
}

TEST_F(LettersTest, ForwardGivesTheLastLogitsAlone) {
  const std::vector<int64_t> ids = {7, 8, 9, 10};
  const TensorView batch{ids.data(), {2, 2}, DType::kInt64, Device{}};
  const absl::StatusOr<ForwardResult> last = client_.Forward(batch, {.output_options = {.last_only = true}});
  ASSERT_TRUE(last.ok()) << last.status();
  EXPECT_EQ(last->output.shape, (Shape{2, 1, FakeService::kVocab}));
  EXPECT_EQ(Values(last->output)[7], FakeService::LogProb({7, 8}, 7));
  EXPECT_EQ(Values(last->output)[FakeService::kVocab + 7], FakeService::LogProb({9, 10}, 7));
}

TEST_F(LettersTest, StreamScores) {
  const std::vector<int64_t> ids = {7, 8, 9};
  const std::unique_ptr<ForwardStream> stream = client_.OpenStream({});
  ASSERT_TRUE(stream->Write({.input = {ids.data(), {2}, DType::kInt64, Device{}},
                             .output_options = {.kind = OutputKind::kScores, .top_tokens = 1}}));
  ASSERT_TRUE(stream->Write({.input = {ids.data() + 2, {1}, DType::kInt64, Device{}},
                             .output_options = {.kind = OutputKind::kTop, .top_tokens = 2}}));
  StreamResponse response;
  ASSERT_TRUE(stream->Read(&response));
  ASSERT_TRUE(response.status.ok()) << response.status;
  EXPECT_THAT(response.log_probs, ElementsAre(FakeService::LogProb({7}, 8)));
  EXPECT_THAT(response.top.ids, ElementsAre(FakeService::Expected({7})));
  ASSERT_TRUE(stream->Read(&response));
  ASSERT_TRUE(response.status.ok()) << response.status;
  EXPECT_TRUE(response.log_probs.empty());
  EXPECT_EQ(response.top.k, 2);
  EXPECT_EQ(response.top.ids[0], FakeService::Expected({7, 8, 9}));
  EXPECT_TRUE(stream->Finish().ok());
}

TEST_F(LettersTest, Tokenizes) {
  EXPECT_THAT(*client_.Tokenize("letters", "abc", false), ElementsAre('a', 'b', 'c'));
  EXPECT_THAT(*client_.Tokenize("", "a", true), ElementsAre(FakeService::kBos, 'a'));
  EXPECT_EQ(*client_.Detokenize("", {FakeService::kBos, 'x', 'y'}), "xy");
}

TEST_F(LettersTest, DescribesAGenerativeModel) {
  const absl::StatusOr<ModelInfo> model = client_.GetModel("");
  ASSERT_TRUE(model.ok()) << model.status();
  EXPECT_TRUE(model->generates);
  EXPECT_TRUE(model->has_tokenizer);
  EXPECT_EQ(model->bos_id, FakeService::kBos);
  EXPECT_THAT(model->eos_ids, ElementsAre(FakeService::kEos));
  EXPECT_EQ(model->max_generated_tokens, FakeService::kMaxTokens);
}

TEST(MessagesTest, MalformedAnswersOfATokenModelAreDataLoss) {
  const auto refused = [](const auto& result, const std::string& message) {
    EXPECT_EQ(result.status().code(), absl::StatusCode::kDataLoss);
    EXPECT_THAT(std::string(result.status().message()), HasSubstr(message));
  };
  v1::ForwardResponse forward;
  forward.mutable_top()->set_k(2);
  forward.mutable_top()->add_ids(5);
  forward.mutable_top()->add_log_probs(-1);
  refused(FromProtoResponse(&forward), "1 top ids, 2 a position");
  forward.mutable_top()->add_ids(6);
  refused(FromProtoResponse(&forward), "2 top ids, 2 a position, came with 1 log-probabilities");
  forward.mutable_top()->add_log_probs(-2);
  EXPECT_TRUE(FromProtoResponse(&forward).ok());
  forward.mutable_top()->set_k(0);
  refused(FromProtoResponse(&forward), "2 top ids, 0 a position");

  v1::GenerateResponse generate;
  generate.add_tokens()->add_top_ids(5);
  refused(FromProtoResponse(&generate), "1 top ids of a token");
  generate.mutable_tokens(0)->add_top_log_probs(-1);
  EXPECT_TRUE(FromProtoResponse(&generate).ok());
  generate.set_finish_reason(static_cast<v1::FinishReason>(9));
  refused(FromProtoResponse(&generate), "finish_reason is 9");
}

TEST(MessagesTest, GenerateRequestsSayWhatWasSet) {
  const v1::GenerateRequest plain = ToProtoRequest(GenerateOptions{.prompt = std::vector<int64_t>{4, 5}});
  EXPECT_EQ(plain.ids().ids_size(), 2);
  EXPECT_FALSE(plain.has_text());
  EXPECT_FALSE(plain.has_session());
  EXPECT_FALSE(plain.sampling().has_seed());
  EXPECT_EQ(plain.sampling().top_p(), 1);
  EXPECT_FALSE(plain.has_top_log_probs());
  EXPECT_FALSE(plain.has_expected_position());
  const v1::GenerateRequest full =
      ToProtoRequest(GenerateOptions{.model = "m",
                                     .session = SessionChoice{"s", true, absl::Seconds(5)},
                                     .prompt = "text",
                                     .sampling = {.temperature = 0.5f, .top_k = 3, .top_p = 0.75f, .seed = 0},
                                     .max_tokens = 6,
                                     .stop_ids = {7, 8},
                                     .ignore_eos = true,
                                     .stop = {"x", "y"},
                                     .top_log_probs = 0,
                                     .expected_position = 0});
  EXPECT_EQ(full.model(), "m");
  EXPECT_EQ(full.session().idle_ttl().seconds(), 5);
  EXPECT_EQ(full.text(), "text");
  EXPECT_EQ(full.sampling().temperature(), 0.5f);
  EXPECT_EQ(full.sampling().top_k(), 3);
  EXPECT_EQ(full.sampling().top_p(), 0.75f);
  EXPECT_TRUE(full.sampling().has_seed());
  EXPECT_EQ(full.max_tokens(), 6);
  EXPECT_THAT(full.stop_ids(), ElementsAre(7, 8));
  EXPECT_TRUE(full.ignore_eos());
  EXPECT_THAT(full.stop(), ElementsAre("x", "y"));
  EXPECT_TRUE(full.has_top_log_probs());
  EXPECT_TRUE(full.has_expected_position());
}

TEST(MessagesTest, TensorsThatDoNotFitTogetherAreDataLoss) {
  struct Case {
    int dtype;
    std::vector<int64_t> shape;
    size_t bytes;
  };
  const Case cases[] = {
      {0, {1}, 4},                                            // No dtype.
      {9, {1}, 4},                                            // From the future.
      {v1::DATA_TYPE_FLOAT32, {2, 2}, 15},                    // Too few bytes.
      {v1::DATA_TYPE_FLOAT32, {2, 2}, 17},                    // Too many.
      {v1::DATA_TYPE_FLOAT32, {-1, -4}, 16},                  // Negative sizes, positive product.
      {v1::DATA_TYPE_FLOAT32, {int64_t{1} << 62, 4, 1}, 0}};  // A product that overflows to 0.
  for (const Case& c : cases) {
    v1::Tensor proto;
    proto.set_dtype(static_cast<v1::DataType>(c.dtype));
    proto.mutable_shape()->Add(c.shape.begin(), c.shape.end());
    proto.set_data(std::string(c.bytes, 'x'));
    const absl::Status status = FromProtoTensor(&proto).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss) << proto.ShortDebugString();
    EXPECT_THAT(std::string(status.message()), HasSubstr("malformed response"));
  }
}

TEST(MessagesTest, StreamResponseWithoutOutcomeIsDataLoss) {
  v1::StreamForwardResponse proto;
  proto.set_request_id("r");
  StreamResponse response = FromProtoResponse(&proto);
  EXPECT_EQ(response.request_id, "r");
  EXPECT_EQ(response.status.code(), absl::StatusCode::kDataLoss);
  proto.mutable_error()->set_code(0);
  response = FromProtoResponse(&proto);
  EXPECT_EQ(response.status.code(), absl::StatusCode::kDataLoss);
}

TEST(MessagesTest, RequestsSayWhatWasSet) {
  const Tensor input = FloatTensor({1, 2}, {1, 2});
  v1::StreamForwardRequest plain = ToProtoRequest(StreamRequest{.stream_session = 3, .input = input.view()});
  EXPECT_EQ(plain.stream_session(), 3u);
  EXPECT_FALSE(plain.has_session());
  EXPECT_FALSE(plain.has_expected_position());
  EXPECT_FALSE(plain.has_timeout());
  const v1::StreamForwardRequest full =
      ToProtoRequest(StreamRequest{.model = "m",
                                   .session = SessionChoice{"s", true, absl::Seconds(5)},
                                   .input = input.view(),
                                   .output_dtype = DType::kBFloat16,
                                   .end_of_sequence = true,
                                   .expected_position = 0,
                                   .timeout = absl::Seconds(2)});
  EXPECT_EQ(full.model(), "m");
  EXPECT_EQ(full.session().id(), "s");
  EXPECT_TRUE(full.session().create());
  EXPECT_EQ(full.session().idle_ttl().seconds(), 5);
  EXPECT_EQ(full.output_dtype(), v1::DATA_TYPE_BFLOAT16);
  EXPECT_TRUE(full.end_of_sequence());
  EXPECT_TRUE(full.has_expected_position());
  EXPECT_EQ(full.timeout().seconds(), 2);
}

}  // namespace
}  // namespace deltanet
