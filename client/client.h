// The C++ client of the DeltaNet inference service. What sessions, positions and look-ahead mean, and which
// errors come back when, is said in proto/deltanet/v1/deltanet.proto; ErrorReason and ErrorMetadata of
// proto/wire.h read an error's details. No gRPC types here, so that users compile quickly.
//
//   ASSIGN_OR_RETURN(Client client, Client::Connect("localhost:50051", {}));
//   std::unique_ptr<ForwardStream> stream = client.OpenStream({});
//   stream->Write({.input = chunk});
//   StreamResponse response;
//   while (stream->Read(&response)) { ... }
//   RETURN_IF_ERROR(stream->Finish());
//
//   const auto show = [](const Generated& part) { return static_cast<bool>(std::cout << part.text); };
//   ASSIGN_OR_RETURN(Generated answer, client.Generate({.prompt = "Once upon", .max_tokens = 64}, show));
#ifndef DELTANET_CLIENT_CLIENT_H_
#define DELTANET_CLIENT_CLIENT_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "model/base/tensor_view.h"

namespace deltanet {

// The version of this library, as "0.1.0".
absl::string_view ClientVersion();

// A dense row-major tensor that owns its bytes.
struct Tensor {
  DType dtype = DType::kFloat32;
  Shape shape;
  std::string data;  // NumElements(shape) * DTypeBytes(dtype) bytes.

  // Valid while this tensor lives and is not changed.
  TensorView view() const { return {data.data(), shape, dtype, Device{}}; }
};

// Paths of PEM files.
struct TlsOptions {
  std::string ca;           // Roots that vouch for the server; empty: those that gRPC finds on this machine.
  std::string certificate;  // This client's, for servers that want one; with `key`, or neither.
  std::string key;
};

struct ClientOptions {
  // Read by Connect; INVALID_ARGUMENT names a file that cannot be read. Nothing: without TLS.
  std::optional<TlsOptions> tls;
  // Largest message that is taken from the server; a larger one is RESOURCE_EXHAUSTED.
  int64_t max_message_bytes = int64_t{1} << 30;
  // Of the calls that compute nothing: all but Forward, Score, Top, OpenStream, OpenGeneration and Generate,
  // which have their own.
  absl::Duration timeout = absl::Seconds(10);
};

// A session that outlives the call.
struct SessionChoice {
  std::string id;       // With `create` it may be empty: the server makes one, and the response says it.
  bool create = false;  // Make it; it must not exist. Otherwise it must.
  absl::Duration idle_ttl = absl::ZeroDuration();  // With `create`; zero: the server's default.
};

// What is made of the outputs of a model over tokens; other models have kValues alone.
enum class OutputKind {
  kValues,  // `output`: the logits.
  kTop,     // `top`: the most likely next ids.
  kScores,  // `log_probs` of the given ids, and of what was expected in their place `top`, with top_tokens.
};

struct OutputOptions {
  OutputKind kind = OutputKind::kValues;
  bool last_only = false;  // kValues and kTop: of the last token only.
  int32_t top_tokens = 0;  // kTop: 1 to 64. kScores: 0 to 64.
};

// The k most likely ids of each of n positions and their natural log-probabilities: [n, k], most likely
// first.
struct TopTokens {
  int32_t k = 0;
  std::vector<int64_t> ids;
  std::vector<float> log_probs;
};

struct ForwardOptions {
  std::string request_id;                // Echoed, and named in the server's log; may be empty.
  std::string model;                     // May be empty if the server has exactly one.
  std::optional<SessionChoice> session;  // Nothing: stateless.
  DType output_dtype = DType::kFloat32;
  bool end_of_sequence = false;              // With a session.
  std::optional<int64_t> expected_position;  // With a session.
  OutputOptions output_options;
  absl::Duration timeout = absl::InfiniteDuration();
};

struct ForwardResult {
  std::string request_id;
  Tensor output;  // kValues: [T', width] or [B, T, width]; otherwise there is none: [0].
  int64_t output_position = 0;
  int64_t committed_position = 0;
  std::string session_id;
  absl::Duration queued;
  absl::Duration computing;
  TopTokens top;  // Of a batch, one sequence behind the other.
  // kScores: the first is of the id at output_position (1 in a fresh sequence).
  std::vector<float> log_probs;
};

// One message of a stream.
struct StreamRequest {
  std::string request_id;
  std::string model;            // May be empty: the model of the stream's first message, or the only one.
  uint32_t stream_session = 0;  // A session of the stream's own...
  std::optional<SessionChoice> session;  // ...unless this names one that outlives it.
  TensorView input;                      // [T, width] or ids [T]. Read before Write returns.
  DType output_dtype = DType::kFloat32;
  bool end_of_sequence = false;
  std::optional<int64_t> expected_position;
  OutputOptions output_options;
  absl::Duration timeout = absl::InfiniteDuration();  // Of this message, from its arrival.
};

struct StreamResponse {
  std::string request_id;
  uint32_t stream_session = 0;  // Where session_id is empty.
  std::string session_id;
  absl::Status status;  // An error: the message was not applied, and there is no output. The stream goes on.
  Tensor output;        // [T', width]
  int64_t output_position = 0;
  int64_t committed_position = 0;  // Also after an error.
  absl::Duration queued;
  absl::Duration computing;
  TopTokens top;  // As in ForwardResult.
  std::vector<float> log_probs;
};

struct StreamOptions {
  absl::Duration timeout = absl::InfiniteDuration();  // Of the whole stream.
};

// One StreamForward call. One thread may write while another reads; Cancel may be called from any. The
// destructor cancels a stream that is not finished. May outlive its Client.
class ForwardStream {
 public:
  ~ForwardStream();
  ForwardStream(const ForwardStream&) = delete;
  ForwardStream& operator=(const ForwardStream&) = delete;

  // Sends one message. Blocks while the server does not read. False if the stream has ended: Finish says why.
  bool Write(const StreamRequest& request);
  // No more messages come from here. What is still to be answered can be read. Any number of times.
  void WritesDone();

  // Blocks until a response comes. False at the end of the stream, regular or not, which Finish tells apart;
  // `response` is then unspecified. A response that is malformed has DATA_LOSS as its status.
  bool Read(StreamResponse* response);

  // Gives up the stream: blocked calls return, Finish says CANCELLED.
  void Cancel();

  // Ends the writing, reads and drops what has not been read, and returns how the stream ended. Blocks. No
  // other call may be under way or follow, but Cancel, and Finish, which says the same again.
  absl::Status Finish();

 private:
  friend class Client;
  class Impl;
  explicit ForwardStream(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

// How the next token is chosen: of softmax(logits / temperature), the top_k most likely, of these the
// shortest prefix that has top_p of their probability.
struct SamplingOptions {
  float temperature = 0;  // 0: the most likely token, always.
  int32_t top_k = 0;      // 0: all.
  float top_p = 1;        // In (0, 1].
  // The same seed, session and request give the same tokens. Nothing: the server chooses one, and says it.
  std::optional<uint64_t> seed;
};

struct GenerateOptions {
  std::string request_id;  // Echoed, and named in the server's log; may be empty.
  std::string model;       // May be empty if the server has exactly one.
  // Nothing: the sequence is this call's own, and gone with it. Otherwise the session takes in the prompt and
  // what is generated; a call that fails or is cancelled leaves it where it was.
  std::optional<SessionChoice> session;
  // Ids, or a text (UTF-8) for a model with a tokenizer. A fresh sequence's text begins with the model's
  // begin-of-sequence id, and so does an empty prompt. May be empty where a session goes on from what it has.
  std::variant<std::vector<int64_t>, std::string> prompt;
  SamplingOptions sampling;
  int64_t max_tokens = 0;  // 0: the server's default.
  // Generation ends with one of these ids, and with the model's own end-of-sequence ids, unless they are
  // ignored.
  std::vector<int64_t> stop_ids;
  bool ignore_eos = false;
  // Generation ends where the text contains one of these; the text is cut before it, the tokens are not.
  std::vector<std::string> stop;
  // Say the log-probability of each token, and this many (0 to 64) of the most likely in its place.
  std::optional<int32_t> top_log_probs;
  std::optional<int64_t> expected_position;           // With a session.
  absl::Duration timeout = absl::InfiniteDuration();  // Of the whole call.
};

struct TokenResult {
  int64_t id = 0;
  float log_prob = 0;            // Natural logarithms; with top_log_probs, as the rest.
  std::vector<int64_t> top_ids;  // Most likely first.
  std::vector<float> top_log_probs;
};

enum class FinishReason {
  kNone,      // It goes on.
  kLength,    // max_tokens.
  kStopId,    // stop_ids or an end-of-sequence id.
  kStopText,  // A string of `stop`.
};
// "length", "stop_id", "stop_text"; "none".
absl::string_view FinishReasonName(FinishReason reason);

// One response of a Generate call, or all of a call joined.
struct Generated {
  std::string request_id;
  std::string session_id;           // If there is one.
  std::vector<TokenResult> tokens;  // The new ones.
  std::string text;                 // With a tokenizer: the new text, whole characters.
  uint64_t seed = 0;                // In the first response: the seed in use, if a temperature is.
  // In the last response, as all below.
  FinishReason finish_reason = FinishReason::kNone;
  std::string matched_stop;  // kStopText.
  int64_t prompt_tokens = 0;
  int64_t generated_tokens = 0;
  absl::Duration time_to_first_token;  // In the server, from the call's arrival.
  int64_t committed_position = 0;      // Of the session.
  absl::Duration queued;
  absl::Duration computing;
};

// One Generate call. One thread reads; Cancel may be called from any. The destructor cancels a call that is
// not finished. May outlive its Client.
class GenerationStream {
 public:
  ~GenerationStream();
  GenerationStream(const GenerationStream&) = delete;
  GenerationStream& operator=(const GenerationStream&) = delete;

  // Blocks until a response comes. False at the end of the call, regular or not, which Finish tells apart;
  // `response` is then unspecified.
  bool Read(Generated* response);

  // Gives up the call: a blocked Read returns, Finish says CANCELLED.
  void Cancel();

  // Reads and drops what has not been read, and returns how the call ended. Blocks. DATA_LOSS if a response
  // was malformed, or if none has said why generation ended. No other call may be under way or follow, but
  // Cancel, and Finish, which says the same again.
  absl::Status Finish();

 private:
  friend class Client;
  class Impl;
  explicit GenerationStream(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

struct ModelInfo {
  std::string name;
  std::string family;
  std::vector<DType> input_dtypes;
  int64_t input_width = 0;  // 0 for a model over tokens.
  int64_t vocab_size = 0;   // 0 for a model over values.
  int64_t output_width = 0;
  std::vector<DType> output_dtypes;
  int64_t parameters = 0;
  DType compute_dtype = DType::kFloat32;
  bool deterministic = false;
  std::string device;
  int64_t lookahead = 0;
  int64_t bytes_per_session = 0;
  int64_t sessions = 0;
  int64_t sessions_free = 0;
  int64_t max_response_bytes = 0;
  bool generates = false;  // And scores.
  bool has_tokenizer = false;
  std::optional<int64_t> bos_id;
  std::vector<int64_t> eos_ids;
  int64_t max_generated_tokens = 0;  // Of one call.
};

struct SessionInfo {
  std::string id;
  std::string model;
  int64_t committed_position = 0;
  bool attached = false;
  absl::Duration idle;
  absl::Duration idle_ttl;
};

// As grpc.health.v1 has it.
enum class HealthStatus { kUnknown, kServing, kNotServing };

// A connection to one server. Thread-safe; every call blocks its caller. Movable; a moved-from client may
// only be destroyed.
class Client {
 public:
  // `target` as gRPC names servers: "host:port", "unix:/path". Blocks until there is a connection, for a
  // second at most; without one all the same: a server that is not there is UNAVAILABLE in the first call, and
  // one that comes back is found again. Each Client has its own TCP connection. INVALID_ARGUMENT for an empty
  // target or options out of range.
  static absl::StatusOr<Client> Connect(const std::string& target, const ClientOptions& options);

  Client(Client&& other) noexcept;
  Client& operator=(Client&& other) noexcept;
  ~Client();

  // `input`: [T, width], ids [T], or stateless also [B, T, width], ids [B, T].
  absl::StatusOr<ForwardResult> Forward(const TensorView& input, const ForwardOptions& options) const;

  // What a model over tokens gives each of `ids` after those before, and with `top_tokens` (0 to 64) what it
  // expected in its place: Forward with kScores, whatever options.output_options says. DATA_LOSS unless there
  // is one log-probability for each token from output_position to committed_position.
  absl::StatusOr<ForwardResult> Score(const std::vector<int64_t>& ids, int32_t top_tokens,
                                      const ForwardOptions& options) const;
  // The `top_tokens` (1 to 64) ids that a model over tokens expects to follow `ids`: Forward with kTop of the
  // last token.
  absl::StatusOr<ForwardResult> Top(const std::vector<int64_t>& ids, int32_t top_tokens,
                                    const ForwardOptions& options) const;

  // Never fails by itself: the first Read or Write of a stream to a server that is not there returns false.
  std::unique_ptr<ForwardStream> OpenStream(const StreamOptions& options) const;

  // Never fails by itself: Read returns false, and Finish says why.
  std::unique_ptr<GenerationStream> OpenGeneration(const GenerateOptions& options) const;
  // The same to its end: `on_response` (may be null) sees each response, on the calling thread, and cancels
  // the call by returning false. Returns all of them joined, or how the call failed: CANCELLED where it was.
  absl::StatusOr<Generated> Generate(const GenerateOptions& options,
                                     const std::function<bool(const Generated& response)>& on_response) const;

  // Text to ids by the model's tokenizer, with `add_bos` behind its begin-of-sequence id as Generate has it;
  // and back.
  absl::StatusOr<std::vector<int64_t>> Tokenize(const std::string& model, const std::string& text,
                                                bool add_bos) const;
  absl::StatusOr<std::string> Detokenize(const std::string& model, const std::vector<int64_t>& ids) const;

  // `model` may be empty if the server has exactly one.
  absl::StatusOr<ModelInfo> GetModel(const std::string& model) const;
  absl::StatusOr<std::vector<ModelInfo>> ListModels() const;
  // Returns where the session stood.
  absl::StatusOr<int64_t> EndSession(const std::string& session_id) const;
  // All named sessions of `model` (empty: of all models), in the order of their ids. Several calls where
  // there are many.
  absl::StatusOr<std::vector<SessionInfo>> ListSessions(const std::string& model) const;
  // Of the server (empty), or of a model's name. NOT_FOUND for one that the server does not know.
  absl::StatusOr<HealthStatus> CheckHealth(const std::string& service) const;
  absl::StatusOr<std::string> ServerVersion() const;

 private:
  class Impl;
  explicit Client(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace deltanet

#endif  // DELTANET_CLIENT_CLIENT_H_
