// deltanet-server: reads the settings, loads the models, serves until SIGTERM or SIGINT.
#include <signal.h>
#include <sys/prctl.h>

#include <cstdio>
#include <cstdlib>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "model/base/status_macros.h"
#include "model/model.h"
#include "server/config.h"
#include "server/host.h"
#include "server/log.h"
#include "server/server.h"

namespace deltanet {
namespace {

absl::StatusOr<std::vector<NamedModel>> LoadModels(const ServerConfig& config) {
  const int64_t memory_limit = MemoryLimitBytes();
  int64_t state_bytes = config.state_memory_bytes;
  if (state_bytes == 0) {
    state_bytes = static_cast<int64_t>(static_cast<double>(memory_limit) * config.state_memory_percent / 100);
  }
  ModelOptions options;
  options.device.type = config.device;
  options.max_step_tokens = config.max_step_tokens;
  options.max_step_rows = config.max_step_rows;
  options.pool_bytes = state_bytes / static_cast<int64_t>(config.models.size());
  if (config.max_sessions > 0) options.max_slots = config.max_sessions + config.max_step_rows;
  options.cpu_threads = config.threads > 0 ? config.threads : AvailableCpus();

  std::vector<NamedModel> models;
  for (const auto& [name, directory] : config.models) {
    absl::StatusOr<std::unique_ptr<Model>> model = LoadModel(directory, options);
    if (!model.ok()) {
      return absl::Status(model.status().code(),
                          absl::StrCat("model ", name, ": ", model.status().message()));
    }
    const ModelDescription& description = (*model)->description();
    Log(LogLevel::kInfo, "model_loaded",
        {{"model", name},
         {"family", description.family},
         {"parameters", absl::StrCat(description.parameters)},
         {"device", DeviceName(description.device)},
         {"session_bytes", absl::StrCat(description.session_bytes)},
         {"slots", absl::StrCat(description.num_slots)}});
    models.push_back({name, *std::move(model)});
  }
  return models;
}

ServerOptions OptionsOf(const ServerConfig& config) {
  ServerOptions options;
  options.listen = config.listen;
  options.metrics_listen = config.metrics_listen;
  options.max_sessions = config.max_sessions;
  options.batcher.max_queued_works = config.max_queued_requests;
  options.batcher.max_queued_tokens = config.max_queued_tokens;
  options.sessions.default_idle_ttl = config.session_ttl;
  options.sessions.max_idle_ttl = config.max_session_ttl;
  options.max_message_bytes = config.max_message_bytes;
  return options;
}

absl::Status Serve(const ServerConfig& config) {
  // Before there is any other thread: they inherit the mask, so that only sigwait sees these.
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGTERM);
  sigaddset(&signals, SIGINT);
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);
  signal(SIGPIPE, SIG_IGN);

  Log(LogLevel::kInfo, "starting", {{"version", ServerVersion()}});
  ASSIGN_OR_RETURN(std::vector<NamedModel> models, LoadModels(config));
  ASSIGN_OR_RETURN(const std::unique_ptr<Server> server, Server::Start(OptionsOf(config), std::move(models)));
  Log(LogLevel::kInfo, "listening",
      {{"host", config.listen.host},
       {"port", absl::StrCat(server->port())},
       {"metrics_host", config.metrics_listen.host},
       {"metrics_port", absl::StrCat(server->metrics_port())}});

  int received = 0;
  sigwait(&signals, &received);
  Log(LogLevel::kInfo, "draining",
      {{"signal", absl::StrCat(received)}, {"timeout", absl::FormatDuration(config.drain_timeout)}});
  pthread_sigmask(SIG_UNBLOCK, &signals, nullptr);  // A second signal ends the process at once.
  const bool drained = server->Shutdown(config.drain_timeout);
  Log(drained ? LogLevel::kInfo : LogLevel::kWarning, "stopped", {{"drained", drained ? "true" : "false"}});
  return absl::OkStatus();
}

int Main(int argc, char** argv) {
  const std::vector<std::string> arguments(argv + 1, argv + argc);
  const absl::StatusOr<ServerConfig> config =
      ParseServerConfig(arguments, [](const char* name) -> const char* { return std::getenv(name); });
  if (!config.ok()) {
    std::fprintf(stderr, "deltanet-server: %s\n", std::string(config.status().message()).c_str());
    return 2;
  }
  if (config->help) {
    std::fputs(ServerHelp().c_str(), stdout);
    return 0;
  }
  if (config->version) {
    std::printf("deltanet-server %s\n", ServerVersion().c_str());
    return 0;
  }
  if (const absl::Status status = Serve(*config); !status.ok()) {
    Log(LogLevel::kError, "failed", {{"message", status.message()}});
    return 1;
  }
  return 0;
}

}  // namespace
}  // namespace deltanet

int main(int argc, char** argv) { return deltanet::Main(argc, argv); }
