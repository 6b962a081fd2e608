#include "server/config.h"

#include <set>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "model/base/status_macros.h"
#include "model/model.h"

namespace deltanet {
namespace {

// Stores a value in the settings, or says which values it wants.
using Parser = std::function<absl::Status(absl::string_view value, ServerConfig* config)>;

constexpr char kOnOff[] = "0|1";

struct Flag {
  const char* name;
  const char*
      value;  // What stands for the value in the help; "" for a switch; kOnOff: may be left out for 1.
  const char* fallback;
  const char* help;
  Parser parse;
  bool repeatable = false;
};

absl::Status Wanted(absl::string_view wanted) { return absl::InvalidArgumentError(wanted); }

Parser Integer(int64_t ServerConfig::*field, int64_t least, int64_t most) {
  return [=](absl::string_view value, ServerConfig* config) {
    int64_t number = 0;
    if (!absl::SimpleAtoi(value, &number) || number < least || number > most) {
      return Wanted(absl::StrCat("a whole number from ", least, " to ", most));
    }
    config->*field = number;
    return absl::OkStatus();
  };
}

// A size: a whole number, perhaps with KiB, MiB or GiB. Negative if it is none.
int64_t ParseBytes(absl::string_view value) {
  int shift = 0;
  if (absl::ConsumeSuffix(&value, "KiB")) shift = 10;
  if (absl::ConsumeSuffix(&value, "MiB")) shift = 20;
  if (absl::ConsumeSuffix(&value, "GiB")) shift = 30;
  int64_t number = 0;
  if (!absl::SimpleAtoi(value, &number) || number < 0 || number > (INT64_MAX >> shift)) return -1;
  return number << shift;
}

Parser Duration(absl::Duration ServerConfig::*field, absl::Duration least, absl::Duration most) {
  return [=](absl::string_view value, ServerConfig* config) {
    absl::Duration duration;
    if (!absl::ParseDuration(value, &duration) || duration < least || duration > most) {
      return Wanted(absl::StrCat("a duration from ", absl::FormatDuration(least), " to ",
                                 absl::FormatDuration(most), " like 500ms, 30s or 10m"));
    }
    config->*field = duration;
    return absl::OkStatus();
  };
}

Parser Address(HostPort ServerConfig::*field) {
  return [=](absl::string_view value, ServerConfig* config) {
    const size_t colon = value.rfind(':');
    absl::string_view host = value.substr(0, colon == absl::string_view::npos ? 0 : colon);
    const bool bracketed = absl::ConsumePrefix(&host, "[") && absl::ConsumeSuffix(&host, "]");
    int port = -1;
    if (colon == absl::string_view::npos || !absl::SimpleAtoi(value.substr(colon + 1), &port) || port < 0 ||
        port > 65535 || host.empty() || (!bracketed && host.find(':') != absl::string_view::npos)) {
      return Wanted("HOST:PORT with a port from 0 (any that is free) to 65535");
    }
    config->*field = HostPort{std::string(host), port};
    return absl::OkStatus();
  };
}

Parser TlsFile(std::string TlsFiles::*field) {
  return [=](absl::string_view value, ServerConfig* config) {
    if (value.empty()) return Wanted("the path of a PEM file");
    config->tls.*field = std::string(value);
    return absl::OkStatus();
  };
}

absl::Status ParseModels(absl::string_view value, ServerConfig* config) {
  for (const absl::string_view item : absl::StrSplit(value, ',')) {
    const std::pair<absl::string_view, absl::string_view> parts =
        absl::StrSplit(item, absl::MaxSplits('=', 1));
    const auto& [name, directory] = parts;
    bool plain = !name.empty() && name.size() <= 128;
    for (const char c : name) plain = plain && (absl::ascii_isalnum(c) || absl::StrContains("._-", c));
    if (!plain || directory.empty()) {
      return Wanted("NAME=DIRECTORY, the name of 1 to 128 characters of [A-Za-z0-9._-]");
    }
    for (const auto& [other, unused] : config->models) {
      if (other == name) return Wanted("names that differ");
    }
    config->models.emplace_back(name, directory);
  }
  return absl::OkStatus();
}

absl::Status ParseDevice(absl::string_view value, ServerConfig* config) {
  if (value != "cpu" && value != "cuda") return Wanted("cpu or cuda");
  config->device = value == "cpu" ? DeviceType::kCpu : DeviceType::kCuda;
  return absl::OkStatus();
}

absl::Status ParseDeterministic(absl::string_view value, ServerConfig* config) {
  if (value != "0" && value != "1") return Wanted("0 or 1, or no value");
  config->deterministic = value == "1";
  return absl::OkStatus();
}

absl::Status ParseDType(absl::string_view value, ServerConfig* config) {
  if (value != "float32" && value != "bfloat16") return Wanted("float32 or bfloat16");
  config->dtype = value == "float32" ? DType::kFloat32 : DType::kBFloat16;
  return absl::OkStatus();
}

absl::Status ParseStateMemory(absl::string_view value, ServerConfig* config) {
  double percent = 0;
  absl::string_view number = value;
  if (absl::ConsumeSuffix(&number, "%") && absl::SimpleAtod(number, &percent) && percent > 0 &&
      percent <= 100) {
    config->state_memory_percent = percent;
    config->state_memory_bytes = 0;
    return absl::OkStatus();
  }
  const int64_t bytes = ParseBytes(value);
  if (bytes <= 0) return Wanted("bytes (with KiB, MiB or GiB if you like) above 0, or a percentage like 25%");
  config->state_memory_bytes = bytes;
  return absl::OkStatus();
}

Parser Bytes(int64_t ServerConfig::*field, int64_t least, int64_t most) {
  return [=](absl::string_view value, ServerConfig* config) {
    const int64_t bytes = ParseBytes(value);
    if (bytes < least || bytes > most) {
      return Wanted(absl::StrCat("bytes (with KiB, MiB or GiB if you like) from ", least, " to ", most));
    }
    config->*field = bytes;
    return absl::OkStatus();
  };
}

absl::Status ParseThreads(absl::string_view value, ServerConfig* config) {
  int threads = 0;
  if (!absl::SimpleAtoi(value, &threads) || threads < 0 || threads > 4096) {
    return Wanted("a whole number from 0 to 4096");
  }
  config->threads = threads;
  return absl::OkStatus();
}

std::vector<Flag> MakeFlags() {
  using C = ServerConfig;
  std::vector<Flag> flags;
  const auto add = [&flags](const char* name, const char* value, const char* fallback, const char* help,
                            Parser parse, bool repeatable = false) {
    flags.push_back({name, value, fallback, help, std::move(parse), repeatable});
  };
  add("model", "NAME=DIR", "", "serve the model in directory DIR under NAME; repeat it for more (needed)",
      ParseModels, /*repeatable=*/true);
  add("device", "cpu|cuda", "cpu", "where the models run", ParseDevice);
  add("dtype", "float32|bfloat16", "float32",
      "what products are computed in, bfloat16 on CUDA only; session states are float32 always", ParseDType);
  add("deterministic", kOnOff, "0",
      "a session gets the same bits whatever it shares its steps with: outputs, scores, sampled tokens. It\n"
      "costs some of a long prompt's speed on the CPU (the README has figures), and on CUDA products compute\n"
      "with 128 rows where there are fewer",
      ParseDeterministic);
  add("listen", "HOST:PORT", "0.0.0.0:50051", "gRPC; port 0 picks a free one and the log says which",
      Address(&C::listen));
  add("tls-cert", "FILE", "",
      "serve gRPC over TLS with the certificate (chain) in this PEM file, and --tls-key; all three files\n"
      "are read again every few seconds, for a certificate that is renewed",
      TlsFile(&TlsFiles::certificate));
  add("tls-key", "FILE", "", "its private key, in PEM and without a passphrase", TlsFile(&TlsFiles::key));
  add("tls-client-ca", "FILE", "",
      "mutual TLS: refuse clients without a certificate that these roots (PEM) vouch for",
      TlsFile(&TlsFiles::client_ca));
  add("metrics-listen", "HOST:PORT", "0.0.0.0:9464", "HTTP, never TLS: /metrics, /healthz, /readyz",
      Address(&C::metrics_listen));
  add("max-sessions", "N", "0", "sessions of each model; 0: as many as the state memory holds",
      Integer(&C::max_sessions, 0, int64_t{1} << 20));
  add("state-memory", "BYTES|P%", "25% or 90%",
      "memory for session states, shared equally among models: bytes (KiB, MiB, GiB), or percent; on the\n"
      "CPU (default 25%) of the memory limit (of the cgroup, or what is available if that is less), on CUDA\n"
      "(default 90%) of what the models leave free on the device",
      ParseStateMemory);
  add("max-step-tokens", "N", "2048", "tokens of one step of the batch",
      Integer(&C::max_step_tokens, kMinStepTokens, 1 << 20));
  add("max-step-rows", "N", "256", "sequences of one step of the batch",
      Integer(&C::max_step_rows, 1, 1 << 16));
  add("mixed-step-tokens", "N", "256",
      "tokens of prompts and streams that a step takes along with sequences that generate: fewer, and the\n"
      "time between their tokens is more even; more, and prompts are taken in faster",
      Integer(&C::mixed_step_tokens, kMinStepTokens, 1 << 20));
  add("max-queued-requests", "N", "4096", "sequences that may wait, and the most that one request may have",
      Integer(&C::max_queued_requests, 1, 1 << 24));
  add("max-queued-tokens", "N", "1048576", "tokens that may wait, and the most that one request may have",
      Integer(&C::max_queued_tokens, 1, int64_t{1} << 40));
  add("session-ttl", "DURATION", "10m",
      "a named session ends after this long without a message, unless it says otherwise",
      Duration(&C::session_ttl, absl::Milliseconds(1), absl::Hours(24 * 365)));
  add("max-session-ttl", "DURATION", "24h", "the most that a session may ask for",
      Duration(&C::max_session_ttl, absl::Milliseconds(1), absl::Hours(24 * 365)));
  add("max-sessions-per-peer", "N", "0",
      "sessions of one client (its certificate, or else its address), of all models; 0: no limit",
      Integer(&C::max_sessions_per_peer, 0, int64_t{1} << 20));
  // gRPC counts in int.
  add("max-message-bytes", "BYTES", "64MiB", "largest request and largest response",
      Bytes(&C::max_message_bytes, 64 * 1024, INT32_MAX));
  add("max-response-bytes", "BYTES", "0",
      "largest output of one message, looked at before it is computed; 0: what the response may weigh",
      Bytes(&C::max_response_bytes, 0, INT32_MAX));
  add("max-generated-tokens", "N", "4096", "the most that one Generate may ask for",
      Integer(&C::max_generated_tokens, 1, int64_t{1} << 30));
  add("default-generated-tokens", "N", "256",
      "what a Generate gets that does not say how many; no more than --max-generated-tokens",
      Integer(&C::default_generated_tokens, 1, int64_t{1} << 30));
  add("max-concurrent-streams", "N", "1000", "calls at a time on one connection; more wait at the client",
      Integer(&C::max_concurrent_streams, 1, INT32_MAX));
  add("keepalive-time", "DURATION", "30s",
      "a connection that is silent for this long is asked whether it is there",
      Duration(&C::keepalive_time, absl::Seconds(1), absl::Hours(24)));
  add("keepalive-timeout", "DURATION", "10s",
      "and is cut, its sessions freed, if no answer comes for this long",
      Duration(&C::keepalive_timeout, absl::Milliseconds(100), absl::Hours(1)));
  add("max-connection-age", "DURATION", "0", "clients connect anew after this long; 0: never",
      Duration(&C::max_connection_age, absl::ZeroDuration(), absl::Hours(24 * 365)));
  add("max-connection-age-grace", "DURATION", "60s",
      "and calls that still run on the old connection are cut then",
      Duration(&C::max_connection_age_grace, absl::ZeroDuration(), absl::Hours(24)));
  add("drain-timeout", "DURATION", "30s", "after SIGTERM, running work has this long to finish",
      Duration(&C::drain_timeout, absl::ZeroDuration(), absl::Hours(24)));
  add("step-timeout", "DURATION", "60s", "a step that takes longer turns health to NOT_SERVING until it ends",
      Duration(&C::step_timeout, absl::Seconds(1), absl::Hours(24)));
  add("threads", "N", "0", "threads that compute on the CPU; 0: as many as affinity and cgroup allow",
      ParseThreads);
  add("help", "", "", "print this and exit", [](absl::string_view, ServerConfig* config) {
    config->help = true;
    return absl::OkStatus();
  });
  add("version", "", "", "print the version and exit", [](absl::string_view, ServerConfig* config) {
    config->version = true;
    return absl::OkStatus();
  });
  return flags;
}

const std::vector<Flag>& Flags() {
  static const std::vector<Flag>& flags = *new std::vector<Flag>(MakeFlags());
  return flags;
}

std::string VariableName(const Flag& flag) {
  return absl::StrCat("DELTANET_", absl::AsciiStrToUpper(absl::StrReplaceAll(flag.name, {{"-", "_"}})));
}

// Parses, and turns "what is wanted" into a whole sentence.
absl::Status Apply(const Flag& flag, absl::string_view source, absl::string_view value,
                   ServerConfig* config) {
  const absl::Status status = flag.parse(value, config);
  if (status.ok()) return status;
  return absl::InvalidArgumentError(absl::StrCat(source, " is \"", value, "\", want ", status.message()));
}

}  // namespace

absl::StatusOr<ServerConfig> ParseServerConfig(absl::Span<const std::string> arguments,
                                               const std::function<const char*(const char*)>& getenv) {
  ServerConfig config;
  std::set<std::string> given;
  for (size_t i = 0; i < arguments.size(); ++i) {
    absl::string_view name = arguments[i];
    if (!absl::ConsumePrefix(&name, "--")) {
      return absl::InvalidArgumentError(
          absl::StrCat("argument \"", arguments[i], "\" is no flag, want --NAME; see --help"));
    }
    const size_t equals = name.find('=');
    const bool has_value = equals != absl::string_view::npos;
    absl::string_view value = has_value ? name.substr(equals + 1) : "";
    name = name.substr(0, equals);
    const Flag* flag = nullptr;
    for (const Flag& candidate : Flags()) {
      if (name == candidate.name) flag = &candidate;
    }
    if (flag == nullptr)
      return absl::InvalidArgumentError(absl::StrCat("unknown flag --", name, "; see --help"));
    const bool is_switch = flag->value[0] == '\0';
    if (is_switch && has_value) {
      return absl::InvalidArgumentError(absl::StrCat("--", name, " is \"", value, "\", want no value"));
    }
    if (!has_value && flag->value == kOnOff) {
      value = "1";
    } else if (!is_switch && !has_value) {
      if (i + 1 == arguments.size()) {
        return absl::InvalidArgumentError(absl::StrCat("--", name, " has no value, want ", flag->value));
      }
      value = arguments[++i];
    }
    if (!given.insert(flag->name).second && !flag->repeatable) {
      return absl::InvalidArgumentError(absl::StrCat("--", name, " is given twice, want it once"));
    }
    RETURN_IF_ERROR(Apply(*flag, absl::StrCat("--", name), value, &config));
  }
  if (config.help || config.version) return config;
  for (const Flag& flag : Flags()) {
    if (flag.value[0] == '\0' || given.count(flag.name) > 0) continue;
    const std::string variable = VariableName(flag);
    const char* value = getenv(variable.c_str());
    if (value != nullptr) RETURN_IF_ERROR(Apply(flag, variable, value, &config));
  }
  if (config.models.empty()) {
    return absl::InvalidArgumentError("--model is not given, want NAME=DIR at least once");
  }
  if (config.tls.certificate.empty() != config.tls.key.empty() ||
      (config.tls.certificate.empty() && !config.tls.client_ca.empty())) {
    const auto given = [](const std::string& path) { return path.empty() ? "not given" : path; };
    return absl::InvalidArgumentError(absl::StrCat("--tls-cert is ", given(config.tls.certificate),
                                                   " and --tls-key is ", given(config.tls.key), ", want both",
                                                   config.tls.client_ca.empty() ? " or neither" : ""));
  }
  if (config.session_ttl > config.max_session_ttl) {
    return absl::InvalidArgumentError(
        absl::StrCat("--session-ttl is ", absl::FormatDuration(config.session_ttl),
                     ", want at most --max-session-ttl, ", absl::FormatDuration(config.max_session_ttl)));
  }
  return config;
}

std::string ServerHelp() {
  std::string help =
      "Serves DeltaNet models over gRPC.\n\n"
      "usage: deltanet-server --model NAME=DIR [--model NAME=DIR ...] [flags]\n\n";
  for (const Flag& flag : Flags()) {
    const std::string value = flag.value == kOnOff ? absl::StrCat("[=", kOnOff, "]")
                                                   : absl::StrCat(*flag.value ? " " : "", flag.value);
    absl::StrAppend(&help, "  --", flag.name, value, "\n      ",
                    absl::StrReplaceAll(flag.help, {{"\n", "\n      "}}),
                    *flag.fallback ? absl::StrCat(" (default ", flag.fallback, ")") : "", "\n");
  }
  absl::StrAppend(
      &help,
      "\nEach flag with a value can be given by the environment instead: DELTANET_MAX_SESSIONS for\n"
      "--max-sessions, DELTANET_MODEL=NAME=DIR,NAME=DIR for several models. The command line wins.\n"
      "\nExit status: 0 after SIGTERM or SIGINT and a drain (a second signal ends the process at once, by "
      "that\n"
      "signal); 1 if it cannot start; 2 for a wrong flag; 3 if the device is lost; 4 if a step still runs 10 "
      "s\n"
      "after the drain timeout.\n");
  return help;
}

}  // namespace deltanet
