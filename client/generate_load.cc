// One thread a connection does everything for it: sends, polls the connection for responses, and counts. What
// a thread holds is its own; only the start and the progress are shared. A response costs a look at the clock
// and a count in a histogram.
#include "client/generate_load.h"

#include <grpcpp/grpcpp.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <memory>
#include <random>
#include <thread>
#include <unordered_map>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "client/channel.h"
#include "client/load_course.h"
#include "deltanet/v1/deltanet.grpc.pb.h"
#include "model/base/status_macros.h"
#include "proto/wire.h"

namespace deltanet {
namespace {

// One connection's share of a report.
struct Tally {
  LatencyHistogram first_token, between_tokens, whole;
  std::map<std::string, int64_t> errors;
  absl::Status first_error;
  int64_t unanswered = 0;
  // Until the duration was over.
  int64_t requests = 0, prompt_tokens = 0, output_tokens = 0;
  absl::Duration elapsed;
  absl::Duration queued, computing;  // Sums.
};

// What connections share beside the course.
struct Counts {
  std::atomic<int64_t> tokens{0};
  std::atomic<int64_t> running{0};
};

class Call;

// Told by the calls of a connection, on its thread.
class CallEvents {
 public:
  virtual ~CallEvents() = default;
  // Tokens of `call` have come; `first` are its first.
  virtual void OnTokens(Call* call, int64_t count, bool first) = 0;
  // All has come that will. The call may be destroyed.
  virtual void OnEnd(Call* call, const absl::Status& status) = 0;
};

enum class Op : uint8_t { kStarted, kRead, kFinished };

// One Generate call.
class Call {
 public:
  // What gRPC's queue gives back.
  struct Tag {
    Call* call;
    Op op;
  };

  Call(CallEvents* events, const PlannedRequest& plan, Instant begin)
      : events_(events),
        begin_(begin),
        last_(begin),
        prompt_tokens_(static_cast<int64_t>(plan.prompt.size())),
        output_tokens_(plan.output_tokens) {}

  void Start(v1::DeltaNetService::Stub* stub, const v1::GenerateRequest& request,
             grpc::CompletionQueue* queue) {
    reader_ = stub->PrepareAsyncGenerate(&context_, request, queue);
    reader_->StartCall(&tags_[static_cast<size_t>(Op::kStarted)]);
  }
  void Cancel() { context_.TryCancel(); }

  void OnEvent(Op op, bool ok) {
    switch (op) {
      case Op::kStarted:
        break;
      case Op::kRead:
        if (ok) Take();
        break;
      case Op::kFinished:
        events_->OnEnd(this, Ending());
        return;
    }
    if (ok) {
      reader_->Read(&response_, &tags_[static_cast<size_t>(Op::kRead)]);
    } else {
      reader_->Finish(&status_, &tags_[static_cast<size_t>(Op::kFinished)]);
    }
  }

  // When it was meant to begin, and when its last tokens came.
  Instant begin() const { return begin_; }
  Instant last() const { return last_; }
  void set_last(Instant last) { last_ = last; }
  int64_t prompt_tokens() const { return prompt_tokens_; }
  // At the end.
  const v1::Timing& timing() const { return response_.timing(); }

 private:
  void Take() {
    const int64_t count = response_.tokens_size();
    if (count == 0) return;
    const bool first = received_ == 0;
    received_ += count;
    events_->OnTokens(this, count, first);
  }

  absl::Status Ending() const {
    if (!status_.ok()) return FromGrpcStatus(status_);
    if (received_ == output_tokens_ && response_.finish_reason() == v1::FINISH_REASON_LENGTH)
      return absl::OkStatus();
    return MakeError(absl::StatusCode::kDataLoss, "WRONG_LENGTH",
                     absl::StrCat("a request got ", received_, " tokens, want ", output_tokens_));
  }

  CallEvents* const events_;
  const Instant begin_;
  Instant last_;
  const int64_t prompt_tokens_;
  const int64_t output_tokens_;
  int64_t received_ = 0;
  grpc::ClientContext context_;
  std::unique_ptr<grpc::ClientAsyncReader<v1::GenerateResponse>> reader_;
  v1::GenerateResponse response_;
  grpc::Status status_;
  Tag tags_[3] = {{this, Op::kStarted}, {this, Op::kRead}, {this, Op::kFinished}};
};

// One TCP connection with its share of the requests. Run is its thread; the tally is there after it.
class Connection : public CallEvents {
 public:
  Connection(const GenerateLoadOptions& options, int64_t index, std::shared_ptr<grpc::Channel> channel,
             Course* course, Counts* counts)
      : options_(options),
        index_(index),
        course_(course),
        counts_(counts),
        stub_(v1::DeltaNetService::NewStub(std::move(channel))) {}

  void Run() {
    WarmUp();
    if (const std::optional<Instant> start = course_->AwaitStart(failure_)) RunLoad(*start);
    Close();
    course_->Leave();
  }

  // After Run.
  const Tally& tally() const { return tally_; }
  const absl::Status& failure() const { return failure_; }

 private:
  enum class Phase { kWarm, kLoad, kClose };

  // Of `all` things that the connections take in turn, those that are this one's.
  int64_t Share(int64_t all) const {
    return (all + options_.connections - 1 - index_) / options_.connections;
  }

  void WarmUp() {
    warm_left_ = Share(options_.warm_up);
    const int64_t at_a_time = options_.rate ? warm_left_ : Share(options_.concurrency);
    last_event_ = SteadyClock::now();
    for (int64_t i = 0; i < at_a_time; ++i) BeginNext();
    while (failure_.ok() && !calls_.empty()) {
      Next(Soon());
      if (Silent())
        failure_ = absl::DeadlineExceededError(
            absl::StrCat("nothing has come in the warm-up for ", absl::FormatDuration(options_.silence)));
    }
  }

  void RunLoad(Instant start) {
    phase_ = Phase::kLoad;
    start_ = last_event_ = start;
    end_ = options_.duration == absl::InfiniteDuration()
               ? Instant::max()
               : start + std::chrono::duration_cast<Instant::duration>(
                             absl::ToChronoNanoseconds(options_.duration));
    if (options_.rate) {
      RunOpenLoop();
    } else {
      for (int64_t i = Share(options_.concurrency); i > 0; --i) BeginNext();
      while (failure_.ok() && !calls_.empty() && !Silent()) Next(Soon());
    }
    tally_.unanswered = static_cast<int64_t>(calls_.size());
    tally_.elapsed = absl::FromChrono(std::min(last_event_, end_) - start_);
  }

  void RunOpenLoop() {
    Arrivals arrivals(*options_.rate, options_.seed);
    int64_t number = -1;
    Instant due = start_;
    // On to the next that is this connection's. False if there is none.
    const auto advance = [&] {
      do {
        due = start_ +
              std::chrono::duration_cast<Instant::duration>(std::chrono::duration<double>(arrivals.Next()));
        ++number;
      } while (number % options_.connections != index_ && due < end_);
      return due < end_ && (!options_.requests || number < *options_.requests);
    };
    bool more = advance();
    while (failure_.ok() && (more || !calls_.empty())) {
      const Instant now = SteadyClock::now();
      for (; more && due <= now; more = advance()) Begin(number, due);
      if (!calls_.empty() && Silent()) break;
      if (calls_.empty()) last_event_ = SteadyClock::now();  // Nothing can come.
      Next(more ? std::min(due, Soon()) : Soon());
    }
    if (due >= end_ && calls_.empty())
      last_event_ = std::max(last_event_, end_);  // Till then more might have come.
  }

  // When to look around even if nothing comes.
  Instant Soon() const {
    return SteadyClock::now() + std::chrono::duration_cast<Instant::duration>(absl::ToChronoNanoseconds(
                                    std::min(absl::Seconds(1), options_.silence / 4)));
  }
  bool Silent() const { return absl::FromChrono(SteadyClock::now() - last_event_) > options_.silence; }

  // Ends what is still under way, by force.
  void Close() {
    phase_ = Phase::kClose;
    for (const auto& [call, owned] : calls_) call->Cancel();
    while (!calls_.empty()) Next(Soon());
    queue_.Shutdown();
    void* tag;
    bool ok;
    while (queue_.Next(&tag, &ok)) {
    }
  }

  // Begins one more of the warm-up or the closed loop, if there is one.
  void BeginNext() {
    const Instant now = SteadyClock::now();
    if (phase_ == Phase::kWarm) {
      if (warm_left_ == 0) return;
      --warm_left_;
      Begin(-1 - (index_ + warm_left_ * options_.connections), now);
    } else if (now < end_) {
      if (const std::optional<int64_t> number = course_->Claim()) Begin(*number, now);
    }
  }

  void Begin(int64_t number, Instant begin) {
    const PlannedRequest plan = PlanRequest(options_, number);
    v1::GenerateRequest request;
    request.set_model(options_.model);
    request.mutable_ids()->mutable_ids()->Add(plan.prompt.begin(), plan.prompt.end());
    request.set_max_tokens(plan.output_tokens);
    request.set_ignore_eos(true);
    request.mutable_sampling()->set_temperature(options_.sampling.temperature);
    request.mutable_sampling()->set_top_k(options_.sampling.top_k);
    request.mutable_sampling()->set_top_p(options_.sampling.top_p);
    if (options_.sampling.seed) {
      request.mutable_sampling()->set_seed(*options_.sampling.seed + static_cast<uint64_t>(number));
    }
    auto call = std::make_unique<Call>(this, plan, begin);
    Call* const started = call.get();
    calls_.emplace(started, std::move(call));
    counts_->running.fetch_add(1, std::memory_order_relaxed);
    started->Start(stub_.get(), request, &queue_);
  }

  // Handles one event, or returns at `wake` (or a little earlier).
  void Next(Instant wake) {
    void* tag;
    bool ok;
    if (!NextEvent(&queue_, wake, &tag, &ok)) return;
    const Call::Tag event = *static_cast<Call::Tag*>(tag);
    event.call->OnEvent(event.op, ok);
  }

  void OnTokens(Call* call, int64_t count, bool first) override {
    const Instant now = SteadyClock::now();
    const Instant since = first ? call->begin() : call->last();
    call->set_last(now);
    last_event_ = now;
    errors_in_a_row_ = 0;
    if (phase_ != Phase::kLoad) return;
    (first ? tally_.first_token : tally_.between_tokens).Add(absl::FromChrono(now - since));
    for (int64_t i = 1; i < count; ++i) tally_.between_tokens.Add(absl::ZeroDuration());
    if (now < end_) {
      tally_.output_tokens += count;
      if (first) tally_.prompt_tokens += call->prompt_tokens();
    }
    counts_->tokens.fetch_add(count, std::memory_order_relaxed);
  }

  void OnEnd(Call* call, const absl::Status& status) override {
    const auto owned = calls_.extract(call);  // Destroys it at the end of this.
    counts_->running.fetch_sub(1, std::memory_order_relaxed);
    last_event_ = SteadyClock::now();
    if (phase_ == Phase::kClose) return;
    if (phase_ == Phase::kWarm) {
      failure_.Update(status);
    } else {
      Count(*call, status);
    }
    if (failure_.ok() && (phase_ == Phase::kWarm || !options_.rate)) BeginNext();
  }

  void Count(const Call& call, const absl::Status& status) {
    if (!status.ok()) {
      const std::string reason = ErrorReason(status);
      ++tally_.errors[reason.empty() ? absl::StatusCodeToString(status.code()) : reason];
      tally_.first_error.Update(status);
      course_->errors.fetch_add(1, std::memory_order_relaxed);
      if (++errors_in_a_row_ >= kMaxErrorsInARow) failure_.Update(status);
      return;
    }
    tally_.whole.Add(absl::FromChrono(last_event_ - call.begin()));
    if (last_event_ < end_) ++tally_.requests;
    course_->answered.fetch_add(1, std::memory_order_relaxed);
    const absl::StatusOr<absl::Duration> queued = FromProtoDuration(call.timing().queued());
    const absl::StatusOr<absl::Duration> computing = FromProtoDuration(call.timing().computing());
    if (queued.ok()) tally_.queued += *queued;
    if (computing.ok()) tally_.computing += *computing;
  }

  const GenerateLoadOptions& options_;
  const int64_t index_;
  Course* const course_;
  Counts* const counts_;
  const std::unique_ptr<v1::DeltaNetService::Stub> stub_;
  grpc::CompletionQueue queue_;
  std::unordered_map<Call*, std::unique_ptr<Call>> calls_;  // Under way.

  Phase phase_ = Phase::kWarm;
  int64_t warm_left_ = 0;  // To be begun.
  Instant start_, end_;
  Instant last_event_;
  int errors_in_a_row_ = 0;
  absl::Status failure_;
  Tally tally_;
};

absl::Status Validate(const GenerateLoadOptions& options) {
  if (options.connections < 1 || options.concurrency < 1 ||
      (!options.rate && options.connections > options.concurrency)) {
    return absl::InvalidArgumentError(absl::StrCat("there are ", options.connections, " connections for ",
                                                   options.concurrency,
                                                   " requests at a time, want 1 to as many"));
  }
  if (options.duration == absl::InfiniteDuration() && !options.requests) {
    return absl::InvalidArgumentError("neither duration nor requests is given, want at least one");
  }
  if (options.rate && !(*options.rate > 0)) {
    return absl::InvalidArgumentError(absl::StrCat("rate is ", *options.rate, ", want more than 0"));
  }
  if (options.silence <= absl::ZeroDuration()) {
    return absl::InvalidArgumentError(
        absl::StrCat("silence is ", absl::FormatDuration(options.silence), ", want more than 0"));
  }
  if (options.vocab_size < 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("vocab_size is ", options.vocab_size, ", want at least 1"));
  }
  for (const LengthRange& range : {options.prompt_tokens, options.output_tokens}) {
    if (range.min < 1 || range.max < range.min) {
      return absl::InvalidArgumentError(absl::StrCat("lengths are from ", range.min, " to ", range.max,
                                                     ", want 1 or more, and not falling"));
    }
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<LengthRange> ParseLengthRange(const std::string& text) {
  const std::vector<std::string> parts = absl::StrSplit(text, ':');
  LengthRange range;
  bool right = false;
  if (parts.size() == 1) {
    right = absl::SimpleAtoi(parts[0], &range.min);
    range.max = range.min;
  } else if (parts.size() == 3 && parts[0] == "uniform") {
    right = absl::SimpleAtoi(parts[1], &range.min) && absl::SimpleAtoi(parts[2], &range.max);
  }
  if (!right || range.min < 1 || range.max < range.min) {
    return absl::InvalidArgumentError(
        absl::StrCat("is '", text, "', want a number of at least 1, or uniform:MIN:MAX"));
  }
  return range;
}

PlannedRequest PlanRequest(const GenerateLoadOptions& options, int64_t index) {
  // Neighbours' generators have nothing in common.
  std::seed_seq seed{static_cast<uint32_t>(options.seed), static_cast<uint32_t>(options.seed >> 32),
                     static_cast<uint32_t>(index), static_cast<uint32_t>(static_cast<uint64_t>(index) >> 32)};
  std::mt19937_64 random(seed);
  const auto draw = [&random](int64_t min, int64_t max) {
    return std::uniform_int_distribution<int64_t>(min, max)(random);
  };
  PlannedRequest plan;
  plan.output_tokens = draw(options.output_tokens.min, options.output_tokens.max);
  plan.prompt.resize(draw(options.prompt_tokens.min, options.prompt_tokens.max));
  for (int64_t& id : plan.prompt) id = draw(0, options.vocab_size - 1);
  return plan;
}

absl::StatusOr<GenerateLoadReport> RunGenerateLoad(
    const GenerateLoadOptions& options, const std::function<void(const GenerateLoadProgress&)>& progress) {
  RETURN_IF_ERROR(Validate(options));
  Course course(options.connections, options.requests);
  Counts counts;
  std::vector<std::unique_ptr<Connection>> connections;
  for (int64_t i = 0; i < options.connections; ++i) {
    ASSIGN_OR_RETURN(std::shared_ptr<grpc::Channel> channel, MakeChannel(options.server, options.client));
    connections.push_back(std::make_unique<Connection>(options, i, std::move(channel), &course, &counts));
  }
  std::vector<std::thread> threads;
  for (const auto& connection : connections) threads.emplace_back([&connection] { connection->Run(); });
  const absl::Status warm = course.AwaitEnd([&](absl::Duration elapsed) {
    progress(
        {elapsed, course.answered.load(), course.errors.load(), counts.tokens.load(), counts.running.load()});
  });
  for (std::thread& thread : threads) thread.join();
  RETURN_IF_ERROR(warm);

  Tally all;
  GenerateLoadReport report;
  for (const auto& connection : connections) {
    RETURN_IF_ERROR(connection->failure());
    const Tally& tally = connection->tally();
    report.first_token.Merge(tally.first_token);
    report.between_tokens.Merge(tally.between_tokens);
    report.whole.Merge(tally.whole);
    for (const auto& [reason, count] : tally.errors) report.errors[reason] += count;
    report.unanswered += tally.unanswered;
    report.elapsed = std::max(report.elapsed, tally.elapsed);
    all.requests += tally.requests;
    all.prompt_tokens += tally.prompt_tokens;
    all.output_tokens += tally.output_tokens;
    all.queued += tally.queued;
    all.computing += tally.computing;
    all.first_error.Update(tally.first_error);
  }
  report.answered = report.whole.count();
  if (!all.first_error.ok()) {
    report.first_error =
        absl::StrCat(absl::StatusCodeToString(all.first_error.code()), ": ", all.first_error.message());
  }
  if (const double seconds = absl::ToDoubleSeconds(report.elapsed); seconds > 0) {
    report.requests_per_second = static_cast<double>(all.requests) / seconds;
    report.prompt_tokens_per_second = static_cast<double>(all.prompt_tokens) / seconds;
    report.output_tokens_per_second = static_cast<double>(all.output_tokens) / seconds;
  }
  if (report.answered > 0) {
    report.mean_queued = all.queued / report.answered;
    report.mean_computing = all.computing / report.answered;
  }
  return report;
}

}  // namespace deltanet
