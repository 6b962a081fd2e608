// A server of the protocol in a few lines, for the client's tests: one model "sum", whose output at position
// t is the sum of the inputs at 0 to t + kLookahead. Its sessions really continue and its streams really lag,
// so that a client that mixes up chunks, sessions or positions shows.
#ifndef DELTANET_TESTS_CLIENT_FAKE_SERVICE_H_
#define DELTANET_TESTS_CLIENT_FAKE_SERVICE_H_

#include <grpcpp/grpcpp.h>

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "deltanet/v1/deltanet.grpc.pb.h"
#include "model/base/mutex.h"

namespace deltanet {

class FakeService final : public v1::DeltaNetService::Service {
 public:
  static constexpr int64_t kWidth = 2;
  static constexpr int64_t kLookahead = 1;
  // Inputs whose first value is this are refused; the session stays where it is and is out of step.
  static constexpr float kBadValue = 666;

  // Listens on a free port of the loopback.
  FakeService();
  ~FakeService() override;

  const std::string& address() const { return address_; }
  grpc::HealthCheckServiceInterface* health() { return server_->GetHealthCheckService(); }

  // What a request with this id does instead of being answered: waits for Release or the end of the call.
  static constexpr char kHold[] = "hold";
  // What a stream does with this id: it ends at once with UNAVAILABLE (DRAINING).
  static constexpr char kBreak[] = "break";
  void Release();
  // Blocks until so many held requests have arrived.
  void AwaitHeld(int count);

  // The user agent of the last Forward.
  std::string user_agent();
  // Whether a held stream has been cancelled; blocks until one was.
  void AwaitCancelled();

 private:
  struct FakeSession {
    std::vector<float> inputs;  // [T, kWidth]
    int64_t given = 0;          // Outputs.
    bool out_of_step = false;
  };

  grpc::Status Forward(grpc::ServerContext* context, const v1::ForwardRequest* request,
                       v1::ForwardResponse* response) override;
  grpc::Status StreamForward(
      grpc::ServerContext* context,
      grpc::ServerReaderWriter<v1::StreamForwardResponse, v1::StreamForwardRequest>* stream) override;
  grpc::Status GetModel(grpc::ServerContext* context, const v1::GetModelRequest* request,
                        v1::GetModelResponse* response) override;
  grpc::Status ListModels(grpc::ServerContext* context, const v1::ListModelsRequest* request,
                          v1::ListModelsResponse* response) override;
  grpc::Status EndSession(grpc::ServerContext* context, const v1::EndSessionRequest* request,
                          v1::EndSessionResponse* response) override;
  grpc::Status ListSessions(grpc::ServerContext* context, const v1::ListSessionsRequest* request,
                            v1::ListSessionsResponse* response) override;

  // Applies a chunk to a session and makes its output.
  absl::Status Advance(const v1::Tensor& input, bool end_of_sequence, const int64_t* expected_position,
                       FakeSession* session, v1::Tensor* output, int64_t* output_position);
  absl::StatusOr<FakeSession*> FindLocked(const v1::SessionRef& ref, std::string* id)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Hold();

  std::string address_;
  std::unique_ptr<grpc::Server> server_;

  Mutex mu_;
  CondVar changed_;
  std::map<std::string, FakeSession> sessions_ ABSL_GUARDED_BY(mu_);
  int next_id_ ABSL_GUARDED_BY(mu_) = 1;
  int held_ ABSL_GUARDED_BY(mu_) = 0;
  bool released_ ABSL_GUARDED_BY(mu_) = false;
  bool cancelled_ ABSL_GUARDED_BY(mu_) = false;
  std::string user_agent_ ABSL_GUARDED_BY(mu_);
};

}  // namespace deltanet

#endif  // DELTANET_TESTS_CLIENT_FAKE_SERVICE_H_
