#include "server/stream_forward_reactor.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "model/base/status_macros.h"
#include "proto/wire.h"
#include "server/work_output.h"

namespace deltanet {
namespace {

// Sessions that a stream may name, lost ones included: they are remembered, so their number is bounded.
constexpr size_t kMaxStreamSessions = 10000;

using Bidi = grpc::ServerBidiReactor<v1::StreamForwardRequest, v1::StreamForwardResponse>;

absl::Status CancelledError() {
  return MakeError(absl::StatusCode::kCancelled, reason::kCancelled, "the call was cancelled");
}

}  // namespace

Bidi* StreamForwardReactor::Start(const ServiceContext* context, grpc::CallbackServerContext* call) {
  std::shared_ptr<StreamForwardReactor> reactor(new StreamForwardReactor(context, call));
  {
    MutexLock lock(&reactor->mu_);
    reactor->self_ = reactor;
  }
  reactor->active_call_ = context->calls->Add(reactor);
  reactor->Advance();
  return reactor.get();  // Lives at least until OnDone, which comes only after gRPC has it.
}

StreamForwardReactor::StreamForwardReactor(const ServiceContext* context, grpc::CallbackServerContext* call)
    : context_(context),
      call_(call),
      attachment_(context->sessions->NewAttachment()),
      deadline_(CallDeadline(*call)),
      cancellation_(std::make_shared<Cancellation>()) {}

void StreamForwardReactor::OnReadDone(bool ok) {
  if (ok) {
    std::unique_ptr<Message> message;
    {
      MutexLock lock(&mu_);
      if (finished_) return;
      message = std::move(incoming_);
      message->arrival = context_->clock->Now();
      if (!first_arrival_) first_arrival_ = message->arrival;
      message->window_bytes = static_cast<int64_t>(message->request.input().data().size());
      ++window_messages_;
      window_bytes_ += message->window_bytes;
    }
    Accept(std::move(message));
  }
  {
    MutexLock lock(&mu_);
    reading_ = false;  // Not before: the next message is accepted after this one.
    if (!ok) read_closed_ = true;
  }
  Advance();
}

void StreamForwardReactor::Accept(std::unique_ptr<Message> message) {
  const v1::StreamForwardRequest& request = message->request;
  if (first_message_) first_model_ = request.model();
  first_message_ = false;
  message->model = request.model().empty() ? first_model_ : request.model();
  // An id that is too long is not echoed: it could be as long as a message.
  if (CheckRequestId(request.request_id()).ok()) message->response.set_request_id(request.request_id());

  SessionKey key("", request.stream_session());
  std::shared_ptr<const Session> made;
  if (request.has_session()) {
    absl::Status status = CheckSessionRef(request.session());
    key = SessionKey(request.session().id(), 0);
    if (status.ok() && key.first.empty()) {
      // No other message can name it yet: no order to keep.
      absl::StatusOr<std::shared_ptr<const Session>> session = ResolveSession(*message);
      status = session.status();
      if (session.ok()) {
        made = *std::move(session);
        key.first = made->id;
      }
    }
    if (!status.ok()) return Answer(std::move(message), status);
    message->response.set_session_id(key.first);
  } else {
    message->response.set_stream_session(request.stream_session());
  }

  StreamSession* entry = nullptr;
  absl::Status full;
  {
    MutexLock lock(&mu_);
    if (sessions_.size() >= kMaxStreamSessions && sessions_.count(key) == 0) {
      full = MakeError(absl::StatusCode::kResourceExhausted, reason::kSessionsFull,
                       absl::StrCat("the stream names more than ", kMaxStreamSessions, " sessions"));
      closing_ = full;
    } else {
      entry = &sessions_[key];
      if (entry->ending) {
        entry->deferred.push_back(std::move(message));
        return;
      }
    }
  }
  if (!full.ok()) {
    if (made != nullptr) context_->sessions->End(*made);
    return Answer(std::move(message), full);
  }
  if (made != nullptr) entry->session = std::move(made);
  Route(key, entry, std::move(message));
}

bool StreamForwardReactor::Route(const SessionKey& key, StreamSession* entry,
                                 std::unique_ptr<Message> message) {
  const v1::StreamForwardRequest& request = message->request;
  const bool ends = request.end_of_sequence();
  bool created = request.has_session() && request.session().id().empty();  // Accept made it.
  if (entry->session == nullptr) {
    // What came behind a lost message must not be taken for it.
    if (!entry->lost.ok() && !request.has_expected_position() && !request.session().create()) {
      Answer(std::move(message), MakeError(absl::StatusCode::kFailedPrecondition, reason::kSessionOutOfStep,
                                           absl::StrCat("an earlier message of this session failed (",
                                                        entry->lost.message(), "), want expected_position")));
      return false;
    }
    absl::StatusOr<std::shared_ptr<const Session>> session = ResolveSession(*message);
    entry->lost = session.status();
    if (!session.ok()) {
      Answer(std::move(message), session.status());
      return false;
    }
    entry->session = *std::move(session);
    created = entry->session->id.empty() || request.session().create();
  }
  const absl::Status status = Submit(key, entry, created, &message);
  if (status.ok()) return ends;  // If it ends, the entry may be gone already.
  if (created) context_->sessions->End(*entry->session);
  entry->session = nullptr;
  entry->lost = status;
  Answer(std::move(message), status);
  return false;
}

absl::StatusOr<std::shared_ptr<const Session>> StreamForwardReactor::ResolveSession(
    const Message& message) const {
  const v1::StreamForwardRequest& request = message.request;
  if (request.has_session() && !request.session().create()) {
    int model = -1;  // An existing session knows its model.
    if (!request.model().empty()) {
      ASSIGN_OR_RETURN(model, context_->FindModel(request.model()));
    }
    return context_->sessions->Find(model, request.session().id(), attachment_);
  }
  ASSIGN_OR_RETURN(const int model, context_->FindModel(message.model));
  if (!request.has_session()) return context_->sessions->CreateOwn(model, attachment_, PeerOf(*call_));
  return context_->sessions->Create(model, request.session().id(), IdleTtl(request.session()), attachment_,
                                    PeerOf(*call_));
}

absl::Status StreamForwardReactor::Submit(const SessionKey& key, StreamSession* entry, bool created,
                                          std::unique_ptr<Message>* message) {
  Message* const raw = message->get();
  const std::shared_ptr<const Session> session = entry->session;
  const bool ends = raw->request.end_of_sequence();
  auto work = std::make_unique<Work>();
  work->precondition = FillWork(*session, created, raw, work.get());
  bool was_ending = false;
  {
    MutexLock lock(&mu_);
    raw->window_bytes += raw->input.response_bytes;
    window_bytes_ += raw->input.response_bytes;
    was_ending = entry->ending;
    if (ends) entry->ending = true;
  }
  work->done = [self = shared_from_this(), key, entry = ends ? entry : nullptr, session,
                raw](const WorkResult& result) {
    self->OnWorkDone(key, entry, *session, std::unique_ptr<Message>(raw), result);
  };
  // Only a message that begins a session is refused for a full queue: others wait, and the stream is not
  // read.
  const absl::Status status = context_->batcher->Submit(
      session->lane, &work, created ? Batcher::WhenFull::kRefuse : Batcher::WhenFull::kQueue);
  if (status.ok()) {
    static_cast<void>(message->release());  // `done` owns it, and may have been called.
  } else {
    MutexLock lock(&mu_);
    entry->ending = was_ending;
  }
  return status;
}

absl::Status StreamForwardReactor::FillWork(const Session& session, bool created, Message* message,
                                            Work* work) const {
  const v1::StreamForwardRequest& request = message->request;
  work->cancellation = cancellation_;
  work->deadline = deadline_;
  work->end_of_sequence = request.end_of_sequence();
  if (request.has_expected_position()) {
    RETURN_IF_ERROR(CheckExpectedPosition(request.expected_position()));
    work->expected_position = request.expected_position();
  }
  RETURN_IF_ERROR(CheckRequestId(request.request_id()));
  if (request.session().create() && !created) {
    return MakeError(absl::StatusCode::kAlreadyExists, reason::kSessionExists,
                     absl::StrCat("session ", session.id, " exists, want create in its first message only"));
  }
  const std::string& model_name = context_->model_names[session.model];
  if (!request.model().empty() && request.model() != model_name) {
    return MakeError(absl::StatusCode::kFailedPrecondition, reason::kSessionModel,
                     absl::StrCat("model is \"", request.model(), "\", want \"", model_name,
                                  "\", which the session belongs to"));
  }
  if (request.has_timeout()) {
    ASSIGN_OR_RETURN(const absl::Time deadline, CheckTimeout(request.timeout(), message->arrival));
    work->deadline = std::min(deadline_, deadline);
  }
  ASSIGN_OR_RETURN(const CheckedInput input,
                   CheckInput(request.input(), request.output_dtype(), request.output_options(),
                              request.end_of_sequence() ? Sequence::kLastChunk : Sequence::kChunk,
                              context_->batcher->description(session.model), context_->request_limits));
  message->input = input;
  message->response.mutable_output();  // There, even where it stays empty.
  MakeRoomForOutput(input, &message->response);
  PointToOutput(input, 0, &message->response, work);
  work->input = request.input().data().data();
  work->input_dtype = input.dtype;
  work->tokens = input.tokens;
  return absl::OkStatus();
}

void StreamForwardReactor::OnWorkDone(const SessionKey& key, StreamSession* entry, const Session& session,
                                      std::unique_ptr<Message> message, const WorkResult& result) {
  v1::StreamForwardResponse& response = message->response;
  absl::Status status = result.status;
  if (status.ok()) {
    TrimOutput(message->input, result.output_tokens,
               context_->batcher->description(session.model).output_width, &response);
    response.set_output_position(result.output_position);
  } else {
    status = WithErrorMetadata(status, "committed_position", absl::StrCat(result.committed_position));
  }
  response.set_committed_position(result.committed_position);
  ToProtoDuration(result.queued, response.mutable_timing()->mutable_queued());
  ToProtoDuration(result.computing, response.mutable_timing()->mutable_computing());
  const bool ended = entry != nullptr && status.ok();
  if (ended) {
    context_->sessions->End(session);
    entry->session = nullptr;
  } else {
    context_->sessions->Touch(session);
  }
  Answer(std::move(message), status, AnswersElsewhere(result));
  if (entry != nullptr) RouteDeferred(key, entry);
}

void StreamForwardReactor::RouteDeferred(const SessionKey& key, StreamSession* entry) {
  while (true) {
    std::unique_ptr<Message> next;
    {
      MutexLock lock(&mu_);
      if (entry->deferred.empty()) {
        entry->ending = false;
        if (entry->session == nullptr && entry->lost.ok()) sessions_.erase(key);
        return;
      }
      next = std::move(entry->deferred.front());
      entry->deferred.pop_front();
    }
    if (Route(key, entry, std::move(next))) return;
  }
}

void StreamForwardReactor::Answer(std::unique_ptr<Message> message, const absl::Status& status,
                                  bool elsewhere) {
  if (!status.ok()) {
    *message->response.mutable_error() = ToRpcStatus(status);
    message->response.clear_top();
    message->response.clear_log_probs();
  }
  LogIfInternal("StreamForward", message->response.request_id(), status);
  context_->metrics->OnStreamMessage(status);
  const bool has_output = !message->response.output().data().empty() ||
                          message->response.log_probs_size() > 0 || message->response.top().ids_size() > 0;
  if (status.ok() && has_output) ObserveOutput();
  context_->metrics->OnLatency(Method::kStreamForward, context_->clock->Now() - message->arrival);
  {
    MutexLock lock(&mu_);
    unwritten_.push_back(std::move(message));
  }
  if (elsewhere) {
    ScheduleAdvance();
  } else {
    Advance();
  }
}

void StreamForwardReactor::ScheduleAdvance() {
  {
    MutexLock lock(&mu_);
    if (std::exchange(scheduled_, true)) return;
  }
  context_->executor->Run([self = shared_from_this()] {
    {
      MutexLock lock(&self->mu_);
      self->scheduled_ = false;
    }
    self->Advance();
  });
}

void StreamForwardReactor::ObserveOutput() {
  const absl::Time now = context_->clock->Now();
  std::optional<absl::Time> first, last;
  {
    MutexLock lock(&mu_);
    first = first_arrival_;
    last = std::exchange(last_output_, now);
  }
  if (last) {
    context_->metrics->OnNextStreamOutput(now - *last);
  } else {
    context_->metrics->OnFirstStreamOutput(now - *first);
  }
}

bool StreamForwardReactor::MayReadLocked() const {
  if (reading_ || starting_read_ || read_closed_ || !closing_.ok() || cancellation_->cancelled) return false;
  return window_messages_ == 0 || (window_messages_ < context_->stream_window_messages &&
                                   window_bytes_ < context_->stream_window_bytes);
}

bool StreamForwardReactor::MayFinishLocked() const {
  return window_messages_ == 0 && !starting_read_ &&
         (read_closed_ || !closing_.ok() || cancellation_->cancelled);
}

absl::Status StreamForwardReactor::EndLocked() const {
  return cancellation_->cancelled ? CancelledError() : closing_;
}

void StreamForwardReactor::LeaveWindowLocked(const Message& message) {
  --window_messages_;
  window_bytes_ -= message.window_bytes;
}

void StreamForwardReactor::Advance() {
  const std::shared_ptr<StreamForwardReactor> self =
      shared_from_this();  // What is begun here can end at once.
  bool read = false;
  do {
    const v1::StreamForwardResponse* write = nullptr;
    v1::StreamForwardRequest* read_into = nullptr;
    bool finish = false;
    absl::Status status;
    {
      MutexLock lock(&mu_);
      // The read of the last round has been begun.
      if (read) starting_read_ = false;
      read = false;
      if (finished_) return;
      if (cancellation_->cancelled) {  // Nobody reads the answers.
        for (const std::unique_ptr<Message>& message : unwritten_) LeaveWindowLocked(*message);
        unwritten_.clear();
      }
      if (writing_ == nullptr && !unwritten_.empty()) {
        writing_ = std::move(unwritten_.front());
        unwritten_.pop_front();
        write = &writing_->response;
      }
      if (MayReadLocked()) {
        incoming_ = std::make_unique<Message>();
        read_into = &incoming_->request;
        reading_ = true;
        starting_read_ = true;
        read = true;
      } else if (MayFinishLocked()) {
        finished_ = true;
        finish = true;
        status = EndLocked();
      }
    }
    if (write != nullptr) StartWrite(write);
    if (read) StartRead(read_into);
    if (finish) {
      // Before the client learns of the end: it may at once name the sessions elsewhere.
      context_->sessions->Detach(attachment_);
      Finish(ToGrpcStatus(status));
    }
  } while (read);
}

void StreamForwardReactor::OnWriteDone(bool ok) {
  std::unique_ptr<Message> written;
  {
    MutexLock lock(&mu_);
    if (!ok) cancellation_->cancelled = true;  // The call is dead.
    written = std::move(writing_);
    LeaveWindowLocked(*written);
  }
  Advance();
}

void StreamForwardReactor::OnCancel() {
  {
    MutexLock lock(&mu_);
    cancellation_->cancelled = true;
  }
  context_->batcher->Wake();
  Advance();
}

void StreamForwardReactor::Drain() {
  {
    MutexLock lock(&mu_);
    if (closing_.ok() && !finished_) {
      closing_ = MakeError(absl::StatusCode::kUnavailable, reason::kDraining, "the server is shutting down");
    }
  }
  Advance();
}

void StreamForwardReactor::OnDone() {
  std::shared_ptr<StreamForwardReactor> self;
  MutexLock lock(&mu_);
  self = std::move(self_);
  // Not before: a client that is gone looks, until OnCancel, like one that has closed its side.
  context_->metrics->OnRequestDone(Method::kStreamForward, EndLocked());
  context_->calls->Remove(active_call_);
}

}  // namespace deltanet
