// What the CUDA kernels share: conversions, reductions, the check after a launch.
#ifndef DELTANET_MODEL_OPS_CUDA_UTIL_CUH_
#define DELTANET_MODEL_OPS_CUDA_UTIL_CUH_

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace deltanet {

// The error of the launch just made, as INTERNAL naming the kernel. Does not wait for the kernel.
inline absl::Status LaunchStatus(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) return absl::OkStatus();
  return absl::InternalError(absl::StrCat("launching ", kernel, ": ", cudaGetErrorString(error)));
}

__device__ inline float ToFloat(float x) { return x; }
__device__ inline float ToFloat(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ T FromFloat(float x);
template <>
__device__ inline float FromFloat<float>(float x) {
  return x;
}
template <>
__device__ inline __nv_bfloat16 FromFloat<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

__device__ inline float Sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// The same on the way into a T. With bfloat16 the errors of the fast instructions (some 2^-18 of the result,
// or zero below 2^-126) are lost in the rounding, and a kernel stays bound by memory.
template <typename T>
__device__ inline float SigmoidFor(float x) {
  return Sigmoid(x);
}
template <>
__device__ inline float SigmoidFor<__nv_bfloat16>(float x) {
  return __fdividef(1.0f, 1.0f + __expf(-x));
}

// 1 / sqrt(x), likewise: with bfloat16 within two of float32's roundings.
template <typename T>
__device__ inline float InverseRootFor(float x) {
  return 1.0f / sqrtf(x);
}
template <>
__device__ inline float InverseRootFor<__nv_bfloat16>(float x) {
  return rsqrtf(x);
}

__device__ inline float WarpSum(float x) {
  for (int offset = 16; offset > 0; offset >>= 1) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}

// The sum over the block's threads, in all of them. `scratch` has 32 floats; blockDim.x is a multiple of 32.
__device__ inline float BlockSum(float x, float* scratch) {
  x = WarpSum(x);
  const int warps = blockDim.x / 32;
  __syncthreads();  // The scratch may still be read from the sum before.
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
  __syncthreads();
  return WarpSum(threadIdx.x % 32 < warps ? scratch[threadIdx.x % 32] : 0.0f);
}

// Programmatic launches, on a Hopper GPU and later; elsewhere a kernel starts when the one before has ended.
// Once all blocks of a kernel have called it or ended, the next one may start if it was launched so.
__device__ inline void LetNextKernelStart() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
// Waits until all kernels before this one have ended and what they wrote is there. A kernel that was launched
// so calls it at some time, or the kernel after it would not wait for those before.
__device__ inline void AwaitEarlierKernels() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Threads of a block that works on `width` values: a multiple of 32, at most kMostThreads.
constexpr int kMostThreads = 256;
inline int BlockThreads(int64_t width) {
  const int64_t threads = (width + 31) / 32 * 32;
  return static_cast<int>(threads < kMostThreads ? threads : kMostThreads);
}

}  // namespace deltanet

#endif  // DELTANET_MODEL_OPS_CUDA_UTIL_CUH_
