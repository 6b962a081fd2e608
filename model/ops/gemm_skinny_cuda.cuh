// What the two kernels of products of few rows share (gemm_skinny_cuda.cu, gemm_turned_cuda.cu).
#ifndef DELTANET_MODEL_OPS_GEMM_SKINNY_CUDA_CUH_
#define DELTANET_MODEL_OPS_GEMM_SKINNY_CUDA_CUH_

#include <cstdint>

#include "absl/status/status.h"
#include "model/ops/cuda_sm90.cuh"
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
        steps(static_cast<int>(Pieces(k, kSkinnyStep))),
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

// Where in a ring of `kStages` slots one is: the slot's first barrier, whose like in the next slot is
// kBarriers bytes further on, the parity of its phase, and what is at the slot, in the next one kSlot further
// on. So what the next step needs is added up while this one's products run: to divide for it took half of a
// step.
template <int kStages, int kBarriers, int kSlot>
struct RingPlace {
  uint32_t barrier, at;
  uint32_t parity = 0;
  int slot = 0;

  __device__ void Next() {
    barrier += kBarriers, at += kSlot;
    if (++slot < kStages) return;
    slot = 0, parity ^= 1;
    barrier -= kStages * kBarriers, at -= kStages * kSlot;
  }
};

// By one thread, which awaits the kernel before: a's part in steps [first, first + steps) into the ring of
// layout L. Of a's rows no more are copied than there are: what the rest of a tile holds gets into the sums
// of tokens alone that there are not.
template <typename L>
__device__ inline void ProduceTokens(const CUtensorMap* tokens, const SkinnyProblem& problem, uint32_t base,
                                     int first, int steps) {
  PrefetchMap(tokens);
  AwaitEarlier();
  const uint32_t to_free = L::TokensFree(base, 0) - L::TokensThere(base, 0);
  RingPlace<L::kTokenStages, L::kSlotBarriers, L::kTokenSlot> place{L::TokensThere(base, 0),
                                                                    L::Tokens(base, 0)};
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    BarrierWait(place.barrier + to_free, place.parity ^ 1);
    BarrierArriveExpecting(place.barrier, problem.m * kSkinnyStep * 2);
    CopyBox(place.at, tokens, (first + step) * kSkinnyStep, 0, place.barrier);
    place.Next();
  }
}

// By a warp, which awaits the kernel before: the factors of up to kTokens tokens' RMSNorms, if there is a
// norm.
template <int kTokens>
__device__ inline void FindFactors(const SkinnyProblem& problem, float* factors) {
  // Parameters come from memory when they are first read: those that are needed last are read here too.
  asm volatile("" ::"l"(problem.c), "l"(problem.squares), "l"(problem.x), "l"(problem.x_squares));
  AwaitEarlier();
  if (problem.squares == nullptr) return;
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

// Four of a token's sums to c, from `column` on (Then::kStore).
template <typename C>
__device__ inline void StoreSums(const SkinnyProblem& problem, const float (&sum)[4], int column, C* to) {
  if (problem.vectors && column + 4 <= problem.columns) {
    Store<4>(sum, to);
  } else {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (column + j < problem.columns) to[j] = FromFloat<C>(sum[j]);
    }
  }
}

// By a warp, whose lanes have four of a token's sums each, of kSquaresOf columns, the `tile`-th of `tiles` so
// many: adds them to the residual stream x, and gives c what the next layer's norm is to scale (Then::kAdd).
template <typename C>
__device__ inline void AddSums(const SkinnyProblem& problem, float (&sum)[4], const float (&x)[4],
                               const float (&scale)[4], int64_t token, int tile, int64_t tiles, int column,
                               C* to) {
  const bool inside = column < problem.columns;
  float squares = 0;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    sum[j] += x[j];
    squares = fmaf(sum[j], sum[j], squares);
  }
  if (inside) Store<4>(sum, problem.x + token * problem.columns + column);
  if (problem.scale == nullptr) return;
  squares = WarpSum(inside ? squares : 0.0f);
  if (threadIdx.x % 32 == 0) problem.x_squares[token * tiles + tile] = squares;
#pragma unroll
  for (int j = 0; j < 4; ++j) sum[j] *= scale[j];
  if (inside) Store<4>(sum, to);
}

}  // namespace deltanet

#endif  // DELTANET_MODEL_OPS_GEMM_SKINNY_CUDA_CUH_
