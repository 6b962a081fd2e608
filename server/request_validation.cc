#include "server/request_validation.h"

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

absl::Status CheckIds(const std::string& data, int64_t vocab_size) {
  const int64_t count = static_cast<int64_t>(data.size() / sizeof(int64_t));
  for (int64_t i = 0; i < count; ++i) {
    int64_t id = 0;
    std::memcpy(&id, data.data() + i * sizeof(id), sizeof(id));  // May be unaligned.
    if (id < 0 || id >= vocab_size) {
      return InvalidRequest(absl::StrCat("input id number ", i, " is ", id, ", want 0 to ", vocab_size - 1));
    }
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status InvalidRequest(absl::string_view message) {
  return MakeError(absl::StatusCode::kInvalidArgument, reason::kInvalidRequest, message);
}

absl::StatusOr<CheckedInput> CheckInput(const v1::Tensor& input, v1::DataType output_dtype, Sequence sequence,
                                        const ModelDescription& model, const RequestLimits& limits) {
  CheckedInput checked;
  ASSIGN_OR_RETURN(checked.output_dtype, CheckOutputDType(output_dtype));

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
      RETURN_IF_ERROR(CheckIds(input.data(), model.vocab_size));
    } else if (!AllFinite(input.data().data(), checked.dtype, *tokens * model.input_width)) {
      return InvalidRequest("input has a value that is infinite or NaN, want finite values");
    }
  }

  checked.output_rows = checked.tokens + (sequence == Sequence::kLastChunk ? model.lookahead : 0);
  const std::optional<int64_t> sequence_bytes =
      Multiply(checked.output_rows, model.output_width * DTypeBytes(checked.output_dtype));
  const std::optional<int64_t> bytes =
      sequence_bytes ? Multiply(*sequence_bytes, checked.batch) : std::nullopt;
  if (!bytes || *bytes > limits.max_response_bytes) {
    return MakeError(absl::StatusCode::kResourceExhausted, reason::kResponseTooLarge,
                     absl::StrCat("the output would be ", checked.batch, " x ", checked.output_rows, " x ",
                                  model.output_width, " values of ", DTypeName(checked.output_dtype),
                                  ", want at most ", limits.max_response_bytes,
                                  " bytes: send fewer tokens at a time, or ask for a smaller dtype"));
  }
  checked.output_bytes = *sequence_bytes;
  return checked;
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
