// Products go to LibTorch's library (cuBLAS, MKL), but for some. On a GPU those in bfloat16 of few rows,
// where there is our kernel (gemm_skinny_cuda.cu), and those of many, where the library is told which kernel
// to take (gemm_lt_cuda.cu), or the kernel is ours since a gate follows (gemm_gated_cuda.cu); and those in
// float32 that are small (gemm_small_cuda.cu). On the CPU those in a fixed order, whose rows' bits must not
// depend on their number: those of MKL's do (by the kernel, which it chooses by m; by where in a block a row
// stands, where n < 12 and rows are no multiple of 16 bytes); and those of few rows, which are in that order
// too, for where matrices are small it is faster: a step of TransformerDeltaNet(64, num_layers=6) for 1 and
// 16 tokens took 19 and 440 us instead of 56 and 615 (2 cores with AVX-512), and where they are large as fast
// (64 rows and large ones took 1.7 times as long).
//
// Tiling of the latter: rows in blocks that stay in the L2, columns in blocks of kBlockColumns, and such
// pairs of blocks shared out to the threads. Within a pair a tile of 3 x 4 sums (6 x 4 with AVX-512), a
// vector each, runs through all of k: 7 loads for 12 multiply-adds (10 for 24), those of b out of the L1.
// Lanes are added up at the end.
//
// Floor: 2 m n k FLOPs, and 4 n k bytes, which count where m is small.
#include "model/ops/gemm.h"

#include <ATen/ops/addmm.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/roll.h>
#include <ATen/ops/sin.h>
#include <ATen/ops/zeros.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "model/base/status_macros.h"
#include "model/ops/cpu/dispatch.h"
#include "model/ops/cuda_kernels.h"

#ifdef DELTANET_CUDA
#include <ATen/cuda/CUDAContextLight.h>
#endif

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

constexpr int64_t kBlockColumns = 24;        // Whole tiles.
constexpr int64_t kBlockFloats = 64 * 1024;  // Of a's rows: half of a small L2.
constexpr int64_t kFewRows = 16;  // Whose products are our own whether or not the order is to be fixed.
constexpr int64_t kMinMultiplyAdds = 1 << 18;  // Below this, waking another thread costs more than it saves.

// In float32, on the CPU.
void MultiplyInFixedOrder(const GemmArgs& args, const OpContext& context) {
  const CpuKernels& kernels = ActiveCpuKernels();
  const int64_t block_rows =
      std::clamp<int64_t>(kBlockFloats / args.k / 12 * 12, 12, std::max<int64_t>(12, args.m));
  const int64_t across = (args.n + kBlockColumns - 1) / kBlockColumns;
  const int64_t down = (args.m + block_rows - 1) / block_rows;
  const auto run = [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t i = block / across * block_rows, j = block % across * kBlockColumns;
      ProductSpan span;
      span.m = std::min(block_rows, args.m - i);
      span.n = std::min(kBlockColumns, args.n - j);
      span.k = args.k;
      span.a = static_cast<const float*>(args.a) + i * args.lda;
      span.lda = args.lda;
      span.b = static_cast<const float*>(args.b) + j * args.ldb;
      span.ldb = args.ldb;
      span.c = static_cast<float*>(args.c) + i * args.ldc + j;
      span.ldc = args.ldc;
      span.accumulate = args.accumulate;
      kernels.product(span);
    }
  };
  context.parallel_for(
      down * across, GrainFor(kMinMultiplyAdds, std::min(block_rows, args.m) * kBlockColumns * args.k), run);
}

at::ScalarType ScalarType(DType dtype) {
  return dtype == DType::kFloat32 ? at::kFloat : dtype == DType::kFloat64 ? at::kDouble : at::kBFloat16;
}

at::TensorOptions Options(DType dtype, const Device& device) {
  const bool on_cpu = device.type == DeviceType::kCpu;
  return at::TensorOptions()
      .dtype(ScalarType(dtype))
      .device(on_cpu ? at::kCPU : at::kCUDA, static_cast<at::DeviceIndex>(on_cpu ? -1 : device.index));
}

}  // namespace

absl::Status Gemm(const GemmArgs& args, const OpContext& context) {
  if (args.m < 0 || args.n < 1 || args.k < 1 || args.lda < args.k || args.ldb < args.k || args.ldc < args.n) {
    return absl::InvalidArgumentError(absl::StrCat(
        "product of [", args.m, ",", args.k, "] (row stride ", args.lda, ") and the transpose of [", args.n,
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
  if (args.accumulate && args.c_dtype != DType::kFloat32) {
    return absl::InvalidArgumentError(
        absl::StrCat("product adds to ", DTypeName(args.c_dtype), ", want float32"));
  }
  if (args.fixed_order && on_cpu && args.dtype != DType::kFloat32) {
    return absl::InvalidArgumentError(
        absl::StrCat("product in ", DTypeName(args.dtype), " has no fixed order on the CPU, want float32"));
  }
  if (args.m == 0) return absl::OkStatus();
  if (on_cpu && args.dtype == DType::kFloat32 && (args.fixed_order || args.m <= kFewRows)) {
    MultiplyInFixedOrder(args, context);
    return absl::OkStatus();
  }
  FusedGemmArgs alone = {.gemm = args};
  if (args.accumulate) {  // To x, which has no stride, and nothing into c.
    alone.then = FusedGemmArgs::Then::kAdd;
    alone.x = static_cast<float*>(args.c);
    alone.gemm.c = nullptr;
    alone.gemm.c_dtype = args.dtype;
  }
  if ((!args.accumulate || args.ldc == args.n) && FusedGemmTakes(alone, context)) {
    return FusedGemm(alone, context);
  }
#ifdef DELTANET_CUDA
  if (!on_cpu) {
    if (GemmSmallCudaTakes(args)) return GemmSmallCuda(args, context.stream);
    ASSIGN_OR_RETURN(const bool made, GemmLtCuda(args, at::cuda::getCurrentCUDABlasLtHandle(), context.stream));
    if (made) return absl::OkStatus();
  }
#endif
  c10::InferenceMode no_gradients;
  const at::TensorOptions operands = Options(args.dtype, context.device);
  const at::TensorOptions result = Options(args.c_dtype, context.device);
  const at::Tensor b = Matrix(args.b, args.n, args.k, args.ldb, operands).t();
  const int64_t rows = GemmRows(args.m, args.fixed_order, context.device);
  const int64_t block = args.fixed_order ? kGemmBlockRows : rows;
  for (int64_t i = 0; i < rows; i += block) {
    const at::Tensor a = Matrix(static_cast<const char*>(args.a) + i * args.lda * DTypeBytes(args.dtype),
                                block, args.k, args.lda, operands);
    at::Tensor c = Matrix(static_cast<char*>(args.c) + i * args.ldc * DTypeBytes(args.c_dtype), block, args.n,
                          args.ldc, result);
    const bool widens = args.c_dtype != args.dtype;
    if (args.accumulate) {
      widens ? at::addmm_out(c, c, a, b, at::kFloat) : at::addmm_out(c, c, a, b);
    } else {
      widens ? at::mm_out(c, a, b, at::kFloat) : at::mm_out(c, a, b);
    }
  }
  return absl::OkStatus();
}

bool FusedGemmTakes([[maybe_unused]] const FusedGemmArgs& args, [[maybe_unused]] const OpContext& context) {
  CUDA_DOOR(GemmSkinnyCudaTakes(args) || GemmGatedCudaTakes(args));
  return false;
}

absl::Status FusedGemm(const FusedGemmArgs& args, const OpContext& context) {
  if (!FusedGemmTakes(args, context)) {
    return absl::InvalidArgumentError(absl::StrCat("there is no fused product of [", args.gemm.m, ",",
                                                   args.gemm.k, "] and the transpose of [", args.gemm.n, ",",
                                                   args.gemm.k, "] in ", DTypeName(args.gemm.dtype), " on ",
                                                   DeviceName(context.device)));
  }
  if (args.gemm.m == 0) return absl::OkStatus();
  CUDA_DOOR(GemmSkinnyCudaTakes(args) ? GemmSkinnyCuda(args, context.stream)
                                      : GemmGatedCuda(args, context.stream));
  return absl::OkStatus();
}

absl::Status CheckFixedOrder(GemmArgs args, const OpContext& context) {
  c10::InferenceMode no_gradients;
  const at::Tensor a = at::arange(kGemmBlockRows * args.k, Options(DType::kFloat32, context.device))
                           .sin()
                           .to(ScalarType(args.dtype))
                           .view({kGemmBlockRows, args.k});
  const auto product = [&](const at::Tensor& operand, at::Tensor* c) {
    *c = at::zeros({kGemmBlockRows, args.n}, Options(args.c_dtype, context.device));
    args.fixed_order = true;
    args.m = kGemmBlockRows;
    args.a = operand.data_ptr();
    args.lda = args.k;
    args.c = c->data_ptr();
    args.ldc = args.n;
    return Gemm(args, context);
  };
  at::Tensor want, got;
  RETURN_IF_ERROR(product(a, &want));
  for (const int64_t places : {1, 8, 37, 64}) {
    const at::Tensor moved = at::roll(a, {places}, {0});
    RETURN_IF_ERROR(product(moved, &got));
    if (!at::equal(at::roll(got, {-places}, {0}), want)) {
      return absl::FailedPreconditionError(
          absl::StrCat("deterministic products were asked for, but on ", DeviceName(context.device),
                       " the bits of a row of [", kGemmBlockRows, ",", args.k, "] x [", args.k, ",", args.n,
                       "] in ", DTypeName(args.dtype), " depend on where in the block it stands"));
    }
  }
  return absl::OkStatus();
}

}  // namespace deltanet
