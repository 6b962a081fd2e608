#include "model/ops/rms_norm.h"

#include <cstdint>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "model/base/status_macros.h"
#include "model/ops/cpu/dispatch.h"

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
  if ((args.scale == nullptr) != (args.normed == nullptr)) {
    return absl::InvalidArgumentError("RMSNorm has one of scale and normed, want both or neither");
  }
  RETURN_IF_ERROR(CheckOnCpu(context));
  const CpuKernels& kernels = ActiveCpuKernels();
  const int64_t d = args.width;
  context.parallel_for(args.rows, GrainFor(kMinElements, d), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const int64_t from = (args.gather != nullptr ? args.gather[n] : n) * d;
      kernels.add_rms_norm(d, kRmsEpsilon, args.x + from, args.delta != nullptr ? args.delta + from : nullptr,
                           args.bias, args.sum != nullptr ? args.sum + n * d : nullptr, args.scale,
                           args.normed != nullptr ? args.normed + n * d : nullptr);
    }
  });
  return absl::OkStatus();
}

}  // namespace deltanet
