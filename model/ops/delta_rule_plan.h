// How the delta rule's chunk kernel (delta_rule_chunk_cuda.cu) shares out a step's long rows among its
// blocks. The host knows the rows' lengths and a plan is the same for all layers, so it is made once a step.
#ifndef DELTANET_MODEL_OPS_DELTA_RULE_PLAN_H_
#define DELTANET_MODEL_OPS_DELTA_RULE_PLAN_H_

#include <cstdint>

#include "absl/types/span.h"
#include "model/ops/rows.h"

namespace deltanet {

// Rows of at most this many tokens are not the chunk kernel's: by the row alone, so that its bits do not
// depend on what else is in the step.
inline constexpr int64_t kDeltaRuleFewTokens = 16;

// The numbers that a plan for at most `rows` long rows may need. `columns`: V.
int64_t MaxChunkPlanSize(int64_t rows, int64_t heads, int64_t columns, int64_t blocks);

// The states [H, K, V] that a plan which splits rows may keep (DeltaRuleArgs::segment_states), in steps of at
// most `tokens` tokens: at most two of 64 columns, or one of 128, a block.
int64_t MaxSegmentStates(int64_t tokens, int64_t heads, int64_t columns, int64_t blocks);

// Plans for rows of offsets[r + 1] - offsets[r] tokens. A piece is a head of a row or, where V is split, half
// (V = 128, if blocks would be idle) or a quarter (V = 256, always) of one. The longest pieces go first, each
// to the block that has least to do: no block has more than 4/3 of the best possible. `columns`: V, 64, 128
// or 256.
//
// If `splits` and V is 64 or 128, rows are cut into segments where that should take clearly less time: when
// few rows are so long that the others do not keep the device busy meanwhile. Then a row's bits depend on the
// rows beside it.
//
// Writes `plan` and returns how it is to be read, with `numbers` pointing at it; blocks is 0 if no row is
// long. O(pieces log blocks), some 20 ns each. Called by the engine on the batch thread.
ChunkPlan PlanChunks(absl::Span<const int32_t> offsets, int64_t heads, int64_t columns, int64_t blocks,
                     bool splits, int32_t* plan);

}  // namespace deltanet

#endif  // DELTANET_MODEL_OPS_DELTA_RULE_PLAN_H_
