#include "server/request_validation.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "model/base/status_macros.h"
#include "proto/wire.h"

namespace deltanet {
namespace {

constexpr size_t kMaxRequestIdBytes = 128;
constexpr size_t kMaxSessionIdBytes = 128;

// The name of a dtype that a client sent, or its number where we know none.
std::string ProtoDTypeName(v1::DataType dtype) {
  const std::string name = v1::DataType_Name(dtype);
  return name.empty() ? absl::StrCat(static_cast<int>(dtype)) : name;
}

// Only the first sizes: a hostile shape can have millions.
std::string ShapeOf(const v1::Tensor& tensor) {
  constexpr int kShown = 8;
  const auto& shape = tensor.shape();
  if (shape.size() <= kShown) return absl::StrCat("[", absl::StrJoin(shape, ","), "]");
  return absl::StrCat("[", absl::StrJoin(shape.begin(), shape.begin() + kShown, ","), ",...] (", shape.size(),
                      " sizes)");
}

std::string WantedShape(const ModelDescription& model, Sequence sequence) {
  const std::string one = model.takes_tokens ? "[T]" : absl::StrCat("[T,", model.input_width, "]");
  if (sequence != Sequence::kStateless) return one;
  return absl::StrCat(one, " or ",
                      model.takes_tokens ? "[B,T]" : absl::StrCat("[B,T,", model.input_width, "]"));
}

// a * b, or nothing if it overflows; both are at least 0.
std::optional<int64_t> Multiply(int64_t a, int64_t b) {
  int64_t product = 0;
  if (__builtin_mul_overflow(a, b, &product)) return std::nullopt;
  return product;
}

absl::StatusOr<DType> CheckInputDType(v1::DataType dtype, const ModelDescription& model) {
  const absl::StatusOr<DType> parsed = FromProtoDType(dtype);
  if (parsed.ok() && (*parsed == DType::kInt64) == model.takes_tokens) return *parsed;
  return InvalidRequest(absl::StrCat(
      "input.dtype is ", ProtoDTypeName(dtype), ", want ",
      model.takes_tokens ? "DATA_TYPE_INT64" : "DATA_TYPE_FLOAT32, DATA_TYPE_FLOAT16 or DATA_TYPE_BFLOAT16"));
}

absl::StatusOr<DType> CheckOutputDType(v1::DataType dtype) {
  if (dtype == v1::DATA_TYPE_UNSPECIFIED) return DType::kFloat32;
  const absl::StatusOr<DType> parsed = FromProtoDType(dtype);
  if (parsed.ok() && *parsed != DType::kInt64) return *parsed;
  return InvalidRequest(absl::StrCat("output_dtype is ", ProtoDTypeName(dtype),
                                     ", want DATA_TYPE_FLOAT32, DATA_TYPE_FLOAT16 or DATA_TYPE_BFLOAT16"));
}

absl::Status IdOutOfRange(absl::string_view field, size_t number, int64_t id, int64_t vocab_size) {
  return InvalidRequest(absl::StrCat(field, " number ", number, " is ", id, ", want 0 to ", vocab_size - 1));
}

absl::Status CheckInputIds(const std::string& data, int64_t vocab_size) {
  const size_t count = data.size() / sizeof(int64_t);
  for (size_t i = 0; i < count; ++i) {
    int64_t id = 0;
    std::memcpy(&id, data.data() + i * sizeof(id), sizeof(id));  // May be unaligned.
    if (id < 0 || id >= vocab_size) return IdOutOfRange("input id", i, id, vocab_size);
  }
  return absl::OkStatus();
}

// The name of an output kind that a client sent, or its number where we know none.
std::string ProtoKindName(v1::OutputKind kind) {
  const std::string name = v1::OutputKind_Name(kind);
  return name.empty() ? absl::StrCat(static_cast<int>(kind)) : name;
}

// Fills what `options` ask for.
absl::Status CheckOutputOptions(const v1::OutputOptions& options, const ModelDescription& model,
                                CheckedInput* checked) {
  const std::string kind = ProtoKindName(options.kind());
  switch (options.kind()) {
    case v1::OUTPUT_UNSPECIFIED:
    case v1::OUTPUT_VALUES:
      break;
    case v1::OUTPUT_TOP:
      checked->readout = ReadoutKind::kTop;
      break;
    case v1::OUTPUT_SCORES:
      checked->readout = ReadoutKind::kScore;
      break;
    default:
      return InvalidRequest(
          absl::StrCat("output_options.kind is ", kind, ", want OUTPUT_VALUES, OUTPUT_TOP or OUTPUT_SCORES"));
  }
  const bool values = checked->readout == ReadoutKind::kValues;
  if (!values) RETURN_IF_ERROR(CheckGenerates(model, absl::StrCat("give ", kind)));
  if (options.last_only()) {
    if (checked->readout == ReadoutKind::kScore) {
      return InvalidRequest("output_options.last_only is true with OUTPUT_SCORES, want false");
    }
    if (model.lookahead > 0) {
      return InvalidRequest("output_options.last_only is true for a model with look-ahead, want false");
    }
  }
  const int64_t most = values ? 0 : std::min<int64_t>(kMaxTop, model.vocab_size);
  const int64_t least = checked->readout == ReadoutKind::kTop ? 1 : 0;
  if (options.top_tokens() < least || options.top_tokens() > most) {
    return InvalidRequest(absl::StrCat("output_options.top_tokens is ", options.top_tokens(), ", want ",
                                       least, " to ", most,
                                       values ? " without OUTPUT_TOP or OUTPUT_SCORES" : ""));
  }
  checked->last_only = options.last_only();
  checked->top = options.top_tokens();
  return absl::OkStatus();
}

// Of the response to what has been checked: how many rows, and their bytes, of each sequence. Nothing if that
// overflows.
std::optional<int64_t> ResponseBytes(const CheckedInput& checked, const ModelDescription& model) {
  constexpr int64_t kIdBytes = 5, kLogProbBytes = 4;  // Ids below 2^35 travel in at most 5 bytes.
  const int64_t row_bytes = checked.readout == ReadoutKind::kValues
                                ? model.output_width * DTypeBytes(checked.output_dtype)
                                : checked.top * (kIdBytes + kLogProbBytes) +
                                      (checked.readout == ReadoutKind::kScore ? kLogProbBytes : 0);
  const std::optional<int64_t> sequence_bytes = Multiply(checked.output_rows, row_bytes);
  return sequence_bytes ? Multiply(*sequence_bytes, checked.batch) : std::nullopt;
}

absl::Status ResponseTooLarge(const CheckedInput& checked, const ModelDescription& model,
                              std::optional<int64_t> bytes, int64_t limit) {
  const std::string rows = absl::StrCat(checked.batch, " x ", checked.output_rows);
  const std::string what =
      checked.readout == ReadoutKind::kValues
          ? absl::StrCat(rows, " x ", model.output_width, " values of ", DTypeName(checked.output_dtype))
          : absl::StrCat(checked.readout == ReadoutKind::kTop ? "the " : "scores and the ", checked.top,
                         " most likely ids of ", rows, " tokens");
  const bool could_ask_less = checked.readout == ReadoutKind::kValues && model.generates;
  return MakeError(
      absl::StatusCode::kResourceExhausted, reason::kResponseTooLarge,
      absl::StrCat("the output would be ", what, ", ", bytes ? absl::StrCat(*bytes) : "over 2^63",
                   " bytes, want at most ", limit, " bytes: send fewer tokens at a time, or ask for ",
                   checked.readout == ReadoutKind::kValues ? "a smaller dtype" : "fewer top_tokens",
                   could_ask_less ? ", last_only, OUTPUT_TOP or OUTPUT_SCORES" : ""));
}

}  // namespace

absl::Status InvalidRequest(absl::string_view message) {
  return MakeError(absl::StatusCode::kInvalidArgument, reason::kInvalidRequest, message);
}

absl::Status CheckGenerates(const ModelDescription& model, absl::string_view what) {
  if (model.generates) return absl::OkStatus();
  return MakeError(absl::StatusCode::kFailedPrecondition, reason::kNotGenerative,
                   absl::StrCat("the model cannot ", what, ": it ",
                                model.takes_tokens
                                    ? absl::StrCat("has a look-ahead of ", model.lookahead, " tokens, want 0")
                                    : "is one over values, want one over tokens"));
}

absl::StatusOr<CheckedInput> CheckInput(const v1::Tensor& input, v1::DataType output_dtype,
                                        const v1::OutputOptions& options, Sequence sequence,
                                        const ModelDescription& model, const RequestLimits& limits) {
  CheckedInput checked;
  ASSIGN_OR_RETURN(checked.output_dtype, CheckOutputDType(output_dtype));
  RETURN_IF_ERROR(CheckOutputOptions(options, model, &checked));

  const bool absent =
      input.shape_size() == 0 && input.data().empty() && input.dtype() == v1::DATA_TYPE_UNSPECIFIED;
  if (absent && sequence == Sequence::kLastChunk) {
    checked.dtype = model.takes_tokens ? DType::kInt64 : DType::kFloat32;
  } else {
    if (absent) return InvalidRequest(absl::StrCat("input is not set, want ", WantedShape(model, sequence)));
    ASSIGN_OR_RETURN(checked.dtype, CheckInputDType(input.dtype(), model));
    const int rank = model.takes_tokens ? 1 : 2;
    checked.batched = sequence == Sequence::kStateless && input.shape_size() == rank + 1;
    if (input.shape_size() != rank + (checked.batched ? 1 : 0) ||
        (!model.takes_tokens && input.shape(input.shape_size() - 1) != model.input_width)) {
      return InvalidRequest(
          absl::StrCat("input.shape is ", ShapeOf(input), ", want ", WantedShape(model, sequence)));
    }
    checked.batch = checked.batched ? input.shape(0) : 1;
    checked.tokens = input.shape(checked.batched ? 1 : 0);
    const int64_t least_tokens = sequence == Sequence::kLastChunk ? 0 : 1;
    if (checked.batch < 1 || checked.tokens < least_tokens) {
      return InvalidRequest(absl::StrCat("input.shape is ", ShapeOf(input), ", want sizes of at least ",
                                         least_tokens, " token", checked.batched ? " and 1 sequence" : ""));
    }
    if (checked.batch > limits.max_sequences) {
      return InvalidRequest(absl::StrCat("input.shape is ", ShapeOf(input), ", want at most ",
                                         limits.max_sequences, " sequences in a request"));
    }
    const std::optional<int64_t> tokens = Multiply(checked.batch, checked.tokens);
    if (!tokens || *tokens > limits.max_tokens) {
      return InvalidRequest(absl::StrCat("input.shape is ", ShapeOf(input), ", want at most ",
                                         limits.max_tokens, " tokens in a request"));
    }
    const std::optional<int64_t> bytes = Multiply(*tokens, model.input_width * DTypeBytes(checked.dtype));
    if (!bytes || *bytes != static_cast<int64_t>(input.data().size())) {
      return InvalidRequest(absl::StrCat("input.data has ", input.data().size(), " bytes, want ",
                                         bytes ? absl::StrCat(*bytes) : "more than there are", " for shape ",
                                         ShapeOf(input), " of ", DTypeName(checked.dtype)));
    }
    checked.sequence_bytes = *bytes / checked.batch;
    if (model.takes_tokens) {
      RETURN_IF_ERROR(CheckInputIds(input.data(), model.vocab_size));
    } else if (!AllFinite(input.data().data(), checked.dtype, *tokens * model.input_width)) {
      return InvalidRequest("input has a value that is infinite or NaN, want finite values");
    }
  }

  if (checked.tokens == 0) {  // Only what the look-ahead holds back, which then there is: values.
    checked.last_only = false;
    checked.readout = ReadoutKind::kValues;
    checked.top = 0;
  }
  checked.output_rows = checked.tokens + (sequence == Sequence::kLastChunk ? model.lookahead : 0);
  if (checked.last_only) checked.output_rows = 1;
  // The first id of a sequence is not scored. (Nor is that of a session; only its lane knows.)
  if (checked.readout == ReadoutKind::kScore && sequence == Sequence::kStateless) --checked.output_rows;
  const std::optional<int64_t> bytes = ResponseBytes(checked, model);
  if (!bytes || *bytes > limits.max_response_bytes) {
    return ResponseTooLarge(checked, model, bytes, limits.max_response_bytes);
  }
  if (checked.readout == ReadoutKind::kValues) checked.output_bytes = *bytes / checked.batch;
  checked.response_bytes = *bytes;
  return checked;
}

absl::StatusOr<CheckedGeneration> CheckGeneration(const v1::GenerateRequest& request,
                                                  const ModelDescription& model,
                                                  const RequestLimits& limits) {
  constexpr int kMaxStops = 16;
  constexpr size_t kMaxStopBytes = 256;
  CheckedGeneration checked;
  const v1::Sampling& sampling = request.sampling();
  if (!std::isfinite(sampling.temperature()) || sampling.temperature() < 0) {
    return InvalidRequest(
        absl::StrCat("sampling.temperature is ", sampling.temperature(), ", want a finite number from 0 on"));
  }
  if (sampling.top_k() < 0) {
    return InvalidRequest(absl::StrCat("sampling.top_k is ", sampling.top_k(), ", want at least 0"));
  }
  if (!(sampling.top_p() >= 0 && sampling.top_p() <= 1)) {
    return InvalidRequest(absl::StrCat("sampling.top_p is ", sampling.top_p(), ", want 0 to 1"));
  }
  checked.sampling.temperature = sampling.temperature();
  checked.sampling.top_k = sampling.top_k();
  checked.sampling.top_p = sampling.top_p() == 0 ? 1 : sampling.top_p();
  checked.sampling.seed = sampling.seed();
  if (request.max_tokens() < 0 || request.max_tokens() > limits.max_generated_tokens) {
    return InvalidRequest(
        absl::StrCat("max_tokens is ", request.max_tokens(), ", want 0 to ", limits.max_generated_tokens));
  }
  checked.max_tokens = request.max_tokens() == 0 ? limits.default_generated_tokens : request.max_tokens();
  RETURN_IF_ERROR(CheckIds("stop_ids", request.stop_ids(), model.vocab_size));
  if (request.stop_size() > kMaxStops) {
    return InvalidRequest(
        absl::StrCat("stop has ", request.stop_size(), " strings, want at most ", kMaxStops));
  }
  for (const std::string& stop : request.stop()) {
    if (stop.empty() || stop.size() > kMaxStopBytes) {
      return InvalidRequest(
          absl::StrCat("stop has a string of ", stop.size(), " bytes, want 1 to ", kMaxStopBytes));
    }
  }
  const int64_t most = std::min<int64_t>(kMaxTop, model.vocab_size);
  if (request.has_top_log_probs() && (request.top_log_probs() < 0 || request.top_log_probs() > most)) {
    return InvalidRequest(absl::StrCat("top_log_probs is ", request.top_log_probs(), ", want 0 to ", most));
  }
  checked.log_probs = request.has_top_log_probs();
  checked.top = request.top_log_probs();
  return checked;
}

absl::Status CheckIds(absl::string_view field, absl::Span<const int64_t> ids, int64_t vocab_size) {
  for (size_t i = 0; i < ids.size(); ++i) {
    if (ids[i] < 0 || ids[i] >= vocab_size) return IdOutOfRange(field, i, ids[i], vocab_size);
  }
  return absl::OkStatus();
}

absl::Status CheckText(const std::string& text, const RequestLimits& limits) {
  if (static_cast<int64_t>(text.size()) <= limits.max_text_bytes) return absl::OkStatus();
  return InvalidRequest(
      absl::StrCat("text has ", text.size(), " bytes, want at most ", limits.max_text_bytes));
}

absl::Status CheckRequestId(const std::string& request_id) {
  if (request_id.size() <= kMaxRequestIdBytes) return absl::OkStatus();
  return InvalidRequest(
      absl::StrCat("request_id has ", request_id.size(), " bytes, want at most ", kMaxRequestIdBytes));
}

absl::Status CheckSessionRef(const v1::SessionRef& session) {
  const std::string& id = session.id();
  if (id.size() > kMaxSessionIdBytes || (id.empty() && !session.create())) {
    return InvalidRequest(absl::StrCat("session.id has ", id.size(), " characters, want 1 to ",
                                       kMaxSessionIdBytes, " (or none with create)"));
  }
  for (const char c : id) {
    if (!absl::ascii_isalnum(c) && !absl::StrContains("._:-", c)) {
      return InvalidRequest("session.id has a character that is not one of A-Z a-z 0-9 . _ : -");
    }
  }
  if (!session.has_idle_ttl()) return absl::OkStatus();
  if (!session.create())
    return InvalidRequest("session.idle_ttl is set without session.create, want both or neither");
  const absl::StatusOr<absl::Duration> ttl = FromProtoDuration(session.idle_ttl());
  if (!ttl.ok() || *ttl <= absl::ZeroDuration()) {
    return InvalidRequest(absl::StrCat("session.idle_ttl is ",
                                       ttl.ok() ? absl::FormatDuration(*ttl) : "no valid duration",
                                       ", want more than 0"));
  }
  return absl::OkStatus();
}

absl::Duration IdleTtl(const v1::SessionRef& session) {
  if (!session.has_idle_ttl()) return absl::ZeroDuration();
  return FromProtoDuration(session.idle_ttl()).value_or(absl::ZeroDuration());
}

absl::StatusOr<absl::Time> CheckTimeout(const google::protobuf::Duration& timeout, absl::Time arrival) {
  const absl::StatusOr<absl::Duration> duration = FromProtoDuration(timeout);
  if (!duration.ok() || *duration <= absl::ZeroDuration()) {
    return InvalidRequest(absl::StrCat("timeout is ",
                                       duration.ok() ? absl::FormatDuration(*duration) : "no valid duration",
                                       ", want more than 0"));
  }
  return arrival + *duration;
}

absl::Status CheckExpectedPosition(int64_t expected_position) {
  if (expected_position >= 0) return absl::OkStatus();
  return InvalidRequest(absl::StrCat("expected_position is ", expected_position, ", want at least 0"));
}

}  // namespace deltanet
