// The one door to matrix products, so that the algorithm can be pinned in one place.
#ifndef DELTANET_MODEL_OPS_GEMM_H_
#define DELTANET_MODEL_OPS_GEMM_H_

#include <cstdint>

#include "absl/status/status.h"
#include "model/base/round_up.h"
#include "model/base/tensor_view.h"
#include "model/ops/elementwise.h"
#include "model/ops/rms_norm.h"
#include "model/ops/rows.h"

namespace deltanet {

// c [m, n] = a [m, k] x b^T, b [n, k] as PyTorch keeps a linear layer's weight; row-major, with row strides
// in elements, on the context's device; a and b of `dtype`, c of `c_dtype`: the same, or float32 for bfloat16
// operands. With `accumulate`, which is for a float32 c, c += a x b^T. float32 never runs in TF32 or
// bfloat16. float64 is for composing weights at load time. m may be 0. c must not overlap a or b; elements of
// c between n and ldc are left alone. INVALID_ARGUMENT on sizes; what LibTorch throws passes through (see
// torch_guard.h). On CUDA, b is a constant: it may be read before what was queued on the stream just before
// has run.
//
// The bits of a row of c may depend on m, since the library chooses how it adds up by the sizes: unless
// `fixed_order`, with which they are made of that row of a, and b, alone. On the CPU (float32 only) the
// product is then our own, which adds up the same way whatever m. On CUDA it is made in blocks of
// kGemmBlockRows rows, each a product of that very size, the last one too: GemmRows(m) rows of a are read, of
// which those from m on may hold anything, and as many of c are written.
struct GemmArgs {
  DType dtype = DType::kFloat32;
  DType c_dtype = DType::kFloat32;
  int64_t m = 0, n = 0, k = 0;
  const void* a = nullptr;
  int64_t lda = 0;
  const void* b = nullptr;
  int64_t ldb = 0;
  void* c = nullptr;
  int64_t ldc = 0;
  bool accumulate = false;
  bool fixed_order = false;
};
absl::Status Gemm(const GemmArgs& args, const OpContext& context);

// Values whose squares are one sum in FusedGemmArgs, and the sums of `width` values.
inline constexpr int64_t kSquaresOf = 128;
constexpr int64_t SquaresWidth(int64_t width) { return (width + kSquaresOf - 1) / kSquaresOf; }

// A product with what surrounds it in a layer, in one kernel where there is one: for bfloat16 on Hopper, of
// few rows, and of many with a gate alone.
//
//   p[i] = f[i] a[i] b^T
//
//   f[i] = 1 / (sqrt(sum_j squares[i, j] / k + epsilon.inside) + epsilon.after), or 1 without squares
//
//   kStore   c = p                                     [m, n]
//   kGate    c = the gated unit (ops/elementwise.h) of p   [m, n / 2]
//   kAdd     x = x + p, and with a scale: c = x scale      [m, n]
//            x_squares[i, j] = the sum of the squares of x[i, 128 j] to x[i, 128 j + 127]
//
// So where the c of one is the a of the next, and its x_squares the other's squares, an RMSNorm is between them: a
// row's factor may as well come after the product, since c is floating-point. Sums stay in float32 up to c. On CUDA, b
// and scale are constants, as for Gemm. INVALID_ARGUMENT if there is no such kernel; sizes are not checked.
struct FusedGemmArgs {
  enum class Then { kStore, kGate, kAdd };

  GemmArgs gemm;
  const float* squares = nullptr;  // [m, SquaresWidth(k)] Or null.
  RmsEpsilon epsilon;
  Then then = Then::kStore;
  GateKind gate = GateKind::kSigmoidSecond;
  float* x = nullptr;            // [m, n]
  const float* scale = nullptr;  // [n] Null: nothing but x is written.
  float* x_squares = nullptr;    // [m, SquaresWidth(n)]
};
// Whether FusedGemm can make this product, on the device that is current.
bool FusedGemmTakes(const FusedGemmArgs& args, const OpContext& context);
absl::Status FusedGemm(const FusedGemmArgs& args, const OpContext& context);

// Tries whether on this device a product of this size and b (a, c and m do not matter) keeps what fixed_order
// says: on CUDA that is up to a library's kernel, which could add up the rows of one block in different ways.
// FAILED_PRECONDITION if it does not. Waits for the device; called at load time, on the stream that is
// current.
absl::Status CheckFixedOrder(GemmArgs args, const OpContext& context);

inline constexpr int64_t kGemmBlockRows = 128;

// The rows that a and c of a product of m rows need to have.
constexpr int64_t GemmRows(int64_t m, bool fixed_order, const Device& device) {
  return fixed_order && device.type != DeviceType::kCpu ? RoundUp(m, kGemmBlockRows) : m;
}

}  // namespace deltanet

#endif  // DELTANET_MODEL_OPS_GEMM_H_
