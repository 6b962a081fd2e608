#include "proto/wire.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <limits>
#include <string>

#include "google/rpc/error_details.pb.h"

namespace deltanet {
namespace {

using ::testing::EndsWith;
using ::testing::HasSubstr;

const absl::StatusCode kErrorCodes[] = {
    absl::StatusCode::kCancelled,          absl::StatusCode::kUnknown,
    absl::StatusCode::kInvalidArgument,    absl::StatusCode::kDeadlineExceeded,
    absl::StatusCode::kNotFound,           absl::StatusCode::kAlreadyExists,
    absl::StatusCode::kPermissionDenied,   absl::StatusCode::kResourceExhausted,
    absl::StatusCode::kFailedPrecondition, absl::StatusCode::kAborted,
    absl::StatusCode::kOutOfRange,         absl::StatusCode::kUnimplemented,
    absl::StatusCode::kInternal,           absl::StatusCode::kUnavailable,
    absl::StatusCode::kDataLoss,           absl::StatusCode::kUnauthenticated,
};

TEST(WireErrorTest, MakeErrorCarriesReasonDomainAndMetadata) {
  const absl::Status status = MakeError(absl::StatusCode::kNotFound, reason::kSessionExpired,
                                        "session 'a' expired", {{"committed_position", "12"}});
  EXPECT_EQ(status.code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(status.message(), "session 'a' expired");
  EXPECT_EQ(ErrorReason(status), "SESSION_EXPIRED");
  EXPECT_EQ(ErrorMetadata(status, "committed_position"), "12");
  EXPECT_EQ(ErrorMetadata(status, "other"), "");

  // What a client in another language sees.
  const google::rpc::Status rpc = ToRpcStatus(status);
  ASSERT_EQ(rpc.details_size(), 1);
  google::rpc::ErrorInfo info;
  ASSERT_TRUE(rpc.details(0).UnpackTo(&info));
  EXPECT_EQ(info.reason(), "SESSION_EXPIRED");
  EXPECT_EQ(info.domain(), "deltanet");
}

TEST(WireErrorTest, StatusWithoutErrorInfoHasNoReason) {
  EXPECT_EQ(ErrorReason(absl::OkStatus()), "");
  EXPECT_EQ(ErrorReason(absl::InternalError("x")), "");
  EXPECT_EQ(ErrorMetadata(absl::InternalError("x"), "key"), "");
}

TEST(WireErrorTest, MetadataIsAddedToWhatIsThere) {
  absl::Status status = MakeError(absl::StatusCode::kAborted, reason::kSessionAttached, "m", {{"a", "1"}});
  status = WithErrorMetadata(status, "b", "2");
  status = WithErrorMetadata(status, "a", "3");
  EXPECT_EQ(ErrorReason(status), "SESSION_ATTACHED");
  EXPECT_EQ(ErrorMetadata(status, "a"), "3");
  EXPECT_EQ(ErrorMetadata(status, "b"), "2");
  EXPECT_EQ(ToRpcStatus(status).details_size(), 1);
}

TEST(WireErrorTest, MetadataOnAPlainStatusTakesTheCodeAsReason) {
  const absl::Status status = WithErrorMetadata(absl::ResourceExhaustedError("m"), "a", "1");
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(status.message(), "m");
  EXPECT_EQ(ErrorReason(status), "RESOURCE_EXHAUSTED");
  EXPECT_EQ(ErrorMetadata(status, "a"), "1");
  EXPECT_TRUE(WithErrorMetadata(absl::OkStatus(), "a", "1").ok());
}

TEST(WireStatusTest, EveryCodeSurvivesBothWays) {
  for (const absl::StatusCode code : kErrorCodes) {
    const absl::Status plain(code, "plain");
    const absl::Status rich = MakeError(code, reason::kInternal, "rich", {{"k", "v"}});
    for (const absl::Status& status : {plain, rich}) {
      EXPECT_EQ(FromRpcStatus(ToRpcStatus(status)), status);
      EXPECT_EQ(FromGrpcStatus(ToGrpcStatus(status)), status);
    }
    EXPECT_EQ(static_cast<int>(ToGrpcStatus(plain).error_code()), static_cast<int>(code));
  }
}

TEST(WireStatusTest, OkIsOk) {
  EXPECT_TRUE(FromRpcStatus(ToRpcStatus(absl::OkStatus())).ok());
  EXPECT_TRUE(ToGrpcStatus(absl::OkStatus()).ok());
  EXPECT_TRUE(FromGrpcStatus(grpc::Status::OK).ok());
}

TEST(WireStatusTest, UnknownCodesBecomeUnknown) {
  google::rpc::Status rpc;
  rpc.set_message("from the future");
  for (const int code : {-1, 17, 1000}) {
    rpc.set_code(code);
    EXPECT_EQ(FromRpcStatus(rpc), absl::UnknownError("from the future"));
  }
  for (const int code : {-1, 17}) {  // 1000 is beyond what gRPC's enum can hold.
    EXPECT_EQ(FromGrpcStatus(grpc::Status(static_cast<grpc::StatusCode>(code), "from the future")),
              absl::UnknownError("from the future"));
  }
}

TEST(WireStatusTest, OtherDetailsAreKept) {
  google::rpc::Status rpc;
  rpc.set_code(static_cast<int>(absl::StatusCode::kUnavailable));
  google::protobuf::Any* detail = rpc.add_details();
  detail->set_type_url("type.googleapis.com/google.rpc.RetryInfo");
  detail->set_value(std::string("\x0a\x02\x08\x05", 4));
  const google::rpc::Status back = ToRpcStatus(FromGrpcStatus(ToGrpcStatus(FromRpcStatus(rpc))));
  ASSERT_EQ(back.details_size(), 1);
  EXPECT_EQ(back.details(0).type_url(), detail->type_url());
  EXPECT_EQ(back.details(0).value(), detail->value());
}

TEST(WireStatusTest, DetailsThatDoNotParseLeaveCodeAndMessage) {
  const absl::Status status =
      FromGrpcStatus(grpc::Status(grpc::StatusCode::UNAVAILABLE, "m", "\xff\xff garbage"));
  EXPECT_EQ(status, absl::UnavailableError("m"));
}

TEST(WireStatusTest, LongMessagesAreCutBetweenCharacters) {
  std::string message = "x";
  for (int i = 0; i < 5000; ++i) message += "\u20ac";  // Three bytes each: the cut would fall within one.
  const grpc::Status status =
      ToGrpcStatus(MakeError(absl::StatusCode::kInternal, reason::kInternal, message));
  EXPECT_LE(status.error_message().size(), 1024u);
  EXPECT_GE(status.error_message().size(), 1020u);
  EXPECT_THAT(status.error_message(), EndsWith("\u20ac..."));
  EXPECT_LE(status.error_details().size(), 1500u);
  EXPECT_EQ(ErrorReason(FromGrpcStatus(status)), "INTERNAL");
}

TEST(WireDTypeTest, RoundTrips) {
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16, DType::kInt64}) {
    const absl::StatusOr<DType> back = FromProtoDType(ToProtoDType(dtype));
    ASSERT_TRUE(back.ok());
    EXPECT_EQ(*back, dtype);
  }
  EXPECT_EQ(ToProtoDType(DType::kFloat64), v1::DATA_TYPE_UNSPECIFIED);
}

TEST(WireDTypeTest, RefusesWhatIsNoDType) {
  for (const int number : {0, -1, 5, 77}) {
    const absl::StatusOr<DType> dtype = FromProtoDType(static_cast<v1::DataType>(number));
    EXPECT_EQ(dtype.status().code(), absl::StatusCode::kInvalidArgument);
    EXPECT_EQ(ErrorReason(dtype.status()), "INVALID_REQUEST");
    EXPECT_THAT(std::string(dtype.status().message()), HasSubstr(std::to_string(number)));
  }
}

TEST(WireDurationTest, RoundTrips) {
  const absl::Duration durations[] = {absl::ZeroDuration(),           absl::Nanoseconds(1),
                                      -absl::Nanoseconds(1),          absl::Milliseconds(1500),
                                      -absl::Milliseconds(1500),      absl::Seconds(315'576'000'000),
                                      -absl::Seconds(315'576'000'000)};
  for (const absl::Duration duration : durations) {
    google::protobuf::Duration proto;
    ToProtoDuration(duration, &proto);
    const absl::StatusOr<absl::Duration> back = FromProtoDuration(proto);
    ASSERT_TRUE(back.ok()) << back.status();
    EXPECT_EQ(*back, duration);
  }
}

TEST(WireDurationTest, RoundsTowardsZero) {
  google::protobuf::Duration proto;
  ToProtoDuration(absl::Nanoseconds(7) / 4, &proto);
  EXPECT_EQ(proto.nanos(), 1);
  ToProtoDuration(-absl::Nanoseconds(7) / 4, &proto);
  EXPECT_EQ(proto.nanos(), -1);
}

TEST(WireDurationTest, ClampsWhatTheProtoCannotSay) {
  google::protobuf::Duration proto;
  ToProtoDuration(absl::InfiniteDuration(), &proto);
  EXPECT_EQ(proto.seconds(), 315'576'000'000);
  EXPECT_TRUE(FromProtoDuration(proto).ok());
  ToProtoDuration(-absl::InfiniteDuration(), &proto);
  EXPECT_EQ(proto.seconds(), -315'576'000'000);
  EXPECT_TRUE(FromProtoDuration(proto).ok());
}

TEST(WireDurationTest, RefusesWhatTheProtoForbids) {
  struct Case {
    int64_t seconds;
    int32_t nanos;
  };
  const Case cases[] = {{315'576'000'001, 0},
                        {-315'576'000'001, 0},
                        {std::numeric_limits<int64_t>::max(), 0},
                        {std::numeric_limits<int64_t>::min(), 0},
                        {0, 1'000'000'000},
                        {0, -1'000'000'000},
                        {0, std::numeric_limits<int32_t>::min()},
                        {1, -1},
                        {-1, 1}};
  for (const Case& c : cases) {
    google::protobuf::Duration proto;
    proto.set_seconds(c.seconds);
    proto.set_nanos(c.nanos);
    const absl::StatusOr<absl::Duration> duration = FromProtoDuration(proto);
    EXPECT_EQ(duration.status().code(), absl::StatusCode::kInvalidArgument) << c.seconds << " " << c.nanos;
    EXPECT_EQ(ErrorReason(duration.status()), "INVALID_REQUEST");
  }
}

}  // namespace
}  // namespace deltanet
