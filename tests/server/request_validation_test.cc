#include "server/request_validation.h"

#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "proto/wire.h"

namespace deltanet {
namespace {

using ::testing::HasSubstr;

constexpr RequestLimits kLimits = {.max_tokens = 1000, .max_sequences = 50, .max_response_bytes = 100000};

ModelDescription ValuesModel() {
  ModelDescription model;
  model.input_width = 4;
  model.output_width = 5;
  model.lookahead = 2;
  return model;
}

ModelDescription IdsModel() {
  ModelDescription model;
  model.takes_tokens = true;
  model.output_width = 10;
  model.vocab_size = 10;
  return model;
}

template <typename T>
v1::Tensor MakeTensor(v1::DataType dtype, const std::vector<int64_t>& shape, const std::vector<T>& values) {
  v1::Tensor tensor;
  tensor.set_dtype(dtype);
  for (const int64_t size : shape) tensor.add_shape(size);
  tensor.mutable_data()->assign(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T));
  return tensor;
}

v1::Tensor Values(const std::vector<int64_t>& shape, size_t count) {
  return MakeTensor(v1::DATA_TYPE_FLOAT32, shape, std::vector<float>(count, 0.5f));
}

TEST(CheckInput, GoodOnes) {
  auto checked =
      CheckInput(Values({3, 4}, 12), v1::DATA_TYPE_UNSPECIFIED, Sequence::kChunk, ValuesModel(), kLimits);
  ASSERT_TRUE(checked.ok()) << checked.status();
  EXPECT_FALSE(checked->batched);
  EXPECT_EQ(checked->batch, 1);
  EXPECT_EQ(checked->tokens, 3);
  EXPECT_EQ(checked->sequence_bytes, 48);
  EXPECT_EQ(checked->output_dtype, DType::kFloat32);
  EXPECT_EQ(checked->output_rows, 3);
  EXPECT_EQ(checked->output_bytes, 60);

  checked =
      CheckInput(Values({2, 3, 4}, 24), v1::DATA_TYPE_BFLOAT16, Sequence::kStateless, ValuesModel(), kLimits);
  ASSERT_TRUE(checked.ok()) << checked.status();
  EXPECT_TRUE(checked->batched);
  EXPECT_EQ(checked->batch, 2);
  EXPECT_EQ(checked->sequence_bytes, 48);
  EXPECT_EQ(checked->output_bytes, 30);

  checked = CheckInput(MakeTensor<int64_t>(v1::DATA_TYPE_INT64, {3}, {0, 9, 5}), v1::DATA_TYPE_FLOAT32,
                       Sequence::kChunk, IdsModel(), kLimits);
  ASSERT_TRUE(checked.ok()) << checked.status();
  EXPECT_EQ(checked->dtype, DType::kInt64);
}

TEST(CheckInput, TheLastChunkMayBeEmptyOrAbsent) {
  for (const v1::Tensor& input : {v1::Tensor(), Values({0, 4}, 0)}) {
    const auto checked =
        CheckInput(input, v1::DATA_TYPE_UNSPECIFIED, Sequence::kLastChunk, ValuesModel(), kLimits);
    ASSERT_TRUE(checked.ok()) << checked.status();
    EXPECT_EQ(checked->tokens, 0);
    EXPECT_EQ(checked->output_rows, 2) << "what the look-ahead held back";
    EXPECT_FALSE(CheckInput(input, v1::DATA_TYPE_UNSPECIFIED, Sequence::kChunk, ValuesModel(), kLimits).ok());
  }
}

struct Bad {
  v1::Tensor input;
  v1::DataType output_dtype;
  Sequence sequence;
  bool ids;
  const char* message;
  absl::StatusCode code = absl::StatusCode::kInvalidArgument;
};

class CheckInputErrors : public ::testing::TestWithParam<Bad> {};

TEST_P(CheckInputErrors, NameFieldFoundAndWanted) {
  const Bad& bad = GetParam();
  const auto checked =
      CheckInput(bad.input, bad.output_dtype, bad.sequence, bad.ids ? IdsModel() : ValuesModel(), kLimits);
  EXPECT_EQ(checked.status().code(), bad.code);
  EXPECT_THAT(std::string(checked.status().message()), HasSubstr(bad.message));
}

constexpr v1::DataType kFloat = v1::DATA_TYPE_FLOAT32;
constexpr int64_t kHuge = int64_t{1} << 62;

INSTANTIATE_TEST_SUITE_P(
    Cases, CheckInputErrors,
    ::testing::Values(
        Bad{v1::Tensor(), kFloat, Sequence::kChunk, false, "input is not set, want [T,4]"},
        Bad{v1::Tensor(), kFloat, Sequence::kStateless, true, "input is not set, want [T] or [B,T]"},
        Bad{MakeTensor<float>(v1::DATA_TYPE_UNSPECIFIED, {1, 4}, {0, 0, 0, 0}), kFloat, Sequence::kChunk,
            false, "input.dtype is DATA_TYPE_UNSPECIFIED, want DATA_TYPE_FLOAT32"},
        Bad{MakeTensor<float>(static_cast<v1::DataType>(99), {1, 4}, {0, 0, 0, 0}), kFloat, Sequence::kChunk,
            false, "input.dtype is 99, want"},
        Bad{Values({1}, 1), kFloat, Sequence::kChunk, true,
            "input.dtype is DATA_TYPE_FLOAT32, want DATA_TYPE_INT64"},
        Bad{Values({1, 4}, 4), v1::DATA_TYPE_INT64, Sequence::kChunk, false,
            "output_dtype is DATA_TYPE_INT64"},
        Bad{Values({}, 1), kFloat, Sequence::kChunk, false, "input.shape is [], want [T,4]"},
        Bad{Values({4}, 4), kFloat, Sequence::kChunk, false, "input.shape is [4], want [T,4]"},
        Bad{Values({1, 5}, 5), kFloat, Sequence::kChunk, false, "input.shape is [1,5]"},
        Bad{Values({1, 1, 4}, 4), kFloat, Sequence::kChunk, false, "input.shape is [1,1,4], want [T,4]"},
        Bad{Values({1, 1, 1, 4}, 4), kFloat, Sequence::kStateless, false, "want [T,4] or [B,T,4]"},
        Bad{Values(std::vector<int64_t>(100, 1), 1), kFloat, Sequence::kStateless, false,
            ",...] (100 sizes)"},
        Bad{Values({0, 4}, 0), kFloat, Sequence::kStateless, false, "at least 1 token"},
        Bad{Values({0, 1, 4}, 0), kFloat, Sequence::kStateless, false, "1 sequence"},
        Bad{Values({-1, 4}, 0), kFloat, Sequence::kLastChunk, false, "at least 0 token"},
        Bad{Values({1001, 4}, 4004), kFloat, Sequence::kChunk, false, "want at most 1000 tokens"},
        Bad{Values({2, kHuge, 4}, 0), kFloat, Sequence::kStateless, false, "want at most 1000 tokens"},
        Bad{Values({51, 1, 4}, 204), kFloat, Sequence::kStateless, false, "want at most 50 sequences"},
        Bad{Values({2, 4}, 7), kFloat, Sequence::kChunk, false, "input.data has 28 bytes, want 32"},
        Bad{MakeTensor<float>(kFloat, {1, 4}, {0, 0, INFINITY, 0}), kFloat, Sequence::kChunk, false,
            "infinite or NaN"},
        Bad{MakeTensor<uint16_t>(v1::DATA_TYPE_FLOAT16, {1, 4}, {0, 0x7C00, 0, 0}), kFloat, Sequence::kChunk,
            false, "infinite or NaN"},
        Bad{MakeTensor<uint16_t>(v1::DATA_TYPE_BFLOAT16, {1, 4}, {0, 0, 0, 0xFFC0}), kFloat, Sequence::kChunk,
            false, "infinite or NaN"},
        Bad{MakeTensor<int64_t>(v1::DATA_TYPE_INT64, {2}, {1, 10}), kFloat, Sequence::kChunk, true,
            "input id number 1 is 10, want 0 to 9"},
        Bad{MakeTensor<int64_t>(v1::DATA_TYPE_INT64, {2}, {-1, 0}), kFloat, Sequence::kChunk, true,
            "input id number 0 is -1"}));

TEST(CheckInput, TheResponseIsWeighedBeforeItIsComputed) {
  ModelDescription model = ValuesModel();
  model.output_width = 25000;  // 100,000 bytes a token: the limit.
  EXPECT_TRUE(CheckInput(Values({1, 4}, 4), kFloat, Sequence::kChunk, model, kLimits).ok());
  const auto two = CheckInput(Values({2, 4}, 8), kFloat, Sequence::kChunk, model, kLimits);
  EXPECT_EQ(two.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(ErrorReason(two.status()), reason::kResponseTooLarge);
  EXPECT_TRUE(CheckInput(Values({2, 4}, 8), v1::DATA_TYPE_FLOAT16, Sequence::kChunk, model, kLimits).ok());
  EXPECT_FALSE(CheckInput(Values({1, 4}, 4), kFloat, Sequence::kLastChunk, model, kLimits).ok());
  model.output_width = INT64_MAX / 4;
  EXPECT_FALSE(CheckInput(Values({8, 4}, 32), kFloat, Sequence::kChunk, model, kLimits).ok());
}

TEST(CheckSessionRef, Rules) {
  const auto check = [](const std::string& id, bool create, absl::optional<int64_t> ttl_seconds) {
    v1::SessionRef session;
    session.set_id(id);
    session.set_create(create);
    if (ttl_seconds) session.mutable_idle_ttl()->set_seconds(*ttl_seconds);
    return CheckSessionRef(session);
  };
  EXPECT_TRUE(check("aZ09._:-", false, {}).ok());
  EXPECT_TRUE(check(std::string(128, 'x'), false, {}).ok());
  EXPECT_FALSE(check(std::string(129, 'x'), false, {}).ok());
  EXPECT_TRUE(check("", true, {}).ok());
  EXPECT_FALSE(check("", false, {}).ok());
  for (const std::string& id :
       {std::string("a b"), std::string("a/b"), std::string("a\0b", 3), std::string("\xC3\xA9")}) {
    EXPECT_FALSE(check(id, true, {}).ok()) << id;
  }
  EXPECT_TRUE(check("a", true, 1).ok());
  EXPECT_FALSE(check("a", false, 1).ok()) << "a time-to-live without create";
  EXPECT_FALSE(check("a", true, 0).ok());
  EXPECT_FALSE(check("a", true, -1).ok());
  EXPECT_FALSE(check("a", true, INT64_MAX).ok());
}

TEST(CheckTimeout, IsAboveZero) {
  google::protobuf::Duration timeout;
  EXPECT_FALSE(CheckTimeout(timeout, absl::UnixEpoch()).ok());
  timeout.set_nanos(1);
  EXPECT_EQ(*CheckTimeout(timeout, absl::UnixEpoch()), absl::UnixEpoch() + absl::Nanoseconds(1));
  timeout.set_nanos(-1);
  EXPECT_FALSE(CheckTimeout(timeout, absl::UnixEpoch()).ok());
  timeout.set_nanos(2000000000);
  EXPECT_FALSE(CheckTimeout(timeout, absl::UnixEpoch()).ok());
}

TEST(CheckRequestId, IsBounded) {
  EXPECT_TRUE(CheckRequestId(std::string(128, 'x')).ok());
  EXPECT_FALSE(CheckRequestId(std::string(129, 'x')).ok());
  EXPECT_TRUE(CheckExpectedPosition(0).ok());
  EXPECT_FALSE(CheckExpectedPosition(-1).ok());
}

// A serialized request with bytes changed, removed and added: whatever still parses is good, and then fits
// its bytes, or is refused with one of two codes.
TEST(CheckInput, MutatedRequestsNeverCrash) {
  v1::StreamForwardRequest good;
  good.set_request_id("id");
  good.mutable_session()->set_id("session");
  good.mutable_session()->set_create(true);
  good.mutable_session()->mutable_idle_ttl()->set_seconds(10);
  good.mutable_timeout()->set_seconds(1);
  good.set_expected_position(3);
  *good.mutable_input() = Values({3, 4}, 12);
  v1::StreamForwardRequest good_ids = good;
  *good_ids.mutable_input() = MakeTensor<int64_t>(v1::DATA_TYPE_INT64, {3}, {1, 2, 3});
  const google::protobuf::LogSilencer silencer;  // Ids that are no UTF-8 are many.
  std::mt19937 random(11);
  int accepted = 0, refused = 0;
  for (int i = 0; i < 200000; ++i) {
    const bool ids = random() % 2 == 0;
    std::string bytes = (ids ? good_ids : good).SerializeAsString();
    for (int n = static_cast<int>(random() % 4) + 1; n > 0 && !bytes.empty(); --n) {
      const size_t at = random() % bytes.size();
      switch (random() % 4) {
        case 0:
          bytes[at] = static_cast<char>(random());
          break;
        case 1:
          bytes[at] = static_cast<char>(bytes[at] ^ (1 << random() % 8));
          break;
        case 2:
          bytes.insert(at, 1, static_cast<char>(random()));
          break;
        default:
          bytes.erase(at, 1 + random() % 3);
      }
    }
    v1::StreamForwardRequest request;
    if (!request.ParseFromString(bytes)) continue;
    const ModelDescription model = ids ? IdsModel() : ValuesModel();
    const auto sequence = static_cast<Sequence>(random() % 3);
    const auto checked = CheckInput(request.input(), request.output_dtype(), sequence, model, kLimits);
    if (checked.ok()) {
      ++accepted;
      ASSERT_EQ(checked->batch * checked->sequence_bytes,
                static_cast<int64_t>(request.input().data().size()));
      ASSERT_EQ(checked->sequence_bytes, checked->tokens * model.input_width * DTypeBytes(checked->dtype));
      ASSERT_LE(checked->batch * checked->tokens, kLimits.max_tokens);
      ASSERT_LE(checked->batch * checked->output_bytes, kLimits.max_response_bytes);
    } else {
      ++refused;
      ASSERT_TRUE(checked.status().code() == absl::StatusCode::kInvalidArgument ||
                  checked.status().code() == absl::StatusCode::kResourceExhausted);
      ASSERT_FALSE(ErrorReason(checked.status()).empty());
      ASSERT_LT(checked.status().message().size(), 1000u);
    }
    for (const absl::Status& status :
         {CheckRequestId(request.request_id()), CheckSessionRef(request.session()),
          CheckTimeout(request.timeout(), absl::UnixEpoch()).status(),
          CheckExpectedPosition(request.expected_position())}) {
      ASSERT_TRUE(status.ok() || status.code() == absl::StatusCode::kInvalidArgument) << status;
    }
  }
  EXPECT_GT(accepted, 1000);
  EXPECT_GT(refused, 1000);
}

}  // namespace
}  // namespace deltanet
