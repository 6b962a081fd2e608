// Addition of a bias and RMSNorm on a GPU, a block an output row. A thread holds up to kMostHeld times four
// neighbouring values of the row in registers from the sum of squares to the result, so that all is read
// once, 16 bytes at a time (8 of bfloat16). The sum goes out while the block adds up its squares; the scale
// comes in while the kernel before may still run. Rows that are wider, or not aligned so, go value by value,
// and their inputs are read a second time (from the L1).
//
// Bytes a token: 4 d for x and 2 d for bfloat16 normed: 12 KiB at d = 2048, 201 MB for 16,384 tokens, which
// take 47 us at 4.3 TB/s. Measured on an H200: 51 us, 0.97 of a plain copy's rate (55 with 256 threads a row,
// 53 with 64). ncu (27 November 2026, at clocks of its own): 47 us there at 82 % of the memory's peak.
#include <algorithm>
#include <cstdint>

#include "model/ops/cuda_kernels.h"
#include "model/ops/cuda_util.cuh"
#include "model/ops/cuda_vector.cuh"

namespace deltanet {
namespace {

constexpr int kVector = 4;    // Values of a row that are neighbours in a thread.
constexpr int kMostHeld = 8;  // Vectors of a thread.
// Of a block, where they hold a row in four vectors each: fewer threads wait for each other's sums.
constexpr int kFewThreads = 128;

// The factor of an RMSNorm over `width` values whose sum of squares the block's threads have in parts.
__device__ inline float RmsFactor(float squares, int64_t width, const RmsEpsilon& epsilon, float* scratch) {
  const float mean = BlockSum(squares, scratch) / static_cast<float>(width);
  return 1.0f / (sqrtf(mean + epsilon.inside) + epsilon.after);
}

__global__ void AddRmsNormKernel(AddRmsNormArgs args) {
  LetNextBegin();
  AwaitEarlier();
  __shared__ float scratch[32];
  const int64_t n = blockIdx.x;
  const int64_t d = args.width;
  const int64_t from = args.gather != nullptr ? args.gather[n] : n;
  const float* x = args.x + from * d;
  const auto value = [&](int64_t i) {
    float sum = x[i];
    if (args.bias != nullptr) sum += args.bias[i];
    return sum;
  };
  float factor = 1.0f;
  if (args.scale != nullptr) {
    float squares = 0;
    for (int64_t i = threadIdx.x; i < d; i += blockDim.x) {
      const float sum = value(i);
      squares = fmaf(sum, sum, squares);
    }
    factor = RmsFactor(squares, d, args.epsilon, scratch);
  }
  // A thread writes only where it alone reads, after it has read, so sum or normed may be x.
  for (int64_t i = threadIdx.x; i < d; i += blockDim.x) {
    const float sum = value(i);
    if (args.sum != nullptr) args.sum[n * d + i] = sum;
    if (args.normed == nullptr) continue;
    const float normed = args.scale != nullptr ? sum * factor * args.scale[i] : sum;
    if (args.normed_dtype == DType::kBFloat16) {
      static_cast<__nv_bfloat16*>(args.normed)[n * d + i] = FromFloat<__nv_bfloat16>(normed);
    } else {
      static_cast<float*>(args.normed)[n * d + i] = normed;
    }
  }
}

// The same for aligned rows of at most kVector kHeld values a thread.
template <int kHeld>
__global__ void AddRmsNormHeldKernel(AddRmsNormArgs args) {
  LetNextBegin();
  __shared__ float scratch[32];
  const int64_t n = blockIdx.x;
  const int d = static_cast<int>(args.width);
  // Calls body(h, i) for the thread's vectors h, which begin at value i of the row.
  const auto for_held = [&](auto body) {
#pragma unroll
    for (int h = 0; h < kHeld; ++h) {
      const int i = kVector * static_cast<int>(h * blockDim.x + threadIdx.x);
      if (i < d) body(h, i);
    }
  };
  float held[kHeld][kVector], scale[kHeld][kVector];
  if (args.scale != nullptr) for_held([&](int h, int i) { Load<kVector>(args.scale + i, scale[h]); });
  AwaitEarlier();
  const int64_t from = (args.gather != nullptr ? args.gather[n] : n) * d, to = n * d;
  for_held([&](int h, int i) { Load<kVector>(args.x + from + i, held[h]); });
  if (args.bias != nullptr) {
    for_held([&](int h, int i) {
      float bias[kVector];
      Load<kVector>(args.bias + i, bias);
#pragma unroll
      for (int j = 0; j < kVector; ++j) held[h][j] += bias[j];
    });
  }
  // A thread has read all that it writes over, so sum or normed may be x.
  if (args.sum != nullptr) for_held([&](int h, int i) { Store<kVector>(held[h], args.sum + to + i); });
  if (args.normed == nullptr) return;
  if (args.scale != nullptr) {
    float squares = 0;
    for_held([&](int h, int) {
#pragma unroll
      for (int j = 0; j < kVector; ++j) squares = fmaf(held[h][j], held[h][j], squares);
    });
    const float factor = RmsFactor(squares, d, args.epsilon, scratch);
    for_held([&](int h, int) {
#pragma unroll
      for (int j = 0; j < kVector; ++j) held[h][j] = held[h][j] * factor * scale[h][j];
    });
  }
  if (args.normed_dtype == DType::kBFloat16) {
    for_held(
        [&](int h, int i) { Store<kVector>(held[h], static_cast<__nv_bfloat16*>(args.normed) + to + i); });
  } else {
    for_held([&](int h, int i) { Store<kVector>(held[h], static_cast<float*>(args.normed) + to + i); });
  }
}

// For rows of as many vectors, which a block's threads can hold.
auto HeldKernel(int64_t vectors, int threads) {
  if (vectors <= threads) return AddRmsNormHeldKernel<1>;
  if (vectors <= 2 * threads) return AddRmsNormHeldKernel<2>;
  if (vectors <= 4 * threads) return AddRmsNormHeldKernel<4>;
  return AddRmsNormHeldKernel<kMostHeld>;
}

}  // namespace

absl::Status AddRmsNormCuda(const AddRmsNormArgs& args, void* stream) {
  if (args.rows == 0) return absl::OkStatus();
  LaunchShape shape{.grid = dim3(static_cast<unsigned>(args.rows)), .threads = BlockThreads(args.width)};
  auto kernel = AddRmsNormKernel;
  if (args.width % kVector == 0 && args.width <= kVector * kMostHeld * kMostThreads &&
      Aligned16({args.x, args.bias, args.sum, args.scale, args.normed})) {
    const int64_t vectors = args.width / kVector;
    shape.threads =
        vectors <= 4 * kFewThreads ? std::min(BlockThreads(vectors), kFewThreads) : BlockThreads(vectors);
    kernel = HeldKernel(vectors, shape.threads);
  }
  return LaunchOverlapping("AddRmsNormKernel", kernel, shape, static_cast<cudaStream_t>(stream), args);
}

}  // namespace deltanet
