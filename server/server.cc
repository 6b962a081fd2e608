#include "server/server.h"

#include <grpcpp/ext/proto_server_reflection_plugin.h>
#include <grpcpp/health_check_service_interface.h>
#include <grpcpp/security/server_credentials.h>
#include <grpcpp/server.h>
#include <grpcpp/server_builder.h>

#include <algorithm>
#include <atomic>
#include <functional>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "model/base/check.h"
#include "model/base/mutex.h"
#include "model/base/status_macros.h"
#include "server/deltanet_service.h"
#include "server/executor.h"
#include "server/host.h"
#include "server/http_server.h"
#include "server/log.h"
#include "server/metrics.h"
#include "server/service_context.h"

namespace deltanet {
namespace {

// Longer texts are not looked at: even common words would be more tokens than a request may have.
constexpr int64_t kMaxTextBytesPerToken = 8;

// Threads that write answers.
constexpr int kAnswerThreads = 2;

// What a response holds beside its output: ids, shape, positions, times.
constexpr int64_t kResponseOverheadBytes = 1024;

// Calls that never end by themselves (Watch of the health service) are cut this long after the others have
// ended.
constexpr absl::Duration kCutAfter = absl::Milliseconds(100);

std::string Address(const HostPort& address) {
  const bool ipv6 = absl::StrContains(address.host, ':');
  return absl::StrCat(ipv6 ? "[" : "", address.host, ipv6 ? "]" : "", ":", address.port);
}

int Milliseconds(absl::Duration duration) {
  return static_cast<int>(std::min<int64_t>(absl::ToInt64Milliseconds(duration), INT32_MAX));
}

// Calls `work` about once a second, on a thread of its own.
class Janitor {
 public:
  Janitor(const std::string& name, Clock* clock, std::function<void()> work)
      : clock_(clock), work_(std::move(work)) {
    thread_ = Thread(name, [this] { Run(); });
  }

  ~Janitor() {
    {
      MutexLock lock(&mu_);
      stopping_ = true;
    }
    stop_.NotifyAll();
  }

 private:
  void Run() {
    while (true) {
      {
        MutexLock lock(&mu_);
        const absl::Time next = clock_->Now() + absl::Seconds(1);
        while (!stopping_ && clock_->Now() < next) clock_->WaitUntil(&stop_, &mu_, next);
        if (stopping_) return;
      }
      work_();
    }
  }

  Clock* const clock_;
  const std::function<void()> work_;

  Mutex mu_;
  CondVar stop_;
  bool stopping_ ABSL_GUARDED_BY(mu_) = false;

  Thread thread_;  // Last: joined before the rest dies.
};

}  // namespace

std::string ServerVersion() { return DELTANET_VERSION; }

int64_t RunningSlots(const ModelDescription& model, int64_t max_sessions) {
  const int64_t rows_in_flight = model.max_step_rows * model.max_steps_in_flight;
  int64_t running = std::min(rows_in_flight, model.num_slots / 4);
  if (max_sessions > 0) running = std::max(running, model.num_slots - max_sessions);
  return std::max<int64_t>(running, 1);
}

class Server::Impl {
 public:
  Impl(const ServerOptions& options, std::vector<NamedModel> models)
      : options_(options),
        models_(SortedByName(std::move(models))),
        metrics_(this, Names(models_)),
        batcher_(options.batcher, options.clock, &metrics_),
        sessions_(options.sessions, &batcher_, options.clock),
        service_(&context_) {
    for (const NamedModel& model : models_) {
      batcher_.AddModel(model.model.get(), RunningSlots(model.model->description(), options.max_sessions));
    }
    context_.model_names = Names(models_);
    context_.version = ServerVersion();
    context_.request_limits.max_tokens = options.batcher.max_queued_tokens;
    context_.request_limits.max_sequences = options.batcher.max_queued_works;
    context_.request_limits.max_response_bytes = options.max_message_bytes - kResponseOverheadBytes;
    if (options.max_response_bytes > 0) {
      context_.request_limits.max_response_bytes =
          std::min(context_.request_limits.max_response_bytes, options.max_response_bytes);
    }
    context_.request_limits.max_text_bytes = kMaxTextBytesPerToken * options.batcher.max_queued_tokens;
    context_.request_limits.max_generated_tokens = options.max_generated_tokens;
    context_.request_limits.default_generated_tokens =
        std::min(options.default_generated_tokens, options.max_generated_tokens);
    for (const NamedModel& model : models_) {
      context_.tokenizers.push_back({model.tokenizer.get(), model.no_tokenizer});
    }
    context_.stream_window_messages = options.stream_window_messages;
    context_.stream_window_bytes = options.stream_window_bytes;
    context_.batcher = &batcher_;
    context_.sessions = &sessions_;
    context_.metrics = &metrics_;
    context_.clock = options.clock;
    context_.executor = &executor_;
    context_.calls = &calls_;
  }

  ~Impl() { Shutdown(absl::ZeroDuration()); }

  absl::Status Start() {
    ASSIGN_OR_RETURN(certificates_, TlsCertificates::Load(options_.tls));
    batcher_.Start();
    janitor_ = std::make_unique<Janitor>("janitor", options_.clock, [this] {
      sessions_.ExpireIdle();
      CheckBatchThread();
    });
    if (!options_.tls.certificate.empty()) {
      // By the wall clock, as gRPC looks; and not the other one, which files that hang would keep.
      tls_janitor_ = std::make_unique<Janitor>("tls", Clock::Real(), [this] { certificates_->Refresh(); });
    }

    grpc::EnableDefaultHealthCheckService(true);
    grpc::reflection::InitProtoReflectionServerBuilderPlugin();
    grpc::ServerBuilder builder;
    builder.AddListeningPort(Address(options_.listen), certificates_->credentials(), &port_);
    builder.RegisterService(&service_);
    builder.SetMaxReceiveMessageSize(static_cast<int>(options_.max_message_bytes));
    builder.SetMaxSendMessageSize(static_cast<int>(options_.max_message_bytes));
    // A second server on the same port shall fail, not share it.
    builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
    const ConnectionLimits& limits = options_.connections;
    builder.AddChannelArgument(GRPC_ARG_MAX_CONCURRENT_STREAMS,
                               static_cast<int>(limits.max_concurrent_streams));
    builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIME_MS, Milliseconds(limits.keepalive_time));
    builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, Milliseconds(limits.keepalive_timeout));
    builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
    // Clients may ask likewise.
    builder.AddChannelArgument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS, 10'000);
    if (limits.max_age > absl::ZeroDuration()) {
      builder.AddChannelArgument(GRPC_ARG_MAX_CONNECTION_AGE_MS, Milliseconds(limits.max_age));
      builder.AddChannelArgument(GRPC_ARG_MAX_CONNECTION_AGE_GRACE_MS, Milliseconds(limits.max_age_grace));
    }
    grpc_server_ = builder.BuildAndStart();
    if (grpc_server_ == nullptr || port_ == 0) {
      return absl::UnavailableError(absl::StrCat("cannot listen for gRPC on ", Address(options_.listen)));
    }
    {
      MutexLock lock(&health_mu_);
      listening_ = true;
      UpdateHealthLocked();
    }

    HttpServer::Handlers handlers;
    handlers.metrics = [this] { return metrics_.Text(Snapshot()); };
    handlers.ready = [this] { return serving_.load(); };
    ASSIGN_OR_RETURN(http_server_, HttpServer::Start(options_.metrics_listen.host,
                                                     options_.metrics_listen.port, std::move(handlers)));
    return absl::OkStatus();
  }

  int port() const { return port_; }
  int metrics_port() const { return http_server_->port(); }

  bool device_lost() const {
    MutexLock lock(&health_mu_);
    return device_lost_;
  }

  void StartDraining() {
    batcher_.StartDraining();  // First: who sees health turn is refused.
    {
      MutexLock lock(&health_mu_);
      draining_ = true;
      UpdateHealthLocked();
    }
    calls_.StartDraining();
  }

  bool Shutdown(absl::Duration drain_timeout) {
    MutexLock lock(&shutdown_mu_);
    if (shut_down_) return drained_;
    shut_down_ = true;
    StartDraining();
    drained_ = calls_.WaitUntilNone(options_.clock, options_.clock->Now() + drain_timeout);
    if (grpc_server_ != nullptr) {
      // gRPC cuts by the wall clock, which options_.clock need not follow.
      grpc_server_->Shutdown(
          absl::ToChronoTime(Clock::Real()->Now() + (drained_ ? kCutAfter : absl::ZeroDuration())));
      grpc_server_->Wait();
      DELTANET_CHECK(calls_.WaitUntilNone(options_.clock, absl::InfinitePast()),
                     "a call outlives the server");
    }
    return drained_;
  }

 private:
  static std::vector<NamedModel> SortedByName(std::vector<NamedModel> models) {
    DELTANET_CHECK(!models.empty(), "a server has at least one model");
    std::sort(models.begin(), models.end(),
              [](const NamedModel& a, const NamedModel& b) { return a.name < b.name; });
    return models;
  }

  static std::vector<std::string> Names(const std::vector<NamedModel>& models) {
    std::vector<std::string> names;
    for (const NamedModel& model : models) names.push_back(model.name);
    return names;
  }

  // Hears of what turns health as well.
  class Observer : public Metrics {
   public:
    Observer(Impl* server, const std::vector<std::string>& model_names)
        : Metrics(model_names, ServerVersion()), server_(server) {}
    void OnDeviceLost(const absl::Status& status) override {
      Metrics::OnDeviceLost(status);
      server_->OnDeviceLost(status);
    }

   private:
    Impl* const server_;
  };

  void OnDeviceLost(const absl::Status& status) {
    Log(LogLevel::kError, "device_lost", {{"status", status.ToString()}});
    {
      MutexLock lock(&health_mu_);
      device_lost_ = true;
      UpdateHealthLocked();
    }
    if (options_.on_device_lost) options_.on_device_lost();
  }

  // The watchdog.
  void CheckBatchThread() {
    const Heartbeat heartbeat = batcher_.heartbeat();
    const absl::Duration since = options_.clock->Now() - heartbeat.progress;
    const bool stalled = heartbeat.busy && since > options_.step_timeout;
    {
      MutexLock lock(&health_mu_);
      if (stalled == stalled_) return;
      stalled_ = stalled;
      UpdateHealthLocked();
    }
    if (stalled) {
      metrics_.OnStall();
      Log(LogLevel::kError, "batch_thread_stalled",
          {{"seconds", absl::StrCat(absl::ToInt64Seconds(since))},
           {"timeout", absl::FormatDuration(options_.step_timeout)}});
    } else {
      Log(LogLevel::kWarning, "batch_thread_goes_on");
    }
  }

  // Once draining, health stays as it is: gRPC's server may be gone.
  void UpdateHealthLocked() ABSL_EXCLUSIVE_LOCKS_REQUIRED(health_mu_) {
    const bool serving = listening_ && !draining_ && !stalled_ && !device_lost_;
    if (serving == serving_) return;
    serving_ = serving;
    grpc::HealthCheckServiceInterface* health = grpc_server_->GetHealthCheckService();
    for (const NamedModel& model : models_) health->SetServingStatus(model.name, serving);
    health->SetServingStatus(v1::DeltaNetService::service_full_name(), serving);
    health->SetServingStatus("", serving);
  }

  MetricsSnapshot Snapshot() const {
    MetricsSnapshot snapshot;
    for (int m = 0; m < static_cast<int>(models_.size()); ++m) {
      const ModelDescription& model = batcher_.description(m);
      snapshot.models.push_back({sessions_.sessions(m), sessions_.sessions_free(m), batcher_.free_slots(m),
                                 model.session_bytes, model.num_slots, model.weight_bytes,
                                 batcher_.running_generations(m), batcher_.waiting_generations(m)});
    }
    snapshot.queued_works = batcher_.queued_works();
    snapshot.queued_tokens = batcher_.queued_tokens();
    snapshot.max_queued_works = options_.batcher.max_queued_works;
    snapshot.max_queued_tokens = options_.batcher.max_queued_tokens;
    snapshot.sessions_expired = sessions_.expired();
    snapshot.ready = serving_;
    {
      MutexLock lock(&health_mu_);
      snapshot.draining = draining_;
    }
    const Heartbeat heartbeat = batcher_.heartbeat();
    snapshot.batch_thread_progress = heartbeat.progress;
    if (heartbeat.busy) snapshot.batch_thread_busy = options_.clock->Now() - heartbeat.progress;
    snapshot.started = started_;
    snapshot.process = MeasureProcess();
    if (options_.device_memory) snapshot.device_memory = options_.device_memory();
    return snapshot;
  }

  // In the order of birth: what is below uses what is above.
  const ServerOptions options_;
  const absl::Time started_ = options_.clock->Now();
  const std::vector<NamedModel> models_;
  Observer metrics_;
  Executor executor_{"answers", kAnswerThreads};
  Batcher batcher_;
  SessionStore sessions_;
  ActiveCalls calls_;
  ServiceContext context_;
  DeltaNetService service_;
  std::unique_ptr<TlsCertificates> certificates_;
  std::unique_ptr<Janitor> janitor_;
  std::unique_ptr<Janitor> tls_janitor_;
  std::atomic<bool> serving_{false};  // Written under health_mu_.
  int port_ = 0;
  std::unique_ptr<grpc::Server> grpc_server_;
  std::unique_ptr<HttpServer> http_server_;

  mutable Mutex health_mu_;  // Held while gRPC's health service is told: what it hears last is true.
  bool listening_ ABSL_GUARDED_BY(health_mu_) = false;
  bool draining_ ABSL_GUARDED_BY(health_mu_) = false;
  bool stalled_ ABSL_GUARDED_BY(health_mu_) = false;
  bool device_lost_ ABSL_GUARDED_BY(health_mu_) = false;

  Mutex shutdown_mu_;
  bool shut_down_ ABSL_GUARDED_BY(shutdown_mu_) = false;
  bool drained_ ABSL_GUARDED_BY(shutdown_mu_) = false;
};

absl::StatusOr<std::unique_ptr<Server>> Server::Start(const ServerOptions& options,
                                                      std::vector<NamedModel> models) {
  auto impl = std::make_unique<Impl>(options, std::move(models));
  RETURN_IF_ERROR(impl->Start());
  return std::unique_ptr<Server>(new Server(std::move(impl)));
}

Server::Server(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Server::~Server() = default;

int Server::port() const { return impl_->port(); }
int Server::metrics_port() const { return impl_->metrics_port(); }
bool Server::device_lost() const { return impl_->device_lost(); }
void Server::StartDraining() { impl_->StartDraining(); }
bool Server::Shutdown(absl::Duration drain_timeout) { return impl_->Shutdown(drain_timeout); }

}  // namespace deltanet
