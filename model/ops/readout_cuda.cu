// Scores, most likely and sampled ids on a GPU: a block of 512 threads a row, thread t on logits t, t + 512,
// ..., or on four of them at a time where rows are aligned. A row that asks for nothing costs nothing. The
// others walk over their 4W bytes, for
//
//   the largest logit and whether all are finite, the sum of exponentials     2 times
//   top > 1                                                                   4: three digits, and to gather
//   top_k                                                                     3: three digits
//   top_p                                                                     4: the mass, three digits
//   an edge of either among equal logits                                      1 and 1/16
//   temperature > 0                                                           1 and 1/16
//
// of which only the first needs the memory (or the L2, where the matrix product left them): the L1 of an SM
// with one such block holds rows of some 50,000. So 256 rows of 32000 have a floor of 33 MB, 10 us at 3.3
// TB/s; a walk with exponentials takes about 25 instructions a logit, 4 us a row where an SM has two rows.
//
// On an H200 (27 November 2026), 32000 normal logits a row that are in the L2, us (ops_cuda_bench), and ncu's
// with cold caches, with its share of the memory's peak:
//
//                           64 rows                   256 rows
//   the likeliest           10.2     10.5 at 16 %     15.1     17.6 at 39 %
//   sampled                 17.7     17.9     10      28.6     30.8     22
//   of the likeliest 50     26.4     27.2      6      42.8     45.1     15
//   of 0.9 of the mass      45.7     50.5      3      72.9     74.9      9
//   the likeliest 64        23.1     23.2      7      36.0     38.7     18
//
// With 64 rows half of the multiprocessors have nothing to do, and the others one block, which issues in 40
// to 54 % of the cycles: a walk ends with a barrier, and a sum or a count over the block. With 256 rows two
// blocks make it 45 to 66 %. The product before this takes 35 us or more.
//
// Selection is by radix: a walk counts, in shared memory, the logits (top, top_k) or adds up their masses
// (top_p) for each value of the next 11 bits of their rank's upper word among those that agree with the edge
// so far. The edge is then at most one logit's bits, and of the ids that have these the lowest are kept.
//
// A mass is a probability times a common factor as an integer: sums do not depend on their order, so neither
// atomics nor the place of a row in the grid can change a result. With 2^40 for the most likely id, what is
// rounded away is at most W 2^-41 of the total.
#include <cstdint>

#include "model/ops/cuda_kernels.h"
#include "model/ops/cuda_util.cuh"
#include "model/ops/cuda_vector.cuh"
#include "model/ops/philox.h"
#include "model/ops/readout_rank.h"

namespace deltanet {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr uint32_t kAllLanes = 0xffffffffu;
constexpr int kDigitBits = 11;
constexpr int kBins = 1 << kDigitBits;
constexpr int kThreadBins = kBins / kThreads;
constexpr float kUnitMass = 0x1p40f;  // Times kMaxReadoutVocabulary it fits in 64 bits.
constexpr Rank kLastRank = ~Rank{0};

struct Shared {
  uint32_t low[kBins], high[kBins];  // Halves of each bin's sum.
  uint64_t words[kWarps];
  double sums[kWarps];
  uint32_t bin;     // The bin that the edge is in,
  uint64_t before;  // the sum of those before it,
  uint64_t within;  // and its own.
  Rank top[kMaxTopTokens];
  uint32_t top_count;
};

// `combine` over the block's threads, in all of them. It must not matter which of two comes first.
template <typename T, typename Combine>
__device__ T BlockReduce(T value, Combine combine, T* scratch) {
  for (int offset = 16; offset > 0; offset >>= 1) {
    value = combine(value, __shfl_xor_sync(kAllLanes, value, offset));
  }
  __syncthreads();  // The scratch may still be read from before.
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  value = scratch[threadIdx.x % kWarps];
  for (int offset = kWarps / 2; offset > 0; offset >>= 1) {
    value = combine(value, __shfl_xor_sync(kAllLanes, value, offset));
  }
  return value;
}

__device__ inline uint64_t WarpInclusiveSum(uint64_t value) {
  for (int offset = 1; offset < 32; offset <<= 1) {
    const uint64_t before = __shfl_up_sync(kAllLanes, value, offset);
    if (static_cast<int>(threadIdx.x % 32) >= offset) value += before;
  }
  return value;
}

// One row, as the threads of its block see it: all of them call the same functions in the same order.
class Row {
 public:
  // If `vectors`, logits begins at a multiple of 16 bytes, and W is a multiple of 4.
  __device__ Row(const float* logits, int32_t W, bool vectors, Shared* shared)
      : x_(logits), W_(W), vectors_(vectors), shared_(*shared) {}

  // False if a logit is NaN or infinite. Before all others.
  __device__ bool FindLargest() {
    Rank best = kLastRank;
    float check = 0;
    ForEach([&](int32_t i, float x) {
      const Rank rank = RankOf(x, i);
      if (rank < best) best = rank;
      check += x * 0.0f;
    });
    best = BlockReduce(best, [](Rank a, Rank b) { return a < b ? a : b; }, shared_.words);
    best_ = IdOf(best);
    if (__syncthreads_or(!(check == 0.0f))) return false;
    max_ = x_[best_];
    return true;
  }

  __device__ void FindLogSum() {
    double sum = 0;
    ForEach([&](int32_t, float x) { sum += expf(x - max_); });
    log_sum_ = log(BlockReduce(sum, [](double a, double b) { return a + b; }, shared_.sums));
  }

  __device__ float LogProbability(int32_t id) const {
    return static_cast<float>(static_cast<double>(x_[id]) - max_ - log_sum_);
  }

  // The `top` most likely ids, most likely first; 1 <= top <= W.
  __device__ void Top(int32_t top, int32_t* ids, float* log_probs) {
    if (top == 1) {
      if (threadIdx.x == 0) {
        ids[0] = best_;
        log_probs[0] = LogProbability(best_);
      }
      return;
    }
    const Rank edge = top < W_ ? EdgeOfCount(top) : kLastRank;
    if (threadIdx.x == 0) shared_.top_count = 0;
    __syncthreads();
    ForEach([&](int32_t i, float x) {
      const Rank rank = RankOf(x, i);
      if (rank > edge) return;
      const uint32_t place = atomicAdd(&shared_.top_count, 1u);
      if (place < kMaxTopTokens) shared_.top[place] = rank;
    });
    __syncthreads();
    if (threadIdx.x >= top) return;
    const Rank rank = shared_.top[threadIdx.x];
    int place = 0;
    for (int i = 0; i < top; ++i) place += shared_.top[i] < rank;
    ids[place] = IdOf(rank);
    log_probs[place] = LogProbability(IdOf(rank));
  }

  __device__ int32_t Sample(const ReadoutRequest& request) {
    if (request.temperature == 0.0f || request.top_k == 1) return best_;
    inverse_temperature_ = fminf(1.0f / request.temperature, 3.402823466e38f);
    Rank edge = kLastRank;
    if (request.top_k > 0 && request.top_k < W_) edge = EdgeOfCount(request.top_k);
    if (request.top_p < 1.0f) edge = EdgeOfMass(request.top_p, edge);
    // u is a multiple of 2^-32.
    const uint64_t u = static_cast<uint64_t>(PhiloxUniform(request.seed, request.counter) * 0x1p32);
    return FirstPast([&](int32_t i, float x) { return RankOf(x, i) <= edge ? Mass(x) : 0; },
                     [&](uint64_t sum) { return __umul64hi(sum, u << 32); });
  }

 private:
  template <typename Body>
  __device__ void ForEach(Body body) const {
    if (!vectors_) {
#pragma unroll 4
      for (int32_t i = threadIdx.x; i < W_; i += kThreads) body(i, x_[i]);
      return;
    }
#pragma unroll 4
    for (int32_t i = 4 * threadIdx.x; i < W_; i += 4 * kThreads) {
      const float4 x = *reinterpret_cast<const float4*>(x_ + i);
      body(i, x.x);
      body(i + 1, x.y);
      body(i + 2, x.z);
      body(i + 3, x.w);
    }
  }

  // Of p_T, to a factor that the row's ids share.
  __device__ uint64_t Mass(float x) const {
    return __float2ull_rn(expf((x - max_) * inverse_temperature_) * kUnitMass);
  }

  // The rank of the count-th most likely id; 1 <= count < W.
  __device__ Rank EdgeOfCount(int32_t count) {
    return Edge<true>(count, [](int32_t, float) { return uint64_t{1}; });
  }

  // The rank of the last of the most likely ids that make up top_p of the mass of those up to `last`.
  __device__ Rank EdgeOfMass(float top_p, Rank last) {
    const auto mass = [&](int32_t i, float x) { return RankOf(x, i) <= last ? Mass(x) : 0; };
    uint64_t sum = 0;
    ForEach([&](int32_t i, float x) { sum += mass(i, x); });
    sum = BlockReduce(sum, [](uint64_t a, uint64_t b) { return a + b; }, shared_.words);
    uint64_t enough = static_cast<uint64_t>(ceil(static_cast<double>(top_p) * static_cast<double>(sum)));
    enough = enough < 1 ? 1 : enough > sum ? sum : enough;
    const Rank edge = Edge<false>(enough, mass);
    return edge < last ? edge : last;
  }

  // The first rank (perhaps with a larger id than any that has its logit) at which weight(id, logit), summed
  // in the order of ranks, reaches `enough`: at least 1, at most the sum of all. Weights of equal logits are
  // equal or zero; kCounts: all are 1.
  template <bool kCounts, typename Weight>
  __device__ Rank Edge(uint64_t enough, Weight weight) {
    uint32_t word = 0;   // The edge's, as far as it is known:
    uint32_t known = 0;  // these bits.
    for (int shift = 32 - kDigitBits; known != ~0u; shift = shift > kDigitBits ? shift - kDigitBits : 0) {
      for (int bin = threadIdx.x; bin < kBins; bin += kThreads) shared_.low[bin] = shared_.high[bin] = 0;
      __syncthreads();
      ForEach([&](int32_t i, float x) {
        const uint32_t its_word = RankWordOf(x);
        if ((its_word & known) != word) return;
        const uint32_t bin = (its_word >> shift) % kBins;
        if constexpr (kCounts) {
          atomicAdd(&shared_.low[bin], 1u);
        } else {
          const uint64_t added = weight(i, x);
          if (added == 0) return;
          const uint32_t low = static_cast<uint32_t>(added);
          const uint32_t carry = atomicAdd(&shared_.low[bin], low) + low < low ? 1 : 0;
          const uint32_t high = static_cast<uint32_t>(added >> 32) + carry;
          if (high != 0) atomicAdd(&shared_.high[bin], high);
        }
      });
      __syncthreads();
      FindBin(enough);
      // Where the last digit has fewer bits, the others are known already, and the same in every bin in use.
      word |= shared_.bin << shift;
      known |= static_cast<uint32_t>(kBins - 1) << shift;
      enough -= shared_.before;
    }
    const uint64_t one = kCounts ? 1 : Mass(LogitOfWord(word));
    const uint64_t equals = shared_.within / one, kept = (enough + one - 1) / one;
    if (kept >= equals) return RankOf(word, ~0u);
    const int32_t id = FirstPast(
        [&](int32_t i, float x) {
          return RankWordOf(x) == word && weight(i, x) != 0 ? uint64_t{1} : uint64_t{0};
        },
        [&](uint64_t) { return kept - 1; });
    return RankOf(word, id);
  }

  // Finds the bin with which the sum of the bins reaches `enough`.
  __device__ void FindBin(uint64_t enough) {
    uint64_t own[kThreadBins], sum = 0;
    for (int j = 0; j < kThreadBins; ++j) {
      const int bin = threadIdx.x * kThreadBins + j;
      own[j] = static_cast<uint64_t>(shared_.high[bin]) << 32 | shared_.low[bin];
      sum += own[j];
    }
    const uint64_t through = WarpInclusiveSum(sum);
    if (threadIdx.x % 32 == 31) shared_.words[threadIdx.x / 32] = through;
    __syncthreads();
    uint64_t before = through - sum;
    for (int warp = 0; warp < threadIdx.x / 32; ++warp) before += shared_.words[warp];
    if (before < enough && enough <= before + sum) {
      int j = 0;
      for (; before + own[j] < enough; ++j) before += own[j];
      shared_.bin = threadIdx.x * kThreadBins + j;
      shared_.before = before;
      shared_.within = own[j];
    }
    __syncthreads();
  }

  // The first id with which the sum of weight(id, logit) exceeds pass_of(the sum of all), which is less than
  // that. Each warp adds up a piece of the row; the piece in which the sum passes is cut again.
  template <typename Weight, typename PassOf>
  __device__ int32_t FirstPast(Weight weight, PassOf pass_of) {
    const int32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const auto weight_at = [&](int32_t i) { return weight(i, x_[i]); };
    int32_t begin = 0, end = W_;
    uint64_t pass = 0;
    bool first = true;
    for (int32_t piece = end; piece > 32;) {
      piece = ((end - begin + kWarps - 1) / kWarps + 31) / 32 * 32;
      const int32_t piece_begin = begin + warp * piece;
      const int32_t piece_end = piece_begin + piece < end ? piece_begin + piece : end;
      uint64_t sum = 0;
#pragma unroll 4
      for (int32_t i = piece_begin + lane; i < piece_end; i += 32) sum += weight_at(i);
      for (int offset = 16; offset > 0; offset >>= 1) sum += __shfl_xor_sync(kAllLanes, sum, offset);
      __syncthreads();
      if (lane == 0) shared_.words[warp] = sum;
      __syncthreads();
      if (first) {
        uint64_t all = 0;
        for (int i = 0; i < kWarps; ++i) all += shared_.words[i];
        pass = pass_of(all);
        first = false;
      }
      int32_t here = 0;
      while (begin + (here + 1) * piece < end && shared_.words[here] <= pass) pass -= shared_.words[here++];
      begin += here * piece;
      end = begin + piece < end ? begin + piece : end;
    }
    // At most 32 are left, which every warp looks at.
    const uint64_t own = begin + lane < end ? weight_at(begin + lane) : 0;
    const uint64_t through = WarpInclusiveSum(own);
    if (first) pass = pass_of(__shfl_sync(kAllLanes, through, 31));
    const uint32_t past = __ballot_sync(kAllLanes, own != 0 && through > pass);
    return past != 0 ? begin + __ffs(past) - 1 : begin;
  }

  const float* const x_;
  const int32_t W_;
  const bool vectors_;
  Shared& shared_;
  int32_t best_ = 0;
  float max_ = 0;
  double log_sum_ = 0;
  float inverse_temperature_ = 0;
};

__global__ void __launch_bounds__(kThreads) ReadoutKernel(ReadoutArgs args, bool vectors) {
  __shared__ Shared shared;
  const int64_t m = blockIdx.x;
  const int32_t W = static_cast<int32_t>(args.vocabulary);
  const ReadoutRequest request = args.requests[m];
  const bool samples = request.target < 0 && request.sample != 0;
  int32_t id = request.target < 0 ? -1 : request.target;
  float log_prob = 0.0f;
  if (id >= 0 || samples || request.top > 0) {
    int32_t* const top_ids = args.top_ids + m * kMaxTopTokens;
    float* const top_log_probs = args.top_log_probs + m * kMaxTopTokens;
    const int32_t top = request.top < W ? request.top : W;
    Row row(args.logits + m * args.logits_stride, W, vectors, &shared);
    if (row.FindLargest()) {
      row.FindLogSum();
      if (top > 0) row.Top(top, top_ids, top_log_probs);
      if (samples) id = row.Sample(request);
      if (id >= 0) log_prob = row.LogProbability(id);
    } else {
      if (samples) id = 0;
      log_prob = __int_as_float(0x7fffffff);
      if (threadIdx.x < top) {
        top_ids[threadIdx.x] = threadIdx.x;
        top_log_probs[threadIdx.x] = log_prob;
      }
    }
    if (threadIdx.x >= top && threadIdx.x < request.top) {
      top_ids[threadIdx.x] = -1;
      top_log_probs[threadIdx.x] = 0.0f;
    }
  }
  if (threadIdx.x != 0) return;
  args.ids[m] = id;
  args.log_probs[m] = log_prob;
  if (samples && request.sampled_slot >= 0) {
    *reinterpret_cast<int32_t*>(args.sampled.at(request.sampled_slot)) = id;
  }
}

}  // namespace

absl::Status ReadoutCuda(const ReadoutArgs& args, void* stream) {
  if (args.rows == 0) return absl::OkStatus();
  const bool vectors = args.vocabulary % 4 == 0 && args.logits_stride % 4 == 0 && Aligned16({args.logits});
  ReadoutKernel<<<args.rows, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(args, vectors);
  return LaunchStatus("ReadoutKernel");
}

}  // namespace deltanet
