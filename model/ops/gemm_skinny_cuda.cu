// Products of few rows in bfloat16 on Hopper, for steps that read each weight once for a handful of tokens,
// with what surrounds them in a layer (FusedGemmArgs): a [m, k] b^T, b [n, k], m at most kMostTokens.
//
// Tiling: b is the operand with the product's 64 rows, the tokens are its columns (8, 16, 32, 64 or 128 of
// them). A block has 128 rows of b and all tokens; two warpgroups multiply, 64 rows each, and one thread of a
// further warp queues the copies, in steps of 64 elements of k, into a ring in shared memory: 16 KiB of b and
// up to 16 KiB of a a step, at most 112 KiB, so that two blocks fit a multiprocessor and 12 to 25 MB are
// under way. Where b has fewer tiles than would fill the device, 2, 4 or 8 blocks share a tile, each a part
// of k; they are a cluster, each leaves its sums in its shared memory, and each adds up a part of the tokens,
// of all blocks in the order of their ranks. So there are no atomics and no workspace, and the same operands
// give the same bits. Then a warp has a token's 128 sums, four a lane, which it stores, or adds to the
// residual stream and squares, or gates: for that the tile is 64 rows of the first half of b and the 64 that
// belong to them of the second.
//
// The kernel begins while the one before it still runs (LaunchOverlapping): the ring is filled with b, which
// is constant; then it waits for its tokens. (To bring more of b into the L2 meanwhile was no gain, and a
// loss where b is larger than the L2.)
//
// Bytes: 2 n k of b, and 2 m k of a for each tile, out of the L2. FLOPs: 2 m n k, of which tensor cores have
// plenty. On an H200, products in a row that begin while the one before ends, each of another matrix, in us,
// against b at 4.25 TB/s:
//
//   n, k             floor   m = 1     16     64    128
//   6160, 2048         5.9     8.0    8.6   10.6   14.6
//   2048, 2048         2.0     4.0    4.3    5.9   10.9
//   11264, 2048       10.9    13.3   14.0   17.0   19.2
//   2048, 5632         5.4     8.0    8.6   11.1   16.6
//   32000, 2048       30.8    31.8   33.1   35.5   39.5
//
// What is missing is in the handing over: some 2 us a product from the end of one to the tokens of the next,
// in which the ring fills up and the memory then idles; and with many tokens the reading of them and the
// adding up.
#include <algorithm>
#include <cstdint>

#include "model/base/status_macros.h"
#include "model/ops/cuda_kernels.h"
#include "model/ops/cuda_sm90.cuh"
#include "model/ops/cuda_tile_map.cuh"
#include "model/ops/cuda_util.cuh"
#include "model/ops/cuda_vector.cuh"

namespace deltanet {
namespace {

constexpr int kMostTokens = 128;
constexpr int kRows = 128;         // Of b in a block.
constexpr int kStep = 64;          // Elements of k in a stage.
constexpr int kConsumers = 2;      // Warpgroups that multiply.
constexpr int kMostBlocks = 8;     // Of a cluster.
constexpr int kPitch = kRows + 4;  // Floats of a token's sums: no two lanes of a warp meet in a bank.
constexpr int kThreads = 128 * kConsumers + 32;
static_assert(kRows == kSquaresOf, "a tile's squares are one sum");

using Then = FusedGemmArgs::Then;

struct Problem {
  int m, k, steps;
  int columns;                    // Of c.
  int rows_of_tile, second_half;  // Of b: from tile to tile, and from a tile's first 64 rows to the others.
  bool vectors;                   // Whether four neighbouring values of c can be stored at once.
  void* c;
  int64_t ldc;
  const float* squares;  // [m, squares_width]
  int squares_width;
  RmsEpsilon epsilon;
  GateKind gate;
  float* x;  // [m, columns]
  const float* scale;
  float* x_squares;  // [m, tiles]
};

template <int kTokens>
struct Layout {
  static constexpr int kRowsBytes = kRows * kStep * 2;
  static constexpr int kStageBytes = kRowsBytes + kTokens * kStep * 2;
  static constexpr int kStages = (112 * 1024 - 4 * kTokens - 128) / kStageBytes;
  static constexpr int kFactors = kStages * kStageBytes;  // [kTokens] Floats.
  static constexpr int kBarriers = kFactors + 4 * kTokens;
  static constexpr int kBytes = kBarriers + 16 * kStages;
  static_assert(kTokens * kPitch * 4 <= kFactors, "the sums take the ring's place");

  __device__ static uint32_t Rows(uint32_t base, int slot) { return base + slot * kStageBytes; }
  __device__ static uint32_t Tokens(uint32_t base, int slot) { return Rows(base, slot) + kRowsBytes; }
  __device__ static uint32_t Loaded(uint32_t base, int slot) { return base + kBarriers + 16 * slot; }
  __device__ static uint32_t Free(uint32_t base, int slot) { return Loaded(base, slot) + 8; }
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// By one thread: steps [first, first + steps) of row tile `tile` into the ring.
template <int kTokens>
__device__ inline void Produce(const CUtensorMap* rows, const CUtensorMap* tokens, const Problem& problem,
                               uint32_t base, int tile, int first, int steps) {
  using L = Layout<kTokens>;
  const int row = tile * problem.rows_of_tile;
  const auto copy_rows = [&](int step) {
    const int slot = step % L::kStages, k = (first + step) * kStep;
    BarrierArriveExpecting(L::Loaded(base, slot), L::kStageBytes);
    CopyBox(L::Rows(base, slot), rows, k, row, L::Loaded(base, slot));
    CopyBox(L::Rows(base, slot) + kTileBytes, rows, k, row + problem.second_half, L::Loaded(base, slot));
  };
  const auto copy_tokens = [&](int step) {
    const int slot = step % L::kStages;
    CopyBox(L::Tokens(base, slot), tokens, (first + step) * kStep, 0, L::Loaded(base, slot));
  };
  const int filled = min(steps, L::kStages);
  for (int step = 0; step < filled; ++step) copy_rows(step);
  PrefetchMap(tokens);
  AwaitEarlier();
  for (int step = 0; step < filled; ++step) copy_tokens(step);
  for (int step = filled; step < steps; ++step) {
    BarrierWait(L::Free(base, step % L::kStages), (step / L::kStages - 1) & 1);
    copy_rows(step);
    copy_tokens(step);
  }
}

// By the warps that multiply: the factors of the tokens' RMSNorms.
template <int kTokens>
__device__ inline void FindFactors(const Problem& problem, float* factors) {
  constexpr int kWarps = 4 * kConsumers, kHeld = kTokens / kWarps;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float squares[kHeld] = {};
  AwaitEarlier();
  for (int j = lane; j < problem.squares_width; j += 32) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int token = warp + i * kWarps;
      if (token < problem.m) squares[i] += problem.squares[int64_t{token} * problem.squares_width + j];
    }
  }
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const float mean = WarpSum(squares[i]) / static_cast<float>(problem.k);
    const float factor = 1.0f / (sqrtf(mean + problem.epsilon.inside) + problem.epsilon.after);
    if (lane == 0) factors[warp + i * kWarps] = factor;
  }
}

// By warpgroup `group`: the sums of its 64 rows and all tokens over the block's steps, into shared memory,
// [token, row], in the ring's place.
template <int kTokens>
__device__ inline void Multiply(uint32_t base, float* sums_of_block, int group, int steps) {
  using L = Layout<kTokens>;
  const int thread = threadIdx.x % 128, lane = thread % 32;
  float sums[kTokens / 2];
  for (int step = 0; step < steps; ++step) {
    const int slot = step % L::kStages;
    BarrierWait(L::Loaded(base, slot), (step / L::kStages) & 1);
    const uint32_t rows = TileByRows(L::Rows(base, slot) + group * kTileBytes);
    const uint32_t tokens = TileByRows(L::Tokens(base, slot));
    AsyncProductsBegin();
#pragma unroll
    for (int i = 0; i < kStep / 16; ++i) {
      AsyncProductShared<kTokens>(sums, Further(rows, 32 * i), Further(tokens, 32 * i), step > 0 || i > 0);
    }
    AsyncProductsEnd();
    AsyncProductsWait<1>();
    if (step > 0 && lane == 0) BarrierArrive(L::Free(base, (step - 1) % L::kStages));
  }
  AsyncProductsWait<0>();
  Pin(sums);
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

// By all threads of the block: what becomes of its part of the tile's tokens, a warp each, when the cluster's
// blocks have left their sums. A lane has as many of these on their way as there may be blocks.
template <int kTokens, Then kThen, typename C, int kBlocks>
__device__ inline void Finish(const Problem& problem, uint32_t base, const float* factors, int tile,
                              int rank) {
  constexpr int kWarps = 4 * kConsumers, kShare = kTokens / kBlocks;
  constexpr int kAtOnce =
      kShare < kWarps ? 1 : std::min(kShare / kWarps, kMostBlocks / kBlocks);  // Of a warp.
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int end = min(problem.m, (rank + 1) * kShare);
  int token = warp < kWarps ? rank * kShare + warp : end;
  const int column = kThen == Then::kGate ? tile * (kRows / 2) + 4 * (lane % 16) : tile * kRows + 4 * lane;
  const bool inside = column < problem.columns;
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
  ClusterBarrier();
  for (; token < end; token += kAtOnce * kWarps) {
    if (kThen == Then::kAdd && token >= rank * kShare + kAtOnce * kWarps) fetch();
    float4 parts[kAtOnce][kBlocks];
#pragma unroll
    for (int t = 0; t < kAtOnce; ++t) {
#pragma unroll
      for (int r = 0; r < kBlocks; ++r) {
        const int place = min(token + t * kWarps, kTokens - 1) * kPitch + 4 * lane;
        parts[t][r] = LoadFromBlock(base + place * static_cast<int>(sizeof(float)), r);
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
        if (problem.vectors && column + 4 <= problem.columns) {
          Store<4>(sum, to);
        } else {
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            if (column + j < problem.columns) to[j] = FromFloat<C>(sum[j]);
          }
        }
      } else if constexpr (kThen == Then::kGate) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float second = __shfl_down_sync(0xffffffffu, sum[j], 16);
          sum[j] = Gated<C>(problem.gate, sum[j], second);
        }
        if (lane < 16 && inside) Store<4>(sum, to);
      } else {
        float squares = 0;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          sum[j] += x[t][j];
          squares = fmaf(sum[j], sum[j], squares);
        }
        if (inside) Store<4>(sum, problem.x + i * problem.columns + column);
        if (problem.scale != nullptr) {
          squares = WarpSum(inside ? squares : 0.0f);
          if (lane == 0) problem.x_squares[i * (gridDim.x / kBlocks) + tile] = squares;
#pragma unroll
          for (int j = 0; j < 4; ++j) sum[j] *= scale[j];
          if (inside) Store<4>(sum, to);
        }
      }
    }
  }
  if (kBlocks > 1) ClusterBarrier();  // The others still read this block's sums.
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
      BarrierInit(L::Loaded(base, slot), 1);
      BarrierInit(L::Free(base, slot), 4 * kConsumers);
    }
    BarrierInitFence();
  }
  __syncthreads();
  LetNextBegin();

  const int blocks = ClusterBlocks(), rank = ClusterRank();
  const int tile = static_cast<int>(blockIdx.x) / blocks;
  const int first = problem.steps * rank / blocks, steps = problem.steps * (rank + 1) / blocks - first;
  const int group = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 128, 0);
  // Nobody gets past the products before the tokens are there, so before AwaitEarlier is past.
  float* const factors = reinterpret_cast<float*>(memory + L::kFactors);
  if (group == kConsumers) {
    if (threadIdx.x % 32 == 0) Produce<kTokens>(&rows, &tokens, problem, base, tile, first, steps);
    __syncwarp();
  } else {
    if (problem.squares != nullptr) FindFactors<kTokens>(problem, factors);
    Multiply<kTokens>(base, reinterpret_cast<float*>(memory), group, steps);
  }
  switch (blocks) {
    case 1:
      return Finish<kTokens, kThen, C, 1>(problem, base, factors, tile, rank);
    case 2:
      return Finish<kTokens, kThen, C, 2>(problem, base, factors, tile, rank);
    case 4:
      return Finish<kTokens, kThen, C, 4>(problem, base, factors, tile, rank);
    default:
      return Finish<kTokens, kThen, C, kMostBlocks>(problem, base, factors, tile, rank);
  }
#endif
}

// The map of a [rows, columns] matrix of which boxes of `box_rows` and kStep columns are copied into tiles.
absl::Status MapMatrix(const void* data, int64_t rows, int64_t columns, int64_t stride, int box_rows,
                       CUtensorMap* map) {
  const auto bytes = static_cast<uint64_t>(stride) * sizeof(__nv_bfloat16);
  return MapBoxes<2>(data, {static_cast<uint64_t>(columns), static_cast<uint64_t>(rows)}, {bytes},
                     {kStep, static_cast<uint32_t>(box_rows)}, map);
}

template <int kTokens, Then kThen, typename C>
absl::Status Launch(const FusedGemmArgs& args, cudaStream_t stream) {
  using L = Layout<kTokens>;
  const GemmArgs& gemm = args.gemm;
  const auto kernel = GemmSkinnyKernel<kTokens, kThen, C>;
  int device = 0, processors = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device) != cudaSuccess ||
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, L::kBytes) != cudaSuccess) {
    return LaunchStatus("GemmSkinnyKernel");
  }
  CUtensorMap rows, tokens;
  RETURN_IF_ERROR(MapMatrix(gemm.b, gemm.n, gemm.k, gemm.ldb, kRows / 2, &rows));
  RETURN_IF_ERROR(MapMatrix(gemm.a, gemm.m, gemm.k, gemm.lda, kTokens, &tokens));
  const auto up = [](int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); };
  Problem problem;
  problem.m = static_cast<int>(gemm.m);
  problem.k = static_cast<int>(gemm.k);
  problem.steps = up(gemm.k, kStep);
  problem.columns = static_cast<int>(kThen == Then::kGate ? gemm.n / 2 : gemm.n);
  problem.rows_of_tile = kThen == Then::kGate ? kRows / 2 : kRows;
  problem.second_half = kThen == Then::kGate ? problem.columns : kRows / 2;
  problem.vectors = gemm.ldc % 4 == 0 && Aligned16({gemm.c});
  problem.c = gemm.c;
  problem.ldc = gemm.ldc;
  problem.squares = args.squares;
  problem.squares_width = static_cast<int>(SquaresWidth(gemm.k));
  problem.epsilon = args.epsilon;
  problem.gate = args.gate;
  problem.x = args.x;
  problem.scale = args.scale;
  problem.x_squares = args.x_squares;
  const int tiles = up(problem.columns, problem.rows_of_tile);
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
  if (gemm.dtype != DType::kBFloat16 || gemm.fixed_order || gemm.m > kMostTokens || gemm.n >= kMost ||
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
  if (args.gemm.m <= 64) return Launch<64>(args, cuda_stream);
  return Launch<128>(args, cuda_stream);
}

}  // namespace deltanet
