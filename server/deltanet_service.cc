#include "server/deltanet_service.h"

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "model/base/status_macros.h"
#include "proto/wire.h"
#include "server/forward_reactor.h"
#include "server/generate_reactor.h"
#include "server/stream_forward_reactor.h"

namespace deltanet {
namespace {

constexpr int kMaxPageSize = 1000;

}  // namespace

grpc::ServerUnaryReactor* DeltaNetService::Forward(grpc::CallbackServerContext* call,
                                                   const v1::ForwardRequest* request,
                                                   v1::ForwardResponse* response) {
  call->AddInitialMetadata(kVersionMetadata, context_->version);
  return ForwardReactor::Start(context_, call, request, response);
}

grpc::ServerBidiReactor<v1::StreamForwardRequest, v1::StreamForwardResponse>* DeltaNetService::StreamForward(
    grpc::CallbackServerContext* call) {
  call->AddInitialMetadata(kVersionMetadata, context_->version);
  return StreamForwardReactor::Start(context_, call);
}

grpc::ServerWriteReactor<v1::GenerateResponse>* DeltaNetService::Generate(
    grpc::CallbackServerContext* call, const v1::GenerateRequest* request) {
  call->AddInitialMetadata(kVersionMetadata, context_->version);
  return GenerateReactor::Start(context_, call, request);
}

grpc::ServerUnaryReactor* DeltaNetService::Tokenize(grpc::CallbackServerContext* call,
                                                    const v1::TokenizeRequest* request,
                                                    v1::TokenizeResponse* response) {
  const absl::Time arrival = context_->clock->Now();
  return Answer(call, Method::kTokenize, arrival, FillIds(*request, response));
}

grpc::ServerUnaryReactor* DeltaNetService::Detokenize(grpc::CallbackServerContext* call,
                                                      const v1::DetokenizeRequest* request,
                                                      v1::DetokenizeResponse* response) {
  const absl::Time arrival = context_->clock->Now();
  return Answer(call, Method::kDetokenize, arrival, FillText(*request, response));
}

grpc::ServerUnaryReactor* DeltaNetService::GetModel(grpc::CallbackServerContext* call,
                                                    const v1::GetModelRequest* request,
                                                    v1::GetModelResponse* response) {
  const absl::Time arrival = context_->clock->Now();
  const absl::StatusOr<int> model = context_->FindModel(request->model());
  if (model.ok()) DescribeModel(*model, response->mutable_model());
  return Answer(call, Method::kGetModel, arrival, model.status());
}

grpc::ServerUnaryReactor* DeltaNetService::ListModels(grpc::CallbackServerContext* call,
                                                      const v1::ListModelsRequest*,
                                                      v1::ListModelsResponse* response) {
  const absl::Time arrival = context_->clock->Now();
  for (size_t m = 0; m < context_->model_names.size(); ++m) {
    DescribeModel(static_cast<int>(m), response->add_models());
  }
  response->set_server_version(context_->version);
  return Answer(call, Method::kListModels, arrival, absl::OkStatus());
}

grpc::ServerUnaryReactor* DeltaNetService::EndSession(grpc::CallbackServerContext* call,
                                                      const v1::EndSessionRequest* request,
                                                      v1::EndSessionResponse* response) {
  const absl::Time arrival = context_->clock->Now();
  const absl::StatusOr<int64_t> position = context_->sessions->EndByName(request->session_id());
  if (position.ok()) response->set_committed_position(*position);
  return Answer(call, Method::kEndSession, arrival, position.status());
}

grpc::ServerUnaryReactor* DeltaNetService::ListSessions(grpc::CallbackServerContext* call,
                                                        const v1::ListSessionsRequest* request,
                                                        v1::ListSessionsResponse* response) {
  const absl::Time arrival = context_->clock->Now();
  return Answer(call, Method::kListSessions, arrival, FillSessions(*request, response));
}

grpc::ServerUnaryReactor* DeltaNetService::Answer(grpc::CallbackServerContext* call, Method method,
                                                  absl::Time arrival, const absl::Status& status) const {
  call->AddInitialMetadata(kVersionMetadata, context_->version);
  context_->metrics->OnRequestDone(method, status);
  context_->metrics->OnLatency(method, context_->clock->Now() - arrival);
  grpc::ServerUnaryReactor* reactor = call->DefaultReactor();
  reactor->Finish(ToGrpcStatus(status));
  return reactor;
}

absl::Status DeltaNetService::FillIds(const v1::TokenizeRequest& request,
                                      v1::TokenizeResponse* response) const {
  ASSIGN_OR_RETURN(const int model, context_->FindModel(request.model()));
  ASSIGN_OR_RETURN(const std::vector<int64_t> ids,
                   context_->Tokenize(model, request.text(), TextPlace::kBegins));
  const std::optional<int64_t> bos_id = context_->batcher->description(model).bos_id;
  if (request.add_bos() && bos_id.has_value()) response->add_ids(*bos_id);
  response->mutable_ids()->Add(ids.begin(), ids.end());
  return absl::OkStatus();
}

absl::Status DeltaNetService::FillText(const v1::DetokenizeRequest& request,
                                       v1::DetokenizeResponse* response) const {
  ASSIGN_OR_RETURN(const int model, context_->FindModel(request.model()));
  ASSIGN_OR_RETURN(const Tokenizer* tokenizer, context_->FindTokenizer(model));
  const absl::StatusOr<std::string> text = tokenizer->Decode(request.ids());
  if (!text.ok()) return InvalidRequest(text.status().message());
  if (static_cast<int64_t>(text->size()) > context_->request_limits.max_response_bytes) {
    return MakeError(absl::StatusCode::kResourceExhausted, reason::kResponseTooLarge,
                     absl::StrCat("the text would be ", text->size(), " bytes, want at most ",
                                  context_->request_limits.max_response_bytes, ": send fewer ids at a time"));
  }
  response->set_text(*text);
  return absl::OkStatus();
}

void DeltaNetService::DescribeModel(int model, v1::ModelInfo* info) const {
  const ModelDescription& description = context_->batcher->description(model);
  info->set_name(context_->model_names[model]);
  info->set_family(description.family);
  if (description.takes_tokens) {
    info->add_input_dtypes(v1::DATA_TYPE_INT64);
    info->set_vocab_size(description.vocab_size);
  } else {
    info->add_input_dtypes(v1::DATA_TYPE_FLOAT32);
    info->add_input_dtypes(v1::DATA_TYPE_FLOAT16);
    info->add_input_dtypes(v1::DATA_TYPE_BFLOAT16);
    info->set_input_width(description.input_width);
  }
  info->set_output_width(description.output_width);
  info->add_output_dtypes(v1::DATA_TYPE_FLOAT32);
  info->add_output_dtypes(v1::DATA_TYPE_FLOAT16);
  info->add_output_dtypes(v1::DATA_TYPE_BFLOAT16);
  info->set_parameters(description.parameters);
  info->set_compute_dtype(ToProtoDType(description.dtype));
  info->set_deterministic(description.deterministic);
  info->set_device(DeviceName(description.device));
  info->set_lookahead(description.lookahead);
  info->set_bytes_per_session(description.session_bytes);
  info->set_sessions(context_->sessions->sessions(model));
  info->set_sessions_free(context_->sessions->sessions_free(model));
  info->set_max_response_bytes(context_->request_limits.max_response_bytes);
  info->set_generates(description.generates);
  info->set_has_tokenizer(context_->tokenizers[model].tokenizer != nullptr);
  if (description.bos_id.has_value()) info->set_bos_id(*description.bos_id);
  info->mutable_eos_ids()->Add(description.eos_ids.begin(), description.eos_ids.end());
  if (description.generates) {
    info->set_max_generated_tokens(context_->request_limits.max_generated_tokens);
  }
}

absl::Status DeltaNetService::FillSessions(const v1::ListSessionsRequest& request,
                                           v1::ListSessionsResponse* response) const {
  int model = -1;
  if (!request.model().empty()) {
    ASSIGN_OR_RETURN(model, context_->FindModel(request.model()));
  }
  if (request.page_size() < 0) {
    return InvalidRequest(absl::StrCat("page_size is ", request.page_size(), ", want at least 0"));
  }
  const int limit = request.page_size() == 0 ? kMaxPageSize : std::min(request.page_size(), kMaxPageSize);
  // One more than asked for tells whether there is another page.
  std::vector<SessionSnapshot> sessions = context_->sessions->List(model, request.page_token(), limit + 1);
  if (sessions.size() > static_cast<size_t>(limit)) {
    sessions.resize(limit);
    response->set_next_page_token(sessions.back().id);
  }
  for (const SessionSnapshot& session : sessions) {
    v1::SessionInfo* info = response->add_sessions();
    info->set_id(session.id);
    info->set_model(context_->model_names[session.model]);
    info->set_committed_position(session.committed_position);
    info->set_attached(session.attached);
    ToProtoDuration(session.idle, info->mutable_idle());
    ToProtoDuration(session.idle_ttl, info->mutable_idle_ttl());
  }
  return absl::OkStatus();
}

}  // namespace deltanet
