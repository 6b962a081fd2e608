#include "proto/wire.h"

#include <cstdint>
#include <optional>
#include <utility>

#include "absl/strings/cord.h"
#include "absl/strings/str_cat.h"
#include "google/rpc/error_details.pb.h"

namespace deltanet {
namespace {

constexpr char kTypePrefix[] = "type.googleapis.com/";

// A status travels twice in HTTP/2 trailers (percent-encoded, and in the details), which peers bound to 8 KiB
// in all.
constexpr size_t kMaxGrpcMessageBytes = 1024;

// The limits of google.protobuf.Duration: 10,000 years.
constexpr int64_t kMaxDurationSeconds = 315'576'000'000;
constexpr int32_t kMaxDurationNanos = 999'999'999;

const std::string& ErrorInfoUrl() {
  static const std::string& url =
      *new std::string(absl::StrCat(kTypePrefix, google::rpc::ErrorInfo::descriptor()->full_name()));
  return url;
}

std::optional<google::rpc::ErrorInfo> GetErrorInfo(const absl::Status& status) {
  const absl::optional<absl::Cord> payload = status.GetPayload(ErrorInfoUrl());
  google::rpc::ErrorInfo info;
  if (!payload || !info.ParseFromString(std::string(*payload))) return std::nullopt;
  return info;
}

void SetErrorInfo(const google::rpc::ErrorInfo& info, absl::Status* status) {
  status->SetPayload(ErrorInfoUrl(), absl::Cord(info.SerializeAsString()));
}

// At most `limit` bytes of `message`, cut between UTF-8 characters: a protobuf string must stay valid.
std::string Shorten(absl::string_view message, size_t limit) {
  if (message.size() <= limit) return std::string(message);
  size_t end = limit - 3;
  while (end > 0 && (static_cast<unsigned char>(message[end]) & 0xC0) == 0x80) --end;
  return absl::StrCat(message.substr(0, end), "...");
}

// gRPC, google.rpc and absl number the codes alike.
absl::StatusCode ToAbslCode(int code) {
  if (code < 0 || code > static_cast<int>(absl::StatusCode::kUnauthenticated)) {
    return absl::StatusCode::kUnknown;
  }
  return static_cast<absl::StatusCode>(code);
}

void SetPayloads(const google::rpc::Status& from, absl::Status* to) {
  for (const google::protobuf::Any& detail : from.details()) {
    to->SetPayload(detail.type_url(), absl::Cord(detail.value()));
  }
}

}  // namespace

absl::Status MakeError(absl::StatusCode code, absl::string_view reason, absl::string_view message,
                       const std::map<std::string, std::string>& metadata) {
  absl::Status status(code, message);
  google::rpc::ErrorInfo info;
  info.set_reason(std::string(reason));
  info.set_domain(kErrorDomain);
  info.mutable_metadata()->insert(metadata.begin(), metadata.end());
  SetErrorInfo(info, &status);
  return status;
}

absl::Status WithErrorMetadata(const absl::Status& status, const std::string& key, const std::string& value) {
  if (status.ok()) return status;
  std::optional<google::rpc::ErrorInfo> info = GetErrorInfo(status);
  if (!info) {
    info.emplace();
    info->set_reason(absl::StatusCodeToString(status.code()));
    info->set_domain(kErrorDomain);
  }
  (*info->mutable_metadata())[key] = value;
  absl::Status result = status;
  SetErrorInfo(*info, &result);
  return result;
}

std::string ErrorReason(const absl::Status& status) {
  const std::optional<google::rpc::ErrorInfo> info = GetErrorInfo(status);
  return info ? info->reason() : "";
}

std::string ErrorMetadata(const absl::Status& status, const std::string& key) {
  const std::optional<google::rpc::ErrorInfo> info = GetErrorInfo(status);
  if (!info) return "";
  const auto entry = info->metadata().find(key);
  return entry == info->metadata().end() ? "" : entry->second;
}

google::rpc::Status ToRpcStatus(const absl::Status& status) {
  google::rpc::Status result;
  result.set_code(static_cast<int>(status.code()));
  result.set_message(std::string(status.message()));
  status.ForEachPayload([&](absl::string_view url, const absl::Cord& payload) {
    google::protobuf::Any* detail = result.add_details();
    detail->set_type_url(std::string(url));
    detail->set_value(std::string(payload));
  });
  return result;
}

absl::Status FromRpcStatus(const google::rpc::Status& status) {
  absl::Status result(ToAbslCode(status.code()), status.message());
  SetPayloads(status, &result);
  return result;
}

grpc::Status ToGrpcStatus(const absl::Status& status) {
  if (status.ok()) return grpc::Status::OK;
  google::rpc::Status rpc = ToRpcStatus(status);
  rpc.set_message(Shorten(rpc.message(), kMaxGrpcMessageBytes));
  const grpc::StatusCode code = static_cast<grpc::StatusCode>(rpc.code());
  if (rpc.details().empty()) return grpc::Status(code, rpc.message());
  return grpc::Status(code, rpc.message(), rpc.SerializeAsString());
}

absl::Status FromGrpcStatus(const grpc::Status& status) {
  absl::Status result(ToAbslCode(status.error_code()), status.error_message());
  google::rpc::Status rpc;
  // Details that do not parse are some proxy's; the code and the message stand without them.
  if (!result.ok() && rpc.ParseFromString(status.error_details())) SetPayloads(rpc, &result);
  return result;
}

absl::StatusOr<DType> FromProtoDType(v1::DataType dtype) {
  switch (dtype) {
    case v1::DATA_TYPE_FLOAT32:
      return DType::kFloat32;
    case v1::DATA_TYPE_FLOAT16:
      return DType::kFloat16;
    case v1::DATA_TYPE_BFLOAT16:
      return DType::kBFloat16;
    case v1::DATA_TYPE_INT64:
      return DType::kInt64;
    default:
      return MakeError(absl::StatusCode::kInvalidArgument, reason::kInvalidRequest,
                       absl::StrCat("dtype is ", static_cast<int>(dtype),
                                    ", want FLOAT32 (1), FLOAT16 (2), BFLOAT16 (3) or INT64 (4)"));
  }
}

v1::DataType ToProtoDType(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return v1::DATA_TYPE_FLOAT32;
    case DType::kFloat16:
      return v1::DATA_TYPE_FLOAT16;
    case DType::kBFloat16:
      return v1::DATA_TYPE_BFLOAT16;
    case DType::kInt64:
      return v1::DATA_TYPE_INT64;
    case DType::kFloat64:
      break;
  }
  return v1::DATA_TYPE_UNSPECIFIED;
}

void ToProtoDuration(absl::Duration duration, google::protobuf::Duration* proto) {
  const absl::Duration limit = absl::Seconds(kMaxDurationSeconds) + absl::Nanoseconds(kMaxDurationNanos);
  if (duration > limit) duration = limit;
  if (duration < -limit) duration = -limit;
  const int64_t seconds = absl::IDivDuration(duration, absl::Seconds(1), &duration);
  const int64_t nanos = absl::IDivDuration(duration, absl::Nanoseconds(1), &duration);
  proto->set_seconds(seconds);
  proto->set_nanos(static_cast<int32_t>(nanos));
}

absl::StatusOr<absl::Duration> FromProtoDuration(const google::protobuf::Duration& proto) {
  const int64_t seconds = proto.seconds();
  const int32_t nanos = proto.nanos();
  if (seconds < -kMaxDurationSeconds || seconds > kMaxDurationSeconds) {
    return MakeError(absl::StatusCode::kInvalidArgument, reason::kInvalidRequest,
                     absl::StrCat("duration has ", seconds, " seconds, want at most ", kMaxDurationSeconds,
                                  " either way"));
  }
  if (nanos < -kMaxDurationNanos || nanos > kMaxDurationNanos) {
    return MakeError(absl::StatusCode::kInvalidArgument, reason::kInvalidRequest,
                     absl::StrCat("duration has ", nanos, " nanoseconds, want at most ", kMaxDurationNanos,
                                  " either way"));
  }
  if ((seconds < 0 && nanos > 0) || (seconds > 0 && nanos < 0)) {
    return MakeError(absl::StatusCode::kInvalidArgument, reason::kInvalidRequest,
                     absl::StrCat("duration has ", seconds, " seconds and ", nanos,
                                  " nanoseconds, want the same sign in both"));
  }
  return absl::Seconds(seconds) + absl::Nanoseconds(nanos);
}

}  // namespace deltanet
