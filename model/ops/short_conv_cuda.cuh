// What the kernels of the short convolution share.
#ifndef DELTANET_MODEL_OPS_SHORT_CONV_CUDA_CUH_
#define DELTANET_MODEL_OPS_SHORT_CONV_CUDA_CUH_

#include "model/ops/cuda_util.cuh"
#include "model/ops/short_conv.h"

namespace deltanet {

__host__ __device__ inline int64_t QkvWidth(const ShortConvQkvArgs& args) {
  return args.heads * (2 * args.key_dim + args.value_dim);
}

// What a slot remembers, [taps - 1, QkvWidth].
template <typename T>
__device__ inline T* TailOf(const ShortConvQkvArgs& args, int32_t slot) {
  return reinterpret_cast<T*>(args.tail.at(slot));
}

// On its way into a T.
template <typename T>
__device__ inline float Activated(QkActivation activation, float x) {
  switch (activation) {
    case QkActivation::kSilu:
      return x * SigmoidFor<T>(x);
    case QkActivation::kRelu:
      return x < 0.0f ? 0.0f : x;  // NaN stays NaN, here and below.
    case QkActivation::kEluPlusOne:
      return x > 0.0f ? x + 1.0f : expf(x);
    case QkActivation::kIdentity:
      break;
  }
  return x;
}

}  // namespace deltanet

#endif  // DELTANET_MODEL_OPS_SHORT_CONV_CUDA_CUH_
