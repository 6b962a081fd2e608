// The definitions of norms and gates, and steps of AddRmsNorm (with any of its parts), SiluGate and Embed.
#ifndef DELTANET_TESTS_MODEL_OPS_NORM_ELEMENTWISE_PROBLEM_H_
#define DELTANET_TESTS_MODEL_OPS_NORM_ELEMENTWISE_PROBLEM_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "model/ops/elementwise.h"
#include "model/ops/rms_norm.h"
#include "tests/model/ops/op_test_util.h"

namespace deltanet {

template <typename T>
std::vector<T> RmsNormReference(const std::vector<T>& x, int64_t rows, int64_t width, const float* scale,
                                const RmsEpsilon& epsilon = {}) {
  std::vector<T> normed(rows * width);
  for (int64_t n = 0; n < rows; ++n) {
    T squares = 0;
    for (int64_t j = 0; j < width; ++j) squares += x[n * width + j] * x[n * width + j];
    const T rms = std::sqrt(squares / static_cast<T>(width) + static_cast<T>(epsilon.inside));
    for (int64_t j = 0; j < width; ++j) {
      normed[n * width + j] = x[n * width + j] / (rms + static_cast<T>(epsilon.after)) * scale[j];
    }
  }
  return normed;
}

// Seven rows of `width`; bits of `parts`: 1 gathered, 2 with delta, 4 with bias, 8 sum wanted, 16 the epsilon
// inside (and large enough to be seen).
struct NormProblem {
  static constexpr int64_t kRows = 7, kSourceRows = 9;
  static constexpr int kPartsEnd = 32;

  NormProblem(int64_t width, int parts, DType delta_dtype = DType::kFloat32,
              DType normed_dtype = DType::kFloat32, DType x_dtype = DType::kFloat32)
      : width(width),
        x(Rounded(RandomNormal(kSourceRows * width, 1), x_dtype)),
        delta(Rounded(RandomNormal(kSourceRows * width, 2), delta_dtype)),
        bias(RandomNormal(width, 3)),
        scale(RandomNormal(width, 4)),
        sum(kRows * width),
        normed(kRows * width) {
    args = {.rows = kRows,
            .width = width,
            .x_dtype = x_dtype,
            .x = x.data(),
            .delta_dtype = delta_dtype,
            .scale = scale.data()};
    if (parts & 1) args.gather = gather.data();
    if (parts & 2) args.delta = delta.data();
    if (parts & 4) args.bias = bias.data();
    if (parts & 8) args.sum = sum.data();
    if (parts & 16) args.epsilon = {.after = 0.0f, .inside = 0.125f};
    args.normed_dtype = normed_dtype;
    args.normed = normed.data();
  }

  // Holds sum and normed, after the operator ran, to the bound.
  void Compare() {
    std::vector<float> plain(kRows * width);
    std::vector<double> exact(kRows * width);
    for (int64_t n = 0; n < kRows; ++n) {
      for (int64_t j = 0; j < width; ++j) {
        const int64_t from = (args.gather != nullptr ? gather[n] : n) * width + j, to = n * width + j;
        exact[to] = x[from];
        plain[to] = x[from];
        if (args.delta != nullptr) exact[to] += delta[from], plain[to] += delta[from];
        if (args.bias != nullptr) exact[to] += bias[j], plain[to] += bias[j];
      }
    }
    if (args.sum != nullptr) {
      ExpectAsGoodAsPlain(sum.data(), plain.data(), exact.data(), kRows * width, "sum");
    }
    ExpectAsGoodAsPlain(normed.data(),
                        RmsNormReference(plain, kRows, width, scale.data(), args.epsilon).data(),
                        RmsNormReference(exact, kRows, width, scale.data(), args.epsilon).data(),
                        kRows * width, "normed", args.normed_dtype);
    EXPECT_TRUE(sum.GuardsIntact() && normed.GuardsIntact());
  }

  const int64_t width;
  const std::vector<float> x, delta, bias, scale;
  const std::vector<int32_t> gather = {8, 0, 3, 3, 7, 1, 2};
  Guarded sum, normed;
  AddRmsNormArgs args;  // Points to the above.
};

template <typename T>
std::vector<T> GatedReference(GateKind kind, int64_t rows, int64_t f, const std::vector<float>& x,
                              const float* bias) {
  std::vector<T> out(rows * f);
  for (int64_t n = 0; n < rows; ++n) {
    for (int64_t j = 0; j < f; ++j) {
      T first = x[n * 2 * f + j], second = x[n * 2 * f + f + j];
      if (bias != nullptr) first += bias[j], second += bias[f + j];
      const auto sigmoid = [](T a) { return T(1) / (T(1) + std::exp(-a)); };
      out[n * f + j] =
          kind == GateKind::kSiluFirst ? first * sigmoid(first) * second : first * sigmoid(second);
    }
  }
  return out;
}

// Six rows of x and, at a stride, of gate, both held in `dtype`.
struct SiluGateProblem {
  static constexpr int64_t kRows = 6, kPadding = 3;

  explicit SiluGateProblem(int64_t width, DType dtype = DType::kFloat32)
      : width(width),
        dtype(dtype),
        gate(Rounded(RandomNormal(kRows * (width + kPadding), 80, 3.0f), dtype)),
        before(Rounded(RandomNormal(kRows * width, 81), dtype)),
        x(kRows * width) {
    std::copy(before.begin(), before.end(), x.data());
  }

  SiluGateArgs Args() {
    return {.rows = kRows,
            .width = width,
            .dtype = dtype,
            .gate = gate.data(),
            .gate_stride = width + kPadding,
            .x = x.data()};
  }

  template <typename T>
  std::vector<T> Reference() const {
    std::vector<T> out(kRows * width);
    for (int64_t n = 0; n < kRows; ++n) {
      for (int64_t j = 0; j < width; ++j) {
        const T g = gate[n * (width + kPadding) + j];
        out[n * width + j] = static_cast<T>(before[n * width + j]) * (g / (T(1) + std::exp(-g)));
      }
    }
    return out;
  }

  // Holds x, after the operator ran, to the bound.
  void Compare() {
    ExpectAsGoodAsPlain(x.data(), Reference<float>().data(), Reference<double>().data(), kRows * width,
                        std::to_string(width), dtype);
    EXPECT_TRUE(x.GuardsIntact());
  }

  const int64_t width;
  const DType dtype;
  const std::vector<float> gate, before;
  Guarded x;
};

// Rows whose tokens take ids of their own and ids that slots hold, from a table held in `dtype`.
struct EmbedProblem {
  static constexpr int64_t kVocabulary = 11, kSlots = 6, kSlotStride = 3, kOffset = 1;

  explicit EmbedProblem(int64_t width, DType dtype = DType::kFloat32)
      : width(width),
        dtype(dtype),
        table(Rounded(RandomNormal(kVocabulary * width, 12), dtype)),
        pool(kSlots * kSlotStride, kNaN),
        out(static_cast<int64_t>(ids.size()) * width) {
    ragged.Add(1, 0, 1);
    ragged.Add(0, 1, 2);
    ragged.Add(4, -1, 2, true);
    ragged.Add(1, 3, 3);
    ragged.Add(2, 5, 4);
    ragged.Add(0, 2, 5);
    for (int32_t slot = 0; slot < kSlots; ++slot) {
      const int32_t id = 10 - slot;
      std::memcpy(&pool[slot * kSlotStride + kOffset], &id, sizeof(id));
    }
  }

  EmbedArgs Args() {
    return {.width = width,
            .ids = ids.data(),
            .sampled = {.pool = pool.data(), .slot_stride = kSlotStride, .offset = kOffset},
            .dtype = dtype,
            .table = table.data(),
            .out = out.data()};
  }

  // After the operator ran.
  void Compare() {
    const int64_t looked_up[] = {10, 10, 0, 3, 3, 7, 2, 5};
    for (int64_t n = 0; n < 8; ++n) {
      EXPECT_TRUE(SameBits(out.data() + n * width, &table[looked_up[n] * width], width)) << "token " << n;
    }
    EXPECT_TRUE(out.GuardsIntact());
  }

  const int64_t width;
  const DType dtype;
  const std::vector<int64_t> ids = {kSampledId, 10, 0, 3, 3, kSampledId, 2, kSampledId};
  const std::vector<float> table;
  std::vector<float> pool;
  Guarded out;
  Ragged ragged;
};

// Where a sigmoid has to get it right: what to put in, and what twice its sigmoid is.
struct SigmoidExtremes {
  std::vector<float> in, twice;
};
inline SigmoidExtremes ExtremesOfSigmoid() {
  const float inf = std::numeric_limits<float>::infinity(), big = 3e38f;
  return {{inf, -inf, big, -big, 0.0f, -0.0f, kNaN, 88.8f, -88.8f, 1e-40f, 200, -200, -inf, inf, kNaN, 0.0f},
          {2, 0, 2, 0, 1, 1, kNaN, 2, 0, 1, 2, 0, 0, 2, kNaN, 1}};
}

}  // namespace deltanet

#endif  // DELTANET_TESTS_MODEL_OPS_NORM_ELEMENTWISE_PROBLEM_H_
