#include "server/forward_reactor.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/types/span.h"
#include "model/base/status_macros.h"
#include "proto/wire.h"
#include "server/work_output.h"

namespace deltanet {

grpc::ServerUnaryReactor* ForwardReactor::Start(const ServiceContext* context,
                                                grpc::CallbackServerContext* call,
                                                const v1::ForwardRequest* request,
                                                v1::ForwardResponse* response) {
  auto* reactor = new ForwardReactor(context, call, request, response);
  // The reactor outlives this even if it finishes meanwhile: gRPC calls OnDone only after it has been handed
  // over.
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
  ASSIGN_OR_RETURN(model_, context_->FindModel(request_->model()));
  ASSIGN_OR_RETURN(const CheckedInput input, CheckMessage(Sequence::kStateless));
  std::vector<std::shared_ptr<Lane>> lanes(input.batch);
  for (auto& lane : lanes) lane = context_->batcher->OpenLane(model_);
  return SubmitWork(lanes, input, absl::OkStatus());
}

absl::Status ForwardReactor::SubmitToSession() {
  const v1::SessionRef& ref = request_->session();
  RETURN_IF_ERROR(CheckSessionRef(ref));
  const Sequence sequence = request_->end_of_sequence() ? Sequence::kLastChunk : Sequence::kChunk;
  model_ = -1;  // An existing session knows its model.
  if (ref.create() || !request_->model().empty()) {
    ASSIGN_OR_RETURN(model_, context_->FindModel(request_->model()));
  }
  if (ref.create()) {
    ASSIGN_OR_RETURN(const CheckedInput input, CheckMessage(sequence));
    ASSIGN_OR_RETURN(
        session_, context_->sessions->Create(model_, ref.id(), IdleTtl(ref), kNotAttached, PeerOf(*call_)));
    created_ = true;
    return SubmitWork({session_->lane}, input, absl::OkStatus());
  }
  ASSIGN_OR_RETURN(session_, context_->sessions->Find(model_, ref.id(), kNotAttached));
  model_ = session_->model;
  // A bad message takes its place among the session's, and puts it out of step as any failure does.
  const absl::StatusOr<CheckedInput> input = CheckMessage(sequence);
  return SubmitWork({session_->lane}, input.value_or(CheckedInput{}), input.status());
}

absl::StatusOr<CheckedInput> ForwardReactor::CheckMessage(Sequence sequence) const {
  if (request_->has_expected_position())
    RETURN_IF_ERROR(CheckExpectedPosition(request_->expected_position()));
  return CheckInput(request_->input(), request_->output_dtype(), request_->output_options(), sequence,
                    context_->batcher->description(model_), context_->request_limits);
}

absl::Status ForwardReactor::SubmitWork(const std::vector<std::shared_ptr<Lane>>& lanes,
                                        const CheckedInput& input, const absl::Status& precondition) {
  input_ = input;
  MakeRoomForOutput(input, response_);
  {
    MutexLock lock(&mu_);
    unanswered_ = lanes.size();
  }
  const absl::Time deadline = CallDeadline(*call_);
  std::vector<std::unique_ptr<Work>> works;
  for (size_t i = 0; i < lanes.size(); ++i) {
    auto work = std::make_unique<Work>();
    work->input = request_->input().data().data() + i * input.sequence_bytes;
    work->input_dtype = input.dtype;
    work->tokens = input.tokens;
    work->end_of_sequence = session_ == nullptr || request_->end_of_sequence();
    PointToOutput(input, static_cast<int64_t>(i), response_, work.get());
    if (request_->has_expected_position()) work->expected_position = request_->expected_position();
    work->deadline = deadline;
    work->precondition = precondition;
    work->cancellation = cancellation_;
    work->done = [this](const WorkResult& result) { OnWorkDone(result); };
    works.push_back(std::move(work));
  }
  return context_->batcher->SubmitAll(lanes, absl::MakeSpan(works), Batcher::WhenFull::kRefuse);
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
  WorkResult result;
  {
    MutexLock lock(&mu_);
    result = last_result_;
    result.queued = queued_;
    result.computing = computing_;
  }
  if (session_ != nullptr) {
    // A session that this call made and could not begin is not left behind: the client may not know of it.
    if (result.ended || (created_ && !status.ok())) {
      context_->sessions->End(*session_);
    } else {
      context_->sessions->Touch(*session_);
    }
    if (!status.ok()) {
      status = WithErrorMetadata(
          status, "committed_position",
          absl::StrCat(created_ ? 0 : context_->batcher->committed_position(session_->lane)));
    }
  }
  LogIfInternal("Forward", request_->request_id(), status);
  context_->metrics->OnRequestDone(Method::kForward, status);
  context_->metrics->OnLatency(Method::kForward, context_->clock->Now() - arrival_);
  {
    MutexLock lock(&mu_);
    if (status.ok()) FillResponseLocked(result);
  }
  if (!AnswersElsewhere(result)) return Finish(ToGrpcStatus(status));
  context_->executor->Run([this, outcome = ToGrpcStatus(status)] {
    {
      MutexLock lock(&mu_);  // Behind the above, which ThreadSanitizer cannot see.
    }
    Finish(outcome);
  });
}

void ForwardReactor::FillResponseLocked(const WorkResult& result) {
  TrimOutput(input_, result.output_tokens, context_->batcher->description(model_).output_width, response_);
  response_->set_output_position(result.output_position);
  response_->set_committed_position(result.committed_position);
  if (session_ != nullptr) response_->set_session_id(session_->id);
  ToProtoDuration(result.queued, response_->mutable_timing()->mutable_queued());
  ToProtoDuration(result.computing, response_->mutable_timing()->mutable_computing());
}

void ForwardReactor::OnCancel() {
  {
    MutexLock lock(&mu_);
    cancellation_->cancelled = true;
  }
  context_->batcher->Wake();
}

void ForwardReactor::OnDone() {
  {
    MutexLock lock(
        &mu_);  // Behind whoever called FinishCall: gRPC orders this, but ThreadSanitizer cannot see it.
    context_->calls->Remove(active_call_);
  }
  delete this;
}

}  // namespace deltanet
