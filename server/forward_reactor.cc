#include "server/forward_reactor.h"

#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "model/base/status_macros.h"
#include "proto/wire.h"

namespace deltanet {

grpc::ServerUnaryReactor* ForwardReactor::Start(const ServiceContext* context, grpc::CallbackServerContext* call,
                                                const v1::ForwardRequest* request,
                                                v1::ForwardResponse* response) {
  auto* reactor = new ForwardReactor(context, call, request, response);
  // The reactor outlives this even if it finishes meanwhile: gRPC calls OnDone only after it has been handed over.
  if (const absl::Status status = reactor->Submit(); !status.ok()) reactor->FinishCall(status);
  return reactor;
}

ForwardReactor::ForwardReactor(const ServiceContext* context, grpc::CallbackServerContext* call,
                               const v1::ForwardRequest* request, v1::ForwardResponse* response)
    : context_(context),
      call_(call),
      request_(request),
      response_(response),
      arrival_(context->clock->Now()),
      cancellation_(std::make_shared<Cancellation>()) {
  active_call_ = context_->calls->Add(nullptr);
}

absl::Status ForwardReactor::Submit() {
  RETURN_IF_ERROR(CheckRequestId(request_->request_id()));
  response_->set_request_id(request_->request_id());
  return request_->has_session() ? SubmitToSession() : SubmitStateless();
}

absl::Status ForwardReactor::SubmitStateless() {
  if (request_->has_expected_position()) {
    return InvalidRequest(absl::StrCat("expected_position is ", request_->expected_position(),
                                       " without a session, want it with one only"));
  }
  ASSIGN_OR_RETURN(const int model, context_->FindModel(request_->model()));
  ASSIGN_OR_RETURN(const CheckedInput input,
                   CheckInput(request_->input(), request_->output_dtype(), Sequence::kStateless,
                              context_->batcher->description(model), context_->request_limits));
  std::vector<std::shared_ptr<Lane>> lanes(input.batch);
  for (auto& lane : lanes) lane = context_->batcher->OpenLane(model);
  return SubmitWork(lanes, input, absl::OkStatus());
}

absl::Status ForwardReactor::SubmitToSession() {
  const v1::SessionRef& ref = request_->session();
  RETURN_IF_ERROR(CheckSessionRef(ref));
  const auto check_message = [this](int model) -> absl::StatusOr<CheckedInput> {
    if (request_->has_expected_position()) {
      RETURN_IF_ERROR(CheckExpectedPosition(request_->expected_position()));
    }
    return CheckInput(request_->input(), request_->output_dtype(),
                      request_->end_of_sequence() ? Sequence::kLastChunk : Sequence::kChunk,
                      context_->batcher->description(model), context_->request_limits);
  };
  if (ref.create()) {
    ASSIGN_OR_RETURN(const int model, context_->FindModel(request_->model()));
    ASSIGN_OR_RETURN(const CheckedInput input, check_message(model));
    ASSIGN_OR_RETURN(session_, context_->sessions->Create(model, ref.id(), IdleTtl(ref), kNotAttached));
    created_ = true;
    return SubmitWork({session_->lane}, input, absl::OkStatus());
  }
  int model = -1;  // The session knows its model.
  if (!request_->model().empty()) {
    ASSIGN_OR_RETURN(model, context_->FindModel(request_->model()));
  }
  ASSIGN_OR_RETURN(session_, context_->sessions->Find(model, ref.id(), kNotAttached));
  // A bad message takes its place among the session's, and puts it out of step as any failure does.
  const absl::StatusOr<CheckedInput> input = check_message(session_->model);
  return SubmitWork({session_->lane}, input.value_or(CheckedInput{}), input.status());
}

absl::Status ForwardReactor::SubmitWork(const std::vector<std::shared_ptr<Lane>>& lanes, const CheckedInput& input,
                                        const absl::Status& precondition) {
  input_ = input;
  v1::Tensor* output = response_->mutable_output();
  output->mutable_data()->resize(static_cast<size_t>(input.output_bytes) * lanes.size());
  {
    MutexLock lock(&mu_);
    unanswered_ = lanes.size();
  }
  const absl::Time deadline = CallDeadline(*call_);
  for (size_t i = 0; i < lanes.size(); ++i) {
    auto work = std::make_unique<Work>();
    work->input = request_->input().data().data() + i * input.sequence_bytes;
    work->input_dtype = input.dtype;
    work->tokens = input.tokens;
    work->end_of_sequence = session_ == nullptr || request_->end_of_sequence();
    work->output = output->mutable_data()->data() + i * input.output_bytes;
    work->output_dtype = input.output_dtype;
    if (request_->has_expected_position()) work->expected_position = request_->expected_position();
    work->deadline = deadline;
    work->precondition = precondition;
    work->cancellation = cancellation_;
    work->done = [this](const WorkResult& result) { OnWorkDone(result); };
    const absl::Status status = context_->batcher->Submit(lanes[i], &work, Batcher::WhenFull::kRefuse);
    if (status.ok()) continue;
    if (i == 0) return status;
    // The rest of the batch fails with it; what was submitted is given up.
    WorkResult refused;
    refused.status = status;
    for (; i < lanes.size(); ++i) OnWorkDone(refused);
  }
  return absl::OkStatus();
}

void ForwardReactor::OnWorkDone(const WorkResult& result) {
  absl::Status status;
  bool give_up_rest = false;
  {
    MutexLock lock(&mu_);
    if (!result.status.ok() && first_error_.ok()) {
      first_error_ = result.status;
      give_up_rest = unanswered_ > 1;
    }
    last_result_ = result;
    queued_ = std::max(queued_, result.queued);
    computing_ = std::max(computing_, result.computing);
    if (--unanswered_ == 0) {
      status = first_error_;
    } else if (!give_up_rest) {
      return;
    }
  }
  if (give_up_rest) {
    cancellation_->cancelled = true;
    context_->batcher->Wake();
    return;
  }
  FinishCall(std::move(status));
}

void ForwardReactor::FinishCall(absl::Status status) {
  int64_t committed_position = input_.tokens;
  if (session_ != nullptr) {
    committed_position = context_->batcher->committed_position(session_->lane);
    bool ended = false;
    {
      MutexLock lock(&mu_);
      ended = last_result_.ended;
    }
    // A session that this call made and could not begin is not left behind: the client may not know of it.
    if (ended || (created_ && !status.ok())) {
      context_->sessions->End(*session_);
    } else {
      context_->sessions->Touch(*session_);
    }
    if (!status.ok()) {
      status = WithErrorMetadata(status, "committed_position", absl::StrCat(committed_position));
    }
  }
  if (status.ok()) {
    MutexLock lock(&mu_);
    const int64_t width = response_->output().data().size();
    static_cast<void>(width);
  }
  LogIfInternal("Forward", request_->request_id(), status);
  context_->metrics->OnRequestDone(Method::kForward, status);
  context_->metrics->OnLatency(Method::kForward, context_->clock->Now() - arrival_);
  Finish(ToGrpcStatus(status));
}

}  // namespace deltanet
