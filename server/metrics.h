// Every metric that the server exports, and the text of /metrics.
//
// Names start with deltanet_. Labels: `model` (the names given at start), `method` (the RPCs), `code` (gRPC's
// names), `reason` (those of proto/wire.h); never anything that a client chose.
//
//   requests_total{method,code}            RPCs that ended; a stream is one; CANCELLED where the client gave
//   it
//                                          up or was gone
//   stream_messages_total{code}            messages of StreamForward that were answered
//   errors_total{reason}                   answers that were an error, of RPCs and messages
//   request_duration_seconds{method}       from an RPC's arrival to its answer; in StreamForward, of each
//                                          message
//   stream_first_output_seconds            from a stream's first message to its first output
//   stream_output_interval_seconds         between two outputs of a stream
//   works_total{model,outcome}             spans of a sequence that were answered: OK, or why not
//   work_queued_seconds{model}             of each sequence's span: waiting for its first step
//   work_compute_seconds{model}            of each sequence's span: the steps that it was in
//   step_form_seconds{model}               of each step of the batch: choosing its rows
//   step_prepare_seconds{model}            of each step of the batch: copying it into staging
//   step_compute_seconds{model}            of each step of the batch: computing it
//   step_tokens{model}, step_rows{model}   of each step of the batch
//   tokens_total{model}                    tokens computed
//   time_to_first_token_seconds{model}     of each generation: from its coming into the queue
//   time_per_output_token_seconds{model}   of each later token: since the one before it
//   prompt_tokens_total{model}             tokens that generations took in
//   generated_tokens_total{model}          tokens that they made
//   generations_finished_total{model,reason}    length, stop_id, stop_text, cancelled or error
//   generations_running{model}, generations_waiting{model}    now: at a token or at their prompt, or queued
//   sessions{model}, sessions_free{model}, slots{model}, slots_free{model}                     now
//   session_bytes{model}, state_bytes{model}, model_bytes{model}    of one slot, of all, of the weights
//   device_memory_bytes, device_memory_free_bytes    of the device, whoever holds it; not there for the CPU
//   sessions_expired_total                 named sessions that ended because nobody used them
//   queued_works, queued_tokens            now
//   max_queued_works, max_queued_tokens    at which more are refused
//   ready                                  1 while requests are taken, else 0
//   draining                               1 once the server is going down
//   device_lost                            1 once the device is lost: only a new process helps
//   batch_thread_heartbeat_timestamp_seconds    when the batch thread last got on, since 1970
//   batch_thread_busy_seconds              how long it has been at its present step; 0: it waits for work
//   batch_thread_stalls_total              times that this was longer than allowed
//   build_info{version}                    1
//
// and, as other programs call them, process_start_time_seconds, process_cpu_seconds_total,
// process_resident_memory_bytes, process_open_fds and process_threads.
#ifndef DELTANET_SERVER_METRICS_H_
#define DELTANET_SERVER_METRICS_H_

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "model/model.h"
#include "prometheus/counter.h"
#include "prometheus/gauge.h"
#include "prometheus/histogram.h"
#include "prometheus/registry.h"
#include "server/batcher.h"
#include "server/host.h"

namespace deltanet {

enum class Method {
  kForward,
  kStreamForward,
  kGenerate,
  kTokenize,
  kDetokenize,
  kGetModel,
  kListModels,
  kEndSession,
  kListSessions
};
inline constexpr int kNumMethods = 9;
inline constexpr int kNumCodes = 17;
inline constexpr int kNumOutcomes = 6;  // Of a work.

// How a generation ended.
enum class GenerationEnd { kLength, kStopId, kStopText, kCancelled, kError };
inline constexpr int kNumGenerationEnds = 5;

// What can be asked for at any time; read when /metrics is.
struct MetricsSnapshot {
  struct OfModel {
    int64_t sessions = 0;
    int64_t sessions_free = 0;
    int64_t slots_free = 0;
    int64_t session_bytes = 0;
    int64_t slots = 0;
    int64_t weight_bytes = 0;
    int64_t generations_running = 0;
    int64_t generations_waiting = 0;
  };
  std::vector<OfModel> models;  // In the order of their numbers.
  int64_t queued_works = 0;
  int64_t queued_tokens = 0;
  int64_t max_queued_works = 0;
  int64_t max_queued_tokens = 0;
  int64_t sessions_expired = 0;
  bool ready = false;
  bool draining = false;
  absl::Time batch_thread_progress = absl::UnixEpoch();
  absl::Duration batch_thread_busy;
  absl::Time started = absl::UnixEpoch();
  ProcessUsage process;
  std::optional<DeviceMemory> device_memory;
};

// Thread-safe. Owned by the server; outlives the batcher, which it observes, and the service.
class Metrics : public BatchObserver {
 public:
  // `model_names` in the order of the batcher's numbers.
  Metrics(const std::vector<std::string>& model_names, const std::string& version);

  void OnRequestDone(Method method, const absl::Status& status);
  // How long an RPC took, or a message of a stream.
  void OnLatency(Method method, absl::Duration latency);
  void OnStreamMessage(const absl::Status& status);
  // A stream gave output: `after` the arrival of its first message, or its last output.
  void OnFirstStreamOutput(absl::Duration after);
  void OnNextStreamOutput(absl::Duration after);
  // A generation is over, which has taken in `prompt_tokens` (0: it did not come to that).
  void OnGenerationDone(int model, GenerationEnd end, int64_t prompt_tokens);
  // The batch thread does not get on.
  void OnStall();

  void OnStep(const Step& step) override;
  void OnWorkDone(int model, const WorkResult& result) override;
  void OnToken(int model, bool first, absl::Duration since) override;
  void OnDeviceLost(const absl::Status& status) override;

  // The text format of Prometheus. `snapshot` is what is true now.
  std::string Text(const MetricsSnapshot& snapshot) const;

 private:
  struct OfModel {
    prometheus::Histogram* work_queued = nullptr;
    prometheus::Histogram* work_compute = nullptr;
    std::array<prometheus::Counter*, kNumOutcomes> works;
    prometheus::Histogram* step_form = nullptr;
    prometheus::Histogram* step_prepare = nullptr;
    prometheus::Histogram* step_compute = nullptr;
    prometheus::Histogram* step_tokens = nullptr;
    prometheus::Histogram* step_rows = nullptr;
    prometheus::Counter* tokens = nullptr;
    prometheus::Histogram* first_token = nullptr;
    prometheus::Histogram* next_token = nullptr;
    prometheus::Counter* prompt_tokens = nullptr;
    prometheus::Counter* generated_tokens = nullptr;
    std::array<prometheus::Counter*, kNumGenerationEnds> generations;
  };

  void CountError(const absl::Status& status);

  // Constant after construction; the series are the registry's.
  const std::vector<std::string> model_names_;
  prometheus::Registry registry_;
  std::array<std::array<prometheus::Counter*, kNumCodes>, kNumMethods> requests_;
  std::array<prometheus::Histogram*, kNumMethods> request_duration_;
  std::array<prometheus::Counter*, kNumCodes> stream_messages_;
  std::vector<std::pair<std::string, prometheus::Counter*>>
      errors_;  // By reason; the last counts all others.
  std::vector<OfModel> models_;
  prometheus::Histogram* first_output_ = nullptr;
  prometheus::Histogram* next_output_ = nullptr;
  prometheus::Counter* stalls_ = nullptr;
  prometheus::Gauge* device_lost_ = nullptr;
};

}  // namespace deltanet

#endif  // DELTANET_SERVER_METRICS_H_
