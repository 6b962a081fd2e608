// deltanet-server: reads the settings, loads the models, serves until SIGTERM or SIGINT.
#include <signal.h>
#include <unistd.h>

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

// OpenMP's threads, which LibTorch's and our kernels run on, by default spin for a while after their work in
// case there is more. Beside gRPC's threads on the same cores that costs far more than the wake-ups it saves:
// with two cores and a client on the same machine, 64 streams got 1.8 times the throughput without. OpenMP
// reads the setting when it is loaded, before main, hence the new start.
void WaitWithoutSpinning(char** argv) {
  if (std::getenv("OMP_WAIT_POLICY") != nullptr) return;
  setenv("OMP_WAIT_POLICY", "passive", 1);
  execv("/proc/self/exe", argv);  // Where this fails, the server runs all the same.
}

absl::StatusOr<std::vector<NamedModel>> LoadAll(const ServerConfig& config) {
  ModelOptions options;
  options.device.type = config.device;
  options.dtype = config.dtype;
  options.max_step_tokens = config.max_step_tokens;
  options.max_step_rows = config.max_step_rows;
  options.pool_bytes = config.state_memory_bytes;
  if (options.pool_bytes == 0 && config.device == DeviceType::kCpu) {
    const double percent = config.state_memory_percent > 0 ? config.state_memory_percent : 25;
    options.pool_bytes = static_cast<int64_t>(static_cast<double>(MemoryLimitBytes()) * percent / 100);
  }
  if (config.state_memory_percent > 0) options.pool_fraction = config.state_memory_percent / 100;
  if (config.max_sessions > 0) options.max_slots = config.max_sessions + config.max_step_rows;
  options.cpu_threads = config.threads > 0 ? config.threads : AvailableCpus();

  std::vector<std::string> directories;
  for (const auto& [name, directory] : config.models) directories.push_back(directory);
  ASSIGN_OR_RETURN(std::vector<std::unique_ptr<Model>> models, LoadModels(directories, options));
  std::vector<NamedModel> named;
  for (size_t i = 0; i < models.size(); ++i) {
    const ModelDescription& description = models[i]->description();
    Log(LogLevel::kInfo, "model_loaded",
        {{"model", config.models[i].first},
         {"family", description.family},
         {"parameters", absl::StrCat(description.parameters)},
         {"device", DeviceName(description.device)},
         {"dtype", DTypeName(description.dtype)},
         {"session_bytes", absl::StrCat(description.session_bytes)},
         {"slots", absl::StrCat(description.num_slots)}});
    named.push_back({config.models[i].first, std::move(models[i])});
  }
  return named;
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
  ASSIGN_OR_RETURN(std::vector<NamedModel> models, LoadAll(config));
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

int main(int argc, char** argv) {
  deltanet::WaitWithoutSpinning(argv);
  return deltanet::Main(argc, argv);
}
