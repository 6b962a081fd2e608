// The entry point of the delta rule, and how its CPU kernels (cpu/kernels.cc) work.
//
// Tiling. Columns of S are independent, so a head is cut into strips two vectors wide (32 columns with
// AVX-512, 16 with AVX2), and a strip of one row of the batch is one piece of work: it goes through all
// tokens of the row, staying in one block of the L1 cache (up to K = 256). It is read from the base slot by
// the first walk over it and written to the work slot by the last. Partial sums, u and the strip's row in
// hand are in registers.
//
// Recurrent form, a walk a token: each S_i is loaded, S_i += k_i u is stored, and while it is in a register
// it is read (o += S_i q_i) and asked for the next token's value (p += S_i k'_i). So T tokens cost T + 1
// walks, 3 multiply-adds and one load and store of each element a token.
//
// Chunkwise form, with chunks of two tokens: from one walk p_0, p_1 = S^T k_0, S^T k_1 and r_0, r_1 = S^T
// q_0, S^T q_1;
//   u_0 = beta_0 (v_0 - p_0)                       o_0 = r_0 + (k_0 q_0) u_0
//   u_1 = beta_1 (v_1 - p_1 - (k_0 k_1) u_0)       o_1 = r_1 + (k_0 q_1) u_0 + (k_1 q_1) u_1
// and S += k_0 u_0^T + k_1 u_1^T in the next walk. The same 3 multiply-adds, half the loads and stores, and
// some 3 % more multiply-adds for what lies between the two.
//
// Floor. 6 K V FLOPs a token and head; 8 K V bytes a row and head, which matter for rows of a few tokens.
// Measured on one core of a Zen 5 (288 GFLOP/s with AVX-512, 144 with AVX2, in registers), in GFLOP/s, one
// head, state in L2:
//
//   K = V                  T = 1    2    4    8   16   64  512
//    16  AVX-512 chunkwise    66   96  101  114  119  127  125
//        AVX-512 recurrent    66   75   89   96  107  117  117
//    64  AVX-512 chunkwise    89  133  172  206  226  244  251
//        AVX-512 recurrent    89  127  155  172  179  190  200
//   128  AVX-512 chunkwise    73  133  175  208  234  252  258
//        AVX-512 recurrent    72   98  132  153  165  180  182
//    64  AVX2 recurrent       47   70   91  106  116  125  128
//        AVX2 chunkwise       46   66   85   98  105  111  114
//   128  AVX2 recurrent       42   64   88  106  118  129  132
//        AVX2 chunkwise       41   66   85   99  108  116  116
//
// So the choice is by instruction set and not by length: AVX-512, whose 64-byte stores are the bottleneck,
// takes tokens in pairs wherever there are two; narrower vectors, bound by multiply-adds, never do. Chunks of
// 4 (234 and 247 GFLOP/s at K = V = 64 and 128) and 8 (182, 188) run out of registers. A pair is an even
// token of the row and the next, if neither has beta = 0; others are taken singly, because a token with beta
// = 0 (outside the sequence, or where sigmoid(x) is too small) leaves every bit of S as it was, which adding
// 0 to -0 would not. So a row that is cut at even tokens gives the same bits as the whole.
#include "model/ops/delta_rule.h"

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "model/base/status_macros.h"
#include "model/ops/cpu/dispatch.h"
#include "model/ops/cuda_kernels.h"
#include "model/ops/delta_rule_cuda.h"

namespace deltanet {
namespace {

// Below this many multiply-adds (some 10 us), waking another thread costs more than it saves.
constexpr int64_t kMinMultiplyAdds = int64_t{1} << 20;

absl::Status Validate(const RaggedRows& rows, const DeltaRuleArgs& args) {
  if (args.heads < 1 || args.key_dim < 1 || args.value_dim < 1) {
    return absl::InvalidArgumentError(absl::StrCat("delta rule has ", args.heads, " heads of key size ",
                                                   args.key_dim, " and value size ", args.value_dim,
                                                   ", want each at least 1"));
  }
  const int64_t widest = args.heads * std::max(args.key_dim, args.value_dim);
  if (rows.tokens > 0 && args.token_stride < widest) {
    return absl::InvalidArgumentError(
        absl::StrCat("delta rule's token_stride is ", args.token_stride, ", want at least ", widest));
  }
  if (args.state.slot_stride < args.heads * args.key_dim * args.value_dim) {
    return absl::InvalidArgumentError(absl::StrCat("delta rule's slots are ", args.state.slot_stride,
                                                   " floats apart, want at least ",
                                                   args.heads * args.key_dim * args.value_dim));
  }
  return absl::OkStatus();
}

}  // namespace

int64_t DeltaRuleChunkBlocks([[maybe_unused]] const Device& device, [[maybe_unused]] DType dtype,
                             [[maybe_unused]] int64_t key_dim, [[maybe_unused]] int64_t value_dim) {
#ifdef DELTANET_CUDA
  if (device.type == DeviceType::kCuda) return DeltaRuleChunkCudaBlocks(device.index, dtype, key_dim, value_dim);
#endif
  return 0;
}

absl::Status DeltaRule(const RaggedRows& rows, const DeltaRuleArgs& args, const OpContext& context) {
  RETURN_IF_ERROR(Validate(rows, args));
  RETURN_IF_ERROR(CheckKernels(context, {args.dtype}));
  CUDA_DOOR(DeltaRuleCuda(rows, args, context.stream));
  if (args.out_bfloat16 != nullptr) {
    return absl::InvalidArgumentError(
        "delta rule's outputs are wanted in bfloat16, which the CPU does not write");
  }
  if (rows.rows == 0) return absl::OkStatus();

  const CpuKernels& kernels = ActiveCpuKernels();
  const int64_t H = args.heads, K = args.key_dim, V = args.value_dim;
  const int64_t strip = kernels.delta_rule_columns;
  const int64_t strips = (V + strip - 1) / strip;
  const int64_t parts = H * strips;  // Of a row: independent of each other.
  const float* const q = static_cast<const float*>(args.q);
  const float* const k = static_cast<const float*>(args.k);
  const float* const v = static_cast<const float*>(args.v);
  const float* const beta = static_cast<const float*>(args.beta);

  // A part costs T + 1 walks over its strip. So the work is a line of parts x units (see dispatch.h) walks,
  // and a range of it runs those parts whose first walk lies in it: ragged rows are shared out evenly.
  const auto run = [&](int64_t begin, int64_t end) {
    for (int64_t r = RowOfUnit(rows, begin / parts); r < rows.rows; ++r) {
      const int64_t row_begin = FirstUnit(rows, r) * parts;
      if (row_begin >= end) break;
      if (rows.work_slot[r] < 0) continue;
      const int64_t start = rows.offsets[r];
      const int64_t tokens = rows.offsets[r + 1] - start;
      const int64_t walks = tokens + 1;
      int64_t part = begin <= row_begin ? 0 : (begin - row_begin + walks - 1) / walks;
      for (; part < parts && row_begin + part * walks < end; ++part) {
        const int64_t head = part / strips;
        const int64_t column = part % strips * strip;
        const int64_t in_slot = head * K * V + column;
        DeltaRuleSpan span;
        span.tokens = tokens;
        span.key_dim = K;
        span.columns = std::min(strip, V - column);
        span.q = q + start * args.token_stride + head * K;
        span.k = k + start * args.token_stride + head * K;
        span.v = v + start * args.token_stride + head * V + column;
        span.beta = beta + start * args.token_stride + head;
        span.token_stride = args.token_stride;
        span.scale = args.scale;
        span.base = rows.fresh[r] ? nullptr : args.state.at(rows.base_slot[r]) + in_slot;
        span.work = args.state.at(rows.work_slot[r]) + in_slot;
        span.state_stride = V;
        span.out = args.out + (start * H + head) * V + column;
        span.out_stride = H * V;
        if (kernels.delta_rule(span)) {
          std::atomic_ref<int32_t>(args.nonfinite[r]).store(1, std::memory_order_relaxed);
        }
      }
    }
  };
  context.parallel_for((rows.tokens + rows.rows) * parts,
                       GrainFor(kMinMultiplyAdds, 3 * K * std::min(strip, V)), run);
  return absl::OkStatus();
}

}  // namespace deltanet
