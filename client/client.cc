#include "client/client.h"

#include <grpcpp/grpcpp.h>

#include <chrono>
#include <fstream>
#include <iterator>
#include <limits>
#include <sstream>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "client/channel.h"
#include "client/messages.h"
#include "deltanet/v1/deltanet.grpc.pb.h"
#include "grpc/health/v1/health.grpc.pb.h"
#include "model/base/status_macros.h"
#include "proto/wire.h"

namespace deltanet {
namespace {

void SetTimeout(absl::Duration timeout, grpc::ClientContext* context) {
  if (timeout == absl::InfiniteDuration()) return;
  context->set_deadline(absl::ToChronoTime(absl::Now() + timeout));
}

absl::StatusOr<std::string> ReadFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::ostringstream text;
  if (!(text << file.rdbuf())) {
    return absl::InvalidArgumentError(absl::StrCat("cannot read ", path, ", want a PEM file"));
  }
  return text.str();
}

absl::StatusOr<std::shared_ptr<grpc::ChannelCredentials>> MakeCredentials(
    const std::optional<TlsOptions>& tls) {
  if (!tls) return grpc::InsecureChannelCredentials();
  if (tls->certificate.empty() != tls->key.empty()) {
    return absl::InvalidArgumentError(absl::StrCat("a client's certificate needs its key: certificate is \"",
                                                   tls->certificate, "\", key is \"", tls->key,
                                                   "\", want both or neither"));
  }
  grpc::SslCredentialsOptions options;
  if (!tls->ca.empty()) {
    ASSIGN_OR_RETURN(options.pem_root_certs, ReadFile(tls->ca));
  }
  if (!tls->certificate.empty()) {
    ASSIGN_OR_RETURN(options.pem_cert_chain, ReadFile(tls->certificate));
    ASSIGN_OR_RETURN(options.pem_private_key, ReadFile(tls->key));
  }
  return grpc::SslCredentials(options);
}

TensorView IdsView(const std::vector<int64_t>& ids) {
  return {ids.data(), {static_cast<int64_t>(ids.size())}, DType::kInt64, Device{}};
}

// Debian's gRPC (1.51) reads connect's errno after other calls, which may have changed it: now and then it takes
// a connection on its way for a refused one. So a channel gets time for a second try before its first call,
// which the first try's failure would end.
constexpr std::chrono::milliseconds kSecondTry{100};
constexpr std::chrono::seconds kConnecting{1};

}  // namespace

absl::string_view ClientVersion() { return DELTANET_VERSION; }

class ForwardStream::Impl {
 public:
  Impl(v1::DeltaNetService::Stub* stub, const StreamOptions& options) {
    SetTimeout(options.timeout, &context);
    call = stub->StreamForward(&context);
  }

  grpc::ClientContext context;
  std::unique_ptr<grpc::ClientReaderWriter<v1::StreamForwardRequest, v1::StreamForwardResponse>> call;

  // The writer's.
  bool writes_done = false;

  // The reader's.
  v1::StreamForwardResponse response;

  std::optional<absl::Status> finished;
};

ForwardStream::ForwardStream(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}

ForwardStream::~ForwardStream() {
  if (impl_->finished) return;
  Cancel();
  (void)Finish();  // Nobody is left who would want to know.
}

bool ForwardStream::Write(const StreamRequest& request) {
  return !impl_->writes_done && impl_->call->Write(ToProtoRequest(request));
}

void ForwardStream::WritesDone() {
  if (std::exchange(impl_->writes_done, true)) return;
  impl_->call->WritesDone();
}

bool ForwardStream::Read(StreamResponse* response) {
  if (!impl_->call->Read(&impl_->response)) return false;
  *response = FromProtoResponse(&impl_->response);
  return true;
}

void ForwardStream::Cancel() { impl_->context.TryCancel(); }

absl::Status ForwardStream::Finish() {
  if (!impl_->finished) {
    WritesDone();
    while (impl_->call->Read(&impl_->response)) {
    }
    impl_->finished = FromGrpcStatus(impl_->call->Finish());
  }
  return *impl_->finished;
}

absl::string_view FinishReasonName(FinishReason reason) {
  switch (reason) {
    case FinishReason::kNone:
      return "none";
    case FinishReason::kLength:
      return "length";
    case FinishReason::kStopId:
      return "stop_id";
    case FinishReason::kStopText:
      return "stop_text";
  }
  return "none";
}

class GenerationStream::Impl {
 public:
  Impl(v1::DeltaNetService::Stub* stub, const GenerateOptions& options) {
    SetTimeout(options.timeout, &context);
    call = stub->Generate(&context, ToProtoRequest(options));
  }

  bool Read(Generated* generated) {
    if (!malformed.ok() || !call->Read(&response)) return false;
    absl::StatusOr<Generated> read = FromProtoResponse(&response);
    if (!read.ok()) {
      malformed = read.status();
      context.TryCancel();
      return false;
    }
    complete = read->finish_reason != FinishReason::kNone;
    *generated = *std::move(read);
    return true;
  }

  grpc::ClientContext context;
  std::unique_ptr<grpc::ClientReader<v1::GenerateResponse>> call;
  v1::GenerateResponse response;
  bool complete = false;  // The last response has said why generation ended.
  absl::Status malformed;
  std::optional<absl::Status> finished;
};

GenerationStream::GenerationStream(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}

GenerationStream::~GenerationStream() {
  if (impl_->finished) return;
  Cancel();
  (void)Finish();  // Nobody is left who would want to know.
}

bool GenerationStream::Read(Generated* response) { return impl_->Read(response); }

void GenerationStream::Cancel() { impl_->context.TryCancel(); }

absl::Status GenerationStream::Finish() {
  if (!impl_->finished) {
    Generated dropped;
    while (impl_->Read(&dropped)) {
    }
    absl::Status status = FromGrpcStatus(impl_->call->Finish());
    if (!impl_->malformed.ok()) status = impl_->malformed;
    if (status.ok() && !impl_->complete) {
      status = absl::DataLossError("malformed response: generation ended without a reason");
    }
    impl_->finished = status;
  }
  return *impl_->finished;
}

class Client::Impl {
 public:
  Impl(const std::shared_ptr<grpc::Channel>& channel, absl::Duration timeout)
      : timeout(timeout),
        stub(v1::DeltaNetService::NewStub(channel)),
        health(grpc::health::v1::Health::NewStub(channel)) {}

  // One unary call that computes nothing: `method` of `stub` with `request`.
  template <typename Stub, typename Request, typename Response>
  absl::StatusOr<Response> Call(grpc::Status (Stub::*method)(grpc::ClientContext*, const Request&, Response*),
                                Stub* stub, const Request& request) const {
    grpc::ClientContext context;
    SetTimeout(timeout, &context);
    Response response;
    RETURN_IF_ERROR(FromGrpcStatus((stub->*method)(&context, request, &response)));
    return response;
  }

  const absl::Duration timeout;
  const std::unique_ptr<v1::DeltaNetService::Stub> stub;
  const std::unique_ptr<grpc::health::v1::Health::Stub> health;
};

absl::StatusOr<std::shared_ptr<grpc::Channel>> MakeChannel(const std::string& target,
                                                           const ClientOptions& options) {
  if (target.empty()) return absl::InvalidArgumentError("the server's address is empty, want HOST:PORT");
  if (options.max_message_bytes < 1 || options.max_message_bytes > std::numeric_limits<int>::max()) {
    return absl::InvalidArgumentError(absl::StrCat("max_message_bytes is ", options.max_message_bytes,
                                                   ", want 1 to ", std::numeric_limits<int>::max()));
  }
  if (options.timeout <= absl::ZeroDuration()) {
    return absl::InvalidArgumentError(
        absl::StrCat("timeout is ", absl::FormatDuration(options.timeout), ", want more than 0"));
  }
  grpc::ChannelArguments arguments;
  arguments.SetMaxReceiveMessageSize(static_cast<int>(options.max_message_bytes));
  arguments.SetUserAgentPrefix(absl::StrCat("deltanet-client/", ClientVersion()));
  // Otherwise gRPC gives all channels of a process to one server the same connection.
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  arguments.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, static_cast<int>(kSecondTry.count()));
  ASSIGN_OR_RETURN(const auto credentials, MakeCredentials(options.tls));
  std::shared_ptr<grpc::Channel> channel = grpc::CreateCustomChannel(target, credentials, arguments);
  // If it is in vain, the calls say why.
  channel->WaitForConnected(std::chrono::system_clock::now() + kConnecting);
  return channel;
}

absl::StatusOr<Client> Client::Connect(const std::string& target, const ClientOptions& options) {
  ASSIGN_OR_RETURN(const std::shared_ptr<grpc::Channel> channel, MakeChannel(target, options));
  return Client(std::make_unique<Impl>(channel, options.timeout));
}

Client::Client(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Client::Client(Client&& other) noexcept = default;
Client& Client::operator=(Client&& other) noexcept = default;
Client::~Client() = default;

absl::StatusOr<ForwardResult> Client::Forward(const TensorView& input, const ForwardOptions& options) const {
  grpc::ClientContext context;
  SetTimeout(options.timeout, &context);
  v1::ForwardResponse response;
  RETURN_IF_ERROR(FromGrpcStatus(impl_->stub->Forward(&context, ToProtoRequest(input, options), &response)));
  if (options.output_options.kind == OutputKind::kValues && !response.has_output()) {
    return absl::DataLossError("malformed response: no output");
  }
  return FromProtoResponse(&response);
}

absl::StatusOr<ForwardResult> Client::Score(const std::vector<int64_t>& ids, int32_t top_tokens,
                                            const ForwardOptions& options) const {
  ForwardOptions scoring = options;
  scoring.output_options = {.kind = OutputKind::kScores, .top_tokens = top_tokens};
  ASSIGN_OR_RETURN(ForwardResult result, Forward(IdsView(ids), scoring));
  const int64_t scored = result.committed_position - result.output_position;
  if (static_cast<int64_t>(result.log_probs.size()) != scored) {
    return absl::DataLossError(absl::StrCat("malformed response: ", result.log_probs.size(),
                                            " log-probabilities for ", scored, " tokens"));
  }
  return result;
}

absl::StatusOr<ForwardResult> Client::Top(const std::vector<int64_t>& ids, int32_t top_tokens,
                                          const ForwardOptions& options) const {
  ForwardOptions last = options;
  last.output_options = {.kind = OutputKind::kTop, .last_only = true, .top_tokens = top_tokens};
  return Forward(IdsView(ids), last);
}

std::unique_ptr<GenerationStream> Client::OpenGeneration(const GenerateOptions& options) const {
  return std::unique_ptr<GenerationStream>(
      new GenerationStream(std::make_unique<GenerationStream::Impl>(impl_->stub.get(), options)));
}

absl::StatusOr<Generated> Client::Generate(const GenerateOptions& options,
                                           const std::function<bool(const Generated&)>& on_response) const {
  const std::unique_ptr<GenerationStream> generation = OpenGeneration(options);
  Generated joined, response;
  std::vector<TokenResult> tokens;
  std::string text;
  uint64_t seed = 0;
  while (generation->Read(&response)) {
    const bool wanted = on_response == nullptr || on_response(response);
    if (!wanted && response.finish_reason == FinishReason::kNone) {
      generation->Cancel();
      RETURN_IF_ERROR(generation->Finish());  // It may just have ended.
      return absl::CancelledError("generation was cancelled");
    }
    std::move(response.tokens.begin(), response.tokens.end(), std::back_inserter(tokens));
    text += response.text;
    if (seed == 0) seed = response.seed;
    joined = std::move(response);
  }
  RETURN_IF_ERROR(generation->Finish());
  joined.tokens = std::move(tokens);
  joined.text = std::move(text);
  joined.seed = seed;
  return joined;
}

absl::StatusOr<std::vector<int64_t>> Client::Tokenize(const std::string& model, const std::string& text,
                                                      bool add_bos) const {
  v1::TokenizeRequest request;
  request.set_model(model);
  request.set_text(text);
  request.set_add_bos(add_bos);
  ASSIGN_OR_RETURN(const v1::TokenizeResponse response,
                   impl_->Call(&v1::DeltaNetService::Stub::Tokenize, impl_->stub.get(), request));
  return std::vector<int64_t>(response.ids().begin(), response.ids().end());
}

absl::StatusOr<std::string> Client::Detokenize(const std::string& model,
                                               const std::vector<int64_t>& ids) const {
  v1::DetokenizeRequest request;
  request.set_model(model);
  request.mutable_ids()->Add(ids.begin(), ids.end());
  ASSIGN_OR_RETURN(const v1::DetokenizeResponse response,
                   impl_->Call(&v1::DeltaNetService::Stub::Detokenize, impl_->stub.get(), request));
  return response.text();
}

std::unique_ptr<ForwardStream> Client::OpenStream(const StreamOptions& options) const {
  return std::unique_ptr<ForwardStream>(
      new ForwardStream(std::make_unique<ForwardStream::Impl>(impl_->stub.get(), options)));
}

absl::StatusOr<ModelInfo> Client::GetModel(const std::string& model) const {
  v1::GetModelRequest request;
  request.set_model(model);
  ASSIGN_OR_RETURN(const v1::GetModelResponse response,
                   impl_->Call(&v1::DeltaNetService::Stub::GetModel, impl_->stub.get(), request));
  return FromProtoModelInfo(response.model());
}

absl::StatusOr<std::vector<ModelInfo>> Client::ListModels() const {
  ASSIGN_OR_RETURN(
      const v1::ListModelsResponse response,
      impl_->Call(&v1::DeltaNetService::Stub::ListModels, impl_->stub.get(), v1::ListModelsRequest()));
  std::vector<ModelInfo> models;
  for (const v1::ModelInfo& proto : response.models()) {
    ASSIGN_OR_RETURN(models.emplace_back(), FromProtoModelInfo(proto));
  }
  return models;
}

absl::StatusOr<int64_t> Client::EndSession(const std::string& session_id) const {
  v1::EndSessionRequest request;
  request.set_session_id(session_id);
  ASSIGN_OR_RETURN(const v1::EndSessionResponse response,
                   impl_->Call(&v1::DeltaNetService::Stub::EndSession, impl_->stub.get(), request));
  return response.committed_position();
}

absl::StatusOr<std::vector<SessionInfo>> Client::ListSessions(const std::string& model) const {
  std::vector<SessionInfo> sessions;
  v1::ListSessionsRequest request;
  request.set_model(model);
  do {
    ASSIGN_OR_RETURN(const v1::ListSessionsResponse page,
                     impl_->Call(&v1::DeltaNetService::Stub::ListSessions, impl_->stub.get(), request));
    for (const v1::SessionInfo& proto : page.sessions()) {
      ASSIGN_OR_RETURN(sessions.emplace_back(), FromProtoSessionInfo(proto));
    }
    request.set_page_token(page.next_page_token());
  } while (!request.page_token().empty());
  return sessions;
}

absl::StatusOr<HealthStatus> Client::CheckHealth(const std::string& service) const {
  using grpc::health::v1::HealthCheckResponse;
  grpc::health::v1::HealthCheckRequest request;
  request.set_service(service);
  ASSIGN_OR_RETURN(const HealthCheckResponse response,
                   impl_->Call(&grpc::health::v1::Health::Stub::Check, impl_->health.get(), request));
  switch (response.status()) {
    case HealthCheckResponse::SERVING:
      return HealthStatus::kServing;
    case HealthCheckResponse::NOT_SERVING:
      return HealthStatus::kNotServing;
    default:
      return HealthStatus::kUnknown;
  }
}

absl::StatusOr<std::string> Client::ServerVersion() const {
  ASSIGN_OR_RETURN(
      const v1::ListModelsResponse response,
      impl_->Call(&v1::DeltaNetService::Stub::ListModels, impl_->stub.get(), v1::ListModelsRequest()));
  return response.server_version();
}

}  // namespace deltanet
