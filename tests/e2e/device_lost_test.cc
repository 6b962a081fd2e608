// A CUDA error that stays, provoked on a real device: every step fails with a clear reason, health turns, and
// the server says that its process is to end. Poisons the device for its process, so it is a program of its
// own.
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "client/client.h"
#include "gtest/gtest.h"
#include "model/device.h"
#include "model/model.h"
#include "proto/wire.h"
#include "server/server.h"
#include "tests/e2e/trap_kernel.h"
#include "tests/testing/random_model.h"

namespace deltanet {
namespace {

TEST(DeviceLost, EndsAllWorkAndTurnsHealth) {
  const Device device{DeviceType::kCuda, 0};
  if (const absl::Status there = CheckDevice(device); !there.ok()) GTEST_SKIP() << there.message();

  ModelConfig config;
  config.family = Family::kTransformerDeltaNet;
  config.d_model = 16;
  config.chunk_size = 4;
  ModelOptions model_options;
  model_options.device = device;
  model_options.pool_bytes = int64_t{64} << 20;
  auto model = LoadModel(WriteRandomModel(config, 1), model_options);
  ASSERT_TRUE(model.ok()) << model.status();
  std::vector<NamedModel> models;
  models.push_back({"m", *std::move(model)});
  auto server = Server::Start(ServerOptions{}, std::move(models));
  ASSERT_TRUE(server.ok()) << server.status();
  auto client = Client::Connect(absl::StrCat("127.0.0.1:", (*server)->port()), {});
  ASSERT_TRUE(client.ok()) << client.status();

  const std::vector<float> input(5 * 16, 0.5f);
  const TensorView view{input.data(), {5, 16}, DType::kFloat32, {}};
  ASSERT_TRUE(client->Forward(view, {}).ok());
  const auto healthy = client->CheckHealth("");
  ASSERT_TRUE(healthy.ok()) << healthy.status();
  EXPECT_EQ(*healthy, HealthStatus::kServing);

  LaunchTrapKernel();

  for (int call = 0; call < 3; ++call) {
    const absl::Status lost = client->Forward(view, {}).status();
    EXPECT_EQ(lost.code(), absl::StatusCode::kInternal) << lost;
    EXPECT_TRUE(absl::StrContains(lost.message(), "lost")) << lost;
  }
  const auto health = client->CheckHealth("");
  ASSERT_TRUE(health.ok()) << health.status();
  EXPECT_EQ(*health, HealthStatus::kNotServing);
}

}  // namespace
}  // namespace deltanet
