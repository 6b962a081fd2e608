// Products of few rows and small matrices in float32, for steps of few tokens of narrow models:
// c [m, n] = a [m, k] b^T, b [n, k].
//
// Such a product is all latency. The library's choice can be far from it: for n = 193, k = 192 (the product
// to q, k, v, beta of d = 64) and 8 to 16 rows cuBLAS 13.1 shares k out to 132 blocks, more than half of
// which have nothing to add, and lets them add up in turn, which takes 31 us on an H200.
//
// Tiling: a warp has kColumns columns of up to kRows rows of c, its lanes share out k, kN neighbouring values
// a lane; a block is kWarps such. In the end the lanes exchange halves of their sums, so that each has one,
// which takes about one shuffle a sum. Nothing is kept in shared memory: what the warps of a block read of a
// comes out of the L1, b out of the L2 once for every kRows rows. A row's bits do not depend on m.
//
// FLOPs: 2 m n k; bytes out of the L2: 4 n k for every kRows rows and 4 m k for every kColumns kWarps
// columns, which is why the library is faster with more of either.
//
// On an H200 (27 November 2026), in us, twenty in a row of the same operands, the library's and this:
//
//   n, k           m = 1            8           16           64          128
//   193, 192    2.0  1.4   30.7   2.7   30.7   2.8    5.3   3.7    5.4   4.0
//   64, 64      1.8  1.0    2.1   1.7    2.1   1.7    5.4   1.8    5.4   2.1
//   128, 128    1.9  1.0   51.6   1.7   51.6   1.8    9.0   2.1    4.3   2.8
//   385, 384    2.4  1.5   32.1   2.8    3.6   3.0    6.6   4.1    7.5   6.2
//   512, 512    3.0  1.6    4.1   3.5    6.6   3.8    7.5   4.7    9.9   8.0
//   769, 768    3.4  2.1    8.9   4.6    9.0   5.3   10.2   9.7   11.9  14.8
//   2048, 2048  6.2  4.2   12.8  10.8   20.6  11.5   22.3  40.1   34.6  71.1
//
// A step of TransformerDeltaNet(64, num_layers=6) for 1, 16, 64 sessions takes 95, 119, 126 us instead of
// 106, 296, 162, and for one row of 16 tokens 211 instead of 344. ncu, n = 193, k = 192, the caches cold, m =
// 1, 16, 64: 5.3, 5.9, 5.6 us at 1 % of the memory's peak, 3 to 17 % of the schedulers' cycles with an
// instruction: there is little to do, and a warp waits for its loads once or twice, then for its shuffles.
#include <cstdint>

#include "model/ops/cuda_kernels.h"
#include "model/ops/cuda_util.cuh"
#include "model/ops/cuda_vector.cuh"

namespace deltanet {
namespace {

constexpr int kWarps = 4, kColumns = 2, kRowsAtMost = 8;
// Beyond these the library is faster.
constexpr int64_t kMostRows = 128, kMostMultiplyAdds = int64_t{1} << 26;

template <int kRows, int kN>
__global__ void __launch_bounds__(32 * kWarps) GemmSmallKernel(GemmArgs args) {
  LetNextBegin();
  AwaitEarlier();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t i = static_cast<int64_t>(blockIdx.y) * kRows;
  const int64_t j = (static_cast<int64_t>(blockIdx.x) * kWarps + warp) * kColumns;
  if (j >= args.n) return;
  // Those beyond the last are the last once more.
  const float *a[kRows], *b[kColumns];
#pragma unroll
  for (int r = 0; r < kRows; ++r)
    a[r] = static_cast<const float*>(args.a) + min(i + r, args.m - 1) * args.lda;
#pragma unroll
  for (int c = 0; c < kColumns; ++c)
    b[c] = static_cast<const float*>(args.b) + min(j + c, args.n - 1) * args.ldb;

  constexpr int kSums = kRows * kColumns;
  float sums[kSums] = {};
#pragma unroll 2
  for (int64_t l = kN * lane; l < args.k; l += 32 * kN) {
    float x[kColumns][kN], y[kRows][kN];
#pragma unroll
    for (int c = 0; c < kColumns; ++c) Load(b[c] + l, x[c]);
#pragma unroll
    for (int r = 0; r < kRows; ++r) Load(a[r] + l, y[r]);
#pragma unroll
    for (int s = 0; s < kSums; ++s) {
#pragma unroll
      for (int e = 0; e < kN; ++e) sums[s] = fmaf(y[s / kColumns][e], x[s % kColumns][e], sums[s]);
    }
  }

  // Lanes that differ in one bit each keep one half of the sums and add the other's share of it, until each
  // has one, whose number is the highest bits of its own; then 32 / kSums lanes have shares of the same.
  int offset = 16;
#pragma unroll
  for (int half = kSums / 2; half > 0; half /= 2, offset /= 2) {
    const bool upper = (lane & offset) != 0;
#pragma unroll
    for (int s = 0; s < half; ++s) {
      const float kept = upper ? sums[s + half] : sums[s], given = upper ? sums[s] : sums[s + half];
      sums[s] = kept + __shfl_xor_sync(0xffffffffu, given, offset);
    }
  }
#pragma unroll
  for (; offset > 0; offset /= 2) sums[0] += __shfl_xor_sync(0xffffffffu, sums[0], offset);
  const int s = lane / (32 / kSums);
  const int64_t row = i + s / kColumns, column = j + s % kColumns;
  if (lane % (32 / kSums) != 0 || row >= args.m || column >= args.n) return;
  float* const c = static_cast<float*>(args.c) + row * args.ldc + column;
  *c = args.accumulate ? *c + sums[0] : sums[0];
}

template <int kRows>
absl::Status LaunchRows(const GemmArgs& args, cudaStream_t stream) {
  const bool vectors =
      args.k % 4 == 0 && args.lda % 4 == 0 && args.ldb % 4 == 0 && Aligned16({args.a, args.b});
  const LaunchShape shape = {.grid = dim3(static_cast<unsigned>(Pieces(args.n, kWarps * kColumns)),
                                          static_cast<unsigned>(Pieces(args.m, kRows))),
                             .threads = 32 * kWarps};
  return LaunchOverlapping("GemmSmallKernel", vectors ? GemmSmallKernel<kRows, 4> : GemmSmallKernel<kRows, 1>,
                           shape, stream, args);
}

}  // namespace

bool GemmSmallCudaTakes(const GemmArgs& args) {
  return args.dtype == DType::kFloat32 && !args.fixed_order && args.m <= kMostRows &&
         args.m * args.n * args.k <= kMostMultiplyAdds;
}

absl::Status GemmSmallCuda(const GemmArgs& args, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  if (args.m == 1) return LaunchRows<1>(args, cuda_stream);
  if (args.m == 2) return LaunchRows<2>(args, cuda_stream);
  return args.m <= 4 ? LaunchRows<4>(args, cuda_stream) : LaunchRows<kRowsAtMost>(args, cuda_stream);
}

}  // namespace deltanet
