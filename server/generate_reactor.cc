#include "server/generate_reactor.h"

#include <algorithm>
#include <random>
#include <utility>

#include "absl/strings/str_cat.h"
#include "model/base/status_macros.h"
#include "proto/wire.h"

namespace deltanet {
namespace {

// What a token weighs in a response, at most, beside its text.
constexpr int64_t kTokenBytes = 32;
constexpr int64_t kTopTokenBytes = 12;  // And each of the most likely in its place.

uint64_t RandomSeed() {
  std::random_device random;
  return uint64_t{random()} << 32 | random();
}

GenerationEnd EndOf(const absl::Status& status, v1::FinishReason reason) {
  if (absl::IsCancelled(status)) return GenerationEnd::kCancelled;
  if (!status.ok()) return GenerationEnd::kError;
  if (reason == v1::FINISH_REASON_STOP_ID) return GenerationEnd::kStopId;
  return reason == v1::FINISH_REASON_STOP_TEXT ? GenerationEnd::kStopText : GenerationEnd::kLength;
}

}  // namespace

grpc::ServerWriteReactor<v1::GenerateResponse>* GenerateReactor::Start(const ServiceContext* context,
                                                                       grpc::CallbackServerContext* call,
                                                                       const v1::GenerateRequest* request) {
  std::shared_ptr<GenerateReactor> reactor(new GenerateReactor(context, call, request));
  {
    MutexLock lock(&reactor->mu_);
    reactor->self_ = reactor;
  }
  if (const absl::Status status = reactor->Submit(); !status.ok()) reactor->EndCall(status, WorkResult());
  return reactor.get();  // Lives at least until OnDone, which comes only after gRPC has it.
}

GenerateReactor::GenerateReactor(const ServiceContext* context, grpc::CallbackServerContext* call,
                                 const v1::GenerateRequest* request)
    : context_(context),
      call_(call),
      request_(request),
      arrival_(context->clock->Now()),
      cancellation_(std::make_shared<Cancellation>()) {
  active_call_ = context_->calls->Add(nullptr);
}

absl::Status GenerateReactor::Submit() {
  const v1::SessionRef& ref = request_->session();
  RETURN_IF_ERROR(CheckRequestId(request_->request_id()));
  const bool exists = request_->has_session() && !ref.create();
  if (request_->has_session()) {
    RETURN_IF_ERROR(CheckSessionRef(ref));
  } else if (request_->has_expected_position()) {
    return InvalidRequest(absl::StrCat("expected_position is ", request_->expected_position(),
                                       " without a session, want it with one only"));
  }
  if (!exists || !request_->model().empty()) {  // An existing session knows its model.
    ASSIGN_OR_RETURN(model_, context_->FindModel(request_->model()));
  }
  if (exists) {
    ASSIGN_OR_RETURN(session_, context_->sessions->Find(model_, ref.id(), kNotAttached));
    model_ = session_->model;
  }
  const absl::Status good = Prepare();
  // Of a session that is there, a bad message takes its place among its messages, and puts it out of step as
  // any failure does.
  if (!exists) RETURN_IF_ERROR(good);
  if (ref.create()) {
    ASSIGN_OR_RETURN(
        session_, context_->sessions->Create(model_, ref.id(), IdleTtl(ref), kNotAttached, PeerOf(*call_)));
    created_ = true;
  }
  std::unique_ptr<Work> work = MakeWork(good);
  return context_->batcher->Submit(session_ != nullptr ? session_->lane : context_->batcher->OpenLane(model_),
                                   &work, Batcher::WhenFull::kRefuse);
}

absl::Status GenerateReactor::Prepare() {
  const ModelDescription& model = context_->batcher->description(model_);
  RETURN_IF_ERROR(CheckGenerates(model, "generate"));
  if (request_->has_expected_position())
    RETURN_IF_ERROR(CheckExpectedPosition(request_->expected_position()));
  ASSIGN_OR_RETURN(generation_, CheckGeneration(*request_, model, context_->request_limits));
  if (generation_.sampling.temperature > 0 && !request_->sampling().has_seed()) {
    generation_.sampling.seed = RandomSeed();
  }
  stop_ids_.assign(request_->stop_ids().begin(), request_->stop_ids().end());
  if (!request_->ignore_eos()) stop_ids_.insert(stop_ids_.end(), model.eos_ids.begin(), model.eos_ids.end());
  std::sort(stop_ids_.begin(), stop_ids_.end());
  const absl::StatusOr<const Tokenizer*> tokenizer = context_->FindTokenizer(model_);
  if (request_->stop_size() > 0) {
    RETURN_IF_ERROR(tokenizer.status());
    matcher_.emplace(std::vector<std::string>(request_->stop().begin(), request_->stop().end()));
  }
  RETURN_IF_ERROR(ReadPrompt());
  if (tokenizer.ok()) {
    // The text goes on where the prompt's ends.
    decoder_.emplace(*tokenizer, IsFresh() ? TextPlace::kBegins : TextPlace::kGoesOn);
    std::string of_prompt;
    for (const int64_t id : ids_) {
      decoder_->Append(id, &of_prompt);
      of_prompt.clear();
    }
  }
  return absl::OkStatus();
}

absl::Status GenerateReactor::ReadPrompt() {
  const bool fresh = IsFresh();
  const ModelDescription& model = context_->batcher->description(model_);
  if (request_->has_text()) {
    ASSIGN_OR_RETURN(
        ids_, context_->Tokenize(model_, request_->text(), fresh ? TextPlace::kBegins : TextPlace::kGoesOn));
  } else {
    ids_.assign(request_->ids().ids().begin(), request_->ids().ids().end());
    RETURN_IF_ERROR(CheckIds("ids", ids_, model.vocab_size));
  }
  if (fresh && (request_->has_text() || ids_.empty()) && model.bos_id.has_value()) {
    ids_.insert(ids_.begin(), *model.bos_id);
  }
  if (fresh && ids_.empty()) {
    return InvalidRequest(
        "the prompt is empty, want at least one token: the model has no begin-of-sequence id");
  }
  if (static_cast<int64_t>(ids_.size()) > context_->request_limits.max_tokens) {
    return InvalidRequest(absl::StrCat("the prompt has ", ids_.size(), " tokens, want at most ",
                                       context_->request_limits.max_tokens, " tokens in a request"));
  }
  return absl::OkStatus();
}

bool GenerateReactor::IsFresh() const {
  if (session_ == nullptr) return true;  // It is yet to be made.
  if (request_->has_expected_position()) return request_->expected_position() == 0;
  return context_->batcher->committed_position(session_->lane) == 0 &&
         context_->batcher->pending(session_->lane) == 0;
}

std::unique_ptr<Work> GenerateReactor::MakeWork(const absl::Status& precondition) {
  const std::shared_ptr<GenerateReactor> self = shared_from_this();
  auto work = std::make_unique<Work>();
  if (precondition.ok()) {
    work->input = ids_.data();
    work->input_dtype = DType::kInt64;
    work->tokens = static_cast<int64_t>(ids_.size());
    work->top = generation_.top;
    work->generation = std::make_unique<Generation>();
    work->generation->sampling = generation_.sampling;
    work->generation->max_tokens = generation_.max_tokens;
    work->generation->keep_state = session_ != nullptr;
    work->generation->on_token = [self](const GeneratedToken& token) { return self->OnToken(token); };
  }
  if (request_->has_expected_position()) work->expected_position = request_->expected_position();
  work->deadline = CallDeadline(*call_);
  work->precondition = precondition;
  work->cancellation = cancellation_;
  work->done = [self](const WorkResult& result) { self->OnWorkDone(result); };
  return work;
}

bool GenerateReactor::OnToken(const GeneratedToken& token) {
  if (!first_token_.has_value()) first_token_ = context_->clock->Now() - arrival_;
  Token made;
  made.id = token.id;
  if (generation_.log_probs) {
    made.log_prob = token.log_prob;
    made.top_ids.assign(token.top_ids.begin(), token.top_ids.end());
    made.top_log_probs.assign(token.top_log_probs.begin(), token.top_log_probs.end());
  }
  if (decoder_.has_value()) {
    std::string decoded;
    decoder_->Append(token.id, &decoded);
    if (PassStops(decoded, &made.text)) finish_reason_ = v1::FINISH_REASON_STOP_TEXT;
  }
  if (finish_reason_ != v1::FINISH_REASON_STOP_TEXT &&
      std::binary_search(stop_ids_.begin(), stop_ids_.end(), token.id)) {
    finish_reason_ = v1::FINISH_REASON_STOP_ID;
  }
  {
    MutexLock lock(&mu_);
    unsent_.push_back(std::move(made));
  }
  Schedule();
  return finish_reason_ == v1::FINISH_REASON_LENGTH;
}

bool GenerateReactor::PassStops(const std::string& decoded, std::string* text) {
  if (!matcher_.has_value()) {
    text->append(decoded);
    return false;
  }
  const std::optional<size_t> stop = matcher_->Append(decoded, text);
  if (stop.has_value()) matched_stop_ = request_->stop(static_cast<int>(*stop));
  return stop.has_value();
}

void GenerateReactor::OnWorkDone(const WorkResult& result) {
  if (result.status.ok() && decoder_.has_value() && finish_reason_ != v1::FINISH_REASON_STOP_TEXT) {
    std::string decoded;
    decoder_->Finish(&decoded);
    if (PassStops(decoded, &last_text_)) {
      finish_reason_ = v1::FINISH_REASON_STOP_TEXT;
    } else if (matcher_.has_value()) {
      matcher_->Finish(&last_text_);
    }
  }
  const bool took_prompt = result.generated_tokens > 0;
  context_->metrics->OnGenerationDone(model_, EndOf(result.status, finish_reason_),
                                      took_prompt ? static_cast<int64_t>(ids_.size()) : 0);
  EndCall(result.status, result);
}

void GenerateReactor::EndCall(absl::Status status, const WorkResult& result) {
  Outcome outcome;
  if (session_ != nullptr) {
    // A session that this call made and could not begin is not left behind: the client may not know of it.
    if (created_ && !status.ok()) {
      context_->sessions->End(*session_);
    } else {
      context_->sessions->Touch(*session_);
    }
    if (!status.ok()) {
      status = WithErrorMetadata(
          status, "committed_position",
          absl::StrCat(created_ ? 0 : context_->batcher->committed_position(session_->lane)));
    }
    outcome.last.set_committed_position(result.committed_position);
  }
  LogIfInternal("Generate", request_->request_id(), status);
  context_->metrics->OnRequestDone(Method::kGenerate, status);
  context_->metrics->OnLatency(Method::kGenerate, context_->clock->Now() - arrival_);
  outcome.status = ToGrpcStatus(status);
  outcome.last.set_text(last_text_);
  outcome.last.set_finish_reason(finish_reason_);
  outcome.last.set_matched_stop(matched_stop_);
  v1::Usage* usage = outcome.last.mutable_usage();
  usage->set_prompt_tokens(static_cast<int64_t>(ids_.size()));
  usage->set_generated_tokens(result.generated_tokens);
  ToProtoDuration(first_token_.value_or(absl::ZeroDuration()), usage->mutable_time_to_first_token());
  ToProtoDuration(result.queued, outcome.last.mutable_timing()->mutable_queued());
  ToProtoDuration(result.computing, outcome.last.mutable_timing()->mutable_computing());
  {
    MutexLock lock(&mu_);
    outcome_ = std::move(outcome);
  }
  Schedule();
}

void GenerateReactor::Schedule() {
  {
    MutexLock lock(&mu_);
    if (scheduled_ || writing_) return;  // OnWriteDone advances too.
    scheduled_ = true;
  }
  context_->executor->Run([self = shared_from_this()] {
    {
      MutexLock lock(&self->mu_);
      self->scheduled_ = false;
    }
    self->Advance();
  });
}

void GenerateReactor::Advance() {
  const std::shared_ptr<GenerateReactor> self = shared_from_this();  // What is begun here can end at once.
  bool write = false;
  std::optional<grpc::Status> finish;
  {
    MutexLock lock(&mu_);
    if (finished_ || writing_) return;
    if (cancellation_->cancelled) unsent_.clear();  // Nobody reads them.
    if (unsent_.empty() && !outcome_.has_value()) return;
    response_.Clear();
    FillResponseLocked();
    write = response_.tokens_size() > 0;
    if (unsent_.empty() && outcome_.has_value()) {
      if (outcome_->status.ok()) {
        const std::string text = response_.text();
        response_.MergeFrom(outcome_->last);
        response_.set_text(text + outcome_->last.text());
        write = true;
        finish = outcome_->status;
      } else if (!write) {
        finish = outcome_->status;
      }
    }
    writing_ = true;
    finished_ = finish.has_value();
  }
  if (!finish.has_value()) {
    StartWrite(&response_);
  } else if (write) {
    StartWriteAndFinish(&response_, grpc::WriteOptions(), *finish);
  } else {
    Finish(*finish);
  }
}

void GenerateReactor::FillResponseLocked() {
  response_.set_request_id(request_->request_id());
  if (session_ != nullptr) response_.set_session_id(session_->id);
  if (!std::exchange(wrote_, true) && generation_.sampling.temperature > 0) {
    response_.set_seed(generation_.sampling.seed);
  }
  int64_t bytes = 0;
  while (!unsent_.empty() && (bytes == 0 || bytes < context_->request_limits.max_response_bytes / 2)) {
    Token& token = unsent_.front();
    v1::GeneratedToken* sent = response_.add_tokens();
    sent->set_id(token.id);
    sent->set_log_prob(token.log_prob);
    sent->mutable_top_ids()->Add(token.top_ids.begin(), token.top_ids.end());
    sent->mutable_top_log_probs()->Add(token.top_log_probs.begin(), token.top_log_probs.end());
    response_.mutable_text()->append(token.text);
    bytes += kTokenBytes + kTopTokenBytes * static_cast<int64_t>(token.top_ids.size()) +
             static_cast<int64_t>(token.text.size());
    unsent_.pop_front();
  }
}

void GenerateReactor::OnWriteDone(bool ok) {
  {
    MutexLock lock(&mu_);
    if (!ok) cancellation_->cancelled = true;  // The call is dead.
    writing_ = false;
  }
  if (!ok) context_->batcher->Wake();
  Advance();
}

void GenerateReactor::OnCancel() {
  {
    MutexLock lock(&mu_);  // Behind Start, which ThreadSanitizer cannot see that gRPC orders.
    cancellation_->cancelled = true;
  }
  context_->batcher->Wake();
}

void GenerateReactor::OnDone() {
  std::shared_ptr<GenerateReactor> self;
  MutexLock lock(&mu_);
  self = std::move(self_);
  context_->calls->Remove(active_call_);
}

}  // namespace deltanet
