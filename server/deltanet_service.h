// deltanet.v1.DeltaNetService: answers the small calls itself and starts a reactor for the three that
// compute.
#ifndef DELTANET_SERVER_DELTANET_SERVICE_H_
#define DELTANET_SERVER_DELTANET_SERVICE_H_

#include <grpcpp/server_context.h>
#include <grpcpp/support/server_callback.h>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "deltanet/v1/deltanet.grpc.pb.h"
#include "server/service_context.h"

namespace deltanet {

// Thread-safe. `context` outlives it and all of its calls. Every response's initial metadata has the server's
// version as kVersionMetadata.
class DeltaNetService : public v1::DeltaNetService::CallbackService {
 public:
  static constexpr char kVersionMetadata[] = "deltanet-server-version";

  explicit DeltaNetService(const ServiceContext* context) : context_(context) {}

  grpc::ServerUnaryReactor* Forward(grpc::CallbackServerContext* call, const v1::ForwardRequest* request,
                                    v1::ForwardResponse* response) override;
  grpc::ServerBidiReactor<v1::StreamForwardRequest, v1::StreamForwardResponse>* StreamForward(
      grpc::CallbackServerContext* call) override;
  grpc::ServerWriteReactor<v1::GenerateResponse>* Generate(grpc::CallbackServerContext* call,
                                                           const v1::GenerateRequest* request) override;
  grpc::ServerUnaryReactor* Tokenize(grpc::CallbackServerContext* call, const v1::TokenizeRequest* request,
                                     v1::TokenizeResponse* response) override;
  grpc::ServerUnaryReactor* Detokenize(grpc::CallbackServerContext* call,
                                       const v1::DetokenizeRequest* request,
                                       v1::DetokenizeResponse* response) override;
  grpc::ServerUnaryReactor* GetModel(grpc::CallbackServerContext* call, const v1::GetModelRequest* request,
                                     v1::GetModelResponse* response) override;
  grpc::ServerUnaryReactor* ListModels(grpc::CallbackServerContext* call,
                                       const v1::ListModelsRequest* request,
                                       v1::ListModelsResponse* response) override;
  grpc::ServerUnaryReactor* EndSession(grpc::CallbackServerContext* call,
                                       const v1::EndSessionRequest* request,
                                       v1::EndSessionResponse* response) override;
  grpc::ServerUnaryReactor* ListSessions(grpc::CallbackServerContext* call,
                                         const v1::ListSessionsRequest* request,
                                         v1::ListSessionsResponse* response) override;

 private:
  grpc::ServerUnaryReactor* Answer(grpc::CallbackServerContext* call, Method method, absl::Time arrival,
                                   const absl::Status& status) const;
  absl::Status FillIds(const v1::TokenizeRequest& request, v1::TokenizeResponse* response) const;
  absl::Status FillText(const v1::DetokenizeRequest& request, v1::DetokenizeResponse* response) const;
  void DescribeModel(int model, v1::ModelInfo* info) const;
  absl::Status FillSessions(const v1::ListSessionsRequest& request, v1::ListSessionsResponse* response) const;

  const ServiceContext* const context_;
};

}  // namespace deltanet

#endif  // DELTANET_SERVER_DELTANET_SERVICE_H_
