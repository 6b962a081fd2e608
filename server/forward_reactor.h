// One Forward call.
#ifndef DELTANET_SERVER_FORWARD_REACTOR_H_
#define DELTANET_SERVER_FORWARD_REACTOR_H_

#include <grpcpp/server_context.h>
#include <grpcpp/support/server_callback.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "deltanet/v1/deltanet.pb.h"
#include "model/base/mutex.h"
#include "server/service_context.h"

namespace deltanet {

// Stateless: a lane for each sequence of the batch, whose output is written into its part of the response;
// the first error wins and the rest is given up. With a session: one work of its lane. Owns itself: deleted
// in OnDone.
//
// Thread-safe, as a reactor must be. The messages are gRPC's and live until OnDone; Finish is called once,
// after all work is done, so that nothing writes into them afterwards.
class ForwardReactor : public grpc::ServerUnaryReactor {
 public:
  // `context` outlives all calls.
  static grpc::ServerUnaryReactor* Start(const ServiceContext* context, grpc::CallbackServerContext* call,
                                         const v1::ForwardRequest* request, v1::ForwardResponse* response);

  void OnCancel() override;
  void OnDone() override;

 private:
  ForwardReactor(const ServiceContext* context, grpc::CallbackServerContext* call,
                 const v1::ForwardRequest* request, v1::ForwardResponse* response);

  // Checks the request and submits its work. On an error no work was submitted.
  absl::Status Submit();
  absl::Status SubmitStateless();
  absl::Status SubmitToSession();
  // Makes room for the output and submits one work for each lane. On an error nothing was submitted.
  absl::Status SubmitWork(const std::vector<std::shared_ptr<Lane>>& lanes, const CheckedInput& input,
                          const absl::Status& precondition);
  absl::StatusOr<CheckedInput> CheckMessage(Sequence sequence) const;
  void OnWorkDone(const WorkResult& result);
  // Everything is done: ends the call.
  void FinishCall(absl::Status status);
  void FillResponseLocked(const WorkResult& result) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  // Constant after construction.
  const ServiceContext* const context_;
  grpc::CallbackServerContext* const call_;
  const v1::ForwardRequest* const request_;
  v1::ForwardResponse* const response_;
  const absl::Time arrival_;
  // Shared with the work, which reads it after this is gone.
  const std::shared_ptr<Cancellation> cancellation_;
  uint64_t active_call_ = 0;

  // Written before the work is submitted.
  std::shared_ptr<const Session> session_;  // Null if stateless. Shared with the store.
  bool created_ = false;                    // The session is this call's.
  int model_ = -1;
  CheckedInput input_;

  Mutex mu_;
  size_t unanswered_ ABSL_GUARDED_BY(mu_) = 0;
  absl::Status first_error_ ABSL_GUARDED_BY(mu_);
  WorkResult last_result_ ABSL_GUARDED_BY(mu_);
  absl::Duration queued_ ABSL_GUARDED_BY(mu_);     // The longest.
  absl::Duration computing_ ABSL_GUARDED_BY(mu_);  // The longest.
};

}  // namespace deltanet

#endif  // DELTANET_SERVER_FORWARD_REACTOR_H_
