// On the CPU: a range of tokens goes through its heads block by block, so that a head's weights and the few
// tokens around stay in the L1 while its channels are worked through. A token finds its taps in z itself, or
// in the base slot's tail, so that tokens can be cut anywhere; tails follow when all tokens are done, for a
// row's work slot may be its base slot.
#include "model/ops/short_conv.h"

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
// Tokens that go through a head before the next head's turn.
constexpr int64_t kBlock = 16;

absl::Status Check(const ShortConvQkvArgs& args) {
  if (args.heads < 1 || args.key_dim < 1 || args.value_dim < 1) {
    return absl::InvalidArgumentError(absl::StrCat("mixer has ", args.heads, " heads of key size ",
                                                   args.key_dim, " and value size ", args.value_dim,
                                                   ", want each at least 1"));
  }
  if (args.taps < 0 || args.taps > kMaxShortConvTaps) {
    return absl::InvalidArgumentError(
        absl::StrCat("short convolution has ", args.taps, " taps, want 0 to ", kMaxShortConvTaps));
  }
  const int64_t qkv = args.heads * (2 * args.key_dim + args.value_dim);
  const int64_t z_width = qkv + (args.has_beta ? args.heads : 0), out_width = qkv + args.heads;
  if (args.z_stride < z_width) {
    return absl::InvalidArgumentError(
        absl::StrCat("mixer's z_stride is ", args.z_stride, ", want at least ", z_width));
  }
  if (args.out_stride < out_width) {
    return absl::InvalidArgumentError(
        absl::StrCat("mixer's out_stride is ", args.out_stride, ", want at least ", out_width));
  }
  return absl::OkStatus();
}

SpanActivation ActivationOf(QkActivation activation) {
  switch (activation) {
    case QkActivation::kSilu:
      return SpanActivation::kSilu;
    case QkActivation::kRelu:
      return SpanActivation::kRelu;
    case QkActivation::kEluPlusOne:
      return SpanActivation::kEluPlusOne;
    case QkActivation::kIdentity:
      break;
  }
  return SpanActivation::kIdentity;
}

// Tokens [begin, end) of row r.
void RunTokens(const RaggedRows& rows, const ShortConvQkvArgs& args, int64_t r, int64_t begin, int64_t end) {
  const CpuKernels& kernels = ActiveCpuKernels();
  const int64_t qk = 2 * args.heads * args.key_dim, qkv = qk + args.heads * args.value_dim;
  const float* const z = static_cast<const float*>(args.z) + begin * args.z_stride;
  float* const out = static_cast<float*>(args.out) + begin * args.out_stride;
  const float* const tail = args.taps < 2 || rows.fresh[r] ? nullptr : args.tail.at(rows.base_slot[r]);
  for (int64_t channel = 0; channel < qkv;) {
    const bool is_value = channel >= qk;
    ShortConvSpan span;
    span.tokens = end - begin;
    span.before = begin - rows.offsets[r];
    span.channels = is_value ? args.value_dim : args.key_dim;
    span.taps = args.taps;
    span.activation = is_value ? SpanActivation::kSilu : ActivationOf(args.activation);
    span.norm = is_value ? SpanNorm::kNone : args.norm == QkNorm::kL2 ? SpanNorm::kL2 : SpanNorm::kSum;
    span.z = z + channel;
    span.z_stride = args.z_stride;
    span.weight = args.taps > 0 ? args.weight + channel : nullptr;
    span.bias = args.taps > 0 && args.bias != nullptr ? args.bias + channel : nullptr;
    span.tail = tail != nullptr ? tail + channel : nullptr;
    span.width = qkv;
    span.out = out + channel;
    span.out_stride = args.out_stride;
    kernels.short_conv(span);
    channel += span.channels;
  }
  for (int64_t t = 0; t < end - begin; ++t) {
    float* const beta = out + t * args.out_stride + qkv;
    if (args.has_beta) {
      kernels.scaled_sigmoid(args.heads, args.beta_scale, z + t * args.z_stride + qkv, beta);
    } else {
      std::fill_n(beta, args.heads, args.beta_scale);
    }
  }
}

// The last taps - 1 inputs of row r, which may be some of those before it.
void KeepTail(const RaggedRows& rows, const ShortConvQkvArgs& args, int64_t r) {
  if (rows.work_slot[r] < 0) return;
  const int64_t qkv = args.heads * (2 * args.key_dim + args.value_dim), kept = args.taps - 1;
  const int64_t bytes = qkv * static_cast<int64_t>(sizeof(float));
  const int64_t start = rows.offsets[r], tokens = rows.offsets[r + 1] - start;
  float* const to = args.tail.at(rows.work_slot[r]);
  // Ascending: with one slot for both, inputs move to where older ones were.
  for (int64_t i = 0; i < kept; ++i) {
    const int64_t from = tokens - kept + i;  // In the row.
    if (from >= 0) {
      std::memcpy(to + i * qkv, static_cast<const float*>(args.z) + (start + from) * args.z_stride, bytes);
    } else if (rows.fresh[r]) {
      std::memset(to + i * qkv, 0, bytes);
    } else {
      std::memmove(to + i * qkv, args.tail.at(rows.base_slot[r]) + (kept + from) * qkv, bytes);
    }
  }
}

}  // namespace

absl::Status ShortConvQkv(const RaggedRows& rows, const ShortConvQkvArgs& args, const OpContext& context) {
  RETURN_IF_ERROR(Check(args));
  RETURN_IF_ERROR(CheckKernels(context, {args.dtype}));
  CUDA_DOOR(ShortConvQkvCuda(rows, args, context.stream));
  const int64_t qkv = args.heads * (2 * args.key_dim + args.value_dim);
  context.parallel_for(rows.tokens, GrainFor(kMinElements, qkv), [&](int64_t begin, int64_t end) {
    for (int64_t r = RowOfToken(rows, begin); begin < end; ++r) {
      const int64_t row_end = std::min<int64_t>(end, rows.offsets[r + 1]);
      for (; begin < row_end; begin = std::min(row_end, begin + kBlock)) {
        RunTokens(rows, args, r, begin, std::min(row_end, begin + kBlock));
      }
    }
  });
  if (args.taps < 2) return absl::OkStatus();
  context.parallel_for(rows.rows, GrainFor(kMinElements, (args.taps - 1) * qkv),
                       [&](int64_t begin, int64_t end) {
                         for (int64_t r = begin; r < end; ++r) KeepTail(rows, args, r);
                       });
  return absl::OkStatus();
}

}  // namespace deltanet
