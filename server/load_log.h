// What the log says while models load, which takes long from a slow disk.
#ifndef DELTANET_SERVER_LOAD_LOG_H_
#define DELTANET_SERVER_LOAD_LOG_H_

#include <cstdint>
#include <functional>
#include <string>

#include "absl/time/time.h"
#include "model/model.h"
#include "server/clock.h"

namespace deltanet {

// Takes every piece of progress and passes on, of each model, at most one a second and the last. Confined to
// the thread that loads.
class LoadLog {
 public:
  // `report`: the progress, and the time since that model's first piece.
  using Report = std::function<void(const ModelLoadProgress& progress, absl::Duration elapsed)>;
  LoadLog(Clock* clock, Report report);

  void OnProgress(const ModelLoadProgress& progress);

 private:
  static constexpr absl::Duration kInterval = absl::Seconds(1);

  Clock* const clock_;  // Not owned; outlives this.
  const Report report_;
  std::string directory_;  // Of the model that loads.
  int64_t bytes_ = 0;      // Of it, so far.
  absl::Time begin_;
  absl::Time reported_;
};

}  // namespace deltanet

#endif  // DELTANET_SERVER_LOAD_LOG_H_
