// Sequences for a whole `delta_net` mixer, and what its definition makes of them.
#ifndef DELTANET_TESTS_MODEL_OPS_DELTA_NET_MIXER_PROBLEM_H_
#define DELTANET_TESTS_MODEL_OPS_DELTA_NET_MIXER_PROBLEM_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "absl/functional/function_ref.h"
#include "gtest/gtest.h"
#include "model/base/round_up.h"
#include "model/ops/delta_net_mixer.h"
#include "tests/model/ops/op_test_util.h"
#include "tests/model/ops/short_conv_problem.h"

namespace deltanet {

struct DeltaNetMixerCase {
  ShortConvMixer front;
  bool has_gate = false, norm_per_head = true;
};

struct DeltaNetMixerProblem {
  // If `aligned`, slots are multiples of 64 bytes apart and rows of z and gate of 16, else of nothing.
  DeltaNetMixerProblem(const DeltaNetMixerCase& mixer, DType dtype, bool aligned)
      : front(mixer.front, dtype, aligned),
        mixer(mixer),
        aligned(aligned),
        norm_scale(RandomNormal(mixer.norm_per_head ? mixer.front.value_dim : value_width(), 90)) {
    uint32_t seed = 91;
    for (const int64_t tokens : front.lengths) {
      gates.push_back(Rounded(RandomNormal(tokens * value_width(), seed++), dtype));
    }
  }

  int64_t value_width() const { return mixer.front.heads * mixer.front.value_dim; }
  int64_t state_size() const { return value_width() * mixer.front.key_dim; }
  int64_t tail_offset() const { return aligned ? RoundUp(state_size(), 16) : state_size() + 1; }
  int64_t slot_stride() const {
    const int64_t end = tail_offset() + front.tail_floats();
    return aligned ? RoundUp(end, 16) : end + 3;
  }
  int64_t gate_stride() const { return RoundUp(value_width() + 3, aligned ? 8 : 1); }

  // All outputs of sequence s in T, [tokens, HV]; with `rounds` what lies between the operators is rounded to
  // the problem's dtype.
  template <typename T>
  std::vector<T> Reference(int64_t s, bool rounds) const {
    const ShortConvMixer& m = mixer.front;
    const int64_t tokens = front.lengths[s], H = m.heads, K = m.key_dim, V = m.value_dim;
    const auto keep = [&](T x) {
      return rounds && front.dtype == DType::kBFloat16
                 ? static_cast<T>(Rounded({static_cast<float>(x)}, front.dtype)[0])
                 : x;
    };
    std::vector<std::vector<T>> made(tokens);
    for (int64_t t = 0; t < tokens; ++t) {
      made[t] = front.Reference<T>(s, t);
      std::transform(made[t].begin(), made[t].end(), made[t].begin(), keep);
    }
    std::vector<T> out(tokens * H * V);
    for (int64_t h = 0; h < H; ++h) {
      std::vector<T> q, k, v, beta, state(K * V), o(tokens * V);
      for (const std::vector<T>& token : made) {
        q.insert(q.end(), &token[h * K], &token[h * K] + K);
        k.insert(k.end(), &token[(H + h) * K], &token[(H + h) * K] + K);
        v.insert(v.end(), &token[2 * H * K + h * V], &token[2 * H * K + h * V] + V);
        beta.push_back(token[m.qkv() + h]);
      }
      DeltaRuleReference<T>(tokens, K, V, q.data(), k.data(), v.data(), beta.data(), T(kScale), state.data(),
                            o.data());
      for (int64_t t = 0; t < tokens; ++t) {
        std::transform(&o[t * V], &o[t * V] + V, &out[(t * H + h) * V], keep);
      }
    }
    const int64_t groups = mixer.norm_per_head ? H : 1, width = H * V / groups;
    for (int64_t i = 0; i < tokens * groups; ++i) {
      T* const x = &out[i * width];
      T squares = 0;
      for (int64_t c = 0; c < width; ++c) squares += x[c] * x[c];
      const T factor = T(1) / (std::sqrt(squares / T(width) + T(kEpsilonInside)));
      for (int64_t c = 0; c < width; ++c) {
        x[c] *= factor * static_cast<T>(norm_scale[c]);
        if (mixer.has_gate) {
          const T gate = static_cast<T>(gates[s][i * width + c]);
          x[c] = keep(x[c]) * (gate / (T(1) + std::exp(-gate)));
        }
      }
    }
    return out;
  }

  static constexpr float kScale = 0.125f, kEpsilonInside = 1e-5f;

  const ShortConvProblem front;  // Also has the sequences.
  const DeltaNetMixerCase mixer;
  const bool aligned;
  const std::vector<float> norm_scale;     // [V], or [HV]
  std::vector<std::vector<float>> gates;  // [tokens, HV] each.
};

// A step of DeltaNetMixer in host memory. Slots are two a sequence.
struct DeltaNetMixerStep {
  explicit DeltaNetMixerStep(const DeltaNetMixerProblem& problem)
      : problem(&problem), pool(2 * problem.front.lengths.size() * problem.slot_stride()) {}

  const DeltaNetMixerProblem* problem;
  Guarded pool;  // Stays from step to step; all that follows is of one step.
  Ragged ragged;
  std::vector<float> z, gate;  // [N, z_stride], [N, gate_stride], NaN in the padding.
  Guarded qkv{0}, mixed{0}, out{0};
  std::vector<int32_t> nonfinite;

  // A row of tokens [begin, end) of sequence s.
  void Add(int64_t s, int64_t begin, int64_t end, int32_t base, int32_t work, bool fresh) {
    ragged.Add(end - begin, base, work, fresh, begin);
    const ShortConvProblem& front = problem->front;
    for (int64_t t = begin; t < end; ++t) {
      z.insert(z.end(), front.Raw(s, t), front.Raw(s, t) + front.mixer.z_width());
      z.insert(z.end(), front.z_stride() - front.mixer.z_width(), kNaN);
      const float* const gate_of = &problem->gates[s][t * problem->value_width()];
      gate.insert(gate.end(), gate_of, gate_of + problem->value_width());
      gate.insert(gate.end(), problem->gate_stride() - problem->value_width(), kNaN);
    }
  }

  void MakeOutputs() {
    const int64_t N = ragged.offsets.back();
    qkv = Guarded(N * problem->front.out_stride());
    mixed = Guarded(N * problem->value_width());
    out = Guarded(N * problem->value_width());
    nonfinite.assign(ragged.fresh.size(), 0);
  }

  DeltaNetMixerArgs Args() {
    const ShortConvProblem& front = problem->front;
    const ShortConvMixer& m = front.mixer;
    DeltaNetMixerArgs args;
    args.conv = {.heads = m.heads,
                 .key_dim = m.key_dim,
                 .value_dim = m.value_dim,
                 .activation = m.activation,
                 .norm = m.norm,
                 .has_beta = m.has_beta,
                 .beta_scale = m.beta_scale,
                 .taps = m.taps,
                 .dtype = front.dtype,
                 .z = z.data(),
                 .z_stride = front.z_stride(),
                 .weight = m.taps > 0 ? front.weight.data() : nullptr,
                 .bias = m.has_bias ? front.bias.data() : nullptr};
    args.conv.out_stride = front.out_stride();
    args.rule = {.heads = m.heads,
                 .key_dim = m.key_dim,
                 .value_dim = m.value_dim,
                 .dtype = front.dtype,
                 .token_stride = front.out_stride(),
                 .scale = DeltaNetMixerProblem::kScale};
    args.norm = {.rows = ragged.offsets.back(),
                 .groups = problem->mixer.norm_per_head ? m.heads : 1,
                 .width = problem->mixer.norm_per_head ? m.value_dim : problem->value_width(),
                 .dtype = front.dtype,
                 .scale = problem->norm_scale.data(),
                 .epsilon = {.after = 0, .inside = DeltaNetMixerProblem::kEpsilonInside},
                 .gate = problem->mixer.has_gate ? gate.data() : nullptr,
                 .gate_stride = problem->gate_stride()};
    PointAt(pool.data(), qkv.data(), mixed.data(), out.data(), nonfinite.data(), &args);
    return args;
  }
  // Sets what is written, all of the problem's dtype but the pool.
  void PointAt(float* slots, void* made, void* ruled, void* result, int32_t* flags,
               DeltaNetMixerArgs* args) const {
    const ShortConvMixer& m = problem->front.mixer;
    const auto part = [&](int64_t element) {
      return static_cast<char*>(made) + element * DTypeBytes(problem->front.dtype);
    };
    args->conv.tail = {.pool = slots, .slot_stride = problem->slot_stride(), .offset = problem->tail_offset()};
    args->conv.out = made;
    args->rule.q = part(0);
    args->rule.k = part(m.heads * m.key_dim);
    args->rule.v = part(m.qk());
    args->rule.beta = part(m.qkv());
    args->rule.state = {.pool = slots, .slot_stride = problem->slot_stride(), .offset = 0};
    (problem->front.dtype == DType::kBFloat16 ? args->rule.out_bfloat16
                                              : reinterpret_cast<void*&>(args->rule.out)) = ruled;
    args->rule.nonfinite = flags;
    args->norm.x = ruled;
    args->norm.out = result;
  }
};

// Runs all sequences at once, each as one fresh row, then in steps whose rows have random numbers of tokens
// (some none, some many), in random order, and holds every output to the bound. Work slots change now and
// then, so that base and work differ; a row of padding goes along.
inline void CheckDeltaNetMixer(const DeltaNetMixerProblem& problem,
                               absl::FunctionRef<void(DeltaNetMixerStep*)> run) {
  const int64_t width = problem.value_width();
  const std::vector<int64_t>& lengths = problem.front.lengths;
  const int64_t count = static_cast<int64_t>(lengths.size());
  std::vector<float> plain;
  std::vector<double> exact;
  for (int64_t s = 0; s < count; ++s) {
    const std::vector<float> by_plain = problem.Reference<float>(s, /*rounds=*/true);
    const std::vector<double> by_exact = problem.Reference<double>(s, /*rounds=*/false);
    plain.insert(plain.end(), by_plain.begin(), by_plain.end());
    exact.insert(exact.end(), by_exact.begin(), by_exact.end());
  }
  std::mt19937 generator(7);
  for (const bool whole : {true, false}) {
    DeltaNetMixerStep step(problem);
    std::vector<int64_t> done(count, 0), order(count);
    std::vector<int32_t> slot(count, -1);  // None yet: fresh.
    std::vector<std::vector<float>> outputs(count);
    while (done != lengths) {
      for (int64_t s = 0; s < count; ++s) order[s] = s;
      std::shuffle(order.begin(), order.end(), generator);
      step.ragged = Ragged();
      step.z.clear();
      step.gate.clear();
      const std::vector<int64_t> begin = done;
      for (const int64_t s : order) {
        const int64_t most = generator() % 4 == 0 ? 30 : 5;
        done[s] = whole ? lengths[s] : std::min<int64_t>(lengths[s], done[s] + generator() % most);
        const int32_t base = slot[s];
        slot[s] = base < 0 ? static_cast<int32_t>(2 * s) : base ^ static_cast<int32_t>(generator() % 2);
        step.Add(s, begin[s], done[s], base, slot[s], base < 0);
      }
      step.Add(1, 0, 1, -1, -1, /*fresh=*/true);
      step.MakeOutputs();
      std::vector<float> before = step.pool.with_guards();
      ASSERT_NO_FATAL_FAILURE(run(&step));
      ASSERT_TRUE(step.out.GuardsIntact() && step.qkv.GuardsIntact() && step.mixed.GuardsIntact());
      EXPECT_EQ(step.nonfinite, std::vector<int32_t>(count + 1, 0));
      for (int64_t r = 0; r < count; ++r) {
        const float* const from = step.out.data() + step.ragged.offsets[r] * width;
        std::vector<float>& to = outputs[order[r]];
        to.insert(to.end(), from, from + (done[order[r]] - begin[order[r]]) * width);
      }
      // The slots, as they were but for the work slots.
      std::vector<float> after = step.pool.with_guards();
      for (const int32_t written : slot) {
        const int64_t at = Guarded::kGuard + written * problem.slot_stride();
        const int64_t tail = at + problem.tail_offset();
        std::copy_n(before.begin() + at, problem.state_size(), after.begin() + at);
        std::copy_n(before.begin() + tail, problem.front.tail_floats(), after.begin() + tail);
      }
      ASSERT_TRUE(SameBits(after.data(), before.data(), static_cast<int64_t>(after.size())))
          << "a slot was written that is not a row's work slot";
    }
    std::vector<float> got;
    for (const std::vector<float>& of : outputs) got.insert(got.end(), of.begin(), of.end());
    ExpectAsGoodAsPlain(got.data(), plain.data(), exact.data(), static_cast<int64_t>(got.size()),
                        whole ? "outputs of whole rows" : "outputs of cut rows", problem.front.dtype);
  }
}

// Calls `check` for mixers with every kind of front and norm, in sizes with and without a kernel of their own.
inline void ForEachDeltaNetMixer(absl::FunctionRef<void(const DeltaNetMixerCase&)> check) {
  const auto run = [&](const DeltaNetMixerCase& mixer) {
    SCOPED_TRACE(MixerName(mixer.front) + (mixer.has_gate ? " gate" : "") +
                 (mixer.norm_per_head ? "" : " over the width"));
    check(mixer);
  };
  run({.front = {.heads = 1, .key_dim = 128, .value_dim = 128}});
  run({.front = {.heads = 2, .key_dim = 128, .value_dim = 128, .has_bias = true, .beta_scale = 2}, .has_gate = true});
  run({.front = {.heads = 3, .key_dim = 64, .value_dim = 64}, .has_gate = true});
  run({.front = {.heads = 2, .key_dim = 64, .value_dim = 64, .norm = QkNorm::kSum, .has_beta = false}});
  run({.front = {.heads = 1,
                 .key_dim = 64,
                 .value_dim = 64,
                 .activation = QkActivation::kEluPlusOne,
                 .norm = QkNorm::kSum}});
  run({.front = {.heads = 1, .key_dim = 64, .value_dim = 64, .activation = QkActivation::kRelu}});
  run({.front = {.heads = 2, .key_dim = 64, .value_dim = 64, .taps = 3}});
  run({.front = {.heads = 2, .key_dim = 64, .value_dim = 64, .taps = 0}});
  run({.front = {.heads = 2, .key_dim = 128, .value_dim = 128, .taps = 0}, .has_gate = true});
  run({.front = {.heads = 2, .key_dim = 64, .value_dim = 128}});
  run({.front = {.heads = 2, .key_dim = 20, .value_dim = 12}, .has_gate = true});
  run({.front = {.heads = 2, .key_dim = 64, .value_dim = 64}, .norm_per_head = false});
}

}  // namespace deltanet

#endif  // DELTANET_TESTS_MODEL_OPS_DELTA_NET_MIXER_PROBLEM_H_
