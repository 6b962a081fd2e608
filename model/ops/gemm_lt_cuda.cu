// Products of many rows in bfloat16 on Hopper, by cuBLASLt, which is told which of its kernels to take.
// (Where a gated unit follows, gemm_gated_cuda.cu makes both, unless there is a bias.)
//
// Such products are bound by the device's power: the longer they run, the slower they get, by up to a tenth,
// those with larger tiles more than others. The library orders its kernels by the time that it expects, in
// which that is not. Of those that it offers this takes one of kTiles: the one with which the busiest
// multiprocessor has the fewest outputs to make, a tile after another, and of equals the library's first.
// Where it offers none of these, the product is LibTorch's, which takes the library's first.
//
// On an H200 (28 November 2026), each of the eight that are offered, on end for 6 ms, forth and back, the
// mean in us; the first product into bfloat16, the others added to float32:
//
//   n, k        rows  1024  1536  2048  2560  3072  3584  4096  6144  8192  12288  16384
//   6208, 2048  first   40    61    78   104   126   148   162   250   337    488    672
//               this    39    61    77    95   112   133   147   230   302    452    601
//   2048, 2048  first   16    23    29    36    49    60    67    99   131    192    247
//               this    16    20    25    36    43    50    54    84   103    153    217
//   2048, 5632  first   35    53    70    91   112   135   141   212   285    429    568
//               this    35    56    67    91   115   129   134   212   269    418    559
//
// The fastest of all eight takes 1 % less than this on average. In the 1.3B model, where other kernels are
// between, prefill of 1 x 2048 tokens took 9.9 instead of 10.2 ms, and more tokens, which the power bounds,
// as long as with kernels of 176 x 128 or 128 x 160 alone.
//
// FLOPs: 2 m n k, 417 G for the first of these with 16,384 rows, which is 0.42 ms at the 990 TFLOP/s of full
// clocks.
#include <cublasLt.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <iterator>
#include <optional>

#include "absl/base/thread_annotations.h"
#include "absl/strings/str_cat.h"
#include "model/base/mutex.h"
#include "model/ops/cuda_kernels.h"
#include "model/ops/cuda_util.cuh"

namespace deltanet {
namespace {

constexpr int64_t kFewestRows = 1024;  // With less there are too few tiles of these for the device.
constexpr int kCandidates = 8;         // Of the library's kernels, those that it expects to be the fastest.
constexpr uintptr_t kAlignment = 256;  // That the library counts on.

bool Aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % kAlignment == 0; }

bool IsHopper() {
  int device = 0, major = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
         major == 9;
}

struct Tile {
  cublasLtMatmulTile_t id;
  int64_t outputs, rows;
};
constexpr Tile kTiles[] = {
    {CUBLASLT_MATMUL_TILE_96x128, 96, 128},   {CUBLASLT_MATMUL_TILE_112x128, 112, 128},
    {CUBLASLT_MATMUL_TILE_128x128, 128, 128}, {CUBLASLT_MATMUL_TILE_144x128, 144, 128},
    {CUBLASLT_MATMUL_TILE_128x160, 128, 160}, {CUBLASLT_MATMUL_TILE_160x128, 160, 128},
    {CUBLASLT_MATMUL_TILE_168x128, 168, 128}, {CUBLASLT_MATMUL_TILE_176x128, 176, 128},
};

// Outputs that each multiprocessor makes, counted in whole tiles; nothing for a kernel that is not to be
// taken.
std::optional<int64_t> OutputsOfProcessor(const cublasLtMatmulHeuristicResult_t& candidate,
                                          const GemmArgs& args, int processors) {
  int32_t id = CUBLASLT_MATMUL_TILE_UNDEFINED;
  size_t written = 0;
  if (candidate.state != CUBLAS_STATUS_SUCCESS ||
      cublasLtMatmulAlgoConfigGetAttribute(&candidate.algo, CUBLASLT_ALGO_CONFIG_TILE_ID, &id, sizeof(id),
                                           &written) != CUBLAS_STATUS_SUCCESS) {
    return std::nullopt;
  }
  const auto* const tile =
      std::find_if(std::begin(kTiles), std::end(kTiles), [&](const Tile& tile) { return tile.id == id; });
  if (tile == std::end(kTiles)) return std::nullopt;
  const int64_t tiles = Pieces(args.n, tile->outputs) * Pieces(args.m, tile->rows);
  return Pieces(tiles, processors) * tile->outputs * tile->rows;
}

// The product in the library's terms, whose matrices are by columns: c^T = b a^T.
struct Description {
  cublasLtMatmulDescOpaque_t product;
  cublasLtMatrixLayoutOpaque_t a, b, c;

  bool Init(const GemmArgs& args) {
    const cublasOperation_t transpose = CUBLAS_OP_T;
    return cublasLtMatmulDescInit(&product, CUBLAS_COMPUTE_32F, CUDA_R_32F) == CUBLAS_STATUS_SUCCESS &&
           cublasLtMatmulDescSetAttribute(&product, CUBLASLT_MATMUL_DESC_TRANSA, &transpose,
                                          sizeof(transpose)) == CUBLAS_STATUS_SUCCESS &&
           cublasLtMatrixLayoutInit(&b, CUDA_R_16BF, args.k, args.n, args.ldb) == CUBLAS_STATUS_SUCCESS &&
           cublasLtMatrixLayoutInit(&a, CUDA_R_16BF, args.k, args.m, args.lda) == CUBLAS_STATUS_SUCCESS &&
           cublasLtMatrixLayoutInit(&c, args.c_dtype == DType::kFloat32 ? CUDA_R_32F : CUDA_R_16BF, args.n,
                                    args.m, args.ldc) == CUBLAS_STATUS_SUCCESS;
  }
};

using Algorithm = std::optional<cublasLtMatmulAlgo_t>;

Algorithm Choose(const GemmArgs& args, Description& description, cublasLtHandle_t handle) {
  cublasLtMatmulPreferenceOpaque_t preference;  // No workspace, by default.
  cublasLtMatmulHeuristicResult_t candidates[kCandidates];
  int found = 0;
  if (cublasLtMatmulPreferenceInit(&preference) != CUBLAS_STATUS_SUCCESS ||
      cublasLtMatmulAlgoGetHeuristic(handle, &description.product, &description.b, &description.a,
                                     &description.c, &description.c, &preference, kCandidates, candidates,
                                     &found) != CUBLAS_STATUS_SUCCESS) {
    return std::nullopt;
  }
  const int processors = Processors();
  Algorithm chosen;
  int64_t fewest = 0;
  for (int i = 0; i < found; ++i) {
    const std::optional<int64_t> outputs = OutputsOfProcessor(candidates[i], args, processors);
    if (!outputs || (chosen && *outputs >= fewest)) continue;
    chosen = candidates[i].algo;
    fewest = *outputs;
  }
  return chosen;
}

// What was chosen for the last shapes: the layers of a model ask for the same few again, and the library's
// answer takes it 90 us. From any thread.
class Choices {
 public:
  Algorithm Find(const GemmArgs& args, Description& description, cublasLtHandle_t handle) {
    const Shape shape = {args.m,
                         args.n,
                         args.k,
                         args.lda,
                         args.ldb,
                         args.ldc,
                         static_cast<int64_t>(args.c_dtype),
                         reinterpret_cast<intptr_t>(handle)};
    const MutexLock lock(&mutex_);
    const auto* const known =
        std::find_if(std::begin(known_), std::end(known_), [&](const Known& x) { return x.shape == shape; });
    if (known != std::end(known_)) return known->algorithm;
    Known& oldest = known_[next_++ % kKnown];
    oldest = {shape, Choose(args, description, handle)};
    return oldest.algorithm;
  }

 private:
  using Shape = std::array<int64_t, 8>;
  struct Known {
    Shape shape = {};  // No product's.
    Algorithm algorithm;
  };
  static constexpr uint32_t kKnown = 16;

  Mutex mutex_;
  Known known_[kKnown] ABSL_GUARDED_BY(mutex_);
  uint32_t next_ ABSL_GUARDED_BY(mutex_) = 0;
};

}  // namespace

absl::StatusOr<bool> GemmLtCuda(const GemmArgs& args, void* cublas_lt, void* stream) {
  if (args.dtype != DType::kBFloat16 || args.fixed_order || args.m < kFewestRows || !Aligned(args.a) ||
      !Aligned(args.b) || !Aligned(args.c) || !IsHopper()) {
    return false;
  }
  const auto fail = [](const char* what) {
    return absl::InternalError(absl::StrCat("cuBLASLt: ", what, " failed"));
  };
  const auto handle = static_cast<cublasLtHandle_t>(cublas_lt);
  Description description;
  if (!description.Init(args)) return fail("describing a product");
  static Choices& choices = *new Choices;
  const Algorithm algorithm = choices.Find(args, description, handle);
  if (!algorithm) return false;
  const float alpha = 1.0f, beta = args.accumulate ? 1.0f : 0.0f;
  if (cublasLtMatmul(handle, &description.product, &alpha, args.b, &description.b, args.a, &description.a,
                     &beta, args.c, &description.c, args.c, &description.c, &*algorithm, nullptr, 0,
                     static_cast<cudaStream_t>(stream)) != CUBLAS_STATUS_SUCCESS) {
    return fail("a product");
  }
  return true;
}

}  // namespace deltanet
