#include "server/serve.h"

#include <google/protobuf/stubs/logging.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <memory>
#include <string>
#include <utility>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "server/log.h"

namespace deltanet {
namespace {

// For the answers to go out once the device is lost.
constexpr absl::Duration kDeviceLostGrace = absl::Seconds(5);
// For the server to come down once its calls are cut, which waits for the step in flight.
constexpr absl::Duration kStuckAfter = absl::Seconds(10);

// How the batch thread ends the wait for a signal; it stays blocked, so that it does nothing during a drain.
constexpr int kDeviceLostSignal = SIGUSR2;

sigset_t ShutdownSignals() {
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGTERM);
  sigaddset(&signals, SIGINT);
  return signals;
}

ServerOptions OptionsOf(const ServerConfig& config) {
  ServerOptions options;
  options.listen = config.listen;
  options.tls = config.tls;
  options.metrics_listen = config.metrics_listen;
  options.max_sessions = config.max_sessions;
  options.batcher.max_queued_works = config.max_queued_requests;
  options.batcher.max_queued_tokens = config.max_queued_tokens;
  options.batcher.mixed_step_tokens = config.mixed_step_tokens;
  options.max_generated_tokens = config.max_generated_tokens;
  options.default_generated_tokens = config.default_generated_tokens;
  options.sessions.default_idle_ttl = config.session_ttl;
  options.sessions.max_idle_ttl = config.max_session_ttl;
  options.max_message_bytes = config.max_message_bytes;
  options.max_response_bytes = config.max_response_bytes;
  options.connections.max_concurrent_streams = config.max_concurrent_streams;
  options.connections.keepalive_time = config.keepalive_time;
  options.connections.keepalive_timeout = config.keepalive_timeout;
  options.connections.max_age = config.max_connection_age;
  options.connections.max_age_grace = config.max_connection_age_grace;
  options.sessions.max_per_peer = config.max_sessions_per_peer;
  options.step_timeout = config.step_timeout;
  options.on_device_lost = [] { kill(getpid(), kDeviceLostSignal); };
  return options;
}

}  // namespace

void BlockSignals() {
  sigset_t signals = ShutdownSignals();
  sigaddset(&signals, kDeviceLostSignal);
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);
  signal(SIGPIPE, SIG_IGN);
}

ExitStatus Serve(const ServerConfig& config, std::vector<NamedModel> models,
                 std::function<std::optional<DeviceMemory>()> device_memory) {
  ServerOptions options = OptionsOf(config);
  options.device_memory = std::move(device_memory);
  // Protobuf has a line on stderr for every message with text that is not UTF-8: clients could fill the log.
  google::protobuf::SetLogHandler(nullptr);
  const absl::StatusOr<std::unique_ptr<Server>> server = Server::Start(options, std::move(models));
  if (!server.ok()) {
    const std::string message(server.status().message());
    Log(LogLevel::kError, "failed", {{"message", message}});
    return kExitFailed;
  }
  Log(LogLevel::kInfo, "listening",
      {{"host", config.listen.host},
       {"port", absl::StrCat((*server)->port())},
       {"metrics_host", config.metrics_listen.host},
       {"metrics_port", absl::StrCat((*server)->metrics_port())}});

  const sigset_t signals = ShutdownSignals();
  sigset_t awaited = signals;
  sigaddset(&awaited, kDeviceLostSignal);
  int received = 0;
  do {
    sigwait(&awaited, &received);
  } while (received == kDeviceLostSignal && !(*server)->device_lost());
  const bool device_lost = (*server)->device_lost();
  const absl::Duration timeout =
      device_lost ? std::min(kDeviceLostGrace, config.drain_timeout) : config.drain_timeout;
  Log(LogLevel::kInfo, "draining",
      {{"cause", device_lost ? "device_lost" : strsignal(received)},
       {"timeout", absl::FormatDuration(timeout)}});
  signal(SIGALRM, [](int) { _exit(kExitStuck); });
  alarm(static_cast<unsigned>(absl::ToInt64Seconds(timeout + kStuckAfter)));
  pthread_sigmask(SIG_UNBLOCK, &signals, nullptr);  // From here on a signal ends the process.
  const bool drained = (*server)->Shutdown(timeout);
  Log(drained ? LogLevel::kInfo : LogLevel::kWarning, "stopped", {{"drained", drained ? "true" : "false"}});
  if ((*server)->device_lost())
    _exit(kExitDeviceLost);  // The models' destructors would only talk to the lost device.
  return kExitOk;
}

}  // namespace deltanet
