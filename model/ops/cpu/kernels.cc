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

inline float Sum(Vec x) {
  float sum = 0;
  for (int lane = 0; lane < kLanes; ++lane) sum += x[lane];
  return sum;
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

// ---- Delta rule. Equations, tiling and floor: delta_rule.cc.

// The largest number of vectors that a strip of columns is wide.
constexpr int kStripVectors = 2;
// Partial sums a column: consecutive rows of S go to different ones, so that no addition waits for the one
// before.
constexpr int kSums = 2;

// A strip of S: kVectors vectors wide (or, with kPartial, the `lanes` first lanes of one), K rows high.
template <int kVectors, bool kPartial>
struct Strip {
  static_assert(!kPartial || kVectors == 1);

  int64_t key_dim;
  int64_t stride;
  int64_t lanes;

  // One walk over the rows of S, which does up to three things to each while it is in a register:
  //   kUpdate: S_i += k_i u;   kRead: o += S_i q_i;   kRecall: p += S_i k'_i  (k' is the next token's key).
  // The last walk of a span (kRead without kRecall) returns zero, or NaN where S is not finite.
  template <bool kUpdate, bool kRead, bool kRecall>
  inline __attribute__((always_inline)) Vec Walk(const float* from, float* to, const float* k, const Vec* u,
                                                 const float* q, Vec* o, const float* next_k, Vec* p) const {
    Vec o_sums[kSums][kVectors] = {};
    Vec p_sums[kSums][kVectors] = {};
    Vec check = {};
    const auto row = [&](int64_t i, int sum) __attribute__((always_inline)) {
      for (int c = 0; c < kVectors; ++c) {
        Vec s = LoadLanes<kPartial>(from + i * stride + c * kLanes, lanes);
        if constexpr (kUpdate) {
          s += k[i] * u[c];
          StoreLanes<kPartial>(s, to + i * stride + c * kLanes, lanes);
        }
        if constexpr (kRead) o_sums[sum][c] += q[i] * s;
        if constexpr (kRecall) p_sums[sum][c] += next_k[i] * s;
        if constexpr (kRead && !kRecall) check += s * 0.0f;
      }
    };
    int64_t i = 0;
    for (; i + kSums <= key_dim; i += kSums) {
      for (int sum = 0; sum < kSums; ++sum) row(i + sum, sum);
    }
    for (; i < key_dim; ++i) row(i, 0);
    for (int c = 0; c < kVectors; ++c) {
      if constexpr (kRead) o[c] = o_sums[0][c] + o_sums[1][c];
      if constexpr (kRecall) p[c] = p_sums[0][c] + p_sums[1][c];
    }
    return check;
  }

  // Copies base (or zero) to work; zero, or NaN where it is not finite.
  Vec Copy(const float* base, float* work) const {
    Vec check = {};
    for (int64_t i = 0; i < key_dim; ++i) {
      for (int c = 0; c < kVectors; ++c) {
        const int64_t at = i * stride + c * kLanes;
        const Vec s = base != nullptr ? LoadLanes<kPartial>(base + at, lanes) : Vec{};
        StoreLanes<kPartial>(s, work + at, lanes);
        check += s * 0.0f;
      }
    }
    return check;
  }

  // The columns of `span` from `column` on.
  bool Run(const DeltaRuleSpan& span, int64_t column) const {
    const float* state = span.base != nullptr ? span.base + column : nullptr;
    float* const work = span.work + column;
    Vec check = {};
    if (state == nullptr || span.tokens == 0) {
      check = Copy(state, work);
      state = work;
    }
    Vec p[kVectors], u[kVectors], o[kVectors];
    if (span.base == nullptr) {
      for (Vec& recalled : p) recalled = Vec{};
    } else if (span.tokens > 0) {
      Walk<false, false, true>(state, work, nullptr, nullptr, nullptr, nullptr, span.k, p);
    }
    for (int64_t t = 0; t < span.tokens; ++t) {
      const float* q = span.q + t * span.token_stride;
      const float* k = span.k + t * span.token_stride;
      const float* v = span.v + t * span.token_stride + column;
      const float beta = span.beta[t * span.token_stride];
      for (int c = 0; c < kVectors; ++c) {
        u[c] = beta * (LoadLanes<kPartial>(v + c * kLanes, lanes) - p[c]);
      }
      const bool last = t + 1 == span.tokens;
      const float* next_k = k + span.token_stride;
      if (beta != 0) {
        if (last) {
          check = Walk<true, true, false>(state, work, k, u, q, o, nullptr, nullptr);
        } else {
          Walk<true, true, true>(state, work, k, u, q, o, next_k, p);
        }
        state = work;
      } else {  // Nothing is written, so that not even the sign of a zero changes.
        if (last && state != work) {
          Copy(state, work);
          state = work;
        }
        if (last) {
          check = Walk<false, true, false>(state, work, k, u, q, o, nullptr, nullptr);
        } else {
          Walk<false, true, true>(state, work, k, u, q, o, next_k, p);
        }
      }
      float* out = span.out + t * span.out_stride + column;
      for (int c = 0; c < kVectors; ++c) StoreLanes<kPartial>(span.scale * o[c], out + c * kLanes, lanes);
    }
    return Sum(check) != 0;
  }
};

bool DeltaRule(const DeltaRuleSpan& span) {
  bool nonfinite = false;
  int64_t column = 0;
  for (; column + kStripVectors * kLanes <= span.columns; column += kStripVectors * kLanes) {
    nonfinite |= Strip<kStripVectors, false>{span.key_dim, span.state_stride, kLanes}.Run(span, column);
  }
  for (; column + kLanes <= span.columns; column += kLanes) {
    nonfinite |= Strip<1, false>{span.key_dim, span.state_stride, kLanes}.Run(span, column);
  }
  if (column < span.columns) {
    nonfinite |= Strip<1, true>{span.key_dim, span.state_stride, span.columns - column}.Run(span, column);
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

// ---- Norm and gate.

void AddRmsNorm(int64_t width, float epsilon, const float* x, const float* delta, const float* bias,
                float* sum, const float* scale, float* normed) {
  const auto sum_at = [&](int64_t j, int64_t lanes, auto partial) {
    constexpr bool kPartial = decltype(partial)::value;
    Vec s = LoadLanes<kPartial>(x + j, lanes);
    if (delta != nullptr) s += LoadLanes<kPartial>(delta + j, lanes);
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
  const float rms = __builtin_sqrtf(Sum(squares) / static_cast<float>(width));
  const float inverse = 1.0f / (rms + epsilon);
  ForVectors(width, [&](int64_t j, int64_t lanes, auto partial) {
    constexpr bool kPartial = decltype(partial)::value;
    // `sum` may have replaced x or delta.
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

}  // namespace

#define DELTANET_CONCAT_INNER(a, b) a##b
#define DELTANET_CONCAT(a, b) DELTANET_CONCAT_INNER(a, b)
#define DELTANET_STRING_INNER(a) #a
#define DELTANET_STRING(a) DELTANET_STRING_INNER(a)

extern "C" {
extern const CpuKernels DELTANET_CONCAT(deltanet_cpu_kernels_, DELTANET_CPU_ISA);
const CpuKernels DELTANET_CONCAT(deltanet_cpu_kernels_, DELTANET_CPU_ISA) = {
    DELTANET_STRING(DELTANET_CPU_ISA), kStripVectors* kLanes, DeltaRule, QkvActivation, AddRmsNorm, GatedUnit,
};
}

}  // namespace deltanet
