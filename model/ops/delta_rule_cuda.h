// How the delta rule's two CUDA kernels share a step: delta_rule_cuda.cu goes token by token and takes any
// sizes; delta_rule_chunk_cuda.cu goes by chunks of 64 tokens through the tensor cores. DeltaRuleCuda
// chooses.
#ifndef DELTANET_MODEL_OPS_DELTA_RULE_CUDA_H_
#define DELTANET_MODEL_OPS_DELTA_RULE_CUDA_H_

#include "absl/status/status.h"
#include "model/ops/delta_rule.h"
#include "model/ops/delta_rule_plan.h"

namespace deltanet {

// Which kernels DeltaRuleCuda uses where both can do the work: by default, chunks. For tests and benchmarks;
// not thread-safe.
enum class DeltaRuleCudaPath { kDefault, kTokens, kChunks };
void SetDeltaRuleCudaPathForTesting(DeltaRuleCudaPath path);

// As DeltaRuleChunkBlocks, on CUDA device number `device`.
int64_t DeltaRuleChunkCudaBlocks(int device, DType dtype, int64_t key_dim, int64_t value_dim);

// Whether the chunk kernel can do this work on the current device, given a plan.
bool DeltaRuleChunkCudaTakes(const DeltaRuleArgs& args);

// Runs the rows of rows.chunks and leaves the others alone; at the same time as the kernel before it if that
// is the one `with_short_rows`, which lets it start. Wants DeltaRuleChunkCudaTakes(args) and
// rows.chunks.blocks > 0. INTERNAL if a launch fails.
absl::Status DeltaRuleChunkCuda(const RaggedRows& rows, const DeltaRuleArgs& args, bool with_short_rows,
                                void* stream);

}  // namespace deltanet

#endif  // DELTANET_MODEL_OPS_DELTA_RULE_CUDA_H_
