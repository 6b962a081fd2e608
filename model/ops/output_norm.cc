#include "model/ops/output_norm.h"

#include <cstdint>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "model/base/status_macros.h"
#include "model/ops/cpu/dispatch.h"
#include "model/ops/cuda_kernels.h"

namespace deltanet {
namespace {

// Below this many elements (some 10 us), waking another thread costs more than it saves.
constexpr int64_t kMinElements = int64_t{1} << 16;

absl::Status Check(const OutputNormArgs& args) {
  if (args.rows < 0 || args.groups < 1 || args.width < 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("output norm over ", args.rows, " rows of ", args.groups, " groups of width ",
                     args.width, ", want at least 0 rows, and groups and a width of at least 1"));
  }
  if (args.gate != nullptr && args.gate_stride < args.groups * args.width) {
    return absl::InvalidArgumentError(absl::StrCat("output norm's gate_stride is ", args.gate_stride,
                                                   ", want at least ", args.groups * args.width));
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status OutputNorm(const OutputNormArgs& args, const OpContext& context) {
  RETURN_IF_ERROR(Check(args));
  RETURN_IF_ERROR(CheckKernels(context, {args.dtype}));
  CUDA_DOOR(OutputNormCuda(args, context.stream));
  const CpuKernels& kernels = ActiveCpuKernels();
  const int64_t row_width = args.groups * args.width;
  context.parallel_for(args.rows, GrainFor(kMinElements, row_width), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const float* const x = static_cast<const float*>(args.x) + n * row_width;
      float* const out = static_cast<float*>(args.out) + n * row_width;
      for (int64_t i = 0; i < row_width; i += args.width) {
        kernels.add_rms_norm(args.width, args.epsilon.after, args.epsilon.inside, x + i, /*bias=*/nullptr,
                             /*sum=*/nullptr, args.scale, out + i);
      }
      if (args.gate != nullptr) {
        kernels.silu_gate(row_width, static_cast<const float*>(args.gate) + n * args.gate_stride, out);
      }
    }
  });
  return absl::OkStatus();
}

}  // namespace deltanet
