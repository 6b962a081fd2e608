// The server's log: one event a line on stderr, "2026-01-31T12:00:00.000Z INFO event key=value ...". Never
// prompts, tokens or session contents.
#ifndef DELTANET_SERVER_LOG_H_
#define DELTANET_SERVER_LOG_H_

#include <initializer_list>
#include <string>
#include <utility>

#include "absl/strings/string_view.h"
#include "absl/time/time.h"

namespace deltanet {

enum class LogLevel { kInfo, kWarning, kError };

using LogFields = std::initializer_list<std::pair<absl::string_view, absl::string_view>>;

// The line without its newline. A value with spaces, quotes, '=' or control characters is quoted and escaped,
// so that an event stays one line whatever a client sends.
std::string FormatLogLine(absl::Time time, LogLevel level, absl::string_view event, LogFields fields);

// Writes one line with a single write. Thread-safe.
void Log(LogLevel level, absl::string_view event, LogFields fields = {});

}  // namespace deltanet

#endif  // DELTANET_SERVER_LOG_H_
