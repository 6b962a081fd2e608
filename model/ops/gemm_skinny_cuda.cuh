// What the two kernels of products of few rows share (gemm_skinny_cuda.cu, gemm_turned_cuda.cu).
#ifndef DELTANET_MODEL_OPS_GEMM_SKINNY_CUDA_CUH_
#define DELTANET_MODEL_OPS_GEMM_SKINNY_CUDA_CUH_

#include <cstdint>

#include "absl/status/status.h"
#include "model/ops/cuda_util.cuh"
#include "model/ops/cuda_vector.cuh"
#include "model/ops/gemm.h"

namespace deltanet {

constexpr int kSkinnyStep = 64;  // Elements of k in a stage: a tile's.
constexpr int kSkinnyMostTokens = 128;

// A product that GemmSkinnyCudaTakes, of up to kSkinnyMostTokens rows; GemmSkinnyCuda calls it for more
// than 32.
absl::Status GemmTurnedCuda(const FusedGemmArgs& args, void* stream);

// FusedGemmArgs, for a kernel.
struct SkinnyProblem {
  explicit SkinnyProblem(const FusedGemmArgs& args)
      : m(static_cast<int>(args.gemm.m)),
        k(static_cast<int>(args.gemm.k)),
        steps((k + kSkinnyStep - 1) / kSkinnyStep),
        columns(static_cast<int>(args.then == FusedGemmArgs::Then::kGate ? args.gemm.n / 2 : args.gemm.n)),
        vectors(args.gemm.ldc % 4 == 0 && Aligned16({args.gemm.c})),
        c(args.gemm.c),
        ldc(args.gemm.ldc),
        squares(args.squares),
        squares_width(static_cast<int>(SquaresWidth(k))),
        epsilon(args.epsilon),
        gate(args.gate),
        x(args.x),
        scale(args.scale),
        x_squares(args.x_squares) {}

  int m, k, steps;
  int columns;   // Of c.
  bool vectors;  // Whether four neighbouring values of c can be stored at once.
  void* c;
  int64_t ldc;
  const float* squares;  // [m, squares_width]
  int squares_width;
  RmsEpsilon epsilon;
  GateKind gate;
  float* x;  // [m, columns]
  const float* scale;
  float* x_squares;  // [m, SquaresWidth(columns)]
};

// By a warp: the factors of up to kTokens tokens' RMSNorms.
template <int kTokens>
__device__ inline void FindFactors(const SkinnyProblem& problem, float* factors) {
  constexpr int kHeld = (kTokens + 31) / 32, kAtOnce = kHeld == 1 ? 16 : 32 / kHeld;
  const int lane = threadIdx.x % 32;
  float sums[kHeld] = {};
#pragma unroll kAtOnce
  for (int j = 0; j < problem.squares_width; ++j) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int token = min(lane + 32 * i, problem.m - 1);
      sums[i] += problem.squares[int64_t{token} * problem.squares_width + j];
    }
  }
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const float mean = sums[i] / static_cast<float>(problem.k);
    const float factor = 1.0f / (sqrtf(mean + problem.epsilon.inside) + problem.epsilon.after);
    if (lane + 32 * i < kTokens) factors[lane + 32 * i] = factor;
  }
}

}  // namespace deltanet

#endif  // DELTANET_MODEL_OPS_GEMM_SKINNY_CUDA_CUH_
