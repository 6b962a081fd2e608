#include "model/ops/gemm.h"

#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>
#include <c10/core/InferenceMode.h>

#include "absl/strings/str_cat.h"

namespace deltanet {
namespace {

at::Tensor Matrix(const void* data, int64_t rows, int64_t columns, int64_t stride,
                  const at::TensorOptions& options) {
  // The device is told, not asked of the driver.
  return at::for_blob(const_cast<void*>(data), {rows, columns})
      .strides({stride, 1})
      .target_device(options.device())
      .options(options)
      .make_tensor();
}

at::ScalarType ScalarType(DType dtype) {
  return dtype == DType::kFloat32 ? at::kFloat : dtype == DType::kFloat64 ? at::kDouble : at::kBFloat16;
}

}  // namespace

absl::Status Gemm(const GemmArgs& args, const OpContext& context) {
  if (args.m < 0 || args.n < 1 || args.k < 1 || args.lda < args.k || args.ldb < args.k || args.ldc < args.n) {
    return absl::InvalidArgumentError(
        absl::StrCat("product of [", args.m, ",", args.k, "] (row stride ", args.lda, ") and the transpose of [", args.n,
                     ",", args.k, "] (row stride ", args.ldb, ") into row stride ", args.ldc, " is not possible"));
  }
  const bool on_cpu = context.device.type == DeviceType::kCpu;
  if (args.dtype != DType::kFloat32 && args.dtype != (on_cpu ? DType::kFloat64 : DType::kBFloat16)) {
    return absl::InvalidArgumentError(absl::StrCat("product in ", DTypeName(args.dtype),
                                                   " is not supported on ", DeviceName(context.device)));
  }
  if (args.c_dtype != args.dtype && (args.c_dtype != DType::kFloat32 || on_cpu)) {
    return absl::InvalidArgumentError(absl::StrCat("product of ", DTypeName(args.dtype), " into ",
                                                   DTypeName(args.c_dtype), " is not supported on ",
                                                   DeviceName(context.device)));
  }
  if (args.m == 0) return absl::OkStatus();
  c10::InferenceMode no_gradients;
  const at::Device device(on_cpu ? at::kCPU : at::kCUDA,
                          static_cast<at::DeviceIndex>(on_cpu ? -1 : context.device.index));
  const at::TensorOptions operands = at::TensorOptions().dtype(ScalarType(args.dtype)).device(device);
  const at::TensorOptions result = operands.dtype(ScalarType(args.c_dtype));
  at::Tensor c = Matrix(args.c, args.m, args.n, args.ldc, result);
  const at::Tensor a = Matrix(args.a, args.m, args.k, args.lda, operands);
  const at::Tensor b = Matrix(args.b, args.n, args.k, args.ldb, operands).t();
  if (args.c_dtype == args.dtype) {
    at::mm_out(c, a, b);
  } else {
    at::mm_out(c, a, b, at::kFloat);
  }
  return absl::OkStatus();
}

}  // namespace deltanet
