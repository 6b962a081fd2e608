// On the CPU a row is read once for its largest logit and once for the sum of exponentials. `top`, top_k and
// top_p each find the edge of what they keep: a histogram over the leading bits of the ranks, then a partial
// sort of the one bin that the edge is in. Nothing but `top` ids is ever sorted.
#include "model/ops/readout.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numeric>
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
constexpr int64_t kBlock = 512;
// Leading bits of a rank's upper word (a sign, an exponent and two more), of which each has a bin.
constexpr int kBinBits = 11;
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// What a thread needs for its rows, kept for the next.
struct Scratch {
  std::vector<Rank> ranks;
  std::vector<double> bins;
  std::vector<float> terms;
};

// One row, all of whose logits are finite.
class FiniteRow {
 public:
  FiniteRow(const CpuKernels& kernels, int64_t W, const float* x, float max, Scratch* scratch)
      : kernels_(kernels), W_(W), x_(x), max_(max), sum_(Sum(1.0f, nullptr)), scratch_(*scratch) {}

  float LogProbability(int64_t id) const {
    return static_cast<float>(static_cast<double>(x_[id]) - max_ - std::log(sum_));
  }

  // The `top` most likely ids, most likely first; 1 <= top <= W.
  void Top(int64_t top, int32_t* ids, float* log_probs) {
    const Rank edge = Edge(nullptr, 0, top);
    std::vector<Rank>& ranks = scratch_.ranks;
    ranks.clear();
    const float bar = x_[IdOf(edge)];
    for (int64_t i = 0; i < W_; ++i) {
      if (x_[i] >= bar && RankAt(i) <= edge) ranks.push_back(RankAt(i));
    }
    std::sort(ranks.begin(), ranks.end());
    for (int64_t i = 0; i < top; ++i) {
      ids[i] = IdOf(ranks[i]);
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
  // The sum of exp((x - max) * inverse), and its terms, unless null.
  double Sum(float inverse, float* terms) const {
    double sum = 0;
    for (int64_t i = 0; i < W_; i += kBlock) {
      sum += kernels_.sum_of_exp(std::min(kBlock, W_ - i), x_ + i, max_, inverse,
                                 terms != nullptr ? terms + i : nullptr);
    }
    return sum;
  }

  Rank RankAt(int64_t id) const { return RankOf(x_[id], static_cast<uint32_t>(id)); }

  // The rank of the id with which the values, summed in the order of ranks, reach `part` of their sum;
  // without values, of the count-th id. 0 < part < 1; 1 <= count <= W.
  Rank Edge(const float* values, double part, int64_t count) {
    constexpr int kShift = 64 - kBinBits;
    std::vector<double>& bins = scratch_.bins;
    bins.assign(size_t{1} << kBinBits, 0.0);
    for (int64_t i = 0; i < W_; ++i) bins[RankAt(i) >> kShift] += values != nullptr ? values[i] : 1.0;
    const double enough = values != nullptr ? part * std::accumulate(bins.begin(), bins.end(), 0.0)
                                            : static_cast<double>(count);
    Rank bin = 0;
    double before = 0;
    while (bin + 1 < bins.size() && before + bins[bin] < enough) before += bins[bin++];
    std::vector<Rank>& ranks = scratch_.ranks;
    ranks.clear();
    for (int64_t i = 0; i < W_; ++i) {
      if (RankAt(i) >> kShift == bin) ranks.push_back(RankAt(i));
    }
    // With the first `under` of the bin the sum does not reach `enough`, with the first `over` it does.
    const auto first = ranks.begin();
    int64_t under = 0, over = static_cast<int64_t>(ranks.size());
    while (over - under > 1) {
      const int64_t middle = under + (over - under) / 2;
      std::nth_element(first + under, first + middle, first + over);
      double sum = before;
      for (int64_t i = under; i < middle; ++i) sum += values != nullptr ? values[IdOf(first[i])] : 1.0;
      if (sum >= enough) {
        over = middle;
      } else {
        under = middle;
        before = sum;
      }
    }
    return ranks[under];
  }

  // Makes the terms of all ids beyond `edge` zero.
  void CutTerms(Rank edge) {
    const float bar = x_[IdOf(edge)];
    const int32_t last = IdOf(edge);
    float* const terms = scratch_.terms.data();
    for (int32_t i = 0; i < W_; ++i) {
      const bool kept = (x_[i] > bar) | ((x_[i] == bar) & (i <= last));
      terms[i] = kept ? terms[i] : 0.0f;
    }
  }

  int32_t SampleOfAll(float inverse, double u) const {
    float terms[kBlock];
    return FirstPast(u * (inverse == 1 ? sum_ : Sum(inverse, nullptr)), [&](int64_t begin, int64_t width) {
      return Block{terms, kernels_.sum_of_exp(width, x_ + begin, max_, inverse, terms)};
    });
  }

  int32_t SampleOfSome(const ReadoutRequest& request, bool of_k, bool of_p, float inverse, double u) {
    scratch_.terms.resize(W_);
    const float* const terms = scratch_.terms.data();
    Sum(inverse, scratch_.terms.data());
    if (of_k) CutTerms(Edge(nullptr, 0, request.top_k));
    if (of_p) CutTerms(Edge(terms, request.top_p, 0));
    const auto block = [&](int64_t begin, int64_t width) {
      return Block{terms + begin, SumOf(terms + begin, width)};
    };
    double sum = 0;
    for (int64_t i = 0; i < W_; i += kBlock) sum += block(i, std::min(kBlock, W_ - i)).sum;
    return FirstPast(u * sum, block);
  }

  // Terms that follow each other, and their sum.
  struct Block {
    const float* terms;
    double sum;
  };

  static double SumOf(const float* terms, int64_t width) {
    double sums[4] = {};  // No addition waits for the one before.
    int64_t i = 0;
    for (; i + 4 <= width; i += 4) {
      for (int64_t j = 0; j < 4; ++j) sums[j] += terms[i + j];
    }
    for (; i < width; ++i) sums[0] += terms[i];
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
  }

  // The first id with whose term the sum exceeds `pass`, which is less than the sum of all; block_at(first
  // id, width) is the Block of at most kBlock terms there.
  template <typename BlockAt>
  int32_t FirstPast(double pass, BlockAt block_at) const {
    double before = 0;
    for (int64_t begin = 0; begin < W_; begin += kBlock) {
      const int64_t width = std::min(kBlock, W_ - begin);
      const Block block = block_at(begin, width);
      if (before + block.sum <= pass) {
        before += block.sum;
        continue;
      }
      int64_t i = 0;
      for (; i < width; ++i) {
        before += block.terms[i];
        if (before > pass) break;
      }
      if (i == width) --i;  // The block's sum was larger by a rounding: the last that has a term.
      while (i > 0 && block.terms[i] == 0) --i;
      return static_cast<int32_t>(begin + i);
    }
    return 0;  // Not reached.
  }

  const CpuKernels& kernels_;
  const int64_t W_;
  const float* const x_;
  const float max_;
  const double sum_;
  Scratch& scratch_;
};

void ReadoutRow(const CpuKernels& kernels, const ReadoutArgs& args, int64_t row, Scratch* scratch) {
  const ReadoutRequest& request = args.requests[row];
  const bool samples = request.target < 0 && request.sample != 0;
  int32_t* const top_ids = args.top_ids + row * kMaxTopTokens;
  float* const top_log_probs = args.top_log_probs + row * kMaxTopTokens;
  args.ids[row] = std::max(request.target, -1);
  args.log_probs[row] = 0.0f;
  if (request.target < 0 && !samples && request.top == 0) return;
  const int64_t W = args.vocabulary, top = std::min<int64_t>(request.top, W);
  const float* const x = args.logits + row * args.logits_stride;
  const float max = kernels.largest(W, x);
  if (std::isnan(max)) {
    if (samples) args.ids[row] = 0;
    args.log_probs[row] = kNaN;
    for (int64_t i = 0; i < top; ++i) {
      top_ids[i] = static_cast<int32_t>(i);
      top_log_probs[i] = kNaN;
    }
  } else {
    FiniteRow finite(kernels, W, x, max, scratch);
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
  const CpuKernels& kernels = ActiveCpuKernels();
  context.parallel_for(args.rows, GrainFor(kMinElements, args.vocabulary), [&](int64_t begin, int64_t end) {
    static thread_local Scratch scratch;
    for (int64_t row = begin; row < end; ++row) ReadoutRow(kernels, args, row, &scratch);
  });
  return absl::OkStatus();
}

double ReadoutUniform(uint64_t seed, int64_t counter) { return PhiloxUniform(seed, counter); }

}  // namespace deltanet
