#include "client/client.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

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
