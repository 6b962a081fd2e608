// RMSNorm and the additions around it.
#ifndef DELTANET_MODEL_OPS_RMS_NORM_H_
#define DELTANET_MODEL_OPS_RMS_NORM_H_

#include <cstdint>

#include "absl/status/status.h"
#include "model/ops/rows.h"

namespace deltanet {

// Where an RMSNorm has its epsilon: x / (sqrt(mean(x^2)) + after) * scale in the README families (1e-8), and
// x / sqrt(mean(x^2) + inside) * scale in `delta_net`.
struct RmsEpsilon {
  float after = 1e-8f;
  float inside = 0.0f;
};

struct AddRmsNormArgs {
  int64_t rows = 0;                 // N
  int64_t width = 0;                // d
  const float* x = nullptr;         // [*, d]
  const int32_t* gather = nullptr;  // [N] Row of x that output row n takes; null: row n.
  const float* bias = nullptr;      // [d] Added to x; null: nothing.
  float* sum = nullptr;             // [N, d] x + bias; null: not wanted. May be x, if gather is null.
  const float* scale =
      nullptr;  // [d] Null: no norm; `normed`, wanted instead of `sum`, is the sum rounded to its dtype.
  RmsEpsilon epsilon;
  DType normed_dtype = DType::kFloat32;  // float32, on CUDA also bfloat16.
  void* normed = nullptr;  // [N, d] The RMSNorm of the sum; null: not wanted. May be x (not `sum`), if it
                           // is float32 and gather is null.
};

// Bytes a token: 4d (2d, if bfloat16) for each of x, sum, normed that is there. INVALID_ARGUMENT on
// sizes or device. On CUDA, scale is a constant: it may be read before what was queued on the stream just
// before has run.
absl::Status AddRmsNorm(const AddRmsNormArgs& args, const OpContext& context);

}  // namespace deltanet

#endif  // DELTANET_MODEL_OPS_RMS_NORM_H_
