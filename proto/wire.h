// The one hand-written translation that client and server share: statuses, dtypes, durations.
#ifndef DELTANET_PROTO_WIRE_H_
#define DELTANET_PROTO_WIRE_H_

#include <map>
#include <string>

#include <grpcpp/support/status.h>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "deltanet/v1/deltanet.pb.h"
#include "google/rpc/status.pb.h"
#include "model/base/tensor_view.h"

namespace deltanet {

// Reasons in google.rpc.ErrorInfo; deltanet.proto says which code each goes with. Clients may switch on them.
namespace reason {
inline constexpr char kInvalidRequest[] = "INVALID_REQUEST";
inline constexpr char kModelNotFound[] = "MODEL_NOT_FOUND";
inline constexpr char kSessionNotFound[] = "SESSION_NOT_FOUND";
inline constexpr char kSessionExpired[] = "SESSION_EXPIRED";
inline constexpr char kSessionEnded[] = "SESSION_ENDED";
inline constexpr char kSessionExists[] = "SESSION_EXISTS";
inline constexpr char kSessionAttached[] = "SESSION_ATTACHED";
inline constexpr char kSessionOutOfStep[] = "SESSION_OUT_OF_STEP";
inline constexpr char kPositionMismatch[] = "POSITION_MISMATCH";
inline constexpr char kSessionModel[] = "SESSION_MODEL";
inline constexpr char kNotGenerative[] = "NOT_GENERATIVE";
inline constexpr char kNoTokenizer[] = "NO_TOKENIZER";
inline constexpr char kSessionsFull[] = "SESSIONS_FULL";
inline constexpr char kResponseTooLarge[] = "RESPONSE_TOO_LARGE";
inline constexpr char kQueueFull[] = "QUEUE_FULL";
inline constexpr char kDraining[] = "DRAINING";
inline constexpr char kDeadline[] = "DEADLINE";
inline constexpr char kCancelled[] = "CANCELLED";
inline constexpr char kNonFinite[] = "NON_FINITE";
inline constexpr char kInternal[] = "INTERNAL";
}  // namespace reason

inline constexpr char kErrorDomain[] = "deltanet";

// A status that carries an ErrorInfo {reason, domain "deltanet", metadata} as its payload.
absl::Status MakeError(absl::StatusCode code, absl::string_view reason, absl::string_view message,
                       const std::map<std::string, std::string>& metadata = {});
// The same status with one more entry in its ErrorInfo's metadata (an ErrorInfo is added where there is none, with the
// code's own name as reason). OK stays OK.
absl::Status WithErrorMetadata(const absl::Status& status, const std::string& key, const std::string& value);
// The reason of a status's ErrorInfo, or "" where it has none.
std::string ErrorReason(const absl::Status& status);
// A value of its ErrorInfo's metadata, or "".
std::string ErrorMetadata(const absl::Status& status, const std::string& key);

// absl::Status <-> google.rpc.Status <-> grpc::Status, with details kept both ways. A code that has no name becomes
// UNKNOWN. ToGrpcStatus cuts messages over 1 KiB: they travel in trailers, which are bounded to 8 KiB.
google::rpc::Status ToRpcStatus(const absl::Status& status);
absl::Status FromRpcStatus(const google::rpc::Status& status);
grpc::Status ToGrpcStatus(const absl::Status& status);
absl::Status FromGrpcStatus(const grpc::Status& status);

// DATA_TYPE_UNSPECIFIED and unknown numbers are INVALID_ARGUMENT.
absl::StatusOr<DType> FromProtoDType(v1::DataType dtype);
// DATA_TYPE_UNSPECIFIED for float64, which does not travel.
v1::DataType ToProtoDType(DType dtype);

// Rounds to a nanosecond, towards zero; what is out of the proto's range (10,000 years) becomes its limit.
void ToProtoDuration(absl::Duration duration, google::protobuf::Duration* proto);
// INVALID_ARGUMENT if out of the range that the proto allows.
absl::StatusOr<absl::Duration> FromProtoDuration(const google::protobuf::Duration& proto);

}  // namespace deltanet

#endif  // DELTANET_PROTO_WIRE_H_
