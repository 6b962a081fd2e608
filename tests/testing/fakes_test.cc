#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "model/base/mutex.h"
#include "server/executor.h"
#include "tests/testing/fake_clock.h"
#include "tests/testing/fake_model.h"

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
