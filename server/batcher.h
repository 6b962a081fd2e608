// Gathers the work of many clients into steps of a ragged batch and runs them on one device's models.
//
// A Lane is an ordered stream of work over one state: a session, or one stateless sequence. At most one piece
// of a lane is in a step, in the order of submission. A long work is cut into pieces, and lanes take turns,
// so a lane with one token never waits behind a whole prompt.
//
// Cuts. A work is cut at multiples of 64 tokens from its own start (flush tokens counted), and never so that
// 16 or fewer are left over: these go along with the piece before them, and where the step has no room for
// both, the cut is 64 tokens earlier. So a work is one row of at most 16 tokens, or pieces of more than 16
// each, whatever it shares its steps with; model.h says why (kCutTokens).
//
// Commit. A lane has a base slot (its committed state; none while it is fresh), a work has a working slot:
// its first piece reads base and writes working, later pieces go on in working, and the lane moves to the
// working slot, and its committed position onward, once, when the whole work has succeeded. An error, a
// cancellation or a deadline leaves the lane exactly where it was; later work of it is then refused
// (SESSION_OUT_OF_STEP) until one says the right expected_position.
//
// Generation is a work too: its prompt is taken in as any input, and then one sampled token after another,
// each fed back on the device. Rows that generate come first in every step; prompts and streams get what is
// left of the step's tokens, and while rows generate, of `mixed_step_tokens`. It commits once, at its end.
//
// A lost device (a model's DATA_LOSS) fails all work, what is queued and what comes later, with INTERNAL.
//
// The thread waits on an idle device for nothing, but for this: lanes that the last step has answered are
// given up to `gather_fraction` of that step's time to come back, so that closed-loop clients do not fall
// into small batches.
#ifndef DELTANET_SERVER_BATCHER_H_
#define DELTANET_SERVER_BATCHER_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>

#include "absl/functional/any_invocable.h"
#include "absl/status/status.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "model/base/tensor_view.h"
#include "model/model.h"
#include "model/state_pool.h"
#include "server/clock.h"
#include "server/executor.h"

namespace deltanet {

// Set once, from any thread, when nobody wants the answers any more; shared by a call and all of its work,
// because either can end first.
struct Cancellation {
  std::atomic<bool> cancelled{false};
};

struct WorkResult {
  absl::Status status;  // With a reason of proto/wire.h; on an error nothing was applied.
  int64_t output_position = 0;
  int64_t output_tokens = 0;       // Written to Work::output, or the readout's arrays.
  int64_t generated_tokens = 0;    // Given to Generation::on_token, on an error too.
  absl::Duration first_token;      // From Submit to the first of them.
  int64_t committed_position = 0;  // Of the lane, now.
  bool ended = false;              // The lane has committed its end_of_sequence.
  absl::Duration queued;     // From Submit to the start of the first step it was in (or to now, if in none).
  absl::Duration computing;  // Sum of the steps that it was in.
  int64_t together = 1;      // Works that are answered at once, this one included.
};

struct GeneratedToken {
  int64_t id = 0;
  float log_prob = 0;
  absl::Span<const int64_t> top_ids;  // Work::top of them; valid during the call.
  absl::Span<const float> top_log_probs;
};

// What a work goes on with after its input.
struct Generation {
  Sampling sampling;
  int64_t max_tokens = 1;  // At least 1.
  // The lane goes on afterwards: the last token is taken in too.
  bool keep_state = false;
  // Called on the batch thread, under no lock, for each token in order, before `done`. Must not block. False: this
  // was the last. Not called again after that, nor once the work has failed.
  absl::AnyInvocable<bool(const GeneratedToken&)> on_token;
};

// One message: a span of tokens for a lane.
struct Work {
  const void* input = nullptr;  // [tokens, input_width]; stays alive until `done` is called.
  DType input_dtype = DType::kFloat32;
  int64_t tokens = 0;  // At least 1, or 0 with end_of_sequence, or where a lane that has a state generates.
  bool end_of_sequence = false;
  void* output = nullptr;  // Room for tokens (+ lookahead, with end_of_sequence) rows; alive likewise.
  DType output_dtype = DType::kFloat32;
  // What is made of the outputs, and for models that generate, where it goes instead of `output` (see StepRow;
  // kSample is not for here). kTop and kScore: room for `tokens` entries (or 1), alive likewise. kScore scores the
  // input itself: its second token and on, and where the lane has a state the first too.
  ReadoutKind readout = ReadoutKind::kValues;
  bool last_only = false;  // kValues, kTop: of the last token alone.
  int top = 0;
  float* log_probs = nullptr;
  int64_t* top_ids = nullptr;
  float* top_log_probs = nullptr;
  // Not null: nothing is wanted of the input's outputs, and tokens are generated after it. `top` is per token.
  std::unique_ptr<Generation> generation;
  std::optional<int64_t> expected_position;
  absl::Time deadline = absl::InfiniteFuture();
  // Not OK: the message was found bad before it came here; it takes its place in the order, fails with this,
  // and puts the lane out of step as any failure does.
  absl::Status precondition;
  std::shared_ptr<const Cancellation> cancellation;  // May be null.
  // Called exactly once, on the batch thread (or on the thread that destroys the batcher), under no lock.
  // Must not block, but may Submit and Close. The work is destroyed right after.
  absl::AnyInvocable<void(const WorkResult&)> done;
};

// Told of what happens; feeds the metrics. Called on the batch thread, under no lock; must not block.
class BatchObserver {
 public:
  virtual ~BatchObserver() = default;
  struct Step {
    int model = 0;
    int64_t rows = 0;
    int64_t tokens = 0;
    int64_t generating = 0;    // Rows that sampled a token.
    absl::Duration form;     // Choosing the rows.
    absl::Duration prepare;  // Filling staging.
    // Launch to the end of Wait, less what an earlier step in flight still took of that.
    absl::Duration compute;
  };
  virtual void OnStep(const Step& step) = 0;
  virtual void OnWorkDone(int model, const WorkResult& result) = 0;
  // A token was generated, `since` its work was submitted, or the token before it of that work.
  virtual void OnToken(int /*model*/, bool /*first*/, absl::Duration /*since*/) {}
  // The device is lost, and with it all work: `status` is the model's DATA_LOSS, in full. At most once,
  // before any of that work is answered.
  virtual void OnDeviceLost(const absl::Status& status) = 0;
};

// Whether the batch thread lives.
struct Heartbeat {
  absl::Time progress;  // When it last began a turn or finished a step.
  bool busy = false;    // It has been at something since then; else it waits for work.
};

struct BatcherOptions {
  // What a lane gets of a step while others wait (up to 16 more, if that is all it has); a multiple of 64.
  int64_t piece_tokens = 256;
  int64_t max_queued_works = 4096;  // See Batcher::queued_works.
  int64_t max_queued_tokens = int64_t{1} << 20;
  // What a step with rows that generate takes at most of others' tokens, so that the time between tokens
  // stays even; at least kMinStepTokens are meant.
  int64_t mixed_step_tokens = 256;
  double gather_fraction = 0.1;
};

// Opaque. shared_ptr: a session, a stream and the batch thread hold it, and any of them can be last.
class Lane;

// Thread-safe. Owned by the server; the models, clock and observer outlive it. Lanes may outlive it, but are
// then only to be dropped.
class Batcher {
 public:
  // `observer` may be null.
  Batcher(const BatcherOptions& options, Clock* clock, BatchObserver* observer);
  // Stops the thread after the step in flight and fails all work that is left with UNAVAILABLE (DRAINING).
  ~Batcher();

  // Before Start. Returns the model's number here: 0, 1, ... `model` is borrowed and from Start on belongs to
  // the batch thread. Of its slots, `running_slots` are for work in flight; sessions may hold the rest (see
  // max_sessions).
  int AddModel(Model* model, int64_t running_slots);
  // Starts the batch thread. Tests leave it out and call RunOnce.
  void Start();

  const ModelDescription& description(int model) const;
  // Lanes of this model that may keep a committed state at the same time; the session store sees to it.
  // (Where it did not, and lanes at rest hold every slot, work that needs one fails with RESOURCE_EXHAUSTED
  // (SESSIONS_FULL).)
  int64_t max_sessions(int model) const;
  int64_t free_slots(int model) const;

  // A lane in zero state.
  std::shared_ptr<Lane> OpenLane(int model);

  enum class WhenFull { kRefuse, kQueue };
  // Hands `*work` over if and only if the result is OK; otherwise `*work` is left as it was. UNAVAILABLE
  // (DRAINING) while draining; with kRefuse also UNAVAILABLE (QUEUE_FULL) where options.max_queued_* are
  // reached. NOT_FOUND (SESSION_ENDED) on a closed or ended lane. INTERNAL once the device is lost. Never
  // blocks and never calls `done` itself.
  absl::Status Submit(const std::shared_ptr<Lane>& lane, std::unique_ptr<Work>* work, WhenFull when_full);
  // The same for work of several lanes, which the next step then finds all there: either all of it is handed
  // over or, on an error, none. With kRefuse there must be room for all.
  absl::Status SubmitAll(absl::Span<const std::shared_ptr<Lane>> lanes,
                         absl::Span<std::unique_ptr<Work>> works, WhenFull when_full);

  // Ends a lane: queued work fails with CANCELLED (SESSION_ENDED), running work is given up at the next
  // piece, the slots are free within a step. Further Submits are refused. Any number of times.
  void Close(const std::shared_ptr<Lane>& lane);
  // Makes the batch thread look at cancellations now.
  void Wake();

  int64_t committed_position(const std::shared_ptr<Lane>& lane) const;
  // Work of the lane that is not answered yet: its `done` has not returned.
  int64_t pending(const std::shared_ptr<Lane>& lane) const;
  // Works that have not been in a step, and tokens (flush tokens included) that have not been put into one.
  int64_t queued_works() const;
  int64_t queued_tokens() const;
  // Generations of a model: that have been in a step, and that wait for their first.
  int64_t running_generations(int model) const;
  int64_t waiting_generations(int model) const;
  Heartbeat heartbeat() const;

  // Refuses new work from now on.
  void StartDraining();
  // Blocks until no work is left unanswered, or until `deadline`: false then.
  bool WaitUntilIdle(absl::Time deadline);

  // One turn of the batch thread: forms a step of what is ready, runs it, completes what is done. False if
  // there was nothing to do. Without Start only; blocks for the step alone.
  bool RunOnce();

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace deltanet

#endif  // DELTANET_SERVER_BATCHER_H_
