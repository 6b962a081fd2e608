#include "model/ops/delta_rule.h"

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "model/base/status_macros.h"
#include "model/ops/cpu/dispatch.h"
#include "model/ops/cuda_kernels.h"

namespace deltanet {
namespace {

// Below this many multiply-adds (some 20 us), waking another thread costs more than it saves.
constexpr int64_t kMinMultiplyAdds = int64_t{1} << 20;

absl::Status Validate(const RaggedRows& rows, const DeltaRuleArgs& args) {
  if (args.heads < 1 || args.key_dim < 1 || args.value_dim < 1) {
    return absl::InvalidArgumentError(absl::StrCat("delta rule has ", args.heads, " heads of key size ",
                                                   args.key_dim, " and value size ", args.value_dim,
                                                   ", want each at least 1"));
  }
  const int64_t widest = args.heads * std::max(args.key_dim, args.value_dim);
  if (rows.tokens > 0 && args.token_stride < widest) {
    return absl::InvalidArgumentError(
        absl::StrCat("delta rule's token_stride is ", args.token_stride, ", want at least ", widest));
  }
  if (args.state.slot_stride < args.heads * args.key_dim * args.value_dim) {
    return absl::InvalidArgumentError(absl::StrCat("delta rule's slots are ", args.state.slot_stride,
                                                   " floats apart, want at least ",
                                                   args.heads * args.key_dim * args.value_dim));
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status DeltaRule(const RaggedRows& rows, const DeltaRuleArgs& args, const OpContext& context) {
  RETURN_IF_ERROR(Validate(rows, args));
  CUDA_DOOR(DeltaRuleCuda(rows, args, context.stream));
  RETURN_IF_ERROR(CheckOnCpu(context, {args.dtype}));
  if (rows.rows == 0) return absl::OkStatus();

  const CpuKernels& kernels = ActiveCpuKernels();
  const int64_t H = args.heads, K = args.key_dim, V = args.value_dim;
  const int64_t strip = kernels.delta_rule_columns;
  const int64_t strips = (V + strip - 1) / strip;
  const int64_t parts = H * strips;  // Of a row: independent of each other.
  const float* const q = static_cast<const float*>(args.q);
  const float* const k = static_cast<const float*>(args.k);
  const float* const v = static_cast<const float*>(args.v);
  const float* const beta = static_cast<const float*>(args.beta);

  // A part costs T + 1 walks over its strip. So the work is a line of parts x units (see dispatch.h) walks,
  // and a range of it runs those parts whose first walk lies in it: ragged rows are shared out evenly.
  const auto run = [&](int64_t begin, int64_t end) {
    for (int64_t r = RowOfUnit(rows, begin / parts); r < rows.rows; ++r) {
      const int64_t row_begin = FirstUnit(rows, r) * parts;
      if (row_begin >= end) break;
      const int64_t start = rows.offsets[r];
      const int64_t tokens = rows.offsets[r + 1] - start;
      const int64_t walks = tokens + 1;
      int64_t part = begin <= row_begin ? 0 : (begin - row_begin + walks - 1) / walks;
      for (; part < parts && row_begin + part * walks < end; ++part) {
        const int64_t head = part / strips;
        const int64_t column = part % strips * strip;
        const int64_t in_slot = head * K * V + column;
        DeltaRuleSpan span;
        span.tokens = tokens;
        span.key_dim = K;
        span.columns = std::min(strip, V - column);
        span.q = q + start * args.token_stride + head * K;
        span.k = k + start * args.token_stride + head * K;
        span.v = v + start * args.token_stride + head * V + column;
        span.beta = beta + start * args.token_stride + head;
        span.token_stride = args.token_stride;
        span.scale = args.scale;
        span.base = rows.fresh[r] ? nullptr : args.state.at(rows.base_slot[r]) + in_slot;
        span.work = args.state.at(rows.work_slot[r]) + in_slot;
        span.state_stride = V;
        span.out = args.out + (start * H + head) * V + column;
        span.out_stride = H * V;
        if (kernels.delta_rule(span)) {
          std::atomic_ref<int32_t>(args.nonfinite[r]).store(1, std::memory_order_relaxed);
        }
      }
    }
  };
  context.parallel_for((rows.tokens + rows.rows) * parts,
                       GrainFor(kMinMultiplyAdds, 3 * K * std::min(strip, V)), run);
  return absl::OkStatus();
}

}  // namespace deltanet
