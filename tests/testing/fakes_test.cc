#include <cmath>
#include <cstdint>
#include <limits>
#include <set>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "model/base/mutex.h"
#include "server/executor.h"
#include "tests/testing/fake_clock.h"
#include "tests/testing/fake_model.h"
#include "tests/testing/max_error.h"

namespace deltanet {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

TEST(FakeClockTest, StandsStillUntilAdvanced) {
  FakeClock clock;
  const absl::Time start = clock.Now();
  EXPECT_EQ(clock.Now(), start);
  clock.Advance(absl::Nanoseconds(1));
  EXPECT_EQ(clock.Now(), start + absl::Nanoseconds(1));
}

TEST(FakeClockTest, AdvanceWakesAWaitAtItsDeadlineAndNotATickEarlier) {
  FakeClock clock;
  Mutex mutex;
  CondVar condition;
  bool woken = false;
  const absl::Time deadline = clock.Now() + absl::Seconds(1);
  Thread waiter("waiter", [&] {
    MutexLock lock(&mutex);
    while (clock.Now() < deadline) clock.WaitUntil(&condition, &mutex, deadline);
    woken = true;
  });
  clock.WaitUntilBlocked(1);
  clock.WaitUntilTimedBlocked(1);
  clock.Advance(absl::Seconds(1) - absl::Nanoseconds(1));
  clock.WaitUntilBlocked(1);
  {
    MutexLock lock(&mutex);
    EXPECT_FALSE(woken);
  }
  clock.Advance(absl::Nanoseconds(1));
  waiter.Join();
  EXPECT_TRUE(woken);
  clock.WaitUntilBlocked(0);
}

TEST(FakeClockTest, TellsWaitsWithoutADeadlineFromTimedOnes) {
  FakeClock clock;
  Mutex mutex;
  CondVar condition;
  bool go = false;
  Thread waiter("waiter", [&] {
    MutexLock lock(&mutex);
    while (!go) clock.WaitUntil(&condition, &mutex, absl::InfiniteFuture());
  });
  clock.WaitUntilBlocked(1);
  clock.WaitUntilTimedBlocked(0);
  clock.Advance(absl::Hours(1000));
  {
    MutexLock lock(&mutex);
    go = true;
  }
  condition.NotifyAll();
}

TEST(FakeClockTest, DoesNotBlockWhereTheDeadlineHasPassed) {
  FakeClock clock;
  Mutex mutex;
  CondVar condition;
  MutexLock lock(&mutex);
  clock.WaitUntil(&condition, &mutex, clock.Now());
}

// Runs one step to its end.
absl::StatusOr<StepResult> Step(FakeModel* model, const std::vector<StepRow>& rows) {
  const absl::StatusOr<StepTicket> ticket = model->Prepare(rows);
  if (!ticket.ok()) return ticket.status();
  if (const absl::Status status = model->Launch(*ticket); !status.ok()) return status;
  return model->Wait(*ticket);
}

StepRow Row(int32_t base, int32_t work, int64_t position, const std::vector<float>& input,
            std::vector<float>* output) {
  StepRow row;
  row.base_slot = base;
  row.work_slot = work;
  row.fresh = base < 0;
  row.position = position;
  row.tokens = static_cast<int64_t>(input.size());
  row.input = input.data();
  output->assign(8 * (input.size() + 8), std::numeric_limits<float>::quiet_NaN());
  row.output = output->data();
  return row;
}

FakeModelOptions Narrow() {
  FakeModelOptions options;
  options.input_width = 1;
  options.output_width = 8;
  options.num_slots = 4;
  return options;
}

std::vector<float> Slice(const std::vector<float>& values, size_t first_row, size_t rows) {
  return {values.begin() + 8 * first_row, values.begin() + 8 * (first_row + rows)};
}

TEST(MaxError, NothingHidesANaN) {
  const float want[] = {1, -5, 3};
  EXPECT_EQ(MaxError(want, want, 3), 0);
  EXPECT_EQ(MaxMagnitude(want, 3), 5);
  const double off[] = {1.5, -5, 0};
  EXPECT_EQ(MaxError(off, want, 3), 3);
  for (int i = 0; i < 3; ++i) {
    double got[] = {1.5, -5, 0};
    got[i] = std::numeric_limits<double>::quiet_NaN();
    EXPECT_TRUE(std::isnan(MaxError(got, want, 3))) << i;
    double largest = 0;
    for (const double error : got) KeepLargest(error, &largest);
    EXPECT_TRUE(std::isnan(largest)) << i;
  }
}

TEST(FakeModelTest, ChunksGiveTheOutputOfTheWhole) {
  FakeModel model(Narrow());
  const std::vector<float> expected = model.ExpectedOutput(std::vector<float>{1, 2, 3, 4, 5});
  std::vector<float> output;
  const std::vector<float> first = {1, 2};
  ASSERT_TRUE(Step(&model, {Row(-1, 0, 0, first, &output)}).ok());
  EXPECT_EQ(Slice(output, 0, 2), Slice(expected, 0, 2));
  EXPECT_TRUE(std::isnan(output[16]));  // And no more than that.
  const std::vector<float> rest = {3, 4, 5};
  ASSERT_TRUE(Step(&model, {Row(0, 1, 2, rest, &output)}).ok());
  EXPECT_EQ(Slice(output, 0, 3), Slice(expected, 2, 3));
}

TEST(FakeModelTest, LaggedOutputsDependOnTheFutureAndAreFlushed) {
  FakeModelOptions options = Narrow();
  options.lookahead = 2;
  FakeModel model(options);
  const std::vector<float> input = {1, 2, 3};
  const std::vector<float> expected = model.ExpectedOutput(input);
  ASSERT_EQ(expected.size(), 24u);
  EXPECT_NE(Slice(expected, 1, 1), Slice(model.ExpectedOutput(std::vector<float>{1, 2, 4}), 1, 1));
  std::vector<float> output;
  StepRow row = Row(-1, 0, 0, input, &output);
  ASSERT_TRUE(Step(&model, {row}).ok());
  EXPECT_EQ(Slice(output, 0, 1), Slice(expected, 0, 1));
  EXPECT_TRUE(std::isnan(output[8]));
  row = Row(0, 0, 3, {}, &output);
  row.tokens = 2;
  row.end = 3;
  ASSERT_TRUE(Step(&model, {row}).ok());
  EXPECT_EQ(Slice(output, 0, 2), Slice(expected, 1, 2));
}

TEST(FakeModelTest, SequencesThatDifferAnywhereDiffer) {
  FakeModel model(Narrow());
  const auto last = [&](const std::vector<float>& input) {
    return Slice(model.ExpectedOutput(input), input.size() - 1, 1);
  };
  const std::vector<float> right = last({1, 2, 3});
  EXPECT_NE(right, last({2, 1, 3}));           // Swapped.
  EXPECT_NE(right, last({1, 3}));              // Lost.
  EXPECT_NE(right, last({1, 2, 2, 3}));        // Repeated.
  EXPECT_NE(right, last({1, 2.0000002f, 3}));  // One bit.
}

TEST(FakeModelTest, TakesIds) {
  FakeModelOptions options = Narrow();
  options.takes_tokens = true;
  FakeModel model(options);
  const std::vector<int64_t> ids = {3, 1};
  std::vector<float> output(16);
  StepRow row;
  row.work_slot = 0;
  row.fresh = true;
  row.tokens = 2;
  row.input = ids.data();
  row.input_dtype = DType::kInt64;
  row.output = output.data();
  ASSERT_TRUE(Step(&model, {row}).ok());
  EXPECT_EQ(output, model.ExpectedOutput(ids));
}

FakeModelOptions Generative() {
  FakeModelOptions options = Narrow();
  options.takes_tokens = true;
  options.output_width = 32;
  return options;
}

// A row over ids; what it wants is the caller's to fill in.
StepRow IdRow(int32_t base, int32_t work, int64_t position, const std::vector<int64_t>& ids) {
  StepRow row;
  row.base_slot = base;
  row.work_slot = work;
  row.fresh = base < 0;
  row.position = position;
  row.tokens = static_cast<int64_t>(ids.size());
  row.input = ids.data();
  row.input_dtype = DType::kInt64;
  return row;
}

TEST(FakeModelTest, GeneratesWhatItExpects) {
  FakeModel model(Generative());
  const std::vector<int64_t> prompt = {3, 1, 4};
  for (const Sampling& sampling :
       {Sampling{}, Sampling{.temperature = 1, .seed = 5}, Sampling{.temperature = 2, .top_k = 3, .seed = 6},
        Sampling{.temperature = 0.5f, .top_p = 0.4f, .seed = 7}}) {
    std::vector<ScoredId> generated(6);
    StepRow row = IdRow(-1, 0, 0, prompt);
    row.readout = ReadoutKind::kSample;
    row.output_begin = 2;
    row.sampling = sampling;
    for (ScoredId& token : generated) {
      row.ids = &token.id;
      row.log_probs = &token.log_prob;
      ASSERT_TRUE(Step(&model, {row}).ok());
      row.position += row.tokens;
      row.base_slot = 0;
      row.fresh = false;
      row.tokens = 1;
      row.input = nullptr;
      row.feed_sampled = true;
      row.output_begin = 0;
    }
    EXPECT_EQ(generated, model.ExpectedGeneration(prompt, sampling, 6));
  }
}

TEST(FakeModelTest, SamplingKeepsToTopKAndTopPAndItsSeed) {
  FakeModel model(Generative());
  const std::vector<int64_t> prompt = {3, 1, 4};
  const std::vector<float> logits = model.ExpectedLogits(prompt);
  const auto first = [&](const Sampling& sampling) {
    return model.ExpectedGeneration(prompt, sampling, 1)[0].id;
  };
  const std::vector<ScoredId> top = MostLikely(logits, 3);
  EXPECT_EQ(first({}), top[0].id);
  std::set<int64_t> of_three, of_all;
  for (uint64_t seed = 0; seed < 200; ++seed) {
    of_three.insert(first({.temperature = 1, .top_k = 3, .seed = seed}));
    of_all.insert(first({.temperature = 1, .seed = seed}));
    EXPECT_EQ(first({.temperature = 1, .top_p = 1e-3f, .seed = seed}), top[0].id);
  }
  EXPECT_EQ(of_three, (std::set<int64_t>{top[0].id, top[1].id, top[2].id}));
  EXPECT_GT(of_all.size(), 20u);
}

TEST(FakeModelTest, AGenerationIsAnotherWithAnyOtherTokenBefore) {
  FakeModel model(Generative());
  const auto ids = [&](const std::vector<int64_t>& prompt) {
    std::vector<int64_t> ids;
    for (const ScoredId& token : model.ExpectedGeneration(prompt, {}, 8)) ids.push_back(token.id);
    return ids;
  };
  EXPECT_NE(ids({1, 2, 3}), ids({2, 1, 3}));
  EXPECT_NE(ids({1, 2, 3}), ids({2, 3}));
  EXPECT_NE(ids({1, 2, 3}), ids({1, 2, 3, 3}));
}

TEST(FakeModelTest, ScoresAndTopAreOfTheLogits) {
  FakeModel model(Generative());
  const std::vector<int64_t> ids = {3, 1, 4, 1, 5};
  // The first two, and then the rest with the output that the slot carries: each id but the first is scored.
  StepRow row = IdRow(-1, 0, 0, {ids.begin(), ids.begin() + 2});
  row.input = ids.data();
  row.readout = ReadoutKind::kScore;
  row.output_end = 1;
  row.targets = ids.data() + 1;
  std::vector<float> log_probs(4, NAN), top_log_probs(8, NAN);
  std::vector<int64_t> top_ids(8, -1);
  row.log_probs = log_probs.data();
  row.top = 2;
  row.top_ids = top_ids.data();
  row.top_log_probs = top_log_probs.data();
  ASSERT_TRUE(Step(&model, {row}).ok());
  row = IdRow(0, 1, 2, {ids.begin() + 2, ids.end()});
  row.input = ids.data() + 2;
  row.readout = ReadoutKind::kScore;
  row.output_begin = -1;
  row.output_end = 2;
  row.targets = ids.data() + 2;
  row.log_probs = log_probs.data() + 1;
  row.top = 2;
  row.top_ids = top_ids.data() + 2;
  row.top_log_probs = top_log_probs.data() + 2;
  ASSERT_TRUE(Step(&model, {row}).ok());
  for (size_t i = 0; i < 4; ++i) {
    const std::vector<float> logits = model.ExpectedLogits(absl::MakeSpan(ids).subspan(0, i + 1));
    EXPECT_EQ(log_probs[i], LogProb(logits, ids[i + 1]));
    EXPECT_LT(log_probs[i], 0);
    const std::vector<ScoredId> top = MostLikely(logits, 2);
    EXPECT_EQ((std::vector<ScoredId>{{top_ids[2 * i], top_log_probs[2 * i]},
                                     {top_ids[2 * i + 1], top_log_probs[2 * i + 1]}}),
              top);
    EXPECT_GE(top[0].log_prob, top[1].log_prob);
  }
}

TEST(FakeModelTest, GivesOfTheValuesOnlyThoseWanted) {
  FakeModel model(Generative());
  const std::vector<int64_t> ids = {3, 1, 4};
  const std::vector<float> expected = model.ExpectedOutput(ids);
  std::vector<float> output(3 * 32, NAN);
  StepRow row = IdRow(-1, 0, 0, ids);
  row.output_begin = 1;
  row.output_end = 2;
  row.output = output.data();
  ASSERT_TRUE(Step(&model, {row}).ok());
  EXPECT_TRUE(std::equal(output.begin(), output.begin() + 32, expected.begin() + 32));
  EXPECT_TRUE(std::isnan(output[32]));
  // Of the last token, without feeding one.
  row = IdRow(0, 1, 3, {});
  row.output_begin = -1;
  row.output = output.data();
  ASSERT_TRUE(Step(&model, {row}).ok());
  EXPECT_TRUE(std::equal(output.begin(), output.begin() + 32, expected.begin() + 64));
}

TEST(FakeModelTest, RefusesReadoutsThatPrepareRefuses) {
  FakeModelOptions options = Generative();
  options.max_step_logits = 2;
  FakeModel model(options);
  const std::vector<int64_t> ids = {1, 2, 3};
  const auto error = [](FakeModel* of, const StepRow& row) {
    const absl::StatusOr<StepTicket> ticket = of->Prepare({row});
    EXPECT_EQ(ticket.status().code(), absl::StatusCode::kInvalidArgument);
    return std::string(ticket.status().message());
  };
  StepRow row = IdRow(-1, 0, 0, ids);
  EXPECT_THAT(error(&model, row), HasSubstr("logits of 3 tokens"));
  row.readout = ReadoutKind::kSample;
  EXPECT_THAT(error(&model, row), HasSubstr("samples of 3 outputs"));
  row.output_begin = -1;
  EXPECT_THAT(error(&model, row), HasSubstr("output_begin is -1, fresh"));
  row.output_begin = 2;
  row.top = 65;
  EXPECT_THAT(error(&model, row), HasSubstr("top is 65"));
  row.top = 0;
  row.feed_sampled = true;
  EXPECT_THAT(error(&model, row), HasSubstr("feed_sampled"));
  FakeModelOptions lagging = options;
  lagging.lookahead = 1;
  FakeModel other(lagging);
  row = IdRow(-1, 0, 0, ids);
  row.readout = ReadoutKind::kTop;
  EXPECT_THAT(error(&other, row), HasSubstr("only a model that generates"));
}

TEST(FakeModelDeathTest, FeedingWhatWasNotSampledEndsTheProcess) {
  FakeModel model(Generative());
  const std::vector<int64_t> ids = {1};
  StepRow row = IdRow(-1, 0, 0, ids);
  row.output_end = 0;
  ASSERT_TRUE(Step(&model, {row}).ok());
  row = IdRow(0, 1, 1, {0});
  row.feed_sampled = true;
  row.output_end = 0;
  EXPECT_DEATH((void)Step(&model, {row}), "its slot holds nothing such");
}

TEST(FakeModelTest, RefusesWhatPrepareRefuses) {
  FakeModelOptions options = Narrow();
  options.max_step_tokens = 64;
  options.max_step_rows = 2;
  FakeModel model(options);
  std::vector<float> output;
  const std::vector<float> one = {1};
  const auto error = [&](const std::vector<StepRow>& rows) {
    const absl::StatusOr<StepTicket> ticket = model.Prepare(rows);
    EXPECT_EQ(ticket.status().code(), absl::StatusCode::kInvalidArgument);
    return std::string(ticket.status().message());
  };
  EXPECT_THAT(error({Row(-1, 4, 0, one, &output)}), HasSubstr("work_slot is 4"));
  EXPECT_THAT(error({Row(4, 0, 0, one, &output)}), HasSubstr("base_slot is 4"));
  EXPECT_THAT(error({Row(-1, 0, 0, one, &output), Row(-1, 0, 0, one, &output)}),
              HasSubstr("share work_slot 0"));
  EXPECT_THAT(error({Row(-1, 0, 0, one, &output), Row(0, 1, 0, one, &output)}), HasSubstr("reads slot 0"));
  EXPECT_THAT(error(std::vector<StepRow>(3, Row(-1, 0, 0, one, &output))), HasSubstr("3 rows"));
  EXPECT_THAT(error({Row(-1, 0, 0, std::vector<float>(65), &output)}), HasSubstr("65 tokens"));
  StepRow ids = Row(-1, 0, 0, one, &output);
  ids.input_dtype = DType::kInt64;
  EXPECT_THAT(error({ids}), HasSubstr("int64"));

  ASSERT_TRUE(model.Prepare({Row(-1, 0, 0, one, &output)}).ok());
  EXPECT_EQ(model.Prepare({Row(-1, 1, 0, one, &output)}).status().code(),
            absl::StatusCode::kFailedPrecondition);
}

TEST(FakeModelTest, FailsWhereToldToAndLeavesPoison) {
  FakeModel model(Narrow());
  std::vector<float> output, other;
  const std::vector<float> one = {1};
  model.FailLaunch(0, absl::ResourceExhaustedError("no memory"));
  model.FailWait(1, absl::InternalError("lost"));
  model.FailRow(2, 1);
  EXPECT_EQ(Step(&model, {Row(-1, 0, 0, one, &output)}).status().code(),
            absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(Step(&model, {Row(-1, 0, 0, one, &output)}).status().code(), absl::StatusCode::kInternal);
  EXPECT_TRUE(std::isnan(output[0]));
  const absl::StatusOr<StepResult> result =
      Step(&model, {Row(-1, 0, 0, one, &output), Row(-1, 1, 0, one, &other)});
  ASSERT_TRUE(result.ok());
  EXPECT_TRUE(result->rows[0].ok());
  EXPECT_EQ(result->rows[1].code(), absl::StatusCode::kInternal);
  EXPECT_EQ(Slice(output, 0, 1), model.ExpectedOutput(one));
  EXPECT_TRUE(std::isnan(other[0]));
  // What is left in the slot is not readable.
  EXPECT_EQ(Step(&model, {Row(1, 2, 1, one, &output)})->rows[0].code(), absl::StatusCode::kInternal);
  EXPECT_EQ(model.launched().size(), 4u);
}

TEST(FakeModelTest, HoldsAStepUntilReleased) {
  FakeModel model(Narrow());
  model.Hold(0);
  std::vector<int64_t> launched;
  model.OnLaunch([&](int64_t step) { launched.push_back(step); });
  const std::vector<float> one = {1};
  std::vector<float> output;
  const StepRow row = Row(-1, 0, 0, one, &output);
  Thread stepper("stepper", [&] { EXPECT_TRUE(Step(&model, {row}).ok()); });
  model.WaitUntilHeld(0);
  EXPECT_TRUE(std::isnan(output[0]));
  model.Release(0);
  stepper.Join();
  EXPECT_EQ(Slice(output, 0, 1), model.ExpectedOutput(one));
  EXPECT_THAT(launched, ElementsAre(0));
}

TEST(FakeModelDeathTest, APositionThatIsNotTheStatesEndsTheProcess) {
  FakeModel model(Narrow());
  const std::vector<float> one = {1};
  std::vector<float> output;
  ASSERT_TRUE(Step(&model, {Row(-1, 0, 0, one, &output)}).ok());
  EXPECT_DEATH((void)Step(&model, {Row(0, 1, 2, one, &output)}), "position is not that of its state");
}

}  // namespace
}  // namespace deltanet
