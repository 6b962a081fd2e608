// The one door to matrix products, so that the algorithm can be pinned in one place.
#ifndef DELTANET_MODEL_OPS_GEMM_H_
#define DELTANET_MODEL_OPS_GEMM_H_

#include <cstdint>

#include "absl/status/status.h"
#include "model/ops/rows.h"

namespace deltanet {

// c [m, n] = a [m, k] x b^T, b [n, k] as PyTorch keeps a linear layer's weight; row-major, with row strides in
// elements, on the context's device; a and b of `dtype`, c of `c_dtype`: the same, or float32 for bfloat16
// operands. float32 never runs in TF32 or bfloat16. float64 is for composing weights at load time. The bits of
// a product may depend on m. m may be 0. c must not overlap a or b; elements of c between n and ldc are left
// alone. INVALID_ARGUMENT on sizes; what LibTorch throws passes through (see torch_guard.h).
struct GemmArgs {
  DType dtype = DType::kFloat32;
  DType c_dtype = DType::kFloat32;
  int64_t m = 0, n = 0, k = 0;
  const void* a = nullptr;
  int64_t lda = 0;
  const void* b = nullptr;
  int64_t ldb = 0;
  void* c = nullptr;
  int64_t ldc = 0;
};
absl::Status Gemm(const GemmArgs& args, const OpContext& context);

}  // namespace deltanet

#endif  // DELTANET_MODEL_OPS_GEMM_H_
