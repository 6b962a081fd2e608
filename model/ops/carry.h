// What a model over tokens carries from one step of a session to the next besides its layers' state: the
// residual stream of the last token after all layers (so that the next token can be scored or sampled later,
// without computing that token again).
#ifndef DELTANET_MODEL_OPS_CARRY_H_
#define DELTANET_MODEL_OPS_CARRY_H_

#include <cstdint>

#include "absl/status/status.h"
#include "model/ops/rows.h"

namespace deltanet {

struct CarryArgs {
  int64_t width = 0;   // d
  float* x = nullptr;  // [N + R, d] The residual stream of the step's N tokens, and room for R rows.
  SlotView carried;    // [d] float32 a slot.
};

// For each row r: x[N + r] = its base slot's carried (zero where fresh); its work slot's carried = the row's
// last token of x, or x[N + r] if it has none. Safe when base and work slot are the same. Bytes: 16 d a row.
// INVALID_ARGUMENT on sizes or device.
absl::Status Carry(const RaggedRows& rows, const CarryArgs& args, const OpContext& context);

}  // namespace deltanet

#endif  // DELTANET_MODEL_OPS_CARRY_H_
