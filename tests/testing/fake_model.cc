#include "tests/testing/fake_model.h"

#include <algorithm>
#include <cstring>
#include <limits>
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

ModelDescription Describe(const FakeModelOptions& options) {
  ModelDescription description;
  description.family = options.takes_tokens ? "deltanet_model" : "transformer_deltanet";
  description.takes_tokens = options.takes_tokens;
  description.input_width = options.takes_tokens ? 1 : options.input_width;
  description.output_width = options.output_width;
  description.vocab_size = options.takes_tokens ? options.output_width : 0;
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

FakeModel::FakeModel(const FakeModelOptions& options)
    : description_(Describe(options)), slots_(options.num_slots, Slot{kPoison, -1}) {}

absl::Status FakeModel::Validate(absl::Span<const StepRow> rows) const {
  if (static_cast<int64_t>(rows.size()) > description_.max_step_rows) {
    return absl::InvalidArgumentError(
        absl::StrCat("step has ", rows.size(), " rows, want at most ", description_.max_step_rows));
  }
  int64_t tokens = 0;
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
    if ((row.input_dtype == DType::kInt64) != description_.takes_tokens || !IsFloat(row.output_dtype)) {
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
    if (description_.takes_tokens) {
      std::vector<int64_t> ids(real);
      std::memcpy(ids.data(), row.input, real * sizeof(int64_t));
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
  for (size_t i = 0; i < step.rows.size(); ++i) {
    const StepRow& row = step.rows[i];
    Slot slot = row.fresh ? Slot{kZeroState, 0} : slots_[row.base_slot];
    std::vector<float> outputs;
    // A state that failed earlier in the pipeline is worthless, and so is all that comes of it.
    const bool worthless = slot.fed < 0;
    DELTANET_CHECK(worthless || slot.fed == row.position, "a row's position is not that of its state");
    for (int64_t t = 0; t < row.tokens; ++t) {
      const bool real = t < static_cast<int64_t>(step.inputs[i].size());
      slot.hash = Mix(slot.hash, real ? step.inputs[i][t] : kFlushToken);
      if (row.position + t >= description_.lookahead) AppendOutput(slot.hash, &outputs);
    }
    slot.fed += row.tokens;
    if (failing[i] || worthless) {
      slot = {kPoison, -1};
      std::fill(outputs.begin(), outputs.end(), std::numeric_limits<float>::quiet_NaN());
    }
    slots_[row.work_slot] = slot;
    step.outputs.push_back(std::move(outputs));
    step.result.rows.push_back(failing[i] ? absl::InternalError(absl::StrCat("row ", i, " is not finite"))
                               : worthless
                                   ? absl::InternalError(absl::StrCat("row ", i, " read a worthless slot"))
                                   : absl::OkStatus());
  }
  step.launched = true;
  in_flight_.push_back(ticket);
  return absl::OkStatus();
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
    ConvertElements(step.outputs[i].data(), DType::kFloat32, step.rows[i].output, step.rows[i].output_dtype,
                    static_cast<int64_t>(step.outputs[i].size()));
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
