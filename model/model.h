// A loaded model: weights and a pool of state slots on one device, advanced one step (a ragged batch of rows)
// at a time.
//
// Who calls: the batch thread of the device, which alone calls Prepare, Launch and Wait (confined to it);
// description() is constant and may be read from any thread. Who owns: the server, which destroys it after
// its batch thread ended. Tests put a fake behind the same interface.
#ifndef DELTANET_MODEL_MODEL_H_
#define DELTANET_MODEL_MODEL_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "model/base/tensor_view.h"

namespace deltanet {

// What a model is and takes. Constant.
struct ModelDescription {
  std::string family;         // "transformer_deltanet", ...
  bool takes_tokens = false;  // Input is int64 ids [T]; else float values [T, input_width].
  int64_t input_width = 1;    // Values a token: d_model, or 1 for ids.
  int64_t output_width = 0;   // Values a token: d_model, or the vocabulary.
  int64_t vocab_size = 0;     // Ids are in [0, vocab_size); 0 if it does not take tokens.
  // Whether rows may score, sample and feed what was sampled: a model over tokens without look-ahead.
  bool generates = false;
  // What the model's files say of its special ids; none, where they say nothing.
  std::optional<int64_t> bos_id;
  std::vector<int64_t> eos_ids;
  int64_t lookahead = 0;   // Tokens by which a stream's output lags its input (layers x look-ahead of one).
  int64_t parameters = 0;  // As in the file.
  DType dtype = DType::kFloat32;  // In which it computes.
  bool deterministic = false;     // See ModelOptions.
  Device device;
  int64_t session_bytes = 0;    // Of one slot: a session's whole state.
  int64_t num_slots = 0;        // Slots in the pool, 0 .. num_slots-1.
  int64_t weight_bytes = 0;     // On the device.
  int64_t graphs = 0;           // Steps captured at load, to be launched as one; 0 on the CPU.
  int64_t graph_bytes = 0;      // Of the device's memory, for these.
  int64_t max_step_tokens = 0;  // Largest step that Prepare takes: workspace is sized for it.
  int64_t max_step_rows = 0;
  // Models over tokens: most tokens of a step whose logits are handed over. At least kMinStepTokens, or all.
  int64_t max_step_logits = 0;
  int max_steps_in_flight =
      1;  // Launched and not yet waited for: 1 where Launch computes (CPU), 2 where it queues.
};

// How the next token is chosen; see ops/readout.h for the mathematics.
struct Sampling {
  float temperature = 0.0f;  // 0: the most likely. Finite, not negative.
  int32_t top_k = 0;         // 0: all.
  float top_p = 1.0f;        // In (0, 1].
  uint64_t seed = 0;
};

// What is made of the outputs that a row wants.
enum class ReadoutKind : uint8_t {
  kValues,  // They are handed over: logits, in a model over tokens.
  // Models that generate only:
  kTop,     // Their `top` most likely ids.
  kScore,   // The log-probability of one given id each, and `top`.
  kSample,  // One output only: an id is sampled, and `top`. It is kept beside the state in the work slot too.
};
inline constexpr int kMaxTop = 64;  // Of StepRow::top.

// A message may be cut into rows at multiples of kCutTokens from its start, so that kFewTokens or fewer
// tokens are never a row of their own (for such rows there are other kernels) unless they are the message:
// then the cuts change no bit of what comes out.
inline constexpr int64_t kCutTokens = 64;
inline constexpr int64_t kFewTokens = 16;
// A step that holds this many tokens has room for a row of any message.
inline constexpr int64_t kMinStepTokens = kCutTokens + kFewTokens;

// One row of a step: `tokens` tokens of one sequence, of which the first may be real and the last may be
// flush tokens (those at times >= end, which carry no input). See model/ops/rows.h for time, position and
// end.
struct StepRow {
  int32_t base_slot = -1;   // State read. Ignored where fresh.
  int32_t work_slot = -1;   // State written; may equal base_slot.
  bool fresh = false;       // Start from zero state.
  int64_t position = 0;     // Tokens fed to the sequence before this row.
  int64_t end = INT64_MAX;  // Length of the sequence once known (end_of_sequence), else INT64_MAX.
  int64_t tokens = 0;       // May be 0: the state is copied.

  // The real tokens' input, max(0, min(tokens, end - position)) of them: [., input_width] of input_dtype, or
  // [.] int64. Copied by Prepare. May be unaligned. Values are finite and ids in range: checked by the
  // caller. Null where feed_sampled.
  const void* input = nullptr;
  DType input_dtype = DType::kFloat32;
  // The row has one token, the one that the last kSample row that wrote its base slot has chosen (which may
  // be in flight still). Models that generate only.
  bool feed_sampled = false;

  // Which outputs are wanted: those of the row's tokens [output_begin, output_end), of which only those whose
  // position is >= 0 exist. output_begin -1, in models that generate and where not fresh: also the output of
  // the last token before the row, which the base slot carries; it comes first.
  int64_t output_begin = 0;
  int64_t output_end = INT64_MAX;  // More than `tokens` means `tokens`.
  ReadoutKind readout = ReadoutKind::kValues;

  // kValues: receives the outputs, [., output_width] of output_dtype, at Wait.
  void* output = nullptr;
  DType output_dtype = DType::kFloat32;

  // Otherwise, for the P outputs that are wanted. What is written is written at Wait.
  int top = 0;                       // Most likely ids wanted of each; 0 ... kMaxTop.
  const void* targets = nullptr;     // kScore: [P] int64 ids in range. Copied by Prepare. May be unaligned.
  Sampling sampling;                 // kSample, whose counter is the position of the token that is chosen.
  int64_t* ids = nullptr;            // kSample: [P]
  float* log_probs = nullptr;        // kScore, kSample: [P] of the target or the chosen id.
  int64_t* top_ids = nullptr;        // [P, top], most likely first.
  float* top_log_probs = nullptr;    // [P, top]
};

// Position of the first output of a span of tokens fed from time `position`, for a model that lags by
// `lookahead`.
inline int64_t FirstOutputPosition(int64_t position, int64_t lookahead) {
  return position > lookahead ? position - lookahead : 0;
}
// How many outputs a span of `tokens` tokens (flush tokens included) fed from time `position` gives.
inline int64_t OutputTokens(int64_t position, int64_t tokens, int64_t lookahead) {
  const int64_t skipped = lookahead > position ? lookahead - position : 0;
  return tokens > skipped ? tokens - skipped : 0;
}

// A step in flight.
using StepTicket = int64_t;

struct StepResult {
  // A row each: OK, or INTERNAL if its state or output became infinite or NaN; its work slot is then
  // worthless, and no other row is touched by that.
  std::vector<absl::Status> rows;
  bool as_graph = false;  // Whether the step was launched as a graph.
};

class Model {
 public:
  virtual ~Model() = default;

  virtual const ModelDescription& description() const = 0;

  // Copies the rows' input into staging and returns a ticket; touches no slot. INVALID_ARGUMENT if a slot,
  // size, readout or dtype is out of range, two rows share a work slot or one reads what another writes, or the step
  // is larger than max_step_tokens / max_step_rows; FAILED_PRECONDITION if max_steps_in_flight are under way.
  // Then nothing has changed.
  virtual absl::StatusOr<StepTicket> Prepare(absl::Span<const StepRow> rows) = 0;

  // Starts the step; steps take effect in the order of Launch. On an error the ticket is spent, the work
  // slots are worthless and all other slots are as before: RESOURCE_EXHAUSTED if memory was short, INTERNAL
  // otherwise, and DATA_LOSS if the device is lost (a CUDA error that stays): from then on every step fails
  // so, and only a new process can help.
  virtual absl::Status Launch(StepTicket ticket) = 0;

  // Blocks until the step is done, writes the rows' outputs and spends the ticket. Errors as Launch.
  virtual absl::StatusOr<StepResult> Wait(StepTicket ticket) = 0;
};

// How much of one model's checkpoint has been read.
struct ModelLoadProgress {
  absl::string_view directory;
  int64_t bytes = 0;
  int64_t total_bytes = 0;
};

// How a step runs whose rows have one token each. For tests other than kGraphs.
enum class OneTokenSteps {
  // Padded to one of a few numbers of rows and launched as a graph, where the device has graphs; then steps of
  // more tokens are graphs as well where they are repeated.
  kGraphs,
  kPadded,    // Padded likewise, on any device, and launched operator by operator.
  kUnpadded,  // As it is, operator by operator.
};

struct ModelOptions {
  Device device;
  DType dtype = DType::kFloat32;  // What products are computed in: float32, or on CUDA bfloat16.
  // What a row gives and writes to its slot has the same bits whatever else is in the step: the numbers of
  // tokens and rows, their order, the slots. Depends on the device, the dtype and on how messages are cut
  // (kCutTokens). FAILED_PRECONDITION where the device's products turn out not to be so.
  bool deterministic = false;
  int64_t max_step_tokens = 2048;
  int64_t max_step_rows = 256;
  // Memory for state slots, shared equally among the models that are loaded together: of each model as many
  // as fit, at most max_slots, at least min_slots. 0, on CUDA only: pool_fraction of what is free once all of
  // them have their weights and have run their largest step. Graphs are captured after that, out of the rest.
  int64_t pool_bytes = 0;
  double pool_fraction = 0.9;
  int64_t min_slots = 2;  // RESOURCE_EXHAUSTED if these do not fit in pool_bytes.
  int64_t max_slots = int64_t{1} << 20;
  int cpu_threads = 1;  // Threads of a step on the CPU, the batch thread included.
  OneTokenSteps one_token_steps = OneTokenSteps::kGraphs;
  // Called by the loading thread after every few MiB; the last call of a model has all its bytes. Null: not
  // wanted.
  std::function<void(const ModelLoadProgress&)> on_progress;
};

// Loads models onto one device: of each, DIRECTORY/config.json and DIRECTORY/model.safetensors. Runs each
// one's largest step once, so that what is allocated or chosen on first use is there before the first client, and
// on CUDA captures the graphs of its short steps.
// Errors name the directory: NOT_FOUND, INVALID_ARGUMENT as config.h and safetensors.h, INVALID_ARGUMENT too
// for a dtype that the device does not compute in; FAILED_PRECONDITION if the device is not there or this
// build has no CUDA; RESOURCE_EXHAUSTED if memory is short.
absl::StatusOr<std::vector<std::unique_ptr<Model>>> LoadModels(absl::Span<const std::string> directories,
                                                               const ModelOptions& options);
// The same for one.
absl::StatusOr<std::unique_ptr<Model>> LoadModel(const std::string& directory, const ModelOptions& options);

// A device's own memory, as its driver counts it: not free is what any process holds, used or not.
struct DeviceMemory {
  int64_t total_bytes = 0;
  int64_t free_bytes = 0;
};

// Nothing for the CPU, for a device that is not there or is lost, and in a build without CUDA. Thread-safe.
std::optional<DeviceMemory> QueryDeviceMemory(const Device& device);

}  // namespace deltanet

#endif  // DELTANET_MODEL_MODEL_H_
