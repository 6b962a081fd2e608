// What the tests of the batcher and of the session store share: calls that keep their buffers and take their
// answer.
#ifndef DELTANET_TESTS_SERVER_SCHEDULING_TEST_UTIL_H_
#define DELTANET_TESTS_SERVER_SCHEDULING_TEST_UTIL_H_

#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <random>
#include <utility>
#include <vector>

#include "absl/functional/any_invocable.h"
#include "absl/types/span.h"
#include "gtest/gtest.h"
#include "model/base/mutex.h"
#include "proto/wire.h"
#include "server/batcher.h"

namespace deltanet {

// `tokens` random tokens of `width` values.
inline std::vector<float> RandomInput(uint32_t seed, int64_t tokens, int64_t width = 3) {
  std::mt19937 random(seed);
  std::uniform_real_distribution<float> uniform(-1, 1);
  std::vector<float> input(tokens * width);
  for (float& value : input) value = uniform(random);
  return input;
}

// `result` with a status that shares nothing with it. Copies of an absl::Status share one counted object, and
// Debian's library that counts is not built for TSan: two threads that hold copies look like a race to it.
inline WorkResult Unshared(WorkResult result) {
  result.status = FromRpcStatus(ToRpcStatus(result.status));
  return result;
}

struct CallOptions {
  bool end_of_sequence = false;
  std::optional<int64_t> expected_position;
  absl::Time deadline = absl::InfiniteFuture();
  absl::Status precondition;
  std::shared_ptr<const Cancellation> cancellation;
  Batcher::WhenFull when_full = Batcher::WhenFull::kQueue;
  absl::AnyInvocable<void(const WorkResult&)> then;  // Called in `done`, after the answer is there.
};

// One work and its answer. Thread-safe.
class Call {
 public:
  // Submits `input`, [T, 3] values, to a batcher of FakeModels of width 3 to 8.
  Call(Batcher* batcher, int model, const std::shared_ptr<Lane>& lane, absl::Span<const float> input,
       CallOptions options = {})
      : shared_(std::make_shared<Shared>()) {
    const ModelDescription& description = batcher->description(model);
    shared_->input.assign(input.begin(), input.end());
    const int64_t tokens = static_cast<int64_t>(input.size()) / description.input_width;
    const int64_t rows = tokens + (options.end_of_sequence ? description.lookahead : 0);
    shared_->output.assign(rows * description.output_width, std::numeric_limits<float>::quiet_NaN());
    shared_->width = description.output_width;
    auto work = std::make_unique<Work>();
    work->input = shared_->input.data();
    work->tokens = tokens;
    work->end_of_sequence = options.end_of_sequence;
    work->output = shared_->output.data();
    work->expected_position = options.expected_position;
    work->deadline = options.deadline;
    work->precondition = options.precondition;
    work->cancellation = options.cancellation;
    work->done = [shared = shared_, then = std::move(options.then)](const WorkResult& result) mutable {
      {
        MutexLock lock(&shared->mu);
        EXPECT_FALSE(shared->result.has_value()) << "answered twice";
        shared->result = Unshared(result);
      }
      shared->answered.NotifyAll();
      if (then) then(result);
    };
    submitted_ = batcher->Submit(lane, &work, options.when_full);
    EXPECT_EQ(work == nullptr, submitted_.ok());
  }

  const absl::Status& submitted() const { return submitted_; }

  bool answered() const {
    MutexLock lock(&shared_->mu);
    return shared_->result.has_value();
  }

  // Blocks until it is answered.
  WorkResult Wait() const {
    MutexLock lock(&shared_->mu);
    while (!shared_->result.has_value()) shared_->answered.Wait(&shared_->mu);
    return Unshared(*shared_->result);
  }

  // Of an answered call.
  WorkResult result() const {
    MutexLock lock(&shared_->mu);
    if (!shared_->result.has_value()) {
      ADD_FAILURE() << "not answered";
      return {};
    }
    return Unshared(*shared_->result);
  }
  absl::Status status() const { return result().status; }
  std::vector<float> output() const {
    const WorkResult answer = result();
    return {shared_->output.begin(), shared_->output.begin() + answer.output_tokens * shared_->width};
  }

 private:
  // Shared, because the batcher may answer after a test has dropped the call.
  struct Shared {
    std::vector<float> input;
    std::vector<float> output;
    int64_t width = 0;
    Mutex mu;
    CondVar answered;
    std::optional<WorkResult> result;
  };
  std::shared_ptr<Shared> shared_;
  absl::Status submitted_;
};

}  // namespace deltanet

#endif  // DELTANET_TESTS_SERVER_SCHEDULING_TEST_UTIL_H_
