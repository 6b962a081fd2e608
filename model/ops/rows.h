// What every operator of the engine is told about a step: a ragged batch of rows, the state slots beside it,
// and where and how to run.
//
// A row is one span of one sequence. Rows are concatenated, never padded: token n of the step belongs to the
// row r with offsets[r] <= n < offsets[r+1]. Time is counted in tokens fed to the sequence since its start;
// token i of row r is fed at time position[r] + i. Layer l of a model whose layers each look `a` tokens ahead
// works, at time t, on the input of position t - l*a ("lag"); a position is valid if 0 <= position < end[r].
// Invalid positions enter a convolution as zero (after the linear layer, so without its bias) and have beta =
// 0.
//
// A row whose work slot is -1 is padding, so that a step has the number of rows that it is wanted to have: it is
// fresh and has one token, of which any input is computed with, but it reads and writes no slot, and what it is
// given as an output means nothing (and may not have been written).
#ifndef DELTANET_MODEL_OPS_ROWS_H_
#define DELTANET_MODEL_OPS_ROWS_H_

#include <cstdint>

#include "model/base/parallel.h"
#include "model/base/tensor_view.h"

namespace deltanet {

// A part of a long row, as the delta rule on a GPU may cut it.
struct ChunkSegment {
  int32_t row = 0;
  int32_t begin = 0, tokens = 0;  // In the row.
  // Numbers of states in DeltaRuleArgs::segment_states: where the row's state is before the segment and after
  // it, -1: in its slot; and, of a segment between the first and the last, its transition, else -1.
  int32_t before = -1, after = -1, transition = -1;
};
struct SplitRow {
  int32_t transitions = 0;
  int32_t first_state = 0, first_transition = 0;  // After the first segment; of the second. The others follow.
};

// One launch's part of a ChunkPlan: at numbers + at, for each block and behind the last, where its share of the
// pieces begins; then the pieces: row * heads * parts + head * parts + part, the segments being numbered behind
// the rows.
struct ChunkShares {
  int32_t at = 0;
  int32_t blocks = 0;
};

// Who does which of a step's long rows in the delta rule on a GPU (delta_rule_plan.h).
struct ChunkPlan {
  const int32_t* numbers = nullptr;  // `size` of them: all that follows is in there.
  int32_t size = 0;
  int32_t blocks = 0;  // Of the shares at 0: the long rows, or what is left of them by those below.
  int32_t parts = 1;   // Of a head's columns, each a piece of its own.

  // Where rows are split into segments: the first segments; the effects (see delta_rule_chunk_cuda.cu) of those
  // between the first and the last; SplitRow[split_rows] and ChunkSegment[].
  ChunkShares first, effects;
  int32_t rows = 0;
  int32_t split_rows = 0;
  int32_t split_rows_at = 0, segments_at = 0;
};

// Arrays live on the step's device and outlive the operator's work. R rows, N tokens.
struct RaggedRows {
  int64_t rows = 0;                    // R
  int64_t tokens = 0;                  // N == offsets[R]
  int64_t shortest = 0;                // No row has fewer tokens than this,
  int64_t longest = INT64_MAX;         // and none more: what the host knows of the rows' lengths.
  const int32_t* offsets = nullptr;    // [R+1], offsets[0] == 0, not decreasing: a row may be empty.
  const int32_t* token_row = nullptr;  // [N] The row of each token. Read on CUDA only.
  const int32_t* base_slot = nullptr;  // [R] State read; ignored where fresh.
  const int32_t* work_slot = nullptr;  // [R] State written; may equal base_slot; no two rows share one. -1: padding.
  const uint8_t* fresh = nullptr;      // [R] 1: the row starts from zero state and reads no slot.
  bool in_place = true;                // False: the host knows that all rows that are not fresh write another slot.
  const int64_t* position = nullptr;   // [R] Time of the row's first token.
  const int64_t* end = nullptr;        // [R] Length of the sequence, or INT64_MAX while unknown.
  ChunkPlan chunks;  // Read on CUDA only. Without blocks, long rows go token by token as well.
};

// One layer's part of the slots: slot s has its floats at pool + s * slot_stride + offset.
struct SlotView {
  float* pool = nullptr;
  int64_t slot_stride = 0;  // Floats.
  int64_t offset = 0;       // Floats.

  constexpr float* at(int32_t slot) const { return pool + static_cast<int64_t>(slot) * slot_stride + offset; }
};

// Where an operator runs. On CPU the work is done when it returns; on CUDA it is queued on `stream`.
struct OpContext {
  Device device;
  ParallelFor parallel_for;
  void* stream = nullptr;  // cudaStream_t on CUDA.
};

}  // namespace deltanet

#endif  // DELTANET_MODEL_OPS_ROWS_H_
