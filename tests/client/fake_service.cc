#include "tests/client/fake_service.h"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "model/base/check.h"
#include "model/base/status_macros.h"
#include "proto/wire.h"

namespace deltanet {
namespace {

template <typename T>
std::vector<T> Values(const v1::Tensor& tensor) {
  std::vector<T> values(tensor.data().size() / sizeof(T));
  if (!values.empty()) std::memcpy(values.data(), tensor.data().data(), tensor.data().size());
  return values;
}

void SetTensor(const std::vector<float>& values, const std::vector<int64_t>& shape, v1::Tensor* tensor) {
  tensor->set_dtype(v1::DATA_TYPE_FLOAT32);
  tensor->mutable_shape()->Add(shape.begin(), shape.end());
  tensor->set_data(values.data(), values.size() * sizeof(float));
}

// Of Forward or StreamForward.
template <typename Response>
void SetScores(const v1::TopTokens& top, const std::vector<float>& log_probs, Response* response) {
  if (top.k() > 0) {
    v1::TopTokens* const all = response->mutable_top();
    all->set_k(top.k());
    all->mutable_ids()->MergeFrom(top.ids());
    all->mutable_log_probs()->MergeFrom(top.log_probs());
  }
  response->mutable_log_probs()->Add(log_probs.begin(), log_probs.end());
}

const char* ModelName(FakeService::Model model) {
  return model == FakeService::Model::kSum ? "sum" : "letters";
}

void SetTiming(v1::Timing* timing) {
  ToProtoDuration(absl::Microseconds(20), timing->mutable_queued());
  ToProtoDuration(absl::Microseconds(300), timing->mutable_computing());
}

}  // namespace

FakeService::FakeService(Model model) : model_(model) {
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

void FakeService::Hold(const grpc::ServerContext* until_cancelled) {
  MutexLock lock(&mu_);
  ++held_;
  changed_.NotifyAll();
  while (!released_ && !(until_cancelled != nullptr && until_cancelled->IsCancelled())) {
    changed_.WaitFor(&mu_, absl::Milliseconds(5));  // Nobody tells of a cancellation.
  }
}

void FakeService::RefuseGenerate(int every) {
  MutexLock lock(&mu_);
  refuse_every_ = every;
}

void FakeService::HoldGenerate() {
  MutexLock lock(&mu_);
  hold_generate_ = true;
}

void FakeService::CutGenerate(int64_t max_tokens) {
  MutexLock lock(&mu_);
  cut_ = max_tokens;
}

std::vector<FakeService::GenerateCall> FakeService::generate_calls() {
  MutexLock lock(&mu_);
  return generate_calls_;
}

int FakeService::most_generating() {
  MutexLock lock(&mu_);
  return most_generating_;
}

int64_t FakeService::Expected(const std::vector<int64_t>& before) {
  const int64_t count = static_cast<int64_t>(before.size());
  if (count > 0 && count % kEosEvery == 0) return kEos;
  return 'a' + (std::accumulate(before.begin(), before.end(), int64_t{0}) + 3 * count) % 26;
}

float FakeService::LogProb(const std::vector<int64_t>& before, int64_t id) {
  return -0.25f * static_cast<float>(1 + (id - Expected(before) + kVocab) % kVocab);
}

template <typename Request>
absl::Status FakeService::Advance(const Request& request, FakeSession* session, Advanced* advanced) const {
  if (request.has_expected_position()) {
    if (request.expected_position() != session->position()) {
      session->out_of_step = true;
      return MakeError(
          absl::StatusCode::kFailedPrecondition, reason::kPositionMismatch,
          absl::StrCat("expected_position is ", request.expected_position(), ", want ", session->position()));
    }
    session->out_of_step = false;
  }
  if (session->out_of_step) {
    return MakeError(absl::StatusCode::kFailedPrecondition, reason::kSessionOutOfStep, "out of step");
  }
  if (model_ == Model::kSum) {
    return AdvanceSum(request.input(), request.end_of_sequence(), session, advanced);
  }
  AdvanceLetters(request.input(), request.output_options(), session, advanced);
  return absl::OkStatus();
}

absl::Status FakeService::AdvanceSum(const v1::Tensor& input, bool end_of_sequence, FakeSession* session,
                                     Advanced* advanced) const {
  const std::vector<float> values = Values<float>(input);
  if (!values.empty() && values[0] == kBadValue) {
    session->out_of_step = true;
    return MakeError(absl::StatusCode::kInvalidArgument, reason::kInvalidRequest, "a value is 666");
  }
  session->inputs.insert(session->inputs.end(), values.begin(), values.end());
  const int64_t tokens = session->position();
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
  SetTensor(sums, {end - session->given, kWidth}, &advanced->output);
  advanced->output_position = session->given;
  session->given = end;
  return absl::OkStatus();
}

void FakeService::AdvanceLetters(const v1::Tensor& input, const v1::OutputOptions& options,
                                 FakeSession* session, Advanced* advanced) const {
  std::vector<int64_t>& ids = session->ids;
  const bool scores = options.kind() == v1::OUTPUT_SCORES;
  const auto add_top = [&] {
    if (options.top_tokens() == 0) return;
    advanced->top.set_k(options.top_tokens());
    for (int rank = 0; rank < options.top_tokens(); ++rank) {
      const int64_t id = (Expected(ids) + rank) % kVocab;
      advanced->top.add_ids(id);
      advanced->top.add_log_probs(LogProb(ids, id));
    }
  };
  const std::vector<int64_t> chunk = Values<int64_t>(input);
  advanced->output_position = session->position() + (scores && ids.empty() ? 1 : 0);
  if (options.last_only() && !scores) advanced->output_position += static_cast<int64_t>(chunk.size()) - 1;
  std::vector<float> logits;
  int64_t outputs = 0;
  for (size_t i = 0; i < chunk.size(); ++i) {
    if (scores) {
      if (!ids.empty()) {
        advanced->log_probs.push_back(LogProb(ids, chunk[i]));
        add_top();
      }
      ids.push_back(chunk[i]);
      continue;
    }
    ids.push_back(chunk[i]);
    if (options.last_only() && i + 1 < chunk.size()) continue;
    ++outputs;
    if (options.kind() == v1::OUTPUT_TOP) {
      add_top();
    } else {
      for (int64_t id = 0; id < kVocab; ++id) logits.push_back(LogProb(ids, id));
    }
  }
  if (!scores && options.kind() != v1::OUTPUT_TOP) SetTensor(logits, {outputs, kVocab}, &advanced->output);
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
  if (request->request_id() == kHold) Hold(nullptr);
  MutexLock lock(&mu_);
  const auto agent = context->client_metadata().find("user-agent");
  if (agent != context->client_metadata().end()) {
    user_agent_ = std::string(agent->second.data(), agent->second.size());
  }
  response->set_request_id(request->request_id());
  SetTiming(response->mutable_timing());
  Advanced advanced;
  if (request->has_session()) {
    std::string id;
    const absl::StatusOr<FakeSession*> session = FindLocked(request->session(), &id);
    if (!session.ok()) return ToGrpcStatus(session.status());
    const absl::Status status = Advance(*request, *session, &advanced);
    if (!status.ok()) return ToGrpcStatus(status);
    response->set_session_id(id);
    response->set_committed_position((*session)->position());
    response->set_output_position(advanced.output_position);
    if (advanced.output.dtype() != 0) *response->mutable_output() = advanced.output;
    SetScores(advanced.top, advanced.log_probs, response);
    if (request->end_of_sequence()) sessions_.erase(id);
    return grpc::Status::OK;
  }
  // Stateless: each sequence is a session of its own that ends at once.
  const v1::Tensor& input = request->input();
  const bool batched = input.shape_size() == (model_ == Model::kSum ? 3 : 2);
  const int64_t sequences = batched ? input.shape(0) : 1;
  v1::Tensor* const output = response->mutable_output();
  for (int64_t i = 0; i < sequences; ++i) {
    v1::ForwardRequest part = *request;
    const size_t bytes = input.data().size() / sequences;
    part.mutable_input()->set_data(input.data().substr(i * bytes, bytes));
    part.set_end_of_sequence(true);
    FakeSession session;
    advanced = {};
    const absl::Status status = Advance(part, &session, &advanced);
    if (!status.ok()) return ToGrpcStatus(status);
    output->mutable_data()->append(advanced.output.data());
    SetScores(advanced.top, advanced.log_probs, response);
  }
  response->set_output_position(advanced.output_position);
  response->set_committed_position(input.shape(batched ? 1 : 0));
  if (advanced.output.dtype() == 0) {
    response->clear_output();
    return grpc::Status::OK;
  }
  output->set_dtype(v1::DATA_TYPE_FLOAT32);
  if (batched) output->add_shape(sequences);
  output->mutable_shape()->MergeFrom(advanced.output.shape());
  return grpc::Status::OK;
}

grpc::Status FakeService::StreamForward(
    grpc::ServerContext* context,
    grpc::ServerReaderWriter<v1::StreamForwardResponse, v1::StreamForwardRequest>* stream) {
  std::map<uint32_t, FakeSession> own;
  v1::StreamForwardRequest request;
  while (stream->Read(&request)) {
    if (request.request_id() == kHold) {
      Hold(nullptr);
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
        Advanced advanced;
        status = Advance(request, session, &advanced);
        if (status.ok()) *response.mutable_output() = advanced.output;
        SetScores(advanced.top, advanced.log_probs, &response);
        response.set_output_position(advanced.output_position);
        response.set_committed_position(session->position());
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

std::vector<int64_t> FakeService::ToIds(const std::string& text, bool add_bos) const {
  std::vector<int64_t> ids;
  if (add_bos) ids.push_back(kBos);
  ids.insert(ids.end(), text.begin(), text.end());
  return ids;
}

grpc::Status FakeService::Generate(grpc::ServerContext* context, const v1::GenerateRequest* request,
                                   grpc::ServerWriter<v1::GenerateResponse>* writer) {
  if (model_ == Model::kSum) {
    return ToGrpcStatus(MakeError(absl::StatusCode::kFailedPrecondition, reason::kNotGenerative,
                                  "model 'sum' is not over tokens"));
  }
  FakeSession session;
  std::string id;
  v1::GenerateRequest cut = *request;
  bool hold = request->request_id() == kHold || absl::EndsWith(request->text(), kHold);
  {
    MutexLock lock(&mu_);
    generate_calls_.push_back(
        {context->peer(), request->ids().ids_size(), request->max_tokens(), request->ignore_eos()});
    if (refuse_every_ > 0 && generate_calls_.size() % refuse_every_ == 0) {
      return ToGrpcStatus(MakeError(absl::StatusCode::kUnavailable, reason::kQueueFull, "the queue is full"));
    }
    if (request->has_session()) {
      const absl::StatusOr<FakeSession*> found = FindLocked(request->session(), &id);
      if (!found.ok()) return ToGrpcStatus(found.status());
      session = **found;
      if (request->has_expected_position() && request->expected_position() != session.position()) {
        return ToGrpcStatus(MakeError(absl::StatusCode::kFailedPrecondition, reason::kPositionMismatch,
                                      absl::StrCat("expected_position is ", request->expected_position(),
                                                   ", want ", session.position())));
      }
    }
    hold = hold || hold_generate_;
    cut.set_max_tokens(request->max_tokens() == 0 ? cut_ : std::min(cut_, request->max_tokens()));
    most_generating_ = std::max(most_generating_, ++generating_);
  }
  const grpc::Status status = Continue(cut, id, hold, &session, context, writer);
  MutexLock lock(&mu_);
  --generating_;
  if (context->IsCancelled()) {
    cancelled_ = true;
    changed_.NotifyAll();
  } else if (status.ok() && !id.empty()) {
    sessions_[id] = session;
  }
  return status;
}

grpc::Status FakeService::Continue(const v1::GenerateRequest& request, const std::string& session_id,
                                   bool hold, FakeSession* session, grpc::ServerContext* context,
                                   grpc::ServerWriter<v1::GenerateResponse>* writer) {
  const bool has_tokenizer = model_ == Model::kLetters;
  if (!has_tokenizer && (request.has_text() || request.stop_size() > 0)) {
    return ToGrpcStatus(MakeError(absl::StatusCode::kFailedPrecondition, reason::kNoTokenizer,
                                  "model 'letters' has no tokenizer"));
  }
  std::vector<int64_t>& ids = session->ids;
  std::vector<int64_t> prompt(request.ids().ids().begin(), request.ids().ids().end());
  if (request.has_text() || (prompt.empty() && ids.empty())) prompt = ToIds(request.text(), ids.empty());
  ids.insert(ids.end(), prompt.begin(), prompt.end());

  const bool sampled = request.sampling().temperature() > 0;
  const uint64_t seed = request.sampling().has_seed() ? request.sampling().seed() : kSeed;
  size_t held_back = 0;  // The longest stop string but a character.
  for (const std::string& stop : request.stop()) held_back = std::max(held_back, stop.size() - 1);
  std::string text;
  size_t sent = 0;  // Of the text.
  v1::GenerateResponse response;
  for (int64_t count = 1; response.finish_reason() == 0; ++count) {
    if (context->IsCancelled()) return grpc::Status::CANCELLED;
    response.Clear();
    response.set_request_id(request.request_id());
    response.set_session_id(session_id);
    if (count == 1 && sampled) response.set_seed(seed);
    int64_t id = Expected(ids);
    if (sampled && id != kEos) id = 'a' + (id + static_cast<int64_t>(seed % 26)) % 26;
    v1::GeneratedToken* const token = response.add_tokens();
    token->set_id(id);
    if (request.has_top_log_probs()) {
      token->set_log_prob(LogProb(ids, id));
      for (int rank = 0; rank < request.top_log_probs(); ++rank) {
        token->add_top_ids((Expected(ids) + rank) % kVocab);
        token->add_top_log_probs(LogProb(ids, (Expected(ids) + rank) % kVocab));
      }
    }
    ids.push_back(id);
    if (has_tokenizer && id != kEos) text.push_back(static_cast<char>(id));

    const auto& stops = request.stop_ids();
    if (count == request.max_tokens()) response.set_finish_reason(v1::FINISH_REASON_LENGTH);
    if (std::count(stops.begin(), stops.end(), id) > 0 || (id == kEos && !request.ignore_eos())) {
      response.set_finish_reason(v1::FINISH_REASON_STOP_ID);
    }
    for (const std::string& stop : request.stop()) {
      const size_t found = text.find(stop);
      if (found == std::string::npos) continue;
      text.resize(found);
      response.set_finish_reason(v1::FINISH_REASON_STOP_TEXT);
      response.set_matched_stop(stop);
      break;
    }
    const bool last = response.finish_reason() != 0;
    const size_t ready = last ? text.size() : text.size() - std::min(text.size(), held_back);
    response.set_text(text.substr(sent, ready - sent));
    sent = ready;
    if (last) {
      response.mutable_usage()->set_prompt_tokens(static_cast<int64_t>(prompt.size()));
      response.mutable_usage()->set_generated_tokens(count);
      ToProtoDuration(absl::Microseconds(1500), response.mutable_usage()->mutable_time_to_first_token());
      if (!session_id.empty()) response.set_committed_position(session->position());
      SetTiming(response.mutable_timing());
    }
    if (!writer->Write(response)) return grpc::Status::CANCELLED;
    if (hold && count == 1) Hold(context);
    if (request.request_id() == kBreak || absl::EndsWith(request.text(), kBreak)) {
      return ToGrpcStatus(MakeError(absl::StatusCode::kUnavailable, reason::kDraining, "shutting down"));
    }
  }
  return grpc::Status::OK;
}

grpc::Status FakeService::Tokenize(grpc::ServerContext* /*context*/, const v1::TokenizeRequest* request,
                                   v1::TokenizeResponse* response) {
  if (model_ != Model::kLetters) {
    return ToGrpcStatus(MakeError(absl::StatusCode::kFailedPrecondition, reason::kNoTokenizer,
                                  absl::StrCat("model '", ModelName(model_), "' has no tokenizer")));
  }
  const std::vector<int64_t> ids = ToIds(request->text(), request->add_bos());
  response->mutable_ids()->Add(ids.begin(), ids.end());
  return grpc::Status::OK;
}

grpc::Status FakeService::Detokenize(grpc::ServerContext* /*context*/, const v1::DetokenizeRequest* request,
                                     v1::DetokenizeResponse* response) {
  if (model_ != Model::kLetters) {
    return ToGrpcStatus(MakeError(absl::StatusCode::kFailedPrecondition, reason::kNoTokenizer,
                                  absl::StrCat("model '", ModelName(model_), "' has no tokenizer")));
  }
  for (const int64_t id : request->ids()) {
    if (id != kBos && id != kEos) response->mutable_text()->push_back(static_cast<char>(id));
  }
  return grpc::Status::OK;
}

grpc::Status FakeService::GetModel(grpc::ServerContext* /*context*/, const v1::GetModelRequest* request,
                                   v1::GetModelResponse* response) {
  const char* const name = ModelName(model_);
  if (!request->model().empty() && request->model() != name) {
    return ToGrpcStatus(MakeError(absl::StatusCode::kNotFound, reason::kModelNotFound,
                                  absl::StrCat("no model '", request->model(), "'")));
  }
  v1::ModelInfo* const info = response->mutable_model();
  info->set_name(name);
  info->add_output_dtypes(v1::DATA_TYPE_FLOAT32);
  info->set_parameters(7);
  info->set_compute_dtype(v1::DATA_TYPE_FLOAT32);
  info->set_deterministic(true);
  info->set_device("cpu");
  info->set_bytes_per_session(100);
  info->set_sessions(3);
  info->set_sessions_free(61);
  info->set_max_response_bytes(1 << 20);
  if (model_ == Model::kSum) {
    info->set_family("transformer_deltanet");
    info->add_input_dtypes(v1::DATA_TYPE_FLOAT32);
    info->add_input_dtypes(v1::DATA_TYPE_BFLOAT16);
    info->set_input_width(kWidth);
    info->set_output_width(kWidth);
    info->set_lookahead(kLookahead);
  } else {
    info->set_family("deltanet_model");
    info->add_input_dtypes(v1::DATA_TYPE_INT64);
    info->set_vocab_size(kVocab);
    info->set_output_width(kVocab);
    info->set_generates(true);
    info->set_has_tokenizer(model_ == Model::kLetters);
    info->set_bos_id(kBos);
    info->add_eos_ids(kEos);
    info->set_max_generated_tokens(kMaxTokens);
  }
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
  response->set_committed_position((*session)->position());
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
    info->set_model(ModelName(model_));
    info->set_committed_position(next->second.position());
    ToProtoDuration(absl::Milliseconds(1500), info->mutable_idle());
    ToProtoDuration(absl::Minutes(10), info->mutable_idle_ttl());
  }
  if (next != sessions_.end()) response->set_next_page_token(response->sessions(1).id());
  return grpc::Status::OK;
}

}  // namespace deltanet
