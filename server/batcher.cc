#include "server/batcher.h"

#include <algorithm>
#include <deque>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/types/span.h"
#include "model/base/check.h"
#include "model/base/mutex.h"
#include "model/base/status_macros.h"
#include "proto/wire.h"

namespace deltanet {
namespace {

// The next piece of `remaining` tokens for somebody whose share is `share` tokens, at least 64, where `room`
// are left: all of them, or a multiple of 64 that leaves more than kFewTokens; 0 if none fits. A share may be
// exceeded by kFewTokens, for what would be left alone otherwise.
int64_t FitPiece(int64_t remaining, int64_t share, int64_t room) {
  if (remaining <= std::min(share + kFewTokens, room)) return remaining;
  const int64_t piece = std::min(share, room) / kCutTokens * kCutTokens;
  return remaining - piece > kFewTokens ? piece : std::max<int64_t>(0, piece - kCutTokens);
}

int64_t RowBytes(int64_t rows, int64_t width, DType dtype) { return rows * width * DTypeBytes(dtype); }

// A work in its lane's queue.
struct QueuedWork {
  std::unique_ptr<Work> work;
  absl::Time submitted;
  int64_t total = 0;     // Tokens to feed, flush tokens included.
  int64_t fed = 0;       // Of them, put into steps.
  int in_flight = 0;     // Steps formed with a piece of it and not done.
  // Of a generation.
  int64_t sampled = 0;       // Rows formed that choose a token.
  int64_t given = 0;         // Tokens given to on_token.
  int64_t fed_back = 0;      // Rows formed that feed a chosen token.
  bool stopped = false;      // The last token has been given.
  absl::Time last_token;     // When a token was given last; before: when the work was submitted.
  absl::Duration first_token;
  bool started = false;  // Has been in a step.
  absl::Duration queued;
  absl::Duration computing;
  // Why it was given up while in flight: its buffers are in use until no step has it any more.
  absl::Status error;
};

// What a generation's next row does, once its prompt is in steps.
enum class NextRow {
  kNone,      // Nothing, until a token is known, or for good.
  kSample,    // The first token, from what the lane carries: there is no prompt.
  kFeedSample,  // Feeds the last token chosen and chooses the next.
  kFeed,      // Feeds the last token, so that the lane has it.
};

// At most one token is chosen ahead of what is known: when a token turns out to be the last, no row has fed
// anything beyond it.
NextRow NextGenerationRow(const QueuedWork& head) {
  const Generation& generation = *head.work->generation;
  if (head.in_flight > 1) return NextRow::kNone;
  if (!head.stopped && head.sampled < generation.max_tokens) {
    return head.sampled == 0 ? NextRow::kSample : NextRow::kFeedSample;
  }
  const int64_t last = head.stopped ? head.given : generation.max_tokens;
  return generation.keep_state && head.fed_back < last ? NextRow::kFeed : NextRow::kNone;
}

bool Generating(const QueuedWork& head) {
  return head.work->generation != nullptr && head.fed == head.total && (head.total == 0 || head.sampled > 0);
}

// Whether a row of the work can be put into a step.
bool HasRow(const QueuedWork& head) {
  if (head.fed < head.total) return true;
  return Generating(head) && NextGenerationRow(head) != NextRow::kNone;
}

// Whether all of the work has been computed; only if none of it is in flight.
bool Finished(const QueuedWork& head) {
  if (head.fed < head.total) return false;
  if (head.work->generation == nullptr) return true;
  return head.stopped && (!head.work->generation->keep_state || head.fed_back >= head.given);
}

}  // namespace

// All fields but the constant ones are guarded by the batcher's mutex.
class Lane {
 public:
  Lane(int model, std::shared_ptr<StatePool> pool) : model(model), pool(std::move(pool)) {}

  const int model;
  // Shared, because a lane may be dropped after the batcher is gone. Declared before the slots, so that it
  // outlives them.
  const std::shared_ptr<StatePool> pool;

  StateSlot base;     // The committed state; none while the lane is fresh.
  StateSlot working;  // Of the work at the head, from its first piece on.
  int64_t position = 0;
  std::deque<QueuedWork> queue;  // Not answered, oldest first; only the head is ever in a step.
  int64_t pending = 0;           // `queue`, and works whose `done` has not returned.
  bool closed = false;
  bool ended = false;
  bool out_of_step = false;
  bool in_ready = false;       // In one of its model's two lists of ready lanes.
  int64_t awaited_epoch = -1;  // The gathering that waits for this lane; see gather_epoch_.

  bool in_flight() const { return !queue.empty() && queue.front().in_flight > 0; }
};

// The batch thread takes turns; a turn is: sweep (answer what can be answered without computing), form a step
// of one model, Prepare, Launch, and where the pipeline is full or nothing more can be launched, Wait for the
// oldest step and complete it.
//
// A lane is in its model's `ready` list, or in `generating` if its head generates, if its head has a piece to
// launch or may have to be answered. So: a lane with queued work is ready unless its head is in flight with
// nothing left to launch (or given up); completing that step makes it ready again.
class Batcher::Impl {
 public:
  Impl(const BatcherOptions& options, Clock* clock, BatchObserver* observer)
      : options_(options), clock_(clock), observer_(observer) {
    DELTANET_CHECK(options_.piece_tokens >= kCutTokens && options_.piece_tokens % kCutTokens == 0,
                   "piece_tokens must be a positive multiple of 64");
  }

  ~Impl() {
    {
      MutexLock lock(&mu_);
      stopping_ = true;
      draining_ = true;
    }
    work_condition_.NotifyAll();
    thread_.Join();
    // From here on this thread does what is the batch thread's.
    while (!in_flight_.empty()) FinishOldestStep();
    std::vector<Completion> completions;
    {
      MutexLock lock(&mu_);
      for (const auto& served : models_) {
        std::deque<std::shared_ptr<Lane>> lanes = std::move(served->ready);
        lanes.insert(lanes.end(), served->generating.begin(), served->generating.end());
        served->generating.clear();
        for (const std::shared_ptr<Lane>& lane : lanes) {
          lane->in_ready = false;
          while (!lane->queue.empty()) {
            FailHeadLocked(lane,
                           LaneError(*lane, absl::StatusCode::kUnavailable, reason::kDraining,
                                     "the server is shutting down"),
                           &completions);
          }
        }
        served->ready.clear();
      }
    }
    Deliver(std::move(completions), std::nullopt);
  }

  int AddModel(Model* model, int64_t running_slots) {
    const ModelDescription& description = model->description();
    DELTANET_CHECK(!started_, "models are added before Start");
    DELTANET_CHECK(running_slots >= 1 && running_slots <= description.num_slots,
                   "running_slots must be in [1, num_slots]");
    DELTANET_CHECK(description.max_step_tokens >= kMinStepTokens && description.max_step_rows >= 1 &&
                       description.max_steps_in_flight >= 1,
                   "a step must hold kMinStepTokens tokens and a row");
    DELTANET_CHECK(!description.takes_tokens || description.max_step_logits >= kMinStepTokens,
                   "a step must hand over the logits of kMinStepTokens tokens");
    auto served = std::make_unique<Served>();
    served->model = model;
    served->description = description;
    served->pool = std::make_shared<StatePool>(description.num_slots);
    served->max_sessions = description.num_slots - running_slots;
    models_.push_back(std::move(served));
    return static_cast<int>(models_.size()) - 1;
  }

  void Start() {
    DELTANET_CHECK(!started_, "the batch thread was started twice");
    started_ = true;
    {
      MutexLock lock(&mu_);
      heartbeat_.progress = clock_->Now();
    }
    thread_ = Thread("batcher", [this] { Run(); });
  }

  const ModelDescription& description(int model) const { return models_[model]->description; }
  int64_t max_sessions(int model) const { return models_[model]->max_sessions; }
  int64_t free_slots(int model) const { return models_[model]->pool->free_slots(); }

  std::shared_ptr<Lane> OpenLane(int model) { return std::make_shared<Lane>(model, models_[model]->pool); }

  absl::Status SubmitAll(absl::Span<const std::shared_ptr<Lane>> lanes,
                         absl::Span<std::unique_ptr<Work>> works, WhenFull when_full) {
    DELTANET_CHECK(lanes.size() == works.size(), "each work has its lane");
    const absl::Time now = clock_->Now();
    bool notify = false;
    {
      MutexLock lock(&mu_);
      for (size_t i = 0; i < lanes.size(); ++i) {
        RETURN_IF_ERROR(AdmitLocked(*lanes[i], *works[i], static_cast<int64_t>(works.size()), when_full));
      }
      for (size_t i = 0; i < lanes.size(); ++i) {
        EnqueueLocked(lanes[i], std::move(works[i]), now);
        if (StopAwaitingLocked(lanes[i].get()) || waiting_ == Waiting::kIdle) notify = true;
      }
      if (notify) waiting_ = Waiting::kNo;
    }
    if (notify) work_condition_.NotifyOne();
    return absl::OkStatus();
  }

  void Close(const std::shared_ptr<Lane>& lane) {
    bool notify = false;
    {
      MutexLock lock(&mu_);
      lane->closed = true;
      if (!lane->in_flight()) {
        lane->working.Release();
        lane->base.Release();
      }
      notify = StopAwaitingLocked(lane.get());
    }
    if (notify) work_condition_.NotifyOne();
  }

  void Wake() {
    {
      MutexLock lock(&mu_);
      woken_ = true;
    }
    work_condition_.NotifyOne();
  }

  int64_t committed_position(const Lane& lane) const {
    MutexLock lock(&mu_);
    return lane.position;
  }
  int64_t pending(const Lane& lane) const {
    MutexLock lock(&mu_);
    return lane.pending;
  }
  int64_t queued_works() const {
    MutexLock lock(&mu_);
    return queued_works_;
  }
  int64_t queued_tokens() const {
    MutexLock lock(&mu_);
    return queued_tokens_;
  }
  int64_t running_generations(int model) const {
    MutexLock lock(&mu_);
    return models_[model]->running_generations;
  }
  int64_t waiting_generations(int model) const {
    MutexLock lock(&mu_);
    return models_[model]->waiting_generations;
  }
  Heartbeat heartbeat() const {
    MutexLock lock(&mu_);
    return heartbeat_;
  }

  void StartDraining() {
    MutexLock lock(&mu_);
    draining_ = true;
  }

  bool WaitUntilIdle(absl::Time deadline) {
    MutexLock lock(&mu_);
    while (unanswered_ > 0) {
      if (clock_->Now() >= deadline) return false;
      clock_->WaitUntil(&idle_condition_, &mu_, deadline);
    }
    return true;
  }

  bool RunOnce() {
    DELTANET_CHECK(!started_, "RunOnce is for a batcher without a thread");
    const bool acted = Turn();
    MutexLock lock(&mu_);
    heartbeat_.busy = false;
    return acted;
  }

 private:
  struct Served {
    Model* model = nullptr;  // Not owned; used by the batch thread alone.
    ModelDescription description;
    std::shared_ptr<StatePool> pool;  // Shared with the lanes; see Lane::pool.
    int64_t max_sessions = 0;

    // Guarded by mu_.
    std::deque<std::shared_ptr<Lane>> ready;       // In the order of their turns, as those that generate:
    std::deque<std::shared_ptr<Lane>> generating;  // these go first.
    int64_t running_generations = 0;
    int64_t waiting_generations = 0;
    absl::Duration used;                      // Computing time, as the choice of the next model counts it.
    int64_t last_step = -1;
    int steps_in_flight = 0;
  };

  // Where a row that samples leaves what it has chosen.
  struct SampledToken {
    int64_t id = 0;
    float log_prob = 0;
    std::vector<int64_t> top_ids;
    std::vector<float> top_log_probs;
  };

  struct Step {
    int model = 0;
    StepTicket ticket = 0;
    std::vector<std::shared_ptr<Lane>> lanes;  // One a row; the row is a piece of the lane's head.
    std::vector<std::unique_ptr<SampledToken>> samples;  // One a row; null if the row samples none.
    int64_t tokens = 0;
    absl::Time begin;     // Of forming it.
    absl::Time formed;    // When Prepare was called.
    absl::Time launched;  // When Launch was called.
  };

  // A work that is out of its queue and waits for its `done` to be called.
  struct Completion {
    std::shared_ptr<Lane> lane;
    std::unique_ptr<Work> work;
    WorkResult result;
  };

  enum class Waiting { kNo, kIdle, kGather };

  static absl::Status LaneError(const Lane& lane, absl::StatusCode code, absl::string_view why,
                                absl::string_view message) {
    return MakeError(code, why, message, {{"committed_position", absl::StrCat(lane.position)}});
  }

  static absl::Status EndedError(const Lane& lane) {
    return LaneError(lane, absl::StatusCode::kNotFound, reason::kSessionEnded, "the session has ended");
  }

  static absl::Status DeviceLostError(const Lane& lane) {
    return LaneError(lane, absl::StatusCode::kInternal, reason::kInternal,
                     "the device is lost; the server has to be started again");
  }

  // Whether one of `count` works that come together may be taken.
  absl::Status AdmitLocked(const Lane& lane, const Work& work, int64_t count, WhenFull when_full) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    DELTANET_CHECK(!work.precondition.ok() || work.tokens >= 1 ||
                       (work.tokens == 0 && (work.end_of_sequence || work.generation != nullptr)),
                   "a work has at least 1 token, or 0 with end_of_sequence or a generation");
    if (draining_) {
      return LaneError(lane, absl::StatusCode::kUnavailable, reason::kDraining,
                       "the server is shutting down");
    }
    if (device_lost_) return DeviceLostError(lane);
    if (lane.closed || lane.ended) return EndedError(lane);
    if (when_full == WhenFull::kQueue) return absl::OkStatus();
    if (queued_works_ + count > options_.max_queued_works) {
      return LaneError(
          lane, absl::StatusCode::kUnavailable, reason::kQueueFull,
          absl::StrCat("the queue holds ", queued_works_, " requests, ", count,
                       " more would exceed its limit of ", options_.max_queued_works, "; retry later"));
    }
    if (queued_tokens_ >= options_.max_queued_tokens) {
      return LaneError(lane, absl::StatusCode::kUnavailable, reason::kQueueFull,
                       absl::StrCat("the queue holds ", queued_tokens_, " tokens, its limit is ",
                                    options_.max_queued_tokens, "; retry later"));
    }
    return absl::OkStatus();
  }

  void EnqueueLocked(const std::shared_ptr<Lane>& lane, std::unique_ptr<Work> work, absl::Time now)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    QueuedWork queued;
    queued.submitted = now;
    if (work->precondition.ok()) {
      queued.total = work->tokens + (work->end_of_sequence ? description(lane->model).lookahead : 0);
    }
    queued.last_token = now;
    if (work->generation != nullptr) ++models_[lane->model]->waiting_generations;
    queued.work = std::move(work);
    ++queued_works_;
    queued_tokens_ += queued.total;
    ++unanswered_;
    ++lane->pending;
    lane->queue.push_back(std::move(queued));
    if (lane->queue.size() == 1) MakeReadyLocked(lane);
  }

  void Run() {
    while (true) {
      {
        MutexLock lock(&mu_);
        heartbeat_.busy = !in_flight_.empty();
        while (!stopping_ && !woken_ && in_flight_.empty()) {
          const std::optional<int> next = NextModelLocked();
          if (GatheringLocked(next)) {
            waiting_ = Waiting::kGather;
            clock_->WaitUntil(&work_condition_, &mu_, gather_until_);
          } else if (next.has_value()) {
            break;
          } else {
            waiting_ = Waiting::kIdle;
            clock_->WaitUntil(&work_condition_, &mu_, absl::InfiniteFuture());
          }
        }
        waiting_ = Waiting::kNo;
        woken_ = false;
        if (stopping_) return;
      }
      Turn();
    }
  }

  // Batch thread. One turn; false if there was nothing to do.
  bool Turn() {
    std::vector<Completion> completions;
    std::vector<StepRow> rows;
    std::optional<Step> step;
    const absl::Time now = clock_->Now();
    {
      MutexLock lock(&mu_);
      heartbeat_ = {now, /*busy=*/true};
      SweepLocked(now, &completions);
      step = FormStepLocked(now, &rows, &completions);
    }
    const bool acted = !completions.empty() || step.has_value();
    Deliver(std::move(completions), std::nullopt);
    int max_in_flight = 1;
    if (step.has_value()) {
      max_in_flight = description(step->model).max_steps_in_flight;
      LaunchStep(*std::move(step), rows);
    }
    if (in_flight_.empty()) return acted;
    if (!acted || static_cast<int>(in_flight_.size()) >= max_in_flight) FinishOldestStep();
    return true;
  }

  // The model whose turn it is: of those with ready lanes and room in the pipeline, the one that has used the
  // device least.
  std::optional<int> NextModelLocked() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    std::optional<int> best;
    for (int i = 0; i < static_cast<int>(models_.size()); ++i) {
      const Served& served = *models_[i];
      if ((served.ready.empty() && served.generating.empty()) ||
          static_cast<int>(in_flight_.size()) >= served.description.max_steps_in_flight) {
        continue;
      }
      if (!best.has_value() || std::pair(served.used, served.last_step) <
                                   std::pair(models_[*best]->used, models_[*best]->last_step)) {
        best = i;
      }
    }
    return best;
  }

  // Whether to leave the device idle for the lanes that the last step has answered. Not while another model
  // has the turn or tokens are generated, and not where what is ready fills a step.
  bool GatheringLocked(std::optional<int> next) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    if (gather_awaited_ == 0 || clock_->Now() >= gather_until_) return false;
    if (!next.has_value()) return true;
    if (*next != gather_model_) return false;
    const Served& served = *models_[*next];
    if (!served.generating.empty()) return false;
    if (static_cast<int64_t>(served.ready.size()) >= served.description.max_step_rows) return false;
    int64_t tokens = 0;
    for (const std::shared_ptr<Lane>& lane : served.ready) {
      if (!lane->queue.empty()) tokens += lane->queue.front().total - lane->queue.front().fed;
    }
    return tokens < served.description.max_step_tokens;
  }

  // True if this was the last lane that a waiting batch thread gathers: it is to be notified.
  bool StopAwaitingLocked(Lane* lane) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    if (lane->awaited_epoch != gather_epoch_) return false;
    lane->awaited_epoch = -1;
    --gather_awaited_;
    return gather_awaited_ == 0 && waiting_ == Waiting::kGather;
  }

  void MakeReadyLocked(const std::shared_ptr<Lane>& lane) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    if (lane->in_ready) return;
    Served& served = *models_[lane->model];
    // A model that was idle has saved nothing up: it would have the device for itself until the others are
    // even.
    if (served.ready.empty() && served.generating.empty() && served.steps_in_flight == 0)
      served.used = std::max(served.used, used_by_last_);
    lane->in_ready = true;
    ListOf(&served, lane->queue.front())->push_back(lane);
  }

  static std::deque<std::shared_ptr<Lane>>* ListOf(Served* served, const QueuedWork& head) {
    return Generating(head) ? &served->generating : &served->ready;
  }

  // Answers what needs no computing, in all ready lanes: closed lanes, bad heads, heads without tokens to
  // feed.
  void SweepLocked(absl::Time now, std::vector<Completion>* completions) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    for (const auto& served : models_) {
      for (auto* list : {&served->generating, &served->ready}) {
        for (int64_t left = static_cast<int64_t>(list->size()); left > 0; --left) {
          std::shared_ptr<Lane> lane = std::move(list->front());
          list->pop_front();
          if (SweepLaneLocked(lane, now, completions)) {
            ListOf(served.get(), lane->queue.front())->push_back(std::move(lane));
          } else {
            lane->in_ready = false;
          }
        }
      }
    }
  }

  // True if the lane has a piece to launch.
  bool SweepLaneLocked(const std::shared_ptr<Lane>& lane, absl::Time now,
                       std::vector<Completion>* completions) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    while (!lane->queue.empty()) {
      QueuedWork& head = lane->queue.front();
      if (head.error.ok()) head.error = CheckHeadLocked(*lane, head, now);
      if (!head.error.ok()) {
        if (head.in_flight > 0) return false;  // Completed with the step.
        FailHeadLocked(lane, head.error, completions);
      } else if (head.work->end_of_sequence &&
                 OutputTokens(lane->position, head.total, description(lane->model).lookahead) == 0) {
        CommitHeadLocked(lane, now, completions);
      } else if (head.in_flight == 0 && head.started && Finished(head)) {
        CommitHeadLocked(lane, now, completions);
      } else {
        return HasRow(head);
      }
    }
    return false;
  }

  // Whether the work at the head may go on.
  absl::Status CheckHeadLocked(const Lane& lane, const QueuedWork& head, absl::Time now) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    const Work& work = *head.work;
    if (device_lost_) return DeviceLostError(lane);
    if (lane.closed) return ClosedError(lane);
    if (lane.ended) return EndedError(lane);
    if (!work.precondition.ok()) return WithPosition(lane, work.precondition);
    if (work.cancellation != nullptr && work.cancellation->cancelled.load(std::memory_order_acquire)) {
      return LaneError(lane, absl::StatusCode::kCancelled, reason::kCancelled, "the call was cancelled");
    }
    if (work.generation != nullptr && work.tokens == 0 && !lane.base) {
      return LaneError(lane, absl::StatusCode::kInvalidArgument, reason::kInvalidRequest,
                       "there is nothing to generate from: the prompt is empty, and so is the session");
    }
    if (now >= work.deadline) {
      return LaneError(lane, absl::StatusCode::kDeadlineExceeded, reason::kDeadline,
                       absl::StrCat("the deadline passed after ", head.fed, " of ", head.total, " tokens"));
    }
    if (work.expected_position.has_value()) {
      if (*work.expected_position == lane.position) return absl::OkStatus();
      return LaneError(lane, absl::StatusCode::kFailedPrecondition, reason::kPositionMismatch,
                       absl::StrCat("expected_position is ", *work.expected_position,
                                    ", the session stands at ", lane.position));
    }
    if (lane.out_of_step) {
      return LaneError(lane, absl::StatusCode::kFailedPrecondition, reason::kSessionOutOfStep,
                       absl::StrCat("an earlier message of the session failed; to go on, send "
                                    "expected_position ",
                                    lane.position));
    }
    return absl::OkStatus();
  }

  static absl::Status ClosedError(const Lane& lane) {
    return LaneError(lane, absl::StatusCode::kCancelled, reason::kSessionEnded,
                     "the session was ended before the message was computed");
  }

  static absl::Status WithPosition(const Lane& lane, const absl::Status& status) {
    return WithErrorMetadata(status, "committed_position", absl::StrCat(lane.position));
  }

  // The next step, with its rows, if there is anything to launch.
  std::optional<Step> FormStepLocked(absl::Time now, std::vector<StepRow>* rows,
                                     std::vector<Completion>* completions)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    const std::optional<int> next = NextModelLocked();
    if (!next.has_value()) return std::nullopt;
    Served& served = *models_[*next];
    const ModelDescription& description = served.description;

    struct Pick {
      int64_t tokens = 0;
      int64_t more = 0;    // Left of the work after those.
      bool logits = false;  // Each of them takes one of the step's logits.
      bool generates = false;
    };
    std::vector<Pick> picks;
    std::vector<std::shared_ptr<Lane>> lanes;
    std::deque<std::shared_ptr<Lane>> passed_over;
    int64_t left = description.max_step_tokens;
    int64_t logits_left =
        description.takes_tokens ? description.max_step_logits : std::numeric_limits<int64_t>::max();
    bool slots_short = false;
    const auto has_slot = [&](Lane* lane) {
      if (!lane->working && !slots_short) {
        absl::StatusOr<StateSlot> slot = served.pool->Acquire();
        if (slot.ok()) {
          lane->working = *std::move(slot);
        } else {
          slots_short = true;
        }
      }
      return static_cast<bool>(lane->working);
    };

    // Those that generate, a row each; others find some rows left, and tokens for a piece.
    const int64_t kept_rows = served.ready.empty() ? 0 : std::max<int64_t>(1, description.max_step_rows / 16);
    const int64_t generating_rows = std::max<int64_t>(1, description.max_step_rows - kept_rows);
    const int64_t kept_tokens =
        served.ready.empty() ? 0 : std::min(kMinStepTokens, description.max_step_tokens / 2);
    for (int64_t waiting = static_cast<int64_t>(served.generating.size());
         waiting > 0 && left > kept_tokens && static_cast<int64_t>(picks.size()) < generating_rows;
         --waiting) {
      std::shared_ptr<Lane> lane = std::move(served.generating.front());
      served.generating.pop_front();
      if (!has_slot(lane.get())) {
        served.generating.push_back(std::move(lane));
        continue;
      }
      --left;
      Pick pick;
      pick.tokens = 1;
      pick.generates = true;
      picks.push_back(pick);
      lanes.push_back(std::move(lane));
    }
    const int64_t room_with_generations = std::max(options_.mixed_step_tokens, kMinStepTokens);
    const int64_t unused = picks.empty() ? 0 : std::max<int64_t>(0, left - room_with_generations);
    left -= unused;

    // First pass of the others: everybody's turn.
    while (!served.ready.empty() && left > 0 &&
           static_cast<int64_t>(picks.size()) < description.max_step_rows) {
      std::shared_ptr<Lane> lane = std::move(served.ready.front());
      served.ready.pop_front();
      const QueuedWork& head = lane->queue.front();
      const int64_t remaining = head.total - head.fed;
      const bool logits = description.takes_tokens && head.work->generation == nullptr &&
                          head.work->readout == ReadoutKind::kValues;
      Pick pick;
      pick.logits = logits && !head.work->last_only;
      pick.tokens =
          FitPiece(remaining, options_.piece_tokens, pick.logits ? std::min(left, logits_left) : left);
      const int64_t takes_logits = pick.logits ? pick.tokens : logits ? 1 : 0;
      if (pick.tokens == 0 || takes_logits > logits_left || !has_slot(lane.get())) {
        passed_over.push_back(std::move(lane));
        continue;
      }
      left -= pick.tokens;
      logits_left -= takes_logits;
      pick.more = remaining - pick.tokens;
      picks.push_back(pick);
      lanes.push_back(std::move(lane));
    }
    // Those passed over keep their places.
    served.ready.insert(served.ready.begin(), std::make_move_iterator(passed_over.begin()),
                        std::make_move_iterator(passed_over.end()));

    if (lanes.empty()) {
      // Nothing that runs will give a slot back: lanes at rest hold them all.
      if (slots_short && served.steps_in_flight == 0) {
        std::deque<std::shared_ptr<Lane>> stuck = served.generating;
        stuck.insert(stuck.end(), served.ready.begin(), served.ready.end());
        for (const std::shared_ptr<Lane>& lane : stuck) {
          FailHeadLocked(
              lane,
              LaneError(*lane, absl::StatusCode::kResourceExhausted, reason::kSessionsFull,
                        absl::StrCat("all ", description.num_slots, " state slots are held by sessions")),
              completions);
        }
      }
      return std::nullopt;
    }

    // Second pass: what is left of the budget, in equal shares.
    for (bool given = true; given && left > 0;) {
      const int64_t takers =
          std::count_if(picks.begin(), picks.end(), [](const Pick& p) { return p.more > 0; });
      if (takers == 0) break;
      const int64_t share = std::max(kCutTokens, left / takers / kCutTokens * kCutTokens);
      given = false;
      for (Pick& pick : picks) {
        const int64_t piece = FitPiece(pick.more, share, pick.logits ? std::min(left, logits_left) : left);
        if (piece == 0) continue;
        pick.tokens += piece;
        pick.more -= piece;
        left -= piece;
        if (pick.logits) logits_left -= piece;
        given = true;
      }
    }

    Step step;
    step.model = *next;
    step.begin = now;
    step.lanes = std::move(lanes);
    rows->reserve(picks.size());
    for (size_t i = 0; i < picks.size(); ++i) {
      const std::shared_ptr<Lane>& lane = step.lanes[i];
      QueuedWork& head = lane->queue.front();
      const NextRow next_row = picks[i].generates ? NextGenerationRow(head) : NextRow::kNone;
      StepRow row = BeginRowLocked(lane.get(), &head, now);
      if (picks[i].generates) {
        FillGenerationRow(*lane, next_row, &head, &row);
      } else {
        FillPiece(*lane, &head, picks[i].tokens, description, &row);
        queued_tokens_ -= row.tokens;
      }
      step.samples.push_back(PrepareSample(*head.work, &row));
      step.tokens += row.tokens;
      rows->push_back(row);
      if (HasRow(head)) {
        ListOf(&served, head)->push_back(lane);
      } else {
        lane->in_ready = false;
      }
    }
    used_by_last_ = served.used;
    served.last_step = next_step_++;
    ++served.steps_in_flight;
    return step;
  }

  // A row of the lane's head, which from now on is in flight.
  StepRow BeginRowLocked(Lane* lane, QueuedWork* head, absl::Time now) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    StepRow row;
    row.work_slot = lane->working.index();
    if (head->started) {
      row.base_slot = lane->working.index();
    } else if (lane->base) {
      row.base_slot = lane->base.index();
    } else {
      row.fresh = true;
    }
    if (!head->started) {
      head->started = true;
      head->queued = now - head->submitted;
      --queued_works_;
      if (head->work->generation != nullptr) {
        Served& served = *models_[lane->model];
        --served.waiting_generations;
        ++served.running_generations;
      }
    }
    ++head->in_flight;
    return row;
  }

  // The next `tokens` tokens of the head's input.
  static void FillPiece(const Lane& lane, QueuedWork* head, int64_t tokens, const ModelDescription& description,
                        StepRow* row) {
    const Work& work = *head->work;
    const int64_t fed = head->fed;
    head->fed += tokens;
    const bool last = head->fed == head->total;
    row->position = lane.position + fed;
    if (work.end_of_sequence) row->end = lane.position + work.tokens;
    row->tokens = tokens;
    row->input = static_cast<const char*>(work.input) +
                 RowBytes(std::min(fed, work.tokens), description.input_width, work.input_dtype);
    row->input_dtype = work.input_dtype;
    if (work.generation != nullptr) {
      row->output_begin = tokens - (last ? 1 : 0);
      if (last) {
        row->readout = ReadoutKind::kSample;
        ++head->sampled;
      }
      return;
    }
    row->readout = work.readout;
    row->top = work.top;
    if (work.last_only) row->output_begin = tokens - (last ? 1 : 0);
    int64_t entry = work.last_only ? 0 : fed;  // Of the readout's arrays, where this row's outputs begin.
    switch (work.readout) {
      case ReadoutKind::kValues:
        row->output = static_cast<char*>(work.output) +
                      (work.last_only ? 0
                                      : RowBytes(OutputTokens(lane.position, fed, description.lookahead),
                                                 description.output_width, work.output_dtype));
        row->output_dtype = work.output_dtype;
        return;
      case ReadoutKind::kScore: {
        // The output of one token scores the next; that of the token before the input, its first.
        const bool carried = lane.base && fed == 0;
        if (carried) row->output_begin = -1;
        if (last) row->output_end = tokens - 1;
        const int64_t first_scored = carried ? 0 : fed + 1;
        row->targets = static_cast<const char*>(work.input) + first_scored * sizeof(int64_t);
        entry = lane.base ? first_scored : fed;
        break;
      }
      case ReadoutKind::kTop:
        break;
      case ReadoutKind::kSample:
        DELTANET_CHECK(false, "a work samples by its generation");
    }
    if (work.log_probs != nullptr) row->log_probs = work.log_probs + entry;
    if (work.top > 0) {
      row->top_ids = work.top_ids + entry * work.top;
      row->top_log_probs = work.top_log_probs + entry * work.top;
    }
  }

  static void FillGenerationRow(const Lane& lane, NextRow next, QueuedWork* head, StepRow* row) {
    row->position = lane.position + head->work->tokens + head->fed_back;
    if (next == NextRow::kSample) {
      row->output_begin = -1;
    } else {
      row->tokens = 1;
      row->feed_sampled = true;
      ++head->fed_back;
    }
    if (next == NextRow::kFeed) {
      row->output_begin = row->tokens;
    } else {
      row->readout = ReadoutKind::kSample;
      ++head->sampled;
    }
  }

  // Where the row leaves the token that it chooses; null if it chooses none.
  static std::unique_ptr<SampledToken> PrepareSample(const Work& work, StepRow* row) {
    if (row->readout != ReadoutKind::kSample) return nullptr;
    auto sample = std::make_unique<SampledToken>();
    sample->top_ids.resize(work.top);
    sample->top_log_probs.resize(work.top);
    row->sampling = work.generation->sampling;
    row->top = work.top;
    row->ids = &sample->id;
    row->log_probs = &sample->log_prob;
    row->top_ids = sample->top_ids.data();
    row->top_log_probs = sample->top_log_probs.data();
    return sample;
  }

  // Batch thread.
  void LaunchStep(Step step, absl::Span<const StepRow> rows) {
    Served& served = *models_[step.model];
    absl::Status status;
    step.formed = clock_->Now();
    absl::StatusOr<StepTicket> ticket = served.model->Prepare(rows);
    step.launched = clock_->Now();
    if (ticket.ok()) {
      step.ticket = *ticket;
      status = served.model->Launch(*ticket);
    } else if (absl::IsDataLoss(ticket.status())) {
      status = ticket.status();
    } else {
      // Whatever it found wrong with the rows, it is not the client's mistake.
      status = MakeError(absl::StatusCode::kInternal, reason::kInternal,
                         absl::StrCat("preparing a step: ", ticket.status().message()));
    }
    if (status.ok()) {
      in_flight_.push_back(std::move(step));
    } else {
      CompleteStep(step, status);
    }
  }

  // Batch thread. Blocks until the oldest step in flight is done.
  void FinishOldestStep() {
    const Step step = std::move(in_flight_.front());
    in_flight_.pop_front();
    CompleteStep(step, models_[step.model]->model->Wait(step.ticket));
  }

  // Batch thread. Moves the lanes of a step on, or back, and delivers what is done.
  void CompleteStep(const Step& step, const absl::StatusOr<StepResult>& outcome) {
    DELTANET_CHECK(!outcome.ok() || outcome->rows.size() == step.lanes.size(),
                   "a step's result has another number of rows");
    const absl::Time end = clock_->Now();
    // Of two steps in flight, the later one's time starts when the earlier one is done.
    const absl::Duration took = end - std::max(step.begin, last_step_end_);
    BatchObserver::Step seen;
    seen.model = step.model;
    seen.rows = static_cast<int64_t>(step.lanes.size());
    seen.tokens = step.tokens;
    seen.form = step.formed - step.begin;
    seen.prepare = step.launched - step.formed;
    seen.compute = end - std::max(step.launched, last_step_end_);
    last_step_end_ = end;
    const std::vector<bool> goes_on = GiveTokens(step, outcome, end);
    for (const auto& sample : step.samples) seen.generating += sample != nullptr ? 1 : 0;

    std::vector<Completion> completions;
    bool newly_lost = false;
    {
      MutexLock lock(&mu_);
      heartbeat_.progress = end;
      newly_lost = absl::IsDataLoss(outcome.status()) && !device_lost_;
      device_lost_ = device_lost_ || newly_lost;
      Served& served = *models_[step.model];
      served.used += took;
      --served.steps_in_flight;
      for (size_t i = 0; i < step.lanes.size(); ++i) {
        const std::shared_ptr<Lane>& lane = step.lanes[i];
        QueuedWork& head = lane->queue.front();
        --head.in_flight;
        head.computing += took;
        if (head.error.ok()) {
          if (lane->closed) {
            head.error = ClosedError(*lane);
          } else if (absl::IsDataLoss(outcome.status())) {
            head.error = DeviceLostError(*lane);
          } else if (!outcome.ok()) {
            head.error = WithPosition(*lane, outcome.status());
          } else if (!outcome->rows[i].ok()) {
            head.error =
                LaneError(*lane, absl::StatusCode::kInternal, reason::kNonFinite, outcome->rows[i].message());
          }
        }
        if (!goes_on[i]) head.stopped = true;
        if (head.in_flight == 0) {
          if (!head.error.ok()) {
            FailHeadLocked(lane, head.error, &completions);
          } else if (Finished(head)) {
            CommitHeadLocked(lane, end, &completions);
          }
        } else if (!head.error.ok() || !HasRow(head)) {
          continue;
        }
        if (!lane->queue.empty()) MakeReadyLocked(lane);
      }
    }
    if (observer_ != nullptr) {
      observer_->OnStep(seen);
      if (newly_lost) observer_->OnDeviceLost(outcome.status());
    }
    Deliver(std::move(completions), GatherAfter{step.model, took});
  }

  // Gives the tokens that a step has chosen to those who wait for them. Of each row: whether its generation, if it
  // is one, goes on.
  std::vector<bool> GiveTokens(const Step& step, const absl::StatusOr<StepResult>& outcome, absl::Time now) {
    std::vector<bool> goes_on(step.lanes.size(), true);
    if (!outcome.ok()) return goes_on;
    struct Token {
      size_t row;
      QueuedWork* head;  // Stays where it is: only this thread takes it from its queue.
      bool first;
      absl::Duration since;
    };
    std::vector<Token> tokens;
    {
      MutexLock lock(&mu_);
      for (size_t i = 0; i < step.lanes.size(); ++i) {
        Lane& lane = *step.lanes[i];
        QueuedWork& head = lane.queue.front();
        if (step.samples[i] == nullptr || !outcome->rows[i].ok() || !head.error.ok() || head.stopped ||
            lane.closed) {
          continue;
        }
        ++head.given;
        tokens.push_back({i, &head, head.given == 1, now - head.last_token});
        head.last_token = now;
        if (head.given == 1) head.first_token = tokens.back().since;
        if (head.given == head.work->generation->max_tokens) goes_on[i] = false;
      }
    }
    for (const Token& token : tokens) {
      const SampledToken& sample = *step.samples[token.row];
      if (observer_ != nullptr) observer_->OnToken(step.model, token.first, token.since);
      GeneratedToken given;
      given.id = sample.id;
      given.log_prob = sample.log_prob;
      given.top_ids = sample.top_ids;
      given.top_log_probs = sample.top_log_probs;
      if (!token.head->work->generation->on_token(given)) goes_on[token.row] = false;
    }
    return goes_on;
  }

  // The work at the head has succeeded: the lane moves to its working slot.
  void CommitHeadLocked(const std::shared_ptr<Lane>& lane, absl::Time now,
                        std::vector<Completion>* completions) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    const QueuedWork& head = lane->queue.front();
    const int64_t lookahead = description(lane->model).lookahead;
    const Work& work = *head.work;
    WorkResult result;
    if (work.generation != nullptr) {
      result.output_position = lane->position + work.tokens;
    } else if (work.readout == ReadoutKind::kScore) {
      const int64_t unscored = lane->base ? 0 : 1;
      result.output_position = lane->position + unscored;
      result.output_tokens = work.tokens - unscored;
    } else if (work.last_only) {
      result.output_position = lane->position + work.tokens - 1;
      result.output_tokens = 1;
    } else {
      result.output_position = FirstOutputPosition(lane->position, lookahead);
      result.output_tokens = OutputTokens(lane->position, head.total, lookahead);
    }
    lane->position += work.tokens;
    lane->out_of_step = false;
    if (work.generation != nullptr) {
      if (work.generation->keep_state) {
        lane->position += head.given;
      } else {
        lane->ended = true;
      }
    }
    if (work.end_of_sequence) lane->ended = true;
    if (lane->ended) {
      lane->base.Release();
      lane->working.Release();
    } else {
      lane->base = std::move(lane->working);
    }
    TakeHeadLocked(lane, std::move(result), now, completions);
  }

  // The work at the head, of which no piece is in flight, has failed: the lane stays where it was.
  void FailHeadLocked(const std::shared_ptr<Lane>& lane, absl::Status status,
                      std::vector<Completion>* completions) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    lane->out_of_step = true;
    lane->working.Release();
    if (lane->closed) lane->base.Release();
    WorkResult result;
    result.status = std::move(status);
    TakeHeadLocked(lane, std::move(result), clock_->Now(), completions);
  }

  void TakeHeadLocked(const std::shared_ptr<Lane>& lane, WorkResult result, absl::Time now,
                      std::vector<Completion>* completions) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    QueuedWork head = std::move(lane->queue.front());
    lane->queue.pop_front();
    if (!head.started) --queued_works_;
    queued_tokens_ -= head.total - head.fed;
    if (head.work->generation != nullptr) {
      Served& served = *models_[lane->model];
      --(head.started ? served.running_generations : served.waiting_generations);
    }
    result.generated_tokens = head.given;
    result.first_token = head.first_token;
    result.committed_position = lane->position;
    result.ended = lane->ended;
    result.queued = head.started ? head.queued : now - head.submitted;
    result.computing = head.computing;
    completions->push_back({lane, std::move(head.work), std::move(result)});
  }

  // The step whose answers are delivered.
  struct GatherAfter {
    int model;
    absl::Duration took;
  };

  // Batch thread. Calls `done` of each; then gathers, if these are the answers of a step.
  void Deliver(std::vector<Completion> completions, std::optional<GatherAfter> gather) {
    for (Completion& completion : completions) {
      completion.result.together = static_cast<int64_t>(completions.size());
      if (observer_ != nullptr) observer_->OnWorkDone(completion.lane->model, completion.result);
      completion.work->done(completion.result);
      completion.work.reset();
    }
    if (completions.empty()) return;
    const absl::Time now = clock_->Now();
    bool idle = false;
    {
      MutexLock lock(&mu_);
      if (gather.has_value()) {
        ++gather_epoch_;
        gather_awaited_ = 0;
        gather_model_ = gather->model;
        gather_until_ = now + gather->took * options_.gather_fraction;
      }
      for (const Completion& completion : completions) {
        Lane& lane = *completion.lane;
        --lane.pending;
        --unanswered_;
        if (gather.has_value() && lane.queue.empty() && !lane.ended && !lane.closed) {
          lane.awaited_epoch = gather_epoch_;
          ++gather_awaited_;
        }
      }
      idle = unanswered_ == 0;
    }
    if (idle) idle_condition_.NotifyAll();
  }

  // Constant after construction, or after Start.
  const BatcherOptions options_;
  Clock* const clock_;
  BatchObserver* const observer_;
  std::vector<std::unique_ptr<Served>> models_;
  bool started_ = false;
  Thread thread_;

  mutable Mutex mu_;
  CondVar work_condition_;  // Of the batch thread.
  CondVar idle_condition_;  // Of WaitUntilIdle.
  bool stopping_ ABSL_GUARDED_BY(mu_) = false;
  bool draining_ ABSL_GUARDED_BY(mu_) = false;
  bool woken_ ABSL_GUARDED_BY(mu_) = false;
  bool device_lost_ ABSL_GUARDED_BY(mu_) = false;
  Heartbeat heartbeat_ ABSL_GUARDED_BY(mu_);
  Waiting waiting_ ABSL_GUARDED_BY(mu_) = Waiting::kNo;  // How the batch thread waits, until it is notified.
  int64_t queued_works_ ABSL_GUARDED_BY(mu_) = 0;
  int64_t queued_tokens_ ABSL_GUARDED_BY(mu_) = 0;
  int64_t unanswered_ ABSL_GUARDED_BY(mu_) = 0;  // Works whose `done` has not returned.
  int64_t next_step_ ABSL_GUARDED_BY(mu_) = 0;
  absl::Duration used_by_last_ ABSL_GUARDED_BY(mu_);  // `used` of the model of the last step, before it.
  // The lanes that the last step answered and that have not come back.
  int64_t gather_epoch_ ABSL_GUARDED_BY(mu_) = 0;
  int64_t gather_awaited_ ABSL_GUARDED_BY(mu_) = 0;
  int gather_model_ ABSL_GUARDED_BY(mu_) = 0;
  absl::Time gather_until_ ABSL_GUARDED_BY(mu_) = absl::InfinitePast();

  // Of the batch thread.
  std::deque<Step> in_flight_;  // In the order of Launch.
  absl::Time last_step_end_ = absl::InfinitePast();
};

Batcher::Batcher(const BatcherOptions& options, Clock* clock, BatchObserver* observer)
    : impl_(std::make_unique<Impl>(options, clock, observer)) {}
Batcher::~Batcher() = default;

int Batcher::AddModel(Model* model, int64_t running_slots) { return impl_->AddModel(model, running_slots); }
void Batcher::Start() { impl_->Start(); }
const ModelDescription& Batcher::description(int model) const { return impl_->description(model); }
int64_t Batcher::max_sessions(int model) const { return impl_->max_sessions(model); }
int64_t Batcher::free_slots(int model) const { return impl_->free_slots(model); }
std::shared_ptr<Lane> Batcher::OpenLane(int model) { return impl_->OpenLane(model); }
absl::Status Batcher::Submit(const std::shared_ptr<Lane>& lane, std::unique_ptr<Work>* work,
                             WhenFull when_full) {
  return impl_->SubmitAll({&lane, 1}, {work, 1}, when_full);
}
absl::Status Batcher::SubmitAll(absl::Span<const std::shared_ptr<Lane>> lanes,
                                absl::Span<std::unique_ptr<Work>> works, WhenFull when_full) {
  return impl_->SubmitAll(lanes, works, when_full);
}
void Batcher::Close(const std::shared_ptr<Lane>& lane) { impl_->Close(lane); }
void Batcher::Wake() { impl_->Wake(); }
int64_t Batcher::committed_position(const std::shared_ptr<Lane>& lane) const {
  return impl_->committed_position(*lane);
}
int64_t Batcher::pending(const std::shared_ptr<Lane>& lane) const { return impl_->pending(*lane); }
int64_t Batcher::queued_works() const { return impl_->queued_works(); }
int64_t Batcher::queued_tokens() const { return impl_->queued_tokens(); }
int64_t Batcher::running_generations(int model) const { return impl_->running_generations(model); }
int64_t Batcher::waiting_generations(int model) const { return impl_->waiting_generations(model); }
Heartbeat Batcher::heartbeat() const { return impl_->heartbeat(); }
void Batcher::StartDraining() { impl_->StartDraining(); }
bool Batcher::WaitUntilIdle(absl::Time deadline) { return impl_->WaitUntilIdle(deadline); }
bool Batcher::RunOnce() { return impl_->RunOnce(); }

}  // namespace deltanet
