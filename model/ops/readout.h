// What is made of a language model's logits where nobody wants the logits themselves: the log-probability of
// a given id, the most likely ids, a sampled id.
//
// With p = softmax(logits):
//   score    log p(target)
//   top      the `top` most likely ids with their log p, most likely first; of equals the lower id first
//   sample   temperature 0: the first of `top 1`. Else from p_T = softmax(logits / temperature), restricted
//            to the top_k most likely ids (0: all) and of these, renormalized, to the shortest prefix whose
//            probabilities sum to at least top_p (the most likely one at least), renormalized again: the
//            first id, in the order of ids, whose cumulative probability exceeds u; log p (not p_T) is
//            reported.
//
// u in [0, 1) is the first word of Philox4x32-10 (Salmon et al., 2011) with key `seed` and counter `counter`,
// times 2^-32 (words: philox.h): the random stream of a session is a function of its seed and the token's
// position alone.
//
// A row that asks for nothing is not read. A row with a logit that is NaN or infinite has no probabilities:
// every log p that it asks for is NaN, and every id, though it means nothing, is in [0, W).
#ifndef DELTANET_MODEL_OPS_READOUT_H_
#define DELTANET_MODEL_OPS_READOUT_H_

#include <cstdint>

#include "absl/status/status.h"
#include "model/ops/rows.h"

namespace deltanet {

// Of ReadoutRequest::top.
inline constexpr int32_t kMaxTopTokens = 64;
// Of ReadoutArgs::vocabulary.
inline constexpr int64_t kMaxReadoutVocabulary = int64_t{1} << 23;

// One a row of logits.
struct ReadoutRequest {
  int32_t target = -1;        // Id to be scored; -1: none, an id is sampled if `sample`.
  int32_t top = 0;            // 0 ... kMaxTopTokens
  int32_t sample = 0;         // 1: sample an id. Ignored where there is a target.
  int32_t sampled_slot = -1;  // Slot in whose ReadoutArgs::sampled the sampled id is left too; -1: none.
  float temperature = 0.0f;   // At least 0, finite; from 0 to 1e-37 all are about 1e-37.
  int32_t top_k = 0;          // 0: all.
  float top_p = 1.0f;         // In (0, 1]; 1: all.
  int32_t unused = 0;
  uint64_t seed = 0;
  int64_t counter = 0;  // Position of the token that is sampled.
};

struct ReadoutArgs {
  int64_t rows = 0;               // M
  int64_t vocabulary = 0;         // W: 1 ... kMaxReadoutVocabulary
  const float* logits = nullptr;  // [M, W] at a row stride of logits_stride.
  int64_t logits_stride = 0;
  const ReadoutRequest* requests = nullptr;  // [M], on the step's device.
  SlotView sampled;                          // One int32 a slot (in the place of a float).
  int32_t* ids = nullptr;      // [M] The sampled id, else the target; -1 if neither was asked for.
  float* log_probs = nullptr;  // [M] Its log p; 0 if none. NaN if a logit is NaN or infinite, unless nothing
                               // is asked for (then 0), so also where only `top` is.
  int32_t* top_ids = nullptr;  // [M, kMaxTopTokens]; the first `top` are written: those beyond W with -1.
  float* top_log_probs = nullptr;  // Likewise; 0 beyond W.
};

// Reads the logits a few times. On the CPU, rows in parallel. INVALID_ARGUMENT on sizes or device; requests
// are checked by the caller. A row's results depend on its own logits and request alone, bit for bit.
absl::Status Readout(const ReadoutArgs& args, const OpContext& context);

// The u above.
double ReadoutUniform(uint64_t seed, int64_t counter);

}  // namespace deltanet

#endif  // DELTANET_MODEL_OPS_READOUT_H_
