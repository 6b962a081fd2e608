#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <utility>

#include "client/load_generator.h"
#include "client/sequences.h"
#include "model/base/checkpoint.h"
#include "model/base/config.h"
#include "tests/client/command_fixture.h"

namespace deltanet {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::MatchesRegex;
using ::testing::StartsWith;

TEST(ClientProgramTest, SaysHowItIsUsed) {
  EXPECT_EQ(RunCommand({}).exit_status, 2);
  EXPECT_THAT(RunCommand({}).err, StartsWith("Usage: deltanet-client COMMAND"));
  const Result help = RunCommand({"--help"});
  EXPECT_EQ(help.exit_status, 0);
  EXPECT_THAT(help.out, AllOf(HasSubstr("\n  forward "), HasSubstr("\n  bench ")));
  EXPECT_THAT(RunCommand({"--version"}).out, MatchesRegex("deltanet-client [0-9]+\\.[0-9]+\\.[0-9]+\n"));
}

TEST(ClientProgramTest, EveryCommandHasHelp) {
  for (const char* command : {"forward", "stream", "bench", "models", "sessions", "end-session", "health",
                              "make-model", "make-input", "compare"}) {
    const Result help = RunCommand({command, "--help"});
    EXPECT_EQ(help.exit_status, 0);
    EXPECT_THAT(help.out, StartsWith("Usage: deltanet-client " + std::string(command)));
    EXPECT_EQ(help.err, "");
  }
}

TEST(ClientProgramTest, WrongCommandLinesExitWith2) {
  const std::vector<std::pair<std::vector<std::string>, std::string>> cases = {
      {{"foward"}, "unknown command 'foward'"},
      {{"forward", "--input", "x"}, "--output FILE is missing"},
      {{"forward", "--imput", "x"}, "unknown flag --imput"},
      {{"forward", "--input", "x", "--output", "y", "--end-of-sequence"},
       "--end-of-sequence wants --session"},
      {{"forward", "--input", "x", "--output", "y", "--expected-position", "1"},
       "--expected-position wants --session"},
      {{"stream", "--input", "x", "--output", "y", "--chunk", "0"}, "--chunk is '0'"},
      {{"bench", "--batch", "2"}, "--batch wants --unary"},
      {{"bench", "--connections", "2"}, "--connections is 2, want at most --sessions 1"},
      {{"make-input", "--shape", "2,3", "--output", "x", "--model", "m"}, "--model wants --server"},
      {{"make-input", "--shape", "2,3", "--output", "x", "--server", "s", "--vocab", "3"},
       "exclude each other"},
      {{"make-input", "--shape", "1048576,1048576,2", "--output", "x"}, "want at most 2^40"},
      {{"make-model", "--family", "other", "--output", "x"}, "--family is 'other'"},
      {{"make-model", "--family", "transformer_block", "--output", "x", "--num-layers", "2"},
       "--num-layers is not for family transformer_block"},
      {{"make-model", "--family", "transformer_deltanet", "--output", "x", "--d-model", "99999999"},
       "d_model"},
      {{"make-model", "--family", "deltanet_model", "--output", "x", "--d-model", "20"}, "want a divisor of"},
      {{"make-model", "--family", "delta_net", "--output", "x", "--d-model", "20"},
       "want a multiple of 'num_heads' 8"},
      {{"make-model", "--family", "delta_net", "--output", "x", "--conv-size", "9"}, "'conv_size' is 9"},
      {{"make-model", "--family", "delta_net", "--output", "x", "--conv-padding", "causal"},
       "--conv-padding is not for family delta_net"},
      {{"make-model", "--family", "deltanet_model", "--output", "x", "--use-gate"},
       "--use-gate is not for family deltanet_model"},
  };
  for (const auto& [arguments, message] : cases) {
    const Result result = RunCommand(arguments);
    EXPECT_EQ(result.exit_status, 2) << message;
    EXPECT_THAT(result.err, HasSubstr(message));
    EXPECT_EQ(result.out, "");
  }
}

TEST_F(CommandsTest, StreamAgreesWithForward) {
  for (const char* shape : {"23", "3,23"}) {
    MakeInput(shape);
    const Result forward = AskWithFiles("forward", "one", {});
    ASSERT_EQ(forward.exit_status, 0) << forward.err;
    EXPECT_THAT(forward.out, HasSubstr("computing 0.300 ms"));
    for (const std::vector<std::string>& how :
         std::vector<std::vector<std::string>>{{"--chunk", "1"},
                                               {"--chunk", "7"},
                                               {"--chunk", "5,1,9"},
                                               {"--chunk", "100"},
                                               {"--chunk", "2", "--pipeline", "4"},
                                               {"--chunk", "1", "--pipeline", "1000"}}) {
      const Result stream = AskWithFiles("stream", "chunks", how);
      ASSERT_EQ(stream.exit_status, 0) << stream.err;
      EXPECT_THAT(stream.out, AllOf(HasSubstr("tokens/s"), HasSubstr("p99")));
      const Result compare =
          RunCommand({"compare", "--a", Path("one"), "--b", Path("chunks"), "--tolerance", "0"});
      EXPECT_EQ(compare.exit_status, 0) << compare.err;
      EXPECT_THAT(compare.out, HasSubstr("agree"));
    }
  }
}

TEST_F(CommandsTest, NamedSessionGoesOnFromCallToCall) {
  MakeInput("6");
  Result result = AskWithFiles("stream", "first",
                               {"--chunk", "2", "--session", "s", "--create-session", "--pipeline", "3"});
  ASSERT_EQ(result.exit_status, 0) << result.err;
  EXPECT_THAT(result.out, AllOf(HasSubstr("float32[5,2] from position 0"), HasSubstr("session s at 6")));
  result = AskWithFiles("forward", "second", {"--session", "s", "--expected-position", "6"});
  ASSERT_EQ(result.exit_status, 0) << result.err;
  EXPECT_THAT(result.out, AllOf(HasSubstr("float32[6,2] from position 5"), HasSubstr("session s at 12")));
  result = AskWithFiles("stream", "third", {"--chunk", "4", "--session", "s", "--end-of-sequence"});
  ASSERT_EQ(result.exit_status, 0) << result.err;
  EXPECT_THAT(result.out, AllOf(HasSubstr("float32[7,2] from position 11"), HasSubstr("session s at 18")));
  result = AskWithFiles("forward", "fourth", {"--session", "s"});
  EXPECT_EQ(result.exit_status, 1);
  EXPECT_EQ(
      result.err,
      "deltanet-client forward: NOT_FOUND (SESSION_NOT_FOUND): no session 's' [committed_position 0]\n");
}

TEST_F(CommandsTest, ServerNamesTheSession) {
  MakeInput("6");
  const Result result = AskWithFiles("stream", "y", {"--chunk", "2", "--create-session", "--pipeline", "3"});
  ASSERT_EQ(result.exit_status, 0) << result.err;
  EXPECT_THAT(result.out, HasSubstr("session made-1 at 6"));
}

TEST_F(CommandsTest, ErrorInTheStreamFailsTheCommand) {
  const std::vector<float> values = {1, 1, FakeService::kBadValue, 1, 1, 1};
  ASSERT_TRUE(WriteTensor(Path("input"), "input",
                          {DType::kFloat32,
                           {3, 2},
                           std::string(reinterpret_cast<const char*>(values.data()), values.size() * 4)})
                  .ok());
  for (const char* pipeline : {"1", "3"}) {
    const Result result = AskWithFiles("stream", "y", {"--chunk", "1", "--pipeline", pipeline});
    EXPECT_EQ(result.exit_status, 1);
    EXPECT_EQ(result.err, "deltanet-client stream: INVALID_ARGUMENT (INVALID_REQUEST): a value is 666\n");
    EXPECT_FALSE(std::filesystem::exists(Path("y")));
  }
}

TEST_F(CommandsTest, ANamedSessionTakesOneSequence) {
  MakeInput("2,3");
  const Result result = AskWithFiles("stream", "y", {"--chunk", "1", "--session", "s", "--create-session"});
  EXPECT_EQ(result.exit_status, 1);
  EXPECT_THAT(result.err, HasSubstr("the input is [2,3,2], want one sequence"));
}

TEST_F(CommandsTest, MissingInputIsNamed) {
  const Result result = AskWithFiles("forward", "y", {});
  EXPECT_EQ(result.exit_status, 1);
  EXPECT_THAT(result.err, HasSubstr(Path("input")));
}

TEST_F(CommandsTest, CompareFailsBeyondTheTolerance) {
  const float one = 1, other = 1.25;
  for (const auto& [name, value] : {std::pair{"a", one}, std::pair{"b", other}}) {
    ASSERT_TRUE(WriteTensor(Path(name), "output",
                            {DType::kFloat32, {1}, std::string(reinterpret_cast<const char*>(&value), 4)})
                    .ok());
  }
  const Result far = RunCommand({"compare", "--a", Path("a"), "--b", Path("b")});
  EXPECT_EQ(far.exit_status, 1);
  EXPECT_THAT(far.out,
              HasSubstr("differ: largest difference 0.25 of the largest magnitude 1.25, relative 0.2"));
  EXPECT_THAT(far.err, HasSubstr("want at most 0.0001"));
  EXPECT_EQ(RunCommand({"compare", "--a", Path("a"), "--b", Path("b"), "--tolerance", "0.2"}).exit_status, 0);
}

TEST_F(CommandsTest, MakesTheSameInputFromTheSameSeed) {
  const std::vector<std::string> make = {"make-input", "--shape", "2,9,3", "--output", Path("x"), "--seed"};
  std::set<std::string> contents;
  for (const char* seed : {"1", "1", "2"}) {
    std::vector<std::string> arguments = make;
    arguments.push_back(seed);
    ASSERT_EQ(RunCommand(arguments).exit_status, 0);
    contents.insert(ReadTensor(Path("x"), "input")->data);
  }
  EXPECT_EQ(contents.size(), 2u);

  ASSERT_EQ(
      RunCommand({"make-input", "--shape", "4,50", "--vocab", "5", "--output", Path("ids")}).exit_status, 0);
  const Tensor ids = *ReadTensor(Path("ids"), "input");
  EXPECT_EQ(ids.dtype, DType::kInt64);
  EXPECT_EQ(ids.shape, (Shape{4, 50}));
  std::set<int64_t> seen;
  for (size_t at = 0; at < ids.data.size(); at += 8) {
    int64_t id;
    std::memcpy(&id, ids.data.data() + at, 8);
    seen.insert(id);
  }
  EXPECT_EQ(seen, (std::set<int64_t>{0, 1, 2, 3, 4}));
}

TEST_F(CommandsTest, ListsModelsAndSessions) {
  EXPECT_THAT(Ask("models", {}).out, AllOf(StartsWith("sum\n"), HasSubstr("values [T,2]: float32, bfloat16"),
                                           HasSubstr("1 token\n"), HasSubstr("3 in use, 61 free")));
  MakeInput("4");
  for (const char* id : {"a", "b", "c"}) {
    ASSERT_EQ(AskWithFiles("forward", "y", {"--session", id, "--create-session"}).exit_status, 0);
  }
  const Result ended = Ask("end-session", {"b"});
  EXPECT_EQ(ended.exit_status, 0);
  EXPECT_EQ(ended.out, "session b ended at 4\n");
  EXPECT_EQ(Ask("end-session", {"b"}).exit_status, 1);
  const std::string sessions = Ask("sessions", {}).out;
  EXPECT_THAT(sessions, AllOf(HasSubstr("\na "), HasSubstr("\nc "), HasSubstr("1.5s"), HasSubstr("10m")));
  EXPECT_EQ(std::count(sessions.begin(), sessions.end(), '\n'), 3);
}

TEST_F(CommandsTest, HealthExitsWithTheStatus) {
  EXPECT_EQ(Ask("health", {}).exit_status, 0);
  EXPECT_EQ(Ask("health", {}).out, "SERVING\n");
  service_.health()->SetServingStatus(false);
  const Result not_serving = Ask("health", {});
  EXPECT_EQ(not_serving.exit_status, 1);
  EXPECT_THAT(not_serving.err, HasSubstr("NOT_SERVING"));
  EXPECT_EQ(Ask("health", {"--service", "nobody"}).exit_status, 1);
}

class BenchTest : public CommandsTest, public testing::WithParamInterface<std::vector<std::string>> {};

TEST_P(BenchTest, CountsEveryChunk) {
  std::vector<std::string> arguments = GetParam();
  arguments.insert(arguments.end(),
                   {"--sessions", "5", "--chunk", "3", "--count", "203", "--json", Path("json")});
  const Result bench = Ask("bench", arguments);
  ASSERT_EQ(bench.exit_status, 0) << bench.err;
  EXPECT_THAT(bench.out, AllOf(HasSubstr("(203 chunks in "), HasSubstr("p99"),
                               HasSubstr("queued 0.020 ms, computing 0.300 ms")));
  std::ifstream file(Path("json"));
  const nlohmann::json json = nlohmann::json::parse(file);
  EXPECT_EQ(json["chunks"], 203);
  EXPECT_EQ(json["errors"], 0);
  EXPECT_EQ(json["unanswered"], 0);
  EXPECT_EQ(json["sessions"], 5);
  EXPECT_EQ(json["server_version"], "9.8.7");
  EXPECT_GT(json["seconds"], 0);
  const double tokens = json["tokens_per_second"], chunks = json["chunks_per_second"];
  EXPECT_NEAR(tokens / chunks, json["batch"].get<double>() * 3, 1e-6);
  EXPECT_LE(json["latency_ms"]["p50"], json["latency_ms"]["max"]);
}

INSTANTIATE_TEST_SUITE_P(
    Modes, BenchTest,
    testing::Values(std::vector<std::string>{}, std::vector<std::string>{"--connections", "2"},
                    std::vector<std::string>{"--rate", "4000"},
                    std::vector<std::string>{"--rate", "4000", "--connections", "5"},
                    std::vector<std::string>{"--unary", "--batch", "2"},
                    std::vector<std::string>{"--unary", "--rate", "4000", "--connections", "2"}));

TEST_F(CommandsTest, BenchStopsAfterItsDuration) {
  const Result bench = Ask("bench", {"--sessions", "2", "--chunk", "1", "--duration", "50ms"});
  ASSERT_EQ(bench.exit_status, 0) << bench.err;
  EXPECT_THAT(bench.out, HasSubstr("chunks/s"));
}

TEST_F(CommandsTest, BenchFailsWhereSessionsCannotStart) {
  const Result unknown = Ask("bench", {"--model", "other"});
  EXPECT_EQ(unknown.exit_status, 1);
  EXPECT_THAT(unknown.err, HasSubstr("NOT_FOUND (MODEL_NOT_FOUND)"));
}

TEST_F(CommandsTest, LoadWhoseMessagesAreRefusedFails) {
  const float values[] = {FakeService::kBadValue, 0};
  LoadOptions options;
  options.server = service_.address();
  options.sessions = 3;
  options.connections = 2;
  options.input = {
      DType::kFloat32, {1, 2}, std::string(reinterpret_cast<const char*>(values), sizeof(values))};
  options.count = 10;
  for (const bool unary : {false, true}) {
    options.unary = unary;
    const absl::StatusOr<LoadReport> report = GenerateLoad(options, [](const LoadProgress&) {});
    EXPECT_EQ(report.status().code(), absl::StatusCode::kInvalidArgument);
    EXPECT_EQ(report.status().message(), "a value is 666");
  }
}

TEST(GenerateLoadTest, RefusesWrongOptions) {
  const auto code = [](const LoadOptions& options) {
    return GenerateLoad(options, [](const LoadProgress&) {}).status().code();
  };
  EXPECT_EQ(code({.server = "localhost:1", .sessions = 1, .connections = 2, .count = 1}),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(code({.server = "localhost:1"}), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(code({.server = "localhost:1", .count = 1, .rate = 0.0}), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(code({.server = "", .count = 1}), absl::StatusCode::kInvalidArgument);
}

class MakeModelTest : public testing::TestWithParam<std::vector<std::string>> {};

TEST_P(MakeModelTest, WritesWhatTheLoaderAsksFor) {
  const std::string directory = testing::TempDir() + "/make_model_test_" + GetParam()[1];
  std::filesystem::remove_all(directory);
  std::vector<std::string> arguments = GetParam();
  arguments.insert(arguments.begin(), {"make-model", "--output", directory});
  const Result made = RunCommand(arguments);
  ASSERT_EQ(made.exit_status, 0) << made.err;

  absl::StatusOr<ModelConfig> config = ReadModelConfig(directory);
  ASSERT_TRUE(config.ok()) << config.status();
  const absl::StatusOr<Checkpoint> file = Checkpoint::Open(directory);
  ASSERT_TRUE(file.ok()) << file.status();
  ASSERT_TRUE(ResolveFromFile(file->entries(), &*config).ok());
  const absl::Status status = CheckTensors(file->entries(), ExpectedTensors(*config));
  EXPECT_TRUE(status.ok()) << status;
  std::filesystem::remove_all(directory);
}

INSTANTIATE_TEST_SUITE_P(
    Families, MakeModelTest,
    testing::Values(std::vector<std::string>{"--family", "transformer_deltanet", "--d-model", "6",
                                             "--num-layers", "3"},
                    std::vector<std::string>{"--family", "transformer_block", "--d-model", "6",
                                             "--ff-hidden-dim", "5", "--dtype", "float16"},
                    std::vector<std::string>{"--family", "deltanet_model", "--d-model", "12", "--num-heads",
                                             "3", "--num-layers", "2", "--vocab-size", "17", "--mlp-ratio",
                                             "2.5", "--conv-padding", "causal", "--dtype", "bfloat16"},
                    std::vector<std::string>{"--family",
                                             "delta_net",
                                             "--d-model",
                                             "12",
                                             "--num-heads",
                                             "3",
                                             "--num-layers",
                                             "2",
                                             "--vocab-size",
                                             "17",
                                             "--expand-k",
                                             "0.5",
                                             "--expand-v",
                                             "2",
                                             "--intermediate-size",
                                             "5",
                                             "--conv-size",
                                             "3",
                                             "--use-gate",
                                             "--tie-word-embeddings",
                                             "--shard-bytes",
                                             "600",
                                             "--dtype",
                                             "bfloat16"}));

TEST_F(CommandsTest, ModelIsMadeIfEmptyAndElseLeft) {
  const std::vector<std::string> arguments = {"make-model", "--family", "transformer_deltanet",
                                              "--if-empty", "--output", Path("m")};
  std::filesystem::create_directory(Path("m"));
  ASSERT_EQ(RunCommand(arguments).exit_status, 0);
  EXPECT_TRUE(ReadModelConfig(Path("m")).ok());

  std::filesystem::remove(Path("m") + "/config.json");
  const Result again = RunCommand(arguments);
  EXPECT_EQ(again.exit_status, 0) << again.err;
  EXPECT_EQ(again.out, Path("m") + " is not empty: left as it is\n");
  EXPECT_FALSE(std::filesystem::exists(Path("m") + "/config.json"));

  std::filesystem::remove_all(Path("m"));
  ASSERT_EQ(RunCommand(arguments).exit_status, 0);
  EXPECT_TRUE(ReadModelConfig(Path("m")).ok());
}

// Values of a tensor of a model in float32.
std::vector<float> WeightsOf(const std::string& directory, const std::string& name) {
  const absl::StatusOr<Checkpoint> file = Checkpoint::Open(directory);
  EXPECT_TRUE(file.ok()) << file.status();
  const SafetensorsEntry& entry = **file->Find(name);
  std::vector<float> values(NumElements(entry.shape));
  EXPECT_TRUE(file->Read(entry, values.data()).ok());
  return values;
}

TEST_F(CommandsTest, DeltaNetModelsAreScaledAndRepeatable) {
  const auto make = [this](const std::string& name, const std::string& seed) {
    EXPECT_EQ(RunCommand({"make-model", "--family", "delta_net", "--d-model", "128", "--vocab-size", "3000",
                          "--seed", seed, "--output", Path(name)})
                  .exit_status,
              0);
    return WeightsOf(Path(name), "lm_head.weight");
  };
  const std::vector<float> head = make("a", "5");
  EXPECT_EQ(head, make("b", "5"));
  EXPECT_NE(head, make("c", "6"));
  EXPECT_NE(head, WeightsOf(Path("a"), "model.embeddings.weight"));
  const auto moments = [](const std::vector<float>& values) {
    double sum = 0, squares = 0;
    for (const float value : values) {
      sum += value;
      squares += value * value;
    }
    return std::pair(sum / values.size(), std::sqrt(squares / values.size()));
  };
  // Of 384,000 normal numbers.
  EXPECT_NEAR(moments(head).first, 0, 2e-4);
  EXPECT_NEAR(moments(head).second, 0.02, 2e-4);
  // A third of them are beyond one deviation, a twentieth beyond two.
  const auto beyond = [&](float bound) {
    return static_cast<double>(
               std::count_if(head.begin(), head.end(), [&](float x) { return std::abs(x) > bound; })) /
           head.size();
  };
  EXPECT_NEAR(beyond(0.02f), 0.317, 0.02);
  EXPECT_NEAR(beyond(0.04f), 0.0455, 0.005);
  EXPECT_NEAR(moments(WeightsOf(Path("a"), "model.layers.0.attn.k_conv1d.weight")).second, 0.5, 0.08);
  EXPECT_EQ(WeightsOf(Path("a"), "model.norm.weight"), std::vector<float>(128, 1.0f));
  // It speaks until it is stopped.
  EXPECT_TRUE(ReadModelConfig(Path("a"))->eos_ids.empty());
}

TEST_F(CommandsTest, AModelInSeveralFilesIsTheSame) {
  const auto make = [this](const std::vector<std::string>& more) {
    std::vector<std::string> arguments = {"make-model", "--family", "deltanet_model", "--num-layers",
                                          "2",          "--output", Path("m")};
    arguments.insert(arguments.end(), more.begin(), more.end());
    const Result made = RunCommand(arguments);
    EXPECT_EQ(made.exit_status, 0) << made.err;
    std::map<std::string, std::vector<float>> weights;
    const absl::StatusOr<Checkpoint> file = Checkpoint::Open(Path("m"));  // One form or the other.
    EXPECT_TRUE(file.ok()) << file.status();
    for (const auto& [name, entry] : file->entries()) weights[name] = WeightsOf(Path("m"), name);
    return weights;
  };
  const auto whole = make({});
  EXPECT_EQ(make({"--shard-bytes", "100000"}), whole);
  EXPECT_FALSE(std::filesystem::exists(Path("m") + "/model.safetensors"));
  int64_t files = 0;
  for (const auto& entry : std::filesystem::directory_iterator(Path("m"))) {
    if (entry.path().extension() != ".safetensors") continue;
    ++files;
    EXPECT_LE(entry.file_size(), 110000u) << entry.path();
  }
  EXPECT_GE(files, 5);
  EXPECT_EQ(make({}), whole);
}

TEST_F(CommandsTest, ModelsAreScaledAndRepeatable) {
  const auto make = [this](const std::string& name, const std::string& seed) {
    EXPECT_EQ(RunCommand({"make-model", "--family", "transformer_deltanet", "--d-model", "16", "--seed", seed,
                          "--output", Path(name)})
                  .exit_status,
              0);
    std::ifstream file(Path(name) + "/model.safetensors", std::ios::binary);
    return std::string(std::istreambuf_iterator<char>(file), {});
  };
  const std::string first = make("a", "5");
  EXPECT_EQ(first, make("b", "5"));
  EXPECT_NE(first, make("c", "6"));

  const auto values = [this](const std::string& name) {
    const Tensor tensor = *ReadTensor(Path("a") + "/model.safetensors", name);
    std::vector<float> result(NumElements(tensor.shape));
    std::memcpy(result.data(), tensor.data.data(), tensor.data.size());
    return result;
  };
  const auto largest = [&](const std::string& name) {
    float largest = 0;
    for (const float value : values(name)) largest = std::max(largest, std::abs(value));
    return largest;
  };
  EXPECT_LE(largest("layers.0.q_linear.weight"), 0.25f);  // 1/sqrt(16)
  EXPECT_GT(largest("layers.0.q_linear.weight"), 0.2f);
  EXPECT_LE(largest("layers.0.q_linear.bias"), 0.25f);
  EXPECT_LE(largest("layers.0.q_conv.weight"), 0.1444f);  // 1/sqrt(16 * 3)
  EXPECT_GT(largest("layers.0.q_conv.weight"), 0.13f);
  EXPECT_LE(largest("layers.0.q_conv.bias"), 0.1444f);
  EXPECT_EQ(values("layers.0.rms_norm.scale"), std::vector<float>(16, 1.0f));
  EXPECT_EQ(values("final_rms_norm.scale"), std::vector<float>(16, 1.0f));
}

}  // namespace
}  // namespace deltanet
