// The norm and the gate of the delta rule's output on a GPU, each value read and written once.
//
// Groups of a power of two of 16-byte vectors, up to 32: lanes that are neighbours have a group, a vector
// each, in registers from its sum of squares (by shuffles) to the result; a block is up to 256 vectors of a
// row, or of two rows where there are many, so that twice as much is on its way and scales are read half as
// often. Other groups: a block has one, and reads it a second time (from the L1) for the result, value by
// value or, where width and place allow, by vectors. The kernel begins while the one before it ends
// (LaunchOverlapping).
//
// Bytes a token: 3 HV values with a gate: 12 KiB of bfloat16 at HV = 2048, 201 MB for 16,384 tokens, which
// take 47 us at 4.3 TB/s. Measured on an H200: 52 us, 0.95 of a plain copy's rate (56 with a row a thread, 53
// with four). ncu (27 November 2026, at clocks of its own): 48 us there at 79 % of the memory's peak, the
// schedulers busy for 69 % of their cycles.
#include <cstdint>

#include "model/ops/cuda_kernels.h"
#include "model/ops/cuda_util.cuh"
#include "model/ops/cuda_vector.cuh"

namespace deltanet {
namespace {

constexpr int64_t kManyVectors = int64_t{1} << 20;  // From here on a thread has two.

template <int kN>
__device__ inline float Squares(const float (&x)[kN]) {
  float squares = 0;
#pragma unroll
  for (int j = 0; j < kN; ++j) squares = fmaf(x[j], x[j], squares);
  return squares;
}

__device__ inline float Factor(const OutputNormArgs& args, float squares) {
  return 1.0f / (sqrtf(squares / static_cast<float>(args.width) + args.epsilon.inside) + args.epsilon.after);
}

// x becomes what is wanted of it; gate is read if args has one.
template <typename T, int kN>
__device__ inline void NormAndGate(const OutputNormArgs& args, float factor, const float (&scale)[kN],
                                   const float (&gate)[kN], float (&x)[kN]) {
#pragma unroll
  for (int j = 0; j < kN; ++j) {
    x[j] = x[j] * factor * scale[j];
    if (args.gate != nullptr) x[j] *= gate[j] * SigmoidFor<T>(gate[j]);
  }
}

// A group is `lanes` vectors, a power of two of at most 32; a thread has the same vector of kRows rows; grid (rows over
// kRows, pieces of a row).
template <typename T, int kRows>
__global__ void OutputNormLanesKernel(OutputNormArgs args, int lanes) {
  LetNextBegin();
  constexpr int kN = 16 / sizeof(T);
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kRows, row_width = args.groups * args.width;
  const int64_t i = kN * (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x);
  const int here = i >= row_width ? 0 : args.rows - n < kRows ? static_cast<int>(args.rows - n) : kRows;
  float scale[kN] = {};
  if (here > 0) Load<kN>(args.scale + kN * (threadIdx.x % lanes), scale);
  AwaitEarlier();
  const T* const from = static_cast<const T*>(args.x) + n * row_width + i;
  const T* const gates = static_cast<const T*>(args.gate) + n * args.gate_stride + i;
  Packed<T, kN> x[kRows] = {}, gate[kRows] = {};
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (r < here) x[r] = LoadPacked<kN>(from + r * row_width);
    if (r < here && args.gate != nullptr) gate[r] = LoadPacked<kN>(gates + r * args.gate_stride);
  }
  float squares[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    float values[kN];
    Unpack(x[r], values);
    squares[r] = Squares(values);
  }
  // All lanes of a group have as many rows; all of a warp take part.
  for (int offset = lanes / 2; offset > 0; offset /= 2) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) squares[r] += __shfl_xor_sync(0xffffffffu, squares[r], offset);
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (r == here) return;
    float values[kN], gate_values[kN];
    Unpack(x[r], values);
    Unpack(gate[r], gate_values);
    NormAndGate<T>(args, Factor(args, squares[r]), scale, gate_values, values);
    Store<kN>(values, static_cast<T*>(args.out) + (n + r) * row_width + i);
  }
}

// A block is a group; grid (N, G).
template <typename T, int kN>
__global__ void OutputNormKernel(OutputNormArgs args) {
  LetNextBegin();
  AwaitEarlier();
  __shared__ float scratch[32];
  const int64_t n = blockIdx.x, first = blockIdx.y * args.width;
  const T* const x = static_cast<const T*>(args.x) + n * args.groups * args.width + first;
  const T* const gate =
      args.gate != nullptr ? static_cast<const T*>(args.gate) + n * args.gate_stride + first : nullptr;
  T* const out = static_cast<T*>(args.out) + n * args.groups * args.width + first;
  float squares = 0;
  for (int64_t i = kN * threadIdx.x; i < args.width; i += kN * blockDim.x) {
    float values[kN];
    Load<kN>(x + i, values);
    squares += Squares(values);
  }
  const float factor = Factor(args, BlockSum(squares, scratch));
  // A thread writes only where it alone reads, after it has read, so out may be x.
  for (int64_t i = kN * threadIdx.x; i < args.width; i += kN * blockDim.x) {
    float values[kN], gates[kN] = {}, scale[kN];
    Load<kN>(x + i, values);
    if (gate != nullptr) Load<kN>(gate + i, gates);
    Load<kN>(args.scale + i, scale);
    NormAndGate<T>(args, factor, scale, gates, values);
    Store<kN>(values, out + i);
  }
}

template <typename T>
absl::Status Launch(const OutputNormArgs& args, cudaStream_t stream) {
  constexpr int kN = 16 / sizeof(T);
  const unsigned groups = static_cast<unsigned>(args.groups);
  const bool aligned = args.width % kN == 0 && (args.gate == nullptr || args.gate_stride % kN == 0) &&
                       Aligned16({args.x, args.scale, args.gate, args.out});
  const int64_t lanes = args.width / kN;
  auto kernel = OutputNormKernel<T, 1>;
  LaunchShape shape{.grid = dim3(static_cast<unsigned>(args.rows), groups), .threads = BlockThreads(args.width)};
  if (aligned && lanes <= 32 && (lanes & (lanes - 1)) == 0) {
    const int64_t vectors = args.groups * lanes;
    const int threads = BlockThreads(vectors);
    const int rows = args.rows * vectors < kManyVectors ? 1 : 2;
    const auto lanes_kernel = rows == 1 ? OutputNormLanesKernel<T, 1> : OutputNormLanesKernel<T, 2>;
    const dim3 grid(static_cast<unsigned>(Pieces(args.rows, rows)),
                    static_cast<unsigned>(Pieces(vectors, threads)));
    return LaunchOverlapping("OutputNormLanesKernel", lanes_kernel, {.grid = grid, .threads = threads}, stream, args,
                             static_cast<int>(lanes));
  }
  if (aligned) {
    kernel = OutputNormKernel<T, kN>;
    shape.threads = BlockThreads(lanes);
  }
  return LaunchOverlapping("OutputNormKernel", kernel, shape, stream, args);
}

}  // namespace

absl::Status OutputNormCuda(const OutputNormArgs& args, void* stream) {
  if (args.rows == 0) return absl::OkStatus();
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  return args.dtype == DType::kBFloat16 ? Launch<__nv_bfloat16>(args, cuda_stream) : Launch<float>(args, cuda_stream);
}

}  // namespace deltanet
