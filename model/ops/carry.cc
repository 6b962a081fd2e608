#include "model/ops/carry.h"

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

}  // namespace

absl::Status Carry(const RaggedRows& rows, const CarryArgs& args, const OpContext& context) {
  if (args.width < 1) {
    return absl::InvalidArgumentError(absl::StrCat("carried width is ", args.width, ", want at least 1"));
  }
  RETURN_IF_ERROR(CheckKernels(context, {}));
  CUDA_DOOR(CarryCuda(rows, args, context.stream));
  const int64_t d = args.width, bytes = d * static_cast<int64_t>(sizeof(float));
  context.parallel_for(rows.rows, GrainFor(kMinElements, 2 * d), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      float* const before = args.x + (rows.tokens + r) * d;
      if (rows.fresh[r]) {
        std::memset(before, 0, bytes);
      } else {
        std::memcpy(before, args.carried.at(rows.base_slot[r]), bytes);
      }
      const bool empty = rows.offsets[r + 1] == rows.offsets[r];
      const float* const last = empty ? before : args.x + (rows.offsets[r + 1] - int64_t{1}) * d;
      if (rows.work_slot[r] >= 0) std::memcpy(args.carried.at(rows.work_slot[r]), last, bytes);
    }
  });
  return absl::OkStatus();
}

}  // namespace deltanet
