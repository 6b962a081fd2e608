#include "tests/testing/fake_model.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <string>

#include "absl/strings/str_cat.h"
#include "model/base/check.h"
#include "model/base/status_macros.h"

namespace deltanet {
namespace {

constexpr uint64_t kZeroState = 0x243F6A8885A308D3;
constexpr uint64_t kPoison = 0xDEADDEADDEADDEAD;
constexpr uint64_t kFlushToken = 0x13198A2E03707344;

// The finaliser of MurmurHash3 over the sum of both: order matters, every bit counts.
uint64_t Mix(uint64_t hash, uint64_t value) {
  uint64_t x = hash * 0x9E3779B97F4A7C15 + value + 1;
  x ^= x >> 33;
  x *= 0xFF51AFD7ED558CCD;
  x ^= x >> 33;
  x *= 0xC4CEB9FE1A85EC53;
  x ^= x >> 33;
  return x;
}

uint64_t HashValues(const float* values, int64_t width) {
  uint64_t hash = 0;
  for (int64_t i = 0; i < width; ++i) {
    uint32_t bits;
    std::memcpy(&bits, &values[i], sizeof(bits));
    hash = Mix(hash, bits);
  }
  return hash;
}

uint64_t HashId(int64_t id) { return Mix(1, static_cast<uint64_t>(id)); }

bool IsFloat(DType dtype) { return dtype != DType::kInt64; }

int64_t RealTokens(const StepRow& row) { return std::clamp<int64_t>(row.end - row.position, 0, row.tokens); }

// The row's first token whose output is wanted, -1 for the one before it, and the first whose is not.
std::pair<int64_t, int64_t> WantedOutputs(const StepRow& row, int64_t lookahead) {
  const int64_t exist_from = row.tokens - OutputTokens(row.position, row.tokens, lookahead);
  const int64_t begin = row.output_begin < 0 ? -1 : std::max(row.output_begin, exist_from);
  const int64_t least_end = std::max<int64_t>(begin, 0);
  return {begin, std::max(least_end, std::min(row.output_end, row.tokens))};
}

int64_t CountOutputs(const StepRow& row, int64_t lookahead) {
  const auto [begin, end] = WantedOutputs(row, lookahead);
  return end - begin;
}

std::vector<double> Probabilities(absl::Span<const float> logits, double temperature) {
  const double most = *std::max_element(logits.begin(), logits.end());
  std::vector<double> p(logits.size());
  for (size_t i = 0; i < p.size(); ++i) p[i] = std::exp((logits[i] - most) / temperature);
  const double sum = std::accumulate(p.begin(), p.end(), 0.0);
  for (double& value : p) value /= sum;
  return p;
}

// Ids, the largest value first; of equals the lower id first.
template <typename Values>
std::vector<int64_t> Ranked(const Values& values) {
  std::vector<int64_t> ids(values.size());
  std::iota(ids.begin(), ids.end(), 0);
  std::stable_sort(ids.begin(), ids.end(), [&](int64_t a, int64_t b) { return values[a] > values[b]; });
  return ids;
}

// The token at `position` of a sequence.
int64_t SampleId(absl::Span<const float> logits, const Sampling& sampling, int64_t position) {
  if (sampling.temperature == 0) return Ranked(logits).front();
  const std::vector<double> p = Probabilities(logits, sampling.temperature);
  std::vector<int64_t> kept = Ranked(p);
  if (sampling.top_k > 0 && sampling.top_k < static_cast<int64_t>(kept.size())) kept.resize(sampling.top_k);
  double all = 0;
  for (const int64_t id : kept) all += p[id];
  double sum = 0;
  size_t count = 0;
  while (count < kept.size() && (count == 0 || sum < sampling.top_p * all)) sum += p[kept[count++]];
  kept.resize(count);
  std::sort(kept.begin(), kept.end());
  const double u = static_cast<double>(Mix(sampling.seed, position) >> 11) * 0x1p-53 * sum;
  double cumulative = 0;
  for (const int64_t id : kept) {
    cumulative += p[id];
    if (cumulative > u) return id;
  }
  return kept.back();
}

ModelDescription Describe(const FakeModelOptions& options) {
  ModelDescription description;
  description.family = options.takes_tokens ? "deltanet_model" : "transformer_deltanet";
  description.takes_tokens = options.takes_tokens;
  description.input_width = options.takes_tokens ? 1 : options.input_width;
  description.output_width = options.output_width;
  description.vocab_size = options.takes_tokens ? options.output_width : 0;
  description.generates = options.takes_tokens && options.lookahead == 0;
  description.bos_id = options.bos_id;
  if (options.eos_id.has_value()) description.eos_ids.push_back(*options.eos_id);
  if (options.takes_tokens) {
    description.max_step_logits =
        options.max_step_logits > 0 ? options.max_step_logits : options.max_step_tokens;
  }
  description.lookahead = options.lookahead;
  description.parameters = 1;
  description.session_bytes = 16;
  description.num_slots = options.num_slots;
  description.max_step_tokens = options.max_step_tokens;
  description.max_step_rows = options.max_step_rows;
  description.max_steps_in_flight = options.max_steps_in_flight;
  return description;
}

}  // namespace

float LogProb(absl::Span<const float> logits, int64_t id) {
  return static_cast<float>(std::log(Probabilities(logits, 1)[id]));
}

std::vector<ScoredId> MostLikely(absl::Span<const float> logits, int64_t count) {
  const std::vector<double> p = Probabilities(logits, 1);
  std::vector<ScoredId> top;
  for (const int64_t id : Ranked(logits)) {
    if (static_cast<int64_t>(top.size()) == count) break;
    top.push_back({id, static_cast<float>(std::log(p[id]))});
  }
  return top;
}

FakeModel::FakeModel(const FakeModelOptions& options)
    : description_(Describe(options)), slots_(options.num_slots, Slot{kPoison, -1}) {}

absl::Status FakeModel::Validate(absl::Span<const StepRow> rows) const {
  if (static_cast<int64_t>(rows.size()) > description_.max_step_rows) {
    return absl::InvalidArgumentError(
        absl::StrCat("step has ", rows.size(), " rows, want at most ", description_.max_step_rows));
  }
  int64_t tokens = 0, values = 0;
  std::map<int32_t, size_t> writers;
  for (size_t i = 0; i < rows.size(); ++i) {
    const StepRow& row = rows[i];
    const auto in_range = [&](int32_t slot) { return slot >= 0 && slot < description_.num_slots; };
    if (!in_range(row.work_slot)) {
      return absl::InvalidArgumentError(absl::StrCat("row ", i, ": work_slot is ", row.work_slot));
    }
    if (!row.fresh && !in_range(row.base_slot)) {
      return absl::InvalidArgumentError(absl::StrCat("row ", i, ": base_slot is ", row.base_slot));
    }
    if (row.tokens < 0 || row.position < 0 || row.end < 0) {
      return absl::InvalidArgumentError(absl::StrCat("row ", i, ": tokens ", row.tokens, ", position ",
                                                     row.position, ", end ", row.end,
                                                     ", want none negative"));
    }
    if (const absl::Status status = ValidateReadout(row); !status.ok()) {
      return absl::InvalidArgumentError(absl::StrCat("row ", i, ": ", status.message()));
    }
    if (row.readout == ReadoutKind::kValues) values += CountOutputs(row, description_.lookahead);
    const bool has_input = RealTokens(row) > 0 && !row.feed_sampled;
    if ((has_input && (row.input_dtype == DType::kInt64) != description_.takes_tokens) ||
        !IsFloat(row.output_dtype)) {
      return absl::InvalidArgumentError(absl::StrCat("row ", i, ": input is ", DTypeName(row.input_dtype),
                                                     ", output ", DTypeName(row.output_dtype)));
    }
    if (const auto [it, added] = writers.emplace(row.work_slot, i); !added) {
      return absl::InvalidArgumentError(
          absl::StrCat("rows ", it->second, " and ", i, " share work_slot ", row.work_slot));
    }
    tokens += row.tokens;
  }
  for (size_t i = 0; i < rows.size(); ++i) {
    if (rows[i].fresh) continue;
    const auto writer = writers.find(rows[i].base_slot);
    if (writer != writers.end() && writer->second != i) {
      return absl::InvalidArgumentError(absl::StrCat("row ", i, " reads slot ", rows[i].base_slot,
                                                     ", which row ", writer->second, " writes"));
    }
  }
  if (tokens > description_.max_step_tokens) {
    return absl::InvalidArgumentError(
        absl::StrCat("step has ", tokens, " tokens, want at most ", description_.max_step_tokens));
  }
  if (description_.takes_tokens && values > description_.max_step_logits) {
    return absl::InvalidArgumentError(absl::StrCat("step wants the logits of ", values,
                                                   " tokens, want at most ", description_.max_step_logits));
  }
  return absl::OkStatus();
}

absl::Status FakeModel::ValidateReadout(const StepRow& row) const {
  if (!description_.generates &&
      (row.readout != ReadoutKind::kValues || row.feed_sampled || row.output_begin < 0)) {
    return absl::InvalidArgumentError("wants what only a model that generates has");
  }
  if (row.feed_sampled && (row.fresh || row.tokens != 1)) {
    return absl::InvalidArgumentError(
        absl::StrCat("feed_sampled with ", row.tokens, " tokens", row.fresh ? ", fresh" : ""));
  }
  if (row.output_begin < -1 || (row.output_begin == -1 && row.fresh)) {
    return absl::InvalidArgumentError(
        absl::StrCat("output_begin is ", row.output_begin, row.fresh ? ", fresh" : ""));
  }
  if (row.top < 0 || row.top > kMaxTop) return absl::InvalidArgumentError(absl::StrCat("top is ", row.top));
  const int64_t wanted = CountOutputs(row, description_.lookahead);
  if (row.readout == ReadoutKind::kSample && wanted != 1) {
    return absl::InvalidArgumentError(absl::StrCat("samples of ", wanted, " outputs, want 1"));
  }
  return absl::OkStatus();
}

absl::StatusOr<StepTicket> FakeModel::Prepare(absl::Span<const StepRow> rows) {
  RETURN_IF_ERROR(Validate(rows));
  if (static_cast<int>(prepared_.size()) >= description_.max_steps_in_flight) {
    return absl::FailedPreconditionError(absl::StrCat(prepared_.size(), " steps are under way, want at most ",
                                                      description_.max_steps_in_flight - 1));
  }
  Prepared step;
  step.step = next_step_++;
  step.rows.assign(rows.begin(), rows.end());
  for (const StepRow& row : rows) {
    const int64_t real = RealTokens(row);
    std::vector<uint64_t> hashes;
    if (row.feed_sampled) {
      // Known at Launch.
    } else if (description_.takes_tokens) {
      std::vector<int64_t> ids(real);
      if (real > 0) std::memcpy(ids.data(), row.input, real * sizeof(int64_t));
      for (const int64_t id : ids) hashes.push_back(HashId(id));
    } else {
      std::vector<float> values(real * description_.input_width);
      ConvertElements(row.input, row.input_dtype, values.data(), DType::kFloat32,
                      static_cast<int64_t>(values.size()));
      for (int64_t t = 0; t < real; ++t) {
        hashes.push_back(HashValues(&values[t * description_.input_width], description_.input_width));
      }
    }
    step.inputs.push_back(std::move(hashes));
    std::vector<int64_t> targets;
    if (row.readout == ReadoutKind::kScore) targets.resize(CountOutputs(row, description_.lookahead));
    if (!targets.empty()) std::memcpy(targets.data(), row.targets, targets.size() * sizeof(int64_t));
    step.targets.push_back(std::move(targets));
  }
  const StepTicket ticket = step.step;
  prepared_.emplace(ticket, std::move(step));
  return ticket;
}

absl::Status FakeModel::Launch(StepTicket ticket) {
  const auto found = prepared_.find(ticket);
  DELTANET_CHECK(found != prepared_.end() && !found->second.launched,
                 "Launch of a ticket that was not prepared");
  Prepared& step = found->second;
  absl::Status failure;
  absl::AnyInvocable<void(int64_t)> hook;
  std::vector<bool> failing(step.rows.size());
  {
    MutexLock lock(&mu_);
    launched_.push_back(step.rows);
    if (const auto it = failing_launches_.find(step.step); it != failing_launches_.end())
      failure = it->second;
    for (size_t i = 0; i < step.rows.size(); ++i) failing[i] = failing_rows_.count({step.step, i}) > 0;
    hook = std::move(on_launch_);
  }
  if (hook) {
    hook(step.step);  // Not under the lock: it may steer this.
    MutexLock lock(&mu_);
    if (!on_launch_) on_launch_ = std::move(hook);
  }
  if (!failure.ok()) {
    for (const StepRow& row : step.rows) slots_[row.work_slot] = {kPoison, -1};
    prepared_.erase(found);
    return failure;
  }
  step.outputs.resize(step.rows.size());
  step.readouts.resize(step.rows.size());
  for (size_t i = 0; i < step.rows.size(); ++i) {
    step.result.rows.push_back(ComputeRow(&step, i, failing[i]));
  }
  step.launched = true;
  in_flight_.push_back(ticket);
  return absl::OkStatus();
}

absl::Status FakeModel::ComputeRow(Prepared* step, size_t i, bool failing) {
  const StepRow& row = step->rows[i];
  Slot slot = row.fresh ? Slot{kZeroState, 0} : slots_[row.base_slot];
  // A state that failed earlier in the pipeline is worthless, and so is all that comes of it.
  const bool worthless = slot.fed < 0;
  DELTANET_CHECK(worthless || slot.fed == row.position, "a row's position is not that of its state");
  if (row.feed_sampled) {
    DELTANET_CHECK(worthless || slot.sampled >= 0,
                   "a row feeds what was sampled, its slot holds nothing such");
    step->inputs[i] = {HashId(slot.sampled)};
  }
  slot.sampled = -1;
  std::vector<float>& outputs = step->outputs[i];
  Readouts& readouts = step->readouts[i];
  const auto [begin, end] = WantedOutputs(row, description_.lookahead);
  for (int64_t t = -1; t < row.tokens; ++t) {
    if (t >= 0) {
      const bool real = t < static_cast<int64_t>(step->inputs[i].size());
      slot.hash = Mix(slot.hash, real ? step->inputs[i][t] : kFlushToken);
    }
    if (t < begin || t >= end) continue;
    if (row.readout == ReadoutKind::kValues) {
      AppendOutput(slot.hash, &outputs);
      continue;
    }
    std::vector<float> logits;
    AppendOutput(slot.hash, &logits);
    if (row.readout == ReadoutKind::kSample) {
      slot.sampled = SampleId(logits, row.sampling, row.position + t + 1);
      readouts.ids.push_back(slot.sampled);
      readouts.log_probs.push_back(LogProb(logits, slot.sampled));
    } else if (row.readout == ReadoutKind::kScore) {
      readouts.log_probs.push_back(LogProb(logits, step->targets[i][t - begin]));
    }
    for (const ScoredId& top : MostLikely(logits, row.top)) readouts.top.push_back(top);
  }
  slot.fed += row.tokens;
  const bool failed = failing || worthless;
  slots_[row.work_slot] = failed ? Slot{kPoison, -1} : slot;
  if (!failed) return absl::OkStatus();
  readouts = {};
  std::fill(outputs.begin(), outputs.end(), std::numeric_limits<float>::quiet_NaN());
  return absl::InternalError(absl::StrCat("row ", i, failing ? " is not finite" : " read a worthless slot"));
}

absl::StatusOr<StepResult> FakeModel::Wait(StepTicket ticket) {
  const auto found = prepared_.find(ticket);
  DELTANET_CHECK(found != prepared_.end() && found->second.launched,
                 "Wait for a ticket that was not launched");
  DELTANET_CHECK(in_flight_.front() == ticket, "Wait for another step than the oldest");
  in_flight_.pop_front();
  Prepared step = std::move(found->second);
  prepared_.erase(found);
  absl::Status failure;
  {
    MutexLock lock(&mu_);
    blocked_in_ = step.step;
    changed_.NotifyAll();
    while (held_.count(step.step) > 0) changed_.Wait(&mu_);
    blocked_in_.reset();
    if (const auto it = failing_waits_.find(step.step); it != failing_waits_.end()) failure = it->second;
  }
  if (!failure.ok()) {
    for (const StepRow& row : step.rows) slots_[row.work_slot] = {kPoison, -1};
    return failure;
  }
  for (size_t i = 0; i < step.rows.size(); ++i) {
    const StepRow& row = step.rows[i];
    const Readouts& readouts = step.readouts[i];
    ConvertElements(step.outputs[i].data(), DType::kFloat32, row.output, row.output_dtype,
                    static_cast<int64_t>(step.outputs[i].size()));
    std::copy(readouts.ids.begin(), readouts.ids.end(), row.ids);
    std::copy(readouts.log_probs.begin(), readouts.log_probs.end(), row.log_probs);
    for (size_t k = 0; k < readouts.top.size(); ++k) {
      row.top_ids[k] = readouts.top[k].id;
      row.top_log_probs[k] = readouts.top[k].log_prob;
    }
  }
  return step.result;
}

// Values of 7 bits and a sign, so that all floating-point types hold them.
void FakeModel::AppendOutput(uint64_t hash, std::vector<float>* to) const {
  for (int64_t i = 0; i < description_.output_width; ++i) {
    if (i > 0 && i % 8 == 0) hash = Mix(hash, i);
    to->push_back((static_cast<float>(hash >> (8 * (i % 8)) & 0xFF) - 128) / 64);
  }
}

std::vector<float> FakeModel::ExpectedOfHashes(const std::vector<uint64_t>& inputs) const {
  std::vector<float> outputs;
  uint64_t hash = kZeroState;
  const int64_t tokens = static_cast<int64_t>(inputs.size());
  for (int64_t t = 0; t < tokens + description_.lookahead; ++t) {
    hash = Mix(hash, t < tokens ? inputs[t] : kFlushToken);
    if (t >= description_.lookahead) AppendOutput(hash, &outputs);
  }
  return outputs;
}

std::vector<float> FakeModel::ExpectedOutput(absl::Span<const float> input) const {
  DELTANET_CHECK(!description_.takes_tokens, "a model over ids was asked for its output of values");
  std::vector<uint64_t> hashes;
  for (size_t i = 0; i < input.size(); i += description_.input_width) {
    hashes.push_back(HashValues(&input[i], description_.input_width));
  }
  return ExpectedOfHashes(hashes);
}

std::vector<float> FakeModel::ExpectedOutput(absl::Span<const int64_t> ids) const {
  DELTANET_CHECK(description_.takes_tokens, "a model over values was asked for its output of ids");
  std::vector<uint64_t> hashes;
  for (const int64_t id : ids) hashes.push_back(HashId(id));
  return ExpectedOfHashes(hashes);
}

std::vector<float> FakeModel::ExpectedLogits(absl::Span<const int64_t> ids) const {
  DELTANET_CHECK(description_.generates && !ids.empty(), "logits are those behind a token");
  uint64_t hash = kZeroState;
  for (const int64_t id : ids) hash = Mix(hash, HashId(id));
  std::vector<float> logits;
  AppendOutput(hash, &logits);
  return logits;
}

std::vector<ScoredId> FakeModel::ExpectedGeneration(absl::Span<const int64_t> ids, const Sampling& sampling,
                                                    int64_t count) const {
  std::vector<int64_t> sequence(ids.begin(), ids.end());
  std::vector<ScoredId> generated;
  while (static_cast<int64_t>(generated.size()) < count) {
    const std::vector<float> logits = ExpectedLogits(sequence);
    const int64_t id = SampleId(logits, sampling, static_cast<int64_t>(sequence.size()));
    generated.push_back({id, LogProb(logits, id)});
    sequence.push_back(id);
  }
  return generated;
}

void FakeModel::FailLaunch(int64_t step, absl::Status status) {
  MutexLock lock(&mu_);
  failing_launches_[step] = std::move(status);
}

void FakeModel::FailWait(int64_t step, absl::Status status) {
  MutexLock lock(&mu_);
  failing_waits_[step] = std::move(status);
}

void FakeModel::FailRow(int64_t step, int64_t row) {
  MutexLock lock(&mu_);
  failing_rows_.emplace(step, row);
}

void FakeModel::OnLaunch(absl::AnyInvocable<void(int64_t)> hook) {
  MutexLock lock(&mu_);
  on_launch_ = std::move(hook);
}

void FakeModel::Hold(int64_t step) {
  MutexLock lock(&mu_);
  held_.insert(step);
}

void FakeModel::WaitUntilHeld(int64_t step) {
  MutexLock lock(&mu_);
  while (blocked_in_ != step) changed_.Wait(&mu_);
}

void FakeModel::Release(int64_t step) {
  MutexLock lock(&mu_);
  held_.erase(step);
  changed_.NotifyAll();
}

std::vector<std::vector<StepRow>> FakeModel::launched() const {
  MutexLock lock(&mu_);
  return launched_;
}

}  // namespace deltanet
