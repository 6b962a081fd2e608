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

void SetOutputOptions(const OutputOptions& options, v1::OutputOptions* proto) {
  switch (options.kind) {
    case OutputKind::kValues:
      proto->set_kind(v1::OUTPUT_VALUES);
      break;
    case OutputKind::kTop:
      proto->set_kind(v1::OUTPUT_TOP);
      break;
    case OutputKind::kScores:
      proto->set_kind(v1::OUTPUT_SCORES);
      break;
  }
  proto->set_last_only(options.last_only);
  proto->set_top_tokens(options.top_tokens);
}

// Scores and the most likely ids come in the place of values: then the tensor is empty, or not there.
absl::StatusOr<Tensor> FromProtoOutput(v1::Tensor* proto) {
  if (proto->ByteSizeLong() == 0) return Tensor{DType::kFloat32, {0}, ""};
  return FromProtoTensor(proto);
}

absl::StatusOr<TopTokens> FromProtoTop(const v1::TopTokens& proto) {
  const int64_t k = proto.k(), ids = proto.ids_size();
  if (proto.log_probs_size() != ids || (k > 0 ? ids % k != 0 : ids != 0)) {
    return Malformed(absl::DataLossError(absl::StrCat(ids, " top ids, ", k, " a position, came with ",
                                                      proto.log_probs_size(), " log-probabilities")));
  }
  return TopTokens{proto.k(),
                   {proto.ids().begin(), proto.ids().end()},
                   {proto.log_probs().begin(), proto.log_probs().end()}};
}

absl::StatusOr<FinishReason> FromProtoFinishReason(v1::FinishReason reason) {
  switch (reason) {
    case v1::FINISH_REASON_UNSPECIFIED:
      return FinishReason::kNone;
    case v1::FINISH_REASON_LENGTH:
      return FinishReason::kLength;
    case v1::FINISH_REASON_STOP_ID:
      return FinishReason::kStopId;
    case v1::FINISH_REASON_STOP_TEXT:
      return FinishReason::kStopText;
    default:
      return Malformed(absl::DataLossError(absl::StrCat("finish_reason is ", static_cast<int>(reason))));
  }
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
  SetOutputOptions(options.output_options, proto.mutable_output_options());
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
  SetOutputOptions(request.output_options, proto.mutable_output_options());
  return proto;
}

v1::GenerateRequest ToProtoRequest(const GenerateOptions& options) {
  v1::GenerateRequest proto;
  proto.set_request_id(options.request_id);
  proto.set_model(options.model);
  if (options.session) SetSession(*options.session, proto.mutable_session());
  if (const auto* const ids = std::get_if<std::vector<int64_t>>(&options.prompt)) {
    proto.mutable_ids()->mutable_ids()->Add(ids->begin(), ids->end());
  } else {
    proto.set_text(std::get<std::string>(options.prompt));
  }
  v1::Sampling* const sampling = proto.mutable_sampling();
  sampling->set_temperature(options.sampling.temperature);
  sampling->set_top_k(options.sampling.top_k);
  sampling->set_top_p(options.sampling.top_p);
  if (options.sampling.seed) sampling->set_seed(*options.sampling.seed);
  proto.set_max_tokens(options.max_tokens);
  proto.mutable_stop_ids()->Add(options.stop_ids.begin(), options.stop_ids.end());
  proto.set_ignore_eos(options.ignore_eos);
  for (const std::string& stop : options.stop) proto.add_stop(stop);
  if (options.top_log_probs) proto.set_top_log_probs(*options.top_log_probs);
  if (options.expected_position) proto.set_expected_position(*options.expected_position);
  return proto;
}

absl::StatusOr<ForwardResult> FromProtoResponse(v1::ForwardResponse* proto) {
  ForwardResult result;
  result.request_id = proto->request_id();
  ASSIGN_OR_RETURN(result.output, FromProtoOutput(proto->mutable_output()));
  result.output_position = proto->output_position();
  result.committed_position = proto->committed_position();
  result.session_id = proto->session_id();
  ASSIGN_OR_RETURN(result.queued, Duration(proto->timing().queued()));
  ASSIGN_OR_RETURN(result.computing, Duration(proto->timing().computing()));
  ASSIGN_OR_RETURN(result.top, FromProtoTop(proto->top()));
  result.log_probs.assign(proto->log_probs().begin(), proto->log_probs().end());
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
        ASSIGN_OR_RETURN(response.output, FromProtoOutput(proto->mutable_output()));
        ASSIGN_OR_RETURN(response.top, FromProtoTop(proto->top()));
        response.log_probs.assign(proto->log_probs().begin(), proto->log_probs().end());
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

absl::StatusOr<Generated> FromProtoResponse(v1::GenerateResponse* proto) {
  Generated generated;
  generated.request_id = proto->request_id();
  generated.session_id = proto->session_id();
  generated.tokens.reserve(proto->tokens_size());
  for (const v1::GeneratedToken& token : proto->tokens()) {
    if (token.top_ids_size() != token.top_log_probs_size()) {
      return Malformed(
          absl::DataLossError(absl::StrCat(token.top_ids_size(), " top ids of a token came with ",
                                           token.top_log_probs_size(), " log-probabilities")));
    }
    generated.tokens.push_back({token.id(),
                                token.log_prob(),
                                {token.top_ids().begin(), token.top_ids().end()},
                                {token.top_log_probs().begin(), token.top_log_probs().end()}});
  }
  generated.text = std::move(*proto->mutable_text());
  generated.seed = proto->seed();
  ASSIGN_OR_RETURN(generated.finish_reason, FromProtoFinishReason(proto->finish_reason()));
  generated.matched_stop = proto->matched_stop();
  generated.prompt_tokens = proto->usage().prompt_tokens();
  generated.generated_tokens = proto->usage().generated_tokens();
  ASSIGN_OR_RETURN(generated.time_to_first_token, Duration(proto->usage().time_to_first_token()));
  generated.committed_position = proto->committed_position();
  ASSIGN_OR_RETURN(generated.queued, Duration(proto->timing().queued()));
  ASSIGN_OR_RETURN(generated.computing, Duration(proto->timing().computing()));
  return generated;
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
  info.deterministic = proto.deterministic();
  info.device = proto.device();
  info.lookahead = proto.lookahead();
  info.bytes_per_session = proto.bytes_per_session();
  info.sessions = proto.sessions();
  info.sessions_free = proto.sessions_free();
  info.max_response_bytes = proto.max_response_bytes();
  info.generates = proto.generates();
  info.has_tokenizer = proto.has_tokenizer();
  if (proto.has_bos_id()) info.bos_id = proto.bos_id();
  info.eos_ids.assign(proto.eos_ids().begin(), proto.eos_ids().end());
  info.max_generated_tokens = proto.max_generated_tokens();
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
