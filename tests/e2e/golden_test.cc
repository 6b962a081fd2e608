// The golden files of every family through the whole service: the real engine behind the real server, asked
// by the real client.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "client/client.h"
#include "gtest/gtest.h"
#include "model/base/safetensors.h"
#include "model/model.h"
#include "server/server.h"
#include "tests/model/engine_modes.h"
#include "tests/testing/max_error.h"

namespace deltanet {
namespace {

constexpr double kTolerance = 1e-4;  // Of the output's largest magnitude.

struct Golden {
  std::vector<char> input;  // [B, T, d] float32 or [B, T] int64.
  SafetensorsEntry input_entry;
  std::vector<float> output;  // [B, T, width]
  int64_t width = 0;

  int64_t batch() const { return input_entry.shape[0]; }
  int64_t tokens() const { return input_entry.shape[1]; }
  int64_t token_bytes() const { return static_cast<int64_t>(input.size()) / (batch() * tokens()); }

  TensorView All() const { return {input.data(), input_entry.shape, input_entry.dtype, {}}; }
  // Tokens [begin, end) of sequence b, as [T, d] or [T].
  TensorView Tokens(int64_t b, int64_t begin, int64_t end) const {
    Shape shape(input_entry.shape.begin() + 1, input_entry.shape.end());
    shape[0] = end - begin;
    return {input.data() + (b * tokens() + begin) * token_bytes(), shape, input_entry.dtype, {}};
  }
};

// The real engine behind the real server, and a client of it.
void Serve(const std::string& directory, const Mode& mode, std::unique_ptr<Server>* server,
           std::unique_ptr<Client>* client, bool deterministic = false) {
  ModelOptions options;
  options.device = mode.device;
  options.dtype = mode.dtype;
  options.deterministic = deterministic;
  options.pool_bytes = int64_t{64} << 20;
  options.cpu_threads = 2;
  auto model = LoadModel(directory, options);
  ASSERT_TRUE(model.ok()) << model.status();
  std::vector<NamedModel> models;
  models.push_back({"golden", *std::move(model)});
  const ServerOptions server_options;
  auto started = Server::Start(server_options, std::move(models));
  ASSERT_TRUE(started.ok()) << started.status();
  *server = *std::move(started);
  auto connected = Client::Connect(absl::StrCat("127.0.0.1:", (*server)->port()), {});
  ASSERT_TRUE(connected.ok()) << connected.status();
  *client = std::make_unique<Client>(*std::move(connected));
}

class GoldenService : public testing::TestWithParam<std::tuple<std::string, Mode>> {
 protected:
  void SetUp() override {
    const Mode& mode = std::get<1>(GetParam());
    SKIP_WITHOUT_DEVICE(mode);
    const std::string directory = absl::StrCat(DELTANET_TESTDATA, "/golden/", std::get<0>(GetParam()));
    const auto file = SafetensorsReader::Open(directory + "/golden.safetensors");
    ASSERT_TRUE(file.ok()) << file.status();
    const bool fla = absl::StartsWith(std::get<0>(GetParam()), "fla_");  // Its tensors have names of their own.
    golden_.input_entry = **file->Find(fla ? "input_ids" : "input");
    golden_.input.resize(golden_.input_entry.bytes);
    ASSERT_TRUE(file->Read(golden_.input_entry, golden_.input.data()).ok());
    const SafetensorsEntry& output = **file->Find(fla ? "logits" : "output");
    golden_.width = output.shape[2];
    golden_.output.resize(NumElements(output.shape));
    ASSERT_TRUE(file->Read(output, golden_.output.data()).ok());

    Serve(directory, mode, &server_, &client_);
  }

  // `output`: [T, width] of sequence b, or of all sequences for b < 0.
  void ExpectGolden(const std::vector<float>& output, int64_t b) const {
    const int64_t count = golden_.tokens() * golden_.width;
    const float* want = golden_.output.data() + std::max<int64_t>(b, 0) * count;
    ASSERT_EQ(static_cast<int64_t>(output.size()), b < 0 ? count * golden_.batch() : count);
    EXPECT_LE(MaxError(output.data(), want, static_cast<int64_t>(output.size())), kTolerance * Magnitude())
        << "sequence " << b;
  }

  double Magnitude() const {
    return MaxMagnitude(golden_.output.data(), static_cast<int64_t>(golden_.output.size()));
  }

  // One stream with `sessions` sessions, in random chunks, a few of which have a deadline that they can miss;
  // sometimes the stream is given up and all begins anew. Returns the largest error of an answer.
  double StreamWithFaults(uint32_t seed, int64_t sessions) {
    std::mt19937 random(seed);
    const auto draw = [&](int64_t n) { return static_cast<int64_t>(random() % n); };
    double error = 0;
    for (int giving_up = draw(3); giving_up >= 0; --giving_up) {
      const auto client = Client::Connect(absl::StrCat("127.0.0.1:", server_->port()), {});
      EXPECT_TRUE(client.ok());
      const auto stream = client->OpenStream({});
      std::vector<int64_t> positions(sessions, 0), left(sessions);
      std::vector<int64_t> sequences(sessions);
      for (int64_t i = 0; i < sessions; ++i) {
        left[i] = i;
        sequences[i] = draw(golden_.batch());
      }
      for (int64_t message = 0; !left.empty(); ++message) {
        if (giving_up > 0 && message == 3 * sessions) {
          stream->Cancel();
          break;
        }
        const int64_t chosen = draw(static_cast<int64_t>(left.size()));
        const int64_t i = left[chosen];
        const int64_t end = std::min(golden_.tokens(), positions[i] + 1 + draw(60));
        StreamRequest request;
        request.stream_session = static_cast<uint32_t>(i);
        request.input = golden_.Tokens(sequences[i], positions[i], end);
        request.end_of_sequence = end == golden_.tokens();
        request.expected_position = positions[i];
        if (draw(8) == 0) request.timeout = absl::Microseconds(1 + draw(3000));
        StreamResponse response;
        if (!stream->Write(request) || !stream->Read(&response)) {
          ADD_FAILURE() << stream->Finish();
          return error;
        }
        if (!response.status.ok()) {
          EXPECT_EQ(response.status.code(), absl::StatusCode::kDeadlineExceeded) << response.status;
          EXPECT_EQ(response.committed_position, positions[i]);
          continue;
        }
        EXPECT_EQ(response.committed_position, end);
        std::vector<float> output;
        Append(response.output, &output);
        const int64_t at = sequences[i] * golden_.tokens() + response.output_position;
        const float* want = golden_.output.data() + at * golden_.width;
        KeepLargest(MaxError(output.data(), want, static_cast<int64_t>(output.size())), &error);
        positions[i] = end;
        if (request.end_of_sequence) left.erase(left.begin() + chosen);
      }
      if (left.empty()) {
        EXPECT_TRUE(stream->Finish().ok());
      }
    }
    return error;
  }

  static void Append(const Tensor& tensor, std::vector<float>* to) {
    const size_t old = to->size();
    to->resize(old + NumElements(tensor.shape));
    ConvertElements(tensor.data.data(), tensor.dtype, to->data() + old, DType::kFloat32,
                    NumElements(tensor.shape));
  }

  // Streams all sequences side by side, a chunk of `next()` tokens of one that `pick(unfinished)` chooses at
  // a time.
  void Stream(const std::function<int64_t()>& next, const std::function<size_t(size_t)>& pick) {
    const auto stream = client_->OpenStream({});
    std::vector<std::vector<float>> outputs(golden_.batch());
    std::vector<int64_t> positions(golden_.batch(), 0);
    std::vector<int64_t> left(golden_.batch());
    for (int64_t b = 0; b < golden_.batch(); ++b) left[b] = b;
    while (!left.empty()) {
      const size_t chosen = pick(left.size());
      const int64_t b = left[chosen];
      const int64_t end = std::min(golden_.tokens(), positions[b] + next());
      StreamRequest request;
      request.stream_session = static_cast<uint32_t>(b);
      request.input = golden_.Tokens(b, positions[b], end);
      request.end_of_sequence = end == golden_.tokens();
      ASSERT_TRUE(stream->Write(request));
      StreamResponse response;
      ASSERT_TRUE(stream->Read(&response)) << stream->Finish();
      ASSERT_TRUE(response.status.ok()) << response.status;
      EXPECT_EQ(response.output_position * golden_.width, static_cast<int64_t>(outputs[b].size()));
      EXPECT_EQ(response.committed_position, end);
      Append(response.output, &outputs[b]);
      positions[b] = end;
      if (request.end_of_sequence) left.erase(left.begin() + static_cast<int64_t>(chosen));
    }
    EXPECT_TRUE(stream->Finish().ok());
    for (int64_t b = 0; b < golden_.batch(); ++b) ExpectGolden(outputs[b], b);
  }

  Golden golden_;
  std::unique_ptr<Server> server_;
  std::unique_ptr<Client> client_;
};

TEST_P(GoldenService, OneShot) {
  const auto result = client_->Forward(golden_.All(), {});
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(result->output.shape, (Shape{golden_.batch(), golden_.tokens(), golden_.width}));
  std::vector<float> output;
  Append(result->output, &output);
  ExpectGolden(output, -1);
}

TEST_P(GoldenService, StreamedInChunksOf1) {
  Stream([] { return 1; }, [](size_t) { return 0; });
}
TEST_P(GoldenService, StreamedInChunksOf7) {
  Stream([] { return 7; }, [](size_t) { return 0; });
}
TEST_P(GoldenService, StreamedInChunksOf64) {
  Stream([] { return 64; }, [](size_t) { return 0; });
}
TEST_P(GoldenService, StreamedInRandomChunksAndOrder) {
  std::mt19937 random(3);
  Stream([&] { return 1 + random() % 40; }, [&](size_t left) { return random() % left; });
}

TEST_P(GoldenService, ANamedSessionGoesOnAcrossCalls) {
  ForwardOptions options;
  options.session = SessionChoice{.id = "golden-session", .create = true};
  std::vector<float> output;
  for (int64_t begin = 0; begin < golden_.tokens(); begin += 50) {
    const int64_t end = std::min(golden_.tokens(), begin + 50);
    options.end_of_sequence = end == golden_.tokens();
    options.expected_position = begin;
    const auto result = client_->Forward(golden_.Tokens(0, begin, end), options);
    ASSERT_TRUE(result.ok()) << result.status();
    Append(result->output, &output);
    options.session->create = false;
  }
  ExpectGolden(output, 0);
}

// 200 sessions at once, over eight streams.
TEST_P(GoldenService, ManySessionsWithFaults) {
  constexpr int kStreams = 8, kSessions = 25;
  std::vector<double> errors(kStreams, 0);
  std::vector<std::thread> threads;
  for (int i = 0; i < kStreams; ++i) {
    threads.emplace_back([&, i] { errors[i] = StreamWithFaults(100 + i, kSessions); });
  }
  for (std::thread& thread : threads) thread.join();
  for (const double error : errors) EXPECT_LE(error, kTolerance * Magnitude());
  // What was given up has freed what it held.
  for (;;) {
    const auto model = client_->GetModel("golden");
    ASSERT_TRUE(model.ok()) << model.status();
    if (model->sessions == 0) break;
  }
}

// bfloat16 has bounds of its own, and tests of its own in tests/model.
std::vector<Mode> Float32Modes() {
  std::vector<Mode> modes = Modes();
  std::erase_if(modes, [](const Mode& mode) { return mode.dtype != DType::kFloat32; });
  return modes;
}

INSTANTIATE_TEST_SUITE_P(Families, GoldenService,
                         testing::Combine(testing::Values("transformer_deltanet",
                                                          "transformer_deltanet_causal", "transformer_block",
                                                          "deltanet_model", "deltanet_model_causal",
                                                          "fla_default", "fla_head128", "fla_fused_mlp",
                                                          "fla_tied"),
                                          testing::ValuesIn(Float32Modes())),
                         [](const auto& info) {
                           return absl::StrCat(std::get<0>(info.param), "_", std::get<1>(info.param).name);
                         });

std::vector<std::vector<int64_t>> ReadIds(const SafetensorsReader& file, const std::string& name) {
  const SafetensorsEntry& entry = **file.Find(name);
  std::vector<int64_t> flat(NumElements(entry.shape));
  EXPECT_TRUE(file.Read(entry, flat.data()).ok());
  std::vector<std::vector<int64_t>> sequences;
  for (int64_t b = 0; b < entry.shape[0]; ++b) {
    sequences.emplace_back(flat.begin() + b * entry.shape[1], flat.begin() + (b + 1) * entry.shape[1]);
  }
  return sequences;
}

std::vector<int64_t> IdsOf(const Generated& answer) {
  std::vector<int64_t> ids;
  for (const TokenResult& token : answer.tokens) ids.push_back(token.id);
  return ids;
}

class GenerateService : public testing::TestWithParam<Mode> {
 protected:
  void SetUp() override {
    SKIP_WITHOUT_DEVICE(GetParam());
    const std::string directory = absl::StrCat(DELTANET_TESTDATA, "/golden/fla_default");
    const auto file = SafetensorsReader::Open(directory + "/golden.safetensors");
    ASSERT_TRUE(file.ok()) << file.status();
    prompts_ = ReadIds(*file, "greedy_prompt");
    continuations_ = ReadIds(*file, "greedy_continuation");
    Serve(directory, GetParam(), &server_, &client_);
  }

  Generated Generate(const std::vector<int64_t>& prompt, int64_t max_tokens,
                     std::optional<SessionChoice> session = std::nullopt) const {
    GenerateOptions options;
    options.prompt = prompt;
    options.max_tokens = max_tokens;
    options.session = std::move(session);
    options.ignore_eos = true;
    auto answer = client_->Generate(options, nullptr);
    EXPECT_TRUE(answer.ok()) << answer.status();
    return answer.value_or(Generated{});
  }

  std::vector<std::vector<int64_t>> prompts_, continuations_;
  std::unique_ptr<Server> server_;
  std::unique_ptr<Client> client_;
};

INSTANTIATE_TEST_SUITE_P(Modes, GenerateService, testing::ValuesIn(Float32Modes()),
                         [](const auto& info) { return info.param.name; });

TEST_P(GenerateService, GreedyContinuationsAreTheGoldenOnes) {
  for (size_t i = 0; i < prompts_.size(); ++i) {
    const Generated answer = Generate(prompts_[i], static_cast<int64_t>(continuations_[i].size()));
    EXPECT_EQ(IdsOf(answer), continuations_[i]);
    EXPECT_EQ(answer.finish_reason, FinishReason::kLength);
    EXPECT_EQ(answer.prompt_tokens, static_cast<int64_t>(prompts_[i].size()));
  }
}

// A session takes the prompt in by Forward and by Generate, and goes on twice.
TEST_P(GenerateService, ASessionGoesOnWhereItStands) {
  const std::vector<int64_t>& prompt = prompts_[0];
  const std::vector<int64_t>& want = continuations_[0];
  ForwardOptions forward;
  forward.session = SessionChoice{.id = "chat", .create = true};
  const TensorView first{reinterpret_cast<const char*>(prompt.data()), {15}, DType::kInt64, {}};
  ASSERT_TRUE(client_->Forward(first, forward).ok());
  const SessionChoice session{.id = "chat"};
  std::vector<int64_t> ids = IdsOf(Generate({prompt.begin() + 15, prompt.end()}, 5, session));
  const Generated rest = Generate({}, static_cast<int64_t>(want.size()) - 5, session);
  const std::vector<int64_t> more = IdsOf(rest);
  ids.insert(ids.end(), more.begin(), more.end());
  EXPECT_EQ(ids, want);
  EXPECT_EQ(rest.committed_position, static_cast<int64_t>(prompt.size() + want.size()));
}

TEST_P(GenerateService, SixtyFourSideBySideAreAsAlone) {
  constexpr int kGenerations = 64, kTokens = 24;
  std::vector<std::vector<int64_t>> together(kGenerations);
  const auto prompt = [&](int i) {
    const std::vector<int64_t>& from = prompts_[i % prompts_.size()];
    return std::vector<int64_t>(from.begin(), from.begin() + 1 + i % static_cast<int>(from.size()));
  };
  std::vector<std::thread> threads;
  for (int i = 0; i < kGenerations; ++i) {
    threads.emplace_back([&, i] { together[i] = IdsOf(Generate(prompt(i), kTokens)); });
  }
  for (std::thread& thread : threads) thread.join();
  for (int i = 0; i < kGenerations; ++i) {
    EXPECT_EQ(together[i], IdsOf(Generate(prompt(i), kTokens))) << "generation " << i;
  }
}

// What a client gets from a deterministic server has the same bytes whatever the others do.
class DeterministicService : public testing::TestWithParam<std::tuple<std::string, Mode>> {
 protected:
  void SetUp() override { SKIP_WITHOUT_DEVICE(std::get<1>(GetParam())); }

  // All that one client gets, as bytes: a stream in random chunks, and of a model that generates a session
  // that by turns is fed, scored and continued. What it asks for follows from `seed` alone.
  static std::string Run(const Client& client, const ModelInfo& model, uint32_t seed) {
    std::mt19937 random(seed);
    const auto draw = [&](int64_t n) { return static_cast<int64_t>(random() % n); };
    std::string bytes;
    const auto append = [&](const void* data, size_t size) {
      bytes.append(static_cast<const char*>(data), size);
    };
    constexpr int64_t kTokens = 700;
    std::vector<int64_t> ids(kTokens);
    std::vector<float> values(kTokens * model.input_width);
    for (int64_t& id : ids) id = model.vocab_size > 0 ? draw(model.vocab_size) : 0;
    for (float& value : values) value = static_cast<float>(draw(4001) - 2000) / 1000;
    const auto tokens = [&](int64_t begin, int64_t end) -> TensorView {
      if (model.vocab_size > 0) return {ids.data() + begin, {end - begin}, DType::kInt64, {}};
      const Shape shape = {end - begin, model.input_width};
      return {values.data() + begin * model.input_width, shape, DType::kFloat32, {}};
    };
    const auto chunk = [&] { return 1 + draw(draw(3) == 0 ? 200 : 20); };

    const auto stream = client.OpenStream({});
    for (int64_t begin = 0, end; begin < kTokens; begin = end) {
      end = std::min(kTokens, begin + chunk());
      StreamRequest request;
      request.input = tokens(begin, end);
      request.end_of_sequence = end == kTokens;
      StreamResponse response;
      if (!stream->Write(request) || !stream->Read(&response) || !response.status.ok()) {
        ADD_FAILURE() << response.status;
        return "";
      }
      append(response.output.data.data(), response.output.data.size());
    }
    EXPECT_TRUE(stream->Finish().ok());
    if (!model.generates) return bytes;

    const std::string id = absl::StrCat("session-", seed);
    for (int64_t begin = 0, end; begin < kTokens; begin = end) {
      end = std::min(kTokens, begin + chunk());
      const SessionChoice session{.id = id, .create = begin == 0};
      if (draw(2) == 0) {
        ForwardOptions options;
        options.session = session;
        options.output_options.kind = draw(2) == 0 ? OutputKind::kScores : OutputKind::kTop;
        options.output_options.top_tokens = 2;
        const auto result = client.Forward(tokens(begin, end), options);
        EXPECT_TRUE(result.ok()) << result.status();
        if (!result.ok()) return "";
        append(result->log_probs.data(), result->log_probs.size() * sizeof(float));
        append(result->top.ids.data(), result->top.ids.size() * sizeof(int64_t));
        append(result->top.log_probs.data(), result->top.log_probs.size() * sizeof(float));
      } else {
        GenerateOptions options;
        options.session = session;
        options.prompt = std::vector<int64_t>(ids.begin() + begin, ids.begin() + end);
        options.max_tokens = 1 + draw(12);
        options.ignore_eos = true;
        options.sampling.temperature = 5;
        options.sampling.top_p = 0.9f;
        options.sampling.seed = seed;
        options.top_log_probs = 2;
        const auto result = client.Generate(options, nullptr);
        EXPECT_TRUE(result.ok()) << result.status();
        if (!result.ok()) return "";
        for (const TokenResult& token : result->tokens) {
          append(&token.id, sizeof(token.id));
          append(&token.log_prob, sizeof(token.log_prob));
          append(token.top_log_probs.data(), token.top_log_probs.size() * sizeof(float));
        }
      }
    }
    EXPECT_TRUE(client.EndSession(id).ok());
    return bytes;
  }
};

INSTANTIATE_TEST_SUITE_P(Models, DeterministicService,
                         testing::Combine(testing::Values("transformer_deltanet", "deltanet_model",
                                                          "fla_default"),
                                          testing::ValuesIn(Modes())),
                         [](const auto& info) {
                           return absl::StrCat(std::get<0>(info.param), "_", std::get<1>(info.param).name);
                         });

TEST_P(DeterministicService, SixteenClientsGetTheBytesThatEachGetsAlone) {
  constexpr int kClients = 16;
  std::unique_ptr<Server> server;
  std::unique_ptr<Client> client;
  Serve(absl::StrCat(DELTANET_TESTDATA, "/golden/", std::get<0>(GetParam())), std::get<1>(GetParam()),
        &server, &client, /*deterministic=*/true);
  ASSERT_NE(client, nullptr);
  const auto model = client->GetModel("");
  ASSERT_TRUE(model.ok()) << model.status();
  EXPECT_TRUE(model->deterministic);
  std::vector<std::string> together(kClients);
  std::vector<std::thread> threads;
  for (int i = 0; i < kClients; ++i) threads.emplace_back([&, i] { together[i] = Run(*client, *model, i); });
  for (std::thread& thread : threads) thread.join();
  for (int i = 0; i < kClients; ++i) {
    EXPECT_FALSE(together[i].empty());
    EXPECT_TRUE(together[i] == Run(*client, *model, i)) << "client " << i;
  }
}

}  // namespace
}  // namespace deltanet
