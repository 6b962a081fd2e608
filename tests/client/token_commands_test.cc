// The commands on a model over tokens.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <unistd.h>

#include <cmath>
#include <cstring>
#include <fstream>
#include <nlohmann/json.hpp>
#include <thread>

#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "client/sequences.h"
#include "tests/client/command_fixture.h"

namespace deltanet {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::MatchesRegex;
using ::testing::Not;
using ::testing::StartsWith;

class LettersCommandsTest : public CommandsTest {
 protected:
  LettersCommandsTest() : CommandsTest(FakeService::Model::kLetters) {}

  void Write(const std::string& name, const std::string& text) const {
    std::ofstream(Path(name), std::ios::binary) << text;
  }

  template <typename T>
  std::vector<T> Values(const std::string& file, const std::string& name) const {
    const Tensor tensor = *ReadTensor(Path(file), name);
    std::vector<T> values(NumElements(tensor.shape));
    std::memcpy(values.data(), tensor.data.data(), tensor.data.size());
    return values;
  }

  FakeService ids_only_{FakeService::Model::kLettersWithoutTokenizer};
};

// The letters that follow `ids`.
std::vector<int64_t> Continue(std::vector<int64_t> ids, int count) {
  std::vector<int64_t> made;
  for (int i = 0; i < count; ++i) {
    made.push_back(FakeService::Expected(ids));
    ids.push_back(made.back());
  }
  return made;
}

std::string ContinueText(const std::string& text, int count) {
  std::vector<int64_t> ids = {FakeService::kBos};
  ids.insert(ids.end(), text.begin(), text.end());
  const std::vector<int64_t> made = Continue(ids, count);
  return std::string(made.begin(), made.end());
}

TEST(TokenCommandsTest, HaveHelp) {
  for (const char* command : {"generate", "score"}) {
    const Result help = RunCommand({command, "--help"});
    EXPECT_EQ(help.exit_status, 0);
    EXPECT_THAT(help.out, StartsWith("Usage: deltanet-client " + std::string(command)));
    EXPECT_THAT(RunCommand({"--help"}).out, HasSubstr("\n  " + std::string(command) + " "));
  }
}

TEST(TokenCommandsTest, WrongCommandLinesExitWith2) {
  const std::vector<std::pair<std::vector<std::string>, std::string>> cases = {
      {{"generate", "--prompt", "x", "--ids", "1"}, "--prompt and --ids exclude each other"},
      {{"generate", "--ids", "1,x"}, "--ids is '1,x', want integers of at least 0"},
      {{"generate", "--expected-position", "1"}, "--expected-position wants --session"},
      {{"generate", "--top-p", "0"}, "--top-p is 0, want more than 0 and at most 1"},
      {{"generate", "--top-p", "1.5"}, "--top-p is 1.5, want more than 0 and at most 1"},
      {{"generate", "--top-k", "4294967296"}, "--top-k is 4294967296, want at most 2147483647"},
      {{"generate", "--top-log-probs", "65"}, "--top-log-probs is 65, want at most 64"},
      {{"forward", "--input", "x", "--output", "y", "--top", "65"}, "--top is 65, want at most 64"},
      {{"bench", "--concurrency", "2"}, "--concurrency wants --generate"},
      {{"bench", "--prompt-tokens", "2"}, "--prompt-tokens wants --generate"},
      {{"bench", "--generate", "--sessions", "2"}, "--sessions is not for --generate"},
      {{"bench", "--generate", "--unary"}, "--unary is not for --generate"},
      {{"bench", "--generate", "--rate", "2", "--concurrency", "3"},
       "--concurrency and --rate exclude each other"},
      {{"bench", "--generate", "--connections", "2"}, "--connections is 2, want at most --concurrency 1"},
      {{"bench", "--generate", "--prompt-tokens", "0"},
       "--prompt-tokens is '0', want a number of at least 1"},
      {{"bench", "--generate", "--output-tokens", "uniform:3"}, "--output-tokens is 'uniform:3', want"},
      {{"score"}, "--text, --text-file, --ids or --ids-file is missing"},
      {{"score", "--text-file", "x", "--ids-file", "y"}, "--text-file and --ids-file exclude each other"},
      {{"score", "--ids", "1", "--top", "65"}, "--top is 65, want at most 64"},
      {{"score", "--ids", "1", "--top", "0"}, "--top is '0'"},
      {{"generate", "--seed", "-1"}, "--seed is '-1'"},
  };
  for (const auto& [arguments, message] : cases) {
    const Result result = RunCommand(arguments);
    EXPECT_EQ(result.exit_status, 2) << message;
    EXPECT_THAT(result.err, HasSubstr(message));
    EXPECT_EQ(result.out, "");
  }
}

TEST_F(LettersCommandsTest, ModelsSayWhatTheyGenerate) {
  EXPECT_THAT(
      Ask("models", {}).out,
      AllOf(HasSubstr("ids in [0,128): int64\n"), HasSubstr("at most 100 tokens a call, from text or ids\n"),
            HasSubstr("a text begins with 1\n"), HasSubstr("a text ends with   2\n")));
  FakeService values;
  EXPECT_THAT(RunCommand({"models", "--server", values.address()}).out, Not(HasSubstr("generates")));
}

TEST_F(LettersCommandsTest, GeneratesText) {
  Write("prompt", "Once ");
  for (const std::vector<std::string>& prompt :
       {std::vector<std::string>{"--prompt", "Once "}, {"--prompt-file", Path("prompt")}}) {
    std::vector<std::string> arguments = prompt;
    arguments.insert(arguments.end(), {"--max-tokens", "7"});
    const Result result = Ask("generate", arguments);
    EXPECT_EQ(result.exit_status, 0) << result.err;
    EXPECT_EQ(result.out, ContinueText("Once ", 7) + "\n");
    EXPECT_THAT(result.err, MatchesRegex("finished by length: prompt 6 tokens, generated 7\n"
                                         "first token after [0-9.]+ ms, then [0-9.]+ tokens/s\n"));
  }
}

TEST_F(LettersCommandsTest, GeneratesIdsWhereThereIsNoTokenizer) {
  Write("ids", "5, 6\n7\t");
  const std::vector<int64_t> made = Continue({5, 6, 7}, 3);
  for (const std::vector<std::string>& prompt :
       {std::vector<std::string>{"--ids", "5,6,7"}, {"--ids-file", Path("ids")}}) {
    std::vector<std::string> arguments = {"generate", "--server", ids_only_.address(), "--max-tokens", "3"};
    arguments.insert(arguments.end(), prompt.begin(), prompt.end());
    const Result result = RunCommand(arguments);
    EXPECT_EQ(result.exit_status, 0) << result.err;
    EXPECT_EQ(result.out, absl::StrJoin(made, " ") + "\n");
  }
  const Result text = RunCommand({"generate", "--server", ids_only_.address(), "--prompt", "x"});
  EXPECT_EQ(text.exit_status, 1);
  EXPECT_THAT(text.err, HasSubstr("FAILED_PRECONDITION (NO_TOKENIZER)"));
  EXPECT_EQ(text.out, "");
}

TEST_F(LettersCommandsTest, AWrongIdInAFileIsNamed) {
  Write("ids", "5 6 seven");
  const Result result = Ask("generate", {"--ids-file", Path("ids")});
  EXPECT_EQ(result.exit_status, 1);
  EXPECT_THAT(result.err, HasSubstr("/ids has 'seven' as id 3, want an integer of at least 0"));
  EXPECT_THAT(Ask("generate", {"--prompt-file", Path("nothing")}).err, HasSubstr("/nothing"));
}

TEST_F(LettersCommandsTest, GenerationGoesOnInASession) {
  const Result first = Ask("generate", {"--prompt", "ab", "--max-tokens", "2", "--create-session"});
  ASSERT_EQ(first.exit_status, 0) << first.err;
  EXPECT_THAT(first.err, HasSubstr("\nsession made-1 at 5\n"));
  const Result second =
      Ask("generate", {"--session", "made-1", "--max-tokens", "3", "--expected-position", "5"});
  ASSERT_EQ(second.exit_status, 0) << second.err;
  EXPECT_EQ(first.out.substr(0, 2) + second.out, ContinueText("ab", 5) + "\n");
  EXPECT_THAT(second.err, AllOf(StartsWith("finished by length: prompt 0 tokens, generated 3\n"),
                                HasSubstr("\nsession made-1 at 8\n")));
  EXPECT_THAT(Ask("generate", {"--session", "made-1", "--expected-position", "5"}).err,
              HasSubstr("POSITION_MISMATCH"));
}

TEST_F(LettersCommandsTest, GenerationStopsAsTold) {
  const std::string text = ContinueText("a", 20);
  const std::string stop = text.substr(9, 3);
  Result result = Ask("generate", {"--prompt", "a", "--stop", "nowhere", "--stop", stop});
  EXPECT_EQ(result.out, text.substr(0, text.find(stop)) + "\n");
  EXPECT_THAT(result.err, StartsWith("finished by stop_text: "));
  result = Ask("generate", {"--prompt", "a", "--stop-ids", "3," + std::to_string(text[0])});
  EXPECT_EQ(result.out, text.substr(0, 1) + "\n");
  EXPECT_THAT(result.err, MatchesRegex("finished by stop_id: prompt 2 tokens, generated 1\n"
                                       "first token after [0-9.]+ ms\n"));
  EXPECT_THAT(Ask("generate", {"--prompt", "a"}).err,
              HasSubstr("finished by stop_id: prompt 2 tokens, generated 49"));
  EXPECT_THAT(Ask("generate", {"--prompt", "a", "--ignore-eos"}).err,
              HasSubstr("finished by length: prompt 2 tokens, generated 100"));
}

TEST_F(LettersCommandsTest, SampledTextCanBeRepeatedByItsSeed) {
  const std::vector<std::string> arguments = {"--prompt", "a", "--max-tokens", "5", "--temperature", "0.7"};
  const auto with_seed = [&](const std::string& seed) {
    std::vector<std::string> all = arguments;
    all.insert(all.end(), {"--seed", seed});
    return Ask("generate", all);
  };
  const Result first = Ask("generate", arguments);
  EXPECT_THAT(first.err, HasSubstr("\nseed 77\n"));
  EXPECT_EQ(with_seed("77").out, first.out);
  const Result other = with_seed("18446744073709551615");
  EXPECT_NE(other.out, first.out);
  EXPECT_THAT(other.err, HasSubstr("\nseed 18446744073709551615\n"));
}

TEST_F(LettersCommandsTest, ShowsLogProbabilities) {
  const Result result = Ask("generate", {"--ids", "5", "--max-tokens", "2", "--top-log-probs", "2"});
  ASSERT_EQ(result.exit_status, 0) << result.err;
  const std::vector<int64_t> made = Continue({5}, 2);
  EXPECT_EQ(result.out, absl::StrFormat("%8d    -0.2500  of %d -0.2500, %d -0.5000  \"%c\"\n"
                                        "%8d    -0.2500  of %d -0.2500, %d -0.5000  \"%c\"\n",
                                        made[0], made[0], made[0] + 1, static_cast<char>(made[0]), made[1],
                                        made[1], made[1] + 1, static_cast<char>(made[1])));
}

TEST_F(LettersCommandsTest, WritesALineOfJsonForEachResponse) {
  const Result result =
      Ask("generate", {"--ids", "5", "--max-tokens", "2", "--top-log-probs", "1", "--temperature", "1",
                       "--seed", "0", "--session", "s", "--create-session", "--json"});
  ASSERT_EQ(result.exit_status, 0) << result.err;
  std::vector<nlohmann::json> lines;
  std::istringstream stream(result.out);
  for (std::string line; std::getline(stream, line);) lines.push_back(nlohmann::json::parse(line));
  ASSERT_EQ(lines.size(), 2u);
  const int64_t id = lines[0]["tokens"][0]["id"];
  EXPECT_EQ(lines[0]["tokens"][0]["log_prob"], FakeService::LogProb({5}, id));
  EXPECT_EQ(lines[0]["tokens"][0]["top_ids"], nlohmann::json({FakeService::Expected({5})}));
  EXPECT_EQ(lines[0]["tokens"][0]["top_log_probs"], nlohmann::json({-0.25}));
  EXPECT_EQ(lines[0]["text"], std::string(1, static_cast<char>(id)));
  EXPECT_EQ(lines[0]["seed"], 0);
  EXPECT_EQ(lines[0]["session_id"], "s");
  EXPECT_FALSE(lines[0].contains("finish_reason"));
  EXPECT_FALSE(lines[1].contains("seed"));
  EXPECT_EQ(lines[1]["finish_reason"], "length");
  EXPECT_EQ(lines[1]["usage"]["prompt_tokens"], 1);
  EXPECT_EQ(lines[1]["usage"]["generated_tokens"], 2);
  EXPECT_EQ(lines[1]["usage"]["time_to_first_token_ms"], 1.5);
  EXPECT_EQ(lines[1]["committed_position"], 3);
  EXPECT_NEAR(lines[1]["timing_ms"]["computing"], 0.3, 1e-9);
}

TEST_F(LettersCommandsTest, AnErrorInTheMidstComesAfterTheText) {
  const Result result = Ask("generate", {"--prompt", FakeService::kBreak});
  EXPECT_EQ(result.exit_status, 1);
  EXPECT_EQ(result.out, ContinueText(FakeService::kBreak, 1) + "\n");
  EXPECT_EQ(result.err, "deltanet-client generate: UNAVAILABLE (DRAINING): shutting down\n");
}

TEST_F(LettersCommandsTest, CtrlCCancelsGeneration) {
  std::thread user([this] {
    service_.AwaitHeld(1);
    // The call has come; it is a moment until its client listens.
    struct sigaction action = {};
    do {
      std::this_thread::yield();
      ASSERT_EQ(::sigaction(SIGINT, nullptr, &action), 0);
    } while (action.sa_handler == SIG_DFL);
    // To this thread: ThreadSanitizer puts a signal off while its thread is blocked in code that it does not see,
    // as gRPC's are.
    ASSERT_EQ(::raise(SIGINT), 0);
  });
  const Result result =
      Ask("generate", {"--prompt", FakeService::kHold, "--session", "s", "--create-session"});
  user.join();
  EXPECT_EQ(result.exit_status, 1);
  EXPECT_THAT(result.err,
              MatchesRegex("deltanet-client generate: CANCELLED: interrupted after [01] tokens; the session "
                           "stands where it was\n"));
  service_.AwaitCancelled();
  struct sigaction action = {};
  ASSERT_EQ(::sigaction(SIGINT, nullptr, &action), 0);
  EXPECT_EQ(action.sa_handler, SIG_DFL);
}

TEST_F(LettersCommandsTest, GenerationEndsWhereItsOutputIsClosed) {
  std::ostringstream out, err;
  out.setstate(std::ios::badbit);
  EXPECT_EQ(
      RunClient({"generate", "--server", service_.address(), "--prompt", FakeService::kHold}, {out, err}), 1);
  EXPECT_EQ(err.str(), "deltanet-client generate: ABORTED: the output cannot be written\n");
  service_.AwaitCancelled();
}

TEST_F(LettersCommandsTest, ScoresATextBehindItsBeginning) {
  const double a = FakeService::LogProb({FakeService::kBos}, 'a'),
               b = FakeService::LogProb({FakeService::kBos, 'a'}, 'b');
  const Result result = Ask("score", {"--text", "ab"});
  ASSERT_EQ(result.exit_status, 0) << result.err;
  EXPECT_EQ(result.out, absl::StrFormat("POSITION       ID   LOG-PROB\n"
                                        "       1       97 %10.4f\n"
                                        "       2       98 %10.4f\n"
                                        "total %.4f of 2 tokens, %.4f a token: perplexity %.6g\n",
                                        a, b, a + b, (a + b) / 2, std::exp(-(a + b) / 2)));
}

TEST_F(LettersCommandsTest, ScoresGoOnInASession) {
  Result result = Ask("score", {"--ids", "5", "--session", "s", "--create-session"});
  ASSERT_EQ(result.exit_status, 0) << result.err;
  EXPECT_THAT(result.out, HasSubstr("LOG-PROB\ntotal 0.0000 of 0 tokens\nsession s at 1\n"));
  const int64_t expected = FakeService::Expected({5});
  // No begin-of-sequence id in the midst.
  result = Ask("score", {"--text", "z", "--session", "s", "--top", "2", "--expected-position", "1"});
  ASSERT_EQ(result.exit_status, 0) << result.err;
  EXPECT_THAT(result.out,
              AllOf(HasSubstr(absl::StrFormat("\n       1      122 %10.4f  of %d -0.2500, %d -0.5000\n",
                                              FakeService::LogProb({5}, 'z'), expected, expected + 1)),
                    HasSubstr("of 1 tokens"), HasSubstr("\nsession s at 2\n")));
}

TEST_F(LettersCommandsTest, ForwardWritesTheMostLikelyIds) {
  ASSERT_EQ(Ask("make-input", {"--shape", "2,3", "--output", Path("input")}).exit_status, 0);
  const std::vector<int64_t> input = Values<int64_t>("input", "input");
  const std::vector<int64_t> sequences[] = {{input.begin(), input.begin() + 3},
                                            {input.begin() + 3, input.end()}};

  Result result = AskWithFiles("forward", "top", {"--top", "2"});
  ASSERT_EQ(result.exit_status, 0) << result.err;
  EXPECT_THAT(result.out, StartsWith("top [2,3,2] from position 0\n"));
  EXPECT_EQ(ReadTensor(Path("top"), "top_ids")->shape, (Shape{2, 3, 2}));
  const std::vector<int64_t> ids = Values<int64_t>("top", "top_ids");
  for (size_t t = 0; t < 6; ++t) {
    const auto begin = sequences[t / 3].begin();
    EXPECT_EQ(ids[2 * t], FakeService::Expected({begin, begin + t % 3 + 1})) << t;
  }
  EXPECT_EQ(ReadTensor(Path("top"), "top_log_probs")->shape, (Shape{2, 3, 2}));
  EXPECT_EQ(Values<float>("top", "top_log_probs")[11], -0.5f);

  result = AskWithFiles("forward", "last", {"--top", "1", "--last"});
  ASSERT_EQ(result.exit_status, 0) << result.err;
  EXPECT_THAT(result.out, StartsWith("top [2,1,1] from position 2\n"));
  EXPECT_THAT(Values<int64_t>("last", "top_ids"),
              ElementsAre(FakeService::Expected(sequences[0]), FakeService::Expected(sequences[1])));

  result = AskWithFiles("forward", "logits", {"--last"});
  ASSERT_EQ(result.exit_status, 0) << result.err;
  EXPECT_THAT(result.out, StartsWith("output float32[2,1,128] from position 2\n"));
  EXPECT_EQ(Values<float>("logits", "output")[128 + 5], FakeService::LogProb(sequences[1], 5));
}

TEST_F(LettersCommandsTest, BenchMeasuresGeneration) {
  const Result closed =
      Ask("bench", {"--generate", "--concurrency", "3", "--requests", "21", "--prompt-tokens", "5",
                    "--output-tokens", "uniform:4:8", "--connections", "2", "--json", Path("json")});
  ASSERT_EQ(closed.exit_status, 0) << closed.err;
  EXPECT_THAT(closed.out,
              AllOf(HasSubstr(" output tokens/s, "), HasSubstr(" (21 requests in "),
                    HasSubstr("\ntime to first token "), HasSubstr("\ntime between tokens "),
                    HasSubstr("\nwhole request "), HasSubstr("queued 0.020 ms, computing 0.300 ms\n"),
                    Not(HasSubstr("errors"))));
  EXPECT_EQ(service_.generate_calls().size(), 3 + 21);  // With the warm-up.
  std::ifstream file(Path("json"));
  const nlohmann::json json = nlohmann::json::parse(file);
  EXPECT_EQ(json["mode"], "generate");
  EXPECT_EQ(json["loop"], "closed");
  EXPECT_EQ(json["model"], "letters");
  EXPECT_EQ(json["requests"], 21);
  EXPECT_EQ(json["concurrency"], 3);
  EXPECT_EQ(json["warm_up"], 3);
  EXPECT_EQ(json["output_tokens"], "uniform:4:8");
  EXPECT_EQ(json["errors"], 0);
  EXPECT_EQ(json["time_to_first_token_ms"]["count"], 21);
  EXPECT_EQ(json["request_ms"]["count"], 21);
  const double seconds = json["seconds"];
  EXPECT_NEAR(json["prompt_tokens_per_second"].get<double>() * seconds, 21 * 5, 1e-6);
  EXPECT_NEAR(json["output_tokens_per_second"].get<double>() * seconds,
              json["time_between_tokens_ms"]["count"].get<double>() + 21, 1e-6);
  EXPECT_LE(json["time_to_first_token_ms"]["p50"], json["request_ms"]["max"]);

  service_.RefuseGenerate(10);
  const Result open = Ask("bench", {"--generate", "--rate", "1000", "--requests", "20", "--output-tokens",
                                    "2", "--warm-up", "0", "--temperature", "0.5", "--json", Path("json")});
  ASSERT_EQ(open.exit_status, 0) << open.err;
  EXPECT_THAT(open.out, HasSubstr("\nerrors: 2 (QUEUE_FULL 2), the first: UNAVAILABLE: the queue is full\n"));
  std::ifstream again(Path("json"));
  const nlohmann::json open_json = nlohmann::json::parse(again);
  EXPECT_EQ(open_json["loop"], "open");
  EXPECT_EQ(open_json["rate"], 1000);
  EXPECT_EQ(open_json["requests"], 18);
  EXPECT_EQ(open_json["errors_by_reason"], nlohmann::json({{"QUEUE_FULL", 2}}));
}

TEST_F(LettersCommandsTest, BenchGeneratesForSoLong) {
  const Result bench = Ask("bench", {"--generate", "--seconds", "0.05", "--output-tokens", "2"});
  ASSERT_EQ(bench.exit_status, 0) << bench.err;
  EXPECT_THAT(bench.out, MatchesRegex("throughput: .* requests in 0.0[1-5] s\\)\n(.|\n)*"));
}

TEST_F(LettersCommandsTest, BenchOfGenerationRefusesWhatCannotBe) {
  const Result large = Ask("bench", {"--generate", "--output-tokens", "uniform:5:101"});
  EXPECT_EQ(large.exit_status, 1);
  EXPECT_THAT(large.err, HasSubstr("--output-tokens is uniform:5:101, want at most 100, the server's limit"));
  FakeService values;
  EXPECT_THAT(RunCommand({"bench", "--generate", "--server", values.address()}).err,
              HasSubstr("FAILED_PRECONDITION: model 'sum' does not generate"));
}

TEST_F(LettersCommandsTest, TextsThatTheModelMakesScoreBest) {
  const Result made = Ask("generate", {"--prompt", "ab", "--max-tokens", "20"});
  ASSERT_EQ(made.exit_status, 0) << made.err;
  ASSERT_EQ(Ask("generate", {"--prompt", "ab", "--max-tokens", "1", "--session", "s", "--create-session"})
                .exit_status,
            0);
  // Of which the session has taken in the first token.
  const Result scored = Ask("score", {"--text", made.out.substr(1, 19), "--session", "s"});
  EXPECT_THAT(scored.out, HasSubstr("total -4.7500 of 19 tokens, -0.2500 a token: perplexity 1.28403\n"));
}

}  // namespace
}  // namespace deltanet
