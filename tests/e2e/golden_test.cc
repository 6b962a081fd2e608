// The golden files of every family through the whole service: the real engine behind the real server, asked
// by the real client.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "client/client.h"
#include "gtest/gtest.h"
#include "model/base/safetensors.h"
#include "model/model.h"
#include "server/server.h"

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

class GoldenService : public testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    const std::string directory = absl::StrCat(DELTANET_TESTDATA, "/golden/", GetParam());
    const auto file = SafetensorsReader::Open(directory + "/golden.safetensors");
    ASSERT_TRUE(file.ok()) << file.status();
    golden_.input_entry = **file->Find("input");
    golden_.input.resize(golden_.input_entry.bytes);
    ASSERT_TRUE(file->Read(golden_.input_entry, golden_.input.data()).ok());
    const SafetensorsEntry& output = **file->Find("output");
    golden_.width = output.shape[2];
    golden_.output.resize(NumElements(output.shape));
    ASSERT_TRUE(file->Read(output, golden_.output.data()).ok());

    ModelOptions options;
    options.pool_bytes = int64_t{32} << 20;
    options.cpu_threads = 2;
    auto model = LoadModel(directory, options);
    ASSERT_TRUE(model.ok()) << model.status();
    std::vector<NamedModel> models;
    models.push_back({"golden", *std::move(model)});
    auto server = Server::Start(ServerOptions{}, std::move(models));
    ASSERT_TRUE(server.ok()) << server.status();
    server_ = *std::move(server);
    auto client = Client::Connect(absl::StrCat("127.0.0.1:", server_->port()), {});
    ASSERT_TRUE(client.ok()) << client.status();
    client_ = std::make_unique<Client>(*std::move(client));
  }

  // `output`: [T, width] of sequence b, or of all sequences for b < 0.
  void ExpectGolden(const std::vector<float>& output, int64_t b) const {
    const int64_t count = golden_.tokens() * golden_.width;
    const float* want = golden_.output.data() + std::max<int64_t>(b, 0) * count;
    ASSERT_EQ(static_cast<int64_t>(output.size()), b < 0 ? count * golden_.batch() : count);
    double magnitude = 0, error = 0;
    for (size_t i = 0; i < output.size(); ++i) {
      magnitude = std::max(magnitude, std::abs(static_cast<double>(want[i])));
      const double difference = std::abs(static_cast<double>(output[i]) - want[i]);
      if (!(difference <= error)) error = difference;
    }
    EXPECT_LE(error, kTolerance * magnitude) << "sequence " << b;
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

INSTANTIATE_TEST_SUITE_P(Families, GoldenService,
                         testing::Values("transformer_deltanet", "transformer_deltanet_causal",
                                         "transformer_block", "deltanet_model", "deltanet_model_causal"),
                         [](const auto& info) { return info.param; });

}  // namespace
}  // namespace deltanet
