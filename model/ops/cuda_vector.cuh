// Neighbouring values moved together: a kernel comes near the device's copy bandwidth if a thread moves up to
// 16 bytes at a time.
#ifndef DELTANET_MODEL_OPS_CUDA_VECTOR_CUH_
#define DELTANET_MODEL_OPS_CUDA_VECTOR_CUH_

#include <cstdint>
#include <initializer_list>
#include <type_traits>

#include "model/ops/cuda_util.cuh"

namespace deltanet {

// kN values of T, more than one, as they lie in memory: at a multiple of their size or of 16 bytes, whichever
// is less.
template <typename T, int kN>
struct alignas(sizeof(T) * kN < 16 ? sizeof(T) * kN : 16) Packed {
  uint32_t words[sizeof(T) * kN / 4];
};

template <typename T, int kN>
__device__ inline void Unpack(const Packed<T, kN>& packed, float (&x)[kN]) {
  if constexpr (std::is_same_v<T, float>) {
#pragma unroll
    for (int i = 0; i < kN; ++i) x[i] = __uint_as_float(packed.words[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kN / 2; ++i) {
      x[2 * i] = __uint_as_float(packed.words[i] << 16);
      x[2 * i + 1] = __uint_as_float(packed.words[i] & 0xffff0000u);
    }
  }
}

template <typename T, int kN>
__device__ inline Packed<T, kN> Pack(const float (&x)[kN]) {
  Packed<T, kN> packed;
  if constexpr (std::is_same_v<T, float>) {
#pragma unroll
    for (int i = 0; i < kN; ++i) packed.words[i] = __float_as_uint(x[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kN / 2; ++i) {
      const __nv_bfloat162 pair = __floats2bfloat162_rn(x[2 * i], x[2 * i + 1]);
      packed.words[i] = uint32_t{__bfloat16_as_ushort(pair.x)} | uint32_t{__bfloat16_as_ushort(pair.y)} << 16;
    }
  }
  return packed;
}

template <int kN, typename T>
__device__ inline Packed<T, kN> LoadPacked(const T* from) {
  return *reinterpret_cast<const Packed<T, kN>*>(from);
}

// kN values from memory that is aligned as Packed is; one value from anywhere.
template <int kN, typename T>
__device__ inline void Load(const T* from, float (&x)[kN]) {
  if constexpr (kN == 1) {
    x[0] = ToFloat(*from);
  } else {
    Unpack(LoadPacked<kN>(from), x);
  }
}
// The way back.
template <int kN, typename T>
__device__ inline void Store(const float (&x)[kN], T* to) {
  if constexpr (kN == 1) {
    *to = FromFloat<T>(x[0]);
  } else {
    *reinterpret_cast<Packed<T, kN>*>(to) = Pack<T>(x);
  }
}

// Whether all of `pointers` are multiples of 16 bytes; null is.
inline bool Aligned16(std::initializer_list<const void*> pointers) {
  for (const void* pointer : pointers) {
    if (reinterpret_cast<uintptr_t>(pointer) % 16 != 0) return false;
  }
  return true;
}

}  // namespace deltanet

#endif  // DELTANET_MODEL_OPS_CUDA_VECTOR_CUH_
