#include "tests/client/fake_service.h"

#include <algorithm>
#include <cstring>
#include <optional>

#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "model/base/check.h"
#include "model/base/status_macros.h"
#include "proto/wire.h"

namespace deltanet {
namespace {

std::vector<float> Values(const v1::Tensor& tensor) {
  std::vector<float> values(tensor.data().size() / sizeof(float));
  if (!values.empty()) std::memcpy(values.data(), tensor.data().data(), tensor.data().size());
  return values;
}

void SetTiming(v1::Timing* timing) {
  ToProtoDuration(absl::Microseconds(20), timing->mutable_queued());
  ToProtoDuration(absl::Microseconds(300), timing->mutable_computing());
}

}  // namespace

FakeService::FakeService() {
  grpc::EnableDefaultHealthCheckService(true);
  grpc::ServerBuilder builder;
  int port = 0;
  builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
  builder.RegisterService(this);
  server_ = builder.BuildAndStart();
  DELTANET_CHECK(server_ != nullptr, "the fake server does not start");
  address_ = absl::StrCat("127.0.0.1:", port);
}

FakeService::~FakeService() {
  Release();
  server_->Shutdown(absl::ToChronoTime(absl::UnixEpoch()));  // What is under way is cancelled.
  // Shutdown has waited for the handlers, but in a way that ThreadSanitizer cannot see; our own lock it can.
  MutexLock lock(&mu_);
}

void FakeService::Release() {
  MutexLock lock(&mu_);
  released_ = true;
  changed_.NotifyAll();
}

void FakeService::AwaitHeld(int count) {
  MutexLock lock(&mu_);
  while (held_ < count) changed_.Wait(&mu_);
}

std::string FakeService::user_agent() {
  MutexLock lock(&mu_);
  return user_agent_;
}

void FakeService::AwaitCancelled() {
  MutexLock lock(&mu_);
  while (!cancelled_) changed_.Wait(&mu_);
}

void FakeService::Hold() {
  MutexLock lock(&mu_);
  ++held_;
  changed_.NotifyAll();
  while (!released_) changed_.Wait(&mu_);
}

absl::Status FakeService::Advance(const v1::Tensor& input, bool end_of_sequence,
                                  const int64_t* expected_position, FakeSession* session, v1::Tensor* output,
                                  int64_t* output_position) {
  const std::vector<float> values = Values(input);
  const int64_t before = static_cast<int64_t>(session->inputs.size()) / kWidth;
  if (expected_position != nullptr) {
    if (*expected_position != before) {
      session->out_of_step = true;
      return MakeError(absl::StatusCode::kFailedPrecondition, reason::kPositionMismatch,
                       absl::StrCat("expected_position is ", *expected_position, ", want ", before));
    }
    session->out_of_step = false;
  }
  if (session->out_of_step) {
    return MakeError(absl::StatusCode::kFailedPrecondition, reason::kSessionOutOfStep, "out of step");
  }
  if (!values.empty() && values[0] == kBadValue) {
    session->out_of_step = true;
    return MakeError(absl::StatusCode::kInvalidArgument, reason::kInvalidRequest, "a value is 666");
  }
  session->inputs.insert(session->inputs.end(), values.begin(), values.end());
  const int64_t tokens = static_cast<int64_t>(session->inputs.size()) / kWidth;
  const int64_t end = end_of_sequence ? tokens : std::max<int64_t>(0, tokens - kLookahead);
  std::vector<float> sums;
  for (int64_t t = session->given; t < end; ++t) {
    for (int64_t column = 0; column < kWidth; ++column) {
      float sum = 0;
      for (int64_t i = 0; i <= std::min(t + kLookahead, tokens - 1); ++i) {
        sum += session->inputs[i * kWidth + column];
      }
      sums.push_back(sum);
    }
  }
  output->set_dtype(v1::DATA_TYPE_FLOAT32);
  output->add_shape(end - session->given);
  output->add_shape(kWidth);
  output->set_data(sums.data(), sums.size() * sizeof(float));
  *output_position = session->given;
  session->given = end;
  return absl::OkStatus();
}

absl::StatusOr<FakeService::FakeSession*> FakeService::FindLocked(const v1::SessionRef& ref,
                                                                  std::string* id) {
  *id = ref.id();
  if (ref.create()) {
    if (id->empty()) *id = absl::StrCat("made-", next_id_++);
    if (sessions_.count(*id) != 0) {
      return MakeError(absl::StatusCode::kAlreadyExists, reason::kSessionExists, "the session exists");
    }
    return &sessions_[*id];
  }
  const auto found = sessions_.find(*id);
  if (found == sessions_.end()) {
    return MakeError(absl::StatusCode::kNotFound, reason::kSessionNotFound,
                     absl::StrCat("no session '", *id, "'"), {{"committed_position", "0"}});
  }
  return &found->second;
}

grpc::Status FakeService::Forward(grpc::ServerContext* context, const v1::ForwardRequest* request,
                                  v1::ForwardResponse* response) {
  if (request->request_id() == kHold) Hold();
  MutexLock lock(&mu_);
  const auto agent = context->client_metadata().find("user-agent");
  if (agent != context->client_metadata().end()) {
    user_agent_ = std::string(agent->second.data(), agent->second.size());
  }
  response->set_request_id(request->request_id());
  SetTiming(response->mutable_timing());
  int64_t output_position = 0;
  if (request->has_session()) {
    std::string id;
    const absl::StatusOr<FakeSession*> session = FindLocked(request->session(), &id);
    if (!session.ok()) return ToGrpcStatus(session.status());
    const int64_t expected = request->expected_position();
    const absl::Status status = Advance(request->input(), request->end_of_sequence(),
                                        request->has_expected_position() ? &expected : nullptr, *session,
                                        response->mutable_output(), &output_position);
    if (!status.ok()) return ToGrpcStatus(status);
    response->set_session_id(id);
    response->set_committed_position(static_cast<int64_t>((*session)->inputs.size()) / kWidth);
    response->set_output_position(output_position);
    if (request->end_of_sequence()) sessions_.erase(id);
    return grpc::Status::OK;
  }
  // Stateless: each sequence is a session of its own that ends at once.
  const v1::Tensor& input = request->input();
  const bool batched = input.shape_size() == 3;
  const int64_t sequences = batched ? input.shape(0) : 1;
  v1::Tensor* const output = response->mutable_output();
  for (int64_t i = 0; i < sequences; ++i) {
    v1::Tensor part, part_output;
    const size_t bytes = input.data().size() / sequences;
    part.set_data(input.data().substr(i * bytes, bytes));
    FakeSession session;
    const absl::Status status = Advance(part, true, nullptr, &session, &part_output, &output_position);
    if (!status.ok()) return ToGrpcStatus(status);
    output->mutable_data()->append(part_output.data());
  }
  output->set_dtype(v1::DATA_TYPE_FLOAT32);
  *output->mutable_shape() = input.shape();
  response->set_committed_position(input.shape(batched ? 1 : 0));
  return grpc::Status::OK;
}

grpc::Status FakeService::StreamForward(
    grpc::ServerContext* context,
    grpc::ServerReaderWriter<v1::StreamForwardResponse, v1::StreamForwardRequest>* stream) {
  std::map<uint32_t, FakeSession> own;
  v1::StreamForwardRequest request;
  while (stream->Read(&request)) {
    if (request.request_id() == kHold) {
      Hold();
      continue;
    }
    if (request.request_id() == kBreak) {
      return ToGrpcStatus(MakeError(absl::StatusCode::kUnavailable, reason::kDraining, "shutting down"));
    }
    v1::StreamForwardResponse response;
    response.set_request_id(request.request_id());
    SetTiming(response.mutable_timing());
    {
      MutexLock lock(&mu_);
      FakeSession* session = nullptr;
      absl::Status status;
      if (request.has_session()) {
        std::string id;
        const absl::StatusOr<FakeSession*> found = FindLocked(request.session(), &id);
        status = found.status();
        if (found.ok()) session = *found;
        response.set_session_id(id);
      } else {
        session = &own[request.stream_session()];
        response.set_stream_session(request.stream_session());
      }
      if (status.ok()) {
        int64_t output_position = 0;
        const int64_t expected = request.expected_position();
        v1::Tensor output;
        status = Advance(request.input(), request.end_of_sequence(),
                         request.has_expected_position() ? &expected : nullptr, session, &output,
                         &output_position);
        if (status.ok()) *response.mutable_output() = output;
        response.set_output_position(output_position);
        response.set_committed_position(static_cast<int64_t>(session->inputs.size()) / kWidth);
        if (status.ok() && request.end_of_sequence()) {
          if (request.has_session()) {
            sessions_.erase(response.session_id());
          } else {
            own.erase(request.stream_session());
          }
        }
      }
      if (!status.ok()) *response.mutable_error() = ToRpcStatus(status);
    }
    if (!stream->Write(response)) break;
  }
  if (context->IsCancelled()) {
    MutexLock lock(&mu_);
    cancelled_ = true;
    changed_.NotifyAll();
  }
  return grpc::Status::OK;
}

grpc::Status FakeService::GetModel(grpc::ServerContext* /*context*/, const v1::GetModelRequest* request,
                                   v1::GetModelResponse* response) {
  if (!request->model().empty() && request->model() != "sum") {
    return ToGrpcStatus(MakeError(absl::StatusCode::kNotFound, reason::kModelNotFound,
                                  absl::StrCat("no model '", request->model(), "'")));
  }
  v1::ModelInfo* const info = response->mutable_model();
  info->set_name("sum");
  info->set_family("transformer_deltanet");
  info->add_input_dtypes(v1::DATA_TYPE_FLOAT32);
  info->add_input_dtypes(v1::DATA_TYPE_BFLOAT16);
  info->set_input_width(kWidth);
  info->set_output_width(kWidth);
  info->add_output_dtypes(v1::DATA_TYPE_FLOAT32);
  info->set_parameters(7);
  info->set_compute_dtype(v1::DATA_TYPE_FLOAT32);
  info->set_device("cpu");
  info->set_lookahead(kLookahead);
  info->set_bytes_per_session(100);
  info->set_sessions(3);
  info->set_sessions_free(61);
  info->set_max_response_bytes(1 << 20);
  return grpc::Status::OK;
}

grpc::Status FakeService::ListModels(grpc::ServerContext* context, const v1::ListModelsRequest* /*request*/,
                                     v1::ListModelsResponse* response) {
  v1::GetModelResponse model;
  const grpc::Status status = GetModel(context, &v1::GetModelRequest::default_instance(), &model);
  *response->add_models() = model.model();
  response->set_server_version("9.8.7");
  return status;
}

grpc::Status FakeService::EndSession(grpc::ServerContext* /*context*/, const v1::EndSessionRequest* request,
                                     v1::EndSessionResponse* response) {
  v1::SessionRef ref;
  ref.set_id(request->session_id());
  MutexLock lock(&mu_);
  std::string id;
  const absl::StatusOr<FakeSession*> session = FindLocked(ref, &id);
  if (!session.ok()) return ToGrpcStatus(session.status());
  response->set_committed_position(static_cast<int64_t>((*session)->inputs.size()) / kWidth);
  sessions_.erase(id);
  return grpc::Status::OK;
}

// Pages of two, whatever is asked for.
grpc::Status FakeService::ListSessions(grpc::ServerContext* /*context*/,
                                       const v1::ListSessionsRequest* request,
                                       v1::ListSessionsResponse* response) {
  MutexLock lock(&mu_);
  auto next = sessions_.upper_bound(request->page_token());
  for (; next != sessions_.end() && response->sessions_size() < 2; ++next) {
    v1::SessionInfo* const info = response->add_sessions();
    info->set_id(next->first);
    info->set_model("sum");
    info->set_committed_position(static_cast<int64_t>(next->second.inputs.size()) / kWidth);
    ToProtoDuration(absl::Milliseconds(1500), info->mutable_idle());
    ToProtoDuration(absl::Minutes(10), info->mutable_idle_ttl());
  }
  if (next != sessions_.end()) response->set_next_page_token(response->sessions(1).id());
  return grpc::Status::OK;
}

}  // namespace deltanet
