#include "model/ops/conv_qkv.h"

#include <cmath>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "tests/model/ops/op_test_util.h"

namespace deltanet {
namespace {

constexpr int64_t kUnknownEnd = std::numeric_limits<int64_t>::max();

// One sequence, fed with `fed` tokens of which position p's raw input is x[p + lag]; the first `lag` carry
// none, and nor do those past the end.
struct Sequence {
  int64_t lag, fed, end, width;
  std::vector<float> x;  // [fed, width]
  std::vector<float> scale;

  Sequence(int64_t lag, int64_t fed, int64_t end, int64_t width, uint32_t seed)
      : lag(lag),
        fed(fed),
        end(end),
        width(width),
        x(RandomNormal(fed * width, seed)),
        scale(RandomNormal(width, 99)) {
    for (int64_t t = 0; t < fed; ++t) {  // What carries no input may hold anything.
      if (t < lag || t - lag >= end) std::fill_n(x.begin() + t * width, width, kNaN);
    }
  }

  // Raw input at a position, or zeros.
  std::vector<float> Raw(int64_t position) const {
    if (position < 0 || position >= end) return std::vector<float>(width, 0.0f);
    const auto from = x.begin() + (position + lag) * width;
    return {from, from + width};
  }
  std::vector<float> Seen(int64_t position, bool normed) const {
    std::vector<float> raw = Raw(position);
    if (!normed || position < 0 || position >= end) return raw;
    std::vector<float> out(width);
    EXPECT_TRUE(
        AddRmsNorm({.rows = 1, .width = width, .x = raw.data(), .scale = scale.data(), .normed = out.data()},
                   SerialContext())
            .ok());
    return out;
  }
};

class GatherTapsTest : public IsaTest {
 protected:
  // Feeds all sequences in steps whose rows have random numbers of tokens (some none), in random order, and
  // checks every tap and centre. Work slots change now and then, so that base and work differ.
  static void Stream(std::vector<Sequence> sequences, bool normed, bool with_centre, const OpContext& context,
                     uint32_t seed) {
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
        const int64_t tokens = std::min<int64_t>(sequences[s].fed - done[s], generator() % 5);
        const int32_t base = slot[s];
        if (generator() % 2 == 0) slot[s] ^= 1;
        ragged.Add(tokens, base, slot[s], done[s] == 0, done[s], sequences[s].end);
        const auto from = sequences[s].x.begin() + done[s] * d;
        x.insert(x.end(), from, from + tokens * d);
      }
      const int64_t N = ragged.offsets.back();
      Guarded taps(N * 3 * d), centre(N * d);
      const GatherTapsArgs args{.width = d,
                                .lag = lag,
                                .x = x.data(),
                                .norm_scale = normed ? sequences[0].scale.data() : nullptr,
                                .tail = {.pool = pool.data(), .slot_stride = slot_stride, .offset = 1},
                                .taps = taps.data(),
                                .centre = with_centre ? centre.data() : nullptr};
      ASSERT_TRUE(GatherTaps(ragged.rows(), args, context).ok());
      ASSERT_TRUE(taps.GuardsIntact() && centre.GuardsIntact() && pool.GuardsIntact());
      for (int64_t r = 0; r < count; ++r) {
        const Sequence& sequence = sequences[order[r]];
        for (int64_t n = ragged.offsets[r]; n < ragged.offsets[r + 1]; ++n) {
          const int64_t newest = done[order[r]]++ - lag;
          for (int64_t j = 0; j < 3; ++j) {
            const std::vector<float> want = sequence.Seen(newest - 2 + j, normed);
            ASSERT_TRUE(SameBits(taps.data() + (3 * n + j) * d, want.data(), d))
                << "position " << newest << " tap " << j;
          }
          if (with_centre) {
            ASSERT_TRUE(SameBits(centre.data() + n * d, sequence.Raw(newest - 1).data(), d))
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
};

TEST_P(GatherTapsTest, AnySplitSeesTheWholeSequence) {
  for (const int64_t width : {1, 16, 37}) {
    for (const int64_t lag : {0, 1, 5}) {
      for (const bool normed : {false, true}) {
        for (const bool threads : {false, true}) {
          SCOPED_TRACE("width " + std::to_string(width) + " lag " + std::to_string(lag) +
                       (normed ? " normed" : ""));
          std::vector<Sequence> sequences;
          for (int64_t s = 0; s < 7; ++s) {
            const bool ends = s % 2 == 0;
            const int64_t length = 4 * s;  // The first one has no token at all.
            sequences.emplace_back(lag, length + (ends ? lag + 1 : 0), ends ? length : kUnknownEnd, width,
                                   static_cast<uint32_t>(30 + s));
          }
          Stream(std::move(sequences), normed, /*with_centre=*/lag != 5,
                 threads ? ThreadedContext() : SerialContext(), static_cast<uint32_t>(width + lag));
        }
      }
    }
  }
}

TEST_P(GatherTapsTest, FreshRowsReadNoSlot) {
  Ragged ragged;
  ragged.Add(1, -1, 0, true);
  ragged.Add(0, -1, 1, true);
  const std::vector<float> x = {5, 6};
  Guarded pool(8), taps(6);
  ASSERT_TRUE(
      GatherTaps(
          ragged.rows(),
          {.width = 2, .x = x.data(), .tail = {.pool = pool.data(), .slot_stride = 4}, .taps = taps.data()},
          SerialContext())
          .ok());
  EXPECT_EQ(taps.Values(), (std::vector<float>{0, 0, 0, 0, 5, 6}));
  EXPECT_EQ(pool.Values(), (std::vector<float>{0, 0, 5, 6, 0, 0, 0, 0}));
}

INSTANTIATE_TEST_SUITE_P(Isa, GatherTapsTest, EveryIsa(),
                         [](const auto& info) { return IsaName(info.param); });

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

class ConvQkvActivationTest : public IsaTest {};

TEST_P(ConvQkvActivationTest, MatchesTheReference) {
  for (const Mixer& m : {Mixer{1, 1, 1, QkvActivation::kRelu}, Mixer{1, 64, 64, QkvActivation::kRelu},
                         Mixer{8, 16, 16, QkvActivation::kSilu}, Mixer{3, 5, 7, QkvActivation::kSilu},
                         Mixer{17, 33, 4, QkvActivation::kRelu}}) {
    for (const int64_t centre_tap : {1, 2}) {
      for (const int64_t lag : {0, 2}) {
        for (const bool threads : {false, true}) {
          SCOPED_TRACE("heads " + std::to_string(m.heads) + " centre " + std::to_string(centre_tap) +
                       " lag " + std::to_string(lag));
          Ragged ragged;
          ragged.Add(9, 0, 0, true, 0, 5);  // Before the start, inside, and past the end.
          ragged.Add(0, 1, 1, false, 3);
          ragged.Add(1, 2, 2, false, 1);
          ragged.Add(63, 3, 3, false, 1000);
          ragged.Add(2, 4, 4, true, 0, 0);  // A sequence without a token.
          ragged.Add(3, 5, 5, true, 0, 1);
          const int64_t N = ragged.offsets.back();
          const int64_t qkv = m.heads * (2 * m.key_dim + m.value_dim), width = qkv + m.heads,
                        stride = width + 3;
          const std::vector<float> input = RandomNormal(N * stride, 50, 2.0f), bias = RandomNormal(width, 51),
                                   tap_bias = RandomNormal(3 * qkv, 52);
          Guarded z(N * stride);
          std::copy(input.begin(), input.end(), z.data());
          ASSERT_TRUE(ConvQkvActivation(ragged.rows(),
                                        {.heads = m.heads,
                                         .key_dim = m.key_dim,
                                         .value_dim = m.value_dim,
                                         .activation = m.activation,
                                         .lag = lag,
                                         .centre_tap = centre_tap,
                                         .z = z.data(),
                                         .z_stride = stride,
                                         .bias = bias.data(),
                                         .tap_bias = tap_bias.data()},
                                        threads ? ThreadedContext() : SerialContext())
                          .ok());
          EXPECT_TRUE(z.GuardsIntact());
          std::vector<float> fast, plain(N * width);
          std::vector<double> exact(N * width);
          for (int64_t r = 0; r < ragged.rows().rows; ++r) {
            for (int64_t n = ragged.offsets[r]; n < ragged.offsets[r + 1]; ++n) {
              int taps = 0;
              for (int64_t j = 0; j < 3; ++j) {
                const int64_t position = ragged.position[r] + n - ragged.offsets[r] - lag - 2 + j;
                if (position >= 0 && position < ragged.end[r]) taps |= 1 << j;
              }
              const bool has_position = taps >> centre_tap & 1;
              MixerReference(m, &input[n * stride], bias.data(), tap_bias.data(), taps, has_position,
                             &plain[n * width]);
              MixerReference(m, &input[n * stride], bias.data(), tap_bias.data(), taps, has_position,
                             &exact[n * width]);
              fast.insert(fast.end(), z.data() + n * stride, z.data() + n * stride + width);
              EXPECT_TRUE(SameBits(z.data() + n * stride + width, &input[n * stride + width], 3))
                  << "padding";
              if (!has_position) {
                for (int64_t h = 0; h < m.heads; ++h) EXPECT_EQ(fast[n * width + qkv + h], 0.0f);
              }
            }
          }
          ExpectAsGoodAsPlain(fast.data(), plain.data(), exact.data(), N * width, "qkv and beta");
        }
      }
    }
  }
}

TEST_P(ConvQkvActivationTest, KeysOfZeroStayZeroAndNaNShows) {
  Ragged ragged;
  ragged.Add(2, 0, 0, false, 10);
  // Token 0: q = k = -1, which ReLU makes zero. Token 1: a NaN in v.
  std::vector<float> z = {-1, -1, -1, -1, 3, -3, 0, -1, -1, -1, -1, kNaN, -3, 0};
  const std::vector<float> bias(7, 0.0f), tap_bias(18, 0.0f);
  ASSERT_TRUE(ConvQkvActivation(ragged.rows(),
                                {.heads = 1,
                                 .key_dim = 2,
                                 .value_dim = 2,
                                 .centre_tap = 2,
                                 .z = z.data(),
                                 .z_stride = 7,
                                 .bias = bias.data(),
                                 .tap_bias = tap_bias.data()},
                                SerialContext())
                  .ok());
  EXPECT_EQ(std::vector<float>(z.begin(), z.begin() + 7), (std::vector<float>{0, 0, 0, 0, 3, 0, 0.5f}));
  EXPECT_TRUE(std::isnan(z[11]));
}

INSTANTIATE_TEST_SUITE_P(Isa, ConvQkvActivationTest, EveryIsa(),
                         [](const auto& info) { return IsaName(info.param); });

TEST(ConvQkvContractTest, RefuseWhatTheyCannotDo) {
  const RaggedRows none;
  EXPECT_EQ(GatherTaps(none, {.width = 0}, SerialContext()).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(GatherTaps(none, {.width = 1, .lag = -1}, SerialContext()).code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(GatherTaps(none, {.width = 1, .dtype = DType::kBFloat16}, SerialContext()).code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(GatherTaps(none, {.width = 1}, CudaContext()).code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_TRUE(GatherTaps(none, {.width = 1}, SerialContext()).ok());

  const ConvQkvActivationArgs good{.heads = 1, .key_dim = 2, .value_dim = 3, .centre_tap = 1, .z_stride = 8};
  const auto code = [&](auto change, const OpContext& context = SerialContext()) {
    ConvQkvActivationArgs args = good;
    change(&args);
    return ConvQkvActivation(none, args, context).code();
  };
  EXPECT_EQ(code([](ConvQkvActivationArgs*) {}), absl::StatusCode::kOk);
  EXPECT_EQ(code([](ConvQkvActivationArgs* args) { args->heads = 0; }), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(code([](ConvQkvActivationArgs* args) { args->key_dim = 0; }), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(code([](ConvQkvActivationArgs* args) { args->value_dim = 0; }),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(code([](ConvQkvActivationArgs* args) { args->lag = -1; }), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(code([](ConvQkvActivationArgs* args) { args->centre_tap = 3; }),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(code([](ConvQkvActivationArgs* args) { args->z_stride = 7; }),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(code([](ConvQkvActivationArgs* args) { args->dtype = DType::kBFloat16; }),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(code([](ConvQkvActivationArgs*) {}, CudaContext()), absl::StatusCode::kFailedPrecondition);
}

}  // namespace
}  // namespace deltanet
