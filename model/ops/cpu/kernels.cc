// CPU kernels, written once in vectors of the compiler and built for each instruction set (DELTANET_CPU_ISA
// names the build). Everything but the table is local to this file: see kernels.h.
#include "model/ops/cpu/kernels.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif
#include <stdint.h>

namespace deltanet {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t IntVec __attribute__((vector_size(4 * kLanes)));
typedef float UnalignedVec __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

inline Vec Broadcast(float x) { return x - Vec{}; }
inline Vec Load(const float* from) { return *reinterpret_cast<const UnalignedVec*>(from); }
inline void Store(Vec x, float* to) { *reinterpret_cast<UnalignedVec*>(to) = x; }

// The first `count` lanes, 0 < count < kLanes; the others load as zero and are not stored.
#if defined(__AVX512F__)
inline Vec LoadPartial(const float* from, int64_t count) {
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), from);
}
inline void StorePartial(Vec x, float* to, int64_t count) {
  _mm512_mask_storeu_ps(to, static_cast<__mmask16>((1u << count) - 1), x);
}
#elif defined(__AVX2__)
inline __m256i PartialMask(int64_t count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)),
                            _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline Vec LoadPartial(const float* from, int64_t count) {
  return _mm256_maskload_ps(from, PartialMask(count));
}
inline void StorePartial(Vec x, float* to, int64_t count) { _mm256_maskstore_ps(to, PartialMask(count), x); }
#else
inline Vec LoadPartial(const float* from, int64_t count) {
  Vec x = {};
  for (int64_t lane = 0; lane < count; ++lane) x[lane] = from[lane];
  return x;
}
inline void StorePartial(Vec x, float* to, int64_t count) {
  for (int64_t lane = 0; lane < count; ++lane) to[lane] = x[lane];
}
#endif

template <bool kPartial>
inline Vec LoadLanes(const float* from, int64_t count) {
  if constexpr (kPartial) return LoadPartial(from, count);
  return Load(from);
}
template <bool kPartial>
inline void StoreLanes(Vec x, float* to, int64_t count) {
  if constexpr (kPartial) return StorePartial(x, to, count);
  Store(x, to);
}

// Calls body(first element, lanes, is_partial) over `n` elements; is_partial is a compile-time constant.
struct Full {
  static constexpr bool value = false;
};
struct Partial {
  static constexpr bool value = true;
};
template <typename Body>
inline void ForVectors(int64_t n, Body body) {
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) body(j, int64_t{kLanes}, Full());
  if (j < n) body(j, n - j, Partial());
}

typedef float Quad __attribute__((vector_size(16)));

inline Quad SumOfQuads(Vec x) {
  Quad quads[kLanes / 4];
  __builtin_memcpy(quads, &x, sizeof(x));
  for (int half = kLanes / 8; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) quads[i] += quads[i + half];
  }
  return quads[0];
}

inline float Sum(Vec x) {
  const Quad quad = SumOfQuads(x);
  return (quad[0] + quad[2]) + (quad[1] + quad[3]);
}

// Sum of each of four, to the bit.
inline Quad SumsOfFour(Vec x0, Vec x1, Vec x2, Vec x3) {
  const Quad q0 = SumOfQuads(x0), q1 = SumOfQuads(x1), q2 = SumOfQuads(x2), q3 = SumOfQuads(x3);
  const Quad low = __builtin_shufflevector(q0, q1, 0, 4, 1, 5) + __builtin_shufflevector(q0, q1, 2, 6, 3, 7);
  const Quad high = __builtin_shufflevector(q2, q3, 0, 4, 1, 5) + __builtin_shufflevector(q2, q3, 2, 6, 3, 7);
  return __builtin_shufflevector(low, high, 0, 1, 4, 5) + __builtin_shufflevector(low, high, 2, 3, 6, 7);
}

inline float Dot(const float* a, const float* b, int64_t n) {
  Vec sum = {};
  ForVectors(n, [&](int64_t j, int64_t lanes, auto partial) {
    constexpr bool kPartial = decltype(partial)::value;
    sum += LoadLanes<kPartial>(a + j, lanes) * LoadLanes<kPartial>(b + j, lanes);
  });
  return Sum(sum);
}

// exp(x) for x <= 0, to about 1 ulp; 0 where x < -87; NaN stays NaN.
// x = n ln2 + r with |r| <= ln2 / 2, and exp(r) by its Taylor polynomial: the rest is below r^8 / 8! < 6e-9.
inline Vec ExpOfNegative(Vec x) {
  constexpr float kLog2E = 1.44269504088896341f;
  constexpr float kLn2High = 0.693359375f;  // 9 bits: n * kLn2High is exact.
  constexpr float kLn2Low = -2.12194440054690583e-4f;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits.
  const Vec clamped = x < -87.0f ? Broadcast(-87.0f) : x;
  const Vec shifted = clamped * kLog2E + kRound;
  const Vec n = shifted - kRound;
  const Vec r = (clamped - n * kLn2High) - n * kLn2Low;
  Vec p = r * (1.0f / 5040) + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const IntVec exponent = reinterpret_cast<IntVec>(shifted) - reinterpret_cast<IntVec>(Broadcast(kRound));
  const Vec power = reinterpret_cast<Vec>((exponent + 127) << 23);
  return x < -87.0f ? Vec{} : p * power;
}

// 1 / (1 + exp(-x)), through exp(-|x|) so that nothing overflows and small results keep their digits.
inline Vec Sigmoid(Vec x) {
  const Vec e = ExpOfNegative(x > 0.0f ? -x : x);
  return (x > 0.0f ? Broadcast(1.0f) : e) / (e + 1.0f);
}

// ---- Delta rule. Equations, tiling, floor and measurements: delta_rule.cc.

// The largest number of vectors that a strip of columns is wide. A strip of up to kScratchFloats is kept in
// one block of memory while its row is worked through: the rows of a wide state are far apart and share few
// sets of the L1 cache.
constexpr int kStripVectors = 2;
constexpr int64_t kScratchFloats = 8192;
// Whether tokens are taken in pairs. AVX-512 is slowed down by storing the state at every token, narrower
// vectors are not.
constexpr bool kInPairs = kLanes == 16;

// Rows of S, `stride` floats apart.
struct StateRows {
  float* rows;
  int64_t stride;
};

// A strip of S, kVectors vectors wide (or, with kPartial, the `lanes` first lanes of one) and K rows high, on
// its way through the tokens of a span.
template <int kVectors, bool kPartial>
class Strip {
  static_assert(!kPartial || kVectors == 1);

 public:
  // The columns of `span` from `column` on.
  Strip(const DeltaRuleSpan& span, int64_t column, int64_t lanes)
      : span_(span), column_(column), lanes_(lanes), work_{span.work + column, span.state_stride} {}

  // True if the new state is not finite.
  bool Run() {
    alignas(64) float scratch[kScratchFloats];
    home_ = span_.key_dim * kWidth <= kScratchFloats ? StateRows{scratch, kWidth} : work_;
    Vec check = {};
    if (span_.base != nullptr) {
      // Written through only where it is `work`.
      state_ = {const_cast<float*>(span_.base) + column_, span_.state_stride};
    } else {
      Copy({nullptr, 0}, home_);
      state_ = home_;
    }
    for (int64_t begin = 0; begin < span_.tokens;) {
      const bool paired = IsPair(begin);
      int64_t end = begin;
      while (end < span_.tokens && IsPair(end) == paired) end += 2;
      end = end < span_.tokens ? end : span_.tokens;
      check = paired ? RunInPairs(begin, end) : RunSingly(begin, end);
      begin = end;
    }
    if (state_.rows != work_.rows || span_.tokens == 0) check = Copy(state_, work_);
    return Sum(check) != 0;
  }

 private:
  static constexpr int64_t kWidth = kVectors * kLanes;
  // Partial sums a column: consecutive rows of S go to different ones, so that no addition waits for the one
  // before.
  static constexpr int kSums = 2;

  const float* Q(int64_t t) const { return span_.q + t * span_.token_stride; }
  const float* K(int64_t t) const { return span_.k + t * span_.token_stride; }
  float Beta(int64_t t) const { return span_.beta[t * span_.token_stride]; }
  Vec V(int64_t t, int c) const {
    return LoadLanes<kPartial>(span_.v + t * span_.token_stride + column_ + c * kLanes, lanes_);
  }
  void Out(int64_t t, int c, Vec o) const {
    StoreLanes<kPartial>(span_.scale * o, span_.out + t * span_.out_stride + column_ + c * kLanes, lanes_);
  }
  Vec LoadState(StateRows from, int64_t i, int c) const {
    return LoadLanes<kPartial>(from.rows + i * from.stride + c * kLanes, lanes_);
  }
  void StoreState(Vec s, StateRows to, int64_t i, int c) const {
    StoreLanes<kPartial>(s, to.rows + i * to.stride + c * kLanes, lanes_);
  }
  // Whether tokens t and t + 1 (t is even) are taken together: by themselves and their place alone, so that
  // it does not matter where a row is cut, if at an even token.
  bool IsPair(int64_t t) const {
    return kInPairs && t + 1 < span_.tokens && Beta(t) != 0 && Beta(t + 1) != 0;
  }
  // Where the state goes with the last token before `end`.
  StateRows Target(int64_t end) const { return end == span_.tokens ? work_ : home_; }

  // Copies rows (zero, if there are none); zero, or NaN where they are not finite.
  Vec Copy(StateRows from, StateRows to) const {
    Vec check = {};
    for (int64_t i = 0; i < span_.key_dim; ++i) {
      for (int c = 0; c < kVectors; ++c) {
        const Vec s = from.rows != nullptr ? LoadState(from, i, c) : Vec{};
        StoreState(s, to, i, c);
        check += s * 0.0f;
      }
    }
    return check;
  }

  // One walk over the rows of S, from state_ to `to`, which does up to three things to each while it is in a
  // register:
  //   kUpdate: S_i += k_i u;   kRead: o += S_i q_i;   kRecall: p += S_i k'_i  (k' is the next token's key).
  // Without kRecall returns zero, or NaN where S is not finite.
  template <bool kUpdate, bool kRead, bool kRecall>
  inline __attribute__((always_inline)) Vec Walk(StateRows to, const float* k, const Vec* u, const float* q,
                                                 Vec* o, const float* next_k, Vec* p) {
    const StateRows from = state_;
    Vec o_sums[kSums][kVectors] = {}, p_sums[kSums][kVectors] = {}, check = {};
    const auto row = [&](int64_t i, int sum) __attribute__((always_inline)) {
      // Read before anything is stored: for all the compiler knows, the stores could change them.
      Vec k_i, q_i, next_k_i;
      if constexpr (kUpdate) k_i = Broadcast(k[i]);
      if constexpr (kRead) q_i = Broadcast(q[i]);
      if constexpr (kRecall) next_k_i = Broadcast(next_k[i]);
      for (int c = 0; c < kVectors; ++c) {
        Vec s = LoadState(from, i, c);
        if constexpr (kUpdate) {
          s += k_i * u[c];
          StoreState(s, to, i, c);
        }
        if constexpr (kRead) o_sums[sum][c] += q_i * s;
        if constexpr (kRecall) p_sums[sum][c] += next_k_i * s;
        if constexpr (!kRecall) check += s * 0.0f;
      }
    };
    int64_t i = 0;
    for (; i + kSums <= span_.key_dim; i += kSums) {
      for (int sum = 0; sum < kSums; ++sum) row(i + sum, sum);
    }
    if (i < span_.key_dim) row(i, 0);
    for (int c = 0; c < kVectors; ++c) {
      if constexpr (kRead) o[c] = o_sums[0][c] + o_sums[1][c];
      if constexpr (kRecall) p[c] = p_sums[0][c] + p_sums[1][c];
    }
    if constexpr (kUpdate) state_ = to;
    return check;
  }

  // Tokens begin ... end-1, at least one, by a walk each (and one before). Leaves where beta is zero every
  // bit of S as it was. Returns the last walk's check.
  Vec RunSingly(int64_t begin, int64_t end) {
    Vec p[kVectors], u[kVectors], o[kVectors], check = {};
    Walk<false, false, true>(state_, nullptr, nullptr, nullptr, nullptr, K(begin), p);
    for (int64_t t = begin; t < end; ++t) {
      const float beta = Beta(t);
      for (int c = 0; c < kVectors; ++c) u[c] = beta * (V(t, c) - p[c]);
      if (t + 1 < end) {
        if (beta != 0) {
          Walk<true, true, true>(home_, K(t), u, Q(t), o, K(t + 1), p);
        } else {
          Walk<false, true, true>(state_, nullptr, nullptr, Q(t), o, K(t + 1), p);
        }
      } else if (beta != 0) {
        check = Walk<true, true, false>(Target(end), K(t), u, Q(t), o, nullptr, nullptr);
      } else {
        check = Walk<false, true, false>(state_, nullptr, nullptr, Q(t), o, nullptr, nullptr);
      }
      for (int c = 0; c < kVectors; ++c) Out(t, c, o[c]);
    }
    return check;
  }

  // A walk for a pair of tokens:  kUpdate: S_i += k0_i u0 + k1_i u1;   kRecall: p += S_i k'_i and r += S_i
  // q'_i for the two tokens from `next` on. Without kRecall returns zero, or NaN where S is not finite.
  template <bool kUpdate, bool kRecall>
  inline __attribute__((always_inline)) Vec PairWalk(StateRows to, int64_t pair, const Vec (*u)[kVectors],
                                                     int64_t next, Vec (*p)[kVectors], Vec (*r)[kVectors]) {
    const StateRows from = state_;
    const float* const k0 = K(pair);
    const float* const k1 = K(pair + 1);
    const float* const next_k0 = K(next);
    const float* const next_k1 = K(next + 1);
    const float* const next_q0 = Q(next);
    const float* const next_q1 = Q(next + 1);
    Vec p0[kVectors] = {}, p1[kVectors] = {}, r0[kVectors] = {}, r1[kVectors] = {}, check = {};
    for (int64_t i = 0; i < span_.key_dim; ++i) {
      Vec s[kVectors];
      for (int c = 0; c < kVectors; ++c) {
        s[c] = LoadState(from, i, c);
        if constexpr (kUpdate) s[c] += k0[i] * u[0][c];
        if constexpr (kUpdate) s[c] += k1[i] * u[1][c];
        if constexpr (kRecall) {
          p0[c] += next_k0[i] * s[c];
          p1[c] += next_k1[i] * s[c];
          r0[c] += next_q0[i] * s[c];
          r1[c] += next_q1[i] * s[c];
        } else {
          check += s[c] * 0.0f;
        }
      }
      for (int c = 0; kUpdate && c < kVectors; ++c) StoreState(s[c], to, i, c);
    }
    for (int c = 0; kRecall && c < kVectors; ++c) {
      p[0][c] = p0[c];
      p[1][c] = p1[c];
      r[0][c] = r0[c];
      r[1][c] = r1[c];
    }
    if constexpr (kUpdate) state_ = to;
    return check;
  }

  // Tokens begin ... end-1, an even number of them, at least two, by a walk for every two (and one before):
  // the chunkwise form with chunks of two. Returns the last walk's check.
  Vec RunInPairs(int64_t begin, int64_t end) {
    Vec p[2][kVectors], r[2][kVectors], u[2][kVectors] = {};
    PairWalk<false, true>(state_, begin, nullptr, begin, p, r);
    for (int64_t t = begin; t < end; t += 2) {
      const float beta0 = Beta(t), beta1 = Beta(t + 1);
      const float k0_k1 = Dot(K(t), K(t + 1), span_.key_dim);
      const float k0_q0 = Dot(K(t), Q(t), span_.key_dim);
      const float k0_q1 = Dot(K(t), Q(t + 1), span_.key_dim);
      const float k1_q1 = Dot(K(t + 1), Q(t + 1), span_.key_dim);
      for (int c = 0; c < kVectors; ++c) {
        u[0][c] = beta0 * (V(t, c) - p[0][c]);
        u[1][c] = beta1 * (V(t + 1, c) - (p[1][c] + k0_k1 * u[0][c]));
        Out(t, c, r[0][c] + k0_q0 * u[0][c]);
        Out(t + 1, c, (r[1][c] + k0_q1 * u[0][c]) + k1_q1 * u[1][c]);
      }
      if (t + 2 < end) PairWalk<true, true>(home_, t, u, t + 2, p, r);
    }
    return PairWalk<true, false>(Target(end), end - 2, u, end - 2, nullptr, nullptr);
  }

  const DeltaRuleSpan& span_;
  const int64_t column_;
  const int64_t lanes_;
  const StateRows work_;
  StateRows home_;   // Where the state is between the first token and the last.
  StateRows state_;  // Where it is now.
};

// Runs strips of kVectors vectors, as long as they fit, from *column on.
template <int kVectors>
bool RunStrips(const DeltaRuleSpan& span, int64_t* column) {
  bool nonfinite = false;
  for (; *column + kVectors * kLanes <= span.columns; *column += kVectors * kLanes) {
    nonfinite |= Strip<kVectors, false>(span, *column, kLanes).Run();
  }
  return nonfinite;
}

bool DeltaRule(const DeltaRuleSpan& span) {
  bool nonfinite = false;
  int64_t column = 0;
  nonfinite |= RunStrips<kStripVectors>(span, &column);
  nonfinite |= RunStrips<1>(span, &column);
  if (column < span.columns) {
    nonfinite |= Strip<1, true>(span, column, span.columns - column).Run();
  }
  return nonfinite;
}

// ---- The front of the mixer.

constexpr float kNormEpsilon = 1e-6f;  // What q and k are divided by: their norm plus this.

template <bool kSilu>
inline Vec Activate(Vec x) {
  if constexpr (kSilu) return x * Sigmoid(x);
  return x < 0.0f ? Vec{} : x;  // NaN stays NaN.
}

template <bool kSilu>
void QkvActivationOf(const QkvSpan& span) {
  const int64_t qk = 2 * span.heads * span.key_dim, v = span.heads * span.value_dim;
  for (int64_t t = 0; t < span.tokens; ++t) {
    float* const z = span.z + t * span.z_stride;
    for (const float* tap_bias : span.tap_bias) {
      if (tap_bias == nullptr) continue;
      for (int64_t j = 0; j < qk + v; ++j) z[j] -= tap_bias[j];
    }
    for (int64_t head = 0; head < 2 * span.heads; ++head) {
      float* const x = z + head * span.key_dim;
      const float* const bias = span.bias + head * span.key_dim;
      Vec squares = {};
      ForVectors(span.key_dim, [&](int64_t j, int64_t lanes, auto partial) {
        constexpr bool kPartial = decltype(partial)::value;
        const Vec y =
            Activate<kSilu>(LoadLanes<kPartial>(x + j, lanes) + LoadLanes<kPartial>(bias + j, lanes));
        StoreLanes<kPartial>(y, x + j, lanes);
        squares += y * y;
      });
      const float inverse = 1.0f / (__builtin_sqrtf(Sum(squares)) + kNormEpsilon);
      ForVectors(span.key_dim, [&](int64_t j, int64_t lanes, auto partial) {
        constexpr bool kPartial = decltype(partial)::value;
        StoreLanes<kPartial>(LoadLanes<kPartial>(x + j, lanes) * inverse, x + j, lanes);
      });
    }
    ForVectors(v, [&](int64_t j, int64_t lanes, auto partial) {
      constexpr bool kPartial = decltype(partial)::value;
      float* const x = z + qk + j;
      const Vec bias = LoadLanes<kPartial>(span.bias + qk + j, lanes);
      StoreLanes<kPartial>(Activate<kSilu>(LoadLanes<kPartial>(x, lanes) + bias), x, lanes);
    });
    ForVectors(span.heads, [&](int64_t j, int64_t lanes, auto partial) {
      constexpr bool kPartial = decltype(partial)::value;
      float* const x = z + qk + v + j;
      const Vec bias = LoadLanes<kPartial>(span.bias + qk + v + j, lanes);
      const Vec beta = span.has_position ? Sigmoid(LoadLanes<kPartial>(x, lanes) + bias) : Vec{};
      StoreLanes<kPartial>(beta, x, lanes);
    });
  }
}

void QkvActivation(const QkvSpan& span) {
  span.silu ? QkvActivationOf<true>(span) : QkvActivationOf<false>(span);
}

// ---- Short convolutions.

template <SpanActivation kActivation>
inline Vec ActivateHead(Vec x) {
  switch (kActivation) {
    case SpanActivation::kSilu:
      return x * Sigmoid(x);
    case SpanActivation::kRelu:
      return x < 0.0f ? Vec{} : x;  // NaN stays NaN, here and below.
    case SpanActivation::kEluPlusOne:
      return x > 0.0f ? x + 1.0f : ExpOfNegative(x > 0.0f ? Vec{} : x);
    case SpanActivation::kIdentity:
      break;
  }
  return x;
}

// The inputs of a token that are there, and the weights of their taps, oldest first.
struct Taps {
  int64_t count = 0;
  const float* input[8];
  const float* weight[8];

  Taps(const ShortConvSpan& span, int64_t token) {
    for (int64_t j = 0; j < span.taps; ++j) {
      const int64_t i = token + span.before - (span.taps - 1) + j;  // In the row.
      if (i < 0 && span.tail == nullptr) continue;
      input[count] =
          i >= 0 ? span.z + (i - span.before) * span.z_stride : span.tail + (i + span.taps - 1) * span.width;
      weight[count++] = span.weight + j * span.width;
    }
  }
};

// A token's outputs are stored as they come and normed where they are, in the L1. Inputs are read once a tap,
// from the L1 too: computing an activation takes longer than loading what goes into it.
template <SpanActivation kActivation>
void ShortConvOf(const ShortConvSpan& span) {
  for (int64_t t = 0; t < span.tokens; ++t) {
    const float* const z = span.z + t * span.z_stride;
    float* const out = span.out + t * span.out_stride;
    const Taps taps(span, t);
    Vec sum = {};
    ForVectors(span.channels, [&](int64_t c, int64_t lanes, auto partial) {
      constexpr bool kPartial = decltype(partial)::value;
      Vec y = {};
      if (span.taps == 0) y = LoadLanes<kPartial>(z + c, lanes);
      if (span.bias != nullptr) y += LoadLanes<kPartial>(span.bias + c, lanes);
      for (int64_t j = 0; j < taps.count; ++j) {
        y += LoadLanes<kPartial>(taps.weight[j] + c, lanes) * LoadLanes<kPartial>(taps.input[j] + c, lanes);
      }
      y = ActivateHead<kActivation>(y);
      StoreLanes<kPartial>(y, out + c, lanes);
      if constexpr (kPartial) y = LoadPartial(out + c, lanes);  // Other lanes may not be zero: exp(0) is 1.
      sum += span.norm == SpanNorm::kL2 ? y * y : y;
    });
    if (span.norm == SpanNorm::kNone) continue;
    const float total = Sum(sum);
    const float inverse = 1.0f / __builtin_sqrtf(total + 1e-6f);
    ForVectors(span.channels, [&](int64_t c, int64_t lanes, auto partial) {
      constexpr bool kPartial = decltype(partial)::value;
      const Vec y = LoadLanes<kPartial>(out + c, lanes);
      StoreLanes<kPartial>(span.norm == SpanNorm::kL2 ? y * inverse : y / total, out + c, lanes);
    });
  }
}

void ShortConv(const ShortConvSpan& span) {
  switch (span.activation) {
    case SpanActivation::kSilu:
      return ShortConvOf<SpanActivation::kSilu>(span);
    case SpanActivation::kRelu:
      return ShortConvOf<SpanActivation::kRelu>(span);
    case SpanActivation::kEluPlusOne:
      return ShortConvOf<SpanActivation::kEluPlusOne>(span);
    case SpanActivation::kIdentity:
      return ShortConvOf<SpanActivation::kIdentity>(span);
  }
}

void ScaledSigmoid(int64_t width, float scale, const float* x, float* y) {
  ForVectors(width, [&](int64_t j, int64_t lanes, auto partial) {
    constexpr bool kPartial = decltype(partial)::value;
    StoreLanes<kPartial>(Sigmoid(LoadLanes<kPartial>(x + j, lanes)) * scale, y + j, lanes);
  });
}

// ---- Norm and gate.

void AddRmsNorm(int64_t width, float after, float inside, const float* x, const float* bias,
                float* sum, const float* scale, float* normed) {
  const auto sum_at = [&](int64_t j, int64_t lanes, auto partial) {
    constexpr bool kPartial = decltype(partial)::value;
    Vec s = LoadLanes<kPartial>(x + j, lanes);
    if (bias != nullptr) s += LoadLanes<kPartial>(bias + j, lanes);
    return s;
  };
  Vec squares = {};
  ForVectors(width, [&](int64_t j, int64_t lanes, auto partial) {
    const Vec s = sum_at(j, lanes, partial);
    if (sum != nullptr) StoreLanes<decltype(partial)::value>(s, sum + j, lanes);
    squares += s * s;
  });
  if (scale == nullptr) return;
  const float rms = __builtin_sqrtf(Sum(squares) / static_cast<float>(width) + inside);
  const float inverse = 1.0f / (rms + after);
  ForVectors(width, [&](int64_t j, int64_t lanes, auto partial) {
    constexpr bool kPartial = decltype(partial)::value;
    // `sum` may have replaced x.
    const Vec s = sum != nullptr ? LoadLanes<kPartial>(sum + j, lanes) : sum_at(j, lanes, partial);
    StoreLanes<kPartial>(s * inverse * LoadLanes<kPartial>(scale + j, lanes), normed + j, lanes);
  });
}

void GatedUnit(int64_t width, bool silu_first, const float* x, const float* bias, float* out) {
  ForVectors(width, [&](int64_t j, int64_t lanes, auto partial) {
    constexpr bool kPartial = decltype(partial)::value;
    Vec first = LoadLanes<kPartial>(x + j, lanes), second = LoadLanes<kPartial>(x + width + j, lanes);
    if (bias != nullptr) {
      first += LoadLanes<kPartial>(bias + j, lanes);
      second += LoadLanes<kPartial>(bias + width + j, lanes);
    }
    const Vec gate = Sigmoid(silu_first ? first : second);
    StoreLanes<kPartial>(silu_first ? first * gate * second : first * gate, out + j, lanes);
  });
}

void SiluGate(int64_t width, const float* gate, float* x) {
  ForVectors(width, [&](int64_t j, int64_t lanes, auto partial) {
    constexpr bool kPartial = decltype(partial)::value;
    const Vec g = LoadLanes<kPartial>(gate + j, lanes);
    StoreLanes<kPartial>(LoadLanes<kPartial>(x + j, lanes) * (g * Sigmoid(g)), x + j, lanes);
  });
}

// ---- Readout.

// Sums or maxima in the making: no step waits for the one before, and of a sum each adds up a quarter.
constexpr int kChains = 4;

float Largest(int64_t width, const float* x) {
  Vec max[kChains], check = {};
  for (Vec& m : max) m = Broadcast(x[0]);
  int64_t j = 0;
  for (; j + kChains * kLanes <= width; j += kChains * kLanes) {
    for (int c = 0; c < kChains; ++c) {
      const Vec values = Load(x + j + c * kLanes);
      max[c] = values > max[c] ? values : max[c];
      check += values * 0.0f;
    }
  }
  float largest = x[0], rest_check = 0;
  for (; j < width; ++j) {
    largest = x[j] > largest ? x[j] : largest;
    rest_check += x[j] * 0.0f;
  }
  for (const Vec& m : max) {
    for (int lane = 0; lane < kLanes; ++lane) largest = m[lane] > largest ? m[lane] : largest;
  }
  return largest + (Sum(check) + rest_check);
}

float SumOfExp(int64_t width, const float* x, float max, float factor, float* terms) {
  Vec sums[kChains] = {};
  int64_t j = 0;
  for (; j + kChains * kLanes <= width; j += kChains * kLanes) {
    for (int c = 0; c < kChains; ++c) {
      const Vec term = ExpOfNegative((Load(x + j + c * kLanes) - max) * factor);
      if (terms != nullptr) Store(term, terms + j + c * kLanes);
      sums[c] += term;
    }
  }
  ForVectors(width - j, [&](int64_t i, int64_t lanes, auto partial) {
    constexpr bool kPartial = decltype(partial)::value;
    Vec term = ExpOfNegative((LoadLanes<kPartial>(x + j + i, lanes) - max) * factor);
    if (terms != nullptr) StoreLanes<kPartial>(term, terms + j + i, lanes);
    if constexpr (kPartial) {
      float own[kLanes];
      StorePartial(term, own, lanes);
      term = LoadPartial(own, lanes);  // What is beyond counts as zero.
    }
    sums[0] += term;
  });
  return Sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// ---- Products whose bits do not depend on the number of rows. Tiling and measurements: gemm.cc.

// A tile's sums, its rows' operands and one column's are in registers: 16 with AVX2, 32 with AVX-512.
constexpr int kTileRows = kLanes == 16 ? 6 : 3;
constexpr int kTileColumns = 4;

// sums += a b of lanes l to l + lanes - 1.
template <bool kPartial, int kRows, int kColumns>
inline __attribute__((always_inline)) void ProductStep(const ProductSpan& span, const float* a_rows,
                                                       const float* b_rows, int64_t l, int64_t lanes,
                                                       Vec (&sums)[kRows][kColumns]) {
  Vec a[kRows];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) a[r] = LoadLanes<kPartial>(a_rows + r * span.lda + l, lanes);
#pragma GCC unroll 8
  for (int c = 0; c < kColumns; ++c) {
    const Vec b = LoadLanes<kPartial>(b_rows + c * span.ldb + l, lanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) sums[r][c] += a[r] * b;
  }
}

template <int kRows, int kColumns>
inline void ProductTile(const ProductSpan& span, int64_t i, int64_t j) {
  const float* const a = span.a + i * span.lda;
  const float* const b = span.b + j * span.ldb;
  Vec sums[kRows][kColumns];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < kColumns; ++c) sums[r][c] = Vec{};
  }
  int64_t l = 0;
  for (; l + kLanes <= span.k; l += kLanes) ProductStep<false>(span, a, b, l, kLanes, sums);
  if (l < span.k) ProductStep<true>(span, a, b, l, span.k - l, sums);
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    float* const c = span.c + (i + r) * span.ldc + j;
    if constexpr (kColumns == 4) {
      Quad quad = SumsOfFour(sums[r][0], sums[r][1], sums[r][2], sums[r][3]);
      if (span.accumulate) {
        Quad before;
        __builtin_memcpy(&before, c, sizeof(before));
        quad += before;
      }
      __builtin_memcpy(c, &quad, sizeof(quad));
    } else {
      for (int column = 0; column < kColumns; ++column) {
        const float sum = Sum(sums[r][column]);
        c[column] = span.accumulate ? c[column] + sum : sum;
      }
    }
  }
}

// Rows from `i` on, in tiles of kRows and then of fewer.
template <int kRows, int kColumns>
void ProductColumns(const ProductSpan& span, int64_t i, int64_t j) {
  for (; i + kRows <= span.m; i += kRows) ProductTile<kRows, kColumns>(span, i, j);
  if constexpr (kRows > 1) ProductColumns<kRows - 1, kColumns>(span, i, j);
}

void Product(const ProductSpan& span) {
  int64_t j = 0;
  for (; j + kTileColumns <= span.n; j += kTileColumns) ProductColumns<kTileRows, kTileColumns>(span, 0, j);
  for (; j < span.n; ++j) ProductColumns<kTileRows, 1>(span, 0, j);
}

}  // namespace

#define DELTANET_CONCAT_INNER(a, b) a##b
#define DELTANET_CONCAT(a, b) DELTANET_CONCAT_INNER(a, b)
#define DELTANET_STRING_INNER(a) #a
#define DELTANET_STRING(a) DELTANET_STRING_INNER(a)

extern "C" {
extern const CpuKernels DELTANET_CONCAT(deltanet_cpu_kernels_, DELTANET_CPU_ISA);
const CpuKernels DELTANET_CONCAT(deltanet_cpu_kernels_, DELTANET_CPU_ISA) = {
    DELTANET_STRING(DELTANET_CPU_ISA),
    kStripVectors* kLanes,
    DeltaRule,
    QkvActivation,
    AddRmsNorm,
    GatedUnit,
    SiluGate,
    ShortConv,
    ScaledSigmoid,
    Largest,
    SumOfExp,
    Product,
};
}

}  // namespace deltanet
