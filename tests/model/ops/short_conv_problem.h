// Sequences for the front of a `delta_net` mixer, and what its definition makes of them.
#ifndef DELTANET_TESTS_MODEL_OPS_SHORT_CONV_PROBLEM_H_
#define DELTANET_TESTS_MODEL_OPS_SHORT_CONV_PROBLEM_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <iterator>
#include <limits>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "absl/functional/function_ref.h"
#include "gtest/gtest.h"
#include "model/base/round_up.h"
#include "model/ops/short_conv.h"
#include "tests/model/ops/op_test_util.h"

namespace deltanet {

struct ShortConvMixer {
  int64_t heads, key_dim, value_dim;
  int64_t taps = 4;
  bool has_bias = false;
  QkActivation activation = QkActivation::kSilu;
  QkNorm norm = QkNorm::kL2;
  bool has_beta = true;
  float beta_scale = 1.0f;

  int64_t qk() const { return 2 * heads * key_dim; }
  int64_t qkv() const { return qk() + heads * value_dim; }
  int64_t z_width() const { return qkv() + (has_beta ? heads : 0); }
  int64_t out_width() const { return qkv() + heads; }
};

inline std::string MixerName(const ShortConvMixer& m) {
  std::string name = "heads " + std::to_string(m.heads) + " key " + std::to_string(m.key_dim) + " value " +
                     std::to_string(m.value_dim) + " taps " + std::to_string(m.taps);
  if (m.has_bias) name += " bias";
  name += " activation " + std::to_string(static_cast<int>(m.activation));
  if (m.norm == QkNorm::kSum) name += " sum";
  if (!m.has_beta) name += " without beta";
  return name;
}

// A mixer's weights and sequences of its raw projections, held in `dtype`. Where heads are divided by their
// sum, no head's sum is near zero. If `aligned`, rows of z, out and the tails start at multiples of 16 bytes
// where their memory does and the widths allow.
struct ShortConvProblem {
  static constexpr int64_t kZPadding = 3, kOutPadding = 2, kSlotPadding = 5;  // Floats nobody may touch.

  explicit ShortConvProblem(const ShortConvMixer& mixer, DType dtype = DType::kFloat32, bool aligned = false,
                            std::vector<int64_t> lengths = {0, 1, 2, 3, 8, 17, 40})
      : mixer(mixer),
        dtype(dtype),
        aligned(aligned),
        lengths(std::move(lengths)),
        weight(RandomNormal(mixer.taps * mixer.qkv(), 60)),
        bias(RandomNormal(mixer.qkv(), 61)) {
    const bool positive = mixer.norm == QkNorm::kSum && mixer.activation != QkActivation::kEluPlusOne;
    const auto keep_away_from_zero = [](float& x) { x = std::fabs(x) + 0.25f; };
    if (positive) {
      std::for_each(weight.begin(), weight.end(), keep_away_from_zero);
      std::for_each(bias.begin(), bias.end(), keep_away_from_zero);
    }
    uint32_t seed = 62;
    for (const int64_t tokens : this->lengths) {
      std::vector<float> values = RandomNormal(tokens * mixer.z_width(), seed++, 1.5f);
      if (positive) std::for_each(values.begin(), values.end(), keep_away_from_zero);
      sequences.push_back(Rounded(values, dtype));
    }
  }

  int64_t z_stride() const { return RoundUp(mixer.z_width() + kZPadding, aligned ? 8 : 1); }
  int64_t out_stride() const { return RoundUp(mixer.out_width() + kOutPadding, aligned ? 8 : 1); }
  int64_t kept() const { return std::max<int64_t>(0, mixer.taps - 1); }
  // The place of a tail, which is of `dtype`, in floats.
  int64_t tail_floats() const { return RoundUp(kept() * mixer.qkv() * DTypeBytes(dtype), 4) / 4; }
  int64_t slot_stride() const { return RoundUp(tail_floats() + kSlotPadding, aligned ? 4 : 1); }
  int64_t tail_offset() const { return aligned ? 4 : 2; }

  // Raw projections of token t of sequence s.
  const float* Raw(int64_t s, int64_t t) const { return &sequences[s][t * mixer.z_width()]; }

  // Token t of sequence s in T, [out_width].
  template <typename T>
  std::vector<T> Reference(int64_t s, int64_t t) const {
    const int64_t qk = mixer.qk(), qkv = mixer.qkv();
    const auto sigmoid = [](T x) { return T(1) / (T(1) + std::exp(-x)); };
    std::vector<T> out(mixer.out_width());
    for (int64_t c = 0; c < qkv; ++c) {
      T y = mixer.taps == 0 ? static_cast<T>(Raw(s, t)[c]) : T(0);
      if (mixer.taps > 0 && mixer.has_bias) y += static_cast<T>(bias[c]);
      for (int64_t j = 0; j < mixer.taps; ++j) {
        const int64_t at = t - (mixer.taps - 1) + j;
        if (at >= 0) y += static_cast<T>(weight[j * qkv + c]) * static_cast<T>(Raw(s, at)[c]);
      }
      switch (c < qk ? mixer.activation : QkActivation::kSilu) {
        case QkActivation::kSilu:
          out[c] = y * sigmoid(y);
          break;
        case QkActivation::kRelu:
          out[c] = std::max(y, T(0));
          break;
        case QkActivation::kEluPlusOne:
          out[c] = y > 0 ? y + T(1) : std::exp(y);
          break;
        case QkActivation::kIdentity:
          out[c] = y;
          break;
      }
    }
    for (T* head = out.data(); head < out.data() + qk; head += mixer.key_dim) {
      T sum = 0;
      for (int64_t c = 0; c < mixer.key_dim; ++c) {
        sum += mixer.norm == QkNorm::kL2 ? head[c] * head[c] : head[c];
      }
      const T divisor = mixer.norm == QkNorm::kL2 ? std::sqrt(sum + T(1e-6)) : sum;
      for (int64_t c = 0; c < mixer.key_dim; ++c) head[c] /= divisor;
    }
    for (int64_t h = 0; h < mixer.heads; ++h) {
      out[qkv + h] = static_cast<T>(mixer.beta_scale);
      if (mixer.has_beta) out[qkv + h] *= sigmoid(static_cast<T>(Raw(s, t)[qkv + h]));
    }
    return out;
  }

  const ShortConvMixer mixer;
  const DType dtype;
  const bool aligned;
  const std::vector<int64_t> lengths;         // Tokens of each sequence.
  std::vector<float> weight, bias;            // [taps, qkv], [qkv]
  std::vector<std::vector<float>> sequences;  // [tokens, z_width] each.
};

// A step of ShortConvQkv in host memory. Slots are two a sequence.
struct ShortConvStep {
  explicit ShortConvStep(const ShortConvProblem& problem)
      : problem(&problem), pool(2 * problem.lengths.size() * problem.slot_stride()) {}

  const ShortConvProblem* problem;
  Guarded pool;  // Stays from step to step; all that follows is of one step.
  Ragged ragged;
  std::vector<float> z;  // [N, z_stride], NaN in the padding.
  Guarded out{0};        // [N, out_stride]

  void Start() {
    ragged = Ragged();
    z.clear();
  }
  // A row of tokens [begin, end) of sequence s.
  void Add(int64_t s, int64_t begin, int64_t end, int32_t base, int32_t work, bool fresh) {
    ragged.Add(end - begin, base, work, fresh, begin);
    for (int64_t t = begin; t < end; ++t) {
      const float* raw = problem->Raw(s, t);
      z.insert(z.end(), raw, raw + problem->mixer.z_width());
      z.insert(z.end(), problem->z_stride() - problem->mixer.z_width(), kNaN);
    }
  }

  ShortConvQkvArgs Args() {
    const ShortConvMixer& m = problem->mixer;
    return {.heads = m.heads,
            .key_dim = m.key_dim,
            .value_dim = m.value_dim,
            .activation = m.activation,
            .norm = m.norm,
            .has_beta = m.has_beta,
            .beta_scale = m.beta_scale,
            .taps = m.taps,
            .dtype = problem->dtype,
            .z = z.data(),
            .z_stride = problem->z_stride(),
            .weight = m.taps > 0 ? problem->weight.data() : nullptr,
            .bias = m.has_bias ? problem->bias.data() : nullptr,
            .tail = {.pool = pool.data(),
                     .slot_stride = problem->slot_stride(),
                     .offset = problem->tail_offset()},
            .out = out.data(),
            .out_stride = problem->out_stride()};
  }

  // Runs the step and checks that it wrote what it had to and nothing else.
  void Run(absl::FunctionRef<void(ShortConvStep*)> run) {
    const ShortConvMixer& m = problem->mixer;
    const int64_t N = ragged.offsets.back(), stride = problem->out_stride();
    out = Guarded(N * stride);
    std::vector<float> pool_before = pool.with_guards(), z_before = z;
    ASSERT_NO_FATAL_FAILURE(run(this));
    ASSERT_TRUE(out.GuardsIntact());
    ASSERT_TRUE(SameBits(z.data(), z_before.data(), static_cast<int64_t>(z.size()))) << "z was written";
    for (int64_t n = 0; n < N; ++n) {
      for (int64_t i = 0; i < stride; ++i) {
        ASSERT_EQ(std::isnan(out[n * stride + i]), i >= m.out_width()) << "token " << n << " value " << i;
      }
    }
    // The slots, as they were but for the work slots' tails.
    std::vector<float> pool_after = pool.with_guards();
    for (const int32_t slot : ragged.work_slot) {
      if (slot < 0) continue;
      const int64_t tail = Guarded::kGuard + slot * problem->slot_stride() + problem->tail_offset();
      std::copy_n(pool_before.begin() + tail, problem->tail_floats(), pool_after.begin() + tail);
    }
    ASSERT_TRUE(SameBits(pool_after.data(), pool_before.data(), static_cast<int64_t>(pool_after.size())))
        << "a slot was written that is not a row's work slot";
  }

  // Holds the tail in `slot` to what it is after token t - 1 of sequence s.
  void ExpectTail(int64_t s, int64_t t, int32_t slot) {
    const int64_t qkv = problem->mixer.qkv();
    std::vector<float> kept(problem->kept() * qkv);
    ConvertElements(pool.data() + slot * problem->slot_stride() + problem->tail_offset(), problem->dtype,
                    kept.data(), DType::kFloat32, static_cast<int64_t>(kept.size()));
    for (int64_t i = 0; i < problem->kept(); ++i) {
      const int64_t at = t - problem->kept() + i;
      const std::vector<float> zeros(qkv, 0.0f);
      ASSERT_TRUE(SameBits(&kept[i * qkv], at >= 0 ? problem->Raw(s, at) : zeros.data(), qkv))
          << "sequence " << s << " after " << t << " tokens, kept input " << i;
    }
  }
};

// Runs all sequences at once, each as one fresh row, and holds every output to the bound; then again in steps
// whose rows have random numbers of tokens (some none; of a long sequence, many), in random order, with
// padding behind them, which gives the same bits. Work slots change now and then, so that base and work
// differ.
inline void CheckShortConv(const ShortConvProblem& problem, absl::FunctionRef<void(ShortConvStep*)> run) {
  const ShortConvMixer& m = problem.mixer;
  const int64_t count = static_cast<int64_t>(problem.lengths.size());
  const int64_t stride = problem.out_stride(), width = m.out_width();

  std::vector<std::vector<float>> whole(count);  // [tokens, out_width] of each sequence.
  {
    ShortConvStep step(problem);
    step.Start();
    for (int64_t s = 0; s < count; ++s) {
      step.Add(s, 0, problem.lengths[s], -1, static_cast<int32_t>(2 * s), /*fresh=*/true);
    }
    ASSERT_NO_FATAL_FAILURE(step.Run(run));
    struct Part {
      const char* name;
      int64_t begin, end;
    };
    for (const Part& part :
         {Part{"q and k", 0, m.qk()}, Part{"v", m.qk(), m.qkv()}, Part{"beta", m.qkv(), width}}) {
      std::vector<float> fast, plain;
      std::vector<double> exact;
      for (int64_t s = 0; s < count; ++s) {
        for (int64_t t = 0; t < problem.lengths[s]; ++t) {
          const float* const got = step.out.data() + (step.ragged.offsets[s] + t) * stride;
          const std::vector<float> by_plain = problem.Reference<float>(s, t);
          const std::vector<double> by_exact = problem.Reference<double>(s, t);
          fast.insert(fast.end(), got + part.begin, got + part.end);
          plain.insert(plain.end(), by_plain.begin() + part.begin, by_plain.begin() + part.end);
          exact.insert(exact.end(), by_exact.begin() + part.begin, by_exact.begin() + part.end);
        }
      }
      ExpectAsGoodAsPlain(fast.data(), plain.data(), exact.data(), static_cast<int64_t>(fast.size()),
                          part.name, problem.dtype);
    }
    for (int64_t s = 0; s < count; ++s) {
      for (int64_t t = 0; t < problem.lengths[s]; ++t) {
        const float* const got = step.out.data() + (step.ragged.offsets[s] + t) * stride;
        whole[s].insert(whole[s].end(), got, got + width);
      }
      ASSERT_NO_FATAL_FAILURE(step.ExpectTail(s, problem.lengths[s], static_cast<int32_t>(2 * s)));
    }
  }

  std::mt19937 generator(7);
  ShortConvStep step(problem);
  std::vector<int64_t> done(count, 0), order(count);
  std::vector<int32_t> slot(count, -1);  // None yet: fresh.
  const auto unfinished = [&] { return done != problem.lengths; };
  while (unfinished()) {
    for (int64_t s = 0; s < count; ++s) order[s] = s;
    std::shuffle(order.begin(), order.end(), generator);
    step.Start();
    const std::vector<int64_t> begin = done;
    for (const int64_t s : order) {
      const int64_t most = problem.lengths[s] < 100 ? 5 : problem.lengths[s] / 2;
      done[s] = std::min<int64_t>(problem.lengths[s], done[s] + generator() % (most + 1));
      const int32_t base = slot[s];
      slot[s] = base < 0 ? static_cast<int32_t>(2 * s) : base ^ static_cast<int32_t>(generator() % 2);
      step.Add(s, begin[s], done[s], base, slot[s], base < 0);
    }
    for (int i = 0; i < 2; ++i) step.Add(count - 1, i, i + 1, -1, -1, /*fresh=*/true);  // Padding.
    ASSERT_NO_FATAL_FAILURE(step.Run(run));
    for (int64_t r = 0; r < count; ++r) {
      const int64_t s = order[r];
      for (int64_t t = begin[s]; t < done[s]; ++t) {
        const float* const got = step.out.data() + (step.ragged.offsets[r] + t - begin[s]) * stride;
        ASSERT_TRUE(SameBits(got, &whole[s][t * width], width)) << "sequence " << s << " token " << t;
      }
      ASSERT_NO_FATAL_FAILURE(step.ExpectTail(s, done[s], slot[s]));
    }
  }
}

// Calls `check` for mixers of awkward sizes with every number of taps, activation, norm and kind of beta.
inline void ForEachShortConvMixer(absl::FunctionRef<void(const ShortConvMixer&)> check) {
  const ShortConvMixer sizes[] = {{1, 1, 1},     {2, 3, 5},    {3, 32, 16},   {2, 60, 75},
                                  {1, 128, 128}, {17, 5, 4},   {1, 300, 270}, {5, 8, 16},
                                  {2, 64, 72},   {1, 256, 24}, {3, 128, 128}};
  int64_t chosen = 0;
  const auto run = [&](ShortConvMixer mixer) {
    mixer.has_beta = chosen % 3 != 0;
    mixer.beta_scale = chosen % 2 == 0 ? 1.0f : 2.0f;
    SCOPED_TRACE(MixerName(mixer));
    check(mixer);
  };
  for (int64_t taps = 0; taps <= kMaxShortConvTaps; ++taps) {
    for (const bool has_bias : {false, true}) {
      ShortConvMixer mixer = sizes[chosen++ % std::size(sizes)];
      mixer.taps = taps;
      mixer.has_bias = has_bias;
      run(mixer);
    }
  }
  for (const ShortConvMixer& size : sizes) {
    for (const QkActivation activation :
         {QkActivation::kSilu, QkActivation::kRelu, QkActivation::kEluPlusOne, QkActivation::kIdentity}) {
      for (const QkNorm norm : {QkNorm::kL2, QkNorm::kSum}) {
        ShortConvMixer mixer = size;
        mixer.activation = activation;
        mixer.norm = norm;
        mixer.taps = ++chosen % 5 == 0 ? 0 : 4;
        run(mixer);
      }
    }
  }
}

// What one head of two channels makes, without a convolution, of keys (a, b) that are zero, extreme or NaN:
// `run(activation, norm, a, b)` gives its two values.
inline void ExpectZeroKeysAndExtremes(
    absl::FunctionRef<std::vector<float>(QkActivation, QkNorm, float, float)> run) {
  const float inf = std::numeric_limits<float>::infinity();
  using Two = std::vector<float>;
  EXPECT_EQ(run(QkActivation::kRelu, QkNorm::kL2, -1, -2), (Two{0, 0}));
  EXPECT_EQ(run(QkActivation::kSilu, QkNorm::kL2, 0, 0), (Two{0, 0}));
  EXPECT_EQ(run(QkActivation::kEluPlusOne, QkNorm::kSum, -1e4f, 0), (Two{0, 1}));
  EXPECT_EQ(run(QkActivation::kEluPlusOne, QkNorm::kSum, -inf, 2), (Two{0, 1}));
  EXPECT_EQ(run(QkActivation::kEluPlusOne, QkNorm::kSum, 100, 100), (Two{0.5f, 0.5f}));
  EXPECT_EQ(run(QkActivation::kIdentity, QkNorm::kSum, 3, -2), (Two{3, -2}));
  for (const QkActivation activation :
       {QkActivation::kSilu, QkActivation::kRelu, QkActivation::kEluPlusOne, QkActivation::kIdentity}) {
    for (const QkNorm norm : {QkNorm::kL2, QkNorm::kSum}) {
      const Two got = run(activation, norm, 1, kNaN);
      EXPECT_TRUE(std::isnan(got[0]) && std::isnan(got[1])) << static_cast<int>(activation);
    }
  }
}

}  // namespace deltanet

#endif  // DELTANET_TESTS_MODEL_OPS_SHORT_CONV_PROBLEM_H_
