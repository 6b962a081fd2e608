// The CPU kernels' table: one source (kernels.cc) is compiled for several instruction sets, and each build of
// it fills one table. Plain types only, because kernels.cc may share no inline function with the rest of the
// program: the linker keeps one copy of such a function, which could be the one with AVX-512 in it.
//
// Kernels are thread-safe, allocate nothing and check nothing. Pointers need no alignment beyond a float's;
// states whose rows start on 64 bytes are fastest.
#ifndef DELTANET_MODEL_OPS_CPU_KERNELS_H_
#define DELTANET_MODEL_OPS_CPU_KERNELS_H_

#include <stdint.h>

namespace deltanet {

// Columns [0, columns) of one head of one row, advanced through all its tokens. Columns of S are independent.
struct DeltaRuleSpan {
  int64_t tokens;   // T; may be 0: the state is copied.
  int64_t key_dim;  // K
  int64_t columns;  // At most CpuKernels::delta_rule_columns.
  const float* q;   // Token t: q + t * token_stride, likewise k (K each), v (columns), beta (1).
  const float* k;
  const float* v;
  const float* beta;
  int64_t token_stride;
  float scale;
  const float*
      base;  // Row i of S: base + i * state_stride. Null: zero. May equal `work`, else must not overlap it.
  float* work;           // Row i of S: work + i * state_stride.
  int64_t state_stride;  // V
  float* out;            // Token t: out + t * out_stride.
  int64_t out_stride;    // H * V
};

// Tokens of a row that see the same taps.
struct QkvSpan {
  int64_t tokens;
  int64_t heads, key_dim, value_dim;  // H, K, V
  bool silu;                          // Else ReLU.
  float* z;                           // Token t: z + t * z_stride: q [H*K], k [H*K], v [H*V], beta [H].
  int64_t z_stride;
  const float* bias;         // [2HK + HV + H]
  const float* tap_bias[3];  // [2HK + HV] To be taken away; null where the tap is valid.
  bool has_position;         // Else beta is zero.
};

enum class SpanActivation { kSilu, kRelu, kEluPlusOne, kIdentity };
enum class SpanNorm { kNone, kL2, kSum };  // As in ShortConvQkvArgs.
// One head of q, k or v of consecutive tokens of a row, through its short convolution.
struct ShortConvSpan {
  int64_t tokens;
  int64_t before;    // Tokens of the row before the span: z reaches back to them, and the tail before those.
  int64_t channels;  // K or V
  int64_t taps;      // 0: no convolution.
  SpanActivation activation;
  SpanNorm norm;
  const float* z;  // Token t: z + t * z_stride.
  int64_t z_stride;
  const float* weight;  // Tap j, oldest first: weight + j * width.
  const float* bias;    // Null: none.
  const float* tail;    // Input i of the last taps - 1 before the row: tail + i * width. Null: zeros.
  int64_t width;
  float* out;  // Token t: out + t * out_stride; must not overlap z.
  int64_t out_stride;
};

// c [m, n] = (with `accumulate`, +=) a [m, k] x b^T, b [n, k], rows lda, ldb and ldc floats apart.
struct ProductSpan {
  int64_t m, n, k;
  const float* a;
  int64_t lda;
  const float* b;
  int64_t ldb;
  float* c;
  int64_t ldc;
  bool accumulate;
};

struct CpuKernels {
  const char* name;
  int64_t delta_rule_columns;  // A multiple of the vector width; what a DeltaRuleSpan is cut into.

  // True if the new state holds an infinity or NaN.
  bool (*delta_rule)(const DeltaRuleSpan& span);
  void (*qkv_activation)(const QkvSpan& span);
  // One row: s = x (+ bias); `sum` = s; `normed` = s / (sqrt(mean(s^2) + inside) + after) * scale.
  // Null pointers: not there; `sum` or `normed` may be x.
  void (*add_rms_norm)(int64_t width, float after, float inside, const float* x, const float* bias,
                       float* sum, const float* scale, float* normed);
  // One row: x [2 * width], bias likewise or null. silu_first: silu(first) * second; else first *
  // sigmoid(second).
  void (*gated_unit)(int64_t width, bool silu_first, const float* x, const float* bias, float* out);
  // One row, in place: x *= silu(gate).
  void (*silu_gate)(int64_t width, const float* gate, float* x);
  void (*short_conv)(const ShortConvSpan& span);
  // y = sigmoid(x) * scale.
  void (*scaled_sigmoid)(int64_t width, float scale, const float* x, float* y);
  // The largest of `width` values, at least one; NaN if any is NaN or infinite.
  float (*largest)(int64_t width, const float* x);
  // The sum, in float32, of exp((x_j - max) * factor): no x_j above max, factor > 0. The terms go to `terms`
  // too, if there.
  float (*sum_of_exp)(int64_t width, const float* x, float max, float factor, float* terms);
  // Each element is the sum of its k products in one order: its bits depend on neither m nor n.
  void (*product)(const ProductSpan& span);
};

}  // namespace deltanet

#endif  // DELTANET_MODEL_OPS_CPU_KERNELS_H_
