#include "model/ops/conv_qkv.h"

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

bool IsValid(const RaggedRows& rows, int64_t r, int64_t position) {
  return 0 <= position && position < rows.end[r];
}

// Gives input `i` of row r (raw, or null where its position is invalid) to the taps of tokens i, i+1 and i+2
// and to the centre of token i+1, as far as the row has these. i is -2 and -1 for the inputs of the tail.
class Scatter {
 public:
  Scatter(const CpuKernels& kernels, const GatherTapsArgs& args, int64_t row_start, int64_t row_tokens)
      : kernels_(kernels), args_(args), start_(row_start), tokens_(row_tokens) {}

  void operator()(int64_t i, const float* raw) const {
    const int64_t d = args_.width;
    const float* seen = raw;  // What the taps get; the first that was written is copied to the others.
    for (int64_t tap = kConvTaps - 1; tap >= 0; --tap) {
      const int64_t token = i + kConvTaps - 1 - tap;
      if (token < 0 || token >= tokens_) continue;
      float* const to = static_cast<float*>(args_.taps) + ((start_ + token) * kConvTaps + tap) * d;
      if (raw == nullptr) {
        std::memset(to, 0, d * sizeof(float));
      } else if (args_.norm_scale != nullptr && seen == raw) {
        kernels_.add_rms_norm(d, kEpsilon.after, kEpsilon.inside, raw, nullptr, nullptr,
                              args_.norm_scale, to);
        seen = to;
      } else {
        std::memcpy(to, seen, d * sizeof(float));
      }
    }
    if (args_.centre != nullptr && 0 <= i + 1 && i + 1 < tokens_)
      Keep(raw, args_.centre + (start_ + i + 1) * d);
  }

  // Copies an input; zero where it is invalid, so that the memory is defined.
  void Keep(const float* raw, float* to) const {
    if (raw != nullptr) {
      std::memmove(to, raw, args_.width * sizeof(float));
    } else {
      std::memset(to, 0, args_.width * sizeof(float));
    }
  }

 private:
  static constexpr RmsEpsilon kEpsilon{};  // As the README families have it.

  const CpuKernels& kernels_;
  const GatherTapsArgs& args_;
  const int64_t start_;
  const int64_t tokens_;
};

}  // namespace

absl::Status GatherTaps(const RaggedRows& rows, const GatherTapsArgs& args, const OpContext& context) {
  if (args.width < 1 || args.lag < 0) {
    return absl::InvalidArgumentError(absl::StrCat("convolution taps have width ", args.width, " and lag ",
                                                   args.lag, ", want at least 1 and 0"));
  }
  RETURN_IF_ERROR(CheckKernels(context, {args.dtype}));
  CUDA_DOOR(GatherTapsCuda(rows, args, context.stream));
  if (rows.rows == 0) return absl::OkStatus();
  constexpr int64_t kTail = kConvTaps - 1;
  const CpuKernels& kernels = ActiveCpuKernels();
  const int64_t d = args.width;

  // A row's first unit reads its base tail and writes its work tail, each further unit hands one input on
  // (dispatch.h). Each tap has one source, so units can run in any order; x is never written.
  const auto run = [&](int64_t begin, int64_t end) {
    for (int64_t r = RowOfUnit(rows, begin); r < rows.rows && FirstUnit(rows, r) < end; ++r) {
      const int64_t unit = FirstUnit(rows, r);
      const int64_t start = rows.offsets[r];
      const int64_t tokens = rows.offsets[r + 1] - start;
      const int64_t position = rows.position[r] - args.lag;  // Of input 0.
      const Scatter scatter(kernels, args, start, tokens);
      const float* const tail = rows.fresh[r] ? nullptr : args.tail.at(rows.base_slot[r]);
      const auto raw = [&](int64_t i) -> const float* {
        if (!IsValid(rows, r, position + i)) return nullptr;
        if (i >= 0) return args.x + (start + i) * d;
        return tail != nullptr ? tail + (kTail + i) * d : nullptr;
      };
      if (begin <= unit) {
        for (int64_t i = -kTail; i < 0; ++i) scatter(i, raw(i));
        if (rows.work_slot[r] >= 0) {
          float* const new_tail = args.tail.at(rows.work_slot[r]);
          // Ascending: with one slot for both, and one token, the newer input moves to where the older was.
          for (int64_t i = 0; i < kTail; ++i) scatter.Keep(raw(tokens - kTail + i), new_tail + i * d);
        }
      }
      const int64_t last = std::min(tokens, end - unit - 1);
      for (int64_t i = std::max<int64_t>(0, begin - unit - 1); i < last; ++i) scatter(i, raw(i));
    }
  };
  const int64_t written = kConvTaps + (args.centre != nullptr ? 1 : 0);
  context.parallel_for(rows.tokens + rows.rows, GrainFor(kMinElements, d * written), run);
  return absl::OkStatus();
}

absl::Status ConvQkvActivation(const RaggedRows& rows, const ConvQkvActivationArgs& args,
                               const OpContext& context) {
  if (args.heads < 1 || args.key_dim < 1 || args.value_dim < 1) {
    return absl::InvalidArgumentError(absl::StrCat("mixer has ", args.heads, " heads of key size ",
                                                   args.key_dim, " and value size ", args.value_dim,
                                                   ", want each at least 1"));
  }
  if (args.lag < 0 || args.centre_tap < 0 || args.centre_tap >= kConvTaps) {
    return absl::InvalidArgumentError(absl::StrCat("mixer has lag ", args.lag, " and centre tap ",
                                                   args.centre_tap, ", want at least 0 and one of 0 to ",
                                                   kConvTaps - 1));
  }
  const int64_t qkv = args.heads * (2 * args.key_dim + args.value_dim);
  const int64_t width = qkv + args.heads;
  if (args.z_stride < width) {
    return absl::InvalidArgumentError(
        absl::StrCat("mixer's z_stride is ", args.z_stride, ", want at least ", width));
  }
  RETURN_IF_ERROR(CheckKernels(context, {args.dtype}));
  CUDA_DOOR(ConvQkvActivationCuda(rows, args, context.stream));
  if (rows.tokens == 0) return absl::OkStatus();
  const CpuKernels& kernels = ActiveCpuKernels();
  const auto run = [&](int64_t begin, int64_t end) {
    for (int64_t r = RowOfToken(rows, begin); begin < end; ++r) {
      const int64_t row_end = std::min<int64_t>(end, rows.offsets[r + 1]);
      const int64_t position =
          rows.position[r] - args.lag - (kConvTaps - 1) - rows.offsets[r];  // Oldest tap, n = 0.
      // Bit j: tap j of token n is valid.
      const auto valid_taps = [&](int64_t n) {
        int taps = 0;
        for (int64_t j = 0; j < kConvTaps; ++j) taps |= IsValid(rows, r, position + n + j) << j;
        return taps;
      };
      while (begin < row_end) {
        const int taps = valid_taps(begin);
        QkvSpan span;
        span.tokens = 1;
        while (begin + span.tokens < row_end && valid_taps(begin + span.tokens) == taps) ++span.tokens;
        span.heads = args.heads;
        span.key_dim = args.key_dim;
        span.value_dim = args.value_dim;
        span.silu = args.activation == QkvActivation::kSilu;
        span.z = static_cast<float*>(args.z) + begin * args.z_stride;
        span.z_stride = args.z_stride;
        span.bias = args.bias;
        for (int64_t j = 0; j < kConvTaps; ++j) {
          span.tap_bias[j] = taps >> j & 1 ? nullptr : args.tap_bias + j * qkv;
        }
        span.has_position = taps >> args.centre_tap & 1;
        kernels.qkv_activation(span);
        begin += span.tokens;
      }
    }
  };
  context.parallel_for(rows.tokens, GrainFor(kMinElements, width), run);
  return absl::OkStatus();
}

}  // namespace deltanet
