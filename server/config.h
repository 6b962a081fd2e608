// The server's settings: one table of flags, each of which an environment variable can give as well
// (--max-sessions is DELTANET_MAX_SESSIONS; the command line wins).
#ifndef DELTANET_SERVER_CONFIG_H_
#define DELTANET_SERVER_CONFIG_H_

#include <cstdint>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "model/base/tensor_view.h"
#include "server/tls.h"

namespace deltanet {

struct HostPort {
  std::string host;  // An IPv6 address without its brackets.
  int port = 0;
};

struct ServerConfig {
  bool help = false;     // Print ServerHelp() and end: nothing else has been checked.
  bool version = false;  // Likewise.

  std::vector<std::pair<std::string, std::string>> models;  // Name, directory; names differ.
  DeviceType device = DeviceType::kCpu;
  DType dtype = DType::kFloat32;
  bool deterministic = false;
  HostPort listen{"0.0.0.0", 50051};
  TlsFiles tls;  // As paths; what is in them is not looked at.
  HostPort metrics_listen{"0.0.0.0", 9464};
  int64_t max_sessions = 0;        // Of each model; 0: what the memory allows.
  int64_t state_memory_bytes = 0;  // Of all models together; 0: state_memory_percent counts.
  // Of the memory limit on the CPU, of the device's memory that the models leave free on CUDA; 0: 25 and 90.
  double state_memory_percent = 0;
  int64_t max_step_tokens = 2048;
  int64_t max_step_rows = 256;
  int64_t mixed_step_tokens = 256;
  int64_t max_queued_requests = 4096;
  int64_t max_queued_tokens = int64_t{1} << 20;
  absl::Duration session_ttl = absl::Minutes(10);
  absl::Duration max_session_ttl = absl::Hours(24);
  int64_t max_sessions_per_peer = 0;  // 0: no limit.
  int64_t max_message_bytes = int64_t{64} << 20;
  int64_t max_response_bytes = 0;  // 0: what a message holds.
  int64_t max_generated_tokens = 4096;
  int64_t default_generated_tokens = 256;  // At most max_generated_tokens are meant.
  int64_t max_concurrent_streams = 1000;
  absl::Duration keepalive_time = absl::Seconds(30);
  absl::Duration keepalive_timeout = absl::Seconds(10);
  absl::Duration max_connection_age = absl::ZeroDuration();  // Zero: any age.
  absl::Duration max_connection_age_grace = absl::Seconds(60);
  absl::Duration drain_timeout = absl::Seconds(30);
  absl::Duration step_timeout = absl::Seconds(60);
  int threads = 0;  // 0: as many as the process may use.
};

// Reads the arguments after the program's name, then, for flags that are not among them, the environment by
// `getenv` (null: not set). INVALID_ARGUMENT names the flag (or variable), the value found and the values
// wanted.
absl::StatusOr<ServerConfig> ParseServerConfig(absl::Span<const std::string> arguments,
                                               const std::function<const char*(const char*)>& getenv);

// What --help prints: every flag with its unit, default and meaning.
std::string ServerHelp();

}  // namespace deltanet

#endif  // DELTANET_SERVER_CONFIG_H_
