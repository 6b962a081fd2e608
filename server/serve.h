// The life of the server's process once its models are loaded: signals, draining, exit statuses.
#ifndef DELTANET_SERVER_SERVE_H_
#define DELTANET_SERVER_SERVE_H_

#include <functional>
#include <optional>
#include <vector>

#include "model/model.h"
#include "server/config.h"
#include "server/server.h"

namespace deltanet {

enum ExitStatus : int {
  kExitOk = 0,
  kExitFailed = 1,      // A model could not be loaded, an address not be had.
  kExitUsage = 2,       // A wrong flag or variable.
  kExitDeviceLost = 3,  // Only a new process helps.
  kExitStuck = 4,       // After a signal, a step still ran when --drain-timeout had long passed.
};

// Blocks the signals that Serve waits for; before there is any other thread, since those inherit it.
void BlockSignals();

// Serves until SIGTERM or SIGINT, then drains: a second one ends the process at once, by that signal. Where
// the device is lost, ends the process itself (kExitDeviceLost) once the answers are out. `device_memory` as
// in ServerOptions.
ExitStatus Serve(const ServerConfig& config, std::vector<NamedModel> models,
                 std::function<std::optional<DeviceMemory>()> device_memory = nullptr);

}  // namespace deltanet

#endif  // DELTANET_SERVER_SERVE_H_
