// A ragged batch for the delta rule with random inputs and states, and what the definition makes of it.
#ifndef DELTANET_TESTS_MODEL_OPS_DELTA_RULE_PROBLEM_H_
#define DELTANET_TESTS_MODEL_OPS_DELTA_RULE_PROBLEM_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"
#include "model/ops/delta_rule.h"
#include "tests/model/ops/op_test_util.h"

namespace deltanet {

struct DeltaRuleSizes {
  int64_t heads, key_dim, value_dim;
};

inline std::string SizesName(const DeltaRuleSizes& sizes) {
  return absl::StrCat("H", sizes.heads, "_K", sizes.key_dim, "_V", sizes.value_dim);
}

// Inputs of a ragged batch in the layout of the engine (q, k, v and beta of a token side by side), and slots.
class DeltaRuleProblem {
 public:
  // Unit keys and queries, betas in (0, 1). Tokens and slots are no multiple of anything apart, or, if
  // `aligned`, multiples of 64 bytes.
  DeltaRuleProblem(const DeltaRuleSizes& sizes, const Ragged& ragged, int64_t slots, uint32_t seed,
                   bool aligned = false)
      : sizes_(sizes),
        ragged_(ragged),
        stride_(Padded(sizes.heads * (2 * sizes.key_dim + sizes.value_dim + 1), 5, aligned)),
        slot_stride_(Padded(StateSize(), 3, aligned)),
        inputs_(RandomNormal(ragged.offsets.back() * stride_, seed)),
        pool_(slots * slot_stride_),
        out_(ragged.offsets.back() * sizes.heads * sizes.value_dim),
        nonfinite_(ragged.fresh.size(), 0) {
    std::mt19937 generator(seed + 1);
    std::uniform_real_distribution<float> uniform(0.0f, 1.0f);
    for (int64_t n = 0; n < ragged_.offsets.back(); ++n) {
      for (int64_t h = 0; h < sizes_.heads; ++h) {
        *beta(n, h) = uniform(generator);
        Normalize(q(n, h));
        Normalize(k(n, h));
      }
    }
    // Between the slots NaN stays, to show who reads there.
    for (int64_t slot = 0; slot < slots; ++slot) {
      const std::vector<float> state =
          RandomNormal(StateSize(), seed + 2 + static_cast<uint32_t>(slot), 0.3f);
      std::copy(state.begin(), state.end(), this->slot(slot));
    }
  }

  const DeltaRuleSizes& sizes() const { return sizes_; }
  int64_t slot_stride() const { return slot_stride_; }
  int64_t StateSize() const { return sizes_.heads * sizes_.key_dim * sizes_.value_dim; }
  int64_t OutWidth() const { return sizes_.heads * sizes_.value_dim; }
  float* q(int64_t n, int64_t h) { return inputs_.data() + n * stride_ + h * sizes_.key_dim; }
  float* k(int64_t n, int64_t h) { return q(n, 0) + (sizes_.heads + h) * sizes_.key_dim; }
  float* v(int64_t n, int64_t h) {
    return q(n, 0) + 2 * sizes_.heads * sizes_.key_dim + h * sizes_.value_dim;
  }
  float* beta(int64_t n, int64_t h) {
    return q(n, 0) + sizes_.heads * (2 * sizes_.key_dim + sizes_.value_dim) + h;
  }
  float* slot(int64_t s) { return pool_.data() + s * slot_stride_; }
  float* out(int64_t n) { return out_.data() + n * OutWidth(); }
  std::vector<float>& inputs() { return inputs_; }
  Guarded& out() { return out_; }
  Guarded& pool() { return pool_; }
  Ragged& ragged() { return ragged_; }
  std::vector<int32_t>& nonfinite() { return nonfinite_; }
  float scale = 0.7f;

  // Of a step whose token 0 is token n of the batch.
  DeltaRuleArgs Args(int64_t n = 0) {
    return DeltaRuleArgs{.heads = sizes_.heads,
                         .key_dim = sizes_.key_dim,
                         .value_dim = sizes_.value_dim,
                         .q = q(n, 0),
                         .k = k(n, 0),
                         .v = v(n, 0),
                         .beta = beta(n, 0),
                         .token_stride = stride_,
                         .scale = scale,
                         .state = {.pool = pool_.data(), .slot_stride = slot_stride_, .offset = 0},
                         .out = out(n),
                         .nonfinite = nonfinite_.data()};
  }
  void Run(const OpContext& context = SerialContext()) {
    ASSERT_TRUE(DeltaRule(ragged_.rows(), Args(), context).ok());
    EXPECT_TRUE(out_.GuardsIntact());
    EXPECT_TRUE(pool_.GuardsIntact());
  }

  void SetBeta(int64_t n, float value) {
    for (int64_t h = 0; h < sizes_.heads; ++h) *beta(n, h) = value;
  }
  // Makes each row's keys say nearly the same over and over.
  void CorrelateKeys() {
    for (size_t r = 0; r < ragged_.fresh.size(); ++r) {
      for (int64_t n = ragged_.offsets[r] + 1; n < ragged_.offsets[r + 1]; ++n) {
        for (int64_t h = 0; h < sizes_.heads; ++h) {
          for (int64_t i = 0; i < sizes_.key_dim; ++i)
            k(n, h)[i] = k(n - 1, h)[i] + (n % 3 == 0 ? 0.0f : 0.01f * k(n, h)[i]);
          Normalize(k(n, h));
        }
      }
    }
  }

  // Appends row r's state and outputs by the reference in T; call before Run.
  template <typename T>
  void AppendReference(int64_t r, std::vector<T>* states, std::vector<T>* outs) {
    const int64_t H = sizes_.heads, K = sizes_.key_dim, V = sizes_.value_dim;
    const int64_t start = ragged_.offsets[r], tokens = ragged_.offsets[r + 1] - start;
    std::vector<T> state(StateSize(), 0), out(tokens * OutWidth());
    if (!ragged_.fresh[r]) std::copy_n(slot(ragged_.base_slot[r]), StateSize(), state.begin());
    for (int64_t h = 0; h < H; ++h) {
      std::vector<T> head_q, head_k, head_v, head_beta, head_out(tokens * V);
      for (int64_t n = start; n < start + tokens; ++n) {
        head_q.insert(head_q.end(), q(n, h), q(n, h) + K);
        head_k.insert(head_k.end(), k(n, h), k(n, h) + K);
        head_v.insert(head_v.end(), v(n, h), v(n, h) + V);
        head_beta.push_back(*beta(n, h));
      }
      DeltaRuleReference<T>(tokens, K, V, head_q.data(), head_k.data(), head_v.data(), head_beta.data(),
                            scale, state.data() + h * K * V, head_out.data());
      for (int64_t t = 0; t < tokens; ++t) {
        std::copy_n(head_out.begin() + t * V, V, out.begin() + t * OutWidth() + h * V);
      }
    }
    states->insert(states->end(), state.begin(), state.end());
    outs->insert(outs->end(), out.begin(), out.end());
  }

  void RunAndCompare(const OpContext& context) {
    RunAndCompare([&] { Run(context); });
  }

  // Calls `run`, which runs the rows, and holds all rows together to the bound: of few numbers the largest
  // error is a matter of luck.
  void RunAndCompare(absl::FunctionRef<void()> run) {
    std::vector<float> plain_states, plain_outs, states;
    std::vector<double> exact_states, exact_outs;
    const int64_t R = ragged_.rows().rows;
    for (int64_t r = 0; r < R; ++r) {
      AppendReference(r, &plain_states, &plain_outs);
      AppendReference(r, &exact_states, &exact_outs);
    }
    run();
    for (int64_t r = 0; r < R; ++r) {
      const float* state = slot(ragged_.work_slot[r]);
      states.insert(states.end(), state, state + StateSize());
    }
    ExpectAsGoodAsPlain(states.data(), plain_states.data(), exact_states.data(), R * StateSize(), "state");
    ExpectAsGoodAsPlain(out_.data(), plain_outs.data(), exact_outs.data(), out_.size(), "out");
    EXPECT_EQ(nonfinite_, std::vector<int32_t>(R, 0));
  }

 private:
  static int64_t Padded(int64_t size, int64_t odd, bool aligned) {
    return aligned ? (size + 31) / 32 * 32 : size + odd;
  }

  void Normalize(float* x) const {
    double squares = 0;
    for (int64_t i = 0; i < sizes_.key_dim; ++i) squares += double{x[i]} * x[i];
    for (int64_t i = 0; i < sizes_.key_dim; ++i) x[i] /= static_cast<float>(std::sqrt(squares));
  }

  DeltaRuleSizes sizes_;
  Ragged ragged_;
  int64_t stride_;
  int64_t slot_stride_;
  std::vector<float> inputs_;
  Guarded pool_;
  Guarded out_;
  std::vector<int32_t> nonfinite_;
};

// Rows of every kind: in place and from slot to slot, fresh, empty, and two that share a base (only work
// slots are a row's own). Needs 12 slots.
inline Ragged SevenRows() {
  Ragged ragged;
  ragged.Add(1, 0, 0);
  ragged.Add(63, 2, 3);
  ragged.Add(0, 4, 5);
  ragged.Add(17, -1, 7, true);
  ragged.Add(0, -1, 9, true);
  ragged.Add(2, 2, 10);
  ragged.Add(100, 11, 11);
  return ragged;
}

// Runs rows of one token of which every other is padding: to the other rows and to every slot it is as if they
// were not there.
inline void CheckPadding(const DeltaRuleSizes& sizes, bool aligned,
                         absl::FunctionRef<void(DeltaRuleProblem*)> run) {
  constexpr int32_t kRows = 7;
  Ragged all, padded;
  for (int32_t r = 0; r < kRows; ++r) {
    all.Add(1, r, r);
    if (r % 2 == 0) {
      padded.Add(1, r, r);
    } else {
      padded.Add(1, -1, -1, true);
    }
  }
  DeltaRuleProblem want(sizes, all, kRows, 33, aligned), got(sizes, padded, kRows, 33, aligned);
  DeltaRuleProblem before(sizes, all, kRows, 33, aligned);
  got.v(1, 0)[0] = kNaN;
  run(&want);
  run(&got);
  for (int32_t r = 0; r < kRows; ++r) {
    DeltaRuleProblem& same = r % 2 == 0 ? want : before;
    EXPECT_TRUE(SameBits(got.slot(r), same.slot(r), got.slot_stride())) << "slot " << r;
    if (r % 2 == 0) {
      EXPECT_TRUE(SameBits(got.out(r), want.out(r), got.OutWidth())) << "row " << r;
    }
  }
  EXPECT_EQ(got.nonfinite(), std::vector<int32_t>(kRows, 0));
}

// Ways to cut a row of `tokens` tokens into pieces.
inline std::vector<std::vector<int64_t>> Splits(int64_t tokens) {
  std::vector<std::vector<int64_t>> splits = {{tokens}, std::vector<int64_t>(tokens, 1)};
  for (const std::vector<int64_t>& sizes : {std::vector<int64_t>{7}, {16}, {64}, {1, 0, 31, 2}}) {
    std::vector<int64_t> pieces;
    for (int64_t left = tokens; left > 0; left -= pieces.back())
      pieces.push_back(std::min(left, sizes[pieces.size() % sizes.size()]));
    splits.push_back(pieces);
  }
  return splits;
}

}  // namespace deltanet

#endif  // DELTANET_TESTS_MODEL_OPS_DELTA_RULE_PROBLEM_H_
