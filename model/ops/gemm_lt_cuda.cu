// Products of many rows in bfloat16 on Hopper, by cuBLASLt, which is told which of its kernels to take. (Where
// a gated unit follows, as the third below, gemm_gated_cuda.cu makes both, unless there is a bias.)
//
// Such products are bound by the device's power: for the longer they run, the slower they get, by up to a tenth. The
// library orders its kernels by the time that it expects, in which that is not. Of those that it offers, this takes
// the first whose tile is 176 outputs by 128 rows or 128 by 160; where it offers none, it leaves the product to
// LibTorch, which takes the library's first. On an H200, 16,384 rows, all that it offers in turn, 12 ms each, the
// median in us (cuBLAS 13.1):
//
//   n, k          into                its first    this
//   6160, 2048    bfloat16                  609    none: n is no multiple of 64
//   6208, 2048    bfloat16                  642     584
//   11264, 2048   bfloat16                 1156    1041
//   2048, 2048    bfloat16                  216     209
//   2048, 2048    float32, added            245     216
//   2048, 5632    bfloat16                  582     580
//   2048, 5632    float32, added            585     569
//
// FLOPs: 2 m n k, 756 G for the third of these, which is 0.76 ms at the 990 TFLOP/s of full clocks.
#include <cublasLt.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "absl/strings/str_cat.h"
#include "model/ops/cuda_kernels.h"

namespace deltanet {
namespace {

constexpr int64_t kFewestRows = 4096;  // With less there may be too few tiles of these for the device.
constexpr int kCandidates = 8;         // Of the library's kernels, those that it expects to be the fastest.
constexpr uintptr_t kAlignment = 256;  // That the library counts on.

bool Aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % kAlignment == 0; }

bool IsHopper() {
  int device = 0, major = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess && major == 9;
}

bool IsPreferred(const cublasLtMatmulHeuristicResult_t& candidate) {
  int32_t tile = CUBLASLT_MATMUL_TILE_UNDEFINED;
  size_t written = 0;
  if (candidate.state != CUBLAS_STATUS_SUCCESS ||
      cublasLtMatmulAlgoConfigGetAttribute(&candidate.algo, CUBLASLT_ALGO_CONFIG_TILE_ID, &tile, sizeof(tile),
                                           &written) != CUBLAS_STATUS_SUCCESS) {
    return false;
  }
  return tile == CUBLASLT_MATMUL_TILE_176x128 || tile == CUBLASLT_MATMUL_TILE_128x160;
}

}  // namespace

absl::StatusOr<bool> GemmLtCuda(const GemmArgs& args, void* cublas_lt, void* stream) {
  if (args.dtype != DType::kBFloat16 || args.fixed_order || args.m < kFewestRows || !Aligned(args.a) ||
      !Aligned(args.b) || !Aligned(args.c) || !IsHopper()) {
    return false;
  }
  const auto fail = [](const char* what) {
    return absl::InternalError(absl::StrCat("cuBLASLt: ", what, " failed"));
  };
  // The library's matrices are by columns: it makes c^T = b a^T.
  const cublasOperation_t transpose = CUBLAS_OP_T;
  cublasLtMatmulDescOpaque_t product;
  cublasLtMatrixLayoutOpaque_t a, b, c;
  cublasLtMatmulPreferenceOpaque_t preference;  // No workspace, by default.
  if (cublasLtMatmulDescInit(&product, CUBLAS_COMPUTE_32F, CUDA_R_32F) != CUBLAS_STATUS_SUCCESS ||
      cublasLtMatmulDescSetAttribute(&product, CUBLASLT_MATMUL_DESC_TRANSA, &transpose, sizeof(transpose)) !=
          CUBLAS_STATUS_SUCCESS ||
      cublasLtMatrixLayoutInit(&b, CUDA_R_16BF, args.k, args.n, args.ldb) != CUBLAS_STATUS_SUCCESS ||
      cublasLtMatrixLayoutInit(&a, CUDA_R_16BF, args.k, args.m, args.lda) != CUBLAS_STATUS_SUCCESS ||
      cublasLtMatrixLayoutInit(&c, args.c_dtype == DType::kFloat32 ? CUDA_R_32F : CUDA_R_16BF, args.n, args.m,
                               args.ldc) != CUBLAS_STATUS_SUCCESS ||
      cublasLtMatmulPreferenceInit(&preference) != CUBLAS_STATUS_SUCCESS) {
    return fail("describing a product");
  }
  const auto handle = static_cast<cublasLtHandle_t>(cublas_lt);
  cublasLtMatmulHeuristicResult_t candidates[kCandidates];
  int found = 0;
  if (cublasLtMatmulAlgoGetHeuristic(handle, &product, &b, &a, &c, &c, &preference, kCandidates, candidates,
                                     &found) != CUBLAS_STATUS_SUCCESS) {
    return false;
  }
  const auto* const chosen = std::find_if(candidates, candidates + found, IsPreferred);
  if (chosen == candidates + found) return false;
  const float alpha = 1.0f, beta = args.accumulate ? 1.0f : 0.0f;
  if (cublasLtMatmul(handle, &product, &alpha, args.b, &b, args.a, &a, &beta, args.c, &c, args.c, &c,
                     &chosen->algo, nullptr, 0, static_cast<cudaStream_t>(stream)) != CUBLAS_STATUS_SUCCESS) {
    return fail("a product");
  }
  return true;
}

}  // namespace deltanet
