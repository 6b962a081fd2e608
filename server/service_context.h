// What the service and its reactors share.
#ifndef DELTANET_SERVER_SERVICE_CONTEXT_H_
#define DELTANET_SERVER_SERVICE_CONTEXT_H_

#include <grpcpp/server_context.h>

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "model/base/mutex.h"
#include "server/batcher.h"
#include "server/clock.h"
#include "server/executor.h"
#include "server/metrics.h"
#include "server/request_validation.h"
#include "server/session_store.h"
#include "server/tokenizer.h"

namespace deltanet {

// A call that has no end of its own: told when the server drains.
class Drainable {
 public:
  virtual ~Drainable() = default;
  // Finish what you have taken, then end. Called at most once, under no lock. Must not block.
  virtual void Drain() = 0;
};

// The calls in progress, so that a drain can wait for them. Thread-safe; outlives the calls.
class ActiveCalls {
 public:
  // Counts a call until Remove. `drainable` (may be null) is drained when StartDraining is called; at once if
  // it has been.
  uint64_t Add(const std::shared_ptr<Drainable>& drainable);
  void Remove(uint64_t call);

  void StartDraining();
  // Blocks until there is no call, or until `deadline`: false then.
  bool WaitUntilNone(Clock* clock, absl::Time deadline);

 private:
  Mutex mu_;
  CondVar none_;
  uint64_t next_ ABSL_GUARDED_BY(mu_) = 1;
  bool draining_ ABSL_GUARDED_BY(mu_) = false;
  std::map<uint64_t, std::weak_ptr<Drainable>> calls_ ABSL_GUARDED_BY(mu_);
};

// A model's tokenizer, or why it has none.
struct ModelTokenizer {
  const Tokenizer* tokenizer = nullptr;
  std::string why_not;
};

// Whether the answer of a work is serialized and written on the executor and not on the batch thread: where
// so many are answered at once that the next step would wait for it. For few, the way to another thread is
// longer.
inline bool AnswersElsewhere(const WorkResult& result) { return result.together >= 32; }

// Constant while the service runs; everything pointed to is thread-safe, and owned by the server.
struct ServiceContext {
  std::vector<std::string> model_names;    // In the order of the batcher's numbers, and of the alphabet.
  std::vector<ModelTokenizer> tokenizers;  // In the same order.
  std::string version;
  RequestLimits request_limits;
  // How much unanswered or unwritten work a stream may have before it is not read any more.
  int64_t stream_window_messages = 64;
  int64_t stream_window_bytes = int64_t{16} << 20;

  Batcher* batcher = nullptr;
  SessionStore* sessions = nullptr;
  Metrics* metrics = nullptr;
  Clock* clock = nullptr;
  ActiveCalls* calls = nullptr;
  Executor* executor = nullptr;  // For what is not to keep the batch thread: serializing and writing answers.

  // The number of the model of that name; of the only one if `name` is empty. NOT_FOUND (MODEL_NOT_FOUND), or
  // INVALID_ARGUMENT if it is empty and there are several.
  absl::StatusOr<int> FindModel(const std::string& name) const;
  // FAILED_PRECONDITION (NO_TOKENIZER) if it has none.
  absl::StatusOr<const Tokenizer*> FindTokenizer(int model) const;
  // The ids of `text`, all of which the model knows. INVALID_ARGUMENT, FAILED_PRECONDITION (NO_TOKENIZER).
  absl::StatusOr<std::vector<int64_t>> Tokenize(int model, const std::string& text, TextPlace place) const;
};

// Who calls, as a limit for each client sees it: the identity of its certificate, or else its address without
// the port.
std::string PeerOf(const grpc::CallbackServerContext& call);

// When the call is to be given up; infinite if the client set no deadline.
absl::Time CallDeadline(const grpc::CallbackServerContext& call);

// Errors that are our fault are logged in full here, once an answer; nothing else is.
void LogIfInternal(absl::string_view method, const std::string& request_id, const absl::Status& status);

}  // namespace deltanet

#endif  // DELTANET_SERVER_SERVICE_CONTEXT_H_
