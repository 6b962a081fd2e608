#include "tests/e2e/concurrency.h"

#include <vector>

#include "gtest/gtest.h"
#include "tests/e2e/test_server.h"

namespace deltanet {
namespace {

class FakeSoloRun final : public SoloRun {
 public:
  explicit FakeSoloRun(const FakeModel* model) : model_(*model) {
    width = kWidth;
    output_width = kOutputWidth;
    lookahead = model->description().lookahead;
  }
  std::vector<float> Outputs(const std::vector<float>& input) override { return model_.ExpectedOutput(input); }

 private:
  const FakeModel& model_;
};

class Concurrency : public ::testing::TestWithParam<FakeModelOptions> {};

TEST_P(Concurrency, EveryAnswerIsThatOfASoloRun) {
  TestServer server(GetParam());
  FakeSoloRun solo(&server.model());
  RunConcurrently(&server, &solo, GetParam().num_slots);
}

INSTANTIATE_TEST_SUITE_P(Models, Concurrency,
                         ::testing::Values(FakeModelOptions{.num_slots = 400},
                                           FakeModelOptions{
                                               .lookahead = 5, .num_slots = 400, .max_step_rows = 64},
                                           FakeModelOptions{.num_slots = 280, .max_steps_in_flight = 2}));

}  // namespace
}  // namespace deltanet
