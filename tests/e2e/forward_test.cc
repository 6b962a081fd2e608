// Forward, with and without a session.
#include <algorithm>
#include <cmath>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/e2e/test_server.h"
#include "tests/testing/fake_clock.h"

namespace deltanet {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

TEST(Forward, OneSequenceGivesTheWholeOutput) {
  TestServer server(FakeModelOptions{.lookahead = 2});
  const std::vector<float> input = RandomValues(1, 500);
  const auto result = server.client().Forward(AllTokens(input), {.request_id = "r1"});
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(result->request_id, "r1");
  EXPECT_THAT(result->output.shape, ElementsAre(500, kOutputWidth));
  EXPECT_EQ(Floats(result->output), server.model().ExpectedOutput(input));
  EXPECT_EQ(result->output_position, 0);
  EXPECT_EQ(result->committed_position, 500);
  EXPECT_EQ(result->session_id, "");
  EXPECT_GT(result->computing, absl::ZeroDuration());
}

TEST(Forward, ABatchGivesEachSequenceItsOwnOutput) {
  TestServer server(
      FakeModelOptions{.lookahead = 3, .num_slots = 4});  // More sequences than slots: some wait.
  constexpr int64_t kBatch = 9;
  constexpr int64_t kTokens = 70;
  std::vector<float> input, expected;
  for (int64_t b = 0; b < kBatch; ++b) {
    const std::vector<float> sequence = RandomValues(b, kTokens);
    Append(sequence, &input);
    Append(server.model().ExpectedOutput(sequence), &expected);
  }
  const auto result = server.client().Forward({input.data(), {kBatch, kTokens, kWidth}}, {});
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_THAT(result->output.shape, ElementsAre(kBatch, kTokens, kOutputWidth));
  EXPECT_EQ(Floats(result->output), expected);
}

TEST(Forward, ABatchOfManyIsAnsweredByAnotherThread) {
  TestServer server(FakeModelOptions{.num_slots = 128, .max_step_rows = 64});
  const std::vector<float> input = RandomValues(1, 64 * 3);
  std::vector<float> expected;
  for (int64_t b = 0; b < 64; ++b) {
    Append(server.model().ExpectedOutput(
               std::vector<float>(input.begin() + b * 3 * kWidth, input.begin() + (b + 1) * 3 * kWidth)),
           &expected);
  }
  for (int i = 0; i < 20; ++i) {
    const auto result = server.client().Forward({input.data(), {64, 3, kWidth}}, {});
    ASSERT_TRUE(result.ok()) << result.status();
    EXPECT_EQ(Floats(result->output), expected);
  }
}

TEST(Forward, ABatchIsOneStepFromTheStart) {
  TestServer server(FakeModelOptions{.num_slots = 64, .max_step_rows = 16});
  const std::vector<float> input = RandomValues(1, 16);
  for (int i = 0; i < 50; ++i) {
    ASSERT_TRUE(server.client().Forward({input.data(), {16, 1, kWidth}}, {}).ok());
  }
  EXPECT_EQ(server.model().launched().size(), 50u);
}

TEST(Forward, IdsAndDTypes) {
  TestServer server(FakeModelOptions{.takes_tokens = true});
  const std::vector<int64_t> ids = {0, 7, 3, 3, 1};
  const auto result =
      server.client().Forward({ids.data(), {5}, DType::kInt64}, {.output_dtype = DType::kBFloat16});
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(result->output.dtype, DType::kBFloat16);
  EXPECT_EQ(Floats(result->output), server.model().ExpectedOutput(ids));
}

TEST(Forward, HalfPrecisionInput) {
  TestServer server(FakeModelOptions{});
  std::vector<float> input = RandomValues(1, 10);
  std::string half(input.size() * 2, '\0');
  ConvertElements(input.data(), DType::kFloat32, half.data(), DType::kFloat16, 30);
  ConvertElements(half.data(), DType::kFloat16, input.data(), DType::kFloat32, 30);
  const auto result = server.client().Forward({half.data(), {10, kWidth}, DType::kFloat16}, {});
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(Floats(result->output), server.model().ExpectedOutput(input));
}

// The log-probability of each id but the first, by the logits before it.
std::vector<float> ExpectedScores(const FakeModel& model, const std::vector<int64_t>& ids) {
  std::vector<float> scores;
  for (size_t i = 1; i < ids.size(); ++i) {
    scores.push_back(LogProb(model.ExpectedLogits(absl::MakeSpan(ids).subspan(0, i)), ids[i]));
  }
  return scores;
}

// The most likely ids behind each of `ids`, and their log-probabilities.
void ExpectTop(const FakeModel& model, const std::vector<int64_t>& ids, size_t first, const TopTokens& top) {
  ASSERT_EQ(top.ids.size(), (ids.size() - first) * top.k);
  ASSERT_EQ(top.log_probs.size(), top.ids.size());
  for (size_t i = first; i < ids.size(); ++i) {
    const auto expected = MostLikely(model.ExpectedLogits(absl::MakeSpan(ids).subspan(0, i + 1)), top.k);
    for (int32_t k = 0; k < top.k; ++k) {
      const size_t at = (i - first) * top.k + k;
      EXPECT_EQ((ScoredId{top.ids[at], top.log_probs[at]}), expected[k]);
    }
  }
}

std::vector<int64_t> RandomIds(uint32_t seed, size_t count) {
  std::mt19937 random(seed);
  std::vector<int64_t> ids(count);
  for (int64_t& id : ids) id = random() % kOutputWidth;
  return ids;
}

TensorView View(const std::vector<int64_t>& ids) {
  return {ids.data(), {static_cast<int64_t>(ids.size())}, DType::kInt64};
}

TEST(Forward, ScoresEachIdButTheFirst) {
  TestServer server(FakeModelOptions{.takes_tokens = true});
  const std::vector<int64_t> ids = RandomIds(1, 400);
  const auto result = server.client().Score(ids, 3, {});
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(result->log_probs, ExpectedScores(server.model(), ids));
  EXPECT_EQ(result->output_position, 1);
  EXPECT_EQ(result->committed_position, 400);
  EXPECT_TRUE(result->output.data.empty());
  ExpectTop(server.model(), {ids.begin(), ids.end() - 1}, 0, result->top);
  const auto one = server.client().Score({3}, 0, {});
  ASSERT_TRUE(one.ok()) << one.status();
  EXPECT_TRUE(one->log_probs.empty());
}

TEST(Forward, ScoresABatch) {
  TestServer server(FakeModelOptions{.takes_tokens = true, .num_slots = 3});
  std::vector<int64_t> ids;
  std::vector<float> expected;
  for (uint32_t b = 0; b < 5; ++b) {
    const std::vector<int64_t> sequence = RandomIds(b, 90);
    ids.insert(ids.end(), sequence.begin(), sequence.end());
    Append(ExpectedScores(server.model(), sequence), &expected);
  }
  const auto result =
      server.client().Forward({ids.data(), {5, 90}, DType::kInt64},
                              {.output_options = {.kind = OutputKind::kScores, .top_tokens = 1}});
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(result->log_probs, expected);
  ASSERT_EQ(result->top.ids.size(), 5u * 89);
  const std::vector<int64_t> last(ids.end() - 90, ids.end() - 1);
  ExpectTop(server.model(), last, 0,
            {1,
             {result->top.ids.end() - 89, result->top.ids.end()},
             {result->top.log_probs.end() - 89, result->top.log_probs.end()}});
}

TEST(Forward, ASessionScoresTheFirstIdOfALaterMessageToo) {
  TestServer server(FakeModelOptions{.takes_tokens = true});
  const std::vector<int64_t> ids = RandomIds(2, 300);
  std::vector<float> scores;
  for (const auto& [begin, end] :
       std::vector<std::pair<int64_t, int64_t>>{{0, 1}, {1, 2}, {2, 290}, {290, 300}}) {
    const std::vector<int64_t> part(ids.begin() + begin, ids.begin() + end);
    const auto result = server.client().Score(
        part, 0, {.session = SessionChoice{"s", begin == 0}, .end_of_sequence = end == 300});
    ASSERT_TRUE(result.ok()) << result.status();
    EXPECT_EQ(result->output_position, std::max<int64_t>(begin, 1));
    Append(result->log_probs, &scores);
  }
  EXPECT_EQ(scores, ExpectedScores(server.model(), ids));
}

TEST(Forward, TheMostLikelyIdsOfEachTokenOrTheLast) {
  TestServer server(FakeModelOptions{.takes_tokens = true});
  const std::vector<int64_t> ids = RandomIds(3, 300);
  const auto all = server.client().Forward(
      View(ids), {.output_options = {.kind = OutputKind::kTop, .top_tokens = kOutputWidth}});
  ASSERT_TRUE(all.ok()) << all.status();
  EXPECT_EQ(all->top.k, kOutputWidth);
  EXPECT_EQ(all->output_position, 0);
  ExpectTop(server.model(), ids, 0, all->top);
  const auto last = server.client().Top(ids, 2, {});
  ASSERT_TRUE(last.ok()) << last.status();
  EXPECT_EQ(last->output_position, 299);
  ExpectTop(server.model(), ids, 299, last->top);
}

TEST(Forward, TheLastTokensLogitsAlone) {
  TestServer server(FakeModelOptions{.takes_tokens = true});
  std::vector<int64_t> ids;
  std::vector<float> expected;
  for (uint32_t b = 0; b < 3; ++b) {
    const std::vector<int64_t> sequence = RandomIds(b, 300);
    ids.insert(ids.end(), sequence.begin(), sequence.end());
    Append(server.model().ExpectedLogits(sequence), &expected);
  }
  const auto result =
      server.client().Forward({ids.data(), {3, 300}, DType::kInt64}, {.output_options = {.last_only = true}});
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_THAT(result->output.shape, ElementsAre(3, 1, kOutputWidth));
  EXPECT_EQ(Floats(result->output), expected);
  EXPECT_EQ(result->output_position, 299);
  EXPECT_EQ(result->committed_position, 300);
}

TEST(Forward, TheLastTokensOutputOfAModelOverValues) {
  TestServer server(FakeModelOptions{});
  const std::vector<float> input = RandomValues(1, 10);
  const auto result = server.client().Forward(AllTokens(input), {.output_options = {.last_only = true}});
  ASSERT_TRUE(result.ok()) << result.status();
  const std::vector<float> expected = server.model().ExpectedOutput(input);
  EXPECT_EQ(Floats(result->output), std::vector<float>(expected.end() - kOutputWidth, expected.end()));
}

TEST(Forward, ResponsesAreWeighedByWhatIsAskedFor) {
  ServerOptions options;
  options.max_response_bytes = 10 * kOutputWidth * 4;  // The logits of 10 tokens.
  TestServer server(FakeModelOptions{.takes_tokens = true}, options);
  const std::vector<int64_t> ids = RandomIds(3, 60);
  const auto refused = server.client().Forward(View(ids), {});
  EXPECT_EQ(ErrorReason(refused.status()), reason::kResponseTooLarge);
  EXPECT_THAT(std::string(refused.status().message()), HasSubstr("1920 bytes, want at most 320 bytes"));
  EXPECT_TRUE(server.model().launched().empty());
  EXPECT_TRUE(server.client().Score(ids, 0, {}).ok());
  EXPECT_TRUE(server.client().Top(ids, 8, {}).ok());
  EXPECT_TRUE(server.client().Forward(View(ids), {.output_options = {.last_only = true}}).ok());
}

TEST(Forward, AFlushOfAModelThatScoresIsEmpty) {
  TestServer server(FakeModelOptions{.takes_tokens = true});
  for (const OutputOptions& options :
       {OutputOptions{.kind = OutputKind::kScores},
        OutputOptions{.kind = OutputKind::kTop, .last_only = true, .top_tokens = 1},
        OutputOptions{.last_only = true}}) {
    const auto fresh = server.client().Forward(
        {nullptr, {0}, DType::kInt64},
        {.session = SessionChoice{"s", true}, .end_of_sequence = true, .output_options = options});
    ASSERT_TRUE(fresh.ok()) << fresh.status();
    EXPECT_TRUE(fresh->log_probs.empty());
    EXPECT_TRUE(fresh->top.ids.empty());
    EXPECT_TRUE(fresh->output.data.empty());
    EXPECT_EQ(fresh->committed_position, 0);
  }
}

TEST(Forward, ASessionGoesOnWhereItWas) {
  TestServer server(FakeModelOptions{.lookahead = 2});
  const std::vector<float> input = RandomValues(2, 100);
  std::vector<float> output;
  const auto first = server.client().Forward(Tokens(input, 0, 30), {.session = SessionChoice{"s", true}});
  ASSERT_TRUE(first.ok()) << first.status();
  EXPECT_EQ(first->session_id, "s");
  EXPECT_EQ(first->committed_position, 30);
  EXPECT_THAT(first->output.shape, ElementsAre(28, kOutputWidth));
  Append(Floats(first->output), &output);
  const auto second = server.client().Forward(Tokens(input, 30, 31),
                                              {.session = SessionChoice{"s"}, .expected_position = 30});
  ASSERT_TRUE(second.ok()) << second.status();
  EXPECT_EQ(second->output_position, 28);
  Append(Floats(second->output), &output);
  const auto last = server.client().Forward(Tokens(input, 31, 100),
                                            {.session = SessionChoice{"s"}, .end_of_sequence = true});
  ASSERT_TRUE(last.ok()) << last.status();
  EXPECT_EQ(last->output_position, 29);
  EXPECT_EQ(last->committed_position, 100);
  Append(Floats(last->output), &output);
  EXPECT_EQ(output, server.model().ExpectedOutput(input));

  const auto after = server.client().Forward(Tokens(input, 0, 1), {.session = SessionChoice{"s"}});
  EXPECT_EQ(after.status().code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(ErrorReason(after.status()), reason::kSessionEnded);
  EXPECT_EQ(server.client().GetModel("")->sessions, 0);
}

TEST(Forward, AFlushMayBeEmpty) {
  TestServer server(FakeModelOptions{.lookahead = 4});
  const std::vector<float> input = RandomValues(3, 10);
  std::vector<float> output;
  const auto first = server.client().Forward(AllTokens(input), {.session = SessionChoice{"s", true}});
  ASSERT_TRUE(first.ok()) << first.status();
  Append(Floats(first->output), &output);
  const auto flush = server.client().Forward({nullptr, {0, kWidth}},
                                             {.session = SessionChoice{"s"}, .end_of_sequence = true});
  ASSERT_TRUE(flush.ok()) << flush.status();
  EXPECT_THAT(flush->output.shape, ElementsAre(4, kOutputWidth));
  Append(Floats(flush->output), &output);
  EXPECT_EQ(output, server.model().ExpectedOutput(input));
}

TEST(Forward, TheServerMakesUnguessableIds) {
  TestServer server(FakeModelOptions{});
  const std::vector<float> input = RandomValues(1, 1);
  const auto a = server.client().Forward(AllTokens(input), {.session = SessionChoice{"", true}});
  const auto b = server.client().Forward(AllTokens(input), {.session = SessionChoice{"", true}});
  ASSERT_TRUE(a.ok() && b.ok()) << a.status() << b.status();
  EXPECT_EQ(a->session_id.size(), 32u);
  EXPECT_NE(a->session_id, b->session_id);
  EXPECT_TRUE(server.client().Forward(AllTokens(input), {.session = SessionChoice{a->session_id}}).ok());
}

struct BadRequest {
  const char* name;
  TensorView input;
  ForwardOptions options;
  absl::StatusCode code;
  const char* reason;
  const char* message;
};

class ForwardErrors : public ::testing::TestWithParam<BadRequest> {};

TEST_P(ForwardErrors, NameWhatIsWrong) {
  ServerOptions options;
  options.max_message_bytes = 1 << 20;
  options.batcher.max_queued_tokens = 10000;
  TestServer server(FakeModels{{"a", {}}, {"b", {.output_width = 1024}}}, options);
  ASSERT_TRUE(server.client()
                  .Forward({std::vector<float>(3).data(), {1, kWidth}},
                           {.model = "a", .session = SessionChoice{"exists", true}})
                  .ok());
  const auto result = server.client().Forward(GetParam().input, GetParam().options);
  EXPECT_EQ(result.status().code(), GetParam().code) << result.status();
  EXPECT_EQ(ErrorReason(result.status()), GetParam().reason);
  EXPECT_THAT(std::string(result.status().message()), HasSubstr(GetParam().message));
}

const std::vector<float>& Zeros() {
  static const std::vector<float>& zeros = *new std::vector<float>(60000);
  return zeros;
}
const float kNan[3] = {0, NAN, 0};

INSTANTIATE_TEST_SUITE_P(
    Cases, ForwardErrors,
    ::testing::Values(BadRequest{"Model",
                                 {Zeros().data(), {1, 3}},
                                 {.model = "c"},
                                 absl::StatusCode::kNotFound,
                                 reason::kModelNotFound,
                                 "model is \"c\", want one of a, b"},
                      BadRequest{"NoModel",
                                 {Zeros().data(), {1, 3}},
                                 {},
                                 absl::StatusCode::kInvalidArgument,
                                 reason::kInvalidRequest,
                                 "model is empty"},
                      BadRequest{"Width",
                                 {Zeros().data(), {2, 4}},
                                 {.model = "a"},
                                 absl::StatusCode::kInvalidArgument,
                                 reason::kInvalidRequest,
                                 "input.shape is [2,4], want [T,3] or [B,T,3]"},
                      BadRequest{"NoTokens",
                                 {Zeros().data(), {0, 3}},
                                 {.model = "a"},
                                 absl::StatusCode::kInvalidArgument,
                                 reason::kInvalidRequest,
                                 "at least 1 token"},
                      BadRequest{"TooManyTokens",
                                 {Zeros().data(), {10001, 3}},
                                 {.model = "a"},
                                 absl::StatusCode::kInvalidArgument,
                                 reason::kInvalidRequest,
                                 "want at most 10000 tokens"},
                      BadRequest{"NotFinite",
                                 {kNan, {1, 3}},
                                 {.model = "a"},
                                 absl::StatusCode::kInvalidArgument,
                                 reason::kInvalidRequest,
                                 "infinite or NaN"},
                      BadRequest{"Ids",
                                 {Zeros().data(), {2}, DType::kInt64},
                                 {.model = "a"},
                                 absl::StatusCode::kInvalidArgument,
                                 reason::kInvalidRequest,
                                 "input.dtype is DATA_TYPE_INT64"},
                      BadRequest{"ResponseTooLarge",
                                 {Zeros().data(), {300, 3}},
                                 {.model = "b"},
                                 absl::StatusCode::kResourceExhausted,
                                 reason::kResponseTooLarge,
                                 "want at most 1047552 bytes"},
                      BadRequest{"NotGenerative",
                                 {Zeros().data(), {1, 3}},
                                 {.model = "a", .output_options = {.kind = OutputKind::kScores}},
                                 absl::StatusCode::kFailedPrecondition,
                                 reason::kNotGenerative,
                                 "the model cannot give OUTPUT_SCORES"},
                      BadRequest{"TopTokens",
                                 {Zeros().data(), {1, 3}},
                                 {.model = "a", .output_options = {.top_tokens = 3}},
                                 absl::StatusCode::kInvalidArgument,
                                 reason::kInvalidRequest,
                                 "output_options.top_tokens is 3"},
                      BadRequest{"RequestId",
                                 {Zeros().data(), {1, 3}},
                                 {.request_id = std::string(129, 'x'), .model = "a"},
                                 absl::StatusCode::kInvalidArgument,
                                 reason::kInvalidRequest,
                                 "request_id has 129 bytes"},
                      BadRequest{"PositionWithoutSession",
                                 {Zeros().data(), {1, 3}},
                                 {.model = "a", .expected_position = 0},
                                 absl::StatusCode::kInvalidArgument,
                                 reason::kInvalidRequest,
                                 "expected_position is 0"},
                      BadRequest{"SessionId",
                                 {Zeros().data(), {1, 3}},
                                 {.session = SessionChoice{"a/b"}},
                                 absl::StatusCode::kInvalidArgument,
                                 reason::kInvalidRequest,
                                 "session.id"},
                      BadRequest{"SessionUnknown",
                                 {Zeros().data(), {1, 3}},
                                 {.session = SessionChoice{"nobody"}},
                                 absl::StatusCode::kNotFound,
                                 reason::kSessionNotFound,
                                 "nobody"},
                      BadRequest{"SessionExists",
                                 {Zeros().data(), {1, 3}},
                                 {.model = "a", .session = SessionChoice{"exists", true}},
                                 absl::StatusCode::kAlreadyExists,
                                 reason::kSessionExists,
                                 "exists"},
                      BadRequest{"SessionModel",
                                 {Zeros().data(), {1, 3}},
                                 {.model = "b", .session = SessionChoice{"exists"}},
                                 absl::StatusCode::kFailedPrecondition,
                                 reason::kSessionModel,
                                 "another model"},
                      BadRequest{"SessionTakesNoBatch",
                                 {Zeros().data(), {1, 1, 3}},
                                 {.session = SessionChoice{"exists"}},
                                 absl::StatusCode::kInvalidArgument,
                                 reason::kInvalidRequest,
                                 "input.shape is [1,1,3], want [T,3]"},
                      BadRequest{"TtlTooLong",
                                 {Zeros().data(), {1, 3}},
                                 {.model = "a", .session = SessionChoice{"new", true, absl::Hours(25)}},
                                 absl::StatusCode::kInvalidArgument,
                                 reason::kInvalidRequest,
                                 "idle_ttl"},
                      BadRequest{"Position",
                                 {Zeros().data(), {1, 3}},
                                 {.session = SessionChoice{"exists"}, .expected_position = 2},
                                 absl::StatusCode::kFailedPrecondition,
                                 reason::kPositionMismatch,
                                 "expected_position is 2"}),
    [](const auto& info) { return std::string(info.param.name); });

TEST(Forward, AFailureLeavesTheSessionWhereItWasAndOutOfStep) {
  TestServer server(FakeModelOptions{});
  const std::vector<float> input = RandomValues(4, 30);
  ASSERT_TRUE(server.client().Forward(Tokens(input, 0, 10), {.session = SessionChoice{"s", true}}).ok());
  const auto bad = server.client().Forward({input.data(), {3, 7}}, {.session = SessionChoice{"s"}});
  EXPECT_EQ(bad.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(ErrorMetadata(bad.status(), "committed_position"), "10");
  const auto blind = server.client().Forward(Tokens(input, 20, 30), {.session = SessionChoice{"s"}});
  EXPECT_EQ(ErrorReason(blind.status()), reason::kSessionOutOfStep);
  const auto good = server.client().Forward(Tokens(input, 10, 30),
                                            {.session = SessionChoice{"s"}, .expected_position = 10});
  ASSERT_TRUE(good.ok()) << good.status();
  const std::vector<float> expected = server.model().ExpectedOutput(input);
  EXPECT_EQ(Floats(good->output), std::vector<float>(expected.begin() + 10 * kOutputWidth, expected.end()));
}

TEST(Forward, AFailedCreationLeavesNothingBehind) {
  TestServer server(FakeModelOptions{});
  server.model().FailWait(0, absl::InternalError("broken"));
  const std::vector<float> input = RandomValues(1, 1);
  const auto failed = server.client().Forward(AllTokens(input), {.session = SessionChoice{"s", true}});
  EXPECT_EQ(failed.status().code(), absl::StatusCode::kInternal);
  EXPECT_EQ(server.client().GetModel("")->sessions, 0);
  EXPECT_TRUE(server.client().Forward(AllTokens(input), {.session = SessionChoice{"s", true}}).ok());
}

TEST(Forward, OneBadSequenceFailsItsCallAndNoOther) {
  TestServer server(FakeModelOptions{});
  server.model().FailRow(0, 0);
  const std::vector<float> input = RandomValues(1, 20);
  const auto failed = server.client().Forward({input.data(), {4, 5, kWidth}}, {});
  EXPECT_EQ(failed.status().code(), absl::StatusCode::kInternal);
  EXPECT_EQ(ErrorReason(failed.status()), reason::kNonFinite);
  EXPECT_TRUE(server.client().Forward({input.data(), {4, 5, kWidth}}, {}).ok());
}

TEST(Forward, SessionsAreBounded) {
  ServerOptions options;
  options.max_sessions = 2;
  TestServer server(FakeModelOptions{.num_slots = 8}, options);
  const std::vector<float> input = RandomValues(1, 1);
  EXPECT_EQ(server.client().GetModel("")->sessions_free, 2);
  for (const char* id : {"a", "b"}) {
    EXPECT_TRUE(server.client().Forward(AllTokens(input), {.session = SessionChoice{id, true}}).ok());
  }
  const auto third = server.client().Forward(AllTokens(input), {.session = SessionChoice{"c", true}});
  EXPECT_EQ(third.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(ErrorReason(third.status()), reason::kSessionsFull);
  EXPECT_TRUE(server.client().Forward(AllTokens(input), {}).ok());  // Stateless work has its own slots.
  EXPECT_TRUE(server.client().EndSession("a").ok());
  EXPECT_TRUE(server.client().Forward(AllTokens(input), {.session = SessionChoice{"c", true}}).ok());
}

TEST(Forward, IdleSessionsExpire) {
  FakeClock clock;
  ServerOptions options;
  options.clock = &clock;
  options.sessions.default_idle_ttl = absl::Minutes(10);
  TestServer server(FakeModelOptions{}, options);
  const std::vector<float> input = RandomValues(1, 1);
  ASSERT_TRUE(server.client().Forward(AllTokens(input), {.session = SessionChoice{"default", true}}).ok());
  ASSERT_TRUE(server.client()
                  .Forward(AllTokens(input), {.session = SessionChoice{"longer", true, absl::Minutes(11)}})
                  .ok());
  clock.Advance(absl::Minutes(10));
  ASSERT_EQ(server.client().ListSessions("")->size(), 2u);
  clock.WaitUntilTimedBlocked(1);  // The janitor has looked and found nothing.
  clock.Advance(absl::Seconds(1));
  clock.WaitUntilTimedBlocked(1);  // It has looked again.
  EXPECT_EQ(server.Metric("deltanet_sessions{model=\"m\"}"), 1);
  const auto gone = server.client().Forward(AllTokens(input), {.session = SessionChoice{"default"}});
  EXPECT_EQ(ErrorReason(gone.status()), reason::kSessionExpired);
  EXPECT_TRUE(server.client().Forward(AllTokens(input), {.session = SessionChoice{"longer"}}).ok());
}

TEST(Forward, AFullQueueRefuses) {
  ServerOptions options;
  options.batcher.max_queued_works = 1;
  TestServer server(FakeModelOptions{}, options);
  server.model().Hold(0);
  const std::vector<float> input = RandomValues(1, 1);
  const auto forward = [&] { EXPECT_TRUE(server.client().Forward(AllTokens(input), {}).ok()); };
  std::thread running(forward);
  server.model().WaitUntilHeld(0);
  std::thread queued(forward);
  while (server.Metric("deltanet_queued_works") < 1) continue;
  const auto refused = server.client().Forward(AllTokens(input), {});
  EXPECT_EQ(refused.status().code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(ErrorReason(refused.status()), reason::kQueueFull);
  server.model().Release(0);
  running.join();
  queued.join();
  forward();
  EXPECT_EQ(server.Metric("deltanet_queued_works"), 0);
}

TEST(Forward, ADeadlineThatPassesGivesTheWorkUp) {
  TestServer server(FakeModelOptions{});
  server.model().Hold(0);
  const std::vector<float> input = RandomValues(1, 1);
  const auto late = server.client().Forward(AllTokens(input), {.timeout = absl::Milliseconds(20)});
  EXPECT_EQ(late.status().code(), absl::StatusCode::kDeadlineExceeded);
  server.model().Release(0);
  EXPECT_TRUE(server.client().Forward(AllTokens(input), {}).ok());
}

}  // namespace
}  // namespace deltanet
