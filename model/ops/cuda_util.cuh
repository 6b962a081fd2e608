// What the CUDA kernels share: conversions, reductions, launches, the check after one.
#ifndef DELTANET_MODEL_OPS_CUDA_UTIL_CUH_
#define DELTANET_MODEL_OPS_CUDA_UTIL_CUH_

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "model/ops/elementwise.h"

namespace deltanet {

// The error of the launch just made, as INTERNAL naming the kernel. Does not wait for the kernel.
inline absl::Status LaunchStatus(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) return absl::OkStatus();
  return absl::InternalError(absl::StrCat("launching ", kernel, ": ", cudaGetErrorString(error)));
}

// A kernel launched with LaunchOverlapping may begin while the one before it on the stream still runs, as
// soon as all blocks of that one have called LetNextBegin (or ended): what comes first in it, up to the
// reading of constants such as weights, then hides behind the other's end. In return each of its blocks calls
// AwaitEarlier before it reads what any kernel before it writes, or writes what one reads, and none ends
// without. LetNextBegin promises nothing of what was written, so it belongs at the start. Nothing changes for
// a kernel that is launched otherwise, or is followed by such a one: it begins when all before it is done.
__device__ inline void LetNextBegin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ inline void AwaitEarlier() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900 && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
#error "DELTANET_CUDA_ARCHITECTURES names 90, without Hopper's own instructions: want 90a-real"
#endif

// Whether on the current device what was compiled for Hopper runs. Which kernel of these is asked does not
// matter: all are compiled for the same devices.
inline bool RunsHopperCode(const void* kernel) {
  constexpr int kDevices = 64;
  static std::atomic<signed char> known[kDevices];  // 0: not asked yet, 1: yes, -1: no.
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device >= kDevices) return false;
  signed char runs = known[device].load(std::memory_order_relaxed);
  if (runs == 0) {
    cudaFuncAttributes attributes;
    int major = 0;
    if (cudaFuncGetAttributes(&attributes, kernel) != cudaSuccess ||
        cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess) {
      return false;
    }
    runs = major == 9 && attributes.ptxVersion >= 90 ? 1 : -1;
    known[device].store(runs, std::memory_order_relaxed);
  }
  return runs > 0;
}

// Multiprocessors of the current device; 1 if that cannot be told, as when the device is lost.
inline int Processors() {
  int device = 0, processors = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) {
    return 1;
  }
  return processors;
}

// Pieces of which `size` takes so many, the last perhaps in part.
constexpr int64_t Pieces(int64_t size, int64_t piece) { return (size + piece - 1) / piece; }

struct LaunchShape {
  dim3 grid;
  int threads;
  int shared_bytes = 0;
  int cluster = 1;  // Neighbouring blocks that share memory; more than one takes code for Hopper.
};

template <typename... Parameters>
absl::Status LaunchOverlapping(const char* name, void (*kernel)(Parameters...), const LaunchShape& shape,
                               cudaStream_t stream, const Parameters&... arguments) {
  cudaLaunchAttribute attributes[2] = {};
  cudaLaunchConfig_t config = {};
  config.gridDim = shape.grid;
  config.blockDim = dim3(static_cast<unsigned>(shape.threads));
  config.dynamicSmemBytes = static_cast<size_t>(shape.shared_bytes);
  config.stream = stream;
  config.attrs = attributes;
  if (RunsHopperCode(reinterpret_cast<const void*>(kernel))) {
    attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[0].val.programmaticStreamSerializationAllowed = 1;
    config.numAttrs = 1;
  }
  if (shape.cluster > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs].val.clusterDim = {static_cast<unsigned>(shape.cluster), 1, 1};
    ++config.numAttrs;
  }
  if (cudaLaunchKernelEx(&config, kernel, arguments...) != cudaSuccess) return LaunchStatus(name);
  return absl::OkStatus();
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
// or zero below 2^-126) are lost in the rounding, and a kernel stays bound by memory: these are four.
template <typename T>
__device__ inline float SigmoidFor(float x) {
  return Sigmoid(x);
}
template <>
__device__ inline float SigmoidFor<__nv_bfloat16>(float x) {
  constexpr float kLog2E = 1.4426950408889634f;
  float power, inverse;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(-kLog2E * x));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(1.0f + power));
  return inverse;
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

// A gated unit's value on the way into a T.
template <typename T>
__device__ inline float Gated(GateKind kind, float first, float second) {
  return kind == GateKind::kSigmoidSecond ? first * SigmoidFor<T>(second)
                                          : first * SigmoidFor<T>(first) * second;
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

// Threads of a block that works on `width` values: a multiple of 32, at most kMostThreads.
constexpr int kMostThreads = 256;
inline int BlockThreads(int64_t width) {
  const int64_t threads = (width + 31) / 32 * 32;
  return static_cast<int>(threads < kMostThreads ? threads : kMostThreads);
}

}  // namespace deltanet

#endif  // DELTANET_MODEL_OPS_CUDA_UTIL_CUH_
