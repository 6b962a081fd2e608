#include "server/load_log.h"

#include <utility>

namespace deltanet {

LoadLog::LoadLog(Clock* clock, Report report) : clock_(clock), report_(std::move(report)) {}

void LoadLog::OnProgress(const ModelLoadProgress& progress) {
  const absl::Time now = clock_->Now();
  // One directory may be served under two names.
  const bool next = progress.directory != directory_ || progress.bytes <= bytes_;
  bytes_ = progress.bytes;
  if (next) {
    directory_ = std::string(progress.directory);
    begin_ = reported_ = now;
  }
  if (progress.bytes < progress.total_bytes && now - reported_ < kInterval) return;
  reported_ = now;
  report_(progress, now - begin_);
}

}  // namespace deltanet
