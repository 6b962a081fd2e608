// Is a request good, before anything is computed for it? Every error is INVALID_ARGUMENT (INVALID_REQUEST) or
// RESOURCE_EXHAUSTED (RESPONSE_TOO_LARGE), and its message names the field, the value found and the value
// wanted.
//
// All functions are thread-safe: they touch only what they are given.
#ifndef DELTANET_SERVER_REQUEST_VALIDATION_H_
#define DELTANET_SERVER_REQUEST_VALIDATION_H_

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "deltanet/v1/deltanet.pb.h"
#include "model/model.h"

namespace deltanet {

// INVALID_ARGUMENT with the reason INVALID_REQUEST.
absl::Status InvalidRequest(absl::string_view message);

struct RequestLimits {
  int64_t max_tokens = 0;                // Of one request, all its sequences together.
  int64_t max_sequences = 0;             // Of one request.
  int64_t max_response_bytes = 0;        // Of a response's output.
  int64_t max_text_bytes = 0;            // Of a text to be tokenized.
  int64_t max_generated_tokens = 0;      // Of one Generate.
  int64_t default_generated_tokens = 0;  // Where a Generate does not say how many.
};

// What a request's tensor is, once it has been found good.
struct CheckedInput {
  DType dtype = DType::kFloat32;
  bool batched = false;        // It had a batch dimension.
  int64_t batch = 1;           // B: sequences.
  int64_t tokens = 0;          // T: of each sequence.
  int64_t sequence_bytes = 0;  // Of input, for each.
  DType output_dtype = DType::kFloat32;
  ReadoutKind readout = ReadoutKind::kValues;
  bool last_only = false;      // kValues, kTop: of the last token, of which there is at least one.
  int top = 0;                 // kTop, kScore: ids for each token.
  int64_t output_rows = 0;     // For each sequence, the most that it can give: values, or readouts.
  int64_t output_bytes = 0;    // kValues: for each sequence, those rows.
  int64_t response_bytes = 0;  // What all of it weighs in the response, at most.
};

// How the tokens are meant.
enum class Sequence {
  kStateless,  // [T, ...] or [B, T, ...], whole sequences.
  kChunk,      // [T, ...] of a session, and there may be more.
  kLastChunk,  // [T, ...] of a session; T may be 0 and the tensor absent. Gives what the look-ahead held
               // back, too.
};

// Checks dtypes, rank, sizes, the number of bytes, that values are finite and ids in range, what is asked for
// of the outputs, and both limits. Also FAILED_PRECONDITION (NOT_GENERATIVE) where that takes a model that
// generates.
absl::StatusOr<CheckedInput> CheckInput(const v1::Tensor& input, v1::DataType output_dtype,
                                        const v1::OutputOptions& options, Sequence sequence,
                                        const ModelDescription& model, const RequestLimits& limits);

// FAILED_PRECONDITION (NOT_GENERATIVE) unless the model generates; `what` cannot be done then.
absl::Status CheckGenerates(const ModelDescription& model, absl::string_view what);

// What a Generate asks for beside its prompt and its session, once it has been found good.
struct CheckedGeneration {
  Sampling sampling;  // The seed is 0 where it is not set.
  int64_t max_tokens = 0;
  bool log_probs = false;
  int top = 0;
};

// Checks sampling, counts, stop ids and stop strings against their bounds and the model. Whether
// there is a tokenizer is not looked at.
absl::StatusOr<CheckedGeneration> CheckGeneration(const v1::GenerateRequest& request,
                                                  const ModelDescription& model, const RequestLimits& limits);

// That each id is in range. `field` is what they are called.
absl::Status CheckIds(absl::string_view field, absl::Span<const int64_t> ids, int64_t vocab_size);

// At most limits.max_text_bytes.
absl::Status CheckText(const std::string& text, const RequestLimits& limits);

// At most 128 bytes.
absl::Status CheckRequestId(const std::string& request_id);

// Characters and length of an id (empty is good with `create`), and that idle_ttl, which must be a valid
// duration above zero, comes with `create` alone. Its bound is the session store's to check.
absl::Status CheckSessionRef(const v1::SessionRef& session);

// The session's time-to-live; zero where it is not set. Only after CheckSessionRef.
absl::Duration IdleTtl(const v1::SessionRef& session);

// When a message that arrived at `arrival` is to be given up. INVALID_ARGUMENT unless `timeout` is a valid
// duration above zero.
absl::StatusOr<absl::Time> CheckTimeout(const google::protobuf::Duration& timeout, absl::Time arrival);

// Not negative.
absl::Status CheckExpectedPosition(int64_t expected_position);

}  // namespace deltanet

#endif  // DELTANET_SERVER_REQUEST_VALIDATION_H_
