#include "client/generate_load.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <set>
#include <thread>
#include <utility>

#include "absl/time/clock.h"
#include "tests/client/fake_service.h"

namespace deltanet {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Pair;
using ::testing::UnorderedElementsAreArray;

TEST(LengthRangeTest, IsANumberOrARange) {
  EXPECT_EQ(ParseLengthRange("128")->min, 128);
  EXPECT_EQ(ParseLengthRange("128")->max, 128);
  EXPECT_EQ(ParseLengthRange("uniform:64:512")->min, 64);
  EXPECT_EQ(ParseLengthRange("uniform:64:512")->max, 512);
  for (const char* wrong : {"", "0", "-1", "x", "uniform", "uniform:1", "uniform:5:4", "uniform:0:4",
                            "uniform:1:2:3", "normal:1:2", "1:2", "uniform:1:x"}) {
    const absl::Status status = ParseLengthRange(wrong).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << wrong;
    EXPECT_EQ(status.message(),
              "is '" + std::string(wrong) + "', want a number of at least 1, or uniform:MIN:MAX");
  }
}

TEST(PlanRequestTest, DrawsFromTheRangesAndRepeats) {
  GenerateLoadOptions options;
  options.vocab_size = 5;
  options.prompt_tokens = {2, 4};
  options.output_tokens = {7, 8};
  std::set<size_t> prompts;
  std::set<int64_t> outputs, ids;
  std::set<std::vector<int64_t>> distinct;
  for (int64_t index = -20; index < 60; ++index) {
    const PlannedRequest plan = PlanRequest(options, index);
    EXPECT_EQ(PlanRequest(options, index).prompt, plan.prompt);
    EXPECT_EQ(PlanRequest(options, index).output_tokens, plan.output_tokens);
    prompts.insert(plan.prompt.size());
    outputs.insert(plan.output_tokens);
    ids.insert(plan.prompt.begin(), plan.prompt.end());
    distinct.insert(plan.prompt);
  }
  EXPECT_THAT(prompts, ElementsAre(2, 3, 4));
  EXPECT_THAT(outputs, ElementsAre(7, 8));
  EXPECT_THAT(ids, ElementsAre(0, 1, 2, 3, 4));
  EXPECT_GT(distinct.size(), 40u);
  const std::vector<int64_t> prompt = PlanRequest(options, 3).prompt;
  options.seed = 2;
  EXPECT_NE(PlanRequest(options, 3).prompt, prompt);
}

TEST(ArrivalsTest, AreAPoissonProcess) {
  constexpr int kCount = 20000;
  Arrivals arrivals(50, 1), again(50, 1), other(50, 2);
  double before = 0, sum = 0, squares = 0;
  for (int i = 0; i < kCount; ++i) {
    const double time = arrivals.Next();
    ASSERT_EQ(again.Next(), time);
    sum += time - before;
    squares += (time - before) * (time - before);
    before = time;
  }
  EXPECT_NE(other.Next(), Arrivals(50, 1).Next());
  const double mean = sum / kCount;
  EXPECT_NEAR(mean, 0.02, 0.0006);                                       // Four standard errors.
  EXPECT_NEAR(std::sqrt(squares / kCount - mean * mean), 0.02, 0.0008);  // As large as the mean.
}

class GenerationLoadTest : public testing::Test {
 protected:
  GenerationLoadTest() {
    options_.server = service_.address();
    options_.model = "letters";
    options_.vocab_size = FakeService::kVocab;
    options_.prompt_tokens = {1, 9};
    options_.output_tokens = {2, 60};  // Past where the model would end.
    options_.requests = 30;
  }

  absl::StatusOr<GenerateLoadReport> Run() {
    return RunGenerateLoad(options_, [](const GenerateLoadProgress&) {});
  }
  // Runs while `meanwhile` does, on another thread.
  GenerateLoadReport RunBeside(const std::function<void()>& meanwhile) {
    std::thread thread(meanwhile);
    absl::StatusOr<GenerateLoadReport> report = Run();
    thread.join();
    EXPECT_TRUE(report.ok()) << report.status();
    return report.ok() ? *std::move(report) : GenerateLoadReport();
  }
  // Lengths of requests `begin` to `end`: of the prompt and of the output.
  std::vector<std::pair<int64_t, int64_t>> Planned(int64_t begin, int64_t end) const {
    std::vector<std::pair<int64_t, int64_t>> lengths;
    for (int64_t i = begin; i < end; ++i) {
      const PlannedRequest plan = PlanRequest(options_, i);
      lengths.emplace_back(plan.prompt.size(), plan.output_tokens);
    }
    return lengths;
  }
  std::vector<std::pair<int64_t, int64_t>> Seen() {
    std::vector<std::pair<int64_t, int64_t>> lengths;
    for (const FakeService::GenerateCall& call : service_.generate_calls()) {
      lengths.emplace_back(call.prompt_tokens, call.max_tokens);
      EXPECT_TRUE(call.ignore_eos);
    }
    return lengths;
  }

  FakeService service_{FakeService::Model::kLetters};
  GenerateLoadOptions options_;
};

TEST_F(GenerationLoadTest, ClosedLoopSendsWhatWasPlanned) {
  for (const int64_t connections : {1, 3}) {
    FakeService service(FakeService::Model::kLetters);
    options_.server = service.address();
    options_.concurrency = 4;
    options_.connections = connections;
    const absl::StatusOr<GenerateLoadReport> report = Run();
    ASSERT_TRUE(report.ok()) << report.status();
    std::vector<std::pair<int64_t, int64_t>> seen;
    std::set<std::string> peers;
    for (const FakeService::GenerateCall& call : service.generate_calls()) {
      seen.emplace_back(call.prompt_tokens, call.max_tokens);
      peers.insert(call.peer);
    }
    EXPECT_THAT(seen, UnorderedElementsAreArray(Planned(0, 30)));
    EXPECT_EQ(peers.size(), connections);
    EXPECT_LE(service.most_generating(), 4);

    int64_t prompt = 0, output = 0;
    for (const auto& [prompt_tokens, output_tokens] : seen) {
      prompt += prompt_tokens;
      output += output_tokens;
    }
    EXPECT_EQ(report->answered, 30);
    EXPECT_TRUE(report->errors.empty());
    EXPECT_EQ(report->unanswered, 0);
    EXPECT_EQ(report->first_token.count(), 30);
    EXPECT_EQ(report->between_tokens.count(), output - 30);
    EXPECT_EQ(report->whole.count(), 30);
    const double seconds = absl::ToDoubleSeconds(report->elapsed);
    EXPECT_NEAR(report->requests_per_second * seconds, 30, 1e-6);
    EXPECT_NEAR(report->prompt_tokens_per_second * seconds, static_cast<double>(prompt), 1e-6);
    EXPECT_NEAR(report->output_tokens_per_second * seconds, static_cast<double>(output), 1e-6);
    EXPECT_EQ(report->mean_queued, absl::Microseconds(20));
    EXPECT_EQ(report->mean_computing, absl::Microseconds(300));
  }
}

TEST_F(GenerationLoadTest, ClosedLoopKeepsSoManyUnderWay) {
  service_.HoldGenerate();
  options_.concurrency = 5;
  options_.connections = 2;
  const GenerateLoadReport report = RunBeside([this] {
    service_.AwaitHeld(5);
    EXPECT_EQ(service_.generate_calls().size(), 5u);
    service_.Release();
  });
  EXPECT_EQ(report.answered, 30);
  EXPECT_EQ(service_.most_generating(), 5);
}

TEST_F(GenerationLoadTest, OpenLoopSendsWithoutAnswers) {
  service_.HoldGenerate();
  options_.rate = 1000;
  options_.connections = 2;
  const GenerateLoadReport report = RunBeside([this] {
    service_.AwaitHeld(30);
    service_.Release();
  });
  EXPECT_EQ(report.answered, 30);
  EXPECT_EQ(service_.most_generating(), 30);
  EXPECT_THAT(Seen(), UnorderedElementsAreArray(Planned(0, 30)));
}

TEST_F(GenerationLoadTest, EveryGapCounts) {
  service_.HoldGenerate();
  options_.output_tokens = {3, 3};
  options_.requests = 1;
  constexpr absl::Duration kGap = absl::Milliseconds(20);
  const GenerateLoadReport report = RunBeside([&] {
    service_.AwaitHeld(1);
    const absl::Time held = absl::Now();
    while (absl::Now() - held < 10 * kGap)
      std::this_thread::yield();  // The first token takes less to arrive.
    service_.Release();
  });
  EXPECT_EQ(report.between_tokens.count(), 2);
  EXPECT_GE(report.between_tokens.max(), kGap);
  EXPECT_GE(report.whole.max(), report.first_token.max() + report.between_tokens.max());
}

TEST_F(GenerationLoadTest, TheWarmUpIsNotMeasured) {
  for (const bool open : {false, true}) {
    options_.concurrency = 3;
    options_.connections = 2;
    options_.warm_up = 7;
    options_.requests = 5;
    if (open) options_.rate = 1000;
    const size_t before = service_.generate_calls().size();
    const absl::StatusOr<GenerateLoadReport> report = Run();
    ASSERT_TRUE(report.ok()) << report.status();
    EXPECT_EQ(report->answered, 5);
    EXPECT_EQ(report->first_token.count(), 5);
    std::vector<std::pair<int64_t, int64_t>> seen = Seen();
    seen.erase(seen.begin(), seen.begin() + static_cast<ptrdiff_t>(before));
    EXPECT_THAT(seen, UnorderedElementsAreArray(Planned(-7, 5)));
  }
}

TEST_F(GenerationLoadTest, StopsAfterItsDurationAndAwaitsWhatItBegan) {
  for (const bool open : {false, true}) {
    options_.requests = std::nullopt;
    options_.duration = absl::Milliseconds(60);
    options_.concurrency = 2;
    if (open) options_.rate = 300;
    const absl::StatusOr<GenerateLoadReport> report = Run();
    ASSERT_TRUE(report.ok()) << report.status();
    EXPECT_GT(report->answered, 0);
    EXPECT_EQ(report->unanswered, 0);
    if (open) {
      EXPECT_EQ(report->elapsed, options_.duration);
    } else {
      EXPECT_LE(report->elapsed, options_.duration);
    }
    EXPECT_EQ(report->whole.count(), report->first_token.count());
  }
}

TEST_F(GenerationLoadTest, CountsErrorsByTheirReason) {
  service_.RefuseGenerate(3);
  for (const bool open : {false, true}) {
    if (open) options_.rate = 2000;
    const absl::StatusOr<GenerateLoadReport> report = Run();
    ASSERT_TRUE(report.ok()) << report.status();
    EXPECT_THAT(report->errors, ElementsAre(Pair("QUEUE_FULL", 10)));
    EXPECT_EQ(report->answered, 20);
    EXPECT_EQ(report->first_error, "UNAVAILABLE: the queue is full");
  }
}

TEST_F(GenerationLoadTest, FewerTokensThanAskedForAreAnError) {
  service_.CutGenerate(5);
  options_.output_tokens = {5, 6};
  const absl::StatusOr<GenerateLoadReport> report = Run();
  ASSERT_TRUE(report.ok()) << report.status();
  int64_t longer = 0;
  for (const auto& [prompt, output] : Planned(0, 30)) longer += output == 6 ? 1 : 0;
  ASSERT_GT(longer, 0);
  EXPECT_THAT(report->errors, ElementsAre(Pair("WRONG_LENGTH", longer)));
  EXPECT_EQ(report->answered, 30 - longer);
  EXPECT_THAT(report->first_error, HasSubstr("got 5 tokens, want 6"));
}

TEST_F(GenerationLoadTest, GivesUpWhereEverythingIsRefused) {
  service_.RefuseGenerate(1);
  options_.requests = 100000;
  absl::Status status = Run().status();
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(status.message(), "the queue is full");
  EXPECT_EQ(service_.generate_calls().size(), 100u);

  options_.warm_up = 1;
  status = Run().status();
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(service_.generate_calls().size(), 101u);
}

TEST_F(GenerationLoadTest, GivesUpASilentServer) {
  service_.HoldGenerate();
  options_.silence = absl::Milliseconds(100);
  options_.concurrency = 3;
  absl::StatusOr<GenerateLoadReport> report = Run();
  ASSERT_TRUE(report.ok()) << report.status();
  EXPECT_EQ(report->unanswered, 3);
  EXPECT_EQ(report->answered, 0);
  EXPECT_EQ(report->first_token.count(), 3);

  options_.warm_up = 1;
  report = Run();
  EXPECT_EQ(report.status().code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_EQ(report.status().message(), "nothing has come in the warm-up for 100ms");
}

TEST_F(GenerationLoadTest, ReportsProgress) {
  service_.HoldGenerate();
  options_.concurrency = 2;
  options_.requests = 2;
  std::vector<GenerateLoadProgress> seen;
  const absl::StatusOr<GenerateLoadReport> report =
      RunGenerateLoad(options_, [&](const GenerateLoadProgress& progress) {
        seen.push_back(progress);
        service_.Release();
      });
  ASSERT_TRUE(report.ok()) << report.status();
  ASSERT_FALSE(seen.empty());
  EXPECT_GE(seen[0].elapsed, absl::Seconds(0.5));
  EXPECT_EQ(seen[0].answered, 0);
  EXPECT_EQ(seen[0].running, 2);
  EXPECT_EQ(seen[0].tokens, 2);
}

TEST_F(GenerationLoadTest, RefusesWrongOptions) {
  const auto refused = [this](const std::function<void(GenerateLoadOptions*)>& change,
                              const std::string& message) {
    GenerateLoadOptions options = options_;
    change(&options);
    const absl::Status status = RunGenerateLoad(options, [](const GenerateLoadProgress&) {}).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << message;
    EXPECT_THAT(std::string(status.message()), HasSubstr(message));
  };
  refused([](auto* options) { options->connections = 2; }, "2 connections for 1 requests at a time");
  refused([](auto* options) { options->requests = std::nullopt; }, "neither duration nor requests");
  refused([](auto* options) { options->rate = 0; }, "rate is 0");
  refused([](auto* options) { options->vocab_size = 0; }, "vocab_size is 0");
  refused([](auto* options) { options->prompt_tokens = {0, 4}; }, "lengths are from 0 to 4");
  refused([](auto* options) { options->output_tokens = {5, 4}; }, "lengths are from 5 to 4");
  refused([](auto* options) { options->silence = absl::ZeroDuration(); }, "silence is 0");
  refused([](auto* options) { options->server = ""; }, "address is empty");
}

}  // namespace
}  // namespace deltanet
