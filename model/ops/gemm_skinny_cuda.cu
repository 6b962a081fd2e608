// Products of few rows in bfloat16 on Hopper, for steps that read each weight once for a handful of tokens,
// with what surrounds them in a layer (FusedGemmArgs): a [m, k] b^T, b [n, k], m at most kSkinnyMostTokens.
// Those of more than 32 rows it hands to gemm_turned_cuda.cu, where the tokens are the operand with 64 rows.
//
// Tiling: b is the operand with the product's 64 rows, the tokens are its columns (8, 16 or 32 of
// them). A block has 128 rows of b and all tokens; two warpgroups multiply, 64 rows each. One thread of a
// further warp queues the copies of b and one of the next warp those of a, in steps of 64 elements of k, into
// a ring in shared memory: 16 KiB of b and up to 4 KiB of a a step, at most 112 KiB, so that two blocks fit a
// multiprocessor. Of b no more than 48 KiB a block (64 of up to 16 tokens) are on their way, which is enough
// for the memory: all else that a block waits for comes out of the L2, and queues behind them; and no more
// than 32 KiB while the ring is filled for the first time, for behind these queue the last values of the
// kernel before, which ends the later. A warp more finds the norm's factors, which would hold up the copies.
// Where b has fewer tiles than would fill the device, 2, 4 or 8 blocks share a tile, each a part of k; they
// are a cluster, and each adds up a part of the tokens, of all blocks in the order of their ranks. So there
// are no atomics and no workspace, and the same operands give the same bits. Then a warp has a token's 128
// sums, four a lane, which it stores, or adds to the residual stream and squares, or gates: for that the tile
// is 64 rows of the first half of b and the 64 that belong to them of the second.
//
// The way of the sums. Of up to 16 tokens each lane sends four a store to the block that adds them up, into a
// stage of that block's ring that is not filled any more, where a barrier counts their bytes. Before, every
// block has told the others that the stage is free, which it is some steps before the end; nobody waits for
// the cluster, neither before the adding nor at the end. Of more tokens so many small packets would take
// longer (with 64 tokens, 8 bytes a store, 9.5 instead of 6.1 us for the second line below): a block leaves
// its sums in its own ring's place, the cluster meets, and the others fetch them, and meet again before they
// go.
//
// The kernel begins while the one before it still runs (LaunchOverlapping): the ring is filled with b, which
// is constant; then it waits for its tokens. It lets the next one begin when it has asked for its last steps
// of b, or nearly (StepsLeft): what the next one asks for earlier comes out of its own time, and with many
// tokens it is the end of a product, not its beginning, that leaves the memory idle.
//
// Bytes: 2 n k of b, and 2 m k of a for each tile, out of the L2. FLOPs: 2 m n k, of which tensor cores have
// plenty. On an H200 (28 November 2026), products in a row that begin while the one before ends, each of
// another matrix, with what surrounds them in a layer, in us, against b at 4.25 TB/s:
//
//   n, k, then         floor   m = 1     16
//   6160, 2048           5.9     6.7    7.0
//   2048, 2048, add      2.0     3.3    4.0
//   11264, 2048, gate   10.9    12.7   13.5
//   2048, 5632, add      5.4     7.4    7.9
//   these four in turn  24.2    29.7   31.9
//   32000, 2048         30.8    31.8   32.8
//
// A step of the 1.3B model for 1 and 16 sessions takes 0.84 and 1.12 ms. With sums left and fetched at 1 and
// 16 tokens too it took 0.92 and 1.16 (where it was 0.85 and 1.13). ncu, the first line alone, with nothing
// to begin behind, m = 1, sums fetched: 11.8 us at 45 % of the memory's peak.
//
// What is missing is the chain from the end of one to the products of the next, some 3 us with one token (the
// second line is nothing else), of which the ring covers some 2. With a barrier that waits for the device's
// memory too, before the sums are added up, each took 0.3 to 1 us more. Tried and no gain: one block a
// multiprocessor, so that the next kernel's fits beside; tokens copied to two or four blocks of a cluster at
// once; sums copied in bulk to the block that adds them up; what the next kernel's ring does not hold brought
// into the L2 meanwhile (2 to 4 us a layer worse for 10 to 20 MB); clusters of at most four; one kernel for
// the four, whose ring runs on over barriers of the whole grid (51 us with one token, 68 with 64).
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

constexpr int kRows = 128;  // Of b in a block.
constexpr int kStep = kSkinnyStep;
constexpr int kConsumers = 2;      // Warpgroups that multiply.
constexpr int kMostBlocks = 8;     // Of a cluster.
constexpr int kPitch = kRows + 4;  // Floats of a token's sums: no two lanes of a warp meet in a bank.
constexpr int kThreads = 128 * kConsumers + 96;  // Warps for b, for a, for the factors.
static_assert(kRows == kSquaresOf, "a tile's squares are one sum");

using Then = FusedGemmArgs::Then;

struct Problem : SkinnyProblem {
  using SkinnyProblem::SkinnyProblem;
  int rows_of_tile, second_half;  // Of b: from tile to tile, and from a tile's first 64 rows to the others.
};

// Steps of b that a block has yet to ask for when it lets the next kernel begin.
constexpr int StepsLeft(int tokens) { return tokens <= 8 ? 8 : 4; }

template <int kTokens>
struct Layout {
  static constexpr int kRowsBytes = kRows * kStep * 2, kTokensBytes = kTokens * kStep * 2;
  static constexpr int kStageBytes = kRowsBytes + kTokensBytes;
  static constexpr int kStages = (112 * 1024 - 4 * kTokens - 256) / kStageBytes, kTokenStages = kStages;
  // Whether sums are sent to the block that adds them up. Each store is a packet of its own: of 32 tokens and
  // more they are left where they are made, for that block to fetch.
  static constexpr bool kSends = kTokens <= 16;
  static constexpr int kAtFirst = 2, kOnTheirWay = kSends ? 4 : 3;  // Steps of b, at most.
  static constexpr int kFactors = kStages * kStageBytes;            // [kTokens] Floats.
  static constexpr int kBarriers = kFactors + 4 * kTokens;
  static constexpr int kSlotBarriers = 24;  // That b is there, that a is, that both are free.
  static constexpr int kTokenSlot = kStageBytes;
  static constexpr int kBytes = kBarriers + kSlotBarriers * kStages + 16;
  static_assert(kTokens * kPitch * 4 <= kFactors, "the sums take the ring's place");
  static_assert(kOnTheirWay <= kStages);
  static_assert(!kSends || kTokens * kRows * 4 <= kRowsBytes, "what is sent takes a stage's place");

  __device__ static uint32_t Rows(uint32_t base, int slot) { return base + slot * kStageBytes; }
  __device__ static uint32_t Tokens(uint32_t base, int slot) { return Rows(base, slot) + kRowsBytes; }
  __device__ static uint32_t RowsThere(uint32_t base, int slot) {
    return base + kBarriers + kSlotBarriers * slot;
  }
  __device__ static uint32_t TokensThere(uint32_t base, int slot) { return RowsThere(base, slot) + 8; }
  __device__ static uint32_t Free(uint32_t base, int slot) { return RowsThere(base, slot) + 16; }
  __device__ static uint32_t TokensFree(uint32_t base, int slot) { return Free(base, slot); }  // With b.
  // All blocks of the cluster have room for what they are sent; all sums have come.
  __device__ static uint32_t Room(uint32_t base) { return RowsThere(base, kStages); }
  __device__ static uint32_t SumsThere(uint32_t base) { return Room(base) + 8; }
  // Where a block of `steps` steps has the `i`-th [kRows] of the sums that it is sent: in the stage that
  // would come next.
  __device__ static uint32_t Sent(uint32_t base, int steps, int i) {
    return Rows(base, steps % kStages) + i * (4 * kRows);
  }
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// Of block `rank` of `blocks`.
__device__ inline int FirstStep(const Problem& problem, int rank, int blocks) {
  return problem.steps * rank / blocks;
}

// By one thread: b's part in steps [first, first + steps) of row tile `tile` into the ring.
template <int kTokens>
__device__ inline void ProduceRows(const CUtensorMap* rows, const Problem& problem, uint32_t base, int tile,
                                   int first, int steps) {
  using L = Layout<kTokens>;
  const int row = tile * problem.rows_of_tile;
  const uint32_t to_free = L::Free(base, 0) - L::RowsThere(base, 0);
  RingPlace<L::kStages, L::kSlotBarriers, L::kStageBytes> place{L::RowsThere(base, 0), L::Rows(base, 0)},
      landed = place;
  constexpr int kMore = L::kStages + L::kOnTheirWay - L::kAtFirst;  // Steps until then await no landing.
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    if (step >= L::kAtFirst && (step < L::kStages || step >= kMore)) {
      BarrierWait(landed.barrier, landed.parity);
      landed.Next();
    }
    const int k = (first + step) * kStep;
    BarrierWait(place.barrier + to_free, place.parity ^ 1);
    BarrierArriveExpecting(place.barrier, L::kRowsBytes);
    CopyBox(place.at, rows, k, row, place.barrier);
    CopyBox(place.at + kTileBytes, rows, k, row + problem.second_half, place.barrier);
    place.Next();
    if (steps - step - 1 == StepsLeft(kTokens)) LetNextBegin();
  }
}

// By a warp, when it has written the factors: expects the sums that the block is sent.
template <int kTokens>
__device__ inline void ExpectSums(const Problem& problem, uint32_t base, int rank, int blocks) {
  const uint32_t there = Layout<kTokens>::SumsThere(base);
  const int share = kTokens / blocks, tokens = max(0, min(share, problem.m - rank * share));
  if (threadIdx.x % 32 == 0) {
    BarrierArriveExpecting(there, (blocks - 1) * tokens * kRows * 4);
  } else {
    BarrierArrive(there);
  }
}

// By one thread, after the last tokens have been asked for: tells the cluster's blocks that what they send
// finds room.
template <int kTokens>
__device__ inline void MakeRoom(uint32_t base, int blocks, int steps) {
  using L = Layout<kTokens>;
  const int last = steps - L::kStages;  // That had the stage.
  if (last >= 0) BarrierWait(L::Free(base, last % L::kStages), (last / L::kStages) & 1);
  if (blocks == 1) return BarrierArrive(L::Room(base));
  for (int block = 0; block < blocks; ++block) BarrierArriveThere(InBlock(L::Room(base), block), 1);
}

// By warpgroup `group`: the sums of its 64 rows and all tokens over the block's steps.
template <int kTokens>
__device__ inline void Multiply(uint32_t base, int group, int steps, float (&sums)[kTokens / 2]) {
  using L = Layout<kTokens>;
  const uint32_t first_rows = TileByRows(L::Rows(base, 0) + group * kTileBytes);
  const uint32_t to_tokens = TileByRows(L::Tokens(base, 0)) - first_rows;
  const uint32_t tokens_there = L::TokensThere(base, 0) - L::RowsThere(base, 0),
                 free = L::Free(base, 0) - L::RowsThere(base, 0);
  RingPlace<L::kStages, L::kSlotBarriers, L::kStageBytes / 16> place{L::RowsThere(base, 0), first_rows};
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    BarrierWait(place.barrier, place.parity);
    BarrierWait(place.barrier + tokens_there, place.parity);
    const uint32_t rows = place.at, tokens = rows + to_tokens, barrier = place.barrier;
    AsyncProductsBegin();
#pragma unroll
    for (int i = 0; i < kStep / 16; ++i) {
      AsyncProductShared<kTokens>(sums, Further(rows, 32 * i), Further(tokens, 32 * i), step > 0 || i > 0);
    }
    AsyncProductsEnd();
    place.Next();
    AsyncProductsWait<0>();
    if (threadIdx.x % 32 == 0) BarrierArrive(barrier + free);
  }
  Pin(sums);
}

// By both warpgroups: their sums into shared memory, [token, row], in the ring's place.
template <int kTokens>
__device__ inline void LeaveSums(const float (&sums)[kTokens / 2], float* sums_of_block, int group) {
  const int thread = threadIdx.x % 128, lane = thread % 32;
  NamedBarrier(1, 128 * kConsumers);  // The other warpgroup still reads the ring.
  const int row = 64 * group + thread / 32 * 16 + lane / 4;
#pragma unroll
  for (int i = 0; i < kTokens / 8; ++i) {
    float* const to = sums_of_block + (8 * i + lane % 4 * 2) * kPitch + row;
    to[0] = sums[4 * i];
    to[kPitch] = sums[4 * i + 1];
    to[8] = sums[4 * i + 2];
    to[kPitch + 8] = sums[4 * i + 3];
  }
}

// By both warpgroups: their sums to the blocks that add them up.
template <int kTokens, int kBlocks>
__device__ inline void SendSums(const Problem& problem, const float (&sums)[kTokens / 2], uint32_t base,
                                unsigned char* memory, int group, int rank) {
  using L = Layout<kTokens>;
  constexpr int kShare = kTokens / kBlocks;
  const int thread = threadIdx.x % 128, lane = thread % 32;
  const bool odd = lane & 4, upper = lane & 8;
  const auto from_lane = [](int distance, float x) { return __shfl_xor_sync(0xffffffffu, x, distance); };
  if (kBlocks > 1) ClusterWait();
  BarrierWait(L::Room(base), 0);
#pragma unroll
  for (int i = 0; i < kTokens / 8; ++i) {
    // Two tokens, rows r and r + 8. Lanes of rows r and r ^ 1 swap tokens, then those of r and r ^ 2 halves:
    // then a lane has four neighbouring rows of one token.
    const float* const x = sums + 4 * i;
    const float first = from_lane(4, odd ? x[0] : x[1]), second = from_lane(4, odd ? x[2] : x[3]);
    const float2 low = odd ? make_float2(first, x[1]) : make_float2(x[0], first);
    const float2 high = odd ? make_float2(second, x[3]) : make_float2(x[2], second);
    const float2 got =
        make_float2(from_lane(8, upper ? low.x : high.x), from_lane(8, upper ? low.y : high.y));
    const float4 four =
        upper ? make_float4(got.x, got.y, high.x, high.y) : make_float4(low.x, low.y, got.x, got.y);
    const int token = 8 * i + lane % 4 * 2 + (odd ? 1 : 0), owner = token / kShare;
    if (token >= problem.m) continue;
    const int steps = FirstStep(problem, owner + 1, kBlocks) - FirstStep(problem, owner, kBlocks);
    const int row = 64 * group + thread / 32 * 16 + (upper ? 8 : 0) + lane / 16 * 4;
    const uint32_t at = L::Sent(0, steps, rank * kShare + token % kShare) + 4 * row;
    if (owner == rank) {
      *reinterpret_cast<float4*>(memory + at) = four;
    } else {
      StoreToBlock(InBlock(base + at, owner), four, InBlock(L::SumsThere(base), owner));
    }
  }
  NamedBarrier(1, 128 * kConsumers);  // Before what the block keeps is read.
}

// By all threads of the block: what becomes of its part of the tile's tokens, a warp each, when the cluster's
// blocks have sent or left their sums. Of those left a lane has as many on their way as there may be blocks.
template <int kTokens, Then kThen, typename C, int kBlocks>
__device__ inline void Finish(const Problem& problem, uint32_t base, const unsigned char* memory, int tile,
                              int rank, int steps) {
  using L = Layout<kTokens>;
  constexpr int kWarps = 4 * kConsumers, kShare = kTokens / kBlocks;
  constexpr int kAtOnce =
      kShare < kWarps ? 1 : std::min(kShare / kWarps, kMostBlocks / kBlocks);  // Of a warp.
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int end = min(problem.m, (rank + 1) * kShare);
  int token = warp < kWarps ? rank * kShare + warp : end;
  const int column = kThen == Then::kGate ? tile * (kRows / 2) + 4 * (lane % 16) : tile * kRows + 4 * lane;
  const bool inside = column < problem.columns;
  const float* const factors = reinterpret_cast<const float*>(memory + L::kFactors);
  float x[kAtOnce][4] = {}, scale[4] = {};
  const auto fetch = [&] {
#pragma unroll
    for (int t = 0; t < kAtOnce; ++t) {
      const int next = token + t * kWarps;
      if (next < end && inside) Load<4>(problem.x + int64_t{next} * problem.columns + column, x[t]);
    }
  };
  if constexpr (kThen == Then::kAdd) {
    if (problem.scale != nullptr && inside) Load<4>(problem.scale + column, scale);
    AwaitEarlier();
    fetch();
  }
  if constexpr (L::kSends) {
    BarrierWait(L::SumsThere(base), 0);
  } else {
    ClusterBarrierOfShared();
  }
  for (; token < end; token += kAtOnce * kWarps) {
    if (kThen == Then::kAdd && token >= rank * kShare + kAtOnce * kWarps) fetch();
    float4 parts[kAtOnce][kBlocks];
#pragma unroll
    for (int t = 0; t < kAtOnce; ++t) {
#pragma unroll
      for (int r = 0; r < kBlocks; ++r) {
        const int i = min(token + t * kWarps, kTokens - 1);
        if constexpr (L::kSends) {
          const uint32_t at = L::Sent(0, steps, (r - rank) * kShare + i);
          parts[t][r] = *reinterpret_cast<const float4*>(memory + at + 16 * lane);
        } else {
          parts[t][r] = LoadFromBlock(InBlock(base + 4 * (i * kPitch + 4 * lane), r));
        }
      }
    }
#pragma unroll
    for (int t = 0; t < kAtOnce; ++t) {
      const int64_t i = token + t * kWarps;
      if (i >= end) break;
      float sum[4] = {};
#pragma unroll
      for (int r = 0; r < kBlocks; ++r) {
        sum[0] += parts[t][r].x, sum[1] += parts[t][r].y, sum[2] += parts[t][r].z, sum[3] += parts[t][r].w;
      }
      if (problem.squares != nullptr) {
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[j] *= factors[i];
      }
      C* const to = static_cast<C*>(problem.c) + i * problem.ldc + column;
      if constexpr (kThen == Then::kStore) {
        StoreSums(problem, sum, column, to);
      } else if constexpr (kThen == Then::kGate) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float second = __shfl_down_sync(0xffffffffu, sum[j], 16);
          sum[j] = Gated<C>(problem.gate, sum[j], second);
        }
        if (lane < 16 && inside) Store<4>(sum, to);
      } else {
        AddSums(problem, sum, x[t], scale, i, tile, gridDim.x / kBlocks, column, to);
      }
    }
  }
  if (!L::kSends && kBlocks > 1) ClusterBarrier();  // The others still read this block's sums.
}

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

template <int kTokens, Then kThen, typename C>
__global__ void __launch_bounds__(kThreads, 2)
    GemmSkinnyKernel(const __grid_constant__ CUtensorMap rows, const __grid_constant__ CUtensorMap tokens,
                     const Problem problem) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using L = Layout<kTokens>;
  unsigned char* const memory = DynamicSharedMemory();
  const uint32_t base = SharedAddress(memory);
  if (threadIdx.x == 0) {
    for (int slot = 0; slot < L::kStages; ++slot) {
      BarrierInit(L::RowsThere(base, slot), 1);
      BarrierInit(L::TokensThere(base, slot), 1);
      BarrierInit(L::Free(base, slot), 4 * kConsumers);
    }
    if (L::kSends) {
      BarrierInit(L::Room(base), ClusterBlocks());
      BarrierInit(L::SumsThere(base), 32);
    }
    BarrierInitFence();
  }
  __syncthreads();
  const int blocks = ClusterBlocks(), rank = ClusterRank();
  // Waited for before anything is sent. A block that is no cluster's may not.
  if (L::kSends && blocks > 1) ClusterArrive();

  const int tile = static_cast<int>(blockIdx.x) / blocks;
  const int first = FirstStep(problem, rank, blocks), steps = FirstStep(problem, rank + 1, blocks) - first;
  if (steps <= StepsLeft(kTokens)) LetNextBegin();
  // Nobody gets past the products before the tokens are there, so before AwaitEarlier is past.
  const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 32, 0);
  if (warp < 4 * kConsumers) {
    const int group = warp / 4;
    float sums[kTokens / 2];
    Multiply<kTokens>(base, group, steps, sums);
    if constexpr (!L::kSends) {
      LeaveSums<kTokens>(sums, reinterpret_cast<float*>(memory), group);
    } else if (blocks == 1) {
      SendSums<kTokens, 1>(problem, sums, base, memory, group, rank);
    } else if (blocks == 2) {
      SendSums<kTokens, 2>(problem, sums, base, memory, group, rank);
    } else if (blocks == 4) {
      SendSums<kTokens, 4>(problem, sums, base, memory, group, rank);
    } else {
      SendSums<kTokens, kMostBlocks>(problem, sums, base, memory, group, rank);
    }
  } else if (warp == 4 * kConsumers) {
    if (threadIdx.x % 32 == 0) ProduceRows<kTokens>(&rows, problem, base, tile, first, steps);
    __syncwarp();
    if (L::kSends && blocks > 1) ClusterWait();
  } else if (warp == 4 * kConsumers + 1) {
    if (threadIdx.x % 32 == 0) ProduceTokens<L>(&tokens, problem, base, first, steps);
    __syncwarp();
    if (L::kSends && blocks > 1) ClusterWait();
    if (L::kSends && threadIdx.x % 32 == 0) MakeRoom<kTokens>(base, blocks, steps);
    __syncwarp();
  } else {
    FindFactors<kTokens>(problem, reinterpret_cast<float*>(memory + L::kFactors));
    __syncwarp();
    if (L::kSends) ExpectSums<kTokens>(problem, base, rank, blocks);
    if (L::kSends && blocks > 1) ClusterWait();
  }
  switch (blocks) {
    case 1:
      return Finish<kTokens, kThen, C, 1>(problem, base, memory, tile, rank, steps);
    case 2:
      return Finish<kTokens, kThen, C, 2>(problem, base, memory, tile, rank, steps);
    case 4:
      return Finish<kTokens, kThen, C, 4>(problem, base, memory, tile, rank, steps);
    default:
      return Finish<kTokens, kThen, C, kMostBlocks>(problem, base, memory, tile, rank, steps);
  }
#endif
}

template <int kTokens, Then kThen, typename C>
absl::Status Launch(const FusedGemmArgs& args, cudaStream_t stream) {
  using L = Layout<kTokens>;
  const GemmArgs& gemm = args.gemm;
  const auto kernel = GemmSkinnyKernel<kTokens, kThen, C>;
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, L::kBytes) != cudaSuccess) {
    return LaunchStatus("GemmSkinnyKernel");
  }
  Problem problem(args);
  CUtensorMap rows, tokens;
  RETURN_IF_ERROR(MapMatrix(gemm.b, gemm.n, gemm.k, gemm.ldb, {kStep, kRows / 2}, &rows));
  RETURN_IF_ERROR(
      MapMatrix(gemm.a, gemm.m, gemm.k, gemm.lda, {kStep, static_cast<uint32_t>(problem.m)}, &tokens));
  problem.rows_of_tile = kThen == Then::kGate ? kRows / 2 : kRows;
  problem.second_half = kThen == Then::kGate ? problem.columns : kRows / 2;
  const int processors = Processors();
  const int tiles = static_cast<int>(Pieces(problem.columns, problem.rows_of_tile));
  int blocks = 1;
  while (2 * blocks <= std::min(kMostBlocks, problem.steps) && 2 * blocks * tiles <= 2 * processors)
    blocks *= 2;
  return LaunchOverlapping("GemmSkinnyKernel", kernel,
                           {.grid = dim3(static_cast<unsigned>(tiles * blocks)),
                            .threads = kThreads,
                            .shared_bytes = L::kBytes,
                            .cluster = blocks},
                           stream, rows, tokens, problem);
}

template <int kTokens>
absl::Status Launch(const FusedGemmArgs& args, cudaStream_t stream) {
  switch (args.then) {
    case Then::kGate:
      return Launch<kTokens, Then::kGate, __nv_bfloat16>(args, stream);
    case Then::kAdd:
      return Launch<kTokens, Then::kAdd, __nv_bfloat16>(args, stream);
    case Then::kStore:
      break;
  }
  return args.gemm.c_dtype == DType::kBFloat16 ? Launch<kTokens, Then::kStore, __nv_bfloat16>(args, stream)
                                               : Launch<kTokens, Then::kStore, float>(args, stream);
}

}  // namespace

bool GemmSkinnyCudaTakes(const FusedGemmArgs& args) {
  constexpr int64_t kMost = int64_t{1} << 30;  // Coordinates are ints.
  const GemmArgs& gemm = args.gemm;
  if (gemm.dtype != DType::kBFloat16 || gemm.fixed_order || gemm.m > kSkinnyMostTokens || gemm.n >= kMost ||
      gemm.k >= kMost || gemm.lda % 8 != 0 || gemm.ldb % 8 != 0 || !Aligned16({gemm.a, gemm.b})) {
    return false;
  }
  if (args.then != Then::kStore &&
      (gemm.c_dtype != DType::kBFloat16 || gemm.n % (args.then == Then::kGate ? 8 : 4) != 0 ||
       gemm.ldc % 4 != 0 || !Aligned16({gemm.c, args.x, args.scale}))) {
    return false;
  }
  return RunsHopperCode(reinterpret_cast<const void*>(&GemmSkinnyKernel<8, Then::kStore, float>));
}

absl::Status GemmSkinnyCuda(const FusedGemmArgs& args, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  if (args.gemm.m <= 8) return Launch<8>(args, cuda_stream);
  if (args.gemm.m <= 16) return Launch<16>(args, cuda_stream);
  if (args.gemm.m <= 32) return Launch<32>(args, cuda_stream);
  return GemmTurnedCuda(args, stream);
}

}  // namespace deltanet
