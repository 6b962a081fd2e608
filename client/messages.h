// Between the client's types and the protocol's messages.
#ifndef DELTANET_CLIENT_MESSAGES_H_
#define DELTANET_CLIENT_MESSAGES_H_

#include "absl/status/statusor.h"
#include "client/client.h"
#include "deltanet/v1/deltanet.pb.h"

namespace deltanet {

v1::Tensor ToProtoTensor(const TensorView& tensor);
// Takes the bytes of `proto`. DATA_LOSS if dtype, shape and number of bytes do not fit together.
absl::StatusOr<Tensor> FromProtoTensor(v1::Tensor* proto);

v1::ForwardRequest ToProtoRequest(const TensorView& input, const ForwardOptions& options);
v1::StreamForwardRequest ToProtoRequest(const StreamRequest& request);
v1::GenerateRequest ToProtoRequest(const GenerateOptions& options);
// These take the bytes of the output; errors as FromProtoTensor, for a stream in the response's status.
absl::StatusOr<ForwardResult> FromProtoResponse(v1::ForwardResponse* proto);
StreamResponse FromProtoResponse(v1::StreamForwardResponse* proto);
// Takes the text. DATA_LOSS for a duration that is none, or log-probabilities that are not as many as ids.
absl::StatusOr<Generated> FromProtoResponse(v1::GenerateResponse* proto);

// DATA_LOSS for a dtype or duration that is none.
absl::StatusOr<ModelInfo> FromProtoModelInfo(const v1::ModelInfo& proto);
absl::StatusOr<SessionInfo> FromProtoSessionInfo(const v1::SessionInfo& proto);

}  // namespace deltanet

#endif  // DELTANET_CLIENT_MESSAGES_H_
