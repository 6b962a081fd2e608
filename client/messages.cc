#include "client/messages.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/types/span.h"
#include "google/protobuf/repeated_field.h"
#include "model/base/status_macros.h"
#include "proto/wire.h"

namespace deltanet {
namespace {

// What a server should never send: the reason for the refusal, as DATA_LOSS.
absl::Status Malformed(const absl::Status& why) {
  return absl::DataLossError(absl::StrCat("malformed response: ", why.message()));
}

void SetSession(const SessionChoice& session, v1::SessionRef* proto) {
  proto->set_id(session.id);
  proto->set_create(session.create);
  if (session.idle_ttl != absl::ZeroDuration()) ToProtoDuration(session.idle_ttl, proto->mutable_idle_ttl());
}

absl::StatusOr<absl::Duration> Duration(const google::protobuf::Duration& proto) {
  absl::StatusOr<absl::Duration> duration = FromProtoDuration(proto);
  if (!duration.ok()) return Malformed(duration.status());
  return duration;
}

absl::StatusOr<std::vector<DType>> DTypes(const google::protobuf::RepeatedField<int>& protos) {
  std::vector<DType> dtypes;
  for (const int proto : protos) {
    const absl::StatusOr<DType> dtype = FromProtoDType(static_cast<v1::DataType>(proto));
    if (!dtype.ok()) return Malformed(dtype.status());
    dtypes.push_back(*dtype);
  }
  return dtypes;
}

}  // namespace

v1::Tensor ToProtoTensor(const TensorView& tensor) {
  v1::Tensor proto;
  proto.set_dtype(ToProtoDType(tensor.dtype));
  proto.mutable_shape()->Add(tensor.shape.begin(), tensor.shape.end());
  if (tensor.bytes() > 0) proto.set_data(tensor.data, tensor.bytes());
  return proto;
}

absl::StatusOr<Tensor> FromProtoTensor(v1::Tensor* proto) {
  const absl::StatusOr<DType> dtype = FromProtoDType(proto->dtype());
  if (!dtype.ok()) return Malformed(dtype.status());
  Tensor tensor{*dtype, Shape(proto->shape().begin(), proto->shape().end()), ""};
  int64_t bytes = DTypeBytes(*dtype);
  bool fits = true;
  for (const int64_t size : tensor.shape)
    fits = fits && size >= 0 && !__builtin_mul_overflow(bytes, size, &bytes);
  if (!fits || bytes != static_cast<int64_t>(proto->data().size())) {
    return Malformed(
        absl::DataLossError(absl::StrCat("a tensor of ", DTypeName(*dtype), ShapeString(tensor.shape),
                                         " came with ", proto->data().size(), " bytes")));
  }
  tensor.data = std::move(*proto->mutable_data());
  return tensor;
}

v1::ForwardRequest ToProtoRequest(const TensorView& input, const ForwardOptions& options) {
  v1::ForwardRequest proto;
  proto.set_request_id(options.request_id);
  proto.set_model(options.model);
  if (options.session) SetSession(*options.session, proto.mutable_session());
  *proto.mutable_input() = ToProtoTensor(input);
  proto.set_output_dtype(ToProtoDType(options.output_dtype));
  proto.set_end_of_sequence(options.end_of_sequence);
  if (options.expected_position) proto.set_expected_position(*options.expected_position);
  return proto;
}

v1::StreamForwardRequest ToProtoRequest(const StreamRequest& request) {
  v1::StreamForwardRequest proto;
  proto.set_request_id(request.request_id);
  proto.set_model(request.model);
  if (request.session) {
    SetSession(*request.session, proto.mutable_session());
  } else {
    proto.set_stream_session(request.stream_session);
  }
  *proto.mutable_input() = ToProtoTensor(request.input);
  proto.set_output_dtype(ToProtoDType(request.output_dtype));
  proto.set_end_of_sequence(request.end_of_sequence);
  if (request.expected_position) proto.set_expected_position(*request.expected_position);
  if (request.timeout != absl::InfiniteDuration()) ToProtoDuration(request.timeout, proto.mutable_timeout());
  return proto;
}

absl::StatusOr<ForwardResult> FromProtoResponse(v1::ForwardResponse* proto) {
  ForwardResult result;
  result.request_id = proto->request_id();
  ASSIGN_OR_RETURN(result.output, FromProtoTensor(proto->mutable_output()));
  result.output_position = proto->output_position();
  result.committed_position = proto->committed_position();
  result.session_id = proto->session_id();
  ASSIGN_OR_RETURN(result.queued, Duration(proto->timing().queued()));
  ASSIGN_OR_RETURN(result.computing, Duration(proto->timing().computing()));
  return result;
}

StreamResponse FromProtoResponse(v1::StreamForwardResponse* proto) {
  StreamResponse response;
  response.request_id = proto->request_id();
  response.stream_session = proto->stream_session();
  response.session_id = proto->session_id();
  response.output_position = proto->output_position();
  response.committed_position = proto->committed_position();
  response.status = [&]() -> absl::Status {
    ASSIGN_OR_RETURN(response.queued, Duration(proto->timing().queued()));
    ASSIGN_OR_RETURN(response.computing, Duration(proto->timing().computing()));
    switch (proto->outcome_case()) {
      case v1::StreamForwardResponse::kOutput: {
        ASSIGN_OR_RETURN(response.output, FromProtoTensor(proto->mutable_output()));
        return absl::OkStatus();
      }
      case v1::StreamForwardResponse::kError:
        if (proto->error().code() != 0) return FromRpcStatus(proto->error());
        return Malformed(absl::DataLossError("the error of a message is OK"));
      case v1::StreamForwardResponse::OUTCOME_NOT_SET:
        break;
    }
    return Malformed(absl::DataLossError("neither output nor error"));
  }();
  return response;
}

absl::StatusOr<ModelInfo> FromProtoModelInfo(const v1::ModelInfo& proto) {
  ModelInfo info;
  info.name = proto.name();
  info.family = proto.family();
  ASSIGN_OR_RETURN(info.input_dtypes, DTypes(proto.input_dtypes()));
  info.input_width = proto.input_width();
  info.vocab_size = proto.vocab_size();
  info.output_width = proto.output_width();
  ASSIGN_OR_RETURN(info.output_dtypes, DTypes(proto.output_dtypes()));
  info.parameters = proto.parameters();
  const absl::StatusOr<DType> compute_dtype = FromProtoDType(proto.compute_dtype());
  if (!compute_dtype.ok()) return Malformed(compute_dtype.status());
  info.compute_dtype = *compute_dtype;
  info.device = proto.device();
  info.lookahead = proto.lookahead();
  info.bytes_per_session = proto.bytes_per_session();
  info.sessions = proto.sessions();
  info.sessions_free = proto.sessions_free();
  info.max_response_bytes = proto.max_response_bytes();
  return info;
}

absl::StatusOr<SessionInfo> FromProtoSessionInfo(const v1::SessionInfo& proto) {
  SessionInfo info;
  info.id = proto.id();
  info.model = proto.model();
  info.committed_position = proto.committed_position();
  info.attached = proto.attached();
  ASSIGN_OR_RETURN(info.idle, Duration(proto.idle()));
  ASSIGN_OR_RETURN(info.idle_ttl, Duration(proto.idle_ttl()));
  return info;
}

}  // namespace deltanet
