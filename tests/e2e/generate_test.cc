// Generate, Tokenize and Detokenize.
#include <algorithm>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/e2e/tcp_proxy.h"
#include "tests/e2e/test_server.h"

namespace deltanet {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr int64_t kVocabulary = 400;
constexpr int64_t kBos = 1;

FakeModelOptions Generative(int64_t num_slots = 8) {
  FakeModelOptions options;
  options.takes_tokens = true;
  options.output_width = kVocabulary;
  options.num_slots = num_slots;
  options.bos_id = kBos;
  return options;
}

// A server of one such model with a tokenizer.
TestServer MakeServer() { return TestServer(Generative(), ServerOptions(), "bpe_bytes"); }

std::unique_ptr<Tokenizer> LoadTokenizer() {
  return Tokenizer::Load(absl::StrCat(DELTANET_TESTDATA, "/tokenizer/bpe_bytes")).value();
}

std::vector<int64_t> Ids(const Generated& generated) {
  std::vector<int64_t> ids;
  for (const TokenResult& token : generated.tokens) ids.push_back(token.id);
  return ids;
}

std::vector<int64_t> Ids(const std::vector<ScoredId>& tokens) {
  std::vector<int64_t> ids;
  for (const ScoredId& token : tokens) ids.push_back(token.id);
  return ids;
}

std::vector<int64_t> Joined(std::vector<int64_t> a, const std::vector<int64_t>& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

TensorView View(const std::vector<int64_t>& ids) {
  return {ids.data(), {static_cast<int64_t>(ids.size())}, DType::kInt64};
}

absl::StatusOr<Generated> Generate(const Client& client, const GenerateOptions& options) {
  return client.Generate(options, nullptr);
}

// Blocks until the model is at no generation; the test's time limit ends it.
void AwaitNoGeneration(const TestServer& server) {
  while (server.Metric("deltanet_generations_running{model=\"m\"}") +
             server.Metric("deltanet_generations_waiting{model=\"m\"}") >
         0) {
  }
}

TEST(Generate, GivesWhatTheModelMakes) {
  TestServer server(Generative());
  const std::vector<int64_t> prompt = {5, 6, 7};
  const auto result =
      Generate(server.client(), {.request_id = "g1", .prompt = prompt, .max_tokens = 20, .top_log_probs = 2});
  ASSERT_TRUE(result.ok()) << result.status();
  const std::vector<ScoredId> expected = server.model().ExpectedGeneration(prompt, {}, 20);
  EXPECT_EQ(Ids(*result), Ids(expected));
  std::vector<int64_t> sequence = prompt;
  for (size_t i = 0; i < expected.size(); ++i) {
    const TokenResult& token = result->tokens[i];
    EXPECT_EQ(token.log_prob, expected[i].log_prob);
    const std::vector<ScoredId> top = MostLikely(server.model().ExpectedLogits(sequence), 2);
    EXPECT_THAT(token.top_ids, ElementsAre(top[0].id, top[1].id));
    EXPECT_THAT(token.top_log_probs, ElementsAre(top[0].log_prob, top[1].log_prob));
    sequence.push_back(token.id);
  }
  EXPECT_EQ(result->request_id, "g1");
  EXPECT_EQ(result->session_id, "");
  EXPECT_EQ(result->finish_reason, FinishReason::kLength);
  EXPECT_EQ(result->prompt_tokens, 3);
  EXPECT_EQ(result->generated_tokens, 20);
  EXPECT_EQ(result->text, "") << "there is no tokenizer";
  EXPECT_GT(result->time_to_first_token, absl::ZeroDuration());
  EXPECT_GT(result->computing, absl::ZeroDuration());
  EXPECT_EQ(server.client().GetModel("")->sessions, 0);
}

TEST(Generate, LogProbabilitiesComeWhereTheyAreAskedFor) {
  TestServer server(Generative());
  const std::vector<int64_t> prompt = {5};
  const auto without = Generate(server.client(), {.prompt = prompt, .max_tokens = 1});
  ASSERT_TRUE(without.ok()) << without.status();
  EXPECT_EQ(without->tokens[0].log_prob, 0);
  const auto alone = Generate(server.client(), {.prompt = prompt, .max_tokens = 1, .top_log_probs = 0});
  ASSERT_TRUE(alone.ok()) << alone.status();
  EXPECT_LT(alone->tokens[0].log_prob, 0);
  EXPECT_TRUE(alone->tokens[0].top_ids.empty());
}

TEST(Generate, EachTokenComesAsItIsMade) {
  TestServer server(Generative());
  server.model().Hold(3);
  const std::vector<int64_t> prompt = {5, 6};
  const auto stream = server.client().OpenGeneration({.prompt = prompt, .max_tokens = 6});
  std::vector<int64_t> ids;
  Generated response;
  while (ids.size() < 3) {
    ASSERT_TRUE(stream->Read(&response));
    EXPECT_EQ(response.finish_reason, FinishReason::kNone);
    ids = Joined(ids, Ids(response));
  }
  EXPECT_EQ(ids, Ids(server.model().ExpectedGeneration(prompt, {}, 3)));
  server.model().WaitUntilHeld(3);
  EXPECT_EQ(server.Metric("deltanet_generations_running{model=\"m\"}"), 1);
  server.model().Release(3);
  while (stream->Read(&response)) ids = Joined(ids, Ids(response));
  EXPECT_TRUE(stream->Finish().ok());
  EXPECT_EQ(ids, Ids(server.model().ExpectedGeneration(prompt, {}, 6)));
}

TEST(Generate, SeedsRepeatAndAreChosenAndSaidWhereTheyAreNot) {
  TestServer server(Generative());
  const std::vector<int64_t> prompt = {5, 6, 7};
  GenerateOptions options{.prompt = prompt, .max_tokens = 12};
  options.sampling = {.temperature = 1.5f, .top_k = 50, .top_p = 0.9f, .seed = 42};
  const auto first = Generate(server.client(), options);
  ASSERT_TRUE(first.ok()) << first.status();
  EXPECT_EQ(Ids(*first), Ids(server.model().ExpectedGeneration(
                             prompt, {.temperature = 1.5f, .top_k = 50, .top_p = 0.9f, .seed = 42}, 12)));
  EXPECT_EQ(first->seed, 42u);
  options.sampling.seed = std::nullopt;
  const auto chosen = Generate(server.client(), options);
  const auto other = Generate(server.client(), options);
  ASSERT_TRUE(chosen.ok() && other.ok()) << chosen.status() << other.status();
  EXPECT_NE(chosen->seed, other->seed);
  EXPECT_NE(Ids(*chosen), Ids(*other));
  options.sampling.seed = chosen->seed;
  EXPECT_EQ(Ids(Generate(server.client(), options).value()), Ids(*chosen));
  // Nothing is drawn, and nothing is said.
  options.sampling = {};
  EXPECT_EQ(Generate(server.client(), options)->seed, 0u);
}

TEST(Generate, EndsWithAStopIdOrTheModelsOwn) {
  FakeModelOptions model = Generative();
  const std::vector<int64_t> prompt = {5, 6, 7};
  std::vector<int64_t> expected = Ids(FakeModel(model).ExpectedGeneration(prompt, {}, 30));
  model.eos_id = expected[9];
  const size_t eos = std::find(expected.begin(), expected.end(), expected[9]) - expected.begin();
  const size_t stop = std::find(expected.begin(), expected.end(), expected[4]) - expected.begin();
  TestServer server(model);
  const auto to = [&](size_t count) {
    return std::vector<int64_t>(expected.begin(), expected.begin() + static_cast<int64_t>(count));
  };
  const auto own = Generate(server.client(), {.prompt = prompt, .max_tokens = 30});
  ASSERT_TRUE(own.ok()) << own.status();
  EXPECT_EQ(Ids(*own), to(eos + 1)) << "the id itself is there";
  EXPECT_EQ(own->finish_reason, FinishReason::kStopId);
  EXPECT_EQ(own->generated_tokens, static_cast<int64_t>(eos) + 1);
  const auto given =
      Generate(server.client(), {.prompt = prompt, .max_tokens = 30, .stop_ids = {expected[4], 399}});
  EXPECT_EQ(Ids(*given), to(stop + 1));
  EXPECT_EQ(given->finish_reason, FinishReason::kStopId);
  const auto ignored = Generate(server.client(), {.prompt = prompt, .max_tokens = 30, .ignore_eos = true});
  EXPECT_EQ(Ids(*ignored), expected);
  EXPECT_EQ(ignored->finish_reason, FinishReason::kLength);
  const auto last =
      Generate(server.client(), {.prompt = prompt, .max_tokens = static_cast<int64_t>(eos) + 1});
  EXPECT_EQ(last->finish_reason, FinishReason::kStopId) << "not LENGTH, though that is reached as well";
}

TEST(Generate, TextIsThatOfTheTokens) {
  TestServer server = MakeServer();
  const auto tokenizer = LoadTokenizer();
  const std::string text = "the state of the session";
  const std::vector<int64_t> prompt = Joined({kBos}, tokenizer->Encode(text, TextPlace::kBegins).value());
  const auto result = Generate(server.client(), {.prompt = text, .max_tokens = 100});
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(result->prompt_tokens, static_cast<int64_t>(prompt.size()));
  EXPECT_EQ(Ids(*result), Ids(server.model().ExpectedGeneration(prompt, {}, 100)));
  EXPECT_EQ(text + result->text, tokenizer->Decode(Joined(prompt, Ids(*result))).value());
  EXPECT_GT(result->text.size(), 100u);
}

TEST(Generate, TextComesInWholeCharacters) {
  TestServer server = MakeServer();
  for (int64_t first = 3; first < 30; ++first) {
    std::string joined;
    const auto result = server.client().Generate(
        {.prompt = std::vector<int64_t>{first}, .max_tokens = 30}, [&](const Generated& response) {
          for (size_t i = 0; i < response.text.size();) {
            const int length = Utf8Length(absl::string_view(response.text).substr(i));
            EXPECT_GT(length, 0);
            i += static_cast<size_t>(std::max(length, 1));
          }
          joined += response.text;
          return true;
        });
    ASSERT_TRUE(result.ok()) << result.status();
    const auto tokenizer = LoadTokenizer();
    EXPECT_EQ(tokenizer->Decode({first}).value() + joined,
              tokenizer->Decode(Joined({first}, Ids(*result))).value());
  }
}

// Stop strings are cut out of what is generated without them: any characters of it, wherever tokens begin.
TEST(Generate, EndsBeforeAStopString) {
  TestServer server = MakeServer();
  const auto tokenizer = LoadTokenizer();
  const std::vector<int64_t> prompt = {kBos};
  constexpr int64_t kTokens = 40;
  const auto whole = Generate(server.client(), {.max_tokens = kTokens});
  ASSERT_TRUE(whole.ok()) << whole.status();
  const std::vector<int64_t> ids = Ids(*whole);
  EXPECT_EQ(whole->prompt_tokens, 1) << "the begin-of-sequence id alone";
  std::vector<size_t> characters;  // Where they begin.
  for (size_t i = 0; i < whole->text.size(); i += Utf8Length(absl::string_view(whole->text).substr(i))) {
    characters.push_back(i);
  }
  std::mt19937 random(5);
  int spans_tokens = 0;
  for (int round = 0; round < 60; ++round) {
    const size_t begin = random() % (characters.size() - 8);
    const size_t count = 1 + random() % 7;
    const std::string stop =
        whole->text.substr(characters[begin], characters[begin + count] - characters[begin]);
    const auto result = Generate(
        server.client(), {.max_tokens = kTokens, .stop = {"this is nowhere", stop, stop + "nor is this"}});
    ASSERT_TRUE(result.ok()) << result.status();
    const size_t found = whole->text.find(stop);
    EXPECT_EQ(result->text, whole->text.substr(0, found));
    EXPECT_EQ(result->finish_reason, FinishReason::kStopText);
    EXPECT_EQ(result->matched_stop, stop);
    // As many tokens as it takes to have the string.
    const std::vector<int64_t> made = Ids(*result);
    EXPECT_EQ(made, std::vector<int64_t>(ids.begin(), ids.begin() + static_cast<int64_t>(made.size())));
    TextDecoder decoder(tokenizer.get(), TextPlace::kBegins);
    std::string text, before;
    for (const int64_t id : made) {
      before = text;
      decoder.Append(id, &text);
    }
    const bool at_the_end = static_cast<int64_t>(made.size()) == kTokens && !absl::StrContains(text, stop);
    if (at_the_end) decoder.Finish(&text);
    EXPECT_TRUE(absl::StrContains(text, stop));
    EXPECT_FALSE(!at_the_end && absl::StrContains(before, stop));
    spans_tokens += before.size() > found ? 1 : 0;
  }
  EXPECT_GT(spans_tokens, 10);
}

TEST(Generate, WhatCouldBeAStopStringIsHeldBackAndThenSent) {
  TestServer server = MakeServer();
  const auto whole = Generate(server.client(), {.max_tokens = 20});
  ASSERT_TRUE(whole.ok()) << whole.status();
  const std::string almost = whole->text.substr(whole->text.size() / 2) + "!";
  const auto result = Generate(server.client(), {.max_tokens = 20, .stop = {almost}});
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(result->text, whole->text);
  EXPECT_EQ(result->finish_reason, FinishReason::kLength);
  EXPECT_EQ(result->matched_stop, "");
}

TEST(Generate, ASessionGoesOnAsIfItWereOneCall) {
  TestServer server(Generative());
  const std::vector<int64_t> prompt = {5, 6, 7, 8, 9};
  const std::vector<int64_t> expected = Ids(server.model().ExpectedGeneration(prompt, {}, 15));
  ASSERT_TRUE(server.client().Forward(View({5, 6, 7}), {.session = SessionChoice{"s", true}}).ok());
  const auto first = Generate(server.client(), {.session = SessionChoice{"s"},
                                                .prompt = std::vector<int64_t>{8, 9},
                                                .max_tokens = 4,
                                                .expected_position = 3});
  ASSERT_TRUE(first.ok()) << first.status();
  EXPECT_EQ(first->session_id, "s");
  EXPECT_EQ(first->committed_position, 9);
  EXPECT_EQ(first->prompt_tokens, 2);
  const auto second = Generate(server.client(), {.session = SessionChoice{"s"}, .max_tokens = 10});
  ASSERT_TRUE(second.ok()) << second.status();
  EXPECT_EQ(second->committed_position, 19);
  EXPECT_EQ(second->prompt_tokens, 0);
  const auto third = Generate(server.client(), {.session = SessionChoice{"s"}, .max_tokens = 1});
  ASSERT_TRUE(third.ok()) << third.status();
  EXPECT_EQ(Joined(Joined(Ids(*first), Ids(*second)), Ids(*third)), expected);
  // It has taken in every token, the last one too: what follows is that of the whole sequence.
  const auto last = server.client().Forward(View({33}), {.session = SessionChoice{"s"}});
  ASSERT_TRUE(last.ok()) << last.status();
  EXPECT_EQ(Floats(last->output), server.model().ExpectedLogits(Joined(Joined(prompt, expected), {33})));
  EXPECT_EQ(last->output_position, 20);
}

TEST(Generate, SampledSessionsGoOnAsIfTheyWereOneCall) {
  TestServer server(Generative());
  const std::vector<int64_t> prompt = {5, 6};
  const SamplingOptions sampling = {.temperature = 1, .seed = 9};
  const std::vector<int64_t> expected =
      Ids(server.model().ExpectedGeneration(prompt, {.temperature = 1, .seed = 9}, 9));
  std::vector<int64_t> ids;
  for (int i = 0; i < 3; ++i) {
    GenerateOptions options{.session = SessionChoice{"s", i == 0}, .sampling = sampling, .max_tokens = 3};
    if (i == 0) options.prompt = prompt;
    const auto result = Generate(server.client(), options);
    ASSERT_TRUE(result.ok()) << result.status();
    ids = Joined(ids, Ids(*result));
  }
  EXPECT_EQ(ids, expected);
}

TEST(Generate, TextsOfASessionGoOnWhereTheOneBeforeEnded) {
  TestServer server = MakeServer();
  const auto tokenizer = LoadTokenizer();
  std::string text;
  std::vector<int64_t> ids = {kBos};
  for (const std::string& prompt : {std::string("the state"), std::string(" of a matrix"), std::string()}) {
    const auto prompt_ids =
        tokenizer->Encode(prompt, ids.size() == 1 ? TextPlace::kBegins : TextPlace::kGoesOn).value();
    const auto result = Generate(
        server.client(), {.session = SessionChoice{"s", ids.size() == 1}, .prompt = prompt, .max_tokens = 8});
    ASSERT_TRUE(result.ok()) << result.status();
    ids = Joined(ids, prompt_ids);
    EXPECT_EQ(Ids(*result), Ids(server.model().ExpectedGeneration(ids, {}, 8)));
    ids = Joined(ids, Ids(*result));
    EXPECT_EQ(result->committed_position, static_cast<int64_t>(ids.size()));
    EXPECT_EQ(result->prompt_tokens, static_cast<int64_t>(prompt_ids.size()) + (text.empty() ? 1 : 0));
    text += prompt + result->text;
  }
  EXPECT_EQ(text, tokenizer->Decode(ids).value());
}

TEST(Generate, CallersOfOneSessionQueue) {
  TestServer server(Generative());
  ASSERT_TRUE(server.client().Forward(View({7}), {.session = SessionChoice{"s", true}}).ok());
  constexpr int kCallers = 6;
  std::vector<Generated> results(kCallers);
  std::vector<std::thread> callers;
  for (Generated& result : results) {
    callers.emplace_back([&] {
      result = Generate(server.client(), {.session = SessionChoice{"s"}, .max_tokens = 5}).value();
    });
  }
  for (std::thread& caller : callers) caller.join();
  std::sort(results.begin(), results.end(), [](const Generated& a, const Generated& b) {
    return a.committed_position < b.committed_position;
  });
  std::vector<int64_t> ids;
  for (const Generated& result : results) {
    ids = Joined(ids, Ids(result));
    EXPECT_EQ(result.committed_position, static_cast<int64_t>(1 + ids.size()));
  }
  EXPECT_EQ(ids, Ids(server.model().ExpectedGeneration({7}, {}, 5 * kCallers)));
}

TEST(Generate, ManyAtATimeDoNotMixUp) {
  FakeModelOptions model = Generative(/*num_slots=*/20);  // Fewer than calls: some wait.
  model.max_steps_in_flight = 2;
  TestServer server(model, ServerOptions(), "bpe_bytes");
  constexpr int kCalls = 40;
  std::vector<std::thread> callers;
  for (int c = 0; c < kCalls; ++c) {
    callers.emplace_back([&server, c] {
      std::vector<int64_t> prompt(1 + c * 7, 3 + c);
      GenerateOptions options{.prompt = prompt, .max_tokens = 10 + c};
      options.sampling = {.temperature = c % 2 == 0 ? 0.0f : 1.0f, .seed = c};
      Sampling sampling{.temperature = options.sampling.temperature, .seed = static_cast<uint64_t>(c)};
      const auto result = Generate(server.client(), options);
      ASSERT_TRUE(result.ok()) << result.status();
      EXPECT_EQ(Ids(*result), Ids(server.model().ExpectedGeneration(prompt, sampling, 10 + c)));
    });
  }
  // And streams beside them.
  const std::vector<int64_t> ids(300, 9);
  for (int i = 0; i < 10; ++i) {
    const auto scored = server.client().Score(ids, 0, {});
    ASSERT_TRUE(scored.ok()) << scored.status();
    EXPECT_EQ(scored->log_probs.size(), ids.size() - 1);
  }
  for (std::thread& caller : callers) caller.join();
  EXPECT_EQ(server.Metric("deltanet_slots_free{model=\"m\"}"), 20);
  EXPECT_EQ(server.Metric("deltanet_generations_finished_total{model=\"m\",reason=\"length\"}"), kCalls);
}

TEST(Generate, AFailureLeavesTheSessionWhereItWas) {
  TestServer server(Generative());
  ASSERT_TRUE(server.client().Forward(View({7}), {.session = SessionChoice{"s", true}}).ok());
  server.model().FailRow(3, 0);
  std::vector<int64_t> got;
  const auto failed = server.client().Generate({.session = SessionChoice{"s"}, .max_tokens = 9},
                                               [&](const Generated& response) {
                                                 got = Joined(got, Ids(response));
                                                 return true;
                                               });
  EXPECT_EQ(failed.status().code(), absl::StatusCode::kInternal);
  EXPECT_EQ(ErrorReason(failed.status()), reason::kNonFinite);
  EXPECT_EQ(ErrorMetadata(failed.status(), "committed_position"), "1");
  EXPECT_EQ(got, Ids(server.model().ExpectedGeneration({7}, {}, 2))) << "what was good came";
  const auto blind = Generate(server.client(), {.session = SessionChoice{"s"}, .max_tokens = 9});
  EXPECT_EQ(ErrorReason(blind.status()), reason::kSessionOutOfStep);
  const auto good =
      Generate(server.client(), {.session = SessionChoice{"s"}, .max_tokens = 9, .expected_position = 1});
  ASSERT_TRUE(good.ok()) << good.status();
  EXPECT_EQ(Ids(*good), Ids(server.model().ExpectedGeneration({7}, {}, 9)));
  EXPECT_EQ(server.Metric("deltanet_generations_finished_total{model=\"m\",reason=\"error\"}"), 2);
}

TEST(Generate, ABadMessageTakesItsPlaceAmongTheSessions) {
  TestServer server(Generative());
  ASSERT_TRUE(server.client().Forward(View({7}), {.session = SessionChoice{"s", true}}).ok());
  const auto bad = Generate(server.client(), {.session = SessionChoice{"s"}, .max_tokens = 5000});
  EXPECT_EQ(ErrorReason(bad.status()), reason::kInvalidRequest);
  EXPECT_EQ(ErrorMetadata(bad.status(), "committed_position"), "1");
  const auto behind = Generate(server.client(), {.session = SessionChoice{"s"}, .max_tokens = 5});
  EXPECT_EQ(ErrorReason(behind.status()), reason::kSessionOutOfStep);
}

TEST(Generate, AFailedCreationLeavesNothingBehind) {
  TestServer server(Generative());
  server.model().FailWait(2, absl::InternalError("broken"));
  const GenerateOptions options{
      .session = SessionChoice{"s", true}, .prompt = std::vector<int64_t>{4}, .max_tokens = 5};
  const auto failed = Generate(server.client(), options);
  EXPECT_EQ(failed.status().code(), absl::StatusCode::kInternal);
  EXPECT_EQ(ErrorMetadata(failed.status(), "committed_position"), "0");
  EXPECT_EQ(server.client().GetModel("")->sessions, 0);
  EXPECT_TRUE(Generate(server.client(), options).ok());
}

// A server that lets a call make more tokens than a test waits for.
ServerOptions Endless() {
  ServerOptions options;
  options.max_generated_tokens = int64_t{1} << 30;
  return options;
}

TEST(Generate, ACancelledCallFreesItsSlot) {
  TestServer server(Generative(), Endless());
  server.model().Hold(5);
  const auto stream =
      server.client().OpenGeneration({.prompt = std::vector<int64_t>{4}, .max_tokens = int64_t{1} << 30});
  Generated response;
  ASSERT_TRUE(stream->Read(&response));
  server.model().WaitUntilHeld(5);
  EXPECT_EQ(server.Metric("deltanet_slots_free{model=\"m\"}"), 7);
  stream->Cancel();
  EXPECT_EQ(stream->Finish().code(), absl::StatusCode::kCancelled);
  server.model().Release(5);
  AwaitNoGeneration(server);
  EXPECT_EQ(server.Metric("deltanet_slots_free{model=\"m\"}"), 8);
  EXPECT_EQ(server.Metric("deltanet_generations_finished_total{model=\"m\",reason=\"cancelled\"}"), 1);
}

TEST(Generate, ACancelledCallLeavesItsSessionWhereItWas) {
  TestServer server(Generative(), Endless());
  ASSERT_TRUE(server.client().Forward(View({7}), {.session = SessionChoice{"s", true}}).ok());
  server.model().Hold(3);
  const auto stream =
      server.client().OpenGeneration({.session = SessionChoice{"s"}, .max_tokens = int64_t{1} << 30});
  server.model().WaitUntilHeld(3);
  stream->Cancel();
  EXPECT_EQ(stream->Finish().code(), absl::StatusCode::kCancelled);
  server.model().Release(3);
  AwaitNoGeneration(server);
  const auto again =
      Generate(server.client(), {.session = SessionChoice{"s"}, .max_tokens = 6, .expected_position = 1});
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_EQ(Ids(*again), Ids(server.model().ExpectedGeneration({7}, {}, 6)));
}

TEST(Generate, ADeadlineThatPassesGivesTheWorkUp) {
  TestServer server(Generative(), Endless());
  server.model().Hold(4);
  const auto late = Generate(
      server.client(),
      {.prompt = std::vector<int64_t>{4}, .max_tokens = int64_t{1} << 30, .timeout = absl::Milliseconds(30)});
  EXPECT_EQ(late.status().code(), absl::StatusCode::kDeadlineExceeded);
  server.model().Release(4);
  AwaitNoGeneration(server);
  EXPECT_EQ(server.Metric("deltanet_slots_free{model=\"m\"}"), 8);
  EXPECT_TRUE(Generate(server.client(), {.prompt = std::vector<int64_t>{4}, .max_tokens = 4}).ok());
}

TEST(Generate, ASlowReaderHoldsNoSlot) {
  ServerOptions options;
  options.max_generated_tokens = 20000;
  TestServer server(Generative(), options);
  constexpr int64_t kTokens = 20000;  // With 64 candidates each far more than the connection takes unread.
  const auto stream = server.client().OpenGeneration(
      {.prompt = std::vector<int64_t>{4}, .max_tokens = kTokens, .top_log_probs = 64});
  Generated response;
  ASSERT_TRUE(stream->Read(&response));  // It has begun.
  AwaitNoGeneration(server);
  EXPECT_EQ(server.Metric("deltanet_slots_free{model=\"m\"}"), 8);
  EXPECT_EQ(server.Metric("deltanet_generated_tokens_total{model=\"m\"}"), kTokens);
  EXPECT_TRUE(Generate(server.client(), {.prompt = std::vector<int64_t>{4}, .max_tokens = 4}).ok());
  std::vector<int64_t> ids = Ids(response);
  int64_t responses = 1, most = 0;
  while (stream->Read(&response)) {
    ids = Joined(ids, Ids(response));
    ++responses;
    most = std::max(most, static_cast<int64_t>(response.tokens.size()));
  }
  EXPECT_TRUE(stream->Finish().ok());
  EXPECT_EQ(ids, Ids(server.model().ExpectedGeneration({4}, {}, kTokens)));
  EXPECT_GT(most, 10) << "what came while a write was under way is one response";
  EXPECT_LT(responses, kTokens);
}

TEST(Generate, ResponsesKeepToTheLargestMessage) {
  ServerOptions options;
  options.max_message_bytes = 64 * 1024;
  TestServer server(Generative(), options);
  const auto stream = server.client().OpenGeneration(
      {.prompt = std::vector<int64_t>{4}, .max_tokens = 4000, .top_log_probs = 64});
  Generated response;
  ASSERT_TRUE(stream->Read(&response));
  AwaitNoGeneration(server);
  std::vector<int64_t> ids = Ids(response);
  size_t most = 0;
  while (stream->Read(&response)) {
    ids = Joined(ids, Ids(response));
    most = std::max(most, response.tokens.size());
  }
  EXPECT_TRUE(stream->Finish().ok());
  EXPECT_EQ(ids.size(), 4000u);
  EXPECT_LE(most * (64 * 5), size_t{64} * 1024);
}

TEST(Generate, AVanishedClientIsNoticed) {
  TestServer server(Generative(), Endless());
  auto proxy = std::make_unique<TcpProxy>(server.server().port());
  const auto client = Client::Connect(absl::StrCat("127.0.0.1:", proxy->port()), {});
  ASSERT_TRUE(client.ok());
  const auto stream =
      client->OpenGeneration({.prompt = std::vector<int64_t>{4}, .max_tokens = int64_t{1} << 30});
  Generated response;
  ASSERT_TRUE(stream->Read(&response));
  proxy.reset();
  AwaitNoGeneration(server);
  EXPECT_EQ(server.Metric("deltanet_slots_free{model=\"m\"}"), 8);
  while (stream->Read(&response)) {
  }
  EXPECT_EQ(stream->Finish().code(), absl::StatusCode::kUnavailable);
}

TEST(Generate, ADrainFinishesWhatRuns) {
  TestServer server(Generative());
  server.model().Hold(2);
  const std::vector<int64_t> prompt = {4};
  std::thread caller([&] {
    const auto result = Generate(server.client(), {.prompt = prompt, .max_tokens = 50});
    ASSERT_TRUE(result.ok()) << result.status();
    EXPECT_EQ(Ids(*result), Ids(server.model().ExpectedGeneration(prompt, {}, 50)));
  });
  server.model().WaitUntilHeld(2);
  server.server().StartDraining();
  const auto refused = Generate(server.client(), {.prompt = prompt, .max_tokens = 5});
  EXPECT_EQ(refused.status().code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(ErrorReason(refused.status()), reason::kDraining);
  server.model().Release(2);
  EXPECT_TRUE(server.server().Shutdown(absl::Seconds(60)));
  caller.join();
}

TEST(Generate, AShutdownCutsWhatIsTooLong) {
  TestServer server(Generative(), Endless());
  const auto stream =
      server.client().OpenGeneration({.prompt = std::vector<int64_t>{4}, .max_tokens = int64_t{1} << 30});
  Generated response;
  ASSERT_TRUE(stream->Read(&response));
  EXPECT_FALSE(server.server().Shutdown(absl::Milliseconds(50)));
  while (stream->Read(&response)) {
  }
  EXPECT_FALSE(stream->Finish().ok());
}

TEST(Generate, TheServerSaysHowManyTokensWhereTheRequestDoesNot) {
  ServerOptions options;
  options.default_generated_tokens = 17;
  TestServer server(Generative(), options);
  EXPECT_EQ(Generate(server.client(), {.prompt = std::vector<int64_t>{4}})->generated_tokens, 17);
  options.max_generated_tokens = 11;
  TestServer stricter(Generative(), options);
  EXPECT_EQ(stricter.client().GetModel("")->max_generated_tokens, 11);
  EXPECT_EQ(Generate(stricter.client(), {.prompt = std::vector<int64_t>{4}})->generated_tokens, 11);
}

TEST(Generate, AFullQueueRefuses) {
  ServerOptions options;
  options.batcher.max_queued_works = 1;
  TestServer server(Generative(), options);
  server.model().Hold(0);
  const auto generate = [&] {
    return Generate(server.client(), {.prompt = std::vector<int64_t>{4}, .max_tokens = 3});
  };
  std::thread running([&] { EXPECT_TRUE(generate().ok()); });
  server.model().WaitUntilHeld(0);
  std::thread queued([&] { EXPECT_TRUE(generate().ok()); });
  while (server.Metric("deltanet_generations_waiting{model=\"m\"}") < 1) continue;
  const auto refused = generate();
  EXPECT_EQ(refused.status().code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(ErrorReason(refused.status()), reason::kQueueFull);
  server.model().Release(0);
  running.join();
  queued.join();
}

TEST(Generate, ItsMetrics) {
  TestServer server(Generative());
  ASSERT_TRUE(Generate(server.client(), {.prompt = std::vector<int64_t>{4, 5}, .max_tokens = 10}).ok());
  const auto count = [&](const std::string& name) {
    return server.Metric(absl::StrCat("deltanet_", name, "{model=\"m\"}"));
  };
  EXPECT_EQ(count("time_to_first_token_seconds_count"), 1);
  EXPECT_EQ(count("time_per_output_token_seconds_count"), 9);
  EXPECT_EQ(count("prompt_tokens_total"), 2);
  EXPECT_EQ(count("generated_tokens_total"), 10);
  EXPECT_EQ(count("generations_running"), 0);
  EXPECT_EQ(count("generations_waiting"), 0);
  EXPECT_EQ(server.Metric("deltanet_requests_total{code=\"OK\",method=\"Generate\"}"), 1);
}

struct BadGenerate {
  const char* name;
  GenerateOptions options;
  absl::StatusCode code;
  const char* reason;
  const char* message;
};

class GenerateErrors : public ::testing::TestWithParam<BadGenerate> {};

TEST_P(GenerateErrors, NameWhatIsWrong) {
  ServerOptions options;
  options.batcher.max_queued_tokens = 100;
  FakeModelOptions lagging = Generative();
  lagging.lookahead = 3;
  FakeModelOptions without_bos = Generative();
  without_bos.bos_id = std::nullopt;
  FakeModelOptions narrow = Generative();
  narrow.output_width = 300;  // Less than the tokenizer's ids.
  TestServer server(
      FakeModels{{"ids", without_bos}, {"lagging", lagging}, {"narrow", narrow}, {"values", {}}}, options,
      "bpe_bytes");
  const auto stream = server.client().OpenStream({});
  StreamResponse response;
  const std::vector<int64_t> ids = {4};
  ASSERT_TRUE(
      stream->Write({.model = "ids", .session = SessionChoice{"attached", true}, .input = View(ids)}));
  ASSERT_TRUE(stream->Read(&response) && response.status.ok());
  ASSERT_TRUE(
      server.client().Forward(View(ids), {.model = "ids", .session = SessionChoice{"there", true}}).ok());
  const auto result = Generate(server.client(), GetParam().options);
  EXPECT_EQ(result.status().code(), GetParam().code) << result.status();
  EXPECT_EQ(ErrorReason(result.status()), GetParam().reason);
  EXPECT_THAT(std::string(result.status().message()), HasSubstr(GetParam().message));
  EXPECT_EQ(server.client().GetModel("ids")->sessions, 2);
  EXPECT_EQ(server.Metric("deltanet_generated_tokens_total{model=\"ids\"}"), 0);
}

const std::vector<int64_t> kPrompt = {4};
constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;
constexpr auto kFailed = absl::StatusCode::kFailedPrecondition;

INSTANTIATE_TEST_SUITE_P(
    Cases, GenerateErrors,
    ::testing::Values(
        BadGenerate{"Values",
                    {.model = "values", .prompt = kPrompt},
                    kFailed,
                    reason::kNotGenerative,
                    "the model cannot generate: it is one over values"},
        BadGenerate{"Lookahead",
                    {.model = "lagging", .prompt = kPrompt},
                    kFailed,
                    reason::kNotGenerative,
                    "it has a look-ahead of 3 tokens, want 0"},
        BadGenerate{"Model",
                    {.model = "x", .prompt = kPrompt},
                    absl::StatusCode::kNotFound,
                    reason::kModelNotFound,
                    "model is \"x\""},
        BadGenerate{
            "EmptyPrompt", {.model = "ids"}, kInvalid, reason::kInvalidRequest, "the prompt is empty"},
        BadGenerate{"EmptyText",
                    {.model = "ids", .prompt = std::string()},
                    kInvalid,
                    reason::kInvalidRequest,
                    "the prompt is empty"},
        BadGenerate{"Ids",
                    {.model = "ids", .prompt = std::vector<int64_t>{1, 400}},
                    kInvalid,
                    reason::kInvalidRequest,
                    "ids number 1 is 400, want 0 to 399"},
        BadGenerate{"TextBeyondTheModel",
                    {.model = "narrow", .prompt = std::string("the state")},
                    kInvalid,
                    reason::kInvalidRequest,
                    "want 0 to 299"},
        BadGenerate{"TooLong",
                    {.model = "ids", .prompt = std::vector<int64_t>(101, 1)},
                    kInvalid,
                    reason::kInvalidRequest,
                    "the prompt has 101 tokens, want at most 100"},
        BadGenerate{"TextTooLong",
                    {.model = "ids", .prompt = std::string(801, 'x')},
                    kInvalid,
                    reason::kInvalidRequest,
                    "text has 801 bytes, want at most 800"},
        BadGenerate{"MaxTokens",
                    {.model = "ids", .prompt = kPrompt, .max_tokens = 4097},
                    kInvalid,
                    reason::kInvalidRequest,
                    "max_tokens is 4097, want 0 to 4096"},
        BadGenerate{"Temperature",
                    {.model = "ids", .prompt = kPrompt, .sampling = {.temperature = -1}},
                    kInvalid,
                    reason::kInvalidRequest,
                    "sampling.temperature is -1"},
        BadGenerate{"StopIds",
                    {.model = "ids", .prompt = kPrompt, .stop_ids = {-1}},
                    kInvalid,
                    reason::kInvalidRequest,
                    "stop_ids number 0 is -1"},
        BadGenerate{"Stop",
                    {.model = "ids", .prompt = kPrompt, .stop = {""}},
                    kInvalid,
                    reason::kInvalidRequest,
                    "stop has a string of 0 bytes"},
        BadGenerate{"Top",
                    {.model = "ids", .prompt = kPrompt, .top_log_probs = 65},
                    kInvalid,
                    reason::kInvalidRequest,
                    "top_log_probs is 65, want 0 to 64"},
        BadGenerate{"RequestId",
                    {.request_id = std::string(129, 'x'), .model = "ids", .prompt = kPrompt},
                    kInvalid,
                    reason::kInvalidRequest,
                    "request_id has 129 bytes"},
        BadGenerate{"PositionWithoutSession",
                    {.model = "ids", .prompt = kPrompt, .expected_position = 0},
                    kInvalid,
                    reason::kInvalidRequest,
                    "expected_position is 0 without a session"},
        BadGenerate{"SessionId",
                    {.session = SessionChoice{"a/b"}, .prompt = kPrompt},
                    kInvalid,
                    reason::kInvalidRequest,
                    "session.id"},
        BadGenerate{"SessionUnknown",
                    {.session = SessionChoice{"nobody"}, .prompt = kPrompt},
                    absl::StatusCode::kNotFound,
                    reason::kSessionNotFound,
                    "nobody"},
        BadGenerate{"SessionExists",
                    {.model = "ids", .session = SessionChoice{"there", true}, .prompt = kPrompt},
                    absl::StatusCode::kAlreadyExists,
                    reason::kSessionExists,
                    "there"},
        BadGenerate{"SessionModel",
                    {.model = "narrow", .session = SessionChoice{"there"}, .prompt = kPrompt},
                    kFailed,
                    reason::kSessionModel,
                    "another model"},
        BadGenerate{"SessionAttached",
                    {.session = SessionChoice{"attached"}, .prompt = kPrompt},
                    absl::StatusCode::kAborted,
                    reason::kSessionAttached,
                    "attached to another stream"},
        BadGenerate{"Position",
                    {.session = SessionChoice{"there"}, .prompt = kPrompt, .expected_position = 3},
                    kFailed,
                    reason::kPositionMismatch,
                    "expected_position is 3"},
        BadGenerate{"PositionNegative",
                    {.session = SessionChoice{"there"}, .prompt = kPrompt, .expected_position = -3},
                    kInvalid,
                    reason::kInvalidRequest,
                    "expected_position is -3"}),
    [](const auto& info) { return std::string(info.param.name); });

TEST(Generate, WithoutATokenizerThereAreIdsAlone) {
  TestServer server(Generative());
  for (const GenerateOptions& options :
       {GenerateOptions{.prompt = std::string("text")}, GenerateOptions{.prompt = kPrompt, .stop = {"x"}}}) {
    const auto result = Generate(server.client(), options);
    EXPECT_EQ(result.status().code(), kFailed);
    EXPECT_EQ(ErrorReason(result.status()), reason::kNoTokenizer);
  }
  EXPECT_EQ(ErrorReason(server.client().Tokenize("", "text", false).status()), reason::kNoTokenizer);
  EXPECT_EQ(ErrorReason(server.client().Detokenize("", {1}).status()), reason::kNoTokenizer);
  EXPECT_FALSE(server.client().GetModel("")->has_tokenizer);
}

TEST(Tokenize, ThereAndBack) {
  TestServer server = MakeServer();
  const auto tokenizer = LoadTokenizer();
  const std::string text = "the state of Ж and 🙂";
  const std::vector<int64_t> expected = tokenizer->Encode(text, TextPlace::kBegins).value();
  const auto ids = server.client().Tokenize("m", text, /*add_bos=*/false);
  ASSERT_TRUE(ids.ok()) << ids.status();
  EXPECT_EQ(*ids, expected);
  EXPECT_EQ(server.client().Tokenize("", text, /*add_bos=*/true).value(), Joined({kBos}, expected));
  EXPECT_EQ(server.client().Detokenize("m", Joined({kBos}, expected)).value(), text);
  const auto bad = server.client().Detokenize("", {1, -5});
  EXPECT_EQ(ErrorReason(bad.status()), reason::kInvalidRequest);
  EXPECT_THAT(std::string(bad.status().message()), HasSubstr("id number 1 is -5"));
  EXPECT_EQ(ErrorReason(server.client().Tokenize("x", text, false).status()), reason::kModelNotFound);
  EXPECT_EQ(server.Metric("deltanet_requests_total{code=\"OK\",method=\"Tokenize\"}"), 2);
}

TEST(Tokenize, TheModelIsDescribed) {
  FakeModelOptions model = Generative();
  model.eos_id = 2;
  TestServer server(FakeModels{{"a", model}, {"b", {}}}, ServerOptions(), "bpe_bytes");
  const auto a = server.client().GetModel("a");
  ASSERT_TRUE(a.ok()) << a.status();
  EXPECT_TRUE(a->generates);
  EXPECT_TRUE(a->has_tokenizer);
  EXPECT_EQ(a->bos_id, kBos);
  EXPECT_THAT(a->eos_ids, ElementsAre(2));
  EXPECT_EQ(a->max_generated_tokens, 4096);
  const auto b = server.client().GetModel("b");
  ASSERT_TRUE(b.ok()) << b.status();
  EXPECT_FALSE(b->generates);
  EXPECT_FALSE(b->has_tokenizer);
  EXPECT_FALSE(b->bos_id.has_value());
  EXPECT_EQ(b->max_generated_tokens, 0);
}

}  // namespace
}  // namespace deltanet
