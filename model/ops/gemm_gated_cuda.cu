// Products of many rows in bfloat16 on Hopper, and the gated unit of what they give (FusedGemmArgs,
// Then::kGate): c [m, f] of a [m, k] and b [2f, k].
//
// Tiling: a block stays and makes tiles of 128 rows and 88 columns of c, so of 176 rows of b: 88 of the first
// half and the 88 that belong to them. One thread queues copies of steps of 64 elements of k into a ring of
// five stages in shared memory, 16 KiB of a and 22 of b. Two warpgroups multiply, 64 rows each; a thread has
// both sums that make a value. A warpgroup has two sets of sums: while its products of a tile's first six
// steps run, it gates the tile before, 16 columns at a time, and leaves them in shared memory, whence they
// are copied out. So the tensor cores do not wait for the gate. Of 2048 rows of a all tiles are made before
// the next, so that they stay in the L2. With many rows two blocks are a cluster, one below the other: each
// copies one half of their rows of b into both.
//
// FLOPs: 4 m f k, 756 G for 16,384 tokens of the 1.3B model (f = 5632, k = 2048), which is 0.76 ms at the 990
// TFLOP/s of full clocks; but the device's power bounds it, at some 1.4 GHz. Bytes: 2 (m k + m f), and 4 f k
// for every 2048 rows, 0.6 GB in all; from the L2 into the blocks 7 GB.
//
// On an H200 (27 November 2026), in us, each for 12 ms or longer in turn with the product of a library
// (gemm_lt_cuda.cu) and the kernel of the gated unit behind it:
//
//   m                  256    384    512   1024   2048   4096   16384
//   product           20.5   28.0   38.1   71.2    154    266    1047
//   and gated unit    23.6   32.2   42.9   80.4    172    304    1181
//   this              22.4   37.9   38.6   71.4    142    275    1058
//
// On end for longer than 100 ms, 16,384 rows took 1075 on one card and 1248 on another, the library's product
// 1061 and 1059; but in the 1.3B model, where other kernels are between, prefill of 8 x 2048 tokens took 68.5
// ms instead of 70.4 on one card, 69.3 instead of 71.9 on another, of 1 x 2048 10.4 instead of 11.0, of 64 x
// 64 18.5 instead of 18.9.
//
// ncu, m = 16,384, one alone, so that the power does not yet count: 950 us, the tensor cores busy in 98 % of
// the cycles, the memory at 14 % of its peak, 90 % of what is read in the L2.
//
// With fewer rows a last round of tiles for few blocks counts (FillsRounds). Tried and no gain, at m =
// 16,384: one set of sums and tiles of 88 to 128 columns, or of 256 rows (1134 to 1290: of the cycles a tenth
// is then the gate's), also with one warpgroup some steps ahead of the other; clusters that share a, or of
// four (30 of them fit); the gate in three parts instead of six (1085); groups of 1024 rows (1062) or 4096
// (1077); in the model, two warpgroups that multiply in turn, a tile each, so that one gates while the other
// multiplies.
//
// Nor is the same kernel any good for the layer's other products, with the norm's factor before and, where they
// add to the residual stream, the sums of its squares after, which would save both RMSNorms (28 November 2026,
// 2048, 4096, 16,384 rows, in us, the library's, and the norm): to q, k, v, beta, of which four stages fit, 86,
// 160, 659 (69, 155, 617); out 51, 89, 318 (27 + 8, 55 + 16, 230 + 53); down 109, 179, 718 (72 + 8, 145 + 16,
// 576 + 53; a test of it still failed). What is added has no room in shared memory to come ahead, and to be
// loaded by threads between products holds these up; with tiles of 128 columns it has, and shared memory is
// then what bounds (45 and 91 us with 2048 rows).
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

constexpr int kRows = 128;         // Of a in a block's tile,
constexpr int kColumns = 88;       // and its columns of c.
constexpr int kStep = 64;          // Elements of k in a stage.
constexpr int kConsumers = 2;      // Warpgroups that multiply.
constexpr int kGroupRows = 2048;   // Of a.
constexpr int kManyRows = 2048;    // From which on blocks share b,
constexpr int kFewestRows = 1024;  // and from which on this is faster whatever the tiles.
constexpr int kThreads = 128 * (kConsumers + 1);
constexpr int kConsumerRegisters = 240, kCopierRegisters = 24;

constexpr int kABytes = kRows * kStep * 2, kBBytes = 2 * kColumns * kStep * 2,
              kStageBytes = kABytes + kBBytes;
constexpr int kStages = 5;
constexpr int kOutRows = 16;                        // Of c, a warp's,
constexpr int kOutBytes = kOutRows * kColumns * 2;  // on their way out.
constexpr int kOut = kStages * kStageBytes;
constexpr int kBarriers = kOut + 4 * kConsumers * kOutBytes;
constexpr int kBytes = kBarriers + 16 * kStages;
constexpr int kPairs = (kColumns / 8 + 1) / 2;  // Of 8 columns of c, the last one half.
static_assert(kColumns / 8 % 2 == 1, "rows of c that are written together meet in no bank");

struct Problem {
  int f;
  int steps;                    // Of k, kPairs at least: beyond k all is zero.
  int row_tiles, column_tiles;  // Of a cluster.
  int group;                    // Row tiles that are made before the next ones.
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

__device__ inline uint32_t A(uint32_t base, int slot) { return base + slot * kStageBytes; }
__device__ inline uint32_t B(uint32_t base, int slot) { return A(base, slot) + kABytes; }
__device__ inline uint32_t There(uint32_t base, int slot) { return base + kBarriers + 16 * slot; }
__device__ inline uint32_t Free(uint32_t base, int slot) { return There(base, slot) + 8; }

// What a block makes: its part of every `stride`-th of the clusters' tiles.
struct Share {
  int first, stride, count;  // Of tiles.
  int rank, blocks;          // Of the block in its cluster.

  // The first row and column of c of the part.
  __device__ void Find(const Problem& problem, int tile, int* row, int* column) const {
    const int of_group = problem.group * problem.column_tiles, group = tile / of_group;
    const int rows = min(problem.group, problem.row_tiles - group * problem.group),
              within = tile - group * of_group;
    *row = ((group * problem.group + within % rows) * blocks + rank) * kRows;
    *column = within / rows * kColumns;
  }
};

// By one thread.
template <int kBlocks>
__device__ inline void Produce(const CUtensorMap* a, const CUtensorMap* b, const Problem& problem,
                               const Share& share, uint32_t base) {
  int row, column;
  const auto copy_a = [&](int step, int slot) {
    CopyBox(A(base, slot), a, step * kStep, row, There(base, slot));
  };
  const auto copy_b = [&](int step, int slot) {
    const uint32_t to = B(base, slot), there = There(base, slot);
    if constexpr (kBlocks == 1) {
      CopyBox(to, b, step * kStep, column, there);
      CopyBox(to + kBBytes / 2, b, step * kStep, column + problem.f, there);
    } else {
      CopyBoxToBlocks(to + share.rank * (kBBytes / 2), b, step * kStep, column + share.rank * problem.f,
                      there, 3);
    }
  };
  Ring<kStages> stage;
  share.Find(problem, share.first, &row, &column);
  const int ahead = min(problem.steps, kStages);
  for (int step = 0; step < ahead; ++step) {
    BarrierArriveExpecting(There(base, step), kStageBytes);
    copy_b(step, step);
  }
  AwaitEarlier();
  for (int step = 0; step < ahead; ++step, stage.Next()) copy_a(step, step);
  for (int tile = share.first, begin = ahead; tile < share.count; tile += share.stride, begin = 0) {
    share.Find(problem, tile, &row, &column);
    for (int step = begin; step < problem.steps; ++step, stage.Next()) {
      BarrierWait(Free(base, stage.at), stage.parity ^ 1);
      BarrierArriveExpecting(There(base, stage.at), kStageBytes);
      copy_a(step, stage.at);
      copy_b(step, stage.at);
    }
  }
}

// By a warpgroup, 64 rows of each tile. Nobody gets past the products before a is there, so before
// AwaitEarlier is past.
template <int kBlocks, GateKind kGate>
__device__ inline void Consume(const CUtensorMap* c, const Problem& problem, const Share& share,
                               uint32_t base) {
  const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 32, 0), lane = threadIdx.x % 32;
  const uint32_t out = base + kOut + warp * kOutBytes;
  const uint32_t out_one = out + lane % 16 * (kColumns * 2), out_two = out_one + lane / 16 * 16;
  int tile = share.first, before = 0;  // The stage before the one in hand.
  Ring<kStages> stage;
  const auto multiply = [&](float (&sums)[kColumns], int step) {
    BarrierWait(There(base, stage.at), stage.parity);
    const uint32_t a = TileByRows(A(base, stage.at) + warp / 4 * kTileBytes), b = TileByRows(B(base, stage.at));
    AsyncProductsBegin();
#pragma unroll
    for (int i = 0; i < kStep / 16; ++i) {
      AsyncProductShared<2 * kColumns>(sums, Further(a, 32 * i), Further(b, 32 * i), step > 0 || i > 0);
    }
    AsyncProductsEnd();
  };
  const auto release = [&] {
    if constexpr (kBlocks == 1) {
      if (lane == 0) BarrierArrive(Free(base, before));
    } else {
      if (lane < kBlocks) BarrierArriveThere(InBlock(Free(base, before), lane), 1);
    }
  };
  const auto advance = [&](int step) {
    AsyncProductsWait<1>();
    if (step > 0) release();
    before = stage.at;
    stage.Next();
  };
  const auto multiply_rest = [&](float (&sums)[kColumns], int begin) {
    for (int step = begin; step < problem.steps; ++step) {
      multiply(sums, step);
      advance(step);
    }
    AsyncProductsWait<0>();
    Pin(sums);
    release();
  };
  // A pair of what becomes of the sums of tile `of`, one pair after the other.
  const auto finish = [&](const float (&sums)[kColumns], int of, int pair) {
    if (pair == 0) {
      CopyOutWait();
      __syncwarp();
    }
    const bool two = 2 * pair + 1 < kColumns / 8;
    float x[8];
#pragma unroll
    for (int i = 0; i < (two ? 8 : 4); ++i) {
      x[i] = Gated<__nv_bfloat16>(kGate, sums[8 * pair + i], sums[8 * pair + i + kColumns / 2]);
    }
    const float* const y = two ? x + 4 : x;
    StoreMatrices((two ? out_two : out_one) + 32 * pair, PackBfloat16(x[0], x[1]), PackBfloat16(x[2], x[3]),
                  PackBfloat16(y[0], y[1]), PackBfloat16(y[2], y[3]));
    if (pair < kPairs - 1) return;
    FenceAsyncProxy();
    __syncwarp();
    if (lane == 0) {
      int row, column;
      share.Find(problem, of, &row, &column);
      CopyBoxOut(c, column, row + kOutRows * warp, out);
    }
  };
  // Finishes this tile, and makes the sums of the next, if there is one. (Were this one loop with conditions
  // in it, the compiler would have each product wait for the one before.)
  const auto turn = [&](const float (&finished)[kColumns], float (&sums)[kColumns]) {
    const int of = tile;
    tile += share.stride;
    if (tile >= share.count) {
#pragma unroll
      for (int pair = 0; pair < kPairs; ++pair) finish(finished, of, pair);
      return false;
    }
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {
      multiply(sums, pair);
      advance(pair);
      finish(finished, of, pair);
    }
    multiply_rest(sums, kPairs);
    return true;
  };
  float even[kColumns], odd[kColumns];
  multiply_rest(even, 0);
  while (turn(even, odd) && turn(odd, even)) {
  }
  CopyOutWait();
}

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

template <int kBlocks, GateKind kGate>
__global__ void __launch_bounds__(kThreads, 1)
    GemmGatedKernel(const __grid_constant__ CUtensorMap a, const __grid_constant__ CUtensorMap b,
                    const __grid_constant__ CUtensorMap c, const Problem problem) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  const uint32_t base = SharedAddress(DynamicSharedMemory());
  if (threadIdx.x == 0) {
    for (int slot = 0; slot < kStages; ++slot) {
      BarrierInit(There(base, slot), 1);
      BarrierInit(Free(base, slot), 4 * kConsumers * kBlocks);
    }
    BarrierInitFence();
  }
  kBlocks == 1 ? __syncthreads() : ClusterBarrierOfShared();
  const Share share = {.first = static_cast<int>(blockIdx.x) / kBlocks,
                       .stride = static_cast<int>(gridDim.x) / kBlocks,
                       .count = problem.row_tiles * problem.column_tiles,
                       .rank = kBlocks == 1 ? 0 : ClusterRank(),
                       .blocks = kBlocks};
  if (threadIdx.x / 128 < kConsumers) {
    MoreRegisters<kConsumerRegisters>();
    Consume<kBlocks, kGate>(&c, problem, share, base);
  } else {
    FewerRegisters<kCopierRegisters>();
    if (threadIdx.x == 128 * kConsumers) Produce<kBlocks>(&a, &b, problem, share, base);
  }
  if (kBlocks > 1) ClusterBarrier();  // The other block still arrives at this one's barriers.
#endif
}

// Whether c takes up most of the tiles that the device's blocks could make in as many rounds.
bool FillsRounds(int64_t m, int64_t f) {
  const int64_t processors = Processors(),
                rounds = Pieces(Pieces(m, kRows) * Pieces(f, kColumns), processors);
  return 8 * m * f >= 7 * rounds * processors * kRows * kColumns;
}

template <int kBlocks, GateKind kGate>
absl::Status Launch(const FusedGemmArgs& args, cudaStream_t stream) {
  const GemmArgs& gemm = args.gemm;
  const auto kernel = GemmGatedKernel<kBlocks, kGate>;
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes) != cudaSuccess) {
    return LaunchStatus("GemmGatedKernel");
  }
  const int64_t f = gemm.n / 2;
  CUtensorMap a, b, c;
  RETURN_IF_ERROR(MapMatrix(gemm.a, gemm.m, gemm.k, gemm.lda, {kStep, kRows}, &a));
  RETURN_IF_ERROR(MapMatrix(gemm.b, gemm.n, gemm.k, gemm.ldb, {kStep, kColumns}, &b));
  RETURN_IF_ERROR(
      MapMatrix(gemm.c, gemm.m, f, gemm.ldc, {kColumns, kOutRows}, &c, CU_TENSOR_MAP_SWIZZLE_NONE));
  Problem problem;
  problem.f = static_cast<int>(f);
  problem.steps = std::max(static_cast<int>(Pieces(gemm.k, kStep)), kPairs);
  problem.row_tiles = static_cast<int>(Pieces(gemm.m, kRows * kBlocks));
  problem.column_tiles = static_cast<int>(Pieces(f, kColumns));
  problem.group = kGroupRows / (kRows * kBlocks);
  const int64_t clusters =
      std::min<int64_t>(Processors() / kBlocks, int64_t{problem.row_tiles} * problem.column_tiles);
  return LaunchOverlapping("GemmGatedKernel", kernel,
                           {.grid = dim3(static_cast<unsigned>(clusters * kBlocks)),
                            .threads = kThreads,
                            .shared_bytes = kBytes,
                            .cluster = kBlocks},
                           stream, a, b, c, problem);
}

template <int kBlocks>
absl::Status Launch(const FusedGemmArgs& args, cudaStream_t stream) {
  return args.gate == GateKind::kSiluFirst ? Launch<kBlocks, GateKind::kSiluFirst>(args, stream)
                                           : Launch<kBlocks, GateKind::kSigmoidSecond>(args, stream);
}

}  // namespace

bool GemmGatedCudaTakes(const FusedGemmArgs& args) {
  constexpr int64_t kMost = int64_t{1} << 21;  // Numbers of tiles, and coordinates, are ints.
  const GemmArgs& gemm = args.gemm;
  return args.then == FusedGemmArgs::Then::kGate && args.squares == nullptr &&
         gemm.dtype == DType::kBFloat16 && gemm.c_dtype == DType::kBFloat16 && !gemm.fixed_order &&
         gemm.m < kMost && gemm.n < kMost && gemm.k < kMost && gemm.n % 16 == 0 && gemm.lda % 8 == 0 &&
         gemm.ldb % 8 == 0 && gemm.ldc % 8 == 0 && Aligned16({gemm.a, gemm.b, gemm.c}) &&
         RunsHopperCode(reinterpret_cast<const void*>(&GemmGatedKernel<1, GateKind::kSiluFirst>)) &&
         (gemm.m >= kFewestRows || FillsRounds(gemm.m, gemm.n / 2));
}

absl::Status GemmGatedCuda(const FusedGemmArgs& args, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  return args.gemm.m >= kManyRows ? Launch<2>(args, cuda_stream) : Launch<1>(args, cuda_stream);
}

}  // namespace deltanet
