// deltanet-server over one fake model, for tests of the process from outside:
//
//   fake_server [--fake-hold=STEP] [--fake-lose-device=STEP] FLAGS OF deltanet-server...
//
// --fake-hold: that step hangs, of which the log says "held", until SIGUSR1. --fake-lose-device: that step
// finds the device lost.
#include <signal.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/strip.h"
#include "server/config.h"
#include "server/log.h"
#include "server/serve.h"
#include "tests/testing/fake_model.h"

int main(int argc, char** argv) {
  using namespace deltanet;
  std::vector<std::string> arguments;
  int64_t hold = -1, lose_device = -1;
  for (int i = 1; i < argc; ++i) {
    absl::string_view argument = argv[i];
    if (absl::ConsumePrefix(&argument, "--fake-hold=")) {
      if (!absl::SimpleAtoi(argument, &hold)) return kExitUsage;
    } else if (absl::ConsumePrefix(&argument, "--fake-lose-device=")) {
      if (!absl::SimpleAtoi(argument, &lose_device)) return kExitUsage;
    } else {
      arguments.emplace_back(argv[i]);
    }
  }
  const absl::StatusOr<ServerConfig> config =
      ParseServerConfig(arguments, [](const char*) -> const char* { return nullptr; });
  if (!config.ok()) {
    std::fprintf(stderr, "fake_server: %s\n", config.status().ToString().c_str());
    return kExitUsage;
  }

  BlockSignals();
  sigset_t release;
  sigemptyset(&release);
  sigaddset(&release, SIGUSR1);
  pthread_sigmask(SIG_BLOCK, &release, nullptr);

  auto model = std::make_unique<FakeModel>(FakeModelOptions{.num_slots = 64});
  if (lose_device >= 0)
    model->FailWait(lose_device, absl::DataLossError("the device has fallen off the bus"));
  if (hold >= 0) {
    model->Hold(hold);
    std::thread([model = model.get(), hold, release] {
      model->WaitUntilHeld(hold);
      Log(LogLevel::kInfo, "held");
      int received = 0;
      sigwait(&release, &received);
      model->Release(hold);
    }).detach();  // Ends with the process.
  }
  std::vector<NamedModel> models;
  models.push_back({config->models[0].first, std::move(model)});
  return Serve(*config, std::move(models));
}
