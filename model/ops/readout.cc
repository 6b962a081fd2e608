// On the CPU a row is read once for its largest logit and once for the sum of exponentials; each of `top` and
// the sampling adds a pass or two.
#include "model/ops/readout.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "model/base/status_macros.h"
#include "model/ops/cpu/dispatch.h"
#include "model/ops/cuda_kernels.h"
#include "model/ops/philox.h"
#include "model/ops/readout_rank.h"

namespace deltanet {
namespace {

// Below this many logits (some 10 us), waking another thread costs more than it saves.
constexpr int64_t kMinElements = int64_t{1} << 14;
// Logits whose exponentials are summed in float32; the sums of blocks are added in float64.
constexpr int64_t kBlock = 1024;
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// The largest of W logits; NaN if any is NaN or infinite.
float MaxOfFinite(int64_t W, const float* x) {
  float max = x[0], check = 0;
  for (int64_t i = 0; i < W; ++i) {
    max = x[i] > max ? x[i] : max;
    check += x[i] * 0.0f;
  }
  return max + check;
}

// The sum of exp((x - max) * inverse_temperature); each term goes to `terms` too, if there.
double SumOfExp(int64_t W, const float* x, float max, float inverse_temperature, float* terms) {
  double sum = 0;
  for (int64_t i = 0; i < W; ++i) {
    const float term = std::exp((x[i] - max) * inverse_temperature);
    if (terms != nullptr) terms[i] = term;
    sum += term;
  }
  return sum;
}

// Leaves the n most likely ids in *ranks, in any order; 1 <= n <= W.
void MostLikely(int64_t W, const float* x, int64_t n, std::vector<Rank>* ranks) {
  // Ids that may belong there; whenever there are too many, all but the best n go. An id that comes later
  // than those n is none of the best unless its logit is larger than the smallest of theirs.
  const int64_t most = std::max<int64_t>(2 * n, n + 256);
  ranks->clear();
  float bar = -std::numeric_limits<float>::infinity();
  const auto prune = [&] {
    std::nth_element(ranks->begin(), ranks->begin() + (n - 1), ranks->end());
    ranks->resize(n);
    bar = x[IdOf((*ranks)[n - 1])];
  };
  constexpr int64_t kStep = 16;
  for (int64_t begin = 0; begin < W; begin += kStep) {
    const int64_t end = std::min(begin + kStep, W);
    if (end == begin + kStep) {
      int over = 0;
      for (int64_t i = 0; i < kStep; ++i) over |= x[begin + i] > bar;
      if (over == 0) continue;
    }
    for (int64_t i = begin; i < end; ++i) {
      if (x[i] > bar) ranks->push_back(RankOf(x[i], static_cast<uint32_t>(i)));
    }
    if (static_cast<int64_t>(ranks->size()) > most) prune();
  }
  prune();
}

// Shortens *ranks to its most likely ids whose terms first sum to at least `enough`; one at least.
void CutToMass(const float* terms, double enough, std::vector<Rank>* ranks) {
  const auto first = ranks->begin();
  // The first `under` do not sum to enough, the first `over` do (or are all there are).
  int64_t under = 0, over = static_cast<int64_t>(ranks->size());
  double mass_under = 0;
  while (over - under > 1) {
    const int64_t middle = under + (over - under) / 2;
    std::nth_element(first + under, first + middle, first + over);
    double mass = mass_under;
    for (int64_t i = under; i < middle; ++i) mass += terms[IdOf(first[i])];
    if (mass >= enough) {
      over = middle;
    } else {
      under = middle;
      mass_under = mass;
    }
  }
  ranks->resize(over);
}

// What a thread needs for its rows, kept for the next.
struct Scratch {
  std::vector<Rank> ranks;
  std::vector<float> terms;
};

// One row, all of whose logits are finite.
class FiniteRow {
 public:
  FiniteRow(int64_t W, const float* x, float max, Scratch* scratch)
      : W_(W), x_(x), max_(max), sum_(Sum(1.0f)), scratch_(*scratch) {}

  float LogProbability(int64_t id) const {
    return static_cast<float>(static_cast<double>(x_[id]) - max_ - std::log(sum_));
  }

  // The `top` most likely ids, most likely first; top <= W.
  void Top(int64_t top, int32_t* ids, float* log_probs) {
    MostLikely(W_, x_, top, &scratch_.ranks);
    std::sort(scratch_.ranks.begin(), scratch_.ranks.end());
    for (int64_t i = 0; i < top; ++i) {
      ids[i] = IdOf(scratch_.ranks[i]);
      log_probs[i] = LogProbability(ids[i]);
    }
  }

  int32_t Sample(const ReadoutRequest& request) {
    if (request.temperature == 0) return static_cast<int32_t>(std::find(x_, x_ + W_, max_) - x_);
    const float inverse = std::min(1.0f / request.temperature, std::numeric_limits<float>::max());
    const double u = ReadoutUniform(request.seed, request.counter);
    const bool of_k = request.top_k > 0 && request.top_k < W_, of_p = request.top_p < 1;
    return of_k || of_p ? SampleOfSome(request, of_k, of_p, inverse, u) : SampleOfAll(inverse, u);
  }

 private:
  double Sum(float inverse) const {
    double sum = 0;
    for (int64_t i = 0; i < W_; i += kBlock) {
      sum += SumOfExp(std::min(kBlock, W_ - i), x_ + i, max_, inverse, nullptr);
    }
    return sum;
  }

  // Finds the block in which the cumulative probability passes u, and the id there.
  int32_t SampleOfAll(float inverse, double u) const {
    const double pass = u * (inverse == 1 ? sum_ : Sum(inverse));
    double cumulative = 0;
    int32_t last = 0;
    for (int64_t i = 0; i < W_; i += kBlock) {
      const int64_t lanes = std::min(kBlock, W_ - i);
      float terms[kBlock];
      const double sum = SumOfExp(lanes, x_ + i, max_, inverse, terms);
      if (sum == 0) continue;
      const bool here = cumulative + sum > pass;
      double within = cumulative;
      for (int64_t j = 0; here && j < lanes; ++j) {
        within += terms[j];
        if (within > pass) return static_cast<int32_t>(i + j);
      }
      // Here by a rounding, or the last that could be.
      for (int64_t j = 0; j < lanes; ++j) {
        if (terms[j] > 0) last = static_cast<int32_t>(i + j);
      }
      if (here) break;
      cumulative += sum;
    }
    return last;
  }

  int32_t SampleOfSome(const ReadoutRequest& request, bool of_k, bool of_p, float inverse, double u) {
    std::vector<Rank>& ranks = scratch_.ranks;
    std::vector<float>& terms = scratch_.terms;
    terms.resize(W_);
    double sum = 0;
    for (int64_t i = 0; i < W_; i += kBlock) {
      sum += SumOfExp(std::min(kBlock, W_ - i), x_ + i, max_, inverse, &terms[i]);
    }
    if (of_k) {
      MostLikely(W_, x_, request.top_k, &ranks);
      sum = 0;
      for (const Rank rank : ranks) sum += terms[IdOf(rank)];
    } else {
      // Even all of those below the bar together could be left out.
      const double bar = 0.5 * (1.0 - request.top_p) * sum / static_cast<double>(W_);
      ranks.clear();
      for (int64_t i = 0; i < W_; ++i) {
        if (terms[i] >= bar) ranks.push_back(RankOf(x_[i], static_cast<uint32_t>(i)));
      }
    }
    if (of_p) {
      CutToMass(terms.data(), request.top_p * sum, &ranks);
      sum = 0;
      for (const Rank rank : ranks) sum += terms[IdOf(rank)];
    }
    const Rank least_likely = *std::max_element(ranks.begin(), ranks.end());
    const float bar = x_[IdOf(least_likely)];
    const double pass = u * sum;
    double cumulative = 0;
    int32_t last = 0;
    for (int64_t i = 0; i < W_; ++i) {
      if (x_[i] < bar || RankOf(x_[i], static_cast<uint32_t>(i)) > least_likely || terms[i] == 0) continue;
      cumulative += terms[i];
      last = static_cast<int32_t>(i);
      if (cumulative > pass) break;
    }
    return last;
  }

  const int64_t W_;
  const float* const x_;
  const float max_;
  const double sum_;
  Scratch& scratch_;
};

void ReadoutRow(const ReadoutArgs& args, int64_t row, Scratch* scratch) {
  const ReadoutRequest& request = args.requests[row];
  const bool samples = request.target < 0 && request.sample != 0;
  int32_t* const top_ids = args.top_ids + row * kMaxTopTokens;
  float* const top_log_probs = args.top_log_probs + row * kMaxTopTokens;
  args.ids[row] = request.target;
  args.log_probs[row] = 0.0f;
  if (request.target < 0) args.ids[row] = -1;
  if (request.target < 0 && !samples && request.top == 0) return;
  const int64_t W = args.vocabulary, top = std::min<int64_t>(request.top, W);
  const float* const x = args.logits + row * args.logits_stride;
  const float max = MaxOfFinite(W, x);
  if (std::isnan(max)) {
    if (samples) args.ids[row] = 0;
    args.log_probs[row] = kNaN;
    for (int64_t i = 0; i < top; ++i) {
      top_ids[i] = static_cast<int32_t>(i);
      top_log_probs[i] = kNaN;
    }
  } else {
    FiniteRow finite(W, x, max, scratch);
    if (samples) args.ids[row] = finite.Sample(request);
    if (args.ids[row] >= 0) args.log_probs[row] = finite.LogProbability(args.ids[row]);
    if (top > 0) finite.Top(top, top_ids, top_log_probs);
  }
  for (int64_t i = top; i < request.top; ++i) {
    top_ids[i] = -1;
    top_log_probs[i] = 0.0f;
  }
  if (samples && request.sampled_slot >= 0) {
    std::memcpy(args.sampled.at(request.sampled_slot), &args.ids[row], sizeof(int32_t));
  }
}

}  // namespace

absl::Status Readout(const ReadoutArgs& args, const OpContext& context) {
  if (args.rows < 0 || args.vocabulary < 1 || args.vocabulary > kMaxReadoutVocabulary) {
    return absl::InvalidArgumentError(absl::StrCat("readout over ", args.rows, " rows of ", args.vocabulary,
                                                   " logits, want at least 0 rows and 1 to ",
                                                   kMaxReadoutVocabulary, " logits"));
  }
  if (args.logits_stride < args.vocabulary) {
    return absl::InvalidArgumentError(absl::StrCat("readout has rows ", args.logits_stride,
                                                   " logits apart, want at least the ", args.vocabulary,
                                                   " of a row"));
  }
  RETURN_IF_ERROR(CheckKernels(context, {}));
  CUDA_DOOR(ReadoutCuda(args, context.stream));
  context.parallel_for(args.rows, GrainFor(kMinElements, args.vocabulary), [&](int64_t begin, int64_t end) {
    static thread_local Scratch scratch;
    for (int64_t row = begin; row < end; ++row) ReadoutRow(args, row, &scratch);
  });
  return absl::OkStatus();
}

double ReadoutUniform(uint64_t seed, int64_t counter) { return PhiloxUniform(seed, counter); }

}  // namespace deltanet
