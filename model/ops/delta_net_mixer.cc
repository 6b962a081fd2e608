#include "model/ops/delta_net_mixer.h"

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "model/base/status_macros.h"
#include "model/ops/cuda_kernels.h"
#include "model/ops/delta_rule_cuda.h"

namespace deltanet {
namespace {

absl::Status Validate(const DeltaNetMixerArgs& args) {
  const ShortConvQkvArgs& conv = args.conv;
  const DeltaRuleArgs& rule = args.rule;
  const OutputNormArgs& norm = args.norm;
  if (rule.heads != conv.heads || rule.key_dim != conv.key_dim || rule.value_dim != conv.value_dim ||
      norm.groups * norm.width != rule.heads * rule.value_dim || rule.dtype != conv.dtype ||
      norm.dtype != conv.dtype) {
    return absl::InvalidArgumentError(absl::StrCat(
        "mixer's convolution has ", conv.heads, " heads of ", conv.key_dim, " and ", conv.value_dim, " in ",
        DTypeName(conv.dtype), ", its delta rule ", rule.heads, " of ", rule.key_dim, " and ", rule.value_dim,
        " in ", DTypeName(rule.dtype), ", its norm ", norm.groups, " groups of ", norm.width, " in ",
        DTypeName(norm.dtype), ", want the same"));
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status DeltaNetMixer(const RaggedRows& rows, const DeltaNetMixerArgs& args, const OpContext& context) {
  RETURN_IF_ERROR(Validate(args));
  bool steps = false;
#ifdef DELTANET_CUDA
  steps = context.device.type == DeviceType::kCuda && rows.shortest <= kDeltaRuleFewTokens &&
          DeltaNetStepCudaTakes(args);
#endif
  if (!steps || rows.longest > kDeltaRuleFewTokens) {
    ShortConvQkvArgs conv = args.conv;
    DeltaRuleArgs rule = args.rule;
    if (steps) conv.longer_than = rule.longer_than = kDeltaRuleFewTokens;
    RETURN_IF_ERROR(ShortConvQkv(rows, conv, context));
    RETURN_IF_ERROR(DeltaRule(rows, rule, context));
    RETURN_IF_ERROR(OutputNorm(args.norm, context));
  }
#ifdef DELTANET_CUDA
  // After the norm, which has run over all tokens.
  if (steps) return DeltaNetStepCuda(rows, args, context.stream);
#endif
  return absl::OkStatus();
}

}  // namespace deltanet
