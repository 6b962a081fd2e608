// Rows of logits and what is asked of each, held to the definition in float64.
#ifndef DELTANET_TESTS_MODEL_OPS_READOUT_PROBLEM_H_
#define DELTANET_TESTS_MODEL_OPS_READOUT_PROBLEM_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "model/ops/philox.h"
#include "model/ops/readout.h"
#include "tests/model/ops/op_test_util.h"

namespace deltanet {

// p_T of a row, and the order of its ids, from the definition.
class ExactRow {
 public:
  ExactRow(const float* x, int64_t W) : x_(x, x + W), order_(W) {
    std::iota(order_.begin(), order_.end(), 0);
    std::stable_sort(order_.begin(), order_.end(), [&](int32_t a, int32_t b) { return x_[a] > x_[b]; });
    log_sum_ = std::log(Sum(Terms(1.0)));
  }

  double LogProbability(int32_t id) const { return x_[id] - x_[order_[0]] - log_sum_; }
  const std::vector<int32_t>& order() const { return order_; }

  // exp((x - max) / temperature)
  std::vector<double> Terms(double temperature) const {
    std::vector<double> terms(x_.size());
    for (size_t i = 0; i < x_.size(); ++i) terms[i] = std::exp((x_[i] - x_[order_[0]]) / temperature);
    return terms;
  }

  // How many ids may be sampled, with top_p off by `slack`.
  int64_t Kept(const ReadoutRequest& request, double slack = 0) const {
    const int64_t W = static_cast<int64_t>(x_.size());
    const int64_t most = request.top_k == 0 ? W : std::min<int64_t>(request.top_k, W);
    if (request.top_p == 1.0f) return most;
    const std::vector<double> terms = Terms(request.temperature);
    double sum = 0, prefix = 0;
    for (int64_t i = 0; i < most; ++i) sum += terms[order_[i]];
    for (int64_t i = 0; i < most; ++i) {
      prefix += terms[order_[i]];
      if (prefix >= (request.top_p + slack) * sum) return i + 1;
    }
    return most;
  }

  // The probabilities with which each id is sampled.
  std::vector<double> Sampled(const ReadoutRequest& request) const {
    return Restricted(Terms(request.temperature), Kept(request));
  }

  // Whether the definition gives `id`, up to roundings of `slack` in each sum of probabilities.
  bool MaySample(const ReadoutRequest& request, int32_t id, double slack) const {
    if (request.temperature == 0) return id == order_[0];
    const double u = ReadoutUniform(request.seed, request.counter);
    const std::vector<double> terms = Terms(request.temperature);
    for (int64_t kept = Kept(request, -slack); kept <= Kept(request, slack); ++kept) {
      const std::vector<double> p = Restricted(terms, kept);
      const double before = std::accumulate(p.begin(), p.begin() + id, 0.0);
      if (p[id] > 0 && before <= u + slack && before + p[id] > u - slack) return true;
    }
    return false;
  }

 private:
  static double Sum(const std::vector<double>& terms) {
    return std::accumulate(terms.begin(), terms.end(), 0.0);
  }
  std::vector<double> Restricted(const std::vector<double>& terms, int64_t kept) const {
    std::vector<double> p(terms.size(), 0.0);
    for (int64_t i = 0; i < kept; ++i) p[order_[i]] = terms[order_[i]];
    const double sum = Sum(p);
    for (double& each : p) each /= sum;
    return p;
  }

  std::vector<double> x_;
  std::vector<int32_t> order_;
  double log_sum_;
};

class ReadoutProblem {
 public:
  // Rows of W logits, with `gap` more between them, all NaN, as is what lies before and after the rows.
  explicit ReadoutProblem(int64_t W, int64_t gap = 0) : W_(W), stride_(W + gap), logits_(kGuard, kNaN) {}

  void Add(const std::vector<float>& row, ReadoutRequest request) {
    logits_.insert(logits_.end(), row.begin(), row.end());
    logits_.resize(logits_.size() + stride_ - W_, kNaN);
    requests_.push_back(request);
  }
  int64_t rows() const { return static_cast<int64_t>(requests_.size()); }

  // What the operator is given, `map` turning each array (a pointer to a vector) into where it is on the
  // device. All that it may write is marked as unwritten.
  template <typename Map>
  ReadoutArgs Args(Map map) {
    const int64_t M = rows();
    slots_.assign(kGuard + (M + 1) * kSlotStride + kGuard, kUnwrittenId);
    ids_.assign(kGuard + M + kGuard, kUnwrittenId);
    log_probs_.assign(ids_.size(), kUnwritten);
    top_ids_.assign(kGuard + M * kMaxTopTokens + kGuard, kUnwrittenId);
    top_log_probs_.assign(top_ids_.size(), kUnwritten);
    logits_.resize(kGuard + M * stride_ + kGuard, kNaN);
    return {.rows = M,
            .vocabulary = W_,
            .logits = map(&logits_) + kGuard,
            .logits_stride = stride_,
            .requests = map(&requests_),
            .sampled = {.pool = reinterpret_cast<float*>(map(&slots_) + kGuard),
                        .slot_stride = kSlotStride,
                        .offset = kSlotOffset},
            .ids = map(&ids_) + kGuard,
            .log_probs = map(&log_probs_) + kGuard,
            .top_ids = map(&top_ids_) + kGuard,
            .top_log_probs = map(&top_log_probs_) + kGuard};
  }
  ReadoutArgs Args() {
    return Args([](auto* array) { return array->data(); });
  }

  int32_t id(int64_t m) const { return ids_[kGuard + m]; }
  float log_prob(int64_t m) const { return log_probs_[kGuard + m]; }

  // Every bit that was written.
  std::string Results() const {
    std::string results;
    const auto append = [&](const auto& array) {
      results.append(reinterpret_cast<const char*>(array.data()), array.size() * sizeof(array[0]));
    };
    append(slots_), append(ids_), append(log_probs_), append(top_ids_), append(top_log_probs_);
    return results;
  }
  // Those of one row but for its slot.
  std::string Results(int64_t m) const {
    std::string results;
    const auto append = [&](const auto& array, int64_t first, int64_t count) {
      results.append(reinterpret_cast<const char*>(&array[kGuard + first]), count * sizeof(array[0]));
    };
    append(ids_, m, 1), append(log_probs_, m, 1);
    append(top_ids_, m * kMaxTopTokens, kMaxTopTokens),
        append(top_log_probs_, m * kMaxTopTokens, kMaxTopTokens);
    return results;
  }

  // Holds the results to the definition, and all else to what it was.
  void Compare() const {
    std::vector<int32_t> slots(slots_.size(), kUnwrittenId);
    for (int64_t m = 0; m < rows(); ++m) {
      CompareRow(m);
      const ReadoutRequest& request = requests_[m];
      if (Samples(request) && request.sampled_slot >= 0) {
        slots[kGuard + request.sampled_slot * kSlotStride + kSlotOffset] = id(m);
      }
    }
    EXPECT_TRUE(slots == slots_) << "slots";
    const auto guarded = [](const auto& array, auto mark) {
      const auto is_mark = [&](auto x) { return x == mark; };
      return std::all_of(array.begin(), array.begin() + kGuard, is_mark) &&
             std::all_of(array.end() - kGuard, array.end(), is_mark);
    };
    EXPECT_TRUE(guarded(ids_, kUnwrittenId) && guarded(top_ids_, kUnwrittenId)) << "guards of ids";
    EXPECT_TRUE(guarded(log_probs_, kUnwritten) && guarded(top_log_probs_, kUnwritten)) << "guards of log p";
  }

 private:
  static constexpr int64_t kGuard = 67;  // Elements before and after each array.
  static constexpr int64_t kSlotStride = 3, kSlotOffset = 1;
  static constexpr int32_t kUnwrittenId = -77;
  static constexpr float kUnwritten = 12352.0f;
  // Of a sum of probabilities. Exponentials of float32 are off by some units in the last place, and by
  // another for every factor e below the largest.
  static constexpr double kSlack = 2e-6;

  static bool Samples(const ReadoutRequest& request) { return request.target < 0 && request.sample != 0; }

  static void ExpectLogProb(float log_prob, double exact) {
    if (log_prob != static_cast<float>(exact)) {  // That may be beyond a float32.
      EXPECT_NEAR(log_prob, exact, 1e-6 + kEpsilon * std::fabs(exact));
    }
  }

  void CompareRow(int64_t m) const {
    const ReadoutRequest& request = requests_[m];
    SCOPED_TRACE("row " + std::to_string(m) + " of " + std::to_string(W_) + ", target " +
                 std::to_string(request.target) + ", top " + std::to_string(request.top) + ", sample " +
                 std::to_string(request.sample) + ", temperature " + std::to_string(request.temperature) +
                 ", top_k " + std::to_string(request.top_k) + ", top_p " + std::to_string(request.top_p));
    const float* const x = &logits_[kGuard + m * stride_];
    const int32_t* const top_ids = &top_ids_[kGuard + m * kMaxTopTokens];
    const float* const top_log_probs = &top_log_probs_[kGuard + m * kMaxTopTokens];
    const int64_t top = std::min<int64_t>(request.top, W_);
    const bool asked = request.target >= 0 || Samples(request) || request.top > 0;
    if (!Samples(request)) {
      EXPECT_EQ(id(m), request.target);
    }
    if (asked && !std::all_of(x, x + W_, [](float each) { return std::isfinite(each); })) {
      EXPECT_TRUE(std::isnan(log_prob(m)));
      EXPECT_TRUE(!Samples(request) || (id(m) >= 0 && id(m) < W_)) << id(m);
      for (int64_t i = 0; i < top; ++i) {
        EXPECT_TRUE(top_ids[i] >= 0 && top_ids[i] < W_) << top_ids[i];
        EXPECT_TRUE(std::isnan(top_log_probs[i]));
      }
    } else if (asked) {
      const ExactRow exact(x, W_);
      if (Samples(request)) {
        ASSERT_TRUE(id(m) >= 0 && id(m) < W_) << id(m);
        EXPECT_TRUE(exact.MaySample(request, id(m), kSlack)) << "sampled " << id(m);
      }
      if (id(m) >= 0) {
        ExpectLogProb(log_prob(m), exact.LogProbability(id(m)));
      } else {
        EXPECT_EQ(log_prob(m), 0.0f);
      }
      for (int64_t i = 0; i < top; ++i) {
        EXPECT_EQ(top_ids[i], exact.order()[i]) << "place " << i;
        ExpectLogProb(top_log_probs[i], exact.LogProbability(exact.order()[i]));
      }
    } else {
      EXPECT_EQ(log_prob(m), 0.0f);
    }
    for (int64_t i = top; i < kMaxTopTokens; ++i) {
      EXPECT_EQ(top_ids[i], i < request.top ? -1 : kUnwrittenId) << "place " << i;
      EXPECT_EQ(top_log_probs[i], i < request.top ? 0.0f : kUnwritten) << "place " << i;
    }
  }

  const int64_t W_, stride_;
  std::vector<float> logits_;
  std::vector<ReadoutRequest> requests_;
  std::vector<int32_t> slots_, ids_, top_ids_;
  std::vector<float> log_probs_, top_log_probs_;
};

// Kinds of rows: what differs is where ties, edges and digits fall.
enum class LogitKind { kNormal, kPeaked, kTies, kEqual, kAscending, kSignedZeros, kHuge, kTiny };
inline constexpr LogitKind kLogitKinds[] = {
    LogitKind::kNormal,    LogitKind::kPeaked,      LogitKind::kTies, LogitKind::kEqual,
    LogitKind::kAscending, LogitKind::kSignedZeros, LogitKind::kHuge, LogitKind::kTiny};

inline std::vector<float> Logits(LogitKind kind, int64_t W, uint32_t seed) {
  std::vector<float> x = RandomNormal(W, seed, 3.0f);
  for (int64_t i = 0; i < W; ++i) {
    switch (kind) {
      case LogitKind::kNormal:
        break;
      case LogitKind::kPeaked:
        if (i == (seed * 7919) % W) x[i] += 25.0f;
        break;
      case LogitKind::kTies:
        x[i] = std::round(x[i]);
        break;
      case LogitKind::kEqual:
        x[i] = -2.5f;
        break;
      case LogitKind::kAscending:
        x[i] = 1e-3f * static_cast<float>(i) - 5.0f;
        break;
      case LogitKind::kSignedZeros:
        x[i] = x[i] > 4 ? 1.0f : x[i] > 0 ? 0.0f : -0.0f;
        break;
      case LogitKind::kHuge:
        x[i] *= 3e37f;
        break;
      case LogitKind::kTiny:
        x[i] *= 1e-40f;
        break;
    }
  }
  return x;
}

// One row of `kind` for everything that can be asked.
inline ReadoutProblem EveryRequest(int64_t W, int64_t gap, LogitKind kind) {
  ReadoutProblem problem(W, gap);
  const auto add = [&](ReadoutRequest request) {
    const int64_t m = problem.rows();
    request.seed = 0x9E3779B97F4A7C15u * (m + 1);
    request.counter = 1000 * m + W;
    if (request.sample != 0 && m % 3 != 0) request.sampled_slot = static_cast<int32_t>(m);
    problem.Add(Logits(kind, W, static_cast<uint32_t>(m)), request);
  };
  const int32_t last = static_cast<int32_t>(W - 1);
  add({});
  for (const int32_t target : {0, last / 2, last}) add({.target = target});
  add({.target = last, .top = 5, .sample = 1, .sampled_slot = 0, .temperature = 1.0f});
  for (const int32_t top : {1, 2, 63, 64}) add({.top = top});
  for (const int32_t top : {0, 1, 64}) add({.top = top, .sample = 1});
  for (const float temperature : {0.7f, 1.0f, 1.5f}) {
    for (const int32_t top_k : {0, 1, 2, 40, last, last + 1, last + 2}) {
      for (const float top_p : {1e-6f, 0.5f, 0.95f, 0.9999999f, 1.0f}) {
        const int32_t top = problem.rows() % 5 == 0 ? 7 : 0;
        add({.top = top, .sample = 1, .temperature = temperature, .top_k = top_k, .top_p = top_p});
      }
    }
  }
  for (const float temperature : {1e-37f, 1e-30f, 1e-6f, 1e6f, 1e30f}) {
    add({.sample = 1, .temperature = temperature});
    add({.sample = 1, .temperature = temperature, .top_k = 3, .top_p = 0.6f});
  }
  return problem;
}

// Flat rows, of which u is exactly where one id ends and the next, *ids, begins.
inline ReadoutProblem BoundaryRows(std::vector<int32_t>* ids) {
  constexpr int64_t kIds = 1 << 16;
  ReadoutProblem problem(kIds);
  for (int64_t counter = 0; problem.rows() < 4; ++counter) {
    const double id = kIds * ReadoutUniform(31, counter);
    if (id != std::floor(id)) continue;
    ids->push_back(static_cast<int32_t>(id));
    problem.Add(std::vector<float>(kIds, -1.0f),
                {.sample = 1, .temperature = 1.0f, .seed = 31, .counter = counter});
  }
  return problem;
}

// Rows that are not finite, each between two that are.
inline ReadoutProblem NonFiniteRows(int64_t W) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  ReadoutProblem problem(W);
  const ReadoutRequest requests[] = {
      {.target = 0},
      {.top = 9},
      {.top = 3, .sample = 1, .sampled_slot = 1},
      {.sample = 1, .sampled_slot = 2, .temperature = 1.0f},
      {.sample = 1, .sampled_slot = 3, .temperature = 1.0f, .top_k = 5, .top_p = 0.5f},
      {}};
  for (const float bad : {kNaN, -kNaN, kInfinity, -kInfinity}) {
    for (const int64_t where : {int64_t{0}, W / 2, W - 1, int64_t{-1}}) {
      for (ReadoutRequest request : requests) {
        std::vector<float> row = RandomNormal(W, 5, 2.0f);
        if (where >= 0) row[where] = bad;
        if (where < 0) std::fill(row.begin(), row.end(), bad);
        if (request.sampled_slot >= 0) request.sampled_slot = static_cast<int32_t>(problem.rows());
        problem.Add(row, request);
        request.sampled_slot = -1;
        problem.Add(RandomNormal(W, 6, 2.0f), request);
      }
    }
  }
  return problem;
}

// Row number `which` of a series in which all kinds of logits and requests come up; every fourth wants `top`.
inline void AddOfAllKinds(int64_t which, int64_t W, int32_t top, ReadoutProblem* problem) {
  problem->Add(Logits(kLogitKinds[which % 5], W, static_cast<uint32_t>(which)),
               {.target = which % 7 == 0 ? 5 : -1,
                .top = which % 4 == 0 ? top : 0,
                .sample = 1,
                .temperature = which % 3 == 0 ? 0.0f : 0.9f,
                .top_k = which % 5 == 0 ? 30 : 0,
                .top_p = which % 2 == 0 ? 0.8f : 1.0f,
                .seed = static_cast<uint64_t>(which),
                .counter = which});
}

}  // namespace deltanet

#endif  // DELTANET_TESTS_MODEL_OPS_READOUT_PROBLEM_H_
