// The operators on one core, for each instruction set of this machine. GFLOP and GB (a second) count what the
// operator has to do (see the openings of model/ops/*.cc), not what it does.
#include <benchmark/benchmark.h>

#include <cstdint>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "model/base/check.h"
#include "model/ops/conv_qkv.h"
#include "model/ops/cpu/dispatch.h"
#include "model/ops/delta_rule.h"
#include "model/ops/elementwise.h"
#include "model/ops/readout.h"
#include "model/ops/rms_norm.h"
#include "model/ops/short_conv.h"

namespace deltanet {
namespace {

void RunSerially(int64_t n, int64_t, absl::FunctionRef<void(int64_t, int64_t)> body) {
  if (n > 0) body(0, n);
}
OpContext OneCore() { return {.device = {}, .parallel_for = RunSerially}; }

std::vector<float> Random(int64_t count, float deviation = 1.0f) {
  std::mt19937 generator(1);
  std::normal_distribution<float> normal(0.0f, deviation);
  std::vector<float> values(count);
  for (float& value : values) value = normal(generator);
  return values;
}

void Check(const absl::Status& status) { DELTANET_CHECK(status.ok(), "an operator refused its arguments"); }

// R rows of T tokens, row r from slot 2r to slot 2r + 1.
struct Rows {
  Rows(int64_t R, int64_t T)
      : offsets(R + 1), base(R), work(R), fresh(R, 0), position(R, 1000), end(R, INT64_MAX) {
    for (int32_t r = 0; r < R; ++r) {
      offsets[r + 1] = offsets[r] + static_cast<int32_t>(T);
      base[r] = 2 * r;
      work[r] = 2 * r + 1;
    }
  }
  RaggedRows rows() const {
    return {.rows = static_cast<int64_t>(fresh.size()),
            .tokens = offsets.back(),
            .offsets = offsets.data(),
            .base_slot = base.data(),
            .work_slot = work.data(),
            .fresh = fresh.data(),
            .position = position.data(),
            .end = end.data()};
  }
  std::vector<int32_t> offsets, base, work;
  std::vector<uint8_t> fresh;
  std::vector<int64_t> position, end;
};

void Report(benchmark::State& state, double flops, double bytes) {
  const double runs = static_cast<double>(state.iterations());
  if (flops > 0)
    state.counters["GFLOP"] = benchmark::Counter(1e-9 * flops * runs, benchmark::Counter::kIsRate);
  if (bytes > 0) state.counters["GB"] = benchmark::Counter(1e-9 * bytes * runs, benchmark::Counter::kIsRate);
}

// R rows of T tokens, one head of size K = V.
void DeltaRuleBench(benchmark::State& state, const CpuKernels* kernels) {
  SetCpuKernelsForTesting(kernels);
  const int64_t R = state.range(0), T = state.range(1), K = state.range(2), V = K;
  const Rows rows(R, T);
  const int64_t N = R * T, stride = 2 * K + V + 1;
  std::vector<float> inputs = Random(N * stride, 1.0f / static_cast<float>(K));
  for (int64_t n = 0; n < N; ++n) inputs[n * stride + 2 * K + V] = 0.5f;
  std::vector<float> pool(2 * R * K * V), out(N * V);
  std::vector<int32_t> nonfinite(R);
  const DeltaRuleArgs args{.heads = 1,
                           .key_dim = K,
                           .value_dim = V,
                           .q = inputs.data(),
                           .k = inputs.data() + K,
                           .v = inputs.data() + 2 * K,
                           .beta = inputs.data() + 2 * K + V,
                           .token_stride = stride,
                           .state = {.pool = pool.data(), .slot_stride = K * V, .offset = 0},
                           .out = out.data(),
                           .nonfinite = nonfinite.data()};
  for (auto _ : state) {
    Check(DeltaRule(rows.rows(), args, OneCore()));
    benchmark::ClobberMemory();
  }
  Report(state, 6.0 * static_cast<double>(N * K * V), 8.0 * static_cast<double>(R * K * V));
}

// N tokens of width d, with everything that is optional.
void AddRmsNormBench(benchmark::State& state, const CpuKernels* kernels) {
  SetCpuKernelsForTesting(kernels);
  const int64_t N = state.range(0), d = state.range(1);
  const std::vector<float> x = Random(N * d), bias = Random(d), scale = Random(d);
  std::vector<float> sum(N * d), normed(N * d);
  const AddRmsNormArgs args{.rows = N,
                            .width = d,
                            .x = x.data(),
                            .bias = bias.data(),
                            .sum = sum.data(),
                            .scale = scale.data(),
                            .normed = normed.data()};
  for (auto _ : state) {
    Check(AddRmsNorm(args, OneCore()));
    benchmark::ClobberMemory();
  }
  Report(state, 0, 12.0 * static_cast<double>(N * d));
}

// N tokens of width f.
void GatedUnitBench(benchmark::State& state, const CpuKernels* kernels) {
  SetCpuKernelsForTesting(kernels);
  const int64_t N = state.range(0), f = state.range(1);
  const std::vector<float> x = Random(N * 2 * f), bias = Random(2 * f);
  std::vector<float> out(N * f);
  const GatedUnitArgs args{.kind = GateKind::kSiluFirst,
                           .rows = N,
                           .width = f,
                           .x = x.data(),
                           .bias = bias.data(),
                           .out = out.data()};
  for (auto _ : state) {
    Check(GatedUnit(args, OneCore()));
    benchmark::ClobberMemory();
  }
  Report(state, 0, 12.0 * static_cast<double>(N * f));
}

// R rows of T tokens of width d.
void GatherTapsBench(benchmark::State& state, const CpuKernels* kernels) {
  SetCpuKernelsForTesting(kernels);
  const int64_t R = state.range(0), T = state.range(1), d = state.range(2), N = R * T;
  const Rows rows(R, T);
  const std::vector<float> x = Random(N * d), scale = Random(d);
  std::vector<float> pool(2 * R * 2 * d), taps(N * 3 * d), centre(N * d);
  const GatherTapsArgs args{.width = d,
                            .x = x.data(),
                            .norm_scale = scale.data(),
                            .tail = {.pool = pool.data(), .slot_stride = 2 * d, .offset = 0},
                            .taps = taps.data(),
                            .centre = centre.data()};
  for (auto _ : state) {
    Check(GatherTaps(rows.rows(), args, OneCore()));
    benchmark::ClobberMemory();
  }
  Report(state, 0, 20.0 * static_cast<double>(N * d));
}

// N tokens, H heads of size K = V.
void ConvQkvActivationBench(benchmark::State& state, const CpuKernels* kernels, QkvActivation activation) {
  SetCpuKernelsForTesting(kernels);
  const int64_t N = state.range(0), H = state.range(1), K = state.range(2);
  const Rows rows(1, N);
  const int64_t width = 3 * H * K + H;
  std::vector<float> z = Random(N * width);
  const std::vector<float> bias = Random(width), tap_bias = Random(3 * width);
  const ConvQkvActivationArgs args{.heads = H,
                                   .key_dim = K,
                                   .value_dim = K,
                                   .activation = activation,
                                   .centre_tap = 1,
                                   .z = z.data(),
                                   .z_stride = width,
                                   .bias = bias.data(),
                                   .tap_bias = tap_bias.data()};
  for (auto _ : state) {
    Check(ConvQkvActivation(rows.rows(), args, OneCore()));
    benchmark::ClobberMemory();
  }
  Report(state, 0, 8.0 * static_cast<double>(N * width));
}

// R rows of T tokens, H heads of size K = V, four taps.
void ShortConvQkvBench(benchmark::State& state, const CpuKernels* kernels) {
  SetCpuKernelsForTesting(kernels);
  const int64_t R = state.range(0), T = state.range(1), H = state.range(2), K = state.range(3), N = R * T;
  const Rows rows(R, T);
  const int64_t qkv = 3 * H * K, width = qkv + H;
  const std::vector<float> z = Random(N * width), weight = Random(4 * qkv);
  std::vector<float> pool(2 * R * 3 * qkv), out(N * width);
  const ShortConvQkvArgs args{.heads = H,
                              .key_dim = K,
                              .value_dim = K,
                              .z = z.data(),
                              .z_stride = width,
                              .weight = weight.data(),
                              .tail = {.pool = pool.data(), .slot_stride = 3 * qkv, .offset = 0},
                              .out = out.data(),
                              .out_stride = width};
  for (auto _ : state) {
    Check(ShortConvQkv(rows.rows(), args, OneCore()));
    benchmark::ClobberMemory();
  }
  Report(state, 8.0 * static_cast<double>(N * qkv), 8.0 * static_cast<double>(N * width + R * 3 * qkv));
}

// 16 rows of W logits. GB counts one reading of them.
void ReadoutBench(benchmark::State& state, const CpuKernels* kernels, const ReadoutRequest& request) {
  constexpr int64_t kRows = 16;
  const int64_t W = state.range(0);
  SetCpuKernelsForTesting(kernels);
  const std::vector<float> logits = Random(kRows * W, 3.0f);
  std::vector<ReadoutRequest> requests(kRows, request);
  for (int64_t m = 0; m < kRows; ++m) requests[m].counter = m;
  std::vector<int32_t> ids(kRows), top_ids(kRows * kMaxTopTokens);
  std::vector<float> log_probs(kRows), top_log_probs(kRows * kMaxTopTokens);
  const ReadoutArgs args{.rows = kRows,
                         .vocabulary = W,
                         .logits = logits.data(),
                         .logits_stride = W,
                         .requests = requests.data(),
                         .ids = ids.data(),
                         .log_probs = log_probs.data(),
                         .top_ids = top_ids.data(),
                         .top_log_probs = top_log_probs.data()};
  for (auto _ : state) {
    Check(Readout(args, OneCore()));
    benchmark::ClobberMemory();
  }
  Report(state, 0, kRows * W * 4.0);
}

void RegisterAll() {
  for (CpuIsa isa : {CpuIsa::kGeneric, CpuIsa::kAvx2, CpuIsa::kAvx512}) {
    const CpuKernels* const kernels = CpuKernelsFor(isa);
    if (kernels == nullptr) continue;
    const auto name = [&](const char* op) { return std::string(op) + "/" + kernels->name; };
    benchmark::RegisterBenchmark(name("DeltaRule").c_str(), DeltaRuleBench, kernels)
        ->ArgNames({"R", "T", "K"})
        ->ArgsProduct({{1}, {1, 2, 4, 8, 16, 64, 128, 512}, {16, 32, 64, 128, 256}})
        ->ArgsProduct({{64}, {1, 16}, {16, 64, 128}});
    benchmark::RegisterBenchmark(name("AddRmsNorm").c_str(), AddRmsNormBench, kernels)
        ->ArgNames({"N", "d"})
        ->ArgsProduct({{1, 64, 1024}, {64, 1024}});
    benchmark::RegisterBenchmark(name("GatedUnit").c_str(), GatedUnitBench, kernels)
        ->ArgNames({"N", "f"})
        ->ArgsProduct({{1, 64}, {256, 4096}});
    benchmark::RegisterBenchmark(name("GatherTaps").c_str(), GatherTapsBench, kernels)
        ->ArgNames({"R", "T", "d"})
        ->ArgsProduct({{1, 64}, {1, 16}, {64, 1024}});
    benchmark::RegisterBenchmark(name("ConvQkvRelu").c_str(), ConvQkvActivationBench, kernels,
                                 QkvActivation::kRelu)
        ->ArgNames({"N", "H", "K"})
        ->Args({1, 1, 64})
        ->Args({1024, 1, 64});
    benchmark::RegisterBenchmark(name("ConvQkvSilu").c_str(), ConvQkvActivationBench, kernels,
                                 QkvActivation::kSilu)
        ->ArgNames({"N", "H", "K"})
        ->Args({1, 8, 16})
        ->Args({1024, 8, 16});
    benchmark::RegisterBenchmark(name("ShortConvQkv").c_str(), ShortConvQkvBench, kernels)
        ->ArgNames({"R", "T", "H", "K"})
        ->ArgsProduct({{1, 16}, {1}, {16}, {128}})
        ->ArgsProduct({{1}, {512}, {16}, {64, 128}});
    const std::pair<const char*, ReadoutRequest> readouts[] = {
        {"ReadoutScore", {.target = 7}},
        {"ReadoutTop20", {.top = 20}},
        {"ReadoutGreedy", {.sample = 1}},
        {"ReadoutSample", {.sample = 1, .temperature = 0.8f}},
        {"ReadoutSampleTopK", {.sample = 1, .temperature = 0.8f, .top_k = 50}},
        {"ReadoutSampleTopP", {.sample = 1, .temperature = 0.8f, .top_p = 0.95f}},
        {"ReadoutSampleTopKTopP", {.sample = 1, .temperature = 0.8f, .top_k = 50, .top_p = 0.95f}},
    };
    for (const auto& [what, request] : readouts) {
      benchmark::RegisterBenchmark(name(what).c_str(), ReadoutBench, kernels, request)
          ->ArgNames({"W"})
          ->Args({32000});
    }
  }
}

}  // namespace
}  // namespace deltanet

int main(int argc, char** argv) {
  deltanet::RegisterAll();
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  benchmark::RunSpecifiedBenchmarks();
  return 0;
}
