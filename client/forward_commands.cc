// forward and stream: a file's sequences through a model, in one call or chunk by chunk.
#include <deque>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "client/command.h"
#include "client/latency.h"
#include "client/sequences.h"
#include "model/base/mutex.h"
#include "model/base/safetensors.h"
#include "model/base/status_macros.h"

namespace deltanet {
namespace {

constexpr char kInputName[] = "input";
constexpr char kOutputName[] = "output";
constexpr int64_t kMaxTop = 64;  // Of the protocol.

// What forward and stream have in common.
struct SequenceFlags {
  ServerFlags server;
  std::string input;
  std::string output;
  std::string model;
  std::string session;
  bool create_session = false;
  std::optional<int64_t> expected_position;
  bool end_of_sequence = false;
  DType output_dtype = DType::kFloat32;
  absl::Duration timeout = absl::InfiniteDuration();

  void AddTo(FlagSet* flags) {
    server.AddTo(flags);
    flags->Add("input", "FILE",
               "safetensors file with tensor 'input': values [T,width] or [B,T,width], or ids [T] or [B,T]",
               &input);
    flags->Require("input");
    flags->Add("output", "FILE", "safetensors file to write tensor 'output' to", &output);
    flags->Require("output");
    AddModelFlag(flags, &model);
    flags->Add("session", "ID", "continue this session instead of beginning from nothing; one sequence only",
               &session);
    flags->Add("create-session", "make the session; without --session the server chooses its id",
               &create_session);
    flags->Add("expected-position", "N", "refuse unless the session has taken in exactly N tokens", 0,
               &expected_position);
    flags->Add("end-of-sequence",
               "these are the session's last tokens: it ends, and all that its output owes comes",
               &end_of_sequence);
    flags->Add("output-dtype", "of the output", &output_dtype);
    flags->Add("timeout", "TIME", "give up after this long, like 500ms or 10s", &timeout);
  }

  bool named() const { return !session.empty() || create_session; }

  absl::Status Check() const {
    if (named()) return absl::OkStatus();
    if (end_of_sequence) return absl::InvalidArgumentError("--end-of-sequence wants --session");
    if (expected_position) return absl::InvalidArgumentError("--expected-position wants --session");
    return absl::OkStatus();
  }
};

std::string Describe(const Tensor& tensor, int64_t position) {
  return absl::StrCat(DTypeName(tensor.dtype), ShapeString(tensor.shape), " from position ", position);
}

class ForwardCommand : public Command {
 public:
  void AddFlags(FlagSet* flags) override {
    flags_.AddTo(flags);
    flags->Add("last", "of the last token only, for a model over tokens", &last_);
    flags->Add("top", "N",
               "instead of 'output', tensors 'top_ids' and 'top_log_probs' [T,N] or [B,T,N]: the N (1 to 64) "
               "most likely next ids, for a model over tokens",
               1, &top_);
  }
  absl::Status CheckFlags(const FlagSet& /*flags*/) const override {
    if (top_.value_or(0) > kMaxTop) {
      return absl::InvalidArgumentError(absl::StrCat("--top is ", *top_, ", want at most ", kMaxTop));
    }
    return flags_.Check();
  }

  absl::Status Run(const Output& output) override {
    ASSIGN_OR_RETURN(const Tensor input, ReadTensor(flags_.input, kInputName));
    ASSIGN_OR_RETURN(const Client client, flags_.server.Connect());
    ForwardOptions options;
    options.model = flags_.model;
    if (flags_.named()) options.session = SessionChoice{flags_.session, flags_.create_session};
    options.output_dtype = flags_.output_dtype;
    options.end_of_sequence = flags_.end_of_sequence;
    options.expected_position = flags_.expected_position;
    options.timeout = flags_.timeout;
    options.output_options.last_only = last_;
    if (top_) {
      options.output_options.kind = OutputKind::kTop;
      options.output_options.top_tokens = static_cast<int32_t>(*top_);
    }
    const absl::Time start = absl::Now();
    ASSIGN_OR_RETURN(const ForwardResult result, client.Forward(input.view(), options));
    const absl::Duration elapsed = absl::Now() - start;
    if (top_) {
      RETURN_IF_ERROR(WriteTop(result, input, output));
    } else {
      RETURN_IF_ERROR(WriteTensor(flags_.output, kOutputName, result.output));
      output.out << "output " << Describe(result.output, result.output_position);
    }
    if (!result.session_id.empty()) {
      output.out << ", session " << result.session_id << " at " << result.committed_position;
    }
    output.out << absl::StrFormat(
        "\n%.3f ms: queued %.3f ms, computing %.3f ms\n", absl::ToDoubleMilliseconds(elapsed),
        absl::ToDoubleMilliseconds(result.queued), absl::ToDoubleMilliseconds(result.computing));
    return absl::OkStatus();
  }

 private:
  absl::Status WriteTop(const ForwardResult& result, const Tensor& input, const Output& output) const {
    ASSIGN_OR_RETURN(const Sequences sequences, Sequences::Of(input.view()));
    const int64_t values = static_cast<int64_t>(result.top.ids.size());
    if (result.top.k != *top_ || sequences.count() == 0 || values % (sequences.count() * *top_) != 0) {
      return absl::DataLossError(absl::StrCat("malformed response: ", values, " top ids, ", result.top.k,
                                              " a token, want ", *top_, " for as many tokens of each of ",
                                              sequences.count(), " sequences"));
    }
    Shape shape;
    if (sequences.batched()) shape.push_back(sequences.count());
    shape.push_back(values / (sequences.count() * *top_));
    shape.push_back(*top_);
    RETURN_IF_ERROR(WriteSafetensors(
        flags_.output, {{"top_ids", {result.top.ids.data(), shape, DType::kInt64, Device{}}},
                        {"top_log_probs", {result.top.log_probs.data(), shape, DType::kFloat32, Device{}}}}));
    output.out << "top " << ShapeString(shape) << " from position " << result.output_position;
    return absl::OkStatus();
  }

  SequenceFlags flags_;
  bool last_ = false;
  std::optional<int64_t> top_;
};

// Sends the chunks of all sequences side by side on one stream and joins the answers. The calling thread
// writes, one other reads. Used once.
class ChunkStream {
 public:
  ChunkStream(const SequenceFlags& flags, const Sequences& sequences, const std::vector<int64_t>& lengths,
              int64_t pipeline)
      : flags_(flags),
        sequences_(sequences),
        chunks_(CutChunks(sequences.tokens(), lengths)),
        pipeline_(pipeline),
        session_id_(flags.session),
        progress_(sequences.count()),
        joiner_(sequences.count(), sequences.batched()) {}

  // The joined output, or the first error.
  absl::StatusOr<Tensor> Run(const Client& client) {
    const std::unique_ptr<ForwardStream> stream = client.OpenStream({.timeout = flags_.timeout});
    const absl::Time start = absl::Now();
    std::thread reader([&] { ReadAll(stream.get()); });
    WriteAll(stream.get());
    reader.join();
    elapsed_ = absl::Now() - start;
    const absl::Status end = stream->Finish();
    MutexLock lock(&mu_);
    RETURN_IF_ERROR(failure_);
    RETURN_IF_ERROR(end);
    for (const Progress& progress : progress_) {
      if (progress.answered != chunks_.size()) {
        return absl::DataLossError(
            absl::StrCat("the stream ended after ", progress.answered, " answers of ", chunks_.size()));
      }
    }
    return joiner_.Join();
  }

  // After Run.
  const LatencyHistogram& latencies() const { return latencies_; }
  absl::Duration elapsed() const { return elapsed_; }
  int64_t output_position() const { return output_position_; }
  int64_t committed_position() const { return committed_position_; }
  const std::string& session_id() const ABSL_NO_THREAD_SAFETY_ANALYSIS { return session_id_; }

 private:
  struct Progress {
    size_t written = 0;
    size_t answered = 0;
    std::deque<absl::Time> sent;  // Of what is written and not answered.
  };

  // Waits for a sequence that may send its next chunk. False if there is nothing more to send.
  bool NextSequence(size_t* sequence) {
    MutexLock lock(&mu_);
    while (!stopped_) {
      bool all_written = true;
      // A session that the server has yet to name can only be written to again once its first answer is here.
      const int64_t window = flags_.named() && session_id_.empty() ? 1 : pipeline_;
      for (size_t i = 0; i < progress_.size(); ++i) {
        const size_t candidate = (*sequence + 1 + i) % progress_.size();
        const Progress& progress = progress_[candidate];
        if (progress.written == chunks_.size()) continue;
        all_written = false;
        if (static_cast<int64_t>(progress.sent.size()) < window) {
          *sequence = candidate;
          return true;
        }
      }
      if (all_written) return false;
      changed_.Wait(&mu_);
    }
    return false;
  }

  void WriteAll(ForwardStream* stream) {
    size_t sequence = sequences_.count() - 1;  // NextSequence begins behind it.
    while (NextSequence(&sequence)) {
      StreamRequest request;
      {
        MutexLock lock(&mu_);
        Progress& progress = progress_[sequence];
        const Chunk& chunk = chunks_[progress.written];
        const bool first = progress.written == 0, last = progress.written + 1 == chunks_.size();
        request.model = flags_.model;
        request.stream_session = static_cast<uint32_t>(sequence);
        if (flags_.named()) request.session = SessionChoice{session_id_, first && flags_.create_session};
        request.input = sequences_.Slice(static_cast<int64_t>(sequence), chunk.begin, chunk.length);
        request.output_dtype = flags_.output_dtype;
        request.end_of_sequence = last && (!flags_.named() || flags_.end_of_sequence);
        if (first) request.expected_position = flags_.expected_position;
        ++progress.written;
        progress.sent.push_back(absl::Now());
      }
      if (!stream->Write(request)) break;
    }
    stream->WritesDone();
  }

  void ReadAll(ForwardStream* stream) {
    StreamResponse response;
    while (stream->Read(&response)) {
      MutexLock lock(&mu_);
      failure_ = TakeLocked(response);
      if (!failure_.ok()) {
        stream->Cancel();
        break;
      }
      changed_.NotifyOne();
    }
    MutexLock lock(&mu_);
    stopped_ = true;
    changed_.NotifyOne();
  }

  absl::Status TakeLocked(const StreamResponse& response) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    RETURN_IF_ERROR(response.status);
    const size_t sequence = flags_.named() ? 0 : response.stream_session;
    if (sequence >= progress_.size() || progress_[sequence].sent.empty()) {
      return absl::DataLossError(
          absl::StrCat("an answer came for session ", sequence, ", which awaits none"));
    }
    Progress& progress = progress_[sequence];
    latencies_.Add(absl::Now() - progress.sent.front());
    progress.sent.pop_front();
    if (progress.answered++ == 0) output_position_ = response.output_position;
    committed_position_ = response.committed_position;
    if (flags_.named()) session_id_ = response.session_id;
    return joiner_.Add(static_cast<int64_t>(sequence), response.output_position, response.output);
  }

  const SequenceFlags& flags_;
  const Sequences& sequences_;
  const std::vector<Chunk> chunks_;  // Of each sequence.
  const int64_t pipeline_;

  Mutex mu_;
  CondVar changed_;
  bool stopped_ ABSL_GUARDED_BY(mu_) = false;  // No more answers will come.
  absl::Status failure_ ABSL_GUARDED_BY(mu_);
  std::string session_id_ ABSL_GUARDED_BY(mu_);
  std::vector<Progress> progress_ ABSL_GUARDED_BY(mu_);

  // The reader's, then Run's.
  OutputJoiner joiner_;
  LatencyHistogram latencies_;
  int64_t output_position_ = 0;
  int64_t committed_position_ = 0;
  absl::Duration elapsed_;
};

class StreamCommand : public Command {
 public:
  void AddFlags(FlagSet* flags) override {
    flags_.AddTo(flags);
    flags->Add("chunk", "N[,N...]", "tokens a message; a list is used in turn, round and round", 1, &chunk_);
    flags->Require("chunk");
    flags->Add("pipeline", "N", "messages of a sequence that may be unanswered at a time", 1, &pipeline_);
  }
  absl::Status CheckFlags(const FlagSet& /*flags*/) const override { return flags_.Check(); }

  absl::Status Run(const Output& output) override {
    ASSIGN_OR_RETURN(const Tensor input, ReadTensor(flags_.input, kInputName));
    ASSIGN_OR_RETURN(const Sequences sequences, Sequences::Of(input.view()));
    if (flags_.named() && sequences.batched()) {
      return absl::InvalidArgumentError(
          absl::StrCat("the input is ", ShapeString(input.shape), ", want one sequence for a named session"));
    }
    if (sequences.count() == 0)
      return absl::InvalidArgumentError("the input has no sequences, want at least 1");
    ASSIGN_OR_RETURN(const Client client, flags_.server.Connect());
    // Connects, so that the first chunk's latency is none of that.
    RETURN_IF_ERROR(client.GetModel(flags_.model).status());
    ChunkStream stream(flags_, sequences, chunk_, pipeline_);
    ASSIGN_OR_RETURN(const Tensor joined, stream.Run(client));
    RETURN_IF_ERROR(WriteTensor(flags_.output, kOutputName, joined));
    output.out << "output " << Describe(joined, stream.output_position());
    if (flags_.named())
      output.out << ", session " << stream.session_id() << " at " << stream.committed_position();
    const double seconds = absl::ToDoubleSeconds(stream.elapsed());
    output.out << absl::StrFormat("\n%d chunks in %.3f ms: %.0f tokens/s\nlatency of a chunk: %s\n",
                                  stream.latencies().count(), seconds * 1e3,
                                  static_cast<double>(sequences.count() * sequences.tokens()) / seconds,
                                  stream.latencies().Summary());
    return absl::OkStatus();
  }

 private:
  SequenceFlags flags_;
  std::vector<int64_t> chunk_;
  int64_t pipeline_ = 1;
};

}  // namespace

std::unique_ptr<Command> NewForwardCommand() { return std::make_unique<ForwardCommand>(); }
std::unique_ptr<Command> NewStreamCommand() { return std::make_unique<StreamCommand>(); }

}  // namespace deltanet
