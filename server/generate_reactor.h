// One Generate call.
#ifndef DELTANET_SERVER_GENERATE_REACTOR_H_
#define DELTANET_SERVER_GENERATE_REACTOR_H_

#include <grpcpp/server_context.h>
#include <grpcpp/support/server_callback.h>

#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "deltanet/v1/deltanet.pb.h"
#include "model/base/mutex.h"
#include "server/service_context.h"
#include "server/stop_matcher.h"
#include "server/tokenizer.h"

namespace deltanet {

// One work of a session's lane, or of one of its own, with a Generation. A token's way: OnToken on the batch
// thread, which decodes it, decides whether it is the last, and puts it into `unsent_`; Advance on the
// executor, which serializes and writes what is there: all tokens that came while the write before was under
// way. The last response goes out when the work is done and everything is sent, and with it the call ends.
//
// Whatever the reader does, the work is done as soon as its tokens are made: `unsent_` holds at most
// max_tokens of them.
//
// Thread-safe, as a reactor must be. Held by itself until OnDone, by its unanswered work and by what it gave
// the executor, of which any can be last.
class GenerateReactor : public grpc::ServerWriteReactor<v1::GenerateResponse>,
                        public std::enable_shared_from_this<GenerateReactor> {
 public:
  // `context` outlives all calls.
  static grpc::ServerWriteReactor<v1::GenerateResponse>* Start(const ServiceContext* context,
                                                               grpc::CallbackServerContext* call,
                                                               const v1::GenerateRequest* request);

  void OnWriteDone(bool ok) override;
  void OnCancel() override;
  void OnDone() override;

 private:
  struct Token {
    int64_t id = 0;
    float log_prob = 0;
    std::vector<int64_t> top_ids;
    std::vector<float> top_log_probs;
    std::string text;  // What can be sent since it is there.
  };
  // How the call ends.
  struct Outcome {
    grpc::Status status;
    v1::GenerateResponse last;  // OK: what the last response has beside the rest of the tokens.
  };

  GenerateReactor(const ServiceContext* context, grpc::CallbackServerContext* call,
                  const v1::GenerateRequest* request);

  // Checks the request, finds or makes its session and submits its work. On an error no work was submitted.
  absl::Status Submit();
  // Checks what the model has a say in, and makes ready what generates. On an error nothing has to be undone.
  absl::Status Prepare();
  // Reads the prompt into ids_.
  absl::Status ReadPrompt();
  // There is nothing before the prompt.
  bool IsFresh() const;
  std::unique_ptr<Work> MakeWork(const absl::Status& precondition);

  // Of the work, on the batch thread. False: this was the last.
  bool OnToken(const GeneratedToken& token);
  void OnWorkDone(const WorkResult& result);
  // Appends to `text` what the stop strings let through of `decoded`. True if it now has one.
  bool PassStops(const std::string& decoded, std::string* text);

  // All work is done, or none was submitted.
  void EndCall(absl::Status status, const WorkResult& result);
  // Lets the executor call Advance, unless it is about to.
  void Schedule();
  // Begins to write what is there, or ends the call, if that can be done now.
  void Advance();
  // Moves tokens, as many as a response holds, from unsent_ into response_.
  void FillResponseLocked() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  // Constant after construction.
  const ServiceContext* const context_;
  grpc::CallbackServerContext* const call_;
  const v1::GenerateRequest* const request_;  // gRPC's, until OnDone.
  const absl::Time arrival_;
  const std::shared_ptr<Cancellation> cancellation_;  // Shared with the work, which may outlive this.
  uint64_t active_call_ = 0;

  // Written before the work is submitted.
  int model_ = -1;
  std::shared_ptr<const Session> session_;  // Null: a sequence of its own. Shared with the store.
  bool created_ = false;                    // The session is this call's.
  CheckedGeneration generation_;
  std::vector<int64_t> ids_;       // The prompt: the work's input.
  std::vector<int64_t> stop_ids_;  // In order.

  // Of the batch thread, once the work is submitted.
  std::optional<TextDecoder> decoder_;  // None: the model has no tokenizer.
  std::optional<StopMatcher> matcher_;  // None: there are no stop strings.
  v1::FinishReason finish_reason_ = v1::FINISH_REASON_LENGTH;
  std::string matched_stop_;
  std::string last_text_;                      // What was held back, at the end.
  std::optional<absl::Duration> first_token_;  // From arrival_.

  Mutex mu_;
  std::shared_ptr<GenerateReactor> self_ ABSL_GUARDED_BY(mu_);  // Until OnDone.
  std::deque<Token> unsent_ ABSL_GUARDED_BY(mu_);
  std::optional<Outcome> outcome_ ABSL_GUARDED_BY(mu_);  // Once all tokens are there.
  bool scheduled_ ABSL_GUARDED_BY(mu_) = false;
  bool wrote_ ABSL_GUARDED_BY(mu_) = false;    // A first response is under way, or gone.
  bool writing_ ABSL_GUARDED_BY(mu_) = false;  // response_ is gRPC's.
  bool finished_ ABSL_GUARDED_BY(mu_) = false;
  v1::GenerateResponse response_;  // Filled under mu_.
};

}  // namespace deltanet

#endif  // DELTANET_SERVER_GENERATE_REACTOR_H_
