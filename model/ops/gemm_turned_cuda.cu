// Products of 33 to 128 rows in bfloat16 on Hopper, for steps that read each weight once for as many tokens,
// with what surrounds them in a layer (FusedGemmArgs): a [m, k] b^T, b [n, k]. Those of fewer rows, and what
// the two have in common, are in gemm_skinny_cuda.cu.
//
// Tiling: here the tokens are the operand with the product's 64 rows (or twice 64), and the rows of b are its
// columns, so that a tile may have any multiple of 8 of them. For each 64 tokens a warpgroup multiplies, with
// all rows of the tile. One thread of a further warp queues the copies of b and one of the next warp those of
// a, in steps of 64 elements of k, into two rings in shared memory, at most 113 KiB together, so that the
// next kernel's block fits a multiprocessor beside. Of b no more than some 50 KiB are on their way, since the
// tokens queue behind them. Two, four or eight blocks may share a tile, each a part of k; they are a cluster:
// each leaves its sums in its shared memory, and each adds up a part of the tokens, of all blocks in the
// order of the parts. So there are no atomics and no workspace, and the same operands give the same bits.
//
//   then         rows of a tile        n, k of the 1.3B model    tiles x parts of k
//   kStore       96, or 128            6160, 2048                65 x 2
//                                      32000, 2048               250 x 1 (of 128 rows)
//   kGate        44 of each half       11264, 2048               128 x 1
//   kAdd         64                    2048, 2048 and 5632       32 x 4
//
// TilingOf chooses: the fewest bytes of b on the busiest multiprocessor, and of those the fewest blocks,
// which leave the next kernel's room. Two tiles of 64 rows make one sum of squares (kSquaresOf), so their
// blocks are one cluster, of eight, each of which has 128 columns of its tokens.
//
// The kernel begins while the one before it still runs (LaunchOverlapping): the ring is filled with b, which
// is constant; then it waits for its tokens. It lets the next one begin some steps before it has asked for
// all of b (StepsLeft).
//
// Bytes: 2 n k of b, and 2 m k of a for each tile, out of the L2: with 64 tokens as much again as two thirds
// of b (a tile of 96 rows). On an H200 (28 November 2026, one run), products in a row that begin while the
// one before ends, each of another matrix, with what surrounds them in a layer, in us, against b at 4.25
// TB/s; before is as they were that morning (two warpgroups for a tile's rows, the gate in 118 x 2 tiles of
// 48 rows of each half, the next kernel let begin four steps before the end, and the pause that is told of
// below):
//
//                                 m = 64          128
//   n, k, then         floor   before now     before now
//   6160, 2048           5.9     8.7  8.4      11.3 11.1
//   2048, 2048, add      2.0     5.2  4.9       7.5  7.3
//   11264, 2048, gate   10.9    14.6 14.1      18.1 18.0
//   2048, 5632, add      5.4     9.9 10.1      13.0 12.9
//   these four in turn  24.2    40.2 36.8      53.6 52.3
//   32000, 2048         30.8    34.5 34.3      38.8 39.1
//
// What gained, with 64 tokens (the four in turn, and the 1.3B model's step):
//   The norm's factors are found by a warp that copies nothing. The one that copies the tokens did it after
//   ten steps of them, and those behind came 1 us late. With it, all of a tile's rows by one warpgroup,
//   addresses added up instead of divided for (RingPlace), and those that the sums are fetched from found
//   before they are waited for: 38.1, and 1.92 instead of 1.945 ms.
//   The gate's tiles with all of k, one block a multiprocessor, so that the next kernel's ring is filled
//   meanwhile: 36.4, 1.89.
//   The next kernel let begin 8 steps before the end by those that add, 6 by the gate, instead of 4: 36.4,
//   1.86; alone each takes up to 0.8 us more. The first line's wants 4 (9.2 with 6).
//   Before: tiles that leave every multiprocessor as much (the first line, 9.9); five steps of tokens in the
//   ring instead of four (8.6).
// That two tiles are one cluster takes 0.3 us of each product that adds: sums of the squares of 64 columns
// would save them, and cost 0.3 to 1 us of the four with 1 and 16 tokens, which read twice as many sums. Rows
// of a that are not there are not copied: boxes that reach beyond a matrix are slow (18.7 us instead of 12.4
// for the fourth line with 96 tokens).
//
// Where the four in turn spend their time, by the device's clock (the same day; us from when a block may read
// its tokens, the middle one of its blocks and the last):
//
//                     first tokens    last operands   cluster met    stored         ended
//   q, k, v, beta       0.5  0.8        5.6  6.1        6.1  6.7       7.2  7.7       7.9   8.5
//   out                 0.5  0.8        2.1  2.3        2.6  2.6       3.1  4.1       4.1   4.6
//   gate and up         0.5  0.8       11.5 12.5       12.0 13.1      12.8 13.8      12.8  13.8
//   down                0.8  0.8        5.4  6.1        5.9  6.9       6.7  8.2       7.4   8.7
//
// In out all of b is there before the tokens: what it takes is two turns of tokens through the ring, sums
// exchanged, stored, and waited for (the last column, which the gate without a cluster has not). The gate's b
// comes at 3.4 TB/s while the tokens come out of the L2 beside; its blocks end 2 us apart. From one kernel's
// end until the next one may read its tokens it takes 0.2 to 0.4 us more. In a step of 64, a layer (1.94 ms,
// that morning): q, k, v, beta 9.1, mixer 36.2, out 6, gate and up 17.2, down 9.4.
//
// Tried and no gain. This way, with 64 tokens (the four in turn 36.4 to 38.5):
//   products of a step pending while the next begin; 36, 60 or 72 KiB of b on their way; q, k, v, beta by
//   tiles of 48 rows with all of k (alone 7.8 instead of 8.4, the model's step 2 % slower); 129 KiB for the
//   gate and the first line beside 97 for those that add (40.5: the next one's block does not fit any more).
// With the gate that way, but the pause still there (39.1): tokens copied by threads (43), or to two blocks
// of a cluster at once (39.1); and with it as it was (40.4), steps of k in another order for each tile (40.8
// to 41.4). As it was that morning or before (39.6 to 40.5 us; the step 1.94 to 1.96 ms):
//   tiles of 48, 64, 112, 128, 176 or 192 rows for the first and third line; the fourth as 16 x 8 of 128
//   rows; three blocks of 75 KiB a multiprocessor (42.0); 84 instead of 113 KiB for any of the four, so that
//   two blocks of the mixer fit beside (1.97 to 2.01); one or two more steps of tokens in the ring and as
//   much less of b (1.96, 2.01). The memory used while a block waits for its tokens: with 2, 4 or 8 steps of
//   b beyond the ring brought into the L2, then or all along, the step took as long or 1 % less at best, and
//   more with the mixer's next states or o_proj's matrix (2.00 to 2.04). The cluster's blocks telling each
//   other that they have read the sums before they store what becomes of them, instead of behind (on an
//   H100 2.41 instead of 2.48 ms; racecheck then reports hazards, by their number of the factors, which were
//   read between the barrier's two halves). One kernel for out, gate and up, down and the next layer's q, k,
//   v, beta, with one ring of 135 KiB of b that runs on over the products, and counters in memory between
//   them: clusters of four with a block a multiprocessor, of which 30 fit. 43 to 45 us; the step of 1, 16,
//   64 1.14, 1.39, 2.07 ms (0.85, 1.13, 1.94): between two products lie 5.2 to 6.7 us (sums exchanged 0.5
//   to 1.9, stored 1.3 to 3.5, the counter raised 0.5 to 1.4 and seen 0.6, tokens there 0.5), more than the
//   ring bridges, and the mixer's blocks do not fit beside it.
#include <algorithm>
#include <cstdint>

#include "model/base/status_macros.h"
#include "model/ops/cuda_kernels.h"
#include "model/ops/cuda_sm90.cuh"
#include "model/ops/cuda_tile_map.cuh"
#include "model/ops/cuda_util.cuh"
#include "model/ops/cuda_vector.cuh"
#include "model/ops/gemm_skinny_cuda.cuh"

namespace deltanet {
namespace {

constexpr int kStep = kSkinnyStep;
constexpr int kMostBlocks = 8;  // Of a cluster.
// Two warpgroups: each multiplies 64 tokens, and of 64 tokens the second finds the factors. Both add up what
// the cluster's blocks have left.
constexpr int kMultiplying = 256;
constexpr int kCopierOfRows = kMultiplying / 32, kCopierOfTokens = kCopierOfRows + 1;  // Warps.
constexpr int kThreads = kMultiplying + 64;

using Then = FusedGemmArgs::Then;

struct Problem : SkinnyProblem {
  using SkinnyProblem::SkinnyProblem;
  int parts;  // Of k, a block each.
};

// Steps of b that a block has yet to ask for when it lets the next kernel begin.
constexpr int StepsLeft(int tokens, Then then) {
  return tokens > 64 ? 2 : then == Then::kAdd ? 8 : then == Then::kGate ? 6 : 4;
}

// Tiles of a cluster.
constexpr int TilesOfCluster(Then then, int rows) {
  return then == Then::kAdd ? static_cast<int>(kSquaresOf) / rows : 1;
}

template <int kTokens, int kRows>
struct Layout {
  static constexpr int kRowsBytes = kRows * kStep * 2, kTokensBytes = kTokens * kStep * 2;
  static constexpr int kFactorsBytes = 4 * kTokens, kBarriersBytes = 512;
  static constexpr int kTokenStages = kTokens == 64 ? 8 - (kRows + 31) / 32 : 5 - (kRows + 63) / 64;
  static constexpr int kRowStages =
      (113 * 1024 - kFactorsBytes - kBarriersBytes - kTokenStages * kTokensBytes) / kRowsBytes;
  // Steps of b on their way, at most.
  static constexpr int kAtFirst = (39 * 1024 + kRowsBytes / 2) / kRowsBytes;
  static constexpr int kOnTheirWay = (50 * 1024 + kRowsBytes / 2) / kRowsBytes;
  static constexpr int kTokensAt = kRowStages * kRowsBytes;
  static constexpr int kFactors = kTokensAt + kTokenStages * kTokensBytes;  // [kTokens] Floats.
  static constexpr int kBarriers = kFactors + kFactorsBytes;
  static constexpr int kBytes = kBarriers + kBarriersBytes;
  static constexpr int kSlotBarriers = 16, kToFree = 8;  // That a slot's copy is there, that it is free.
  static constexpr int kTokenSlot = kTokensBytes;
  static constexpr int kPitch = kRows | 8;  // Floats of a token's sums: stores of 8 bytes meet in no bank.
  static_assert(kRowsBytes % 1024 == 0 && kPitch % 16 == 8);
  static_assert(kTokens * kPitch * 4 <= kFactors, "the sums take the rings' place");
  static_assert(kSlotBarriers * (kRowStages + kTokenStages) <= kBarriersBytes);
  static_assert(kAtFirst <= kRowStages && kOnTheirWay <= kRowStages);

  __device__ static uint32_t Rows(uint32_t base, int slot) { return base + slot * kRowsBytes; }
  __device__ static uint32_t Tokens(uint32_t base, int slot) {
    return base + kTokensAt + slot * kTokensBytes;
  }
  __device__ static uint32_t RowsThere(uint32_t base, int slot) {
    return base + kBarriers + kSlotBarriers * slot;
  }
  __device__ static uint32_t RowsFree(uint32_t base, int slot) { return RowsThere(base, slot) + kToFree; }
  __device__ static uint32_t TokensThere(uint32_t base, int slot) {
    return RowsThere(base, kRowStages + slot);
  }
  __device__ static uint32_t TokensFree(uint32_t base, int slot) { return TokensThere(base, slot) + kToFree; }
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// By one thread: b's part in steps [first, first + steps) of tile `tile` into its ring.
template <int kTokens, int kRows, Then kThen>
__device__ inline void ProduceRows(const CUtensorMap* rows, const Problem& problem, uint32_t base, int tile,
                                   int first, int steps) {
  using L = Layout<kTokens, kRows>;
  constexpr bool kGated = kThen == Then::kGate;
  const int row = tile * (kGated ? kRows / 2 : kRows);
  RingPlace<L::kRowStages, L::kSlotBarriers, L::kRowsBytes> place{L::RowsThere(base, 0), L::Rows(base, 0)},
      landed = place;
  constexpr int kMore = L::kRowStages + L::kOnTheirWay - L::kAtFirst;  // Steps until then await no landing.
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    if (step >= L::kAtFirst && (step < L::kRowStages || step >= kMore)) {
      BarrierWait(landed.barrier, landed.parity);
      landed.Next();
    }
    const int k = (first + step) * kStep;
    BarrierWait(place.barrier + L::kToFree, place.parity ^ 1);
    BarrierArriveExpecting(place.barrier, L::kRowsBytes);
    if constexpr (kGated) {
      CopyBox(place.at, rows, k, row, /*z=*/0, place.barrier);  // Of both halves.
    } else {
      CopyBox(place.at, rows, k, row, place.barrier);
    }
    place.Next();
    if (steps - step - 1 == StepsLeft(kTokens, kThen)) LetNextBegin();
  }
}

// By warpgroup `group`: the sums of its 64 tokens over the block's steps, into shared memory, [token, row],
// in the rings' place.
template <int kTokens, int kRows>
__device__ inline void Multiply(uint32_t base, float* sums_of_block, int group, int steps) {
  using L = Layout<kTokens, kRows>;
  const int thread = threadIdx.x % 128, lane = thread % 32;
  float sums[kRows / 2];
  RingPlace<L::kRowStages, L::kSlotBarriers, L::kRowsBytes / 16> rows{L::RowsThere(base, 0),
                                                                      TileByRows(L::Rows(base, 0))};
  RingPlace<L::kTokenStages, L::kSlotBarriers, L::kTokensBytes / 16> tokens{
      L::TokensThere(base, 0), TileByRows(L::Tokens(base, 0) + group * kTileBytes)};
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    BarrierWait(rows.barrier, rows.parity);
    BarrierWait(tokens.barrier, tokens.parity);
    AsyncProductsBegin();
#pragma unroll
    for (int i = 0; i < kStep / 16; ++i) {
      AsyncProductShared<kRows>(sums, Further(tokens.at, 32 * i), Further(rows.at, 32 * i),
                                step > 0 || i > 0);
    }
    AsyncProductsEnd();
    const uint32_t rows_there = rows.barrier, tokens_there = tokens.barrier;
    rows.Next();
    tokens.Next();
    AsyncProductsWait<0>();
    if (lane == 0) {
      BarrierArrive(rows_there + L::kToFree);
      BarrierArrive(tokens_there + L::kToFree);
    }
  }
  Pin(sums);
  NamedBarrier(1, 2 * kTokens);  // Other warps still read the rings.
  const int token = 64 * group + thread / 32 * 16 + lane / 4;
  float* const to = sums_of_block + token * L::kPitch + lane % 4 * 2;
#pragma unroll
  for (int i = 0; i < kRows / 8; ++i) {
    *reinterpret_cast<float2*>(to + 8 * i) = make_float2(sums[4 * i], sums[4 * i + 1]);
    *reinterpret_cast<float2*>(to + 8 * L::kPitch + 8 * i) = make_float2(sums[4 * i + 2], sums[4 * i + 3]);
  }
}

// By all threads of the block: what becomes of its part of the cluster's tokens, four columns of one at a
// time, when the cluster's blocks have left their sums. Where squares are added up, a warp has a token's 128
// columns.
template <int kTokens, int kRows, Then kThen, typename C, int kParts>
__device__ inline void Finish(const Problem& problem, uint32_t base, const unsigned char* memory, int cluster,
                              int rank) {
  using L = Layout<kTokens, kRows>;
  constexpr bool kGated = kThen == Then::kGate, kAdds = kThen == Then::kAdd;
  constexpr int kTiles = TilesOfCluster(kThen, kRows), kBlocks = kParts * kTiles, kShare = kTokens / kBlocks;
  constexpr int kHalves = kGated ? 2 : 1, kOfTile = kRows / kHalves;  // Columns of c.
  constexpr int kVectors = kTiles * kOfTile / 4, kItems = kShare * kVectors;
  constexpr int kOfThread = (kItems + kMultiplying - 1) / kMultiplying;
  // Of a thread at once: what it holds of them fits its registers.
  constexpr int kAtOnce = std::max(1, std::min(kOfThread, 12 / (kParts * kHalves)));
  static_assert(!kAdds || (kVectors == 32 && kAtOnce == kOfThread));
  const int thread = threadIdx.x, begin = rank * kShare, end = min(problem.m, begin + kShare);
  const int first_column = cluster * kTiles * kOfTile;
  const float* const factors = reinterpret_cast<const float*>(memory + L::kFactors);
  // Addresses, of a block alone in its own memory; found before the sums are there, of further passes later.
  uint32_t from[kAtOnce][kParts];
  const auto find = [&](int pass) {
#pragma unroll
    for (int t = 0; t < kAtOnce; ++t) {
      const int item = min(thread + (pass + t) * kMultiplying, kItems - 1);
      const int column = item % kVectors * 4, tile = column / kOfTile;
      const int place = (begin + item / kVectors) * L::kPitch + column % kOfTile;
#pragma unroll
      for (int r = 0; r < kParts; ++r) {
        from[t][r] = kBlocks == 1 ? 4 * place : InBlock(base + 4 * place, tile * kParts + r);
      }
    }
  };
  find(0);
  float x[kAtOnce][4] = {}, scale[4] = {};
  if constexpr (kAdds) {
    const int column = first_column + thread % kVectors * 4;
    const bool inside = thread < kMultiplying && column < problem.columns;
    if (problem.scale != nullptr && inside) Load<4>(problem.scale + column, scale);
    AwaitEarlier();
#pragma unroll
    for (int t = 0; t < kAtOnce; ++t) {
      const int token = begin + (thread + t * kMultiplying) / kVectors;
      if (inside && token < end) Load<4>(problem.x + int64_t{token} * problem.columns + column, x[t]);
    }
  }
  if (kBlocks == 1) {
    __syncthreads();
  } else {
    ClusterBarrierOfShared();
  }
  if (thread < kMultiplying) {
#pragma unroll 1
    for (int pass = 0; pass < kOfThread; pass += kAtOnce) {
      if (pass > 0) find(pass);
      float4 parts[kAtOnce][kHalves][kParts];
#pragma unroll
      for (int t = 0; t < kAtOnce; ++t) {
#pragma unroll
        for (int h = 0; h < kHalves; ++h) {
#pragma unroll
          for (int r = 0; r < kParts; ++r) {
            const uint32_t at = from[t][r] + 4 * h * kOfTile;
            parts[t][h][r] = kBlocks == 1 ? *reinterpret_cast<const float4*>(memory + at) : LoadFromBlock(at);
          }
        }
      }
#pragma unroll
      for (int t = 0; t < kAtOnce; ++t) {
        const int item = thread + (pass + t) * kMultiplying;
        const int token = begin + item / kVectors, column = first_column + item % kVectors * 4;
        if (item >= kItems || token >= end) break;
        const bool inside = column < problem.columns;
        const float factor = problem.squares != nullptr ? factors[token] : 1.0f;
        float sums[kHalves][4] = {};
#pragma unroll
        for (int h = 0; h < kHalves; ++h) {
#pragma unroll
          for (int r = 0; r < kParts; ++r) {
            sums[h][0] += parts[t][h][r].x, sums[h][1] += parts[t][h][r].y;
            sums[h][2] += parts[t][h][r].z, sums[h][3] += parts[t][h][r].w;
          }
#pragma unroll
          for (int j = 0; j < 4; ++j) sums[h][j] *= factor;
        }
        float (&sum)[4] = sums[0];
        C* const to = static_cast<C*>(problem.c) + token * problem.ldc + column;
        if constexpr (kThen == Then::kStore) {
          StoreSums(problem, sum, column, to);
        } else if constexpr (kGated) {
#pragma unroll
          for (int j = 0; j < 4; ++j) sum[j] = Gated<C>(problem.gate, sum[j], sums[1][j]);
          if (inside) Store<4>(sum, to);
        } else {
          AddSums(problem, sum, x[t], scale, token, cluster, SquaresWidth(problem.columns), column, to);
        }
      }
    }
  }
  if (kBlocks > 1) ClusterBarrier();  // The others still read this block's sums.
}

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

// A cluster's block of rank r has part r % parts of k for tile r / parts of the cluster's.
template <int kTokens, int kRows, Then kThen, typename C>
__global__ void __launch_bounds__(kThreads, 2)
    GemmTurnedKernel(const __grid_constant__ CUtensorMap rows, const __grid_constant__ CUtensorMap tokens,
                     const Problem problem) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using L = Layout<kTokens, kRows>;
  constexpr int kTiles = TilesOfCluster(kThen, kRows);
  unsigned char* const memory = DynamicSharedMemory();
  const uint32_t base = SharedAddress(memory);
  if (threadIdx.x == 0) {
    for (int slot = 0; slot < L::kRowStages + L::kTokenStages; ++slot) {
      BarrierInit(L::RowsThere(base, slot), 1);
      BarrierInit(L::RowsFree(base, slot), kTokens / 16);  // The warps that multiply.
    }
    BarrierInitFence();
  }
  __syncthreads();

  const int blocks = ClusterBlocks(), rank = ClusterRank();
  const int cluster = static_cast<int>(blockIdx.x) / blocks;
  const int tile = cluster * kTiles + rank / problem.parts, part = rank % problem.parts;
  const int first = problem.steps * part / problem.parts;
  const int steps = problem.steps * (part + 1) / problem.parts - first;
  if (steps <= StepsLeft(kTokens, kThen)) LetNextBegin();
  // Nobody gets past the products before the tokens are there, so before AwaitEarlier is past.
  const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 32, 0);
  const auto find_factors = [&] {
    FindFactors<kTokens>(problem, reinterpret_cast<float*>(memory + L::kFactors));
    __syncwarp();
  };
  if (warp < kTokens / 16) {
    Multiply<kTokens, kRows>(base, reinterpret_cast<float*>(memory), warp / 4, steps);
  } else if (warp == kCopierOfRows) {
    if (threadIdx.x % 32 == 0) {
      ProduceRows<kTokens, kRows, kThen>(&rows, problem, base, tile, first, steps);
    }
    __syncwarp();
  } else if (warp == kCopierOfTokens) {
    if (threadIdx.x % 32 == 0) ProduceTokens<L>(&tokens, problem, base, first, steps);
    __syncwarp();
    if (kTokens == 128) find_factors();
  } else if (warp == 4) {
    find_factors();
  }
  switch (problem.parts) {
    case 1:
      return Finish<kTokens, kRows, kThen, C, 1>(problem, base, memory, cluster, rank);
    case 2:
      return Finish<kTokens, kRows, kThen, C, 2>(problem, base, memory, cluster, rank);
    case 4:
      return Finish<kTokens, kRows, kThen, C, 4>(problem, base, memory, cluster, rank);
    default:
      if constexpr (kTiles == 1) {
        return Finish<kTokens, kRows, kThen, C, kMostBlocks>(problem, base, memory, cluster, rank);
      }
  }
#endif
}

struct Tiling {
  int clusters, parts;
  int busiest;  // Rows of b that the busiest multiprocessor reads, of a part of k that part, times
                // kMostBlocks.
};

// For tiles of `rows` rows of b, with `columns` columns of c each: no more parts than gain anything, and no
// more than two blocks a multiprocessor, which are there at the same time.
Tiling TilingOf(Then then, int rows, int columns, const Problem& problem, int processors) {
  const int of_cluster = TilesOfCluster(then, rows);
  const int clusters = static_cast<int>(Pieces(problem.columns, of_cluster * columns));
  Tiling best = {};
  for (const int parts : {1, 2, 4, 8}) {
    const int blocks = clusters * of_cluster * parts;
    if (parts * of_cluster > kMostBlocks || parts > problem.steps) continue;
    if (parts > 1 && blocks > 2 * processors) continue;
    const int busiest = static_cast<int>(Pieces(blocks, processors)) * rows * (kMostBlocks / parts);
    if (best.parts == 0 || busiest < best.busiest) best = {clusters, parts, busiest};
  }
  return best;
}

template <int kTokens, int kRows, Then kThen, typename C>
absl::Status Launch(const GemmArgs& gemm, Problem problem, const Tiling& tiling, cudaStream_t stream) {
  using L = Layout<kTokens, kRows>;
  const auto kernel = GemmTurnedKernel<kTokens, kRows, kThen, C>;
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, L::kBytes) != cudaSuccess) {
    return LaunchStatus("GemmTurnedKernel");
  }
  CUtensorMap rows, tokens;
  if (kThen == Then::kGate) {
    const uint64_t half = static_cast<uint64_t>(gemm.n / 2), stride = 2 * static_cast<uint64_t>(gemm.ldb);
    RETURN_IF_ERROR(MapBoxes<3>(gemm.b, {static_cast<uint64_t>(gemm.k), half, 2}, {stride, half * stride},
                                {kStep, kRows / 2, 2}, &rows));
  } else {
    RETURN_IF_ERROR(MapMatrix(gemm.b, gemm.n, gemm.k, gemm.ldb, {kStep, kRows}, &rows));
  }
  RETURN_IF_ERROR(
      MapMatrix(gemm.a, gemm.m, gemm.k, gemm.lda, {kStep, static_cast<uint32_t>(problem.m)}, &tokens));
  problem.parts = tiling.parts;
  const int blocks = tiling.parts * TilesOfCluster(kThen, kRows);
  return LaunchOverlapping("GemmTurnedKernel", kernel,
                           {.grid = dim3(static_cast<unsigned>(tiling.clusters * blocks)),
                            .threads = kThreads,
                            .shared_bytes = L::kBytes,
                            .cluster = blocks},
                           stream, rows, tokens, problem);
}

template <int kTokens>
absl::Status Launch(const FusedGemmArgs& args, cudaStream_t stream) {
  const GemmArgs& gemm = args.gemm;
  const Problem problem(args);
  const int processors = Processors();
  const auto tiling = [&](int rows, int columns) {
    return TilingOf(args.then, rows, columns, problem, processors);
  };
  switch (args.then) {
    case Then::kGate:
      return Launch<kTokens, 88, Then::kGate, __nv_bfloat16>(gemm, problem, tiling(88, 44), stream);
    case Then::kAdd:
      return Launch<kTokens, 64, Then::kAdd, __nv_bfloat16>(gemm, problem, tiling(64, 64), stream);
    case Then::kStore:
      break;
  }
  const Tiling small = tiling(96, 96), large = tiling(128, 128);
  if (large.busiest < small.busiest) {
    return gemm.c_dtype == DType::kBFloat16
               ? Launch<kTokens, 128, Then::kStore, __nv_bfloat16>(gemm, problem, large, stream)
               : Launch<kTokens, 128, Then::kStore, float>(gemm, problem, large, stream);
  }
  return gemm.c_dtype == DType::kBFloat16
             ? Launch<kTokens, 96, Then::kStore, __nv_bfloat16>(gemm, problem, small, stream)
             : Launch<kTokens, 96, Then::kStore, float>(gemm, problem, small, stream);
}

}  // namespace

absl::Status GemmTurnedCuda(const FusedGemmArgs& args, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  return args.gemm.m <= 64 ? Launch<64>(args, cuda_stream) : Launch<kSkinnyMostTokens>(args, cuda_stream);
}

}  // namespace deltanet
