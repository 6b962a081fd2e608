// What a `delta_net` layer does between its projections and o_proj, as one operator: the short convolutions
// (short_conv.h), the delta rule (delta_rule.h), then RMSNorm and gate of each head (output_norm.h).
//
// Called by the engine on the batch thread, once a layer and step.
#ifndef DELTANET_MODEL_OPS_DELTA_NET_MIXER_H_
#define DELTANET_MODEL_OPS_DELTA_NET_MIXER_H_

#include "absl/status/status.h"
#include "model/ops/delta_rule.h"
#include "model/ops/output_norm.h"
#include "model/ops/rows.h"
#include "model/ops/short_conv.h"

namespace deltanet {

// The three operators' arguments, as if they were called in turn: `conv` makes what `rule` takes (rule.q is
// conv.out, and so on), and `rule` makes what `norm` takes.
struct DeltaNetMixerArgs {
  ShortConvQkvArgs conv;
  DeltaRuleArgs rule;
  OutputNormArgs norm;
};

// Fills norm.out, and the work slots' tails and states. conv.out and rule.out are workspace: what they hold
// afterwards is not defined. On a GPU, rows of a few tokens (kDeltaRuleFewTokens) go through one kernel that
// keeps what is between in registers, where there is one for the sizes: by the row alone, so that its bits do
// not depend on what else is in the step; it reads base slots while the operator before it on the stream may
// still run, so between what wrote them and this something has to begin with all before it done, as a step
// does (Embed). Errors as of the three.
absl::Status DeltaNetMixer(const RaggedRows& rows, const DeltaNetMixerArgs& args, const OpContext& context);

}  // namespace deltanet

#endif  // DELTANET_MODEL_OPS_DELTA_NET_MIXER_H_
