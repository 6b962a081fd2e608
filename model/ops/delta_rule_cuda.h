// How the delta rule's two CUDA kernels share a step: delta_rule_cuda.cu goes token by token and takes any
// sizes; delta_rule_chunk_cuda.cu goes by chunks of 64 tokens through the tensor cores. DeltaRuleCuda
// chooses.
#ifndef DELTANET_MODEL_OPS_DELTA_RULE_CUDA_H_
#define DELTANET_MODEL_OPS_DELTA_RULE_CUDA_H_

#include "absl/status/status.h"
#include "model/ops/delta_rule.h"

namespace deltanet {

// Where chunks are taken at all, rows of at most this many tokens go token by token all the same: by the row
// alone, so that its bits do not depend on what else is in the step.
constexpr int kDeltaRuleFewTokens = 16;

// Which kernels DeltaRuleCuda uses where both can do the work: by default, chunks. For tests and benchmarks;
// not thread-safe.
enum class DeltaRuleCudaPath { kDefault, kTokens, kChunks };
void SetDeltaRuleCudaPathForTesting(DeltaRuleCudaPath path);

// Whether the chunk kernel can do this work on the current device.
bool DeltaRuleChunkCudaTakes(const DeltaRuleArgs& args);

// Runs the rows of more than kDeltaRuleFewTokens tokens and leaves the others (padding too) alone. Wants
// DeltaRuleChunkCudaTakes(args). INTERNAL if a launch fails.
absl::Status DeltaRuleChunkCuda(const RaggedRows& rows, const DeltaRuleArgs& args, void* stream);

}  // namespace deltanet

#endif  // DELTANET_MODEL_OPS_DELTA_RULE_CUDA_H_
