// What stands between the delta rule and the product behind it: an RMSNorm, of each head or of all together,
// and in `delta_net` an output gate.
#ifndef DELTANET_MODEL_OPS_OUTPUT_NORM_H_
#define DELTANET_MODEL_OPS_OUTPUT_NORM_H_

#include <cstdint>

#include "absl/status/status.h"
#include "model/ops/rms_norm.h"
#include "model/ops/rows.h"

namespace deltanet {

// out = rms_norm(x) * silu(gate), the norm over groups of values that lie side by side.
struct OutputNormArgs {
  int64_t rows = 0;               // N
  int64_t groups = 0;             // G: H where each head has a norm of its own, 1 where the norm is over all.
  int64_t width = 0;              // W, of a group: V, or HV.
  DType dtype = DType::kFloat32;  // Of x, gate and out: float32, on CUDA also bfloat16.
  const void* x = nullptr;        // [N, G, W]
  const float* scale = nullptr;   // [W], the same for all groups.
  RmsEpsilon epsilon;
  const void* gate = nullptr;  // [G, W] Row n at gate + n * gate_stride; null: no gate.
  int64_t gate_stride = 0;     // Elements.
  void* out = nullptr;         // [N, G, W] May be x; must not overlap gate.
};

// Bytes a token: G W values for each of x, gate and out that is there. INVALID_ARGUMENT on sizes, dtype or
// device.
absl::Status OutputNorm(const OutputNormArgs& args, const OpContext& context);

}  // namespace deltanet

#endif  // DELTANET_MODEL_OPS_OUTPUT_NORM_H_
