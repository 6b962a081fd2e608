#include "model/ops/cpu/dispatch.h"

#include <algorithm>
#include <atomic>

#include "absl/strings/str_cat.h"

namespace deltanet {

extern "C" {
extern const CpuKernels deltanet_cpu_kernels_generic;
extern const CpuKernels deltanet_cpu_kernels_avx2;
extern const CpuKernels deltanet_cpu_kernels_avx512;
}

namespace {

std::atomic<const CpuKernels*> kernels_for_testing{nullptr};

const CpuKernels* Widest() {
  for (CpuIsa isa : {CpuIsa::kAvx512, CpuIsa::kAvx2}) {
    if (const CpuKernels* kernels = CpuKernelsFor(isa)) return kernels;
  }
  return CpuKernelsFor(CpuIsa::kGeneric);
}

}  // namespace

const CpuKernels* CpuKernelsFor(CpuIsa isa) {
  // The compiler's runtime also asks whether the operating system saves the registers.
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                          __builtin_cpu_supports("avx512bw");
  switch (isa) {
    case CpuIsa::kGeneric:
      return &deltanet_cpu_kernels_generic;
    case CpuIsa::kAvx2:
      return has_avx2 ? &deltanet_cpu_kernels_avx2 : nullptr;
    case CpuIsa::kAvx512:
      return has_avx512 ? &deltanet_cpu_kernels_avx512 : nullptr;
  }
  return nullptr;
}

const CpuKernels& ActiveCpuKernels() {
  static const CpuKernels* const widest = Widest();
  const CpuKernels* testing = kernels_for_testing.load(std::memory_order_acquire);
  return testing != nullptr ? *testing : *widest;
}

void SetCpuKernelsForTesting(const CpuKernels* kernels) {
  kernels_for_testing.store(kernels, std::memory_order_release);
}

absl::Status CheckKernels(const OpContext& context, std::initializer_list<DType> dtypes) {
  const bool on_cpu = context.device.type == DeviceType::kCpu;
#ifndef DELTANET_CUDA
  if (!on_cpu) {
    return absl::FailedPreconditionError(
        absl::StrCat("device is ", DeviceName(context.device), ", but this build has no CUDA support"));
  }
#endif
  for (const DType dtype : dtypes) {
    if (dtype != DType::kFloat32 && (on_cpu || dtype != DType::kBFloat16)) {
      return absl::InvalidArgumentError(absl::StrCat("dtype on ", DeviceName(context.device), " is ",
                                                     DTypeName(dtype), ", want float32",
                                                     on_cpu ? "" : " or bfloat16"));
    }
  }
  return absl::OkStatus();
}

int64_t RowOfToken(const RaggedRows& rows, int64_t n) {
  // The last row that starts at or before n: those that start at n and are empty come before it.
  return std::upper_bound(rows.offsets, rows.offsets + rows.rows + 1, n) - rows.offsets - 1;
}

int64_t RowOfUnit(const RaggedRows& rows, int64_t unit) {
  int64_t low = 0, high = rows.rows;  // FirstUnit(low) <= unit < FirstUnit(high).
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    (FirstUnit(rows, middle) <= unit ? low : high) = middle;
  }
  return low;
}

}  // namespace deltanet
