// Sequences and inputs for the operators at the front of a mixer, and what their definitions make of them.
#ifndef DELTANET_TESTS_MODEL_OPS_CONV_QKV_PROBLEM_H_
#define DELTANET_TESTS_MODEL_OPS_CONV_QKV_PROBLEM_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "absl/functional/function_ref.h"
#include "gtest/gtest.h"
#include "model/ops/conv_qkv.h"
#include "tests/model/ops/op_test_util.h"

namespace deltanet {

inline constexpr int64_t kUnknownEnd = std::numeric_limits<int64_t>::max();

// One sequence, fed with `fed` tokens of which position p's raw input is x[p + lag]; the first `lag` carry
// none, and nor do those past the end.
struct TapSequence {
  int64_t lag, fed, end, width;
  std::vector<float> x;  // [fed, width]

  TapSequence(int64_t lag, int64_t fed, int64_t end, int64_t width, uint32_t seed)
      : lag(lag), fed(fed), end(end), width(width), x(RandomNormal(fed * width, seed)) {
    for (int64_t t = 0; t < fed; ++t) {  // What carries no input may hold anything.
      if (t < lag || t - lag >= end) std::fill_n(x.begin() + t * width, width, kNaN);
    }
  }

  bool Valid(int64_t position) const { return position >= 0 && position < end; }
  // Raw input at a position, or zeros.
  std::vector<float> Raw(int64_t position) const {
    if (!Valid(position)) return std::vector<float>(width, 0.0f);
    const auto from = x.begin() + (position + lag) * width;
    return {from, from + width};
  }
};

// Seven sequences of 0 to 6 `unit` tokens, every other one of known length.
inline std::vector<TapSequence> SevenTapSequences(int64_t width, int64_t lag, int64_t unit = 4) {
  std::vector<TapSequence> sequences;
  for (int64_t s = 0; s < 7; ++s) {
    const bool ends = s % 2 == 0;
    const int64_t length = unit * s;
    sequences.emplace_back(lag, length + (ends ? lag + 1 : 0), ends ? length : kUnknownEnd, width,
                           static_cast<uint32_t>(30 + s));
  }
  return sequences;
}

// A step of GatherTaps in host memory.
struct TapStep {
  Ragged ragged;
  std::vector<float> x;  // [N, d]
  Guarded* pool;
  Guarded taps, centre;
  GatherTapsArgs args;  // Points to the above.
};

// Feeds all sequences in steps whose rows have random numbers of tokens (up to `most`, some none), in random
// order, with padding behind them, each run by `gather`, and checks every centre and tail. Every tap goes to
// `check`. Work slots change now and then, so that base and work differ.
inline void StreamTaps(
    const std::vector<TapSequence>& sequences, const float* norm_scale, bool with_centre, uint32_t seed,
    absl::FunctionRef<void(TapStep*)> gather,
    absl::FunctionRef<void(const TapSequence&, int64_t position, const float* got)> check,
    int64_t most = 4) {
  std::mt19937 generator(seed);
  const int64_t d = sequences[0].width, lag = sequences[0].lag,
                count = static_cast<int64_t>(sequences.size());
  const int64_t slot_stride = 2 * d + 3;
  Guarded pool(2 * count * slot_stride);
  std::vector<int64_t> done(count, 0);
  std::vector<int32_t> slot(count);
  for (int64_t s = 0; s < count; ++s) slot[s] = static_cast<int32_t>(2 * s);
  const auto unfinished = [&] {
    for (int64_t s = 0; s < count; ++s) {
      if (done[s] < sequences[s].fed) return true;
    }
    return false;
  };
  while (unfinished()) {
    std::vector<int64_t> order(count);
    for (int64_t s = 0; s < count; ++s) order[s] = s;
    std::shuffle(order.begin(), order.end(), generator);
    Ragged ragged;
    std::vector<float> x;
    for (int64_t s : order) {
      const int64_t tokens = std::min<int64_t>(sequences[s].fed - done[s], generator() % (most + 1));
      const int32_t base = slot[s];
      if (generator() % 2 == 0) slot[s] ^= 1;
      ragged.Add(tokens, base, slot[s], done[s] == 0, done[s], sequences[s].end);
      const auto from = sequences[s].x.begin() + done[s] * d;
      x.insert(x.end(), from, from + tokens * d);
    }
    ragged.Add(1, -1, -1, true);
    x.insert(x.end(), d, 1.0f);
    const int64_t N = ragged.offsets.back();
    TapStep step{ragged, x, &pool, Guarded(N * 3 * d), Guarded(N * d), {}};
    step.args = {.width = d,
                 .lag = lag,
                 .x = step.x.data(),
                 .norm_scale = norm_scale,
                 .tail = {.pool = pool.data(), .slot_stride = slot_stride, .offset = 1},
                 .taps = step.taps.data(),
                 .centre = with_centre ? step.centre.data() : nullptr};
    ASSERT_NO_FATAL_FAILURE(gather(&step));
    ASSERT_TRUE(step.taps.GuardsIntact() && step.centre.GuardsIntact() && pool.GuardsIntact());
    for (int64_t r = 0; r < count; ++r) {
      const TapSequence& sequence = sequences[order[r]];
      for (int64_t n = ragged.offsets[r]; n < ragged.offsets[r + 1]; ++n) {
        const int64_t newest = done[order[r]]++ - lag;
        for (int64_t j = 0; j < 3; ++j) {
          SCOPED_TRACE("position " + std::to_string(newest) + " tap " + std::to_string(j));
          ASSERT_NO_FATAL_FAILURE(check(sequence, newest - 2 + j, step.taps.data() + (3 * n + j) * d));
        }
        if (with_centre) {
          ASSERT_TRUE(SameBits(step.centre.data() + n * d, sequence.Raw(newest - 1).data(), d))
              << "position " << newest;
        }
      }
      const float* tail = pool.data() + ragged.work_slot[r] * slot_stride + 1;
      const int64_t newest = done[order[r]] - 1 - lag;
      ASSERT_TRUE(SameBits(tail, sequence.Raw(newest - 1).data(), d)) << "older input of the tail";
      ASSERT_TRUE(SameBits(tail + d, sequence.Raw(newest).data(), d)) << "newer input of the tail";
    }
  }
}

struct Mixer {
  int64_t heads, key_dim, value_dim;
  QkvActivation activation;
};

// One token in T. `taps` has bit j where tap j is valid.
template <typename T>
void MixerReference(const Mixer& m, const float* z, const float* bias, const float* tap_bias, int taps,
                    bool has_position, T* out) {
  const int64_t qk = 2 * m.heads * m.key_dim, qkv = qk + m.heads * m.value_dim;
  const auto sigmoid = [](T x) { return T(1) / (T(1) + std::exp(-x)); };
  for (int64_t j = 0; j < qkv; ++j) {
    T x = static_cast<T>(z[j]) + static_cast<T>(bias[j]);
    for (int64_t tap = 0; tap < 3; ++tap) {
      if (!(taps >> tap & 1)) x -= static_cast<T>(tap_bias[tap * qkv + j]);
    }
    out[j] = m.activation == QkvActivation::kSilu ? x * sigmoid(x) : x > 0 ? x : T(0);
  }
  for (int64_t head = 0; head < 2 * m.heads; ++head) {
    T squares = 0;
    T* x = out + head * m.key_dim;
    for (int64_t i = 0; i < m.key_dim; ++i) squares += x[i] * x[i];
    for (int64_t i = 0; i < m.key_dim; ++i) x[i] /= std::sqrt(squares) + T(1e-6);
  }
  for (int64_t h = 0; h < m.heads; ++h) {
    out[qkv + h] = has_position ? sigmoid(static_cast<T>(z[qkv + h]) + static_cast<T>(bias[qkv + h])) : T(0);
  }
}

// A step of ConvQkvActivation: rows before the start of a sequence, inside, and past its end.
class MixerProblem {
 public:
  // z is held in `dtype`; the longest row has `longest` tokens.
  MixerProblem(const Mixer& mixer, int64_t lag, int64_t centre_tap, DType dtype = DType::kFloat32,
               int64_t longest = 63)
      : mixer_(mixer), lag_(lag), centre_tap_(centre_tap), dtype_(dtype), z_(0) {
    ragged_.Add(9, 0, 0, true, 0, 5);
    ragged_.Add(0, 1, 1, false, 3);
    ragged_.Add(1, 2, 2, false, 1);
    ragged_.Add(longest, 3, 3, false, 1000);
    ragged_.Add(2, 4, 4, true, 0, 0);  // A sequence without a token.
    ragged_.Add(3, 5, 5, true, 0, 1);
    qkv_ = mixer.heads * (2 * mixer.key_dim + mixer.value_dim);
    width_ = qkv_ + mixer.heads;
    stride_ = width_ + 3;
    input_ = Rounded(RandomNormal(ragged_.offsets.back() * stride_, 50, 2.0f), dtype);
    bias = RandomNormal(width_, 51);
    tap_bias = RandomNormal(3 * qkv_, 52);
    z_ = Guarded(static_cast<int64_t>(input_.size()));
    std::copy(input_.begin(), input_.end(), z_.data());
  }

  Ragged& ragged() { return ragged_; }
  Guarded& z() { return z_; }
  ConvQkvActivationArgs Args() {
    return {.heads = mixer_.heads,
            .key_dim = mixer_.key_dim,
            .value_dim = mixer_.value_dim,
            .activation = mixer_.activation,
            .lag = lag_,
            .centre_tap = centre_tap_,
            .dtype = dtype_,
            .z = z_.data(),
            .z_stride = stride_,
            .bias = bias.data(),
            .tap_bias = tap_bias.data()};
  }

  // Holds z, after the operator ran, to the bound.
  void Compare() {
    EXPECT_TRUE(z_.GuardsIntact());
    const int64_t N = ragged_.offsets.back();
    std::vector<float> fast, plain(N * width_);
    std::vector<double> exact(N * width_);
    for (int64_t r = 0; r < ragged_.rows().rows; ++r) {
      for (int64_t n = ragged_.offsets[r]; n < ragged_.offsets[r + 1]; ++n) {
        int taps = 0;
        for (int64_t j = 0; j < 3; ++j) {
          const int64_t position = ragged_.position[r] + n - ragged_.offsets[r] - lag_ - 2 + j;
          if (position >= 0 && position < ragged_.end[r]) taps |= 1 << j;
        }
        const bool has_position = taps >> centre_tap_ & 1;
        const float* in = &input_[n * stride_];
        const float* out = z_.data() + n * stride_;
        MixerReference(mixer_, in, bias.data(), tap_bias.data(), taps, has_position, &plain[n * width_]);
        MixerReference(mixer_, in, bias.data(), tap_bias.data(), taps, has_position, &exact[n * width_]);
        fast.insert(fast.end(), out, out + width_);
        EXPECT_TRUE(SameBits(out + width_, in + width_, 3)) << "padding";
        if (!has_position) {
          for (int64_t h = 0; h < mixer_.heads; ++h) EXPECT_EQ(out[qkv_ + h], 0.0f);
        }
      }
    }
    ExpectAsGoodAsPlain(fast.data(), plain.data(), exact.data(), N * width_, "qkv and beta", dtype_);
  }

  std::vector<float> bias, tap_bias;

 private:
  const Mixer mixer_;
  const int64_t lag_, centre_tap_;
  const DType dtype_;
  Ragged ragged_;
  int64_t qkv_, width_, stride_;
  std::vector<float> input_;
  Guarded z_;
};

// Calls `run` for mixers of awkward sizes, with both places of the centre, with and without a lag.
inline void ForEachMixer(absl::FunctionRef<void(const Mixer&, int64_t lag, int64_t centre_tap)> run) {
  for (const Mixer& m : {Mixer{1, 1, 1, QkvActivation::kRelu}, Mixer{1, 64, 64, QkvActivation::kRelu},
                         Mixer{8, 16, 16, QkvActivation::kSilu}, Mixer{3, 5, 7, QkvActivation::kSilu},
                         Mixer{17, 33, 4, QkvActivation::kRelu}, Mixer{3, 8, 100, QkvActivation::kSilu}}) {
    for (const int64_t centre_tap : {1, 2}) {
      for (const int64_t lag : {0, 2}) {
        SCOPED_TRACE("heads " + std::to_string(m.heads) + " centre " + std::to_string(centre_tap) + " lag " +
                     std::to_string(lag));
        run(m, lag, centre_tap);
      }
    }
  }
}

}  // namespace deltanet

#endif  // DELTANET_TESTS_MODEL_OPS_CONV_QKV_PROBLEM_H_
