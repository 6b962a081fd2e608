// The batcher with models over tokens: readouts, and generation beside prompts and streams.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "proto/wire.h"
#include "server/batcher.h"
#include "tests/testing/fake_clock.h"
#include "tests/testing/fake_model.h"

namespace deltanet {
namespace {

constexpr int64_t kVocabulary = 8;

std::vector<int64_t> RandomIds(uint32_t seed, int64_t count) {
  std::mt19937 random(seed);
  std::vector<int64_t> ids(count);
  for (int64_t& id : ids) id = random() % kVocabulary;
  return ids;
}

std::vector<int64_t> Joined(std::vector<int64_t> a, const std::vector<int64_t>& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

// One work over ids, its buffers and its answer; used by a batcher without a thread.
struct TokenCall {
  std::vector<int64_t> input;
  std::vector<float> output;
  std::vector<float> log_probs;
  std::vector<int64_t> top_ids;
  std::vector<float> top_log_probs;
  // Of a generation.
  std::vector<int64_t> tokens;
  std::vector<float> token_log_probs;
  std::vector<std::vector<int64_t>> token_top_ids;
  int64_t stop_after = INT64_MAX;  // on_token says so after this many.
  absl::AnyInvocable<void()> on_token;
  bool answered = false;
  WorkResult result;
};

struct Recorder : BatchObserver {
  void OnStep(const Step& step) override { steps.push_back(step); }
  void OnWorkDone(int, const WorkResult&) override {}
  void OnToken(int, bool first, absl::Duration since) override { tokens.emplace_back(first, since); }
  void OnDeviceLost(const absl::Status&) override {}

  std::vector<Step> steps;
  std::vector<std::pair<bool, absl::Duration>> tokens;
};

class GenerationTest : public ::testing::TestWithParam<int> {
 protected:
  void Make(FakeModelOptions model_options = {},
            BatcherOptions options = {.piece_tokens = 64, .mixed_step_tokens = 64}) {
    model_options.takes_tokens = true;
    model_options.output_width = kVocabulary;
    model_options.max_steps_in_flight = GetParam();
    model_ = std::make_unique<FakeModel>(model_options);
    batcher_ = std::make_unique<Batcher>(options, &clock_, &recorder_);
    ASSERT_EQ(batcher_->AddModel(model_.get(), 4), 0);
  }

  std::unique_ptr<Work> NewWork(TokenCall* call) {
    auto work = std::make_unique<Work>();
    work->input = call->input.data();
    work->input_dtype = DType::kInt64;
    work->tokens = call->input.size();
    work->done = [call](const WorkResult& result) {
      EXPECT_FALSE(call->answered);
      call->answered = true;
      call->result = result;
    };
    return work;
  }

  std::unique_ptr<TokenCall> Generate(const std::shared_ptr<Lane>& lane, std::vector<int64_t> prompt,
                                      int64_t max_tokens, bool keep_state, const Sampling& sampling = {},
                                      std::shared_ptr<Cancellation> cancellation = nullptr, int top = 0,
                                      int64_t stop_after = INT64_MAX) {
    auto call = std::make_unique<TokenCall>();
    call->input = std::move(prompt);
    call->stop_after = stop_after;
    std::unique_ptr<Work> work = NewWork(call.get());
    work->cancellation = std::move(cancellation);
    work->top = top;
    work->generation = std::make_unique<Generation>();
    work->generation->sampling = sampling;
    work->generation->max_tokens = max_tokens;
    work->generation->keep_state = keep_state;
    work->generation->on_token = [call = call.get()](const GeneratedToken& token) {
      call->tokens.push_back(token.id);
      call->token_log_probs.push_back(token.log_prob);
      call->token_top_ids.emplace_back(token.top_ids.begin(), token.top_ids.end());
      if (call->on_token) call->on_token();
      return static_cast<int64_t>(call->tokens.size()) < call->stop_after;
    };
    EXPECT_TRUE(batcher_->Submit(lane, &work, Batcher::WhenFull::kRefuse).ok());
    return call;
  }

  std::unique_ptr<TokenCall> Forward(const std::shared_ptr<Lane>& lane, std::vector<int64_t> ids,
                                     ReadoutKind readout, int top = 0, bool last_only = false,
                                     bool end_of_sequence = false) {
    auto call = std::make_unique<TokenCall>();
    call->input = std::move(ids);
    const size_t tokens = call->input.size();
    call->output.assign(tokens * kVocabulary, -1);
    call->log_probs.assign(tokens, 1);
    call->top_ids.assign(tokens * top, -1);
    call->top_log_probs.assign(tokens * top, 1);
    std::unique_ptr<Work> work = NewWork(call.get());
    work->readout = readout;
    work->top = top;
    work->last_only = last_only;
    work->end_of_sequence = end_of_sequence;
    work->output = call->output.data();
    if (readout == ReadoutKind::kScore) work->log_probs = call->log_probs.data();
    work->top_ids = call->top_ids.data();
    work->top_log_probs = call->top_log_probs.data();
    EXPECT_TRUE(batcher_->Submit(lane, &work, Batcher::WhenFull::kRefuse).ok());
    return call;
  }

  void RunAll() {
    while (batcher_->RunOnce()) {
    }
  }

  void ExpectAtRest(int64_t held) {
    EXPECT_EQ(batcher_->queued_works(), 0);
    EXPECT_EQ(batcher_->queued_tokens(), 0);
    EXPECT_EQ(batcher_->running_generations(0), 0);
    EXPECT_EQ(batcher_->waiting_generations(0), 0);
    EXPECT_EQ(batcher_->free_slots(0), model_->description().num_slots - held);
    EXPECT_TRUE(batcher_->WaitUntilIdle(clock_.Now()));
    EXPECT_FALSE(batcher_->RunOnce());
  }

  // The ids that the model generates behind `prompt`.
  std::vector<int64_t> Expected(const std::vector<int64_t>& prompt, int64_t count, const Sampling& sampling = {}) {
    std::vector<int64_t> ids;
    for (const ScoredId& token : model_->ExpectedGeneration(prompt, sampling, count)) ids.push_back(token.id);
    return ids;
  }

  FakeClock clock_;
  Recorder recorder_;
  std::unique_ptr<FakeModel> model_;
  std::unique_ptr<Batcher> batcher_;
};

INSTANTIATE_TEST_SUITE_P(StepsInFlight, GenerationTest, testing::Values(1, 2));

// Where two steps may be in flight, the device has the next token's before the host has waited for this one's.
TEST_P(GenerationTest, TheNextTokensStepIsLaunchedBeforeThisOneIsKnown) {
  Make();
  const std::shared_ptr<Lane> lane = batcher_->OpenLane(0);
  const auto call = Generate(lane, RandomIds(1, 5), 6, /*keep_state=*/false);
  for (int turn = 1; turn <= 6; ++turn) {
    EXPECT_TRUE(batcher_->RunOnce());
    EXPECT_EQ(static_cast<int>(model_->launched().size()), turn);
    EXPECT_EQ(static_cast<int>(call->tokens.size()), turn - (GetParam() - 1));
  }
  RunAll();
  EXPECT_EQ(model_->launched().size(), 6u);
  EXPECT_EQ(call->tokens.size(), 6u);
  ExpectAtRest(0);
}

TEST_P(GenerationTest, GeneratesBehindAPromptAndKeepsNothing) {
  Make();
  const std::vector<int64_t> prompt = RandomIds(1, 5);
  const std::shared_ptr<Lane> lane = batcher_->OpenLane(0);
  const auto call = Generate(lane, prompt, 12, /*keep_state=*/false);
  EXPECT_EQ(batcher_->waiting_generations(0), 1);
  RunAll();
  ASSERT_TRUE(call->answered);
  ASSERT_TRUE(call->result.status.ok()) << call->result.status;
  EXPECT_EQ(call->tokens, Expected(prompt, 12));
  EXPECT_EQ(call->result.generated_tokens, 12);
  EXPECT_TRUE(call->result.ended);
  // The prompt's row samples the first; the last is not fed.
  EXPECT_EQ(model_->launched().size(), 12u);
  EXPECT_EQ(recorder_.tokens.size(), 12u);
  EXPECT_TRUE(recorder_.tokens[0].first);
  EXPECT_FALSE(recorder_.tokens[1].first);
  ExpectAtRest(0);
}

TEST_P(GenerationTest, LogProbabilitiesAndTheMostLikelyComeWithEachToken) {
  Make();
  const std::vector<int64_t> prompt = RandomIds(2, 3);
  const Sampling sampling{.temperature = 0.9f, .top_k = 0, .top_p = 1.0f, .seed = 5};
  const auto call = Generate(batcher_->OpenLane(0), prompt, 6, false, sampling, nullptr, /*top=*/3);
  RunAll();
  const std::vector<ScoredId> want = model_->ExpectedGeneration(prompt, sampling, 6);
  ASSERT_EQ(call->tokens.size(), 6u);
  std::vector<int64_t> ids = prompt;
  for (size_t i = 0; i < want.size(); ++i) {
    EXPECT_EQ(call->tokens[i], want[i].id);
    EXPECT_EQ(call->token_log_probs[i], want[i].log_prob);
    const std::vector<ScoredId> top = MostLikely(model_->ExpectedLogits(ids), 3);
    EXPECT_EQ(call->token_top_ids[i], (std::vector<int64_t>{top[0].id, top[1].id, top[2].id}));
    ids.push_back(want[i].id);
  }
}

TEST_P(GenerationTest, ASessionGoesOnAtTheCostOfTheNewTokensAlone) {
  Make();
  const std::shared_ptr<Lane> lane = batcher_->OpenLane(0);
  const std::vector<int64_t> prompt = RandomIds(3, 7);
  const auto first = Generate(lane, prompt, 4, /*keep_state=*/true);
  RunAll();
  std::vector<int64_t> all = Joined(prompt, Expected(prompt, 4));
  EXPECT_EQ(first->tokens, Expected(prompt, 4));
  EXPECT_EQ(first->result.committed_position, 11);
  // With nothing new: from what the last token left behind.
  const auto second = Generate(lane, {}, 3, true);
  RunAll();
  EXPECT_TRUE(second->result.status.ok()) << second->result.status;
  EXPECT_EQ(second->tokens, Expected(all, 3));
  all = Joined(all, second->tokens);
  EXPECT_EQ(second->result.committed_position, 14);
  // With more input, by Forward and by a prompt.
  const std::vector<int64_t> more = RandomIds(4, 2), question = RandomIds(5, 3);
  const auto forward = Forward(lane, more, ReadoutKind::kValues);
  const auto third = Generate(lane, question, 5, true);
  RunAll();
  all = Joined(Joined(all, more), question);
  EXPECT_EQ(third->tokens, Expected(all, 5));
  EXPECT_EQ(third->result.committed_position, 24);
  int64_t fed = 0;
  for (const auto& rows : model_->launched()) {
    for (const StepRow& row : rows) fed += row.tokens;
  }
  EXPECT_EQ(fed, 24);
  ExpectAtRest(1);
}

TEST_P(GenerationTest, StopsWhereItIsToldAndTheSessionStandsBehindTheLastToken) {
  for (const int64_t stop_after : {1, 2, 5}) {
    Make();
    const std::vector<int64_t> prompt = RandomIds(6, 70);
    const std::shared_ptr<Lane> lane = batcher_->OpenLane(0);
    const auto call =
        Generate(lane, prompt, 50, /*keep_state=*/true, {}, nullptr, 0, /*stop_after=*/stop_after);
    RunAll();
    ASSERT_TRUE(call->answered);
    EXPECT_EQ(call->tokens, Expected(prompt, stop_after));
    EXPECT_EQ(call->result.generated_tokens, stop_after);
    EXPECT_EQ(call->result.committed_position, 70 + stop_after);
    const auto next = Generate(lane, {}, 2, true);
    RunAll();
    EXPECT_EQ(next->tokens, Expected(Joined(prompt, call->tokens), 2));
    ExpectAtRest(1);
  }
}

TEST_P(GenerationTest, ManySideBySideAreAsAlone) {
  Make({.num_slots = 64, .max_step_rows = 7}, {.piece_tokens = 64, .mixed_step_tokens = 64});
  std::mt19937 random(7);
  std::vector<std::unique_ptr<TokenCall>> calls;
  std::vector<std::vector<int64_t>> prompts;
  std::vector<Sampling> samplings;
  for (int i = 0; i < 30; ++i) {
    prompts.push_back(RandomIds(100 + i, 1 + random() % 300));
    samplings.push_back({.temperature = i % 2 == 0 ? 0.0f : 0.8f, .seed = static_cast<uint64_t>(i)});
    calls.push_back(
        Generate(batcher_->OpenLane(0), prompts[i], 1 + random() % 40, i % 3 == 0, samplings[i]));
    if (random() % 2 == 0) batcher_->RunOnce();
  }
  RunAll();
  for (size_t i = 0; i < calls.size(); ++i) {
    ASSERT_TRUE(calls[i]->answered);
    ASSERT_TRUE(calls[i]->result.status.ok()) << calls[i]->result.status;
    EXPECT_EQ(calls[i]->tokens, Expected(prompts[i], calls[i]->tokens.size(), samplings[i]));
  }
}

TEST_P(GenerationTest, RowsThatGenerateComeFirstAndPromptsGetTheBudget) {
  Make({.num_slots = 32, .max_step_tokens = 512, .max_step_rows = 16},
       {.piece_tokens = 256, .mixed_step_tokens = 128});
  std::vector<std::unique_ptr<TokenCall>> generations;
  for (int i = 0; i < 3; ++i) {
    generations.push_back(Generate(batcher_->OpenLane(0), RandomIds(20 + i, 2), 100, false));
  }
  for (int i = 0; i < 4; ++i) batcher_->RunOnce();
  const size_t before = model_->launched().size();
  const auto prompt = Generate(batcher_->OpenLane(0), RandomIds(30, 1000), 2, false);
  const auto stream = Forward(batcher_->OpenLane(0), RandomIds(31, 10), ReadoutKind::kValues);
  for (int i = 0; i < 3; ++i) batcher_->RunOnce();
  const auto launched = model_->launched();
  ASSERT_GT(launched.size(), before);
  for (size_t s = before; s < launched.size(); ++s) {
    const std::vector<StepRow>& rows = launched[s];
    ASSERT_GE(rows.size(), 4u);
    int64_t others = 0;
    for (size_t r = 0; r < rows.size(); ++r) {
      EXPECT_EQ(rows[r].feed_sampled, r < 3) << "step " << s;
      if (r >= 3) others += rows[r].tokens;
    }
    EXPECT_LE(others, 128);
    EXPECT_GE(others, 64);
  }
  RunAll();
  EXPECT_TRUE(stream->answered);
  EXPECT_EQ(prompt->tokens, Expected(RandomIds(30, 1000), 2));
  for (int i = 0; i < 3; ++i) EXPECT_EQ(generations[i]->tokens, Expected(RandomIds(20 + i, 2), 100));
  ExpectAtRest(0);
}

TEST_P(GenerationTest, RowsFullOfGenerationsLeaveRoomForAPrompt) {
  Make({.num_slots = 32, .max_step_rows = 4});
  std::vector<std::unique_ptr<TokenCall>> generations;
  for (int i = 0; i < 6; ++i) {
    generations.push_back(Generate(batcher_->OpenLane(0), RandomIds(40 + i, 1), 1000000, false));
  }
  for (int i = 0; i < 10; ++i) batcher_->RunOnce();
  const auto late = Forward(batcher_->OpenLane(0), RandomIds(50, 3), ReadoutKind::kValues, 0, false, true);
  for (int i = 0; i < 4; ++i) batcher_->RunOnce();
  EXPECT_TRUE(late->answered);
  // And all of those that generate have their turns.
  const int64_t least = std::min_element(generations.begin(), generations.end(), [](auto& a, auto& b) {
                          return a->tokens.size() < b->tokens.size();
                        })->get()->tokens.size();
  EXPECT_GE(least, 4);
  batcher_.reset();  // Answers what is left.
  for (const auto& call : generations) EXPECT_EQ(ErrorReason(call->result.status), reason::kDraining);
}

// A short tail of a prompt goes along with the piece before it among generations too, and they leave room for
// that.
TEST_P(GenerationTest, APromptAmongManyGenerationsIsCutAsAlone) {
  for (const int64_t prompt_tokens : {70, 80, 81, 133}) {
    SCOPED_TRACE(prompt_tokens);
    Make({.num_slots = 120, .max_step_tokens = 160, .max_step_rows = 120});
    std::vector<std::unique_ptr<TokenCall>> generations;
    for (int i = 0; i < 100; ++i) {
      generations.push_back(Generate(batcher_->OpenLane(0), RandomIds(40 + i, 1), 1000000, false));
    }
    for (int i = 0; i < 10; ++i) batcher_->RunOnce();
    const size_t before = model_->launched().size();
    const auto prompt = Generate(batcher_->OpenLane(0), RandomIds(50, prompt_tokens), 1, false);
    for (int i = 0; i < 8; ++i) batcher_->RunOnce();
    EXPECT_EQ(prompt->tokens, Expected(RandomIds(50, prompt_tokens), 1));
    std::vector<int64_t> pieces;
    const auto launched = model_->launched();
    for (size_t s = before; s < launched.size(); ++s) {
      for (const StepRow& row : launched[s]) {
        if (!row.feed_sampled) pieces.push_back(row.tokens);
      }
    }
    EXPECT_EQ(pieces, prompt_tokens <= 80    ? std::vector<int64_t>{prompt_tokens}
                      : prompt_tokens == 133 ? (std::vector<int64_t>{64, 69})
                                             : (std::vector<int64_t>{64, 17}));
    batcher_.reset();
  }
}

TEST_P(GenerationTest, CancellingInTheMiddleFreesTheSlotWithinAStep) {
  Make();
  const std::shared_ptr<Lane> lane = batcher_->OpenLane(0);
  const std::vector<int64_t> prompt = RandomIds(60, 3);
  const auto seed = Forward(lane, prompt, ReadoutKind::kValues);
  RunAll();
  auto cancellation = std::make_shared<Cancellation>();
  const auto call = Generate(lane, {}, 1000, true, {}, cancellation);
  for (int i = 0; i < 5; ++i) batcher_->RunOnce();
  EXPECT_GE(call->tokens.size(), 2u);
  EXPECT_EQ(batcher_->free_slots(0), 6);
  EXPECT_EQ(batcher_->running_generations(0), 1);
  cancellation->cancelled = true;
  batcher_->Wake();
  const size_t steps = model_->launched().size();
  RunAll();
  EXPECT_EQ(model_->launched().size(), steps);
  ASSERT_TRUE(call->answered);
  EXPECT_EQ(call->result.status.code(), absl::StatusCode::kCancelled);
  EXPECT_EQ(call->result.committed_position, 3);
  EXPECT_EQ(call->result.generated_tokens, static_cast<int64_t>(call->tokens.size()));
  ExpectAtRest(1);
  // The session is where it was.
  const auto next = std::make_unique<TokenCall>();
  std::unique_ptr<Work> work = NewWork(next.get());
  work->expected_position = 3;
  work->generation = std::make_unique<Generation>();
  work->generation->max_tokens = 2;
  work->generation->keep_state = true;
  work->generation->on_token = [call = next.get()](const GeneratedToken& token) {
    call->tokens.push_back(token.id);
    return true;
  };
  ASSERT_TRUE(batcher_->Submit(lane, &work, Batcher::WhenFull::kRefuse).ok());
  RunAll();
  EXPECT_EQ(next->tokens, Expected(prompt, 2));
}

TEST_P(GenerationTest, ClosingTheLaneFreesEverything) {
  Make();
  const std::shared_ptr<Lane> lane = batcher_->OpenLane(0);
  const auto call = Generate(lane, RandomIds(61, 3), 1000, true);
  for (int i = 0; i < 4; ++i) batcher_->RunOnce();
  batcher_->Close(lane);
  RunAll();
  ASSERT_TRUE(call->answered);
  EXPECT_EQ(call->result.status.code(), absl::StatusCode::kCancelled);
  ExpectAtRest(0);
}

TEST_P(GenerationTest, ADeadlinePassesInTheMiddle) {
  Make();
  const std::shared_ptr<Lane> lane = batcher_->OpenLane(0);
  auto call = std::make_unique<TokenCall>();
  call->input = RandomIds(62, 3);
  std::unique_ptr<Work> work = NewWork(call.get());
  work->deadline = clock_.Now() + absl::Seconds(1);
  work->generation = std::make_unique<Generation>();
  work->generation->max_tokens = 1000;
  work->generation->on_token = [&](const GeneratedToken& token) {
    call->tokens.push_back(token.id);
    clock_.Advance(absl::Milliseconds(300));
    return true;
  };
  ASSERT_TRUE(batcher_->Submit(lane, &work, Batcher::WhenFull::kRefuse).ok());
  RunAll();
  EXPECT_EQ(call->result.status.code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_GE(call->tokens.size(), 4u);
  EXPECT_LE(call->tokens.size(), 6u);
  ExpectAtRest(0);
}

TEST_P(GenerationTest, AFailedRowEndsItAndTheSessionStandsWhereItWas) {
  Make();
  const std::shared_ptr<Lane> lane = batcher_->OpenLane(0);
  const auto seed = Forward(lane, RandomIds(63, 3), ReadoutKind::kValues);
  RunAll();
  model_->FailRow(4, 0);
  const auto call = Generate(lane, RandomIds(64, 2), 10, true);
  RunAll();
  ASSERT_TRUE(call->answered);
  EXPECT_EQ(ErrorReason(call->result.status), reason::kNonFinite);
  EXPECT_EQ(call->result.committed_position, 3);
  EXPECT_EQ(call->tokens.size(), 3u);
  ExpectAtRest(1);
}

TEST_P(GenerationTest, NothingToGenerateFromIsAnError) {
  Make();
  const std::shared_ptr<Lane> lane = batcher_->OpenLane(0);
  const auto call = Generate(lane, {}, 3, true);
  RunAll();
  ASSERT_TRUE(call->answered);
  EXPECT_EQ(call->result.status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(ErrorReason(call->result.status), reason::kInvalidRequest);
  ExpectAtRest(0);
}

// --- Readouts ---

float Score(const FakeModel& model, const std::vector<int64_t>& ids, size_t i) {
  return LogProb(model.ExpectedLogits(absl::MakeConstSpan(ids).first(i)), ids[i]);
}

TEST_P(GenerationTest, ScoresTheInputInPiecesAndOverMessages) {
  Make();
  const std::vector<int64_t> first = RandomIds(70, 200), second = RandomIds(71, 90);
  const std::shared_ptr<Lane> lane = batcher_->OpenLane(0);
  const auto a = Forward(lane, first, ReadoutKind::kScore, 2);
  const auto b = Forward(lane, second, ReadoutKind::kScore, 2);
  RunAll();
  ASSERT_TRUE(a->result.status.ok() && b->result.status.ok());
  EXPECT_EQ(a->result.output_position, 1);
  EXPECT_EQ(a->result.output_tokens, 199);
  EXPECT_EQ(b->result.output_position, 200);
  EXPECT_EQ(b->result.output_tokens, 90);
  const std::vector<int64_t> all = Joined(first, second);
  for (size_t i = 1; i < all.size(); ++i) {
    const TokenCall& call = i < 200 ? *a : *b;
    const size_t entry = i < 200 ? i - 1 : i - 200;
    ASSERT_EQ(call.log_probs[entry], Score(*model_, all, i)) << i;
    const std::vector<ScoredId> top =
        MostLikely(model_->ExpectedLogits(absl::MakeConstSpan(all).first(i)), 2);
    ASSERT_EQ(call.top_ids[2 * entry], top[0].id) << i;
    ASSERT_EQ(call.top_log_probs[2 * entry + 1], top[1].log_prob) << i;
  }
  EXPECT_EQ(a->log_probs[199], 1) << "written beyond its end";
}

TEST_P(GenerationTest, TheMostLikelyOfAllTokensOrOfTheLast) {
  Make();
  const std::vector<int64_t> ids = RandomIds(72, 150);
  const auto all = Forward(batcher_->OpenLane(0), ids, ReadoutKind::kTop, 2);
  const auto last = Forward(batcher_->OpenLane(0), ids, ReadoutKind::kTop, 2, /*last_only=*/true);
  RunAll();
  EXPECT_EQ(all->result.output_tokens, 150);
  EXPECT_EQ(all->result.output_position, 0);
  for (size_t i = 0; i < ids.size(); ++i) {
    const std::vector<ScoredId> top =
        MostLikely(model_->ExpectedLogits(absl::MakeConstSpan(ids).first(i + 1)), 2);
    ASSERT_EQ(all->top_ids[2 * i], top[0].id);
    ASSERT_EQ(all->top_log_probs[2 * i + 1], top[1].log_prob);
    if (i == ids.size() - 1) {
      EXPECT_EQ(last->top_ids[0], top[0].id);
      EXPECT_EQ(last->top_ids[1], top[1].id);
    }
  }
  EXPECT_EQ(last->result.output_tokens, 1);
  EXPECT_EQ(last->result.output_position, 149);
}

TEST_P(GenerationTest, LogitsKeepWithinWhatAStepHandsOver) {
  Make({.max_step_logits = 80});
  const std::vector<int64_t> ids = RandomIds(73, 200);
  const auto all = Forward(batcher_->OpenLane(0), ids, ReadoutKind::kValues);
  const auto last = Forward(batcher_->OpenLane(0), ids, ReadoutKind::kValues, 0, /*last_only=*/true);
  const auto also = Forward(batcher_->OpenLane(0), ids, ReadoutKind::kValues);
  RunAll();
  EXPECT_EQ(all->output, model_->ExpectedOutput(ids));
  EXPECT_EQ(also->output, model_->ExpectedOutput(ids));
  EXPECT_EQ(last->result.output_position, 199);
  const std::vector<float> want = model_->ExpectedLogits(ids);
  EXPECT_EQ(std::vector<float>(last->output.begin(), last->output.begin() + kVocabulary), want);
}

}  // namespace
}  // namespace deltanet
