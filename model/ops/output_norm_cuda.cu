// The norm and the gate of the delta rule's output on a GPU, each value read and written once.
//
// Groups of a power of two of 16-byte vectors, up to 32: lanes that are neighbours have a group, a vector
// each, in registers from its sum of squares (by shuffles) to the result; a block is up to 256 vectors of a
// row. Other groups: a block has one, and reads it a second time (from the L1) for the result, value by value
// or, where width and place allow, by vectors.
//
// Bytes a token: 3 HV values: 12 KiB of bfloat16 at HV = 2048, 201 MB for 16,384 tokens, which take 47 us at
// 4.3 TB/s.
#include <cstdint>

#include "model/ops/cuda_kernels.h"
#include "model/ops/cuda_util.cuh"
#include "model/ops/cuda_vector.cuh"

namespace deltanet {
namespace {

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

// A group is `lanes` vectors, a power of two of at most 32; grid (N, pieces of a row).
template <typename T>
__global__ void OutputNormLanesKernel(OutputNormArgs args, int lanes) {
  constexpr int kN = 16 / sizeof(T);
  const int64_t n = blockIdx.x, row_width = args.groups * args.width;
  const int64_t i = kN * (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x);
  const bool there = i < row_width;  // The same for all lanes of a group; all take part in the shuffles.
  float x[kN] = {}, gate[kN] = {}, scale[kN] = {};
  if (there) {
    Load<kN>(static_cast<const T*>(args.x) + n * row_width + i, x);
    if (args.gate != nullptr) Load<kN>(static_cast<const T*>(args.gate) + n * args.gate_stride + i, gate);
    Load<kN>(args.scale + kN * (threadIdx.x % lanes), scale);
  }
  float squares = Squares(x);
  for (int offset = lanes / 2; offset > 0; offset /= 2) {
    squares += __shfl_xor_sync(0xffffffffu, squares, offset);
  }
  if (!there) return;
  NormAndGate<T>(args, Factor(args, squares), scale, gate, x);
  Store<kN>(x, static_cast<T*>(args.out) + n * row_width + i);
}

// A block is a group; grid (N, G).
template <typename T, int kN>
__global__ void OutputNormKernel(OutputNormArgs args) {
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
void Launch(const OutputNormArgs& args, cudaStream_t stream) {
  constexpr int kN = 16 / sizeof(T);
  const unsigned rows = static_cast<unsigned>(args.rows), groups = static_cast<unsigned>(args.groups);
  const bool aligned = args.width % kN == 0 && (args.gate == nullptr || args.gate_stride % kN == 0) &&
                       Aligned16({args.x, args.scale, args.gate, args.out});
  const int64_t lanes = args.width / kN;
  if (aligned && lanes <= 32 && (lanes & (lanes - 1)) == 0) {
    const int64_t vectors = args.groups * lanes;
    const int threads = BlockThreads(vectors);
    const dim3 grid(rows, static_cast<unsigned>((vectors + threads - 1) / threads));
    OutputNormLanesKernel<T><<<grid, threads, 0, stream>>>(args, static_cast<int>(lanes));
  } else if (aligned) {
    OutputNormKernel<T, kN><<<dim3(rows, groups), BlockThreads(lanes), 0, stream>>>(args);
  } else {
    OutputNormKernel<T, 1><<<dim3(rows, groups), BlockThreads(args.width), 0, stream>>>(args);
  }
}

}  // namespace

absl::Status OutputNormCuda(const OutputNormArgs& args, void* stream) {
  if (args.rows == 0) return absl::OkStatus();
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  if (args.dtype == DType::kBFloat16) {
    Launch<__nv_bfloat16>(args, cuda_stream);
  } else {
    Launch<float>(args, cuda_stream);
  }
  return LaunchStatus("OutputNormKernel");
}

}  // namespace deltanet
