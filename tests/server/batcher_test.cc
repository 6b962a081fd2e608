#include "server/batcher.h"

#include <algorithm>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "model/base/mutex.h"
#include "proto/wire.h"
#include "server/executor.h"
#include "tests/server/scheduling_test_util.h"
#include "tests/testing/fake_clock.h"
#include "tests/testing/fake_model.h"

namespace deltanet {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr int64_t kWidth = 3;
constexpr int64_t kOutputWidth = 8;
constexpr absl::Duration kTick = absl::Nanoseconds(1);

// Outputs [first, first + rows) of `values`.
std::vector<float> Rows(const std::vector<float>& values, int64_t first, int64_t rows) {
  return {values.begin() + first * kOutputWidth, values.begin() + (first + rows) * kOutputWidth};
}

absl::Span<const float> Tokens(const std::vector<float>& input, int64_t first, int64_t tokens) {
  return absl::MakeConstSpan(input).subspan(first * kWidth, tokens * kWidth);
}

CallOptions EndOfSequence() {
  CallOptions options;
  options.end_of_sequence = true;
  return options;
}
CallOptions Expecting(int64_t position) {
  CallOptions options;
  options.expected_position = position;
  return options;
}

struct Recorder : BatchObserver {
  void OnStep(const Step& step) override { steps.push_back(step); }
  void OnWorkDone(int model, const WorkResult& result) override { works.emplace_back(model, result); }
  void OnDeviceLost(const absl::Status& status) override { losses.push_back(status); }

  std::vector<absl::Status> losses;
  std::vector<Step> steps;
  std::vector<std::pair<int, WorkResult>> works;
};

// A batcher without a thread over one fake model; a test makes it with the options it likes.
class BatcherTest : public ::testing::Test {
 protected:
  void Make(const FakeModelOptions& model_options = {}, int64_t running_slots = 4,
            BatcherOptions options = {.piece_tokens = 64}) {
    model_ = std::make_unique<FakeModel>(model_options);
    batcher_ = std::make_unique<Batcher>(options, &clock_, &recorder_);
    ASSERT_EQ(batcher_->AddModel(model_.get(), running_slots), 0);
  }

  Call Send(const std::shared_ptr<Lane>& lane, absl::Span<const float> input, CallOptions options = {}) {
    return Call(batcher_.get(), 0, lane, input, std::move(options));
  }

  void RunAll() {
    while (batcher_->RunOnce()) {
    }
  }

  // Nothing is queued and all slots but `held` are free.
  void ExpectAtRest(int64_t held) {
    EXPECT_EQ(batcher_->queued_works(), 0);
    EXPECT_EQ(batcher_->queued_tokens(), 0);
    EXPECT_EQ(batcher_->free_slots(0), model_->description().num_slots - held);
    EXPECT_TRUE(batcher_->WaitUntilIdle(clock_.Now()));
    EXPECT_FALSE(batcher_->RunOnce());
  }

  // Tokens of each row of each step so far.
  std::vector<std::vector<int64_t>> StepTokens() {
    std::vector<std::vector<int64_t>> steps;
    for (const std::vector<StepRow>& rows : model_->launched()) {
      steps.emplace_back();
      for (const StepRow& row : rows) steps.back().push_back(row.tokens);
    }
    return steps;
  }

  FakeClock clock_;
  Recorder recorder_;
  std::unique_ptr<FakeModel> model_;
  std::unique_ptr<Batcher> batcher_;
};

void ExpectError(const absl::Status& status, absl::StatusCode code, const char* reason, int64_t position) {
  EXPECT_EQ(status.code(), code) << status;
  EXPECT_EQ(ErrorReason(status), reason) << status;
  EXPECT_EQ(ErrorMetadata(status, "committed_position"), absl::StrCat(position)) << status;
}

// --- What comes out ---

TEST_F(BatcherTest, AStatelessSequenceIsAnsweredWholeAndKeepsNoSlot) {
  Make({.lookahead = 2});
  const std::vector<float> input = RandomInput(1, 10);
  const std::shared_ptr<Lane> lane = batcher_->OpenLane(0);
  const Call call = Send(lane, input, EndOfSequence());
  EXPECT_EQ(batcher_->queued_works(), 1);
  EXPECT_EQ(batcher_->queued_tokens(), 12);
  EXPECT_EQ(batcher_->pending(lane), 1);
  EXPECT_TRUE(batcher_->RunOnce());
  const WorkResult result = call.result();
  EXPECT_TRUE(result.status.ok()) << result.status;
  EXPECT_EQ(result.output_position, 0);
  EXPECT_EQ(result.output_tokens, 10);
  EXPECT_EQ(result.committed_position, 10);
  EXPECT_TRUE(result.ended);
  EXPECT_EQ(call.output(), model_->ExpectedOutput(input));
  EXPECT_EQ(batcher_->pending(lane), 0);
  ExpectAtRest(0);
}

TEST_F(BatcherTest, OutputsLagByTheLookaheadAndTheEndGivesWhatIsOwed) {
  Make({.lookahead = 3});
  const std::vector<float> input = RandomInput(1, 5);
  const std::vector<float> expected = model_->ExpectedOutput(input);
  const std::shared_ptr<Lane> lane = batcher_->OpenLane(0);
  const Call first = Send(lane, Tokens(input, 0, 2));
  const Call second = Send(lane, Tokens(input, 2, 3));
  const Call last = Send(lane, {}, EndOfSequence());
  RunAll();
  EXPECT_EQ(first.result().output_position, 0);
  EXPECT_EQ(first.result().output_tokens, 0);
  EXPECT_EQ(first.result().committed_position, 2);
  EXPECT_EQ(second.result().output_position, 0);
  EXPECT_EQ(second.output(), Rows(expected, 0, 2));
  EXPECT_EQ(last.result().output_position, 2);
  EXPECT_EQ(last.output(), Rows(expected, 2, 3));
  EXPECT_EQ(last.result().committed_position, 5);
  EXPECT_FALSE(second.result().ended);
  EXPECT_TRUE(last.result().ended);
  ExpectAtRest(0);
}

TEST_F(BatcherTest, AnEndThatOwesNothingNeedsNoStep) {
  Make();
  const std::shared_ptr<Lane> lane = batcher_->OpenLane(0);
  const Call first = Send(lane, RandomInput(1, 3));
  RunAll();
  const Call last = Send(lane, {}, EndOfSequence());
  RunAll();
  EXPECT_TRUE(last.status().ok());
  EXPECT_TRUE(last.result().ended);
  EXPECT_EQ(last.result().output_position, 3);
  EXPECT_EQ(last.result().output_tokens, 0);
  EXPECT_EQ(last.result().committed_position, 3);
  EXPECT_EQ(model_->launched().size(), 1u);
  ExpectAtRest(0);
}

TEST_F(BatcherTest, AnEmptySequenceOfALaggingModelNeedsNoStep) {
  Make({.lookahead = 3});
  const Call call = Send(batcher_->OpenLane(0), {}, EndOfSequence());
  RunAll();
  EXPECT_TRUE(call.status().ok());
  EXPECT_EQ(call.result().output_tokens, 0);
  EXPECT_TRUE(model_->launched().empty());
  ExpectAtRest(0);
}

TEST_F(BatcherTest, IdsAndHalfPrecisionGoThrough) {
  FakeModel tokens({.takes_tokens = true});
  Batcher batcher({}, &clock_, nullptr);
  batcher.AddModel(&tokens, 1);
  const std::vector<int64_t> ids = {5, 3, 7};
  std::vector<uint16_t> output(ids.size() * kOutputWidth);
  std::optional<WorkResult> result;
  auto work = std::make_unique<Work>();
  work->input = ids.data();
  work->input_dtype = DType::kInt64;
  work->tokens = 3;
  work->output = output.data();
  work->output_dtype = DType::kBFloat16;
  work->done = [&](const WorkResult& r) { result = r; };
  ASSERT_TRUE(batcher.Submit(batcher.OpenLane(0), &work, Batcher::WhenFull::kRefuse).ok());
  EXPECT_TRUE(batcher.RunOnce());
  ASSERT_TRUE(result.has_value() && result->status.ok());
  std::vector<float> values(output.size());
  ConvertElements(output.data(), DType::kBFloat16, values.data(), DType::kFloat32,
                  static_cast<int64_t>(values.size()));
  EXPECT_EQ(values, tokens.ExpectedOutput(ids));
}

struct StreamCase {
  int64_t lookahead;
  int max_steps_in_flight;
};
class BatcherStreamTest : public BatcherTest, public ::testing::WithParamInterface<StreamCase> {};

TEST_P(BatcherStreamTest, InterleavedStreamsInRandomChunksEqualTheWhole) {
  Make({.lookahead = GetParam().lookahead,
        .num_slots = 16,
        .max_step_tokens = 200,
        .max_steps_in_flight = GetParam().max_steps_in_flight},
       /*running_slots=*/3);
  std::mt19937 random(7);
  struct Stream {
    std::vector<float> input;
    int64_t sent = 0;
    bool ended = false;
    std::shared_ptr<Lane> lane;
    std::vector<Call> calls;
  };
  std::vector<Stream> streams(10);
  for (size_t i = 0; i < streams.size(); ++i) {
    streams[i].input = RandomInput(i, 1 + random() % 900);
    streams[i].lane = batcher_->OpenLane(0);
  }
  for (size_t open = streams.size(); open > 0;) {
    Stream& stream = streams[random() % streams.size()];
    if (stream.ended) continue;
    const int64_t left = static_cast<int64_t>(stream.input.size()) / kWidth - stream.sent;
    CallOptions options;
    const int64_t tokens = std::min<int64_t>(left, 1 + random() % (random() % 4 == 0 ? 300 : 20));
    stream.ended = tokens == left && (tokens == 0 || random() % 2 == 0);
    options.end_of_sequence = stream.ended;
    stream.calls.push_back(Send(stream.lane, Tokens(stream.input, stream.sent, tokens), std::move(options)));
    stream.sent += tokens;
    if (stream.ended) --open;
    if (random() % 3 == 0) batcher_->RunOnce();
  }
  RunAll();
  for (const Stream& stream : streams) {
    std::vector<float> joined;
    for (const Call& call : stream.calls) {
      EXPECT_EQ(call.result().output_position, static_cast<int64_t>(joined.size()) / kOutputWidth);
      const std::vector<float> part = call.output();
      joined.insert(joined.end(), part.begin(), part.end());
    }
    EXPECT_EQ(joined, model_->ExpectedOutput(stream.input));
  }
  ExpectAtRest(0);
}

INSTANTIATE_TEST_SUITE_P(Cases, BatcherStreamTest,
                         ::testing::Values(StreamCase{0, 1}, StreamCase{6, 1}, StreamCase{0, 2},
                                           StreamCase{6, 2}, StreamCase{100, 1}, StreamCase{100, 2}),
                         [](const auto& info) {
                           return absl::StrCat("Lookahead", info.param.lookahead, "InFlight",
                                               info.param.max_steps_in_flight);
                         });

// --- How steps are formed ---

TEST_F(BatcherTest, ALoneLaneGetsTheWholeStepInMultiplesOf64) {
  Make({.max_step_tokens = 200});
  const std::vector<float> input = RandomInput(1, 450);
  const Call call = Send(batcher_->OpenLane(0), input);
  RunAll();
  EXPECT_THAT(StepTokens(), ElementsAre(ElementsAre(192), ElementsAre(192), ElementsAre(66)));
  EXPECT_EQ(call.output(), model_->ExpectedOutput(input));
}

TEST_F(BatcherTest, TheFirstPassServesEverybodyAndTheRestIsSharedEvenly) {
  Make({.max_step_tokens = 1024});
  const Call a = Send(batcher_->OpenLane(0), RandomInput(1, 2000));
  const Call b = Send(batcher_->OpenLane(0), RandomInput(2, 10));
  const Call c = Send(batcher_->OpenLane(0), RandomInput(3, 2000));
  const Call d = Send(batcher_->OpenLane(0), RandomInput(4, 100));
  EXPECT_TRUE(batcher_->RunOnce());
  // First 64, 10, 64, 64; of the 822 that are left a third is 256, and then 36 go to d and 256 each to a and
  // c; of the 274 then left half is 128 each; the last 18 hold no multiple of 64.
  EXPECT_THAT(StepTokens(), ElementsAre(ElementsAre(448, 10, 448, 100)));
}

TEST_F(BatcherTest, AOneTokenLaneBesideALongPromptIsAnsweredWithinTwoSteps) {
  Make({.max_step_tokens = 256});
  const Call prompt = Send(batcher_->OpenLane(0), RandomInput(1, 10'000));
  EXPECT_TRUE(batcher_->RunOnce());
  const Call token = Send(batcher_->OpenLane(0), RandomInput(2, 1));
  EXPECT_TRUE(batcher_->RunOnce());
  EXPECT_TRUE(batcher_->RunOnce());
  EXPECT_TRUE(token.status().ok());
  EXPECT_FALSE(prompt.answered());
  RunAll();
  EXPECT_EQ(prompt.output(), model_->ExpectedOutput(RandomInput(1, 10'000)));
  EXPECT_EQ(token.output(), model_->ExpectedOutput(RandomInput(2, 1)));
}

TEST_F(BatcherTest, LanesTakeTurnsWhereRowsAreShort) {
  Make({.max_step_tokens = 128, .max_step_rows = 2}, 4);
  std::vector<Call> calls;
  for (int i = 0; i < 3; ++i) calls.push_back(Send(batcher_->OpenLane(0), RandomInput(i, 128)));
  RunAll();
  std::vector<std::vector<int32_t>> slots;
  for (const std::vector<StepRow>& rows : model_->launched()) {
    slots.emplace_back();
    for (const StepRow& row : rows) slots.back().push_back(row.work_slot);
  }
  EXPECT_THAT(slots, ElementsAre(ElementsAre(0, 1), ElementsAre(2, 0), ElementsAre(1, 2)));
  for (int i = 0; i < 3; ++i) EXPECT_EQ(calls[i].output(), model_->ExpectedOutput(RandomInput(i, 128)));
}

TEST_F(BatcherTest, AWorkThatDoesNotFitKeepsItsPlaceAndAShorterOneGoes) {
  Make({.max_step_tokens = 100});
  const Call first = Send(batcher_->OpenLane(0), RandomInput(1, 60));
  const Call second = Send(batcher_->OpenLane(0), RandomInput(2, 60));
  const Call third = Send(batcher_->OpenLane(0), RandomInput(3, 40));
  const Call fourth = Send(batcher_->OpenLane(0), RandomInput(4, 60));
  EXPECT_TRUE(batcher_->RunOnce());
  EXPECT_TRUE(first.answered());
  EXPECT_FALSE(second.answered());
  EXPECT_TRUE(third.answered());
  EXPECT_TRUE(batcher_->RunOnce());
  EXPECT_TRUE(second.answered());
  EXPECT_FALSE(fourth.answered());
  RunAll();
  EXPECT_THAT(StepTokens(), ElementsAre(ElementsAre(60, 40), ElementsAre(60), ElementsAre(60)));
}

// 16 tokens or fewer that are left over go along with the piece before them.
TEST_F(BatcherTest, AShortTailIsNeverARowOfItsOwn) {
  struct Case {
    int64_t max_step_tokens, lookahead, tokens;
    std::vector<int64_t> rows;
  };
  for (const Case& c :
       {Case{80, 0, 16, {16}}, Case{80, 0, 64, {64}}, Case{80, 0, 65, {65}}, Case{80, 0, 80, {80}},
        Case{80, 0, 81, {64, 17}}, Case{80, 0, 128, {64, 64}}, Case{80, 0, 133, {64, 69}},
        Case{80, 0, 144, {64, 80}}, Case{80, 0, 145, {64, 64, 17}},
        // Where the step has no room for both, the cut is 64 earlier.
        Case{128, 0, 129, {64, 65}}, Case{128, 0, 144, {64, 80}}, Case{128, 0, 145, {128, 17}},
        Case{192, 0, 192, {192}}, Case{192, 0, 193, {128, 65}}, Case{200, 0, 200, {200}},
        Case{200, 0, 208, {128, 80}}, Case{200, 0, 209, {192, 17}},
        // Flush tokens count.
        Case{80, 6, 60, {66}}, Case{80, 6, 74, {80}}, Case{80, 6, 75, {64, 17}},
        Case{128, 6, 123, {64, 65}}}) {
    SCOPED_TRACE(
        absl::StrCat(c.tokens, " tokens, look-ahead ", c.lookahead, ", steps of ", c.max_step_tokens));
    Make({.lookahead = c.lookahead, .max_step_tokens = c.max_step_tokens});
    const std::vector<float> input = RandomInput(1, c.tokens);
    const Call call = Send(batcher_->OpenLane(0), input, EndOfSequence());
    RunAll();
    std::vector<int64_t> rows;
    for (const std::vector<int64_t>& step : StepTokens()) rows.insert(rows.end(), step.begin(), step.end());
    EXPECT_EQ(rows, c.rows);
    EXPECT_EQ(call.output(), model_->ExpectedOutput(input));
  }
}

// The rows of a work, whatever it shares its steps with, are of more than 16 tokens and at multiples of 64,
// or it has one.
TEST_F(BatcherTest, CutsAreAsTheWorkAloneWouldAllow) {
  std::mt19937 random(3);
  const auto tokens = [&] {
    constexpr int64_t kNear[] = {0, 64, 64, 128, 192, 320};
    return std::max<int64_t>(1, kNear[random() % 6] + static_cast<int64_t>(random() % 36) - 17);
  };
  for (const int64_t max_step_tokens : {80, 100, 128, 192, 256, 500}) {
    SCOPED_TRACE(max_step_tokens);
    Make({.num_slots = 40, .max_step_tokens = max_step_tokens}, 40,
         {.piece_tokens = static_cast<int64_t>(64 * (1 + random() % 3))});
    std::vector<Call> calls;
    for (int i = 0; i < 40; ++i) {
      calls.push_back(Send(batcher_->OpenLane(0), RandomInput(i, tokens()), EndOfSequence()));
      if (random() % 4 == 0) batcher_->RunOnce();
    }
    RunAll();
    const auto launched = model_->launched();
    std::map<int32_t, std::vector<const StepRow*>> open;  // By slot.
    int64_t checked = 0;
    for (const std::vector<StepRow>& rows : launched) {
      for (const StepRow& row : rows) {
        std::vector<const StepRow*>& work = open[row.work_slot];
        EXPECT_EQ(row.position % 64, 0);
        work.push_back(&row);
        if (row.position + row.tokens < row.end) continue;
        for (const StepRow* piece : work)
          EXPECT_TRUE(work.size() == 1 || piece->tokens > 16) << piece->tokens;
        work.clear();
        ++checked;
      }
    }
    EXPECT_EQ(checked, 40);
    for (int i = 0; i < 40; ++i) EXPECT_TRUE(calls[i].status().ok());
  }
}

TEST_F(BatcherTest, AtMostOneWorkOfALaneIsInAStep) {
  Make();
  const std::shared_ptr<Lane> lane = batcher_->OpenLane(0);
  const std::vector<float> input = RandomInput(1, 3);
  std::vector<Call> calls;
  for (int i = 0; i < 3; ++i) calls.push_back(Send(lane, Tokens(input, i, 1)));
  EXPECT_EQ(batcher_->pending(lane), 3);
  RunAll();
  EXPECT_THAT(StepTokens(), ElementsAre(ElementsAre(1), ElementsAre(1), ElementsAre(1)));
  EXPECT_EQ(batcher_->committed_position(lane), 3);
}

TEST_F(BatcherTest, WorkQueuesForSlotsAndWhatRunsGoesFirst) {
  Make({.num_slots = 2, .max_step_tokens = 128}, /*running_slots=*/2);
  std::vector<std::vector<float>> inputs;
  std::vector<Call> calls;
  for (int i = 0; i < 5; ++i) {
    inputs.push_back(RandomInput(i, 150));
    calls.push_back(Send(batcher_->OpenLane(0), inputs[i], EndOfSequence()));
  }
  EXPECT_TRUE(batcher_->RunOnce());
  EXPECT_EQ(batcher_->free_slots(0), 0);
  EXPECT_TRUE(batcher_->RunOnce());
  EXPECT_TRUE(batcher_->RunOnce());
  EXPECT_TRUE(calls[0].answered());
  EXPECT_TRUE(calls[1].answered());
  RunAll();
  for (int i = 0; i < 5; ++i) EXPECT_EQ(calls[i].output(), model_->ExpectedOutput(inputs[i]));
  ExpectAtRest(0);
}

TEST_F(BatcherTest, WhereSessionsHoldEverySlotWorkFailsInsteadOfWaitingForEver) {
  Make({.num_slots = 2}, /*running_slots=*/1);
  EXPECT_EQ(batcher_->max_sessions(0), 1);
  const std::shared_ptr<Lane> a = batcher_->OpenLane(0);
  const std::shared_ptr<Lane> b = batcher_->OpenLane(0);
  Send(a, RandomInput(1, 1));
  Send(b, RandomInput(2, 1));
  RunAll();
  EXPECT_EQ(batcher_->free_slots(0), 0);
  const Call call = Send(a, RandomInput(3, 1));
  RunAll();
  ExpectError(call.status(), absl::StatusCode::kResourceExhausted, reason::kSessionsFull, 1);
  batcher_->Close(b);
  const Call again = Send(a, RandomInput(3, 1), Expecting(1));
  RunAll();
  EXPECT_TRUE(again.status().ok());
  ExpectAtRest(1);
}

// --- Commit ---

TEST_F(BatcherTest, AnErrorInTheSecondPieceLeavesTheLaneWhereItWas) {
  Make({.max_step_tokens = 80});
  const std::vector<float> input = RandomInput(1, 210);
  const std::vector<float> expected = model_->ExpectedOutput(input);
  const std::shared_ptr<Lane> lane = batcher_->OpenLane(0);
  const Call first = Send(lane, Tokens(input, 0, 10));
  RunAll();
  model_->FailRow(2, 0);
  const Call lost = Send(lane, Tokens(input, 10, 200));
  RunAll();
  ExpectError(lost.status(), absl::StatusCode::kInternal, reason::kNonFinite, 10);
  EXPECT_EQ(lost.result().committed_position, 10);
  EXPECT_EQ(lost.result().output_tokens, 0);
  EXPECT_EQ(batcher_->committed_position(lane), 10);
  ExpectAtRest(1);

  const Call blind = Send(lane, Tokens(input, 10, 200));
  RunAll();
  ExpectError(blind.status(), absl::StatusCode::kFailedPrecondition, reason::kSessionOutOfStep, 10);
  const Call again = Send(lane, Tokens(input, 10, 200), Expecting(10));
  RunAll();
  EXPECT_TRUE(again.status().ok()) << again.status();
  EXPECT_EQ(again.output(), Rows(expected, 10, 200));
  ExpectAtRest(1);
}

TEST_F(BatcherTest, AFreshLaneIsFreshAgainAfterAnError) {
  Make({.max_step_tokens = 80});
  model_->FailRow(1, 0);
  const std::shared_ptr<Lane> lane = batcher_->OpenLane(0);
  Send(lane, RandomInput(9, 100));
  RunAll();
  ExpectAtRest(0);
  const std::vector<float> input = RandomInput(1, 100);
  const Call again = Send(lane, input, Expecting(0));
  RunAll();
  EXPECT_EQ(again.output(), model_->ExpectedOutput(input));
}

TEST_F(BatcherTest, ChunksPipelinedBehindALostOneAreRefusedUntilOneSaysThePosition) {
  Make();
  const std::vector<float> input = RandomInput(1, 8);
  const std::vector<float> expected = model_->ExpectedOutput(input);
  const std::shared_ptr<Lane> lane = batcher_->OpenLane(0);
  const Call first = Send(lane, Tokens(input, 0, 2));
  model_->FailRow(1, 0);
  const Call lost = Send(lane, Tokens(input, 2, 2));
  const Call behind = Send(lane, Tokens(input, 4, 2));
  const Call further = Send(lane, Tokens(input, 6, 2), Expecting(6));
  const Call resent = Send(lane, Tokens(input, 2, 2), Expecting(2));
  const Call on = Send(lane, Tokens(input, 4, 4));
  RunAll();
  EXPECT_TRUE(first.status().ok());
  ExpectError(lost.status(), absl::StatusCode::kInternal, reason::kNonFinite, 2);
  ExpectError(behind.status(), absl::StatusCode::kFailedPrecondition, reason::kSessionOutOfStep, 2);
  ExpectError(further.status(), absl::StatusCode::kFailedPrecondition, reason::kPositionMismatch, 2);
  EXPECT_EQ(resent.output(), Rows(expected, 2, 2));
  EXPECT_EQ(on.output(), Rows(expected, 4, 4));
  ExpectAtRest(1);
}

TEST_F(BatcherTest, AWrongExpectedPositionPutsTheLaneOutOfStep) {
  Make();
  const std::shared_ptr<Lane> lane = batcher_->OpenLane(0);
  const Call wrong = Send(lane, RandomInput(1, 2), Expecting(1));
  const Call behind = Send(lane, RandomInput(1, 2));
  RunAll();
  ExpectError(wrong.status(), absl::StatusCode::kFailedPrecondition, reason::kPositionMismatch, 0);
  EXPECT_THAT(std::string(wrong.status().message()),
              HasSubstr("expected_position is 1, the session stands at 0"));
  ExpectError(behind.status(), absl::StatusCode::kFailedPrecondition, reason::kSessionOutOfStep, 0);
  EXPECT_TRUE(model_->launched().empty());
  ExpectAtRest(0);
}

TEST_F(BatcherTest, ABadMessageTakesItsPlaceInTheOrder) {
  Make();
  const std::shared_ptr<Lane> lane = batcher_->OpenLane(0);
  const Call good = Send(lane, RandomInput(1, 2));
  CallOptions bad_options;
  bad_options.precondition =
      MakeError(absl::StatusCode::kInvalidArgument, reason::kInvalidRequest, "input has width 2, want 3");
  const Call bad = Send(lane, {}, std::move(bad_options));
  const Call behind = Send(lane, RandomInput(2, 2));
  EXPECT_EQ(batcher_->queued_works(), 3);
  EXPECT_EQ(batcher_->queued_tokens(), 4);
  EXPECT_TRUE(batcher_->RunOnce());
  EXPECT_TRUE(good.status().ok());
  EXPECT_FALSE(bad.answered());
  RunAll();
  ExpectError(bad.status(), absl::StatusCode::kInvalidArgument, reason::kInvalidRequest, 2);
  ExpectError(behind.status(), absl::StatusCode::kFailedPrecondition, reason::kSessionOutOfStep, 2);
  ExpectAtRest(1);
}

TEST_F(BatcherTest, AFailedRowTouchesNoNeighbour) {
  Make();
  model_->FailRow(0, 1);
  const std::vector<float> input = RandomInput(1, 5);
  const Call a = Send(batcher_->OpenLane(0), input, EndOfSequence());
  const Call b = Send(batcher_->OpenLane(0), input, EndOfSequence());
  const Call c = Send(batcher_->OpenLane(0), input, EndOfSequence());
  RunAll();
  EXPECT_EQ(a.output(), model_->ExpectedOutput(input));
  ExpectError(b.status(), absl::StatusCode::kInternal, reason::kNonFinite, 0);
  EXPECT_EQ(c.output(), model_->ExpectedOutput(input));
  ExpectAtRest(0);
}

class BatcherStepFailureTest : public BatcherTest, public ::testing::WithParamInterface<bool> {};

TEST_P(BatcherStepFailureTest, AFailedStepFailsItsWorksAndNothingElse) {
  Make({.max_step_rows = 2}, /*running_slots=*/4);
  const std::vector<float> input = RandomInput(1, 6);
  const std::vector<float> expected = model_->ExpectedOutput(input);
  std::vector<std::shared_ptr<Lane>> lanes;
  for (int i = 0; i < 3; ++i) {
    lanes.push_back(batcher_->OpenLane(0));
    Send(lanes[i], Tokens(input, 0, 2));
  }
  RunAll();
  const absl::Status failure = absl::ResourceExhaustedError("out of device memory");
  if (GetParam()) {
    model_->FailLaunch(2, failure);
  } else {
    model_->FailWait(2, failure);
  }
  std::vector<Call> calls;
  for (int i = 0; i < 3; ++i) calls.push_back(Send(lanes[i], Tokens(input, 2, 2)));
  RunAll();
  ExpectError(calls[0].status(), absl::StatusCode::kResourceExhausted, "RESOURCE_EXHAUSTED", 2);
  ExpectError(calls[1].status(), absl::StatusCode::kResourceExhausted, "RESOURCE_EXHAUSTED", 2);
  EXPECT_EQ(calls[2].output(), Rows(expected, 2, 2));
  ExpectAtRest(3);
  const Call again = Send(lanes[0], Tokens(input, 2, 4), Expecting(2));
  RunAll();
  EXPECT_EQ(again.output(), Rows(expected, 2, 4));
}

INSTANTIATE_TEST_SUITE_P(Where, BatcherStepFailureTest, ::testing::Bool(),
                         [](const auto& info) { return info.param ? "Launch" : "Wait"; });

TEST_P(BatcherStepFailureTest, ALostDeviceFailsAllWorkNowAndLater) {
  Make({.max_step_rows = 1, .max_steps_in_flight = 2}, /*running_slots=*/4);
  const std::vector<float> input = RandomInput(1, 4);
  const std::shared_ptr<Lane> lane = batcher_->OpenLane(0);
  Send(lane, Tokens(input, 0, 2));
  RunAll();
  const absl::Status lost = absl::DataLossError("CUDA: an illegal memory access");
  for (int step = 1; step <= 2; ++step) {
    if (GetParam()) {
      model_->FailLaunch(step, lost);
    } else {
      model_->FailWait(step, lost);
    }
  }
  const Call failing = Send(lane, Tokens(input, 2, 2));
  const Call behind = Send(lane, Tokens(input, 2, 2));
  CallOptions options;
  options.then = [&](const WorkResult&) { EXPECT_EQ(recorder_.losses.size(), 1u); };
  const Call in_flight = Send(batcher_->OpenLane(0), Tokens(input, 0, 2), std::move(options));
  const Call queued = Send(batcher_->OpenLane(0), Tokens(input, 0, 2));
  RunAll();
  for (const Call* call : {&failing, &behind}) {
    ExpectError(call->status(), absl::StatusCode::kInternal, reason::kInternal, 2);
  }
  for (const Call* call : {&in_flight, &queued}) {
    ExpectError(call->status(), absl::StatusCode::kInternal, reason::kInternal, 0);
    EXPECT_THAT(std::string(call->status().message()), HasSubstr("the device is lost"));
  }
  const Call later = Send(lane, Tokens(input, 2, 2), Expecting(2));
  ExpectError(later.submitted(), absl::StatusCode::kInternal, reason::kInternal, 2);
  ASSERT_EQ(recorder_.losses.size(), 1u);
  EXPECT_EQ(recorder_.losses[0], lost);
  ExpectAtRest(1);
}

TEST_F(BatcherTest, AStepThatIsRefusedIsOurFault) {
  Make({.takes_tokens = true});  // But the calls send values.
  const Call call = Send(batcher_->OpenLane(0), RandomInput(1, 2));
  RunAll();
  ExpectError(call.status(), absl::StatusCode::kInternal, reason::kInternal, 0);
  ExpectAtRest(0);
}

// --- Deadlines, cancellation, the end of a lane ---

TEST_F(BatcherTest, ADeadlineHoldsToTheTick) {
  Make();
  const auto run = [&](absl::Duration waited) {
    CallOptions options;
    options.deadline = clock_.Now() + absl::Seconds(1);
    const Call call = Send(batcher_->OpenLane(0), RandomInput(1, 2), std::move(options));
    clock_.Advance(waited);
    RunAll();
    return call.result();
  };
  EXPECT_TRUE(run(absl::Seconds(1) - kTick).status.ok());
  const WorkResult late = run(absl::Seconds(1));
  ExpectError(late.status, absl::StatusCode::kDeadlineExceeded, reason::kDeadline, 0);
  EXPECT_EQ(late.queued, absl::Seconds(1));
  EXPECT_EQ(model_->launched().size(), 1u);
  ExpectAtRest(0);
}

TEST_F(BatcherTest, ADeadlineIsLookedAtBetweenPieces) {
  Make({.max_step_tokens = 80});
  const std::shared_ptr<Lane> lane = batcher_->OpenLane(0);
  model_->OnLaunch([&](int64_t) { clock_.Advance(absl::Seconds(1)); });
  CallOptions options;
  options.deadline = clock_.Now() + absl::Seconds(2);
  const Call call = Send(lane, RandomInput(1, 200), std::move(options));
  const Call behind = Send(lane, RandomInput(1, 2));
  RunAll();
  ExpectError(call.status(), absl::StatusCode::kDeadlineExceeded, reason::kDeadline, 0);
  EXPECT_THAT(std::string(call.status().message()), HasSubstr("after 128 of 200 tokens"));
  ExpectError(behind.status(), absl::StatusCode::kFailedPrecondition, reason::kSessionOutOfStep, 0);
  EXPECT_EQ(call.result().computing, absl::Seconds(2));
  EXPECT_EQ(model_->launched().size(), 2u);
  ExpectAtRest(0);
}

TEST_F(BatcherTest, WhatIsComputedBeforeItsDeadlineWasSeenIsDelivered) {
  Make();
  model_->OnLaunch([&](int64_t) { clock_.Advance(absl::Seconds(1)); });
  CallOptions options;
  options.deadline = clock_.Now() + absl::Seconds(1);
  const Call call = Send(batcher_->OpenLane(0), RandomInput(1, 2), std::move(options));
  RunAll();
  EXPECT_TRUE(call.status().ok());
}

TEST_F(BatcherTest, CancelledWhileQueued) {
  Make();
  const auto cancellation = std::make_shared<Cancellation>();
  CallOptions options;
  options.cancellation = cancellation;
  const Call call = Send(batcher_->OpenLane(0), RandomInput(1, 2), std::move(options));
  cancellation->cancelled = true;
  RunAll();
  ExpectError(call.status(), absl::StatusCode::kCancelled, reason::kCancelled, 0);
  EXPECT_TRUE(model_->launched().empty());
  ExpectAtRest(0);
}

TEST_F(BatcherTest, CancelledBetweenPieces) {
  Make({.max_step_tokens = 80});
  const auto cancellation = std::make_shared<Cancellation>();
  CallOptions options;
  options.cancellation = cancellation;
  const std::vector<float> input = RandomInput(1, 200);
  const std::shared_ptr<Lane> lane = batcher_->OpenLane(0);
  const Call call = Send(lane, input, std::move(options));
  model_->OnLaunch([&](int64_t step) {
    if (step == 1) cancellation->cancelled = true;
  });
  RunAll();
  ExpectError(call.status(), absl::StatusCode::kCancelled, reason::kCancelled, 0);
  EXPECT_EQ(model_->launched().size(), 2u);
  ExpectAtRest(0);
  const Call again = Send(lane, input, Expecting(0));
  RunAll();
  EXPECT_EQ(again.output(), model_->ExpectedOutput(input));
}

TEST_F(BatcherTest, ClosingALaneAtRestFreesItsSlotAtOnce) {
  Make();
  const std::shared_ptr<Lane> lane = batcher_->OpenLane(0);
  Send(lane, RandomInput(1, 2));
  RunAll();
  ExpectAtRest(1);
  batcher_->Close(lane);
  batcher_->Close(lane);
  ExpectAtRest(0);
  EXPECT_EQ(batcher_->committed_position(lane), 2);
  const Call call = Send(lane, RandomInput(1, 2));
  ExpectError(call.submitted(), absl::StatusCode::kNotFound, reason::kSessionEnded, 2);
}

TEST_F(BatcherTest, ClosingALaneFailsWhatIsQueued) {
  Make();
  const std::shared_ptr<Lane> lane = batcher_->OpenLane(0);
  Send(lane, RandomInput(1, 2));
  RunAll();
  const Call a = Send(lane, RandomInput(1, 2));
  const Call b = Send(lane, RandomInput(1, 2));
  batcher_->Close(lane);
  RunAll();
  ExpectError(a.status(), absl::StatusCode::kCancelled, reason::kSessionEnded, 2);
  ExpectError(b.status(), absl::StatusCode::kCancelled, reason::kSessionEnded, 2);
  EXPECT_EQ(model_->launched().size(), 1u);
  ExpectAtRest(0);
}

class BatcherCloseTest : public BatcherTest, public ::testing::WithParamInterface<int64_t> {};

TEST_P(BatcherCloseTest, ClosingGivesUpRunningWorkAtTheNextPiece) {
  Make({.max_step_tokens = 80});
  const std::shared_ptr<Lane> lane = batcher_->OpenLane(0);
  Send(lane, RandomInput(1, 5));
  RunAll();
  const Call call = Send(lane, RandomInput(1, 100));
  const Call behind = Send(lane, RandomInput(1, 2));
  model_->OnLaunch([&](int64_t step) {
    if (step == GetParam()) batcher_->Close(lane);
  });
  RunAll();
  ExpectError(call.status(), absl::StatusCode::kCancelled, reason::kSessionEnded, 5);
  ExpectError(behind.status(), absl::StatusCode::kCancelled, reason::kSessionEnded, 5);
  EXPECT_EQ(static_cast<int64_t>(model_->launched().size()), GetParam() + 1);
  ExpectAtRest(0);
}

INSTANTIATE_TEST_SUITE_P(DuringPiece, BatcherCloseTest, ::testing::Values(1, 2),
                         [](const auto& info) { return info.param == 1 ? "First" : "Last"; });

TEST_F(BatcherTest, NothingFollowsTheEndOfASequence) {
  Make();
  const std::shared_ptr<Lane> lane = batcher_->OpenLane(0);
  const Call end = Send(lane, RandomInput(1, 2), EndOfSequence());
  const Call behind = Send(lane, RandomInput(1, 2));
  RunAll();
  EXPECT_TRUE(end.result().ended);
  ExpectError(behind.status(), absl::StatusCode::kNotFound, reason::kSessionEnded, 2);
  const Call late = Send(lane, RandomInput(1, 2));
  ExpectError(late.submitted(), absl::StatusCode::kNotFound, reason::kSessionEnded, 2);
  ExpectAtRest(0);
}

TEST_F(BatcherTest, ALaneWhoseEndFailedHasNotEnded) {
  Make();
  const std::vector<float> input = RandomInput(1, 4);
  const std::shared_ptr<Lane> lane = batcher_->OpenLane(0);
  model_->FailRow(0, 0);
  const Call end = Send(lane, input, EndOfSequence());
  RunAll();
  EXPECT_FALSE(end.result().ended);
  CallOptions options = EndOfSequence();
  options.expected_position = 0;
  const Call again = Send(lane, input, std::move(options));
  RunAll();
  EXPECT_TRUE(again.result().ended);
  EXPECT_EQ(again.output(), model_->ExpectedOutput(input));
}

// --- Admission, draining, destruction ---

TEST_F(BatcherTest, TheQueueRefusesAtItsLimitOfWorks) {
  Make({}, 4, {.piece_tokens = 64, .max_queued_works = 2});
  const auto unary = [&] {
    CallOptions options;
    options.when_full = Batcher::WhenFull::kRefuse;
    return Send(batcher_->OpenLane(0), RandomInput(1, 1), std::move(options));
  };
  const Call a = unary();
  const Call b = unary();
  const Call c = unary();
  ExpectError(c.submitted(), absl::StatusCode::kUnavailable, reason::kQueueFull, 0);
  const Call stream = Send(batcher_->OpenLane(0), RandomInput(1, 1));
  EXPECT_EQ(batcher_->queued_works(), 3);
  RunAll();
  EXPECT_TRUE(a.status().ok() && b.status().ok() && stream.status().ok());
  EXPECT_FALSE(c.answered());
  EXPECT_TRUE(unary().submitted().ok());
  RunAll();
  ExpectAtRest(0);
}

TEST_F(BatcherTest, WorksThatComeTogetherAreTakenTogetherOrNotAtAll) {
  Make({}, 4, {.piece_tokens = 64, .max_queued_works = 2});
  const std::vector<float> input = RandomInput(1, 1);
  std::vector<float> output(8);
  int answered = 0;
  std::vector<std::shared_ptr<Lane>> lanes;
  std::vector<std::unique_ptr<Work>> works;
  for (int i = 0; i < 3; ++i) {
    lanes.push_back(batcher_->OpenLane(0));
    auto work = std::make_unique<Work>();
    work->input = input.data();
    work->tokens = 1;
    work->output = output.data();
    work->done = [&](const WorkResult& result) { answered += result.status.ok() ? 1 : 0; };
    works.push_back(std::move(work));
  }
  ExpectError(batcher_->SubmitAll(lanes, absl::MakeSpan(works), Batcher::WhenFull::kRefuse),
              absl::StatusCode::kUnavailable, reason::kQueueFull, 0);
  batcher_->Close(lanes[1]);
  ExpectError(batcher_->SubmitAll(lanes, absl::MakeSpan(works), Batcher::WhenFull::kQueue),
              absl::StatusCode::kNotFound, reason::kSessionEnded, 0);
  EXPECT_EQ(batcher_->queued_works(), 0);
  for (const std::unique_ptr<Work>& work : works) EXPECT_NE(work, nullptr);

  lanes.erase(lanes.begin() + 1);
  works.pop_back();
  ASSERT_TRUE(batcher_->SubmitAll(lanes, absl::MakeSpan(works), Batcher::WhenFull::kRefuse).ok());
  EXPECT_EQ(batcher_->queued_works(), 2);
  EXPECT_TRUE(batcher_->RunOnce());
  EXPECT_EQ(answered, 2) << "one step has both";
}

TEST_F(BatcherTest, TheQueueRefusesAtItsLimitOfTokens) {
  Make({.max_step_tokens = 80}, 4, {.piece_tokens = 64, .max_queued_tokens = 100});
  const auto unary = [&](int64_t tokens) {
    CallOptions options = EndOfSequence();
    options.when_full = Batcher::WhenFull::kRefuse;
    return Send(batcher_->OpenLane(0), RandomInput(1, tokens), std::move(options));
  };
  const Call a = unary(99);
  const Call b = unary(30);  // One token was free.
  EXPECT_EQ(batcher_->queued_tokens(), 129);
  const Call c = unary(1);
  ExpectError(c.submitted(), absl::StatusCode::kUnavailable, reason::kQueueFull, 0);
  EXPECT_TRUE(batcher_->RunOnce());
  EXPECT_EQ(batcher_->queued_tokens(), 65);
  EXPECT_EQ(batcher_->queued_works(), 1);
  EXPECT_TRUE(unary(1).submitted().ok());
  RunAll();
  ExpectAtRest(0);
}

TEST_F(BatcherTest, DrainingRefusesNewWorkAndFinishesTheRest) {
  Make();
  const Call before = Send(batcher_->OpenLane(0), RandomInput(1, 2), EndOfSequence());
  batcher_->StartDraining();
  const Call after = Send(batcher_->OpenLane(0), RandomInput(1, 2));
  ExpectError(after.submitted(), absl::StatusCode::kUnavailable, reason::kDraining, 0);
  EXPECT_FALSE(batcher_->WaitUntilIdle(clock_.Now()));
  RunAll();
  EXPECT_TRUE(before.status().ok());
  EXPECT_TRUE(batcher_->WaitUntilIdle(clock_.Now()));
}

TEST_F(BatcherTest, DestructionFinishesWhatIsInFlightAndFailsWhatIsLeft) {
  Make({.max_step_tokens = 80, .max_steps_in_flight = 2});
  const std::shared_ptr<Lane> lane = batcher_->OpenLane(0);
  const Call running = Send(batcher_->OpenLane(0), RandomInput(1, 200));
  const Call finishing = Send(lane, RandomInput(2, 20));
  const Call behind = Send(lane, RandomInput(3, 2));
  const Call queued = Send(batcher_->OpenLane(0), RandomInput(4, 63));
  EXPECT_TRUE(batcher_->RunOnce());
  EXPECT_TRUE(batcher_->RunOnce());
  EXPECT_FALSE(finishing.answered());
  batcher_.reset();
  EXPECT_EQ(finishing.output(), model_->ExpectedOutput(RandomInput(2, 20)));
  ExpectError(running.status(), absl::StatusCode::kUnavailable, reason::kDraining, 0);
  ExpectError(behind.status(), absl::StatusCode::kUnavailable, reason::kDraining, 20);
  ExpectError(queued.status(), absl::StatusCode::kUnavailable, reason::kDraining, 0);
}  // And `lane` outlives the batcher, with its slot.

TEST_F(BatcherTest, WorkSubmittedFromDoneDuringDestructionIsRefused) {
  Make();
  Batcher* const batcher = batcher_.get();
  const std::shared_ptr<Lane> lane = batcher->OpenLane(0);
  std::optional<absl::Status> refused;
  CallOptions options;
  options.then = [&](const WorkResult&) { refused = Call(batcher, 0, lane, RandomInput(1, 1)).submitted(); };
  Send(lane, RandomInput(1, 1), std::move(options));
  batcher_.reset();
  ASSERT_TRUE(refused.has_value());
  ExpectError(*refused, absl::StatusCode::kUnavailable, reason::kDraining, 0);
}

TEST_F(BatcherTest, DoneMaySubmitTheNext) {
  Make();
  const std::vector<float> input = RandomInput(1, 5);
  const std::shared_ptr<Lane> lane = batcher_->OpenLane(0);
  std::vector<Call> calls;
  std::function<void(int64_t)> send = [&](int64_t position) {
    CallOptions options;
    options.then = [&, position](const WorkResult&) {
      if (position < 4) send(position + 1);
    };
    calls.push_back(Send(lane, Tokens(input, position, 1), std::move(options)));
  };
  send(0);
  RunAll();
  ASSERT_EQ(calls.size(), 5u);
  EXPECT_EQ(calls[4].output(), Rows(model_->ExpectedOutput(input), 4, 1));
}

TEST_F(BatcherTest, ADroppedLaneGivesItsSlotBackAndItsWorkIsDone) {
  Make();
  std::shared_ptr<Lane> lane = batcher_->OpenLane(0);
  const Call call = Send(lane, RandomInput(1, 2));
  lane.reset();
  RunAll();
  EXPECT_TRUE(call.status().ok());
  ExpectAtRest(0);
}

using BatcherDeathTest = BatcherTest;

TEST_F(BatcherDeathTest, AWorkWithoutTokensThatDoesNotEndIsACheck) {
  Make();
  EXPECT_DEATH(Send(batcher_->OpenLane(0), {}), "at least 1 token");
}

// --- Observation ---

TEST_F(BatcherTest, TimesAndStepsAreReported) {
  Make({.max_step_tokens = 80});
  model_->OnLaunch([&](int64_t) { clock_.Advance(absl::Milliseconds(10)); });
  const Call call = Send(batcher_->OpenLane(0), RandomInput(1, 100), EndOfSequence());
  clock_.Advance(absl::Milliseconds(3));
  RunAll();
  EXPECT_EQ(call.result().queued, absl::Milliseconds(3));
  EXPECT_EQ(call.result().computing, absl::Milliseconds(20));
  ASSERT_EQ(recorder_.steps.size(), 2u);
  EXPECT_EQ(recorder_.steps[0].rows, 1);
  EXPECT_EQ(recorder_.steps[0].tokens, 64);
  EXPECT_EQ(recorder_.steps[0].compute, absl::Milliseconds(10));
  EXPECT_EQ(recorder_.steps[1].tokens, 36);
  ASSERT_EQ(recorder_.works.size(), 1u);
  EXPECT_EQ(recorder_.works[0].first, 0);
  EXPECT_EQ(recorder_.works[0].second.output_tokens, 100);
}

// --- Two models ---

class TwoModelsTest : public ::testing::Test {
 protected:
  TwoModelsTest() {
    for (int i = 0; i < 2; ++i) {
      batcher_.AddModel(models_[i].get(), 4);
      models_[i]->OnLaunch([this, i](int64_t) {
        turns_.push_back(i);
        clock_.Advance(i == 0 ? absl::Seconds(1) : absl::Seconds(3));
      });
    }
  }

  FakeClock clock_;
  std::vector<int> turns_;
  std::unique_ptr<FakeModel> models_[2] = {
      std::make_unique<FakeModel>(FakeModelOptions{.max_step_tokens = 80}),
      std::make_unique<FakeModel>(
          FakeModelOptions{.output_width = 16, .lookahead = 2, .max_step_tokens = 80})};
  Batcher batcher_{{.piece_tokens = 64}, &clock_, nullptr};
};

TEST_F(TwoModelsTest, ShareTheDeviceByTime) {
  const std::vector<float> input = RandomInput(1, 64 * 12);
  const Call a(&batcher_, 0, batcher_.OpenLane(0), input);
  const Call b(&batcher_, 1, batcher_.OpenLane(1), input, EndOfSequence());
  while (!a.answered()) ASSERT_TRUE(batcher_.RunOnce());
  // Steps of a take 1 s, those of b 3 s.
  EXPECT_EQ(std::count(turns_.begin(), turns_.end(), 0), 12);
  EXPECT_EQ(std::count(turns_.begin(), turns_.end(), 1), 4);
  while (batcher_.RunOnce()) {
  }
  EXPECT_EQ(a.output(), models_[0]->ExpectedOutput(input));
  EXPECT_EQ(b.output(), models_[1]->ExpectedOutput(input));
}

TEST_F(TwoModelsTest, AModelThatWasIdleHasSavedNothingUp) {
  const Call a(&batcher_, 0, batcher_.OpenLane(0), RandomInput(1, 64 * 100));
  for (int i = 0; i < 50; ++i) ASSERT_TRUE(batcher_.RunOnce());
  const Call b(&batcher_, 1, batcher_.OpenLane(1), RandomInput(2, 64 * 100));
  turns_.clear();
  for (int i = 0; i < 8; ++i) ASSERT_TRUE(batcher_.RunOnce());
  // Not eight times 1.
  EXPECT_THAT(turns_, ElementsAre(1, 0, 0, 1, 0, 0, 0, 1));
}

// --- Two steps in flight ---

TEST_F(BatcherTest, TheNextPieceIsLaunchedBehindTheOneInFlight) {
  Make({.max_step_tokens = 80, .max_steps_in_flight = 2});
  const std::shared_ptr<Lane> lane = batcher_->OpenLane(0);
  const std::vector<float> input = RandomInput(1, 130);
  const Call first = Send(lane, Tokens(input, 0, 128));
  const Call second = Send(lane, Tokens(input, 128, 2));
  EXPECT_TRUE(batcher_->RunOnce());  // Launches a piece.
  EXPECT_TRUE(batcher_->RunOnce());  // Launches the next and waits for the first.
  EXPECT_EQ(model_->launched().size(), 2u);
  EXPECT_FALSE(first.answered());
  EXPECT_TRUE(batcher_->RunOnce());  // The next work only after the commit: nothing to launch, waits.
  EXPECT_EQ(model_->launched().size(), 2u);
  EXPECT_TRUE(first.answered());
  RunAll();
  EXPECT_EQ(model_->launched().size(), 3u);
  EXPECT_EQ(second.output(), Rows(model_->ExpectedOutput(input), 128, 2));
  ExpectAtRest(1);
}

TEST_F(BatcherTest, WorkWaitsForTheSlotOfAStepInFlight) {
  Make({.num_slots = 1, .max_steps_in_flight = 2}, /*running_slots=*/1);
  const Call a = Send(batcher_->OpenLane(0), RandomInput(1, 5), EndOfSequence());
  const Call b = Send(batcher_->OpenLane(0), RandomInput(2, 5), EndOfSequence());
  RunAll();
  EXPECT_EQ(a.output(), model_->ExpectedOutput(RandomInput(1, 5)));
  EXPECT_EQ(b.output(), model_->ExpectedOutput(RandomInput(2, 5)));
  ExpectAtRest(0);
}

TEST_F(BatcherTest, AWorkThatFailsInFlightIsAnsweredWhenNoStepHasItAnyMore) {
  Make({.max_step_tokens = 80, .max_steps_in_flight = 2});
  const std::vector<float> input = RandomInput(1, 300);
  const std::shared_ptr<Lane> lane = batcher_->OpenLane(0);
  model_->FailRow(0, 0);
  const Call call = Send(lane, input);
  EXPECT_TRUE(batcher_->RunOnce());
  EXPECT_TRUE(batcher_->RunOnce());  // The first piece has failed; the second is in flight.
  EXPECT_FALSE(call.answered());
  EXPECT_TRUE(batcher_->RunOnce());
  ExpectError(call.status(), absl::StatusCode::kInternal, reason::kNonFinite, 0);
  EXPECT_EQ(model_->launched().size(), 2u);
  ExpectAtRest(0);
  const Call again = Send(lane, input, Expecting(0));
  RunAll();
  EXPECT_EQ(again.output(), model_->ExpectedOutput(input));
}

TEST_F(BatcherTest, AFailedLaunchBehindAStepInFlight) {
  Make({.max_step_tokens = 80, .max_steps_in_flight = 2});
  const std::shared_ptr<Lane> lane = batcher_->OpenLane(0);
  model_->FailLaunch(1, absl::InternalError("no kernel"));
  const Call call = Send(lane, RandomInput(1, 300));
  RunAll();
  ExpectError(call.status(), absl::StatusCode::kInternal, "INTERNAL", 0);
  EXPECT_EQ(model_->launched().size(), 2u);
  ExpectAtRest(0);
}

TEST_F(BatcherTest, ClosedWithTwoPiecesInFlight) {
  Make({.max_step_tokens = 80, .max_steps_in_flight = 2});
  const std::shared_ptr<Lane> lane = batcher_->OpenLane(0);
  const Call call = Send(lane, RandomInput(1, 300));
  model_->OnLaunch([&](int64_t step) {
    if (step == 1) batcher_->Close(lane);
  });
  RunAll();
  ExpectError(call.status(), absl::StatusCode::kCancelled, reason::kSessionEnded, 0);
  EXPECT_EQ(model_->launched().size(), 2u);
  ExpectAtRest(0);
}

TEST_F(BatcherTest, TimesOfStepsThatOverlapAreNotCountedTwice) {
  Make({.max_step_tokens = 80, .max_steps_in_flight = 2});
  model_->OnLaunch([&](int64_t) { clock_.Advance(absl::Seconds(1)); });
  const Call call = Send(batcher_->OpenLane(0), RandomInput(1, 128));
  RunAll();
  EXPECT_EQ(call.result().computing, absl::Seconds(2));
}

// --- With the batch thread ---

TEST_F(BatcherTest, TheThreadRunsWhatComes) {
  Make();
  batcher_->Start();
  const std::vector<float> input = RandomInput(1, 500);
  const std::shared_ptr<Lane> lane = batcher_->OpenLane(0);
  std::vector<float> joined;
  for (int i = 0; i < 5; ++i) {
    const Call call = Send(lane, Tokens(input, i * 100, 100));
    EXPECT_TRUE(call.Wait().status.ok());
    const std::vector<float> part = call.output();
    joined.insert(joined.end(), part.begin(), part.end());
  }
  EXPECT_EQ(joined, model_->ExpectedOutput(input));
  EXPECT_TRUE(batcher_->WaitUntilIdle(absl::InfiniteFuture()));
  EXPECT_EQ(batcher_->pending(lane), 0);
}

TEST_F(BatcherTest, TheHeartbeatSaysSinceWhenTheThreadIsAtAStep) {
  Make({.max_step_tokens = 80});
  model_->Hold(0);
  batcher_->Start();
  clock_.WaitUntilBlocked(1);
  EXPECT_FALSE(batcher_->heartbeat().busy);
  clock_.Advance(absl::Seconds(5));
  const absl::Time begun = clock_.Now();
  const Call call = Send(batcher_->OpenLane(0), RandomInput(1, 2), EndOfSequence());
  model_->WaitUntilHeld(0);
  clock_.Advance(absl::Seconds(7));
  EXPECT_TRUE(batcher_->heartbeat().busy);
  EXPECT_EQ(batcher_->heartbeat().progress, begun);
  model_->Release(0);
  call.Wait();
  clock_.WaitUntilBlocked(1);
  EXPECT_FALSE(batcher_->heartbeat().busy);
  EXPECT_EQ(batcher_->heartbeat().progress, clock_.Now());
}

TEST_F(BatcherTest, TheThreadEndsAfterTheStepInFlight) {
  Make({.max_step_tokens = 80});
  model_->Hold(0);
  batcher_->Start();
  const Call finishing = Send(batcher_->OpenLane(0), RandomInput(1, 64));
  model_->WaitUntilHeld(0);
  const Call queued = Send(batcher_->OpenLane(0), RandomInput(1, 2));
  // The held step keeps the destructor from ending; it has begun once work is refused.
  Batcher* const batcher = batcher_.get();
  const std::shared_ptr<Lane> lane = batcher->OpenLane(0);
  Thread destroyer("destroyer", [&] { batcher_.reset(); });
  while (Call(batcher, 0, lane, RandomInput(1, 1)).submitted().ok()) {
  }
  model_->Release(0);
  destroyer.Join();
  EXPECT_EQ(finishing.output(), model_->ExpectedOutput(RandomInput(1, 64)));
  ExpectError(queued.status(), absl::StatusCode::kUnavailable, reason::kDraining, 0);
  EXPECT_EQ(model_->launched().size(), 1u);
}

TEST_F(BatcherTest, WaitUntilIdleEndsAtItsDeadline) {
  Make();
  model_->Hold(0);
  batcher_->Start();
  const Call call = Send(batcher_->OpenLane(0), RandomInput(1, 2));
  model_->WaitUntilHeld(0);
  bool idle = true;
  Thread waiter("waiter", [&] { idle = batcher_->WaitUntilIdle(clock_.Now() + absl::Seconds(1)); });
  clock_.WaitUntilTimedBlocked(1);
  clock_.Advance(absl::Seconds(1));
  waiter.Join();
  EXPECT_FALSE(idle);
  model_->Release(0);
  EXPECT_TRUE(batcher_->WaitUntilIdle(absl::InfiniteFuture()));
  EXPECT_TRUE(call.status().ok());
}

// Steps take 10 s; two lanes have been answered by the last one, and for a tenth of that the device waits for
// them.
class GatheringTest : public BatcherTest {
 protected:
  void SetUp() override {
    Make();
    model_->OnLaunch([this](int64_t) { clock_.Advance(absl::Seconds(10)); });
    a_ = batcher_->OpenLane(0);
    b_ = batcher_->OpenLane(0);
    model_->Hold(0);
    batcher_->Start();
    const Call first = Send(batcher_->OpenLane(0), RandomInput(1, 1), EndOfSequence());
    model_->WaitUntilHeld(0);
    const Call a = Send(a_, RandomInput(1, 1));
    const Call b = Send(b_, RandomInput(1, 1));
    model_->Release(0);
    a.Wait();
    b.Wait();
    clock_.WaitUntilTimedBlocked(1);
    ASSERT_EQ(model_->launched().size(), 2u);
  }

  std::shared_ptr<Lane> a_, b_;
};

TEST_F(GatheringTest, TheDeviceWaitsUntilAllHaveComeBack) {
  const Call a = Send(a_, RandomInput(1, 1));
  const Call other = Send(batcher_->OpenLane(0), RandomInput(1, 1));
  clock_.WaitUntilTimedBlocked(1);
  EXPECT_EQ(model_->launched().size(), 2u);
  const Call b = Send(b_, RandomInput(1, 1));
  a.Wait();
  EXPECT_EQ(model_->launched().size(), 3u);
  EXPECT_EQ(model_->launched()[2].size(), 3u);
  b.Wait();
  other.Wait();
}

TEST_F(GatheringTest, ButNotLongerThanTheFractionOfTheStep) {
  const Call a = Send(a_, RandomInput(1, 1));
  clock_.Advance(absl::Seconds(1) - kTick);
  clock_.WaitUntilTimedBlocked(1);
  EXPECT_FALSE(a.answered());
  clock_.Advance(kTick);
  EXPECT_TRUE(a.Wait().status.ok());
  EXPECT_EQ(model_->launched()[2].size(), 1u);
}

TEST_F(GatheringTest, AClosedLaneIsNotWaitedFor) {
  const Call a = Send(a_, RandomInput(1, 1));
  batcher_->Close(b_);
  EXPECT_TRUE(a.Wait().status.ok());
}

TEST_F(GatheringTest, WakeEndsTheWait) {
  const auto cancellation = std::make_shared<Cancellation>();
  CallOptions options;
  options.cancellation = cancellation;
  const Call a = Send(a_, RandomInput(1, 1), std::move(options));
  cancellation->cancelled = true;
  batcher_->Wake();
  ExpectError(a.Wait().status, absl::StatusCode::kCancelled, reason::kCancelled, 1);
}

TEST_F(BatcherTest, AStepThatIsFullIsNotHeldBack) {
  for (const int64_t lanes : {1, 16}) {
    SCOPED_TRACE(lanes);
    Make({.num_slots = 32}, /*running_slots=*/20);
    model_->OnLaunch([this](int64_t) { clock_.Advance(absl::Seconds(10)); });
    model_->Hold(0);
    batcher_->Start();
    const std::shared_ptr<Lane> answered = batcher_->OpenLane(0);
    const Call call = Send(answered, RandomInput(1, 1));
    model_->WaitUntilHeld(0);
    std::vector<Call> full;
    for (int64_t i = 0; i < lanes; ++i) {
      full.push_back(Send(batcher_->OpenLane(0), RandomInput(1, lanes == 1 ? 256 : 1), EndOfSequence()));
    }
    model_->Release(0);
    // While the clock stands: not after a tenth of the step.
    for (const Call& other : full) EXPECT_TRUE(other.Wait().status.ok());
    EXPECT_TRUE(call.answered());
    batcher_.reset();
  }
}

TEST_F(TwoModelsTest, OneIsNotHeldBackForClientsOfTheOther) {
  models_[0]->Hold(0);
  batcher_.Start();
  const std::shared_ptr<Lane> answered = batcher_.OpenLane(0);
  const Call call(&batcher_, 0, answered, RandomInput(1, 1));
  models_[0]->WaitUntilHeld(0);
  const Call other(&batcher_, 1, batcher_.OpenLane(1), RandomInput(1, 1), EndOfSequence());
  models_[0]->Release(0);
  EXPECT_TRUE(other.Wait().status.ok());  // While the clock stands.
  EXPECT_TRUE(call.answered());
}

// --- Stress ---

// Threads of clients over two models: streams in random chunks, pipelined, with deadlines, cancellations,
// closings and steps that fail. Every answer is checked against what the lane had committed.
class BatcherStressTest : public ::testing::TestWithParam<int> {};

TEST_P(BatcherStressTest, EveryAnswerIsRight) {
  constexpr int kThreads = 6;
  constexpr int kStreams = 300;
  std::unique_ptr<FakeModel> models[2];
  Batcher batcher({.piece_tokens = 64}, Clock::Real(), nullptr);
  for (int m = 0; m < 2; ++m) {
    models[m] = std::make_unique<FakeModel>(FakeModelOptions{.lookahead = m == 0 ? 0 : 5,
                                                             .num_slots = kThreads + 2,
                                                             .max_step_tokens = 128,
                                                             .max_step_rows = 4,
                                                             .max_steps_in_flight = GetParam()});
    batcher.AddModel(models[m].get(), 2);
    for (int64_t step = 5; step < 4000; step += 17) {
      switch (step % 3) {
        case 0:
          models[m]->FailLaunch(step, absl::InternalError("injected"));
          break;
        case 1:
          models[m]->FailWait(step, absl::InternalError("injected"));
          break;
        case 2:
          models[m]->FailRow(step, 0);
          break;
      }
    }
  }
  batcher.Start();

  std::atomic<int64_t> succeeded = 0, failed = 0;
  const auto client = [&](int thread) {
    std::mt19937 random(thread);
    for (int s = 0; s < kStreams; ++s) {
      const int m = static_cast<int>(random() % 2);
      const int64_t lookahead = models[m]->description().lookahead;
      const int64_t length = 1 + random() % 600;
      const std::vector<float> input = RandomInput(thread * 1000 + s, length);
      const std::vector<float> expected = models[m]->ExpectedOutput(input);
      const std::shared_ptr<Lane> lane = batcher.OpenLane(m);
      const bool closes = random() % 5 == 0;
      int64_t committed = 0;
      bool ended = false;
      for (int round = 0; !ended && round < 100; ++round) {
        // A burst: consecutive chunks from where the lane stands, the first of which says so.
        struct Sent {
          int64_t begin;
          int64_t tokens;
          Call call;
        };
        std::vector<Sent> burst;
        const auto cancellation = std::make_shared<Cancellation>();
        int64_t at = committed;
        bool end_sent = false;
        for (int i = 0; i < 1 + static_cast<int>(random() % 4) && !end_sent; ++i) {
          CallOptions options;
          if (i == 0) options.expected_position = committed;
          options.cancellation = cancellation;
          if (random() % 16 == 0)
            options.deadline = Clock::Real()->Now() + absl::Microseconds(random() % 500);
          const int64_t tokens = std::min<int64_t>(length - at, 1 + random() % 200);
          options.end_of_sequence = end_sent = at + tokens == length;
          burst.push_back(
              {at, tokens, Call(&batcher, m, lane, Tokens(input, at, tokens), std::move(options))});
          at += tokens;
        }
        if (random() % 8 == 0) {
          cancellation->cancelled = true;
          batcher.Wake();
        }
        if (closes && round == 2) batcher.Close(lane);
        bool in_step = true;
        for (const Sent& sent : burst) {
          if (!sent.call.submitted().ok()) {
            ASSERT_EQ(ErrorReason(sent.call.submitted()), reason::kSessionEnded);
            ended = true;
            continue;
          }
          const WorkResult result = sent.call.Wait();
          if (result.status.ok()) {
            ASSERT_TRUE(in_step) << "applied with a gap";
            ASSERT_EQ(sent.begin, committed);
            committed += sent.tokens;
            ASSERT_EQ(result.output_position, FirstOutputPosition(sent.begin, lookahead));
            ASSERT_EQ(sent.call.output(), Rows(expected, result.output_position, result.output_tokens));
            if (result.ended) {
              ASSERT_EQ(result.output_position + result.output_tokens, length);
            }
            ++succeeded;
          } else {
            in_step = false;
            ++failed;
            ASSERT_EQ(ErrorMetadata(result.status, "committed_position"), absl::StrCat(committed))
                << result.status;
          }
          ASSERT_EQ(result.committed_position, committed);
          ended = ended || result.ended || ErrorReason(result.status) == reason::kSessionEnded;
        }
      }
      batcher.Close(lane);
    }
  };
  {
    std::vector<Thread> threads;
    for (int t = 0; t < kThreads; ++t) threads.emplace_back("client", [&, t] { client(t); });
  }
  EXPECT_TRUE(batcher.WaitUntilIdle(absl::InfiniteFuture()));
  EXPECT_GT(succeeded, kThreads * kStreams);
  EXPECT_GT(failed, 10);
  EXPECT_EQ(batcher.queued_works(), 0);
  EXPECT_EQ(batcher.queued_tokens(), 0);
  for (int m = 0; m < 2; ++m) EXPECT_EQ(batcher.free_slots(m), kThreads + 2);
}

INSTANTIATE_TEST_SUITE_P(StepsInFlight, BatcherStressTest, ::testing::Values(1, 2));

}  // namespace
}  // namespace deltanet
