#include "model/ops/elementwise.h"

#include <algorithm>
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

absl::Status Embed(const RaggedRows& rows, const EmbedArgs& args, const OpContext& context) {
  RETURN_IF_ERROR(CheckSizes("embedding", rows.tokens, args.width));
  RETURN_IF_ERROR(CheckKernels(context, {args.dtype}));
  CUDA_DOOR(EmbedCuda(rows, args, context.stream));
  const int64_t d = args.width;
  const float* const table = static_cast<const float*>(args.table);
  context.parallel_for(rows.tokens, GrainFor(kMinElements, d), [&](int64_t begin, int64_t end) {
    for (int64_t r = RowOfToken(rows, begin); begin < end; ++r) {
      const int64_t row_end = std::min<int64_t>(end, rows.offsets[r + 1]);
      for (; begin < row_end; ++begin) {
        int64_t id = args.ids[begin];
        if (id == kSampledId) {
          int32_t sampled;
          std::memcpy(&sampled, args.sampled.at(rows.base_slot[r]), sizeof(sampled));
          id = sampled;
        }
        std::memcpy(args.out + begin * d, table + id * d, d * sizeof(float));
      }
    }
  });
  return absl::OkStatus();
}

}  // namespace deltanet
