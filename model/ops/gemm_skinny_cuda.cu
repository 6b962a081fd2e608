// Products of few rows in bfloat16 on Hopper, for steps that read each weight once for a handful of tokens: c [m, n]
// = a [m, k] b^T, b [n, k], m at most kMostTokens.
//
// Tiling: b is the operand with the product's 64 rows, the tokens are its columns (8, 16, 32, 64 or 128 of them). A
// block has 128 rows of b and all tokens; two warpgroups multiply, 64 rows each, and one thread of a further warp
// queues the copies, in steps of 64 elements of k, into a ring in shared memory: 16 KiB of b and up to 16 KiB of a
// a step, at most 112 KiB, so that two blocks fit a multiprocessor and 17 to 25 MB are under way. Where b has fewer
// tiles than would fill the device, 2, 4 or 8 blocks share a tile, each a part of k; they are a cluster, each leaves
// its sums in its shared memory, and each adds up a part of the tile, of all blocks in the order of their ranks. So
// there are no atomics and no workspace, and the same operands give the same bits.
//
// The kernel begins while the one before it still runs (LaunchOverlapping): the ring is filled with b, which is
// constant; then it waits for its tokens. (To bring the rest of b into the L2 meanwhile was no gain, and a loss where
// b is larger than the L2.)
//
// Bytes: 2 n k of b, and 2 m k of a for each tile, out of the L2. FLOPs: 2 m n k, of which tensor cores have plenty.
// Floor at 4.25 TB/s: n = 6160, k = 2048 in 5.9 us; 2048, 2048 in 2.0; 11264, 2048 in 10.9; 2048, 5632 in 5.4.
#include <cuda.h>

#include <algorithm>
#include <cstdint>

#include "absl/strings/str_cat.h"
#include "model/base/status_macros.h"
#include "model/ops/cuda_kernels.h"
#include "model/ops/cuda_sm90.cuh"
#include "model/ops/cuda_util.cuh"
#include "model/ops/cuda_vector.cuh"

namespace deltanet {
namespace {

constexpr int kMostTokens = 128;
constexpr int kRows = 128;          // Of b in a block.
constexpr int kStep = 64;           // Elements of k in a stage.
constexpr int kConsumers = 2;       // Warpgroups that multiply.
constexpr int kMostBlocks = 8;      // Of a cluster.
constexpr int kPitch = kRows + 4;   // Floats of a token's sums in shared memory: no two lanes of a warp meet in a bank.
constexpr int kThreads = 128 * kConsumers + 32;

struct Problem {
  int m, n, steps;
  bool vectors;  // Whether four neighbouring values of c can be stored at once.
  void* c;
  int64_t ldc;
};

template <int kTokens>
struct Layout {
  static constexpr int kRowsBytes = kRows * kStep * 2;
  static constexpr int kStageBytes = kRowsBytes + kTokens * kStep * 2;
  static constexpr int kStages = (112 * 1024 - 128) / kStageBytes;
  static constexpr int kBarriers = kStages * kStageBytes;
  static constexpr int kBytes = kBarriers + 16 * kStages;
  static_assert(kTokens * kPitch * 4 <= kBarriers, "the sums take the ring's place");

  __device__ static uint32_t Rows(uint32_t base, int slot) { return base + slot * kStageBytes; }
  __device__ static uint32_t Tokens(uint32_t base, int slot) { return Rows(base, slot) + kRowsBytes; }
  __device__ static uint32_t Loaded(uint32_t base, int slot) { return base + kBarriers + 16 * slot; }
  __device__ static uint32_t Free(uint32_t base, int slot) { return Loaded(base, slot) + 8; }
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// By one thread: steps [first, first + steps) of row tile `tile` into the ring.
template <int kTokens>
__device__ inline void Produce(const CUtensorMap* rows, const CUtensorMap* tokens, uint32_t base, int tile, int first,
                               int steps) {
  using L = Layout<kTokens>;
  const auto copy_rows = [&](int step) {
    const int slot = step % L::kStages;
    BarrierArriveExpecting(L::Loaded(base, slot), L::kStageBytes);
    CopyBox(L::Rows(base, slot), rows, (first + step) * kStep, tile * kRows, L::Loaded(base, slot));
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

// By warpgroup `group`: the sums of its 64 rows and all tokens over the block's steps, into shared memory, [token,
// row], in the ring's place.
template <int kTokens>
__device__ inline void Multiply(uint32_t base, float* sums_of_block, int group, int steps) {
  using L = Layout<kTokens>;
  const int thread = threadIdx.x % 128, lane = thread % 32;
  float sums[kTokens / 2];
#pragma unroll
  for (int i = 0; i < kTokens / 2; ++i) sums[i] = 0.0f;
  for (int step = 0; step < steps; ++step) {
    const int slot = step % L::kStages;
    BarrierWait(L::Loaded(base, slot), (step / L::kStages) & 1);
    const uint32_t rows = TileByRows(L::Rows(base, slot) + group * kTileBytes);
    const uint32_t tokens = TileByRows(L::Tokens(base, slot));
    Pin(sums);
    AsyncProductsBegin();
#pragma unroll
    for (int i = 0; i < kStep / 16; ++i) {
      AsyncProductShared<kTokens>(sums, Further(rows, 32 * i), Further(tokens, 32 * i), true);
    }
    AsyncProductsEnd();
    AsyncProductsWait<0>();
    Pin(sums);
    if (lane == 0) BarrierArrive(L::Free(base, slot));
  }
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

// This block's part of the tile: four neighbouring rows of b and a token a thread.
template <typename C>
__device__ inline void AddUp(const Problem& problem, uint32_t base, int tile, int rank, int blocks) {
  const int fours = problem.m * (kRows / 4);
  const int share = (fours + blocks - 1) / blocks;
  const int end = min(fours, (rank + 1) * share);
  for (int i = rank * share + static_cast<int>(threadIdx.x); i < end; i += 128 * kConsumers) {
    const int token = i / (kRows / 4), row = 4 * (i % (kRows / 4));
    const uint32_t address = base + (token * kPitch + row) * static_cast<int>(sizeof(float));
    float4 parts[kMostBlocks];
#pragma unroll
    for (int r = 0; r < kMostBlocks; ++r) {
      if (r < blocks) parts[r] = LoadFromBlock(address, r);
    }
    float sum[4] = {};
#pragma unroll
    for (int r = 0; r < kMostBlocks; ++r) {
      if (r >= blocks) break;
      sum[0] += parts[r].x, sum[1] += parts[r].y, sum[2] += parts[r].z, sum[3] += parts[r].w;
    }
    const int column = tile * kRows + row;
    C* const to = static_cast<C*>(problem.c) + token * problem.ldc + column;
    if (problem.vectors && column + 4 <= problem.n) {
      Store<4>(sum, to);
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (column + j < problem.n) to[j] = FromFloat<C>(sum[j]);
      }
    }
  }
}

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

template <int kTokens, typename C>
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
  if (group == kConsumers) {
    if (threadIdx.x % 32 == 0) Produce<kTokens>(&rows, &tokens, base, tile, first, steps);
    __syncwarp();
  } else {
    Multiply<kTokens>(base, reinterpret_cast<float*>(memory), group, steps);
  }
  ClusterBarrier();
  if (group < kConsumers) AddUp<C>(problem, base, tile, rank, blocks);
  if (blocks > 1) ClusterBarrier();  // The others still read this block's sums.
#endif
}

// The map of a [rows, columns] matrix of which boxes of `box_rows` and kStep columns are copied into tiles.
absl::Status MapMatrix(const void* data, int64_t rows, int64_t columns, int64_t stride, int box_rows,
                       CUtensorMap* map) {
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found) !=
            cudaSuccess ||
        found != cudaDriverEntryPointSuccess) {
      function = nullptr;
    }
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  if (encode == nullptr) return absl::InternalError("the driver has no cuTensorMapEncodeTiled");
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(stride) * sizeof(__nv_bfloat16)};
  const cuuint32_t box[] = {kStep, static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[] = {1, 1};
  const CUresult result =
      encode(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<void*>(data), sizes, strides, box, steps,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result == CUDA_SUCCESS) return absl::OkStatus();
  return absl::InternalError(absl::StrCat("mapping a matrix [", rows, ",", columns, "] with row stride ", stride,
                                          ": CUDA error ", static_cast<int>(result)));
}

template <int kTokens, typename C>
absl::Status Launch(const GemmArgs& args, cudaStream_t stream) {
  using L = Layout<kTokens>;
  const auto kernel = GemmSkinnyKernel<kTokens, C>;
  int device = 0, processors = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device) != cudaSuccess ||
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, L::kBytes) != cudaSuccess) {
    return LaunchStatus("GemmSkinnyKernel");
  }
  CUtensorMap rows, tokens;
  RETURN_IF_ERROR(MapMatrix(args.b, args.n, args.k, args.ldb, kRows, &rows));
  RETURN_IF_ERROR(MapMatrix(args.a, args.m, args.k, args.lda, kTokens, &tokens));
  const auto up = [](int64_t a, int b) { return static_cast<int>((a + b - 1) / b); };
  const int tiles = up(args.n, kRows), steps = up(args.k, kStep);
  int blocks = 1;
  while (2 * blocks <= std::min(kMostBlocks, steps) && 2 * blocks * tiles <= 2 * processors) blocks *= 2;
  Problem problem;
  problem.m = static_cast<int>(args.m);
  problem.n = static_cast<int>(args.n);
  problem.steps = steps;
  problem.vectors = args.ldc % 4 == 0 && Aligned16({args.c});
  problem.c = args.c;
  problem.ldc = args.ldc;
  return LaunchOverlapping("GemmSkinnyKernel", kernel,
                           {.grid = dim3(static_cast<unsigned>(tiles * blocks)),
                            .threads = kThreads,
                            .shared_bytes = L::kBytes,
                            .cluster = blocks},
                           stream, rows, tokens, problem);
}

template <int kTokens>
absl::Status Launch(const GemmArgs& args, cudaStream_t stream) {
  return args.c_dtype == DType::kBFloat16 ? Launch<kTokens, __nv_bfloat16>(args, stream)
                                          : Launch<kTokens, float>(args, stream);
}

}  // namespace

bool GemmSkinnyCudaTakes(const GemmArgs& args) {
  constexpr int64_t kMost = int64_t{1} << 30;  // Coordinates are ints.
  return args.dtype == DType::kBFloat16 && args.m <= kMostTokens && args.n < kMost && args.k < kMost &&
         args.lda % 8 == 0 && args.ldb % 8 == 0 && Aligned16({args.a, args.b}) &&
         RunsHopperCode(reinterpret_cast<const void*>(&GemmSkinnyKernel<8, float>));
}

absl::Status GemmSkinnyCuda(const GemmArgs& args, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  if (args.m <= 8) return Launch<8>(args, cuda_stream);
  if (args.m <= 16) return Launch<16>(args, cuda_stream);
  if (args.m <= 32) return Launch<32>(args, cuda_stream);
  if (args.m <= 64) return Launch<64>(args, cuda_stream);
  return Launch<128>(args, cuda_stream);
}

}  // namespace deltanet
