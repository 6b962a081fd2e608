#include "model/ops/rms_norm.h"

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

}  // namespace

absl::Status AddRmsNorm(const AddRmsNormArgs& args, const OpContext& context) {
  if (args.rows < 0 || args.width < 1) {
    return absl::InvalidArgumentError(absl::StrCat("RMSNorm over ", args.rows, " rows of width ", args.width,
                                                   ", want at least 0 rows and a width of at least 1"));
  }
  if (args.scale == nullptr ? (args.sum == nullptr) == (args.normed == nullptr) : args.normed == nullptr) {
    return absl::InvalidArgumentError("RMSNorm wants normed, or without a scale one of sum and normed");
  }
  RETURN_IF_ERROR(CheckKernels(context, {args.normed_dtype}));
  CUDA_DOOR(AddRmsNormCuda(args, context.stream));
  const CpuKernels& kernels = ActiveCpuKernels();
  const int64_t d = args.width;
  float* const normed = static_cast<float*>(args.normed);
  float* const sum = args.sum == nullptr && args.scale == nullptr ? normed : args.sum;
  context.parallel_for(args.rows, GrainFor(kMinElements, d), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const int64_t from = (args.gather != nullptr ? args.gather[n] : n) * d;
      float* const sum_to = sum != nullptr ? sum + n * d : nullptr;
      float* const normed_to = normed != nullptr ? normed + n * d : nullptr;
      kernels.add_rms_norm(d, args.epsilon.after, args.epsilon.inside, args.x + from, args.bias, sum_to,
                           args.scale, args.scale != nullptr ? normed_to : nullptr);
    }
  });
  return absl::OkStatus();
}

}  // namespace deltanet
