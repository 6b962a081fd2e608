// The server: owns the models, the batch thread, the sessions, the metrics and both listeners, and their
// order of death.
#ifndef DELTANET_SERVER_SERVER_H_
#define DELTANET_SERVER_SERVER_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "model/model.h"
#include "server/batcher.h"
#include "server/clock.h"
#include "server/config.h"
#include "server/session_store.h"
#include "server/tls.h"
#include "server/tokenizer.h"

namespace deltanet {

// "0.1.0"
std::string ServerVersion();

struct NamedModel {
  std::string name;
  std::unique_ptr<Model> model;
  std::unique_ptr<const Tokenizer> tokenizer = nullptr;     // Null: the model is served by ids, ...
  std::string no_tokenizer = "the model has no tokenizer";  // ...and this is why, for clients.
};

// What one client's connection may cost.
struct ConnectionLimits {
  int64_t max_concurrent_streams = 1000;  // Calls on one connection; more wait at the client.
  // A connection that says nothing for this long is asked whether it is there, and cut if it does not answer:
  // its calls are cancelled, and what they held is free.
  absl::Duration keepalive_time = absl::Seconds(30);
  absl::Duration keepalive_timeout = absl::Seconds(10);
  // Zero: any age. Else clients are told to connect anew, and calls that still run after the grace are cut.
  absl::Duration max_age = absl::ZeroDuration();
  absl::Duration max_age_grace = absl::Seconds(60);
};

struct ServerOptions {
  HostPort listen{"127.0.0.1", 0};
  TlsFiles tls;  // Of `listen`; HTTP has none.
  HostPort metrics_listen{"127.0.0.1", 0};
  int64_t max_sessions = 0;  // Of each model; 0: as many as its slots allow.
  BatcherOptions batcher;    // max_queued_tokens also bounds a request.
  SessionStoreOptions sessions;
  int64_t max_message_bytes = int64_t{64} << 20;
  int64_t max_response_bytes = 0;  // Of a response's output, checked before computing; 0: as the message.
  int64_t max_generated_tokens = 4096;     // Of one Generate,
  int64_t default_generated_tokens = 256;  // and what one gets that does not say; at most the maximum.
  ConnectionLimits connections;
  // Unanswered or unwritten work of a stream, above which the stream is not read.
  int64_t stream_window_messages = 64;
  int64_t stream_window_bytes = int64_t{16} << 20;
  // A batch thread that is at one step for longer than this turns health to NOT_SERVING until it gets on.
  // Looked at about once a second.
  absl::Duration step_timeout = absl::Seconds(60);
  // Called once, on the batch thread, when the device is lost: health has turned to NOT_SERVING for good, and
  // all work fails with INTERNAL. Only a new process helps. May be null.
  std::function<void()> on_device_lost;
  // The device's memory, for the metrics: called, on any thread, whenever they are read. May be null.
  std::function<std::optional<DeviceMemory>()> device_memory;
  Clock* clock = Clock::Real();  // Outlives the server.
};

// Slots of a model for work in flight, so that sessions may hold the rest: a quarter of the slots, at most
// the rows in flight, and whatever max_sessions (0: no limit) leaves; at least 1.
int64_t RunningSlots(const ModelDescription& model, int64_t max_sessions);

// Thread-safe.
class Server {
 public:
  // Serves the models, of which there is at least one and whose names differ. UNAVAILABLE, naming the
  // address, if it cannot listen; INVALID_ARGUMENT as CheckTlsFiles.
  static absl::StatusOr<std::unique_ptr<Server>> Start(const ServerOptions& options,
                                                       std::vector<NamedModel> models);
  // Shutdown without waiting.
  ~Server();

  // Where it listens.
  int port() const;
  int metrics_port() const;

  bool device_lost() const;

  // Health turns to NOT_SERVING and new work is refused (UNAVAILABLE, DRAINING); streams finish the work that
  // they have taken and end. Does not wait.
  void StartDraining();
  // Drains, waits up to `drain_timeout` for running calls, cancels the rest, and stops listening for RPCs.
  // True if all calls had ended by themselves. Later calls do nothing and return the same.
  bool Shutdown(absl::Duration drain_timeout);

 private:
  class Impl;
  explicit Server(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace deltanet

#endif  // DELTANET_SERVER_SERVER_H_
