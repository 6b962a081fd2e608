// One StreamForward call.
#ifndef DELTANET_SERVER_STREAM_FORWARD_REACTOR_H_
#define DELTANET_SERVER_STREAM_FORWARD_REACTOR_H_

#include <grpcpp/server_context.h>
#include <grpcpp/support/server_callback.h>

#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "deltanet/v1/deltanet.pb.h"
#include "model/base/mutex.h"
#include "server/service_context.h"

namespace deltanet {

// A message's way: OnReadDone, Accept (which session? is the one before it ending?), Route (the session is
// found or made, the message checked and submitted), OnWorkDone on the batch thread, Answer, and out through
// the write queue. Advance does whatever of reading, writing and finishing can be done now. One read and one
// write are under way at a time; nothing is read while the window is full of messages that are not written
// yet.
//
// The messages of one session are routed in the order of their arrival. After one with end_of_sequence the
// next can be routed only when its outcome is known (if it failed, the session goes on; if not, a new one
// begins): until then they are deferred.
//
// Thread-safe, as a reactor must be. Held by itself until OnDone, by its unanswered work, and by who is in
// Advance, of which any can be last.
class StreamForwardReactor
    : public grpc::ServerBidiReactor<v1::StreamForwardRequest, v1::StreamForwardResponse>,
      public Drainable,
      public std::enable_shared_from_this<StreamForwardReactor> {
 public:
  // `context` outlives all calls.
  static grpc::ServerBidiReactor<v1::StreamForwardRequest, v1::StreamForwardResponse>* Start(
      const ServiceContext* context, grpc::CallbackServerContext* call);

  void OnReadDone(bool ok) override;
  void OnWriteDone(bool ok) override;
  void OnCancel() override;
  void OnDone() override;
  void Drain() override;

 private:
  struct Message {
    v1::StreamForwardRequest request;
    v1::StreamForwardResponse response;
    absl::Time arrival;
    CheckedInput input;        // Once it is submitted.
    std::string model;         // The request's, or that of the stream's first message.
    int64_t window_bytes = 0;  // What it weighs in the window.
  };

  // The name of a session, or empty and the number of one of the stream's own.
  using SessionKey = std::pair<std::string, uint32_t>;

  struct StreamSession {
    // Whoever routes a message of this session uses these: the reading thread, or, while it is ending, the
    // batch thread.
    std::shared_ptr<const Session>
        session;        // Shared with the store. Null before it is there and where it is lost.
    absl::Status lost;  // Why: later messages may not step in for the one that failed.

    // Guarded by mu_.
    bool ending = false;
    std::deque<std::unique_ptr<Message>> deferred;
  };

  StreamForwardReactor(const ServiceContext* context, grpc::CallbackServerContext* call);

  void Accept(std::unique_ptr<Message> message);
  // True if OnWorkDone takes care of what is deferred: the message has end_of_sequence and is submitted.
  bool Route(const SessionKey& key, StreamSession* entry, std::unique_ptr<Message> message);
  // Makes or finds the session that the message names.
  absl::StatusOr<std::shared_ptr<const Session>> ResolveSession(const Message& message) const;
  // Submits the message to `session`; `created` says that it is the first. On an error the message is still
  // the caller's.
  absl::Status Submit(const SessionKey& key, StreamSession* entry, bool created,
                      std::unique_ptr<Message>* message);
  // Checks the message against its session's model, makes room for the output, and fills the work.
  absl::Status FillWork(const Session& session, bool created, Message* message, Work* work) const;
  // `entry` is the session's if the message has end_of_sequence, else null: it may be gone.
  void OnWorkDone(const SessionKey& key, StreamSession* entry, const Session& session,
                  std::unique_ptr<Message> message, const WorkResult& result);
  // Routes what was deferred behind an end_of_sequence that is answered now.
  void RouteDeferred(const SessionKey& key, StreamSession* entry);
  // Queues the message's response: what it holds, or the error. `elsewhere`: it is written on the executor.
  void Answer(std::unique_ptr<Message> message, const absl::Status& status, bool elsewhere = false);
  // Notes when the stream gave output.
  void ObserveOutput();
  void Advance();
  // Lets the executor call Advance, unless it is about to.
  void ScheduleAdvance();

  bool MayReadLocked() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  bool MayFinishLocked() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void LeaveWindowLocked(const Message& message) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // What the stream ends with, as far as is known.
  absl::Status EndLocked() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  // Constant after construction.
  const ServiceContext* const context_;
  grpc::CallbackServerContext* const call_;
  const AttachmentId attachment_;
  const absl::Time deadline_;
  const std::shared_ptr<Cancellation> cancellation_;  // Shared with the work, which may outlive this.
  uint64_t active_call_ = 0;

  // Used by the reading side alone: a read is begun only after the one before it has been dealt with.
  std::string first_model_;
  bool first_message_ = true;

  Mutex mu_;
  std::shared_ptr<StreamForwardReactor> self_ ABSL_GUARDED_BY(mu_);  // Until OnDone.
  std::map<SessionKey, StreamSession> sessions_ ABSL_GUARDED_BY(mu_);
  bool scheduled_ ABSL_GUARDED_BY(mu_) = false;
  bool reading_ ABSL_GUARDED_BY(mu_) = false;
  std::unique_ptr<Message> incoming_ ABSL_GUARDED_BY(mu_);  // Being read.
  bool starting_read_ ABSL_GUARDED_BY(mu_) =
      false;  // A thread is about to call StartRead: not yet time to finish.
  bool read_closed_ ABSL_GUARDED_BY(mu_) = false;  // The client has closed its side, or the call is dead.
  bool finished_ ABSL_GUARDED_BY(mu_) = false;
  absl::Status closing_ ABSL_GUARDED_BY(mu_);  // Not OK: nothing more is read, and the stream ends with this.
  std::optional<absl::Time> first_arrival_ ABSL_GUARDED_BY(mu_);  // Of a message.
  std::optional<absl::Time> last_output_ ABSL_GUARDED_BY(mu_);
  std::unique_ptr<Message> writing_ ABSL_GUARDED_BY(mu_);
  std::deque<std::unique_ptr<Message>> unwritten_ ABSL_GUARDED_BY(mu_);  // Answered, in order.
  int64_t window_messages_ ABSL_GUARDED_BY(mu_) = 0;                     // Read and not yet written.
  int64_t window_bytes_ ABSL_GUARDED_BY(mu_) = 0;
};

}  // namespace deltanet

#endif  // DELTANET_SERVER_STREAM_FORWARD_REACTOR_H_
