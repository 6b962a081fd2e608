// The definitions of norms and gates, and steps of AddRmsNorm (with any of its parts), OutputNorm and Embed.
#ifndef DELTANET_TESTS_MODEL_OPS_NORM_ELEMENTWISE_PROBLEM_H_
#define DELTANET_TESTS_MODEL_OPS_NORM_ELEMENTWISE_PROBLEM_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "absl/functional/function_ref.h"
#include "gtest/gtest.h"
#include "model/ops/elementwise.h"
#include "model/ops/output_norm.h"
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

// Seven rows of `width`; bits of `parts`: 1 gathered, 2 with bias, 4 sum wanted, 8 the epsilon inside
// (and large enough to be seen).
struct NormProblem {
  static constexpr int64_t kRows = 7, kSourceRows = 9;
  static constexpr int kPartsEnd = 16;

  NormProblem(int64_t width, int parts, DType normed_dtype = DType::kFloat32)
      : width(width),
        x(RandomNormal(kSourceRows * width, 1)),
        bias(RandomNormal(width, 3)),
        scale(RandomNormal(width, 4)),
        sum(kRows * width),
        normed(kRows * width) {
    args = {.rows = kRows, .width = width, .x = x.data(), .scale = scale.data()};
    if (parts & 1) args.gather = gather.data();
    if (parts & 2) args.bias = bias.data();
    if (parts & 4) args.sum = sum.data();
    if (parts & 8) args.epsilon = {.after = 0.0f, .inside = 0.125f};
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
  const std::vector<float> x, bias, scale;
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
struct OutputNormProblem {
  static constexpr int64_t kRows = 6;

  OutputNormProblem(int64_t groups, int64_t width, bool gated, DType dtype = DType::kFloat32,
                    int64_t gate_padding = 3)
      : groups(groups),
        width(width),
        gated(gated),
        dtype(dtype),
        gate_stride(groups * width + gate_padding),
        x(Rounded(RandomNormal(kRows * groups * width, 81), dtype)),
        scale(RandomNormal(width, 82)),
        gate(Rounded(RandomNormal(kRows * gate_stride, 80, 3.0f), dtype)),
        out(kRows * groups * width) {}

  OutputNormArgs Args() {
    return {.rows = kRows,
            .groups = groups,
            .width = width,
            .dtype = dtype,
            .x = x.data(),
            .scale = scale.data(),
            .epsilon = epsilon,
            .gate = gated ? gate.data() : nullptr,
            .gate_stride = gate_stride,
            .out = out.data()};
  }

  template <typename T>
  std::vector<T> Reference() const {
    std::vector<T> want =
        RmsNormReference(std::vector<T>(x.begin(), x.end()), kRows * groups, width, scale.data(), epsilon);
    for (int64_t i = 0; gated && i < kRows * groups * width; ++i) {
      const T g = gate[i / (groups * width) * gate_stride + i % (groups * width)];
      want[i] *= g / (T(1) + std::exp(-g));
    }
    return want;
  }

  // Holds out, after the operator ran, to the bound.
  void Compare() {
    ExpectAsGoodAsPlain(out.data(), Reference<float>().data(), Reference<double>().data(),
                        kRows * groups * width, "output norm", dtype);
    EXPECT_TRUE(out.GuardsIntact());
  }

  const int64_t groups, width;
  const bool gated;
  const DType dtype;
  const int64_t gate_stride;
  const RmsEpsilon epsilon = {.after = 0.0625f, .inside = 0.125f};  // Large enough to be seen.
  const std::vector<float> x, scale, gate;
  Guarded out;
};

// Calls `check` for groups of awkward sizes and those that a GPU takes by vectors, with and without a gate.
inline void ForEachOutputNorm(absl::FunctionRef<void(int64_t groups, int64_t width, bool gated)> check) {
  constexpr int64_t kSizes[][2] = {{1, 1},   {3, 3},   {6, 8},    {2, 16},   {5, 17},
                                   {3, 64},  {2, 100}, {20, 128}, {9, 256},  {3, 384},
                                   {3, 512}, {1, 300}, {1, 1025}, {1, 1152}, {1, 2048}};
  for (const auto& [groups, width] : kSizes) {
    for (const bool gated : {false, true}) {
      SCOPED_TRACE("groups " + std::to_string(groups) + " width " + std::to_string(width) +
                   (gated ? " gated" : ""));
      check(groups, width, gated);
    }
  }
}

// What three groups of two values, of scale 1, come to with NaN among them and gates closed and open:
// `run(x, gate)` gives the six values.
inline void ExpectNaNAndClosedGates(
    absl::FunctionRef<std::vector<float>(const std::vector<float>&, const std::vector<float>&)> run) {
  const std::vector<float> got = run({1, kNaN, 2, 2, 2, -2}, {1, 1, kNaN, -1e30f, -88, 1e30f});
  EXPECT_TRUE(std::isnan(got[0]) && std::isnan(got[1]) && std::isnan(got[2]));
  EXPECT_EQ(got[3], 0.0f);
  EXPECT_NEAR(got[4], 0.0f, 1e-35f);
  EXPECT_NEAR(got[5], -1e30f, 1e28f);
  EXPECT_EQ(run({0, 0, 0, 0, 0, 0}, {1, 2, 3, 4, 5, 6}), std::vector<float>(6, 0.0f));
}

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
