// A model without mathematics: its state is a running hash of all that the sequence was fed, and its output
// is made of that state. A mixed-up session, a lost or repeated chunk, a wrong slot, a stale read, a wrong
// fresh flag or a wrong end gives another output than ExpectedOutput; a position that is not the state's is a
// failed check, and so is feeding a sampled token that the slot does not hold.
//
// Over tokens and without look-ahead it generates: its outputs are logits, and what is scored, sampled or
// most likely is computed of them as model.h says, so that a wrong token anywhere changes every later one.
#ifndef DELTANET_TESTS_TESTING_FAKE_MODEL_H_
#define DELTANET_TESTS_TESTING_FAKE_MODEL_H_

#include <cstdint>
#include <deque>
#include <map>
#include <optional>
#include <set>
#include <utility>
#include <vector>

#include "absl/functional/any_invocable.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "model/base/mutex.h"
#include "model/model.h"

namespace deltanet {

struct FakeModelOptions {
  bool takes_tokens = false;
  int64_t input_width = 3;
  int64_t output_width = 8;
  int64_t lookahead =
      0;  // Outputs lag the input and depend on what comes after them, as with centred convolutions.
  int64_t num_slots = 8;
  int64_t max_step_tokens = 256;
  int64_t max_step_rows = 16;
  int max_steps_in_flight = 1;
  // Over tokens:
  int64_t max_step_logits = 0;  // 0: max_step_tokens.
  std::optional<int64_t> bos_id;
  std::optional<int64_t> eos_id;
};

// An id and its log-probability.
struct ScoredId {
  int64_t id = 0;
  float log_prob = 0;
  bool operator==(const ScoredId&) const = default;
};

// The log-probability that softmax(logits) gives to `id`.
float LogProb(absl::Span<const float> logits, int64_t id);
// The `count` most likely ids of softmax(logits), most likely first; of equals the lower id first.
std::vector<ScoredId> MostLikely(absl::Span<const float> logits, int64_t count);

// Prepare, Launch and Wait as in model.h; what steers and watches them is thread-safe. Steps are numbered 0,
// 1, ... in the order of successful Prepares.
class FakeModel : public Model {
 public:
  explicit FakeModel(const FakeModelOptions& options);

  const ModelDescription& description() const override { return description_; }
  absl::StatusOr<StepTicket> Prepare(absl::Span<const StepRow> rows) override;
  absl::Status Launch(StepTicket ticket) override;
  absl::StatusOr<StepResult> Wait(StepTicket ticket) override;

  // All outputs of a whole sequence, [T, output_width] for `input` of [T, input_width] values or [T] ids.
  // Every value is exact in float32, float16 and bfloat16. Outputs but the last `lookahead` ones are also
  // those of a longer sequence.
  std::vector<float> ExpectedOutput(absl::Span<const float> input) const;
  std::vector<float> ExpectedOutput(absl::Span<const int64_t> ids) const;
  // The logits behind the last of `ids`, of which there is at least one.
  std::vector<float> ExpectedLogits(absl::Span<const int64_t> ids) const;
  // What is generated behind `ids`, of which there is at least one: `count` tokens.
  std::vector<ScoredId> ExpectedGeneration(absl::Span<const int64_t> ids, const Sampling& sampling,
                                           int64_t count) const;

  // Failures to come. Work slots of what fails are worthless after it.
  void FailLaunch(int64_t step, absl::Status status);
  void FailWait(int64_t step, absl::Status status);
  void FailRow(int64_t step, int64_t row);  // As non-finite: INTERNAL for that row alone.

  // Called at the start of each Launch, with the number of the step, on the batch thread.
  void OnLaunch(absl::AnyInvocable<void(int64_t step)> hook);

  // Makes that step's Wait block until Release; WaitUntilHeld blocks until it does.
  void Hold(int64_t step);
  void WaitUntilHeld(int64_t step);
  void Release(int64_t step);

  // The rows of all steps that were launched so far (their pointers may be stale).
  std::vector<std::vector<StepRow>> launched() const;

 private:
  struct Slot {
    uint64_t hash;
    int64_t fed;           // Tokens; -1: worthless.
    int64_t sampled = -1;  // The id that the row which wrote this has sampled; -1: it sampled none.
  };
  // What a row wants beside values.
  struct Readouts {
    std::vector<int64_t> ids;
    std::vector<float> log_probs;
    std::vector<ScoredId> top;
  };
  struct Prepared {
    int64_t step;
    std::vector<StepRow> rows;
    std::vector<std::vector<uint64_t>> inputs;  // A row each: the hashes of its real tokens.
    std::vector<std::vector<int64_t>> targets;  // A row each.
    bool launched = false;
    std::vector<std::vector<float>> outputs;  // A row each: values.
    std::vector<Readouts> readouts;           // A row each.
    StepResult result;
  };

  absl::Status Validate(absl::Span<const StepRow> rows) const;
  absl::Status ValidateReadout(const StepRow& row) const;
  // The row's part of the step, of which it is number i: its state moves on, its outputs are kept.
  absl::Status ComputeRow(Prepared* step, size_t i, bool failing);
  void AppendOutput(uint64_t hash, std::vector<float>* to) const;
  std::vector<float> ExpectedOfHashes(const std::vector<uint64_t>& inputs) const;

  const ModelDescription description_;

  // Of the batch thread.
  std::vector<Slot> slots_;
  std::map<StepTicket, Prepared> prepared_;
  std::deque<StepTicket> in_flight_;
  int64_t next_step_ = 0;

  mutable Mutex mu_;
  CondVar changed_;
  std::map<int64_t, absl::Status> failing_launches_ ABSL_GUARDED_BY(mu_);
  std::map<int64_t, absl::Status> failing_waits_ ABSL_GUARDED_BY(mu_);
  std::set<std::pair<int64_t, int64_t>> failing_rows_ ABSL_GUARDED_BY(mu_);
  absl::AnyInvocable<void(int64_t)> on_launch_ ABSL_GUARDED_BY(mu_);
  std::set<int64_t> held_ ABSL_GUARDED_BY(mu_);
  std::optional<int64_t> blocked_in_ ABSL_GUARDED_BY(mu_);
  std::vector<std::vector<StepRow>> launched_ ABSL_GUARDED_BY(mu_);
};

}  // namespace deltanet

#endif  // DELTANET_TESTS_TESTING_FAKE_MODEL_H_
