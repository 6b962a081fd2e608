// Which build of the CPU kernels runs, and what the operators' entry points share.
#ifndef DELTANET_MODEL_OPS_CPU_DISPATCH_H_
#define DELTANET_MODEL_OPS_CPU_DISPATCH_H_

#include <cstdint>
#include <initializer_list>

#include "absl/status/status.h"
#include "model/ops/cpu/kernels.h"
#include "model/ops/rows.h"

namespace deltanet {

enum class CpuIsa { kGeneric, kAvx2, kAvx512 };

// Null if this machine (or its operating system) lacks the instructions.
const CpuKernels* CpuKernelsFor(CpuIsa isa);

// The widest that this machine has, unless a test has set others. Thread-safe.
const CpuKernels& ActiveCpuKernels();
// Null: back to the widest.
void SetCpuKernelsForTesting(const CpuKernels* kernels);

// FAILED_PRECONDITION if this build has no kernels for the context's device; INVALID_ARGUMENT unless those
// that it has take all of `dtypes`: float32, on CUDA also bfloat16.
absl::Status CheckKernels(const OpContext& context, std::initializer_list<DType> dtypes);

// The row that token n of the step belongs to; 0 <= n < rows.tokens.
int64_t RowOfToken(const RaggedRows& rows, int64_t n);

// Work that has one part for each row and one for each token is split along units: row r owns the units
// offsets[r] + r ... offsets[r+1] + r, one more than it has tokens, so that empty rows count too.
inline int64_t FirstUnit(const RaggedRows& rows, int64_t r) { return rows.offsets[r] + r; }
// The row that owns `unit`; 0 <= unit < rows.tokens + rows.rows.
int64_t RowOfUnit(const RaggedRows& rows, int64_t unit);

// Items that make `min_work` of work, of which each makes `work_per_item` (at least 1).
inline int64_t GrainFor(int64_t min_work, int64_t work_per_item) {
  return work_per_item >= min_work ? 1 : (min_work + work_per_item - 1) / work_per_item;
}

}  // namespace deltanet

#endif  // DELTANET_MODEL_OPS_CPU_DISPATCH_H_
