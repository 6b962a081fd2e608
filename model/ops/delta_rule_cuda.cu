// The delta rule on a GPU, token by token, and the choice between this and the kernel by chunks.
//
// Tiling: a block is 128 threads for 32 columns of one head's state of one row; grid (V/32, H, R). Four
// neighbouring lanes share a column: lane p holds the state rows p, p+4, ... of it in registers for the whole
// row, so the state is read once and written once (8 K V bytes a row and head). Tokens come in tiles of kTile
// through shared memory; a token costs each lane 3 K/4 multiply-adds and two reductions over four lanes, and
// o and u are the only dependency between tokens.
//
// Bytes a token and head: 2K + V read, V written (and k, q again for every further 32 columns). FLOPs: 6 K V.
// ncu (27 November 2026, one H200, at clocks of its own), bfloat16, 16 heads of 128: 256 rows of one token
// 237 us at 45 % of the memory's peak, 16 rows of 16 tokens 57 us at 1 %; the schedulers busy for 62 and 71 %
// of their cycles, 24 % of the warps that fit are there (123 registers a thread). With one token that is
// poor: a lane moves its rows of the state in 4-byte pieces, one address each, and reads q and k of its token
// four times over (DeltaNetStepKernel takes 144 us with the convolutions and norms); with many tokens it is
// the instructions. It is left with float32, and with rows of few tokens of models whose mixer is composed.
//
// Key sizes above 256 keep the state in memory instead (the same code with the state's rows walked in the
// work slot).
#include <algorithm>
#include <cstdint>

#include "model/base/status_macros.h"
#include "model/ops/cuda_kernels.h"
#include "model/ops/cuda_util.cuh"
#include "model/ops/delta_rule_cuda.h"

namespace deltanet {
namespace {

constexpr int kColumns = 32;  // Of a block.
constexpr int kLanes = 4;     // That share a column.
constexpr int kThreads = kColumns * kLanes;
constexpr int kTile = 16;  // Tokens.

__device__ inline float LanesSum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  x += __shfl_xor_sync(0xffffffffu, x, 2);
  return x;
}

// kRows: state rows a lane holds, at least K / 4; 0: the state stays in memory. Rows of more than `most`
// tokens are left alone, as are those of args.longer_than or fewer.
template <typename T, int kRows>
__global__ void __launch_bounds__(kThreads)
    DeltaRuleKernel(RaggedRows rows, DeltaRuleArgs args, int64_t most) {
  LetNextBegin();  // The kernel by chunks, for the other rows.
  extern __shared__ float shared[];
  const int K = static_cast<int>(args.key_dim), V = static_cast<int>(args.value_dim);
  float* tile_q = shared;                     // [kTile, K]
  float* tile_k = tile_q + kTile * K;         // [kTile, K]
  float* tile_v = tile_k + kTile * K;         // [kTile, kColumns]
  float* tile_b = tile_v + kTile * kColumns;  // [kTile]
  const int row = blockIdx.z, head = blockIdx.y;
  const int64_t begin = rows.offsets[row], end = rows.offsets[row + 1];
  if (end - begin > most || end - begin <= args.longer_than || rows.work_slot[row] < 0) return;
  const int first_column = blockIdx.x * kColumns;
  const int lane = threadIdx.x % kLanes;
  const int column = first_column + threadIdx.x / kLanes;
  const bool active = column < V;

  const int64_t head_offset = static_cast<int64_t>(head) * K * V + column;
  const bool fresh = rows.fresh[row] != 0;
  const float* from = fresh ? nullptr : args.state.at(rows.base_slot[row]) + head_offset;
  float* to = args.state.at(rows.work_slot[row]) + head_offset;

  float state[kRows > 0 ? kRows : 1];
  const auto load = [&](int i) {
    const int r = i * kLanes + lane;
    return active && r < K && !fresh ? from[static_cast<int64_t>(r) * V] : 0.0f;
  };
  if constexpr (kRows > 0) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) state[i] = load(i);
  } else if (active) {
    for (int i = 0; i * kLanes + lane < K; ++i) to[static_cast<int64_t>(i * kLanes + lane) * V] = load(i);
  }

  const T* q = static_cast<const T*>(args.q) + head * K;
  const T* k = static_cast<const T*>(args.k) + head * K;
  const T* v = static_cast<const T*>(args.v) + head * V;
  const T* beta = static_cast<const T*>(args.beta) + head;
  const int64_t out_column = static_cast<int64_t>(head) * V + column;
  for (int64_t tile = begin; tile < end; tile += kTile) {
    const int tokens = static_cast<int>(end - tile < kTile ? end - tile : kTile);
    __syncthreads();
    for (int i = threadIdx.x; i < tokens * K; i += kThreads) {
      const int64_t at = (tile + i / K) * args.token_stride + i % K;
      tile_q[i] = ToFloat(q[at]);
      tile_k[i] = ToFloat(k[at]);
    }
    for (int i = threadIdx.x; i < tokens * kColumns; i += kThreads) {
      const int c = first_column + i % kColumns;
      tile_v[i] = c < V ? ToFloat(v[(tile + i / kColumns) * args.token_stride + c]) : 0.0f;
    }
    if (threadIdx.x < tokens) tile_b[threadIdx.x] = ToFloat(beta[(tile + threadIdx.x) * args.token_stride]);
    __syncthreads();
    for (int t = 0; t < tokens; ++t) {
      const float* token_k = tile_k + t * K;
      const float* token_q = tile_q + t * K;
      float remembered = 0, answer = 0;
      if constexpr (kRows > 0) {
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          const int r = i * kLanes + lane;
          if (r < K) remembered = fmaf(state[i], token_k[r], remembered);
        }
      } else if (active) {
        for (int r = lane; r < K; r += kLanes)
          remembered = fmaf(to[static_cast<int64_t>(r) * V], token_k[r], remembered);
      }
      const float u = tile_b[t] * (tile_v[t * kColumns + threadIdx.x / kLanes] - LanesSum(remembered));
      if constexpr (kRows > 0) {
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          const int r = i * kLanes + lane;
          if (r < K) {
            state[i] = fmaf(token_k[r], u, state[i]);
            answer = fmaf(state[i], token_q[r], answer);
          }
        }
      } else if (active) {
        for (int r = lane; r < K; r += kLanes) {
          const float updated = fmaf(token_k[r], u, to[static_cast<int64_t>(r) * V]);
          to[static_cast<int64_t>(r) * V] = updated;
          answer = fmaf(updated, token_q[r], answer);
        }
      }
      answer = LanesSum(answer);
      if (active && lane == 0) {
        const int64_t at = (tile + t) * args.heads * V + out_column;
        if (args.out_bfloat16 == nullptr) {
          args.out[at] = args.scale * answer;
        } else {
          static_cast<__nv_bfloat16*>(args.out_bfloat16)[at] = FromFloat<__nv_bfloat16>(args.scale * answer);
        }
      }
    }
  }

  bool finite = true;
  if (active) {
    if constexpr (kRows > 0) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const int r = i * kLanes + lane;
        if (r < K) {
          to[static_cast<int64_t>(r) * V] = state[i];
          finite = finite && isfinite(state[i]);
        }
      }
    } else {
      for (int r = lane; r < K; r += kLanes) finite = finite && isfinite(to[static_cast<int64_t>(r) * V]);
    }
  }
  if (!finite) args.nonfinite[row] = 1;
}

template <typename T, int kRows>
absl::Status Launch(const RaggedRows& rows, const DeltaRuleArgs& args, int64_t most, cudaStream_t stream) {
  const size_t shared = sizeof(float) * kTile * (2 * args.key_dim + kColumns + 1);
  if (shared > 48 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(
        DeltaRuleKernel<T, kRows>, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    if (error != cudaSuccess) {
      return absl::InvalidArgumentError(absl::StrCat("key size ", args.key_dim, " needs ", shared,
                                                     " bytes of shared memory: ", cudaGetErrorString(error)));
    }
  }
  const dim3 grid(static_cast<unsigned>(Pieces(args.value_dim, kColumns)), static_cast<unsigned>(args.heads),
                  static_cast<unsigned>(rows.rows));
  DeltaRuleKernel<T, kRows><<<grid, kThreads, shared, stream>>>(rows, args, most);
  return LaunchStatus("DeltaRuleKernel");
}

template <typename T>
absl::Status Dispatch(const RaggedRows& rows, const DeltaRuleArgs& args, int64_t most, cudaStream_t stream) {
  if (args.key_dim <= 32) return Launch<T, 8>(rows, args, most, stream);
  if (args.key_dim <= 64) return Launch<T, 16>(rows, args, most, stream);
  if (args.key_dim <= 128) return Launch<T, 32>(rows, args, most, stream);
  if (args.key_dim <= 256) return Launch<T, 64>(rows, args, most, stream);
  return Launch<T, 0>(rows, args, most, stream);
}

DeltaRuleCudaPath path = DeltaRuleCudaPath::kDefault;

}  // namespace

void SetDeltaRuleCudaPathForTesting(DeltaRuleCudaPath wanted) { path = wanted; }

absl::Status DeltaRuleCuda(const RaggedRows& rows, const DeltaRuleArgs& args, void* stream) {
  if (rows.rows == 0) return absl::OkStatus();
  const bool chunks =
      path != DeltaRuleCudaPath::kTokens && rows.chunks.blocks > 0 && DeltaRuleChunkCudaTakes(args);
  if (chunks && rows.chunks.split_rows > 0 && args.segment_states == nullptr) {
    return absl::InvalidArgumentError("delta rule's plan splits rows and there is no segment_states");
  }
  const bool short_rows = !chunks || std::max(rows.shortest - 1, args.longer_than) < kDeltaRuleFewTokens;
  if (short_rows) {
    const int64_t most = chunks ? kDeltaRuleFewTokens : INT64_MAX;
    const auto cuda_stream = static_cast<cudaStream_t>(stream);
    RETURN_IF_ERROR(args.dtype == DType::kBFloat16 ? Dispatch<__nv_bfloat16>(rows, args, most, cuda_stream)
                                                   : Dispatch<float>(rows, args, most, cuda_stream));
  }
  return chunks ? DeltaRuleChunkCuda(rows, args, short_rows, stream) : absl::OkStatus();
}

}  // namespace deltanet
