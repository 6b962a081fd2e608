#include "model/ops/elementwise.h"

#include <cstdint>
#include <cstring>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "model/base/status_macros.h"
#include "model/ops/cpu/dispatch.h"
#include "model/ops/cuda_kernels.h"

namespace deltanet {
namespace {

// Below this many elements (some 10 us), waking another thread costs more than it saves.
constexpr int64_t kMinElements = int64_t{1} << 16;

absl::Status CheckSizes(const char* what, int64_t rows, int64_t width) {
  if (rows >= 0 && width >= 1) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(what, " over ", rows, " rows of width ", width,
                                                 ", want at least 0 rows and a width of at least 1"));
}

}  // namespace

absl::Status GatedUnit(const GatedUnitArgs& args, const OpContext& context) {
  RETURN_IF_ERROR(CheckSizes("gated unit", args.rows, args.width));
  RETURN_IF_ERROR(CheckKernels(context, {args.dtype}));
  CUDA_DOOR(GatedUnitCuda(args, context.stream));
  const CpuKernels& kernels = ActiveCpuKernels();
  const int64_t f = args.width;
  const bool silu_first = args.kind == GateKind::kSiluFirst;
  context.parallel_for(args.rows, GrainFor(kMinElements, f), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      kernels.gated_unit(f, silu_first, static_cast<const float*>(args.x) + n * 2 * f, args.bias,
                         static_cast<float*>(args.out) + n * f);
    }
  });
  return absl::OkStatus();
}

absl::Status Embed(const EmbedArgs& args, const OpContext& context) {
  RETURN_IF_ERROR(CheckSizes("embedding", args.rows, args.width));
  RETURN_IF_ERROR(CheckKernels(context, {}));
  CUDA_DOOR(EmbedCuda(args, context.stream));
  const int64_t d = args.width;
  context.parallel_for(args.rows, GrainFor(kMinElements, d), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      std::memcpy(args.out + n * d, args.table + args.ids[n] * d, d * sizeof(float));
    }
  });
  return absl::OkStatus();
}

}  // namespace deltanet
