// The delta rule over a ragged batch: each head of each row is an associative memory S, corrected at every
// token,
//
//   u_t = beta_t (v_t - S_{t-1}^T k_t)      what the memory gets wrong about this key
//   S_t = S_{t-1} + k_t u_t^T
//   o_t = scale * S_t^T q_t
//
// Source: Yang et al., arXiv:2406.06484 (their S is the transpose of ours), with its chunkwise form.
#ifndef DELTANET_MODEL_OPS_DELTA_RULE_H_
#define DELTANET_MODEL_OPS_DELTA_RULE_H_

#include <cstdint>

#include "absl/status/status.h"
#include "model/ops/rows.h"

namespace deltanet {

struct DeltaRuleArgs {
  int64_t heads = 0;              // H
  int64_t key_dim = 0;            // K
  int64_t value_dim = 0;          // V
  DType dtype = DType::kFloat32;  // Of q, k, v, beta: float32, on CUDA also bfloat16.
  // Token n, head h: q + n * token_stride + h * K, likewise k; v + n * token_stride + h * V; beta + n *
  // token_stride + h.
  const void* q = nullptr;
  const void* k = nullptr;
  const void* v = nullptr;
  const void* beta = nullptr;  // Range not checked.
  int64_t token_stride = 0;    // Elements.
  float scale = 1.0f;
  SlotView state;        // [H, K, V] float32 a slot.
  float* out = nullptr;  // [N, H, V], fully overwritten; must not overlap an input.
  // If not null, the outputs are rounded to bfloat16 and written here instead. On CUDA only.
  void* out_bfloat16 = nullptr;
  int32_t* nonfinite =
      nullptr;  // [R]: set to 1 where a row's new state holds an infinity or NaN; else left alone.
  int64_t longer_than = -1;  // On CUDA: rows of this many tokens or fewer are left alone.
  // Where rows.chunks splits rows: MaxSegmentStates (delta_rule_plan.h) times [H, K, V], overwritten.
  float* segment_states = nullptr;
};

// Runs every row from its base slot (or zero) to its work slot. A row without tokens copies its state.
// On the CPU the bits of a row's state and outputs depend on its own tokens and state alone: not on the other
// rows, their order, the slots or the threads. They may depend on how a sequence is cut into rows. A token
// with beta = 0 leaves the state as it was: on the CPU every bit of it, on CUDA but for the sign of a zero.
// INVALID_ARGUMENT if a size is not positive or a dtype is not supported on the device; then nothing is
// written. FAILED_PRECONDITION if this build lacks the device. Thread-safe: touches only what it is given.
absl::Status DeltaRule(const RaggedRows& rows, const DeltaRuleArgs& args, const OpContext& context);

// Among how many blocks DeltaRule shares out long rows of these sizes on `device` (see PlanChunks); 0 where it does
// not go by chunks there.
int64_t DeltaRuleChunkBlocks(const Device& device, DType dtype, int64_t key_dim, int64_t value_dim);

// The definition, in scalar loops of type T (float or double), for one head: q, k [T,K], v, out [T,V], beta
// [T], state [K,V] in place. Never optimised; what everything else is measured against.
template <typename T>
void DeltaRuleReference(int64_t tokens, int64_t key_dim, int64_t value_dim, const T* q, const T* k,
                        const T* v, const T* beta, T scale, T* state, T* out);

}  // namespace deltanet

#endif  // DELTANET_MODEL_OPS_DELTA_RULE_H_
