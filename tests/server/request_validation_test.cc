#include "server/request_validation.h"

#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "proto/wire.h"

namespace deltanet {
namespace {

using ::testing::HasSubstr;

constexpr RequestLimits kLimits = {.max_tokens = 1000,
                                   .max_sequences = 50,
                                   .max_response_bytes = 100000,
                                   .max_text_bytes = 50,
                                   .max_generated_tokens = 400,
                                   .default_generated_tokens = 30};

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
  model.generates = true;
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
      CheckInput(Values({3, 4}, 12), v1::DATA_TYPE_UNSPECIFIED, {}, Sequence::kChunk, ValuesModel(), kLimits);
  ASSERT_TRUE(checked.ok()) << checked.status();
  EXPECT_FALSE(checked->batched);
  EXPECT_EQ(checked->batch, 1);
  EXPECT_EQ(checked->tokens, 3);
  EXPECT_EQ(checked->sequence_bytes, 48);
  EXPECT_EQ(checked->output_dtype, DType::kFloat32);
  EXPECT_EQ(checked->output_rows, 3);
  EXPECT_EQ(checked->output_bytes, 60);

  checked = CheckInput(Values({2, 3, 4}, 24), v1::DATA_TYPE_BFLOAT16, {}, Sequence::kStateless, ValuesModel(),
                       kLimits);
  ASSERT_TRUE(checked.ok()) << checked.status();
  EXPECT_TRUE(checked->batched);
  EXPECT_EQ(checked->batch, 2);
  EXPECT_EQ(checked->sequence_bytes, 48);
  EXPECT_EQ(checked->output_bytes, 30);

  checked = CheckInput(MakeTensor<int64_t>(v1::DATA_TYPE_INT64, {3}, {0, 9, 5}), v1::DATA_TYPE_FLOAT32, {},
                       Sequence::kChunk, IdsModel(), kLimits);
  ASSERT_TRUE(checked.ok()) << checked.status();
  EXPECT_EQ(checked->dtype, DType::kInt64);
}

TEST(CheckInput, TheLastChunkMayBeEmptyOrAbsent) {
  for (const v1::Tensor& input : {v1::Tensor(), Values({0, 4}, 0)}) {
    const auto checked =
        CheckInput(input, v1::DATA_TYPE_UNSPECIFIED, {}, Sequence::kLastChunk, ValuesModel(), kLimits);
    ASSERT_TRUE(checked.ok()) << checked.status();
    EXPECT_EQ(checked->tokens, 0);
    EXPECT_EQ(checked->output_rows, 2) << "what the look-ahead held back";
    EXPECT_FALSE(
        CheckInput(input, v1::DATA_TYPE_UNSPECIFIED, {}, Sequence::kChunk, ValuesModel(), kLimits).ok());
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
  const auto checked = CheckInput(bad.input, bad.output_dtype, {}, bad.sequence,
                                  bad.ids ? IdsModel() : ValuesModel(), kLimits);
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
  EXPECT_TRUE(CheckInput(Values({1, 4}, 4), kFloat, {}, Sequence::kChunk, model, kLimits).ok());
  const auto two = CheckInput(Values({2, 4}, 8), kFloat, {}, Sequence::kChunk, model, kLimits);
  EXPECT_EQ(two.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(ErrorReason(two.status()), reason::kResponseTooLarge);
  EXPECT_TRUE(
      CheckInput(Values({2, 4}, 8), v1::DATA_TYPE_FLOAT16, {}, Sequence::kChunk, model, kLimits).ok());
  EXPECT_FALSE(CheckInput(Values({1, 4}, 4), kFloat, {}, Sequence::kLastChunk, model, kLimits).ok());
  model.output_width = INT64_MAX / 4;
  EXPECT_FALSE(CheckInput(Values({8, 4}, 32), kFloat, {}, Sequence::kChunk, model, kLimits).ok());
}

v1::OutputOptions Options(v1::OutputKind kind, bool last_only = false, int top_tokens = 0) {
  v1::OutputOptions options;
  options.set_kind(kind);
  options.set_last_only(last_only);
  options.set_top_tokens(top_tokens);
  return options;
}

v1::Tensor Ids(const std::vector<int64_t>& shape, size_t count) {
  return MakeTensor<int64_t>(v1::DATA_TYPE_INT64, shape, std::vector<int64_t>(count, 1));
}

TEST(CheckInput, WhatIsMadeOfTheOutputs) {
  const auto check = [](const v1::OutputOptions& options, Sequence sequence) {
    const bool batch = sequence == Sequence::kStateless;
    const auto checked =
        CheckInput(batch ? Ids({2, 7}, 14) : Ids({7}, 7), kFloat, options, sequence, IdsModel(), kLimits);
    EXPECT_TRUE(checked.ok()) << checked.status();
    return checked.value_or(CheckedInput{});
  };
  CheckedInput checked = check(Options(v1::OUTPUT_VALUES, /*last_only=*/true), Sequence::kStateless);
  EXPECT_TRUE(checked.last_only);
  EXPECT_EQ(checked.output_rows, 1);
  EXPECT_EQ(checked.output_bytes, 10 * 4);
  EXPECT_EQ(checked.response_bytes, 2 * 10 * 4);
  checked = check(Options(v1::OUTPUT_TOP, false, 10), Sequence::kChunk);
  EXPECT_EQ(checked.readout, ReadoutKind::kTop);
  EXPECT_EQ(checked.top, 10);
  EXPECT_EQ(checked.output_rows, 7);
  EXPECT_EQ(checked.response_bytes, 7 * 10 * 9);
  checked = check(Options(v1::OUTPUT_TOP, true, 1), Sequence::kChunk);
  EXPECT_EQ(checked.output_rows, 1);
  checked = check(Options(v1::OUTPUT_SCORES), Sequence::kStateless);
  EXPECT_EQ(checked.readout, ReadoutKind::kScore);
  EXPECT_EQ(checked.output_rows, 6) << "the first id has nothing before it";
  EXPECT_EQ(checked.response_bytes, 2 * 6 * 4);
  checked = check(Options(v1::OUTPUT_SCORES, false, 2), Sequence::kLastChunk);
  EXPECT_EQ(checked.output_rows, 7) << "the session may have something before it";
  EXPECT_EQ(checked.response_bytes, 7 * (4 + 2 * 9));

  const auto empty = CheckInput(v1::Tensor(), kFloat, Options(v1::OUTPUT_TOP, true, 1), Sequence::kLastChunk,
                                IdsModel(), kLimits);
  ASSERT_TRUE(empty.ok()) << empty.status();
  EXPECT_FALSE(empty->last_only);
  EXPECT_EQ(empty->output_rows, 0);
}

TEST(CheckInput, OutputOptionsThatAreRefused) {
  const auto error = [](const v1::OutputOptions& options, const ModelDescription& model) {
    const absl::Status status = CheckInput(model.takes_tokens ? Ids({7}, 7) : Values({7, 4}, 28), kFloat,
                                           options, Sequence::kChunk, model, kLimits)
                                    .status();
    EXPECT_FALSE(status.ok());
    return absl::StrCat(ErrorReason(status), ": ", status.message());
  };
  const ModelDescription ids = IdsModel();
  ModelDescription lagging = ids;
  lagging.generates = false;
  lagging.lookahead = 6;
  EXPECT_EQ(error(Options(v1::OUTPUT_TOP, false, 1), ValuesModel()),
            "NOT_GENERATIVE: the model cannot give OUTPUT_TOP: it is one over values, want one over tokens");
  EXPECT_EQ(error(Options(v1::OUTPUT_SCORES), lagging),
            "NOT_GENERATIVE: the model cannot give OUTPUT_SCORES: it has a look-ahead of 6 tokens, want 0");
  EXPECT_EQ(error(Options(v1::OUTPUT_VALUES, true), lagging),
            "INVALID_REQUEST: output_options.last_only is true for a model with look-ahead, want false");
  EXPECT_EQ(error(Options(v1::OUTPUT_SCORES, true), ids),
            "INVALID_REQUEST: output_options.last_only is true with OUTPUT_SCORES, want false");
  EXPECT_EQ(error(Options(v1::OUTPUT_TOP), ids),
            "INVALID_REQUEST: output_options.top_tokens is 0, want 1 to 10");
  EXPECT_EQ(error(Options(v1::OUTPUT_TOP, false, 11), ids),
            "INVALID_REQUEST: output_options.top_tokens is 11, want 1 to 10");
  EXPECT_EQ(error(Options(v1::OUTPUT_SCORES, false, -1), ids),
            "INVALID_REQUEST: output_options.top_tokens is -1, want 0 to 10");
  EXPECT_THAT(error(Options(v1::OUTPUT_VALUES, false, 3), ids),
              HasSubstr("output_options.top_tokens is 3, want 0 to 0 without"));
  EXPECT_EQ(error(Options(static_cast<v1::OutputKind>(9)), ids),
            "INVALID_REQUEST: output_options.kind is 9, want OUTPUT_VALUES, OUTPUT_TOP or OUTPUT_SCORES");
  ModelDescription wide = ids;
  wide.vocab_size = wide.output_width = 32000;
  EXPECT_EQ(error(Options(v1::OUTPUT_TOP, false, 65), wide),
            "INVALID_REQUEST: output_options.top_tokens is 65, want 1 to 64");
}

TEST(CheckInput, TheResponseIsWeighedByWhatIsAskedFor) {
  ModelDescription model = IdsModel();
  model.vocab_size = model.output_width = 25000;  // 100,000 bytes a token.
  const auto check = [&](int64_t tokens, const v1::OutputOptions& options) {
    return CheckInput(Ids({tokens}, tokens), kFloat, options, Sequence::kChunk, model, kLimits).status();
  };
  const absl::Status values = check(2, {});
  EXPECT_EQ(ErrorReason(values), reason::kResponseTooLarge);
  EXPECT_EQ(
      values.message(),
      "the output would be 1 x 2 x 25000 values of float32, 200000 bytes, want at most 100000 bytes: send "
      "fewer tokens at a time, or ask for a smaller dtype, last_only, OUTPUT_TOP or OUTPUT_SCORES");
  EXPECT_TRUE(check(1000, Options(v1::OUTPUT_VALUES, true)).ok());
  EXPECT_TRUE(check(1000, Options(v1::OUTPUT_SCORES)).ok());
  EXPECT_TRUE(check(173, Options(v1::OUTPUT_TOP, false, 64)).ok());  // 576 bytes a token.
  const absl::Status top = check(174, Options(v1::OUTPUT_TOP, false, 64));
  EXPECT_EQ(ErrorReason(top), reason::kResponseTooLarge);
  EXPECT_THAT(std::string(top.message()),
              HasSubstr("the 64 most likely ids of 1 x 174 tokens, 100224 bytes, want at most 100000 bytes"));
  EXPECT_TRUE(check(1000, Options(v1::OUTPUT_TOP, true, 64)).ok());
}

TEST(CheckGeneration, DefaultsAndWhatIsSaid) {
  v1::GenerateRequest request;
  auto checked = CheckGeneration(request, IdsModel(), kLimits);
  ASSERT_TRUE(checked.ok()) << checked.status();
  EXPECT_EQ(checked->sampling.temperature, 0);
  EXPECT_EQ(checked->sampling.top_p, 1) << "0 means all";
  EXPECT_EQ(checked->max_tokens, 30);
  EXPECT_FALSE(checked->log_probs);
  request.mutable_sampling()->set_temperature(0.5f);
  request.mutable_sampling()->set_top_k(7);
  request.mutable_sampling()->set_top_p(0.25f);
  request.mutable_sampling()->set_seed(uint64_t{1} << 63);
  request.set_max_tokens(400);
  request.set_top_log_probs(10);
  request.add_stop_ids(9);
  request.add_stop(std::string(1, 'x'));
  checked = CheckGeneration(request, IdsModel(), kLimits);
  ASSERT_TRUE(checked.ok()) << checked.status();
  EXPECT_EQ(checked->sampling.temperature, 0.5f);
  EXPECT_EQ(checked->sampling.top_k, 7);
  EXPECT_EQ(checked->sampling.top_p, 0.25f);
  EXPECT_EQ(checked->sampling.seed, uint64_t{1} << 63);
  EXPECT_EQ(checked->max_tokens, 400);
  EXPECT_TRUE(checked->log_probs);
  EXPECT_EQ(checked->top, 10);
}

TEST(CheckGeneration, NamesWhatIsWrong) {
  const auto error = [](void (*spoil)(v1::GenerateRequest*)) {
    v1::GenerateRequest request;
    spoil(&request);
    const absl::Status status = CheckGeneration(request, IdsModel(), kLimits).status();
    EXPECT_EQ(ErrorReason(status), reason::kInvalidRequest);
    return std::string(status.message());
  };
  using R = v1::GenerateRequest;
  EXPECT_EQ(error([](R* r) { r->mutable_sampling()->set_temperature(-1); }),
            "sampling.temperature is -1, want a finite number from 0 on");
  EXPECT_THAT(error([](R* r) { r->mutable_sampling()->set_temperature(NAN); }),
              HasSubstr("temperature is nan"));
  EXPECT_THAT(error([](R* r) { r->mutable_sampling()->set_temperature(INFINITY); }),
              HasSubstr("temperature is inf"));
  EXPECT_EQ(error([](R* r) { r->mutable_sampling()->set_top_k(-2); }),
            "sampling.top_k is -2, want at least 0");
  EXPECT_EQ(error([](R* r) { r->mutable_sampling()->set_top_p(1.5f); }),
            "sampling.top_p is 1.5, want 0 to 1");
  EXPECT_THAT(error([](R* r) { r->mutable_sampling()->set_top_p(NAN); }), HasSubstr("top_p is nan"));
  EXPECT_EQ(error([](R* r) { r->set_max_tokens(-1); }), "max_tokens is -1, want 0 to 400");
  EXPECT_EQ(error([](R* r) { r->set_max_tokens(401); }), "max_tokens is 401, want 0 to 400");
  EXPECT_EQ(error([](R* r) { r->add_stop_ids(10); }), "stop_ids number 0 is 10, want 0 to 9");
  EXPECT_EQ(error([](R* r) { r->add_stop_ids(-1); }), "stop_ids number 0 is -1, want 0 to 9");
  EXPECT_EQ(error([](R* r) {
              for (int i = 0; i < 17; ++i) r->add_stop(std::string(1, 'x'));
            }),
            "stop has 17 strings, want at most 16");
  EXPECT_EQ(error([](R* r) { r->add_stop(std::string()); }), "stop has a string of 0 bytes, want 1 to 256");
  EXPECT_EQ(error([](R* r) { r->add_stop(std::string(257, 'x')); }),
            "stop has a string of 257 bytes, want 1 to 256");
  EXPECT_EQ(error([](R* r) { r->set_top_log_probs(11); }), "top_log_probs is 11, want 0 to 10");
  EXPECT_EQ(error([](R* r) { r->set_top_log_probs(-1); }), "top_log_probs is -1, want 0 to 10");
}

TEST(CheckText, ItsSize) {
  EXPECT_TRUE(CheckText(std::string(50, 'x'), kLimits).ok());
  EXPECT_EQ(CheckText(std::string(51, 'x'), kLimits).message(), "text has 51 bytes, want at most 50");
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
  *good_ids.mutable_output_options() = Options(v1::OUTPUT_TOP, false, 2);
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
    const bool generates = ids;
    const auto sequence = static_cast<Sequence>(random() % 3);
    const auto checked = CheckInput(request.input(), request.output_dtype(), request.output_options(),
                                    sequence, model, kLimits);
    if (checked.ok()) {
      ++accepted;
      ASSERT_EQ(checked->batch * checked->sequence_bytes,
                static_cast<int64_t>(request.input().data().size()));
      ASSERT_EQ(checked->sequence_bytes, checked->tokens * model.input_width * DTypeBytes(checked->dtype));
      ASSERT_LE(checked->batch * checked->tokens, kLimits.max_tokens);
      ASSERT_LE(checked->batch * checked->output_bytes, kLimits.max_response_bytes);
      ASSERT_LE(checked->response_bytes, kLimits.max_response_bytes);
      ASSERT_TRUE(checked->top >= 0 && checked->top <= 10);
      ASSERT_TRUE(generates || checked->readout == ReadoutKind::kValues);
    } else {
      ++refused;
      ASSERT_TRUE(checked.status().code() == absl::StatusCode::kInvalidArgument ||
                  checked.status().code() == absl::StatusCode::kResourceExhausted ||
                  (!generates && checked.status().code() == absl::StatusCode::kFailedPrecondition));
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
