#include "server/metrics.h"

#include <algorithm>
#include <utility>

#include "prometheus/text_serializer.h"
#include "proto/wire.h"

namespace deltanet {
namespace {

using prometheus::Histogram;
using Buckets = Histogram::BucketBoundaries;

constexpr std::array<const char*, kNumMethods> kMethodNames = {"Forward",    "StreamForward", "Generate",
                                                               "Tokenize",   "Detokenize",    "GetModel",
                                                               "ListModels", "EndSession",    "ListSessions"};
// In the order of GenerationEnd.
constexpr std::array<const char*, kNumGenerationEnds> kGenerationEndNames = {"length", "stop_id", "stop_text",
                                                                             "cancelled", "error"};
// In the order of their numbers.
constexpr std::array<const char*, kNumCodes> kCodeNames = {
    "OK",        "CANCELLED",      "UNKNOWN",           "INVALID_ARGUMENT",   "DEADLINE_EXCEEDED",
    "NOT_FOUND", "ALREADY_EXISTS", "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION",
    "ABORTED",   "OUT_OF_RANGE",   "UNIMPLEMENTED",     "INTERNAL",           "UNAVAILABLE",
    "DATA_LOSS", "UNAUTHENTICATED"};

// Outcomes of a work: none, the reasons that matter to whom runs the server, all others.
constexpr std::array<const char*, kNumOutcomes> kOutcomes = {
    "OK", reason::kCancelled, reason::kDeadline, reason::kNonFinite, reason::kSessionEnded, "OTHER"};

constexpr const char* kReasons[] = {
    reason::kInvalidRequest,  reason::kModelNotFound,    reason::kSessionNotFound,
    reason::kSessionExpired,  reason::kSessionEnded,     reason::kSessionExists,
    reason::kSessionAttached, reason::kSessionOutOfStep, reason::kPositionMismatch,
    reason::kSessionModel,    reason::kNotGenerative,    reason::kNoTokenizer,
    reason::kSessionsFull,    reason::kResponseTooLarge, reason::kQueueFull,
    reason::kDraining,        reason::kDeadline,         reason::kCancelled,
    reason::kNonFinite,       reason::kInternal,         "OTHER"};

const Buckets& TimeBuckets() {
  static const Buckets& buckets = *new Buckets{0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025,
                                               0.05,   0.1,     0.25,   0.5,   1,      2.5,   5,    10};
  return buckets;
}

const Buckets& FirstTokenBuckets() {
  static const Buckets& buckets =
      *new Buckets{0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60};
  return buckets;
}

const Buckets& NextTokenBuckets() {
  static const Buckets& buckets =
      *new Buckets{0.0002, 0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015,
                   0.02,   0.03,   0.05,  0.075, 0.1,   0.2,   0.5,    1,    2};
  return buckets;
}

const Buckets& CountBuckets() {
  static const Buckets& buckets = *new Buckets{1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192};
  return buckets;
}

size_t CodeIndex(const absl::Status& status) {
  const size_t code = static_cast<size_t>(status.code());
  return code < kNumCodes ? code : static_cast<size_t>(absl::StatusCode::kUnknown);
}

prometheus::Family<prometheus::Counter>& CounterFamily(prometheus::Registry* registry,
                                                       const std::string& name, const std::string& help) {
  return prometheus::BuildCounter().Name("deltanet_" + name).Help(help).Register(*registry);
}

prometheus::Family<Histogram>& HistogramFamily(prometheus::Registry* registry, const std::string& name,
                                               const std::string& help) {
  return prometheus::BuildHistogram().Name("deltanet_" + name).Help(help).Register(*registry);
}

prometheus::MetricFamily GaugeFamily(const std::string& name, const std::string& help) {
  return {"deltanet_" + name, help, prometheus::MetricType::Gauge, {}};
}

void AddCounter(double value, const std::string& name, const std::string& help,
                std::vector<prometheus::MetricFamily>* families) {
  prometheus::MetricFamily family = {name, help, prometheus::MetricType::Counter, {}};
  family.metric.emplace_back().counter.value = value;
  families->push_back(std::move(family));
}

void AddGauge(double value, const std::string& model, prometheus::MetricFamily* family) {
  prometheus::ClientMetric metric;
  if (!model.empty()) metric.label.push_back({"model", model});
  metric.gauge.value = value;
  family->metric.push_back(std::move(metric));
}

}  // namespace

Metrics::Metrics(const std::vector<std::string>& model_names, const std::string& version)
    : model_names_(model_names) {
  auto& requests = CounterFamily(&registry_, "requests_total", "RPCs that ended; a stream is one.");
  auto& duration = HistogramFamily(&registry_, "request_duration_seconds",
                                   "From an RPC's arrival to its answer; in StreamForward, of each message.");
  for (int method = 0; method < kNumMethods; ++method) {
    for (int code = 0; code < kNumCodes; ++code) {
      requests_[method][code] = &requests.Add({{"method", kMethodNames[method]}, {"code", kCodeNames[code]}});
    }
    request_duration_[method] = &duration.Add({{"method", kMethodNames[method]}}, TimeBuckets());
  }
  auto& messages =
      CounterFamily(&registry_, "stream_messages_total", "Messages of StreamForward that were answered.");
  for (int code = 0; code < kNumCodes; ++code) {
    stream_messages_[code] = &messages.Add({{"code", kCodeNames[code]}});
  }
  auto& errors = CounterFamily(&registry_, "errors_total",
                               "Answers that were an error, of RPCs and messages of streams.");
  for (const char* reason : kReasons) errors_.emplace_back(reason, &errors.Add({{"reason", reason}}));

  first_output_ = &HistogramFamily(&registry_, "stream_first_output_seconds",
                                   "From a stream's first message to its first output.")
                       .Add({}, TimeBuckets());
  next_output_ =
      &HistogramFamily(&registry_, "stream_output_interval_seconds", "Between two outputs of a stream.")
           .Add({}, TimeBuckets());
  auto& works = CounterFamily(&registry_, "works_total",
                              "Spans of a sequence's tokens that were answered, by outcome.");
  auto& work_queued =
      HistogramFamily(&registry_, "work_queued_seconds",
                      "Wait of a sequence's span of tokens for the first step that it is in.");
  auto& work_compute = HistogramFamily(&registry_, "work_compute_seconds",
                                       "Time of the steps that a sequence's span of tokens was in.");
  auto& step_form =
      HistogramFamily(&registry_, "step_form_seconds", "Time to choose the rows of a step of the batch.");
  auto& step_prepare =
      HistogramFamily(&registry_, "step_prepare_seconds", "Time to copy a step of the batch into staging.");
  auto& step_compute =
      HistogramFamily(&registry_, "step_compute_seconds", "Time to compute a step of the batch.");
  auto& step_tokens = HistogramFamily(&registry_, "step_tokens", "Tokens of a step of the batch.");
  auto& step_rows = HistogramFamily(&registry_, "step_rows", "Sequences of a step of the batch.");
  auto& tokens = CounterFamily(&registry_, "tokens_total", "Tokens computed.");
  auto& first_token = HistogramFamily(&registry_, "time_to_first_token_seconds",
                                      "From a generation's coming into the queue to its first token.");
  auto& next_token =
      HistogramFamily(&registry_, "time_per_output_token_seconds", "Between two tokens of a generation.");
  auto& prompt_tokens = CounterFamily(&registry_, "prompt_tokens_total", "Tokens that generations took in.");
  auto& generated_tokens = CounterFamily(&registry_, "generated_tokens_total", "Tokens that were generated.");
  auto& generations =
      CounterFamily(&registry_, "generations_finished_total", "Generations that ended, and how.");
  for (const std::string& name : model_names) {
    const prometheus::Labels labels = {{"model", name}};
    OfModel model;
    model.work_queued = &work_queued.Add(labels, TimeBuckets());
    model.work_compute = &work_compute.Add(labels, TimeBuckets());
    for (int outcome = 0; outcome < kNumOutcomes; ++outcome) {
      model.works[outcome] = &works.Add({{"model", name}, {"outcome", kOutcomes[outcome]}});
    }
    model.step_form = &step_form.Add(labels, TimeBuckets());
    model.step_prepare = &step_prepare.Add(labels, TimeBuckets());
    model.step_compute = &step_compute.Add(labels, TimeBuckets());
    model.step_tokens = &step_tokens.Add(labels, CountBuckets());
    model.step_rows = &step_rows.Add(labels, CountBuckets());
    model.tokens = &tokens.Add(labels);
    model.first_token = &first_token.Add(labels, FirstTokenBuckets());
    model.next_token = &next_token.Add(labels, NextTokenBuckets());
    model.prompt_tokens = &prompt_tokens.Add(labels);
    model.generated_tokens = &generated_tokens.Add(labels);
    for (int end = 0; end < kNumGenerationEnds; ++end) {
      model.generations[end] = &generations.Add({{"model", name}, {"reason", kGenerationEndNames[end]}});
    }
    models_.push_back(model);
  }
  stalls_ = &CounterFamily(&registry_, "batch_thread_stalls_total",
                           "Times that the batch thread was at one step for longer than --step-timeout.")
                 .Add({});
  device_lost_ = &prometheus::BuildGauge()
                      .Name("deltanet_device_lost")
                      .Help("1 once the device is lost: only a new process helps.")
                      .Register(registry_)
                      .Add({});
  prometheus::BuildGauge()
      .Name("deltanet_build_info")
      .Help("1, labelled with the server's version.")
      .Register(registry_)
      .Add({{"version", version}})
      .Set(1);
}

void Metrics::CountError(const absl::Status& status) {
  if (status.ok()) return;
  const std::string reason = ErrorReason(status);
  for (const auto& [known, counter] : errors_) {
    if (reason == known || &counter == &errors_.back().second) {
      counter->Increment();
      return;
    }
  }
}

void Metrics::OnRequestDone(Method method, const absl::Status& status) {
  requests_[static_cast<size_t>(method)][CodeIndex(status)]->Increment();
  CountError(status);
}

void Metrics::OnLatency(Method method, absl::Duration latency) {
  request_duration_[static_cast<size_t>(method)]->Observe(absl::ToDoubleSeconds(latency));
}

void Metrics::OnStreamMessage(const absl::Status& status) {
  stream_messages_[CodeIndex(status)]->Increment();
  CountError(status);
}

void Metrics::OnStep(const Step& step) {
  const OfModel& model = models_[step.model];
  model.step_form->Observe(absl::ToDoubleSeconds(step.form));
  model.step_prepare->Observe(absl::ToDoubleSeconds(step.prepare));
  model.step_compute->Observe(absl::ToDoubleSeconds(step.compute));
  model.step_tokens->Observe(static_cast<double>(step.tokens));
  model.step_rows->Observe(static_cast<double>(step.rows));
  model.tokens->Increment(static_cast<double>(step.tokens));
}

void Metrics::OnWorkDone(int model, const WorkResult& result) {
  const std::string outcome = result.status.ok() ? "OK" : ErrorReason(result.status);
  const auto known = std::find(kOutcomes.begin(), kOutcomes.end() - 1, outcome);
  models_[model].works[known - kOutcomes.begin()]->Increment();
  models_[model].work_queued->Observe(absl::ToDoubleSeconds(result.queued));
  models_[model].work_compute->Observe(absl::ToDoubleSeconds(result.computing));
}

void Metrics::OnToken(int model, bool first, absl::Duration since) {
  const OfModel& of = models_[model];
  (first ? of.first_token : of.next_token)->Observe(absl::ToDoubleSeconds(since));
  of.generated_tokens->Increment();
}

void Metrics::OnGenerationDone(int model, GenerationEnd end, int64_t prompt_tokens) {
  models_[model].generations[static_cast<size_t>(end)]->Increment();
  models_[model].prompt_tokens->Increment(static_cast<double>(prompt_tokens));
}

void Metrics::OnFirstStreamOutput(absl::Duration after) {
  first_output_->Observe(absl::ToDoubleSeconds(after));
}

void Metrics::OnNextStreamOutput(absl::Duration after) {
  next_output_->Observe(absl::ToDoubleSeconds(after));
}

void Metrics::OnStall() { stalls_->Increment(); }

void Metrics::OnDeviceLost(const absl::Status&) { device_lost_->Set(1); }

std::string Metrics::Text(const MetricsSnapshot& snapshot) const {
  std::vector<prometheus::MetricFamily> families = registry_.Collect();
  prometheus::MetricFamily sessions = GaugeFamily("sessions", "Sessions in use.");
  prometheus::MetricFamily sessions_free = GaugeFamily("sessions_free", "Sessions that could be begun now.");
  prometheus::MetricFamily slots = GaugeFamily("slots", "State slots.");
  prometheus::MetricFamily slots_free = GaugeFamily("slots_free", "State slots that nothing holds.");
  prometheus::MetricFamily session_bytes = GaugeFamily("session_bytes", "Bytes of a session's state.");
  prometheus::MetricFamily state_bytes = GaugeFamily("state_bytes", "Bytes of all state slots.");
  prometheus::MetricFamily model_bytes = GaugeFamily("model_bytes", "Bytes of the weights on the device.");
  prometheus::MetricFamily running =
      GaugeFamily("generations_running", "Generations that have been in a step.");
  prometheus::MetricFamily waiting =
      GaugeFamily("generations_waiting", "Generations that wait for their first step.");
  for (size_t m = 0; m < snapshot.models.size(); ++m) {
    const MetricsSnapshot::OfModel& model = snapshot.models[m];
    AddGauge(static_cast<double>(model.sessions), model_names_[m], &sessions);
    AddGauge(static_cast<double>(model.sessions_free), model_names_[m], &sessions_free);
    AddGauge(static_cast<double>(model.slots_free), model_names_[m], &slots_free);
    AddGauge(static_cast<double>(model.session_bytes), model_names_[m], &session_bytes);
    AddGauge(static_cast<double>(model.slots), model_names_[m], &slots);
    AddGauge(static_cast<double>(model.slots * model.session_bytes), model_names_[m], &state_bytes);
    AddGauge(static_cast<double>(model.weight_bytes), model_names_[m], &model_bytes);
    AddGauge(static_cast<double>(model.generations_running), model_names_[m], &running);
    AddGauge(static_cast<double>(model.generations_waiting), model_names_[m], &waiting);
  }
  for (prometheus::MetricFamily* family : {&sessions, &sessions_free, &slots, &slots_free, &session_bytes,
                                           &state_bytes, &model_bytes, &running, &waiting}) {
    families.push_back(std::move(*family));
  }
  const auto add = [&families](prometheus::MetricFamily family, double value) {
    AddGauge(value, "", &family);
    families.push_back(std::move(family));
  };
  if (snapshot.device_memory) {
    add(GaugeFamily("device_memory_bytes", "Memory of the device."),
        static_cast<double>(snapshot.device_memory->total_bytes));
    add(GaugeFamily("device_memory_free_bytes", "Memory of the device that no process holds."),
        static_cast<double>(snapshot.device_memory->free_bytes));
  }
  add(GaugeFamily("queued_works", "Spans of tokens that wait for their first step."),
      static_cast<double>(snapshot.queued_works));
  add(GaugeFamily("queued_tokens", "Tokens of theirs."), static_cast<double>(snapshot.queued_tokens));
  add(GaugeFamily("max_queued_works", "At so many queued_works, more are refused."),
      static_cast<double>(snapshot.max_queued_works));
  add(GaugeFamily("max_queued_tokens", "At so many queued_tokens, more are refused."),
      static_cast<double>(snapshot.max_queued_tokens));
  AddCounter(static_cast<double>(snapshot.sessions_expired), "deltanet_sessions_expired_total",
             "Named sessions that ended because nobody used them.", &families);
  add(GaugeFamily("draining", "1 once the server is going down."), snapshot.draining ? 1 : 0);
  add(GaugeFamily("ready", "1 while requests are taken, 0 while the server drains."), snapshot.ready ? 1 : 0);
  add(GaugeFamily("batch_thread_heartbeat_timestamp_seconds",
                  "When the batch thread last got on, since 1970; while it is idle, when it last had work."),
      absl::ToDoubleSeconds(snapshot.batch_thread_progress - absl::UnixEpoch()));
  add(GaugeFamily("batch_thread_busy_seconds",
                  "How long the batch thread has been at its present step; 0 while it waits for work."),
      absl::ToDoubleSeconds(snapshot.batch_thread_busy));
  add({"process_start_time_seconds",
       "When the server started, since 1970.",
       prometheus::MetricType::Gauge,
       {}},
      absl::ToDoubleSeconds(snapshot.started - absl::UnixEpoch()));
  const auto add_process = [&add](const std::string& name, const std::string& help, double value) {
    add({"process_" + name, help, prometheus::MetricType::Gauge, {}}, value);
  };
  add_process("resident_memory_bytes", "Memory that the process has in RAM.",
              static_cast<double>(snapshot.process.resident_bytes));
  add_process("open_fds", "Open file descriptors.", static_cast<double>(snapshot.process.open_fds));
  add_process("threads", "Threads of the process.", static_cast<double>(snapshot.process.threads));
  AddCounter(snapshot.process.cpu_seconds, "process_cpu_seconds_total",
             "Time on processors, in user and system mode.", &families);
  return prometheus::TextSerializer().Serialize(families);
}

}  // namespace deltanet
