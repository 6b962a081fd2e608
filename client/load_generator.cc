// One thread a connection does everything for it: sends, polls the connection for answers, and counts. What a
// thread holds is its own; only the start and the progress are shared.
#include "client/load_generator.h"

#include <grpcpp/grpcpp.h>

#include <algorithm>
#include <deque>
#include <limits>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "client/channel.h"
#include "client/load_course.h"
#include "client/messages.h"
#include "deltanet/v1/deltanet.grpc.pb.h"
#include "model/base/status_macros.h"
#include "proto/wire.h"

namespace deltanet {
namespace {

// How long answers are waited for when nothing more is sent.
constexpr std::chrono::seconds kGrace{5};
// What a message came to.
struct Answer {
  Instant intended;  // When it was to be sent.
  absl::Status status;
  absl::Duration queued;
  absl::Duration computing;
};

class Caller;

// Told by the callers of a connection, on its thread.
class CallerEvents {
 public:
  virtual ~CallerEvents() = default;
  virtual void OnAnswer(Caller* caller, const Answer& answer) = 0;
  // The caller will not answer again. `lost` messages were neither answered nor will be.
  virtual void OnEnded(Caller* caller, const absl::Status& status, int64_t lost) = 0;
};

enum class Op : uint8_t { kStarted, kWritten, kRead, kWritesDone, kFinished };

// One session, or one line of unary calls. Messages are answered in the order of sending.
class Caller {
 public:
  // What gRPC's queue gives back.
  struct Tag {
    Caller* caller;
    Op op;
  };

  explicit Caller(CallerEvents* events) : events_(events) {
    for (const Op op : {Op::kStarted, Op::kWritten, Op::kRead, Op::kWritesDone, Op::kFinished}) {
      tags_[static_cast<size_t>(op)] = {this, op};
    }
  }
  virtual ~Caller() = default;

  virtual void Start() = 0;
  void Send(Instant intended) {
    waiting_.push_back(intended);
    Pump();
  }
  // Ends once all is answered.
  void Close() {
    closing_ = true;
    Pump();
  }
  virtual void Cancel() = 0;
  virtual void OnEvent(Op op, bool ok) = 0;
  bool ended() const { return ended_; }

 protected:
  // Sends what can be sent.
  virtual void Pump() = 0;

  void* tag(Op op) { return &tags_[static_cast<size_t>(op)]; }

  CallerEvents* const events_;
  std::deque<Instant> waiting_;  // To be sent.
  std::deque<Instant> sent_;     // To be answered.
  bool closing_ = false;
  bool ended_ = false;

 private:
  Tag tags_[5];
};

class StreamCaller : public Caller {
 public:
  StreamCaller(CallerEvents* events, v1::DeltaNetService::Stub* stub, grpc::CompletionQueue* queue,
               v1::StreamForwardRequest request)
      : Caller(events), request_(std::move(request)) {
    stream_ = stub->PrepareAsyncStreamForward(&context_, queue);
  }

  void Start() override { stream_->StartCall(tag(Op::kStarted)); }
  void Cancel() override { context_.TryCancel(); }

  void OnEvent(Op op, bool ok) override {
    switch (op) {
      case Op::kStarted:
        started_ = ok;
        if (ok) {
          stream_->Read(&response_, tag(Op::kRead));
        } else {
          stream_->Finish(&status_, tag(Op::kFinished));
        }
        break;
      case Op::kWritten:
        writing_ = !ok;  // A broken stream is never written to again; its read fails too.
        break;
      case Op::kRead:
        if (ok) {
          TakeResponse();
        } else {
          stream_->Finish(&status_, tag(Op::kFinished));
        }
        break;
      case Op::kWritesDone:
        break;
      case Op::kFinished:
        ended_ = true;
        events_->OnEnded(this, FromGrpcStatus(status_), static_cast<int64_t>(waiting_.size() + sent_.size()));
        return;
    }
    Pump();
  }

 private:
  void Pump() override {
    if (!started_ || writing_ || ended_) return;
    if (!waiting_.empty()) {
      sent_.push_back(waiting_.front());
      waiting_.pop_front();
      writing_ = true;
      stream_->Write(request_, tag(Op::kWritten));
    } else if (closing_ && !writes_done_) {
      writes_done_ = true;
      stream_->WritesDone(tag(Op::kWritesDone));
    }
  }

  void TakeResponse() {
    if (sent_.empty()) {  // An answer to nothing: a server that we do not understand.
      Cancel();
      stream_->Read(&response_, tag(Op::kRead));
      return;
    }
    Answer answer{sent_.front()};
    sent_.pop_front();
    StreamResponse response = FromProtoResponse(&response_);
    answer.status = std::move(response.status);
    answer.queued = response.queued;
    answer.computing = response.computing;
    // After an error the session wants to be told that we know where it stands.
    if (answer.status.ok()) {
      request_.clear_expected_position();
    } else {
      request_.set_expected_position(response.committed_position);
    }
    stream_->Read(&response_, tag(Op::kRead));
    events_->OnAnswer(this, answer);
  }

  grpc::ClientContext context_;
  std::unique_ptr<grpc::ClientAsyncReaderWriter<v1::StreamForwardRequest, v1::StreamForwardResponse>> stream_;
  v1::StreamForwardRequest request_;
  v1::StreamForwardResponse response_;
  grpc::Status status_;
  bool started_ = false;
  bool writing_ = false;
  bool writes_done_ = false;
};

class UnaryCaller : public Caller {
 public:
  UnaryCaller(CallerEvents* events, v1::DeltaNetService::Stub* stub, grpc::CompletionQueue* queue,
              v1::ForwardRequest request)
      : Caller(events), stub_(stub), queue_(queue), request_(std::move(request)) {}

  void Start() override {}
  void Cancel() override {
    closing_ = true;
    if (context_) context_->TryCancel();
    Pump();
  }

  void OnEvent(Op /*op: always kFinished*/, bool /*ok: always*/) override {
    Answer answer{sent_.front()};
    sent_.pop_front();
    answer.status = FromGrpcStatus(status_);
    if (answer.status.ok()) {
      const absl::StatusOr<ForwardResult> result = FromProtoResponse(&response_);
      answer.status = result.status();
      if (result.ok()) {
        answer.queued = result->queued;
        answer.computing = result->computing;
      }
    }
    call_ = nullptr;
    context_ = nullptr;
    events_->OnAnswer(this, answer);
    Pump();
  }

 private:
  void Pump() override {
    if (!sent_.empty() || ended_) return;
    if (closing_) {
      ended_ = true;
      events_->OnEnded(this, absl::OkStatus(), static_cast<int64_t>(waiting_.size()));
      return;
    }
    if (waiting_.empty()) return;
    sent_.push_back(waiting_.front());
    waiting_.pop_front();
    context_ = std::make_unique<grpc::ClientContext>();
    call_ = stub_->PrepareAsyncForward(context_.get(), request_, queue_);
    call_->StartCall();
    call_->Finish(&response_, &status_, tag(Op::kFinished));
  }

  v1::DeltaNetService::Stub* const stub_;
  grpc::CompletionQueue* const queue_;
  const v1::ForwardRequest request_;
  v1::ForwardResponse response_;
  grpc::Status status_;
  std::unique_ptr<grpc::ClientContext> context_;
  std::unique_ptr<grpc::ClientAsyncResponseReader<v1::ForwardResponse>> call_;
};

// One TCP connection with its share of the sessions. Run is its thread; the results are there after it.
class Connection : public CallerEvents {
 public:
  Connection(const LoadOptions& options, int64_t index, std::shared_ptr<grpc::Channel> channel,
             Course* course)
      : options_(options),
        index_(index),
        course_(course),
        stub_(v1::DeltaNetService::NewStub(std::move(channel))) {
    for (int64_t session = index; session < options.sessions; session += options.connections) {
      if (options.unary) {
        ForwardOptions forward;
        forward.model = options.model;
        callers_.push_back(std::make_unique<UnaryCaller>(this, stub_.get(), &queue_,
                                                         ToProtoRequest(options.input.view(), forward)));
      } else {
        StreamRequest request;
        request.model = options.model;
        request.input = options.input.view();
        callers_.push_back(
            std::make_unique<StreamCaller>(this, stub_.get(), &queue_, ToProtoRequest(request)));
      }
    }
    live_ = static_cast<int64_t>(callers_.size());
  }

  void Run() {
    WarmUp();
    const std::optional<Instant> start = course_->AwaitStart(failure_);
    if (start) RunLoad(*start);
    CloseAll();
    course_->Leave();
  }

  // After Run.
  LatencyHistogram latencies;
  int64_t errors = 0;
  int64_t unanswered = 0;
  absl::Status first_error;
  absl::Duration elapsed;
  absl::Duration queued;  // Sums.
  absl::Duration computing;
  const absl::Status& failure() const { return failure_; }

 private:
  enum class Phase { kWarm, kLoad, kClose };

  void WarmUp() {
    for (const auto& caller : callers_) {
      caller->Start();
      Send(caller.get(), SteadyClock::now());
    }
    while (failure_.ok() && outstanding_ > 0) Next(SteadyClock::now() + std::chrono::seconds(1));
  }

  void RunLoad(Instant start) {
    phase_ = Phase::kLoad;
    start_ = start;
    end_ = options_.duration == absl::InfiniteDuration()
               ? Instant::max() - 2 * kGrace
               : start + std::chrono::duration_cast<Instant::duration>(
                             absl::ToChronoNanoseconds(options_.duration));
    if (!options_.rate) {
      for (const auto& caller : callers_) SendIfWanted(caller.get());
    }
    int64_t sequence = index_;  // Open loop: the connections take the messages in turn.
    size_t turn = 0;
    Instant give_up = end_ + kGrace;
    while (failure_.ok()) {
      const Instant now = SteadyClock::now();
      Instant wake = std::min(now + std::chrono::seconds(1), give_up);
      bool sending = now < end_;
      if (options_.rate) {
        const auto due = [&] {
          return start + std::chrono::duration_cast<Instant::duration>(
                             std::chrono::duration<double>(static_cast<double>(sequence) / *options_.rate));
        };
        const auto wanted = [&] { return due() < end_ && (!options_.count || sequence < *options_.count); };
        for (; wanted() && due() <= now; sequence += options_.connections) {
          if (Caller* const caller = NextLive(&turn)) Send(caller, due());
        }
        sending = wanted();
        if (sending) wake = std::min(wake, due());
      }
      if (outstanding_ == 0 && (!sending || !options_.rate)) break;
      if (!sending) give_up = std::min(give_up, now + kGrace);
      if (now >= give_up) break;
      Next(wake);
    }
    unanswered = outstanding_;
  }

  // Ends all streams, by force where answers are still out.
  void CloseAll() {
    phase_ = Phase::kClose;
    const bool orderly = failure_.ok() && outstanding_ == 0;
    for (const auto& caller : callers_) orderly ? caller->Close() : caller->Cancel();
    const Instant give_up = SteadyClock::now() + kGrace;
    while (live_ > 0 && SteadyClock::now() < give_up) Next(give_up);
    for (const auto& caller : callers_) {
      if (!caller->ended()) caller->Cancel();
    }
    while (live_ > 0) Next(SteadyClock::now() + std::chrono::seconds(1));
    queue_.Shutdown();
    void* tag;
    bool ok;
    while (queue_.Next(&tag, &ok)) {
    }
  }

  void Send(Caller* caller, Instant intended) {
    ++outstanding_;
    caller->Send(intended);
  }

  void SendIfWanted(Caller* caller) {
    const Instant now = SteadyClock::now();
    if (now < end_ && course_->Claim()) Send(caller, now);
  }

  Caller* NextLive(size_t* turn) {
    for (size_t i = 0; i < callers_.size(); ++i) {
      Caller* const caller = callers_[(*turn)++ % callers_.size()].get();
      if (!caller->ended()) return caller;
    }
    return nullptr;
  }

  // Handles one event, or returns at `wake` (or a little earlier).
  void Next(Instant wake) {
    void* tag;
    bool ok;
    if (!NextEvent(&queue_, wake, &tag, &ok)) return;
    const Caller::Tag& event = *static_cast<Caller::Tag*>(tag);
    event.caller->OnEvent(event.op, ok);
  }

  void OnAnswer(Caller* caller, const Answer& answer) override {
    --outstanding_;
    if (phase_ == Phase::kWarm) {
      failure_.Update(answer.status);
      return;
    }
    if (phase_ == Phase::kClose) return;
    const Instant now = SteadyClock::now();
    if (answer.status.ok()) {
      errors_in_a_row_ = 0;
      latencies.Add(absl::FromChrono(now - answer.intended));
      queued += answer.queued;
      computing += answer.computing;
      elapsed = absl::FromChrono(now - start_);
      course_->answered.fetch_add(1, std::memory_order_relaxed);
    } else {
      CountErrors(answer.status, 1);
    }
    if (!options_.rate && failure_.ok()) SendIfWanted(caller);
  }

  void OnEnded(Caller* /*caller*/, const absl::Status& status, int64_t lost) override {
    --live_;
    outstanding_ -= lost;
    if (phase_ == Phase::kClose) return;
    const absl::Status why = status.ok() ? absl::UnavailableError("the server has ended a stream") : status;
    if (phase_ == Phase::kWarm) {
      failure_.Update(why);
      return;
    }
    CountErrors(why, std::max<int64_t>(lost, 1));
    if (live_ == 0) failure_.Update(why);
  }

  void CountErrors(const absl::Status& status, int64_t count) {
    first_error.Update(status);
    errors += count;
    course_->errors.fetch_add(count, std::memory_order_relaxed);
    if (++errors_in_a_row_ >= kMaxErrorsInARow) failure_.Update(status);
  }

  const LoadOptions& options_;
  const int64_t index_;
  Course* const course_;
  const std::unique_ptr<v1::DeltaNetService::Stub> stub_;
  grpc::CompletionQueue queue_;
  std::vector<std::unique_ptr<Caller>> callers_;

  Phase phase_ = Phase::kWarm;
  Instant start_, end_;
  int64_t live_ = 0;         // Callers that have not ended.
  int64_t outstanding_ = 0;  // Messages given to callers and not answered.
  int errors_in_a_row_ = 0;
  absl::Status failure_;
};

}  // namespace

absl::StatusOr<LoadReport> GenerateLoad(const LoadOptions& options,
                                        const std::function<void(const LoadProgress&)>& progress) {
  if (options.sessions < 1 || options.connections < 1 || options.connections > options.sessions) {
    return absl::InvalidArgumentError(absl::StrCat("there are ", options.connections, " connections for ",
                                                   options.sessions, " sessions, want 1 to as many"));
  }
  if (options.duration == absl::InfiniteDuration() && !options.count) {
    return absl::InvalidArgumentError("neither duration nor count is given, want at least one");
  }
  if (options.rate && !(*options.rate > 0)) {
    return absl::InvalidArgumentError(absl::StrCat("rate is ", *options.rate, ", want more than 0"));
  }
  Course course(options.connections, options.count);
  std::vector<std::unique_ptr<Connection>> connections;
  for (int64_t i = 0; i < options.connections; ++i) {
    ASSIGN_OR_RETURN(std::shared_ptr<grpc::Channel> channel, MakeChannel(options.server, options.client));
    connections.push_back(std::make_unique<Connection>(options, i, std::move(channel), &course));
  }
  std::vector<std::thread> threads;
  for (const auto& connection : connections) threads.emplace_back([&connection] { connection->Run(); });
  const absl::Status warm = course.AwaitEnd(
      [&](absl::Duration elapsed) { progress({elapsed, course.answered.load(), course.errors.load()}); });
  for (std::thread& thread : threads) thread.join();
  RETURN_IF_ERROR(warm);

  LoadReport report;
  absl::Duration queued, computing;
  absl::Status first_error;
  for (const auto& connection : connections) {
    RETURN_IF_ERROR(connection->failure());
    report.latencies.Merge(connection->latencies);
    report.errors += connection->errors;
    report.unanswered += connection->unanswered;
    report.elapsed = std::max(report.elapsed, connection->elapsed);
    queued += connection->queued;
    computing += connection->computing;
    first_error.Update(connection->first_error);
  }
  report.answered = report.latencies.count();
  if (!first_error.ok()) {
    report.first_error =
        absl::StrCat(absl::StatusCodeToString(first_error.code()), ": ", first_error.message());
  }
  if (report.answered > 0) {
    report.mean_queued = queued / report.answered;
    report.mean_computing = computing / report.answered;
  }
  return report;
}

}  // namespace deltanet
