// What surrounds the calls: listing, health, reflection, metrics, probes, draining.
#include <grpcpp/channel.h>
#include <grpcpp/create_channel.h>
#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/security/credentials.h>

#include <atomic>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "deltanet/v1/deltanet.pb.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/e2e/test_server.h"
#include "tests/testing/fake_clock.h"

namespace deltanet {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

// A call of any method in serialized messages: one request, and then responses one by one.
class RawCall {
 public:
  RawCall(const std::string& target, const std::string& method, const std::string& request)
      : channel_(grpc::CreateChannel(target, grpc::InsecureChannelCredentials())), stub_(channel_) {
    call_ = stub_.PrepareCall(&context_, method, &queue_);
    call_->StartCall(nullptr);
    EXPECT_TRUE(Next());
    const grpc::Slice slice(request);
    call_->Write(grpc::ByteBuffer(&slice, 1), nullptr);
    EXPECT_TRUE(Next());
  }
  ~RawCall() {
    context_.TryCancel();
    grpc::Status status;
    call_->Finish(&status, nullptr);
    Next();
    queue_.Shutdown();
  }

  // Blocks. Empty at the end of the call.
  std::string Read() {
    grpc::ByteBuffer buffer;
    call_->Read(&buffer, nullptr);
    if (!Next()) return "";
    grpc::Slice slice;
    EXPECT_TRUE(buffer.DumpToSingleSlice(&slice).ok());
    return std::string(reinterpret_cast<const char*>(slice.begin()), slice.size());
  }

 private:
  bool Next() {
    void* tag = nullptr;
    bool ok = false;
    return queue_.Next(&tag, &ok) && ok;
  }

  std::shared_ptr<grpc::Channel> channel_;
  grpc::GenericStub stub_;
  grpc::ClientContext context_;
  grpc::CompletionQueue queue_;
  std::unique_ptr<grpc::GenericClientAsyncReaderWriter> call_;
};

// grpc.health.v1.HealthCheckResponse.
constexpr char kServing[] = "\x08\x01";
constexpr char kNotServing[] = "\x08\x02";

TEST(Lifecycle, ModelsAreDescribed) {
  TestServer server(
      FakeModels{{"values", {.lookahead = 2, .num_slots = 16}}, {"ids", {.takes_tokens = true}}});
  const auto models = server.client().ListModels();
  ASSERT_TRUE(models.ok()) << models.status();
  ASSERT_EQ(models->size(), 2u);
  const ModelInfo& ids = (*models)[0];
  EXPECT_EQ(ids.name, "ids");
  EXPECT_THAT(ids.input_dtypes, ElementsAre(DType::kInt64));
  EXPECT_EQ(ids.vocab_size, kOutputWidth);
  const ModelInfo& values = (*models)[1];
  EXPECT_EQ(values.name, "values");
  EXPECT_EQ(values.family, "transformer_deltanet");
  EXPECT_THAT(values.input_dtypes, ElementsAre(DType::kFloat32, DType::kFloat16, DType::kBFloat16));
  EXPECT_EQ(values.input_width, kWidth);
  EXPECT_EQ(values.output_width, kOutputWidth);
  EXPECT_EQ(values.lookahead, 2);
  EXPECT_EQ(values.device, "cpu");
  EXPECT_EQ(values.bytes_per_session, 16);
  EXPECT_EQ(values.sessions, 0);
  EXPECT_EQ(values.sessions_free, 12);  // A quarter of the slots is for work in flight.
  EXPECT_EQ(values.max_response_bytes, (int64_t{64} << 20) - 1024);
  EXPECT_EQ(*server.client().ServerVersion(), ServerVersion());
  EXPECT_EQ(server.client().GetModel("nobody").status().code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(server.client().GetModel("").status().code(), absl::StatusCode::kInvalidArgument);
}

TEST(Lifecycle, SessionsAreListedInPages) {
  TestServer server(FakeModels{{"a", {.num_slots = 2000}}, {"b", {}}});
  const std::vector<float> input = RandomValues(1, 1);
  for (int i = 0; i < 1200; ++i) {
    const std::string id = absl::StrCat("s", 10000 + i);
    ASSERT_TRUE(
        server.client().Forward(AllTokens(input), {.model = "a", .session = SessionChoice{id, true}}).ok());
  }
  ASSERT_TRUE(
      server.client()
          .Forward(AllTokens(input), {.model = "b", .session = SessionChoice{"x", true, absl::Minutes(1)}})
          .ok());
  const auto all = server.client().ListSessions("");
  ASSERT_TRUE(all.ok()) << all.status();
  ASSERT_EQ(all->size(), 1201u);
  for (int i = 0; i < 1200; ++i) EXPECT_EQ((*all)[i].id, absl::StrCat("s", 10000 + i));
  const auto of_b = server.client().ListSessions("b");
  ASSERT_EQ(of_b->size(), 1u);
  EXPECT_EQ((*of_b)[0].model, "b");
  EXPECT_EQ((*of_b)[0].committed_position, 1);
  EXPECT_EQ((*of_b)[0].idle_ttl, absl::Minutes(1));
  EXPECT_EQ(server.client().ListSessions("c").status().code(), absl::StatusCode::kNotFound);
}

TEST(Lifecycle, HealthOfTheServerAndOfEachModel) {
  TestServer server(FakeModelOptions{});
  for (const char* service : {"", "m", "deltanet.v1.DeltaNetService"}) {
    const auto health = server.client().CheckHealth(service);
    ASSERT_TRUE(health.ok()) << service << health.status();
    EXPECT_EQ(*health, HealthStatus::kServing);
  }
  EXPECT_EQ(server.client().CheckHealth("nobody").status().code(), absl::StatusCode::kNotFound);
  RawCall watch(server.target(), "/grpc.health.v1.Health/Watch", "\x0a\x01m");
  EXPECT_EQ(watch.Read(), kServing);
  server.server().StartDraining();
  EXPECT_EQ(watch.Read(), kNotServing);
  EXPECT_EQ(*server.client().CheckHealth(""), HealthStatus::kNotServing);
  EXPECT_TRUE(server.server().Shutdown(absl::Seconds(30))) << "a Watch does not hold the server up";
}

TEST(Lifecycle, ReflectionKnowsTheService) {
  TestServer server(FakeModelOptions{});
  RawCall reflection(server.target(), "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
                     std::string("\x3a\x00", 2));  // list_services
  EXPECT_THAT(reflection.Read(), HasSubstr("deltanet.v1.DeltaNetService"));
}

TEST(Lifecycle, MetricsCountWhatHappens) {
  TestServer server(FakeModelOptions{.num_slots = 16});
  const std::vector<float> input = RandomValues(1, 6);
  ASSERT_TRUE(server.client().Forward({input.data(), {2, 3, kWidth}}, {}).ok());
  EXPECT_FALSE(server.client().Forward(AllTokens(input), {.model = "nobody"}).ok());
  const auto stream = server.client().OpenStream({});
  StreamResponse response;
  ASSERT_TRUE(stream->Write({.input = AllTokens(input)}) && stream->Read(&response));
  ASSERT_TRUE(stream->Write({.input = {input.data(), {1, 5}}}) && stream->Read(&response));
  EXPECT_EQ(server.Metric("deltanet_sessions{model=\"m\"}"), 1);
  EXPECT_EQ(server.Metric("deltanet_sessions_free{model=\"m\"}"), 11);
  EXPECT_EQ(server.Metric("deltanet_slots_free{model=\"m\"}"), 15);
  EXPECT_EQ(server.Metric("deltanet_session_bytes{model=\"m\"}"), 16);
  ASSERT_TRUE(stream->Finish().ok());

  EXPECT_EQ(server.Metric("deltanet_sessions{model=\"m\"}"), 0);
  // The server counts a stream once its end has gone out.
  while (server.Metric("deltanet_requests_total{code=\"OK\",method=\"StreamForward\"}") != 1) {
  }
  EXPECT_EQ(server.Metric("deltanet_requests_total{code=\"OK\",method=\"Forward\"}"), 1);
  EXPECT_EQ(server.Metric("deltanet_requests_total{code=\"NOT_FOUND\",method=\"Forward\"}"), 1);
  EXPECT_EQ(server.Metric("deltanet_stream_messages_total{code=\"OK\"}"), 1);
  EXPECT_EQ(server.Metric("deltanet_stream_messages_total{code=\"INVALID_ARGUMENT\"}"), 1);
  EXPECT_EQ(server.Metric("deltanet_errors_total{reason=\"MODEL_NOT_FOUND\"}"), 1);
  EXPECT_EQ(server.Metric("deltanet_errors_total{reason=\"INVALID_REQUEST\"}"), 1);
  EXPECT_EQ(server.Metric("deltanet_request_duration_seconds_count{method=\"Forward\"}"), 2);
  EXPECT_EQ(server.Metric("deltanet_request_duration_seconds_count{method=\"StreamForward\"}"), 2);
  EXPECT_EQ(server.Metric("deltanet_tokens_total{model=\"m\"}"), 12);
  EXPECT_EQ(server.Metric("deltanet_step_tokens_sum{model=\"m\"}"), 12);
  EXPECT_EQ(server.Metric("deltanet_step_rows_sum{model=\"m\"}"), 3);
  const double steps = server.Metric("deltanet_step_rows_count{model=\"m\"}");
  EXPECT_GE(steps, 2);
  EXPECT_EQ(server.Metric("deltanet_step_compute_seconds_count{model=\"m\"}"), steps);
  EXPECT_EQ(server.Metric("deltanet_step_prepare_seconds_count{model=\"m\"}"), steps);
  EXPECT_EQ(server.Metric("deltanet_work_queued_seconds_count{model=\"m\"}"), 4);
  EXPECT_EQ(server.Metric("deltanet_work_compute_seconds_count{model=\"m\"}"), 4);
  EXPECT_EQ(server.Metric("deltanet_queued_works"), 0);
  EXPECT_EQ(server.Metric("deltanet_queued_tokens"), 0);
  EXPECT_EQ(server.Metric(absl::StrCat("deltanet_build_info{version=\"", ServerVersion(), "\"}")), 1);
  EXPECT_THAT(server.Get("/metrics"), HasSubstr("text/plain; version=0.0.4"));
}

TEST(Lifecycle, MetricsOfAStreamAndOfWhatGoesWrong) {
  FakeClock clock;
  ServerOptions options;
  options.clock = &clock;
  options.batcher.gather_fraction = 0;  // Which would wait for the clock.
  TestServer server(FakeModelOptions{}, options);
  server.model().OnLaunch([&](int64_t) { clock.Advance(absl::Milliseconds(30)); });
  server.model().FailRow(2, 0);
  const std::vector<float> input = RandomValues(1, 4);
  const auto stream = server.client().OpenStream({});
  StreamResponse response;
  for (int i = 0; i < 3; ++i) {
    ASSERT_TRUE(stream->Write({.input = AllTokens(input)}) && stream->Read(&response));
    EXPECT_EQ(response.status.ok(), i < 2);
  }
  EXPECT_EQ(ErrorReason(response.status), reason::kNonFinite);
  EXPECT_EQ(server.Metric("deltanet_stream_first_output_seconds_count"), 1);
  EXPECT_DOUBLE_EQ(server.Metric("deltanet_stream_first_output_seconds_sum"), 0.03);
  EXPECT_EQ(server.Metric("deltanet_stream_output_interval_seconds_count"), 1);
  EXPECT_DOUBLE_EQ(server.Metric("deltanet_stream_output_interval_seconds_sum"), 0.03);
  EXPECT_DOUBLE_EQ(server.Metric("deltanet_step_compute_seconds_sum{model=\"m\"}"), 0.09);
  EXPECT_EQ(server.Metric("deltanet_step_form_seconds_count{model=\"m\"}"), 3);
  EXPECT_EQ(server.Metric("deltanet_works_total{model=\"m\",outcome=\"NON_FINITE\"}"), 1);

  server.model().Hold(3);
  std::thread running([&] {
    EXPECT_TRUE(server.client().Forward(AllTokens(input), {.session = SessionChoice{"named", true}}).ok());
  });
  server.model().WaitUntilHeld(3);
  const auto late = server.client().OpenStream({});
  ASSERT_TRUE(late->Write({.input = AllTokens(input), .timeout = absl::Seconds(1)}));
  const auto given_up = server.client().OpenStream({});
  ASSERT_TRUE(given_up->Write({.session = SessionChoice{"given-up", true}, .input = AllTokens(input)}));
  while (server.Metric("deltanet_queued_works") != 2) {
  }
  EXPECT_TRUE(server.client().EndSession("given-up").ok());
  clock.Advance(absl::Seconds(1));
  server.model().Release(3);
  running.join();
  ASSERT_TRUE(late->Read(&response));
  EXPECT_EQ(ErrorReason(response.status), reason::kDeadline);
  ASSERT_TRUE(given_up->Read(&response));
  EXPECT_EQ(ErrorReason(response.status), reason::kSessionEnded);
  EXPECT_EQ(server.Metric("deltanet_works_total{model=\"m\",outcome=\"SESSION_ENDED\"}"), 1);
  EXPECT_EQ(server.Metric("deltanet_works_total{model=\"m\",outcome=\"DEADLINE\"}"), 1);
  EXPECT_EQ(server.Metric("deltanet_works_total{model=\"m\",outcome=\"OK\"}"), 3);
  EXPECT_EQ(server.Metric("deltanet_errors_total{reason=\"DEADLINE\"}"), 1);

  EXPECT_EQ(server.Metric("deltanet_sessions_expired_total"), 0);
  clock.WaitUntilTimedBlocked(1);
  clock.Advance(absl::Hours(1));
  while (server.Metric("deltanet_sessions_expired_total") != 1) {
  }
  EXPECT_EQ(server.Metric("deltanet_slots{model=\"m\"}"), 8);
  EXPECT_EQ(server.Metric("deltanet_state_bytes{model=\"m\"}"), 8 * 16);
  for (const char* name : {"process_cpu_seconds_total", "process_resident_memory_bytes", "process_open_fds",
                           "process_threads", "process_start_time_seconds"}) {
    EXPECT_GT(server.Metric(name), 0) << name;
  }
  EXPECT_TRUE(stream->Finish().ok() && late->Finish().ok() && given_up->Finish().ok());
  EXPECT_EQ(server.Metric("deltanet_draining"), 0);
  server.server().StartDraining();
  EXPECT_EQ(server.Metric("deltanet_draining"), 1);
  EXPECT_EQ(ErrorReason(server.client().Forward(AllTokens(input), {}).status()), reason::kDraining);
  EXPECT_EQ(server.Metric("deltanet_errors_total{reason=\"DRAINING\"}"), 1);
}

// 1024 steps of 10 ms: a cancellation comes in time.
constexpr int64_t kLongTokens = 1024 * 256;
void SlowDown(TestServer* server) {
  server->model().OnLaunch([](int64_t) { absl::SleepFor(absl::Milliseconds(10)); });
}

TEST(Lifecycle, CallsGivenUpWhileQueuedAndWhileRunningAreCounted) {
  TestServer server(FakeModelOptions{.num_slots = 1});
  SlowDown(&server);
  v1::ForwardRequest request;
  request.mutable_input()->set_dtype(v1::DATA_TYPE_FLOAT32);
  request.mutable_input()->add_shape(kLongTokens);
  request.mutable_input()->add_shape(kWidth);
  request.mutable_input()->mutable_data()->resize(kLongTokens * kWidth * sizeof(float));
  const auto call = [&] {
    return std::make_unique<RawCall>(server.target(), "/deltanet.v1.DeltaNetService/Forward",
                                     request.SerializeAsString());
  };
  auto running = call();
  while (server.Metric("deltanet_slots_free{model=\"m\"}") != 0) {
  }
  auto queued = call();  // There is no slot for it.
  while (server.Metric("deltanet_queued_works") != 1) {
  }
  const auto cancelled = [&] {
    return server.Metric("deltanet_works_total{model=\"m\",outcome=\"CANCELLED\"}");
  };
  queued.reset();
  while (cancelled() != 1) {
  }
  EXPECT_EQ(server.Metric("deltanet_queued_works"), 0);
  EXPECT_EQ(server.Metric("deltanet_slots_free{model=\"m\"}"), 0) << "the other one runs on";
  running.reset();
  while (cancelled() != 2) {
  }
  while (server.Metric("deltanet_requests_total{code=\"CANCELLED\",method=\"Forward\"}") != 2) {
  }
  EXPECT_EQ(server.Metric("deltanet_works_total{model=\"m\",outcome=\"OK\"}"), 0);
  while (server.Metric("deltanet_errors_total{reason=\"CANCELLED\"}") != 2) {
  }
  EXPECT_EQ(server.Metric("deltanet_slots_free{model=\"m\"}"), 1);
  EXPECT_LT(server.Metric("deltanet_tokens_total{model=\"m\"}"), kLongTokens);
}

TEST(Lifecycle, AMessageGivenUpWithItsStreamIsCounted) {
  TestServer server(FakeModelOptions{});
  SlowDown(&server);
  const auto stream = server.client().OpenStream({});
  ASSERT_TRUE(stream->Write({.input = AllTokens(RandomValues(1, kLongTokens))}));
  while (server.Metric("deltanet_tokens_total{model=\"m\"}") == 0) {
  }
  stream->Cancel();
  while (server.Metric("deltanet_requests_total{code=\"CANCELLED\",method=\"StreamForward\"}") != 1) {
  }
  EXPECT_EQ(server.Metric("deltanet_works_total{model=\"m\",outcome=\"CANCELLED\"}"), 1);
  EXPECT_EQ(server.Metric("deltanet_stream_messages_total{code=\"CANCELLED\"}"), 1);
  EXPECT_EQ(server.Metric("deltanet_slots_free{model=\"m\"}"), 8);
}

TEST(Lifecycle, TheDevicesMemoryIsAskedForWhenMetricsAreRead) {
  std::atomic<int64_t> free{0};
  ServerOptions options;
  options.device_memory = [&]() -> std::optional<DeviceMemory> {
    if (free == 0) return std::nullopt;
    return DeviceMemory{.total_bytes = 100, .free_bytes = free};
  };
  TestServer server(FakeModelOptions{}, options);
  EXPECT_EQ(server.Metric("deltanet_device_memory_bytes"), -1);
  for (const int now : {70, 30}) {
    free = now;
    EXPECT_EQ(server.Metric("deltanet_device_memory_bytes"), 100);
    EXPECT_EQ(server.Metric("deltanet_device_memory_free_bytes"), now);
  }
}

TEST(Lifecycle, ProbesFollowTheServer) {
  TestServer server(FakeModelOptions{});
  EXPECT_THAT(server.Get("/healthz"), HasSubstr("HTTP/1.1 200"));
  EXPECT_THAT(server.Get("/readyz"), HasSubstr("HTTP/1.1 200"));
  EXPECT_THAT(server.Get("/nothing"), HasSubstr("HTTP/1.1 404"));
  server.server().StartDraining();
  EXPECT_THAT(server.Get("/healthz"), HasSubstr("HTTP/1.1 200"));
  EXPECT_THAT(server.Get("/readyz"), HasSubstr("HTTP/1.1 503"));
}

TEST(Lifecycle, ATakenPortIsAnError) {
  TestServer server(FakeModelOptions{});
  const auto start = [](const ServerOptions& options) {
    std::vector<NamedModel> models;
    models.push_back({"m", std::make_unique<FakeModel>(FakeModelOptions{})});
    return Server::Start(options, std::move(models)).status();
  };
  ServerOptions options;
  options.listen.port = server.server().port();
  const absl::Status grpc_taken = start(options);
  EXPECT_EQ(grpc_taken.code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(grpc_taken.message()), HasSubstr(server.target()));
  options = ServerOptions();
  options.metrics_listen.port = server.server().metrics_port();
  EXPECT_EQ(start(options).code(), absl::StatusCode::kUnavailable);
}

TEST(Lifecycle, ADrainFinishesWhatIsRunning) {
  TestServer server(FakeModelOptions{});
  server.model().Hold(1);
  const std::vector<float> input = RandomValues(1, 4);
  const auto idle = server.client().OpenStream({});
  const auto busy = server.client().OpenStream({});
  StreamResponse response;
  ASSERT_TRUE(idle->Write({.input = AllTokens(input)}) && idle->Read(&response));
  ASSERT_TRUE(busy->Write({.input = AllTokens(input)}));
  server.model().WaitUntilHeld(1);
  server.server().StartDraining();

  EXPECT_FALSE(idle->Read(&response));
  const absl::Status ended = idle->Finish();
  EXPECT_EQ(ended.code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(ErrorReason(ended), reason::kDraining);
  EXPECT_EQ(ErrorReason(server.client().Forward(AllTokens(input), {}).status()), reason::kDraining);
  EXPECT_EQ(ErrorReason(server.client().OpenStream({})->Finish()), reason::kDraining);

  std::thread shutdown([&] { EXPECT_TRUE(server.server().Shutdown(absl::Seconds(60))); });
  server.model().Release(1);
  ASSERT_TRUE(busy->Read(&response));
  EXPECT_EQ(Floats(response.output), server.model().ExpectedOutput(input));
  EXPECT_EQ(ErrorReason(busy->Finish()), reason::kDraining);
  shutdown.join();
  EXPECT_EQ(server.Metric("deltanet_requests_total{code=\"UNAVAILABLE\",method=\"StreamForward\"}"), 3);
  EXPECT_FALSE(server.client().Forward(AllTokens(input), {}).ok());
}

TEST(Lifecycle, ADrainThatTakesTooLongIsCut) {
  TestServer server(FakeModelOptions{});
  server.model().Hold(0);
  const std::vector<float> input = RandomValues(1, 4);
  std::thread call([&] { EXPECT_FALSE(server.client().Forward(AllTokens(input), {}).ok()); });
  server.model().WaitUntilHeld(0);
  std::thread shutdown([&] { EXPECT_FALSE(server.server().Shutdown(absl::Milliseconds(20))); });
  call.join();  // It is cut although its step hangs...
  server.model().Release(0);
  shutdown.join();  // ...and the server ends as soon as the step does.
}

TEST(Lifecycle, ALostDeviceTurnsHealthForGoodAndAnswersEverything) {
  std::atomic<int> told{0};
  ServerOptions options;
  options.on_device_lost = [&] { ++told; };
  TestServer server(FakeModelOptions{}, options);
  server.model().FailWait(1, absl::DataLossError("CUDA: an illegal memory access"));
  RawCall watch(server.target(), "/grpc.health.v1.Health/Watch", "");
  EXPECT_EQ(watch.Read(), kServing);
  const std::vector<float> input = RandomValues(1, 4);
  const auto stream = server.client().OpenStream({});
  StreamResponse response;
  ASSERT_TRUE(stream->Write({.input = AllTokens(input)}) && stream->Read(&response));
  EXPECT_TRUE(response.status.ok()) << response.status;
  EXPECT_FALSE(server.server().device_lost());
  EXPECT_EQ(server.Metric("deltanet_device_lost"), 0);

  ASSERT_TRUE(stream->Write({.input = AllTokens(input)}) && stream->Read(&response));
  EXPECT_EQ(response.status.code(), absl::StatusCode::kInternal);
  EXPECT_EQ(ErrorReason(response.status), reason::kInternal);
  EXPECT_THAT(std::string(response.status.message()), HasSubstr("the device is lost"));
  EXPECT_EQ(response.committed_position, 4);
  EXPECT_EQ(watch.Read(), kNotServing);
  const absl::Status later = server.client().Forward(AllTokens(input), {}).status();
  EXPECT_EQ(later.code(), absl::StatusCode::kInternal);
  EXPECT_THAT(std::string(later.message()), HasSubstr("the device is lost"));
  EXPECT_THAT(server.Get("/readyz"), HasSubstr("HTTP/1.1 503"));
  EXPECT_EQ(server.Metric("deltanet_device_lost"), 1);
  EXPECT_TRUE(server.server().device_lost());
  EXPECT_EQ(told, 1);
}

TEST(Lifecycle, AStepThatHangsTurnsHealthUntilItEnds) {
  FakeClock clock;
  ServerOptions options;
  options.clock = &clock;
  options.step_timeout = absl::Seconds(60);
  TestServer server(FakeModelOptions{}, options);
  RawCall watch(server.target(), "/grpc.health.v1.Health/Watch", "");
  EXPECT_EQ(watch.Read(), kServing);
  server.model().Hold(0);
  const std::vector<float> input = RandomValues(1, 4);
  std::thread call([&] { EXPECT_TRUE(server.client().Forward(AllTokens(input), {}).ok()); });
  server.model().WaitUntilHeld(0);
  clock.WaitUntilTimedBlocked(1);  // The thread that looks.
  clock.Advance(absl::Seconds(60));
  clock.WaitUntilTimedBlocked(1);
  EXPECT_EQ(*server.client().CheckHealth(""), HealthStatus::kServing);
  EXPECT_EQ(server.Metric("deltanet_batch_thread_busy_seconds"), 60);

  clock.Advance(absl::Seconds(1));
  EXPECT_EQ(watch.Read(), kNotServing);
  clock.WaitUntilTimedBlocked(1);
  EXPECT_EQ(server.Metric("deltanet_ready"), 0);
  EXPECT_EQ(server.Metric("deltanet_batch_thread_stalls_total"), 1);
  const double heartbeat = server.Metric("deltanet_batch_thread_heartbeat_timestamp_seconds");
  EXPECT_EQ(heartbeat, absl::ToUnixSeconds(clock.Now()) - 61);

  server.model().Release(0);
  call.join();
  clock.WaitUntilBlocked(2);  // The batch thread waits for work again.
  clock.Advance(absl::Seconds(1));
  EXPECT_EQ(watch.Read(), kServing);
  EXPECT_EQ(server.Metric("deltanet_ready"), 1);
  EXPECT_EQ(server.Metric("deltanet_batch_thread_busy_seconds"), 0);
}

}  // namespace
}  // namespace deltanet
