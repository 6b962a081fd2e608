#include "model/ops/gemm.h"

#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>
#include <c10/core/InferenceMode.h>

#include "absl/strings/str_cat.h"

namespace deltanet {
namespace {

at::Tensor Matrix(const void* data, int64_t rows, int64_t columns, int64_t stride, at::ScalarType type) {
  return at::from_blob(const_cast<void*>(data), {rows, columns}, {stride, 1},
                       at::TensorOptions().dtype(type));
}

}  // namespace

absl::Status Gemm(const GemmArgs& args, const OpContext& context) {
  if (args.m < 0 || args.n < 1 || args.k < 1 || args.lda < args.k || args.ldb < args.n || args.ldc < args.n) {
    return absl::InvalidArgumentError(
        absl::StrCat("product of [", args.m, ",", args.k, "] (row stride ", args.lda, ") and [", args.k, ",",
                     args.n, "] (row stride ", args.ldb, ") into row stride ", args.ldc, " is not possible"));
  }
  if (args.dtype != DType::kFloat32 && args.dtype != DType::kFloat64) {
    return absl::InvalidArgumentError(absl::StrCat("product in ", DTypeName(args.dtype),
                                                   " is not supported on ", DeviceName(context.device)));
  }
  if (context.device.type != DeviceType::kCpu) {
    return absl::FailedPreconditionError("this build has no CUDA support");
  }
  if (args.m == 0) return absl::OkStatus();
  c10::InferenceMode no_gradients;
  const at::ScalarType type = args.dtype == DType::kFloat32 ? at::kFloat : at::kDouble;
  at::Tensor c = Matrix(args.c, args.m, args.n, args.ldc, type);
  at::mm_out(c, Matrix(args.a, args.m, args.k, args.lda, type),
             Matrix(args.b, args.k, args.n, args.ldb, type));
  return absl::OkStatus();
}

}  // namespace deltanet
