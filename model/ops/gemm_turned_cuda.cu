// Products of 33 to 128 rows in bfloat16 on Hopper, for steps that read each weight once for as many tokens,
// with what surrounds them in a layer (FusedGemmArgs): a [m, k] b^T, b [n, k]. Those of fewer rows, and what
// the two have in common, are in gemm_skinny_cuda.cu.
//
// Tiling: here the tokens are the operand with the product's 64 rows (or twice 64), and the rows of b are its
// columns, so that a tile may have any multiple of 16 of them. Two warpgroups multiply, each half of the
// tile's rows for 64 tokens, or all of them for one half of 128. One thread of a further warp queues the
// copies of b and one of the next warp those of a, in steps of 64 elements of k, into two rings in shared
// memory, at most 113 KiB together, so that the next kernel's block fits a multiprocessor beside. Of b no
// more than some 48 KiB are on their way, since the tokens queue behind them. Two, four or eight blocks may
// share a tile, each a part of k; they are a cluster: each leaves its sums in its shared memory, and each
// adds up a part of the tokens, of all blocks in the order of the parts. So there are no atomics and no
// workspace, and the same operands give the same bits.
//
//   then         rows of a tile        n, k of the 1.3B model    tiles x parts of k
//   kStore       96, or 128            6160, 2048                65 x 2
//                                      32000, 2048               250 x 1 (of 128 rows)
//   kGate        48 of each half       11264, 2048               118 x 2
//   kAdd         64                    2048, 2048 and 5632       32 x 4
//
// TilingOf chooses: the fewest bytes of b on the busiest multiprocessor. Two tiles of 64 rows make one sum of
// squares (kSquaresOf), so their blocks are one cluster, of eight, each of which has 128 columns of its
// tokens.
//
// The kernel begins while the one before it still runs (LaunchOverlapping): the ring is filled with b, which
// is constant; then it waits for its tokens. It lets the next one begin some steps before it has asked for
// all of b (kLeft).
//
// Bytes: 2 n k of b, and 2 m k of a for each tile, out of the L2: with 64 tokens two thirds as much again as
// b (a tile of 96 rows). On an H200 (27 November 2026, one run), products in a row that begin while the one
// before ends, each of another matrix, with what surrounds them in a layer, in us, against b at 4.25 TB/s;
// before is the other kernel (b as the operand with 64 rows), for as many tokens:
//
//                                 m = 33       48          64         96          128
//   n, k, then         floor   before now  before now  before now  before now  before now
//   6160, 2048           5.9     9.3  8.5    9.7  8.6   10.3  8.7   14.6 10.4   15.2 10.8
//   2048, 2048, add      2.0     5.2  5.1    5.4  5.1    5.8  5.2    8.2  7.3    9.2  7.4
//   11264, 2048, gate   10.9    16.3 13.8   16.2 14.0   16.2 14.2   21.5 17.3   20.6 17.8
//   2048, 5632, add      5.4    10.5  9.0    9.3  9.2    9.9  9.5   15.2 12.4   14.2 13.0
//   these four in turn  24.2    41.9 37.9   41.3 38.9   42.5 39.6   60.1 50.9   59.7 52.7
//   32000, 2048         30.8    35.2 33.4   35.5 33.8   35.8 34.3   38.8 37.4   39.0 38.5
//
// What gained, with 64 tokens: tiles that leave every multiprocessor as much (the first line, 9.9), the next
// kernel let begin four steps before the end instead of none (9.1), five steps of tokens in the ring instead
// of four (8.6). That two tiles are one cluster takes 0.3 us of each product that adds: sums of the squares
// of 64 columns would save them, and cost 0.3 to 1 us of the four with 1 and 16 tokens, which read twice as
// many sums. Rows of a that are not there are not copied: boxes that reach beyond a matrix are slow (18.7 us
// instead of 12.4 for the fourth line with 96 tokens).
//
// Tried and no gain, with 64 tokens: tokens copied to two blocks of a cluster at once (1.4 to 2.4 us worse);
// tiles of 48, 64, 112, 128, 176 or 192 rows for the first and third line; no parts of k for the third
// (14.9); the fourth as 16 x 8 of 128 rows; a step's products pending while the next begin; three blocks of
// 75 KiB a multiprocessor (42.0 for the four). In the 1.3B model's step of 64, of 1.96 ms: 84 instead of 113
// KiB for any of the four, so that two blocks of the mixer fit beside (1.97 to 2.01); for each of them 24 to
// 64 KiB on their way at first, or the next kernel let begin 2 steps before the end, 8 or at the start (1.98
// to 2.03); one or two more steps of tokens in the ring and as much less of b (1.96, 2.01). Of b on its way
// 32, 40, 48, 60 or 72 KiB: 1.97, 1.96, 1.95, 1.95, 1.96. Nor does it help to use the memory while a block
// waits for its tokens: with 2, 4 or 8 steps of b beyond the ring brought into the L2, then or all along, the
// step took as long or 1 % less at best, and more with the mixer's next states or o_proj's matrix (2.00
// to 2.04).
//
// Nor, on an H200, that the cluster's blocks tell each other that they have read the sums before they store
// what becomes of them, instead of behind (on an H100 the step of 64 took 2.41 instead of 2.48 ms; racecheck
// then reports hazards, by their number of the factors, which were read between the barrier's two halves).
//
// What the four, of 39.8, take without some of it (28 November 2026, wrong results): without waiting for the
// kernel before 35.7, without the other blocks' sums 37.0, without both 33.1; with a quarter of the tokens'
// bytes 39.6, with a quarter of b's 34.9, and without any of these 26.0. So it is waits, of which each of
// four kernels has one after the other, that are between this and the floor, and not what is moved. From one
// kernel's last operands to the next one's first are some 3.6 us, in which the memory could move 115 KiB a
// multiprocessor; the ring, which shares shared memory with the kernel before, takes 72 of them.
//
// A step of 64, a layer, by the device's clock (28 November 2026, an H200, us from when q, k, v may read
// their tokens; of all blocks the first and the last):
//
//                   may read   tokens there   multiplied    ended
//   q, k, v, beta        0      0.4   0.6     5.3   7.1      9.1
//   mixer              9.4                                  44.5   (first S stored 12.2)
//   out               45.3     46.1  46.3    47.8  49.1     51.3
//   gate and up       51.7     52.1  54.8    60.6  65.5     68.9
//   down              69.3     69.7  69.8    74.5  76.6     78.7
//
// Without gain in the same session (1.94 to 1.95 ms without):
//   One kernel for out, gate and up, down and the next layer's q, k, v, beta, with one ring of 135 KiB of b
//   that runs on over the products, and counters in memory between them: clusters of four with a block a
//   multiprocessor, of which 30 fit. 43 to 45 us where the four in turn take 39, the step of 1, 16, 64 1.14,
//   1.39, 2.07 ms (0.85, 1.13, 1.94): between two products lie 5.2 to 6.7 us (sums exchanged 0.5 to 1.9,
//   stored 1.3 to 3.5, the counter raised 0.5 to 1.4 and seen 0.6, tokens there 0.5), more than the ring
//   bridges, and the mixer's blocks do not fit beside it.
//   Every other step a warpgroup's, all rows of the tile each: a step takes 0.15 instead of 0.26 us where its
//   operands are there, and what that gains (out 0.9 us) is lost where the two add up: 1.95.
//   Products that add by 16 tiles of 128 rows x 8: 1.94, but alone 0.4 to 1 us more each (of 128 tokens the
//   four 57.5 instead of 53.7). Tiles of 192 rows for q, k, v, beta 1.99, for gate and up 1.98 (four parts)
//   or 2.03 (two).
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
constexpr int kConsumers = 2;   // Warpgroups that multiply.
constexpr int kMostBlocks = 8;  // Of a cluster.
constexpr int kMultiplying = 128 * kConsumers;
constexpr int kThreads = kMultiplying + 64;

using Then = FusedGemmArgs::Then;

struct Problem : SkinnyProblem {
  using SkinnyProblem::SkinnyProblem;
  int parts;  // Of k, a block each.
};

// Tiles of a cluster.
constexpr int TilesOfCluster(Then then, int rows) {
  return then == Then::kAdd ? static_cast<int>(kSquaresOf) / rows : 1;
}

template <int kTokens, int kRows>
struct Layout {
  static constexpr int kRowsBytes = kRows * kStep * 2, kTokensBytes = kTokens * kStep * 2;
  static constexpr int kFactorsBytes = 4 * kTokens, kBarriersBytes = 512;
  static constexpr int kTokenStages = kTokens == 64 ? 8 - kRows / 32 : 5 - kRows / 64;
  static constexpr int kRowStages =
      (113 * 1024 - kFactorsBytes - kBarriersBytes - kTokenStages * kTokensBytes) / kRowsBytes;
  // Steps of b on their way, at most.
  static constexpr int kAtFirst = (36 * 1024 + kRowsBytes / 2) / kRowsBytes;
  static constexpr int kOnTheirWay = (48 * 1024 + kRowsBytes / 2) / kRowsBytes;
  // Steps of b that a block has yet to ask for when it lets the next kernel begin.
  static constexpr int kLeft = kTokens == 64 ? 4 : 2;
  static constexpr int kTokensAt = kRowStages * kRowsBytes;
  static constexpr int kFactors = kTokensAt + kTokenStages * kTokensBytes;  // [kTokens] Floats.
  static constexpr int kBarriers = kFactors + kFactorsBytes;
  static constexpr int kBytes = kBarriers + kBarriersBytes;
  static constexpr int kPitch = kRows + 8;  // Floats of a token's sums: stores of 8 bytes meet in no bank.
  static_assert(kRowsBytes % 1024 == 0 && kPitch % 16 == 8);
  static_assert(kTokens * kPitch * 4 <= kFactors, "the sums take the rings' place");
  static_assert(16 * (kRowStages + kTokenStages) <= kBarriersBytes);
  static_assert(kAtFirst <= kRowStages && kOnTheirWay <= kRowStages);

  __device__ static uint32_t Rows(uint32_t base, int slot) { return base + slot * kRowsBytes; }
  __device__ static uint32_t Tokens(uint32_t base, int slot) {
    return base + kTokensAt + slot * kTokensBytes;
  }
  __device__ static uint32_t RowsThere(uint32_t base, int slot) { return base + kBarriers + 16 * slot; }
  __device__ static uint32_t RowsFree(uint32_t base, int slot) { return RowsThere(base, slot) + 8; }
  __device__ static uint32_t TokensThere(uint32_t base, int slot) {
    return RowsThere(base, kRowStages + slot);
  }
  __device__ static uint32_t TokensFree(uint32_t base, int slot) { return TokensThere(base, slot) + 8; }
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// By one thread: b's part in steps [first, first + steps) of tile `tile` into its ring.
template <int kTokens, int kRows, Then kThen>
__device__ inline void ProduceRows(const CUtensorMap* rows, const Problem& problem, uint32_t base, int tile,
                                   int first, int steps) {
  using L = Layout<kTokens, kRows>;
  constexpr bool kGated = kThen == Then::kGate;
  const int row = tile * (kGated ? kRows / 2 : kRows);
  for (int step = 0; step < steps; ++step) {
    if (const int landed = step - (step < L::kRowStages ? L::kAtFirst : L::kOnTheirWay); landed >= 0) {
      BarrierWait(L::RowsThere(base, landed % L::kRowStages), (landed / L::kRowStages) & 1);
    }
    const int slot = step % L::kRowStages, k = (first + step) * kStep;
    const uint32_t to = L::Rows(base, slot), there = L::RowsThere(base, slot);
    BarrierWait(L::RowsFree(base, slot), (step / L::kRowStages + 1) & 1);
    BarrierArriveExpecting(there, L::kRowsBytes);
    CopyBox(to, rows, k, row, there);
    if (kGated) CopyBox(to + L::kRowsBytes / 2, rows, k, row + problem.columns, there);
    if (steps - step - 1 == L::kLeft) LetNextBegin();
  }
}

// By warpgroup `group`: the sums of its tokens and rows over the block's steps, into shared memory,
// [token, row], in the rings' place.
template <int kTokens, int kRows>
__device__ inline void Multiply(uint32_t base, float* sums_of_block, int group, int steps) {
  using L = Layout<kTokens, kRows>;
  constexpr int kTokenTiles = kTokens / 64, kN = kRows * kTokenTiles / kConsumers;
  const int thread = threadIdx.x % 128, lane = thread % 32;
  const int token_tile = group % kTokenTiles, row = group / kTokenTiles * kN;
  float sums[kN / 2];
  for (int step = 0; step < steps; ++step) {
    const int row_slot = step % L::kRowStages, token_slot = step % L::kTokenStages;
    BarrierWait(L::RowsThere(base, row_slot), (step / L::kRowStages) & 1);
    BarrierWait(L::TokensThere(base, token_slot), (step / L::kTokenStages) & 1);
    const uint32_t tokens = TileByRows(L::Tokens(base, token_slot) + token_tile * kTileBytes);
    const uint32_t rows = TileByRows(L::Rows(base, row_slot) + row * kStep * 2);
    AsyncProductsBegin();
#pragma unroll
    for (int i = 0; i < kStep / 16; ++i) {
      AsyncProductShared<kN>(sums, Further(tokens, 32 * i), Further(rows, 32 * i), step > 0 || i > 0);
    }
    AsyncProductsEnd();
    AsyncProductsWait<0>();
    if (lane == 0) {
      BarrierArrive(L::RowsFree(base, row_slot));
      BarrierArrive(L::TokensFree(base, token_slot));
    }
  }
  Pin(sums);
  NamedBarrier(1, kMultiplying);  // The other warpgroup still reads the rings.
  const int token = 64 * token_tile + thread / 32 * 16 + lane / 4;
  float* const to = sums_of_block + token * L::kPitch + row + lane % 4 * 2;
#pragma unroll
  for (int i = 0; i < kN / 8; ++i) {
    *reinterpret_cast<float2*>(to + 8 * i) = make_float2(sums[4 * i], sums[4 * i + 1]);
    *reinterpret_cast<float2*>(to + 8 * L::kPitch + 8 * i) = make_float2(sums[4 * i + 2], sums[4 * i + 3]);
  }
}

// By all threads of the block: what becomes of its part of the cluster's tokens, four columns of one at a
// time, when the cluster's blocks have left their sums. Where squares are added up, a warp has a token's 128
// columns.
template <int kTokens, int kRows, Then kThen, typename C, int kParts>
__device__ inline void Finish(const Problem& problem, uint32_t base, const float* factors, int cluster,
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
  ClusterBarrierOfShared();
  if (thread < kMultiplying) {
#pragma unroll 1
    for (int pass = 0; pass < kOfThread; pass += kAtOnce) {
      float4 parts[kAtOnce][kHalves][kParts];
#pragma unroll
      for (int t = 0; t < kAtOnce; ++t) {
        const int item = min(thread + (pass + t) * kMultiplying, kItems - 1);
        const int column = item % kVectors * 4, tile = column / kOfTile;
        const int place = (begin + item / kVectors) * L::kPitch + column % kOfTile;
#pragma unroll
        for (int h = 0; h < kHalves; ++h) {
#pragma unroll
          for (int r = 0; r < kParts; ++r) {
            parts[t][h][r] = LoadFromBlock(base + 4 * (place + h * kOfTile), tile * kParts + r);
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
      BarrierInit(L::RowsFree(base, slot), 4 * kConsumers);
    }
    BarrierInitFence();
  }
  __syncthreads();

  const int blocks = ClusterBlocks(), rank = ClusterRank();
  const int cluster = static_cast<int>(blockIdx.x) / blocks;
  const int tile = cluster * kTiles + rank / problem.parts, part = rank % problem.parts;
  const int first = problem.steps * part / problem.parts;
  const int steps = problem.steps * (part + 1) / problem.parts - first;
  if (steps <= L::kLeft) LetNextBegin();
  // Nobody gets past the products before the tokens are there, so before AwaitEarlier is past.
  const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 32, 0);
  float* const factors = reinterpret_cast<float*>(memory + L::kFactors);
  if (warp < 4 * kConsumers) {
    Multiply<kTokens, kRows>(base, reinterpret_cast<float*>(memory), warp / 4, steps);
  } else if (warp == 4 * kConsumers) {
    if (threadIdx.x % 32 == 0) {
      ProduceRows<kTokens, kRows, kThen>(&rows, problem, base, tile, first, steps);
    }
    __syncwarp();
  } else {
    const bool copies = threadIdx.x % 32 == 0;
    const int before = min(steps, 2 * L::kTokenStages);  // Later on a pause is not noticed.
    if (copies) PrefetchMap(&tokens);
    // Parameters come from memory when they are first read: those that are needed last are read here too.
    asm volatile("" ::"l"(problem.c), "l"(problem.squares), "l"(problem.x), "l"(problem.x_squares));
    AwaitEarlier();
    if (copies) ProduceTokens<L>(&tokens, problem, base, first, 0, before);
    __syncwarp();
    if (problem.squares != nullptr) FindFactors<kTokens>(problem, factors);
    __syncwarp();
    if (copies) ProduceTokens<L>(&tokens, problem, base, first, before, steps);
    __syncwarp();
  }
  switch (problem.parts) {
    case 1:
      return Finish<kTokens, kRows, kThen, C, 1>(problem, base, factors, cluster, rank);
    case 2:
      return Finish<kTokens, kRows, kThen, C, 2>(problem, base, factors, cluster, rank);
    case 4:
      return Finish<kTokens, kRows, kThen, C, 4>(problem, base, factors, cluster, rank);
    default:
      if constexpr (kTiles == 1) {
        return Finish<kTokens, kRows, kThen, C, kMostBlocks>(problem, base, factors, cluster, rank);
      }
  }
#endif
}

struct Tiling {
  int clusters, parts;
  int busiest;  // Rows of b that the busiest multiprocessor reads, of a part of k that part, times
                // kMostBlocks.
};

// For tiles of `rows` rows of b, with `columns` columns of c each. Clusters of two cost next to nothing, so
// at least two parts, and not twice as many where that is no better; but no more than two blocks a
// multiprocessor, which are there at the same time.
Tiling TilingOf(Then then, int rows, int columns, const Problem& problem, int processors) {
  const int of_cluster = TilesOfCluster(then, rows);
  const int clusters = static_cast<int>(Pieces(problem.columns, of_cluster * columns));
  Tiling best = {};
  for (const int parts : {2, 1, 4, 8}) {
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
  RETURN_IF_ERROR(
      MapMatrix(gemm.b, gemm.n, gemm.k, gemm.ldb, {kStep, kThen == Then::kGate ? kRows / 2 : kRows}, &rows));
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
      return Launch<kTokens, 96, Then::kGate, __nv_bfloat16>(gemm, problem, tiling(96, 48), stream);
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
