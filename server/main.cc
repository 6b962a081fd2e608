// deltanet-server: reads the settings, loads the models, serves.
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "model/base/spin_briefly.h"
#include "model/base/status_macros.h"
#include "model/model.h"
#include "server/clock.h"
#include "server/config.h"
#include "server/host.h"
#include "server/load_log.h"
#include "server/log.h"
#include "server/serve.h"
#include "server/server.h"
#include "server/tokenizer.h"

namespace deltanet {
namespace {

absl::StatusOr<std::vector<NamedModel>> LoadAll(const ServerConfig& config) {
  ModelOptions options;
  options.device.type = config.device;
  options.dtype = config.dtype;
  options.deterministic = config.deterministic;
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
  std::vector<absl::StatusOr<std::unique_ptr<Tokenizer>>> tokenizers;
  for (const auto& [name, directory] : config.models) {
    directories.push_back(directory);
    tokenizers.push_back(Tokenizer::Load(directory));
    // There and of no use: better known before the weights are read.
    if (!tokenizers.back().ok() && !absl::IsNotFound(tokenizers.back().status())) {
      return tokenizers.back().status();
    }
  }
  LoadLog log(Clock::Real(), [](const ModelLoadProgress& progress, absl::Duration elapsed) {
    Log(LogLevel::kInfo, "model_loading",
        {{"directory", progress.directory},
         {"bytes", absl::StrCat(progress.bytes)},
         {"total_bytes", absl::StrCat(progress.total_bytes)},
         {"seconds", absl::StrCat(absl::ToDoubleSeconds(elapsed))}});
  });
  options.on_progress = [&log](const ModelLoadProgress& progress) { log.OnProgress(progress); };
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
         {"deterministic", description.deterministic ? "true" : "false"},
         {"session_bytes", absl::StrCat(description.session_bytes)},
         {"slots", absl::StrCat(description.num_slots)},
         {"graphs", absl::StrCat(description.graphs)},
         {"graph_bytes", absl::StrCat(description.graph_bytes)}});
    named.push_back({config.models[i].first, std::move(models[i])});
    if (!description.takes_tokens) continue;
    if (!tokenizers[i].ok()) {
      named.back().no_tokenizer = std::string(tokenizers[i].status().message());
      Log(LogLevel::kInfo, "no_tokenizer",
          {{"model", config.models[i].first}, {"message", named.back().no_tokenizer}});
      continue;
    }
    named.back().tokenizer = *std::move(tokenizers[i]);
    const int64_t pieces = named.back().tokenizer->size();
    Log(pieces > description.vocab_size ? LogLevel::kWarning : LogLevel::kInfo, "tokenizer_loaded",
        {{"model", config.models[i].first},
         {"pieces", absl::StrCat(pieces)},
         {"vocab_size", absl::StrCat(description.vocab_size)}});
  }
  return named;
}

int Main(int argc, char** argv) {
  const std::vector<std::string> arguments(argv + 1, argv + argc);
  const absl::StatusOr<ServerConfig> config =
      ParseServerConfig(arguments, [](const char* name) -> const char* { return std::getenv(name); });
  if (!config.ok()) {
    std::fprintf(stderr, "deltanet-server: %s\n", std::string(config.status().message()).c_str());
    return kExitUsage;
  }
  if (config->help) {
    std::fputs(ServerHelp().c_str(), stdout);
    return kExitOk;
  }
  if (config->version) {
    std::printf("deltanet-server %s\n", ServerVersion().c_str());
    return kExitOk;
  }
  BlockSignals();
  Log(LogLevel::kInfo, "starting", {{"version", ServerVersion()}});
  absl::StatusOr<std::vector<NamedModel>> models = LoadAll(*config);
  if (!models.ok()) {
    const std::string message(models.status().message());
    Log(LogLevel::kError, "failed", {{"message", message}});
    return kExitFailed;
  }
  const Device device = models->front().model->description().device;
  return Serve(*config, *std::move(models), [device] { return QueryDeviceMemory(device); });
}

}  // namespace
}  // namespace deltanet

int main(int argc, char** argv) {
  deltanet::SpinBriefly(argv);
  return deltanet::Main(argc, argv);
}
