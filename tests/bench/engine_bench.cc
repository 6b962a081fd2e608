// The engine alone, as the batch thread drives it: Prepare, Launch, Wait. An iteration is a step, so its time
// is the step's (with two in flight, the time between two answers).
//
//   OneShot    a (8,128,64) batch through TransformerDeltaNet(64, num_layers=6), centred convolutions
//   Sessions   N sessions, T tokens each in every step, `in_flight` steps launched and not yet waited for
//   Position   one session, a token a step, after it was fed that many
//   Prefill    B fresh prompts of T tokens and the first token after each
//   Generate   N sessions that generate greedily, each token fed back on the device
//
// On the CPU with all of the machine's threads, and in builds with CUDA on a GPU in both dtypes. There, if
// DELTANET_BENCH_MODEL_DIR names a model's directory, Sessions runs that model too, and Prefill and Generate
// if it generates. DELTANET_BENCH_CPU_MODEL_DIR names one for those two on the CPU. With
// DELTANET_BENCH_DETERMINISTIC set (to anything) the models are deterministic.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <queue>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "model/base/config.h"
#include "model/base/spin_briefly.h"
#include "model/base/status_macros.h"
#include "model/device.h"
#include "model/model.h"
#include "tests/model/engine_modes.h"
#include "tests/testing/random_model.h"

namespace deltanet {
namespace {

constexpr int64_t kMaxSessions = 256, kMaxStepTokens = 4096, kMaxPrefillTokens = 16384;

// A model to be measured; loaded by the first case that is run.
class Subject {
 public:
  // An empty `directory` stands for the small random model.
  Subject(const Mode& mode, std::string directory, int64_t max_step_tokens = kMaxStepTokens)
      : mode_(mode), directory_(std::move(directory)), max_step_tokens_(max_step_tokens) {}

  // Null if it cannot be loaded; the case then says why.
  Model* Load(benchmark::State& state) {
    if (model_ != nullptr) return model_.get();
    if (directory_.empty()) {
      ModelConfig config;
      config.family = Family::kTransformerDeltaNet;
      config.d_model = 64;
      config.chunk_size = 4;
      config.num_layers = 6;
      directory_ = WriteRandomModel(config, 1);
    }
    ModelOptions options;
    options.device = mode_.device;
    options.dtype = mode_.dtype;
    options.deterministic = std::getenv("DELTANET_BENCH_DETERMINISTIC") != nullptr;
    options.max_step_tokens = max_step_tokens_;
    options.max_step_rows = kMaxSessions;
    options.max_slots = kMaxSessions;
    if (mode_.device.type == DeviceType::kCpu) options.pool_bytes = int64_t{1} << 30;
    options.cpu_threads = static_cast<int>(std::thread::hardware_concurrency());
    auto model = LoadModel(directory_, options);
    if (!model.ok()) {
      state.SkipWithError(model.status().ToString().c_str());
      return nullptr;
    }
    model_ = *std::move(model);
    return model_.get();
  }

 private:
  const Mode mode_;
  std::string directory_;
  const int64_t max_step_tokens_;
  std::unique_ptr<Model> model_;
};

// Sequences side by side, session s in slot s.
class Sessions {
 public:
  // At most `tokens` tokens of each in a step.
  Sessions(Model* model, int64_t sessions, int64_t tokens) : model_(model), rows_(sessions) {
    const ModelDescription& description = model->description();
    const int64_t values = tokens * description.input_width;
    std::mt19937 random(1);
    if (description.takes_tokens) {
      ids_.resize(values);
      for (int64_t& id : ids_) id = static_cast<int64_t>(random() % description.vocab_size);
    } else {
      std::normal_distribution<float> normal;
      floats_.resize(values);
      for (float& value : floats_) value = normal(random);
    }
    output_.resize(sessions * tokens * description.output_width);
    for (int64_t s = 0; s < sessions; ++s) {
      StepRow& row = rows_[s];
      row.base_slot = row.work_slot = static_cast<int32_t>(s);
      row.input = description.takes_tokens ? static_cast<const void*>(ids_.data()) : floats_.data();
      row.input_dtype = description.takes_tokens ? DType::kInt64 : DType::kFloat32;
      row.output = output_.data() + s * tokens * description.output_width;
    }
  }

  // From here on fresh sequences; of `length` tokens, if that is known.
  void Restart(int64_t length = INT64_MAX) {
    position_ = 0;
    for (StepRow& row : rows_) row.end = length;
  }

  // Launches a step of `tokens` tokens of each session.
  absl::Status Launch(int64_t tokens) {
    for (StepRow& row : rows_) {
      row.fresh = position_ == 0;
      row.position = position_;
      row.tokens = tokens;
    }
    ASSIGN_OR_RETURN(const StepTicket ticket, model_->Prepare(rows_));
    RETURN_IF_ERROR(model_->Launch(ticket));
    tickets_.push(ticket);
    position_ += tokens;
    return absl::OkStatus();
  }
  // Waits for the oldest step.
  absl::Status Wait() {
    const StepTicket ticket = tickets_.front();
    tickets_.pop();
    ASSIGN_OR_RETURN(const StepResult result, model_->Wait(ticket));
    for (const absl::Status& status : result.rows) RETURN_IF_ERROR(status);
    return absl::OkStatus();
  }
  absl::Status Step(int64_t tokens) {
    RETURN_IF_ERROR(Launch(tokens));
    return Wait();
  }

 private:
  Model* const model_;
  std::vector<StepRow> rows_;
  std::vector<int64_t> ids_;
  std::vector<float> floats_, output_;
  int64_t position_ = 0;
  std::queue<StepTicket> tickets_;
};

// False, and the case ends, if `status` is an error.
bool Ok(benchmark::State& state, const absl::Status& status) {
  if (!status.ok()) state.SkipWithError(status.ToString().c_str());
  return status.ok();
}

void Report(benchmark::State& state, int64_t tokens_a_step) {
  state.counters["tokens/s"] =
      benchmark::Counter(static_cast<double>(tokens_a_step) * static_cast<double>(state.iterations()),
                         benchmark::Counter::kIsRate);
}

void OneShot(benchmark::State& state, Subject* subject) {
  constexpr int64_t kBatch = 8, kTokens = 128;
  Model* const model = subject->Load(state);
  if (model == nullptr) return;
  const int64_t fed = kTokens + model->description().lookahead;
  Sessions sessions(model, kBatch, fed);
  for (auto _ : state) {
    sessions.Restart(kTokens);
    if (!Ok(state, sessions.Step(fed))) return;
  }
  Report(state, kBatch * kTokens);
}

void SessionsStep(benchmark::State& state, Subject* subject) {
  const int64_t count = state.range(0), tokens = state.range(1), in_flight = state.range(2);
  Model* const model = subject->Load(state);
  if (model == nullptr) return;
  Sessions sessions(model, count, tokens);
  // Beyond the look-ahead every token has an output.
  for (int64_t fed = 0; fed <= model->description().lookahead; fed += tokens) {
    if (!Ok(state, sessions.Step(tokens))) return;
  }
  for (int64_t i = 1; i < in_flight; ++i) {
    if (!Ok(state, sessions.Launch(tokens))) return;
  }
  for (auto _ : state) {
    if (!Ok(state, sessions.Launch(tokens)) || !Ok(state, sessions.Wait())) return;
  }
  for (int64_t i = 1; i < in_flight; ++i) {
    if (!Ok(state, sessions.Wait())) return;
  }
  Report(state, count * tokens);
}

void Position(benchmark::State& state, Subject* subject) {
  Model* const model = subject->Load(state);
  if (model == nullptr) return;
  Sessions session(model, 1, kMaxStepTokens);
  for (int64_t left = state.range(0); left > 0; left -= std::min(left, kMaxStepTokens)) {
    if (!Ok(state, session.Step(std::min(left, kMaxStepTokens)))) return;
  }
  for (auto _ : state) {
    if (!Ok(state, session.Step(1))) return;
  }
  Report(state, 1);
}

// Sequences that take a prompt in and then generate, session s in slot s.
class Generations {
 public:
  Generations(Model* model, int64_t sessions, int64_t prompt)
      : model_(model), prompt_(prompt), rows_(sessions), ids_(sessions), log_probs_(sessions), input_(prompt) {
    std::mt19937 random(1);
    for (int64_t& id : input_) id = static_cast<int64_t>(random() % model->description().vocab_size);
    for (int64_t s = 0; s < sessions; ++s) {
      rows_[s].base_slot = rows_[s].work_slot = static_cast<int32_t>(s);
      rows_[s].input_dtype = DType::kInt64;
      rows_[s].ids = &ids_[s];
      rows_[s].log_probs = &log_probs_[s];
    }
  }

  // The prompts, in as many steps as they need, and the first token of each.
  absl::Status Prefill() {
    const int64_t most = std::max<int64_t>(
        1, model_->description().max_step_tokens / static_cast<int64_t>(rows_.size()));
    for (position_ = 0; position_ < prompt_;) {
      const int64_t tokens = std::min(most, prompt_ - position_);
      const bool last = position_ + tokens == prompt_;
      for (StepRow& row : rows_) {
        row.fresh = position_ == 0;
        row.position = position_;
        row.tokens = tokens;
        row.feed_sampled = false;
        row.input = input_.data() + position_;
        row.output_begin = tokens - (last ? 1 : 0);
        row.readout = last ? ReadoutKind::kSample : ReadoutKind::kValues;
      }
      RETURN_IF_ERROR(Launch());
      if (tickets_.size() == static_cast<size_t>(model_->description().max_steps_in_flight)) {
        RETURN_IF_ERROR(Wait());
      }
      position_ += tokens;
    }
    while (!tickets_.empty()) RETURN_IF_ERROR(Wait());
    return absl::OkStatus();
  }
  absl::Status LaunchToken() {
    for (StepRow& row : rows_) {
      row.fresh = false;
      row.position = position_;
      row.tokens = 1;
      row.feed_sampled = true;
      row.input = nullptr;
      row.output_begin = 0;
      row.readout = ReadoutKind::kSample;
    }
    ++position_;
    return Launch();
  }
  // Waits for the oldest step.
  absl::Status Wait() {
    const StepTicket ticket = tickets_.front();
    tickets_.pop();
    ASSIGN_OR_RETURN(const StepResult result, model_->Wait(ticket));
    for (const absl::Status& status : result.rows) RETURN_IF_ERROR(status);
    return absl::OkStatus();
  }

 private:
  absl::Status Launch() {
    ASSIGN_OR_RETURN(const StepTicket ticket, model_->Prepare(rows_));
    RETURN_IF_ERROR(model_->Launch(ticket));
    tickets_.push(ticket);
    return absl::OkStatus();
  }

  Model* const model_;
  const int64_t prompt_;
  std::vector<StepRow> rows_;
  std::vector<int64_t> ids_;
  std::vector<float> log_probs_;
  std::vector<int64_t> input_;
  int64_t position_ = 0;
  std::queue<StepTicket> tickets_;
};

void Prefill(benchmark::State& state, Subject* subject) {
  Model* const model = subject->Load(state);
  if (model == nullptr) return;
  Generations prompts(model, state.range(0), state.range(1));
  for (auto _ : state) {
    if (!Ok(state, prompts.Prefill())) return;
  }
  Report(state, state.range(0) * state.range(1));
}

void Generate(benchmark::State& state, Subject* subject) {
  Model* const model = subject->Load(state);
  if (model == nullptr) return;
  Generations generations(model, state.range(0), 64);
  if (!Ok(state, generations.Prefill())) return;
  const int ahead = model->description().max_steps_in_flight - 1;
  for (int i = 0; i < ahead; ++i) {
    if (!Ok(state, generations.LaunchToken())) return;
  }
  for (auto _ : state) {
    if (!Ok(state, generations.LaunchToken()) || !Ok(state, generations.Wait())) return;
  }
  for (int i = 0; i < ahead; ++i) {
    if (!Ok(state, generations.Wait())) return;
  }
  Report(state, state.range(0));
}

void RegisterGeneration(const std::string& name, const Mode& mode, Subject* subject) {
  auto* prefill = benchmark::RegisterBenchmark(absl::StrCat("Prefill/", name, "/", mode.name).c_str(), Prefill, subject)
                      ->ArgNames({"B", "T"})
                      ->UseRealTime()
                      ->Unit(benchmark::kMillisecond);
  if (mode.device.type == DeviceType::kCpu) {
    prefill->Args({1, 2048})->Args({1, 512})->Args({8, 64});
  } else {
    prefill->Args({8, 2048})->Args({1, 16384})->Args({1, 2048})->Args({1, 512})->Args({64, 64});
  }
  benchmark::RegisterBenchmark(absl::StrCat("Generate/", name, "/", mode.name).c_str(), Generate, subject)
      ->ArgNames({"N"})
      ->ArgsProduct({{1, 16, 64, 256}})
      ->UseRealTime()
      ->Unit(benchmark::kMillisecond);
}

void RegisterSessions(const std::string& name, const Mode& mode, Subject* subject) {
  const bool queues = mode.device.type != DeviceType::kCpu;
  benchmark::RegisterBenchmark(absl::StrCat("Sessions/", name, "/", mode.name).c_str(), SessionsStep, subject)
      ->ArgNames({"N", "T", "in_flight"})
      ->ArgsProduct(
          {{1, 16, 64, 256}, {1, 16}, queues ? std::vector<int64_t>{1, 2} : std::vector<int64_t>{1}})
      ->UseRealTime()
      ->Unit(benchmark::kMicrosecond);
}

void RegisterAll(std::vector<std::unique_ptr<Subject>>* subjects) {
  const char* const large = std::getenv("DELTANET_BENCH_MODEL_DIR");
  for (const Mode& mode : Modes()) {
    if (!CheckDevice(mode.device).ok()) continue;
    Subject* const small = subjects->emplace_back(std::make_unique<Subject>(mode, "")).get();
    benchmark::RegisterBenchmark(absl::StrCat("OneShot/small/", mode.name).c_str(), OneShot, small)
        ->UseRealTime()
        ->Unit(benchmark::kMicrosecond);
    RegisterSessions("small", mode, small);
    // As many iterations each time, because getting to the position is not measured and takes long.
    benchmark::RegisterBenchmark(absl::StrCat("Position/small/", mode.name).c_str(), Position, small)
        ->ArgNames({"position"})
        ->Arg(1000)
        ->Arg(1000000)
        ->Iterations(2000)
        ->UseRealTime()
        ->Unit(benchmark::kMicrosecond);
    const bool on_cpu = mode.device.type == DeviceType::kCpu;
    if (large != nullptr && !on_cpu) {
      RegisterSessions("large", mode, subjects->emplace_back(std::make_unique<Subject>(mode, large)).get());
    }
    const char* const generating = on_cpu ? std::getenv("DELTANET_BENCH_CPU_MODEL_DIR") : large;
    if (generating != nullptr) {
      RegisterGeneration("large", mode,
                         subjects
                             ->emplace_back(std::make_unique<Subject>(
                                 mode, generating, on_cpu ? kMaxStepTokens : kMaxPrefillTokens))
                             .get());
    }
  }
}

}  // namespace
}  // namespace deltanet

int main(int argc, char** argv) {
  deltanet::SpinBriefly(argv);  // As the server does.
  std::vector<std::unique_ptr<deltanet::Subject>> subjects;
  deltanet::RegisterAll(&subjects);
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  benchmark::RunSpecifiedBenchmarks();
  return 0;
}
