// The concurrency test over the engine, on every device: a model whose outputs lag and one whose do not.
#include <memory>
#include <mutex>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "gtest/gtest.h"
#include "model/base/config.h"
#include "model/model.h"
#include "tests/e2e/concurrency.h"
#include "tests/e2e/test_server.h"
#include "tests/model/engine_modes.h"
#include "tests/testing/random_model.h"

namespace deltanet {
namespace {

constexpr int64_t kNumSlots = 400;

// Runs whole sequences through an engine of its own.
class EngineSoloRun final : public SoloRun {
 public:
  EngineSoloRun(std::unique_ptr<Model> model, double error) : model_(std::move(model)) {
    const ModelDescription& description = model_->description();
    width = description.input_width;
    output_width = description.output_width;
    lookahead = description.lookahead;
    tolerance = error;
  }

  std::vector<float> Outputs(const std::vector<float>& input) override {
    const std::lock_guard<std::mutex> lock(mu_);
    const int64_t tokens = static_cast<int64_t>(input.size()) / width;
    // The tokens that flush a model with look-ahead are there and are no input.
    StepRow row;
    row.work_slot = 0;
    row.fresh = true;
    row.tokens = tokens + lookahead;
    row.end = tokens;
    row.input = input.data();
    std::vector<float> output(tokens * output_width);
    row.output = output.data();
    const auto ticket = model_->Prepare({&row, 1});
    EXPECT_TRUE(ticket.ok()) << ticket.status();
    EXPECT_TRUE(model_->Launch(*ticket).ok());
    const auto result = model_->Wait(*ticket);
    EXPECT_TRUE(result.ok() && result->rows[0].ok()) << result.status();
    return output;
  }

 private:
  std::mutex mu_;
  const std::unique_ptr<Model> model_;
};

class EngineConcurrency : public ::testing::TestWithParam<std::tuple<ConvPadding, Mode>> {};

TEST_P(EngineConcurrency, EveryAnswerIsThatOfASoloRun) {
  const auto& [padding, mode] = GetParam();
  SKIP_WITHOUT_DEVICE(mode);
  ModelConfig config;
  config.family = Family::kTransformerDeltaNet;
  config.d_model = 64;
  config.chunk_size = 4;
  config.num_layers = 2;
  config.conv_padding = padding;
  const std::string directory = WriteRandomModel(config, 5);
  ModelOptions options;
  options.device = mode.device;
  options.dtype = mode.dtype;
  options.max_step_tokens = kMaxTokens + 24;
  options.pool_bytes = int64_t{1} << 30;
  options.max_slots = kNumSlots;
  auto served = LoadModel(directory, options), alone = LoadModel(directory, options);
  ASSERT_TRUE(served.ok() && alone.ok()) << served.status() << alone.status();
  // As the engine's own tests: what cutting and other kernels may change.
  EngineSoloRun solo(*std::move(alone), mode.dtype == DType::kFloat32 ? 1e-4 : 5e-2);
  std::vector<NamedModel> models;
  models.push_back({"m", *std::move(served)});
  TestServer server(std::move(models), ServerOptions());
  RunConcurrently(&server, &solo, kNumSlots);
}

INSTANTIATE_TEST_SUITE_P(Models, EngineConcurrency,
                         ::testing::Combine(::testing::Values(ConvPadding::kCausal, ConvPadding::kCentered),
                                            ::testing::ValuesIn(Modes())),
                         [](const auto& info) {
                           return std::string(std::get<0>(info.param) == ConvPadding::kCausal ? "causal_"
                                                                                              : "centered_") +
                                  std::get<1>(info.param).name;
                         });

}  // namespace
}  // namespace deltanet
