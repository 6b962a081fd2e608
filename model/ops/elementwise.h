// Operators with one output a token that remember nothing: gates and the embedding lookup.
#ifndef DELTANET_MODEL_OPS_ELEMENTWISE_H_
#define DELTANET_MODEL_OPS_ELEMENTWISE_H_

#include <cstdint>

#include "absl/status/status.h"
#include "model/ops/rows.h"

namespace deltanet {

enum class GateKind {
  kSigmoidSecond,  // first * sigmoid(second): transformer_block.
  kSiluFirst,      // silu(first) * second: deltanet_model (SwiGLU).
};

struct GatedUnitArgs {
  GateKind kind = GateKind::kSigmoidSecond;
  int64_t rows = 0;               // N
  int64_t width = 0;              // f
  DType dtype = DType::kFloat32;  // Of x and out: float32, on CUDA also bfloat16.
  const void* x = nullptr;        // [N, 2f]: first, second.
  const float* bias = nullptr;    // [2f] Added before the gate; null: none.
  void* out = nullptr;            // [N, f]; must not overlap x.
};
absl::Status GatedUnit(const GatedUnitArgs& args, const OpContext& context);

// In the place of an id: the one that is in the token's base slot (see EmbedArgs::sampled).
inline constexpr int64_t kSampledId = -1;

struct EmbedArgs {
  int64_t width = 0;              // d
  const int64_t* ids = nullptr;   // [N], each in [0, vocabulary) or kSampledId: checked by the caller.
  SlotView sampled;               // One int32 a slot (in the place of a float): the id sampled last.
  DType dtype = DType::kFloat32;  // Of the table: float32, on CUDA also bfloat16.
  const void* table = nullptr;    // [vocabulary, d]
  float* out = nullptr;           // [N, d]
};
absl::Status Embed(const RaggedRows& rows, const EmbedArgs& args, const OpContext& context);

}  // namespace deltanet

#endif  // DELTANET_MODEL_OPS_ELEMENTWISE_H_
