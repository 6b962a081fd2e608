// With ModelOptions::deterministic, what a session gets has the same bits whatever it shares its steps with.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "model/model.h"
#include "tests/model/engine_modes.h"
#include "tests/testing/same_bits.h"

namespace deltanet {
namespace {

constexpr int64_t kSessions = 24, kTop = 3;

// A session's messages, fed row by row as the batcher would: the commit is a change of slots, a message is
// cut at multiples of 64 and so that more than 16 tokens are left, tokens are generated one after another.
class Session {
 public:
  struct Message {
    int64_t tokens;
    ReadoutKind readout;
    int64_t generated;  // Tokens sampled behind it, each fed back.
  };

  // Its messages follow from `seed` alone.
  Session(const ModelDescription& description, uint32_t seed, int32_t base, int32_t work)
      : description_(description), seed_(seed), base_(base), work_(work) {
    std::mt19937 random(seed);
    constexpr int64_t kLengths[] = {1, 1, 2, 5, 16, 17, 63, 64, 65, 70, 80, 81, 128, 129, 133, 145, 200, 273};
    int64_t tokens = 0, generated = 0;
    for (int i = 0; i < 6; ++i) {
      Message message{kLengths[random() % std::size(kLengths)], ReadoutKind::kValues, 0};
      if (description.generates) {
        message.readout = static_cast<ReadoutKind>(random() % 4);
        if (message.readout == ReadoutKind::kSample) message.generated = 1 + random() % 9;
      }
      messages_.push_back(message);
      tokens += message.tokens;
      generated += message.generated;
    }
    ids_.resize(description.takes_tokens ? tokens : 0);
    for (int64_t& id : ids_) id = static_cast<int64_t>(random() % description.vocab_size);
    values_.resize(description.takes_tokens ? 0 : tokens * description.input_width);
    for (float& value : values_) value = static_cast<float>(static_cast<int>(random() % 4001) - 2000) / 1000;
    end_ = tokens;
    output_.assign(tokens * description.output_width, std::numeric_limits<float>::quiet_NaN());
    log_probs_.assign(tokens + generated, 1);
    top_log_probs_.assign((tokens + generated) * kTop, 1);
    sampled_.assign(generated, -1);
    top_ids_.assign((tokens + generated) * kTop, -1);
  }

  bool done() const { return message_ == messages_.size(); }

  // The tokens of its next row: all that is left of the message, or less.
  int64_t Cut(std::mt19937* random) const {
    const int64_t left = Total() - fed_;
    if (left == 0) return 1;  // A token is fed back.
    std::vector<int64_t> pieces = {left};
    for (int64_t piece = kCutTokens; left - piece > kFewTokens; piece += kCutTokens) pieces.push_back(piece);
    return random == nullptr ? left : pieces[(*random)() % pieces.size()];
  }

  StepRow Next(int64_t tokens) {
    const Message& message = messages_[message_];
    StepRow row;
    row.base_slot = started_ ? work_ : base_;
    row.work_slot = work_;
    row.fresh = position_ == 0 && !started_;
    row.tokens = tokens;
    row.top = kTop;
    const int64_t total = Total();
    if (fed_ == total) {
      row.position = position_ + total + fed_back_;
      row.feed_sampled = true;
      Sample(message, &row);
      return row;
    }
    const int64_t at = input_position_ + fed_;  // In what is input, of which what was generated is no part.
    row.position = position_ + fed_;
    if (message_ + 1 == messages_.size()) row.end = position_ + message.tokens;
    if (description_.takes_tokens) {
      row.input = ids_.data() + std::min(at, end_);
      row.input_dtype = DType::kInt64;
    } else {
      row.input = values_.data() + std::min(at, end_) * description_.input_width;
    }
    row.readout = message.readout;
    const bool last = fed_ + tokens == total;
    switch (message.readout) {
      case ReadoutKind::kValues:
        row.output =
            output_.data() + FirstOutputPosition(at, description_.lookahead) * description_.output_width;
        break;
      case ReadoutKind::kTop:
        row.top_ids = &top_ids_[at * kTop];
        row.top_log_probs = &top_log_probs_[at * kTop];
        break;
      case ReadoutKind::kScore: {
        const bool carried = position_ > 0 && fed_ == 0;
        if (carried) row.output_begin = -1;
        if (last) row.output_end = tokens - 1;
        const int64_t first = carried ? at : at + 1;
        row.targets = ids_.data() + first;
        row.top = 0;
        row.log_probs = log_probs_.data() + first;
        break;
      }
      case ReadoutKind::kSample:
        row.readout = ReadoutKind::kValues;
        row.output_begin = tokens - (last ? 1 : 0);
        if (last) Sample(message, &row);
    }
    return row;
  }

  void Advance(int64_t tokens) {
    const Message& message = messages_[message_];
    if (fed_ == Total()) {
      ++fed_back_;
    } else {
      fed_ += tokens;
    }
    started_ = true;
    if (fed_ < Total() || fed_back_ < message.generated) return;
    position_ += fed_ + fed_back_;
    input_position_ += message.tokens;
    generated_ += message.generated;
    std::swap(base_, work_);
    ++message_;
    fed_ = fed_back_ = 0;
    started_ = false;
  }

  bool HasTheBitsOf(const Session& other) const {
    return SameBits(output_, other.output_) && SameBits(log_probs_, other.log_probs_) &&
           SameBits(top_log_probs_, other.top_log_probs_) && SameBits(sampled_, other.sampled_) &&
           SameBits(top_ids_, other.top_ids_);
  }

 private:
  // Tokens of the message, flush tokens included.
  int64_t Total() const {
    return messages_[message_].tokens + (message_ + 1 == messages_.size() ? description_.lookahead : 0);
  }

  // The row chooses the next token, if there is one to be chosen.
  void Sample(const Message& message, StepRow* row) {
    const bool feeds = row->feed_sampled;
    const int64_t chosen = generated_ + fed_back_ + (feeds ? 1 : 0);
    if (chosen == generated_ + message.generated) {
      row->output_begin = row->tokens;
      row->top = 0;
      return;
    }
    row->readout = ReadoutKind::kSample;
    row->sampling = {.temperature = 5.0f,
                     .top_k = seed_ % 2 == 0 ? 0 : 20,
                     .top_p = seed_ % 3 == 0 ? 1.0f : 0.9f,
                     .seed = seed_};
    row->ids = &sampled_[chosen];
    row->log_probs = &log_probs_[end_ + chosen];
    row->top_ids = &top_ids_[(end_ + chosen) * kTop];
    row->top_log_probs = &top_log_probs_[(end_ + chosen) * kTop];
  }

  const ModelDescription& description_;
  const uint32_t seed_;
  std::vector<Message> messages_;
  std::vector<int64_t> ids_;
  std::vector<float> values_;
  int64_t end_ = 0;  // Tokens of all messages.

  int32_t base_, work_;
  size_t message_ = 0;
  int64_t position_ = 0;        // At the start of the message,
  int64_t input_position_ = 0;  // and without what was generated,
  int64_t generated_ = 0;       // which is that much.
  int64_t fed_ = 0;             // Of the message.
  int64_t fed_back_ = 0;        // Of what is generated behind it.
  bool started_ = false;        // The working slot holds a part of the message.

  // What it gets.
  std::vector<float> output_, log_probs_, top_log_probs_;
  std::vector<int64_t> sampled_, top_ids_;
};

std::unique_ptr<Model> Load(const std::string& name, const Mode& mode, bool deterministic, int threads,
                            OneTokenSteps one_token_steps) {
  ModelOptions options;
  options.device = mode.device;
  options.dtype = mode.dtype;
  options.deterministic = deterministic;
  options.max_step_tokens = 700;
  options.max_step_rows = kSessions;
  options.pool_bytes = int64_t{64} << 20;
  options.max_slots = 2 * kSessions;
  options.cpu_threads = threads;
  options.one_token_steps = one_token_steps;
  auto model = LoadModel(absl::StrCat(DELTANET_TESTDATA, "/golden/", name), options);
  EXPECT_TRUE(model.ok()) << model.status();
  return model.ok() ? *std::move(model) : nullptr;
}

void Step(Model* model, const std::vector<Session*>& sessions, const std::vector<int64_t>& tokens) {
  std::vector<StepRow> rows;
  for (size_t i = 0; i < sessions.size(); ++i) rows.push_back(sessions[i]->Next(tokens[i]));
  auto ticket = model->Prepare(rows);
  ASSERT_TRUE(ticket.ok()) << ticket.status();
  ASSERT_TRUE(model->Launch(*ticket).ok());
  auto result = model->Wait(*ticket);
  ASSERT_TRUE(result.ok()) << result.status();
  for (const absl::Status& status : result->rows) ASSERT_TRUE(status.ok()) << status;
  for (size_t i = 0; i < sessions.size(); ++i) sessions[i]->Advance(tokens[i]);
}

// Sessions that have other bits among others, in random order, slots, steps and cuts, than alone.
int64_t SessionsThatDiffer(const std::string& name, const Mode& mode, bool deterministic,
                           OneTokenSteps one_token_steps) {
  const auto alone_model = Load(name, mode, deterministic, 1, OneTokenSteps::kUnpadded);
  const auto model = Load(name, mode, deterministic, 2, one_token_steps);
  if (alone_model == nullptr || model == nullptr) return -1;
  std::mt19937 random(5);
  std::vector<int32_t> slots(2 * kSessions);
  for (size_t i = 0; i < slots.size(); ++i) slots[i] = static_cast<int32_t>(i);
  std::shuffle(slots.begin(), slots.end(), random);
  std::vector<Session> sessions;
  std::vector<Session*> left;
  for (int64_t i = 0; i < kSessions; ++i) {
    sessions.emplace_back(model->description(), static_cast<uint32_t>(i), slots[2 * i], slots[2 * i + 1]);
  }
  for (Session& session : sessions) left.push_back(&session);
  while (!left.empty()) {
    std::shuffle(left.begin(), left.end(), random);
    // Sometimes those alone whose next row is of one token, as in a graph.
    const bool single = random() % 3 == 0;
    const size_t most = 1 + random() % left.size();
    const int64_t most_tokens = 100 + static_cast<int64_t>(random() % 600);
    std::vector<Session*> step;
    std::vector<int64_t> tokens;
    int64_t sum = 0;
    for (Session* session : left) {
      const int64_t cut = session->Cut(&random);
      if (step.size() == most || sum + cut > most_tokens || (single && cut > 1)) continue;
      step.push_back(session);
      tokens.push_back(cut);
      sum += cut;
    }
    if (step.empty()) continue;
    Step(model.get(), step, tokens);
    if (testing::Test::HasFatalFailure()) return -1;
    std::erase_if(left, [](const Session* session) { return session->done(); });
  }
  int64_t differ = 0;
  for (int64_t i = 0; i < kSessions; ++i) {
    Session alone(alone_model->description(), static_cast<uint32_t>(i), 0, 1);
    while (!alone.done()) {
      Step(alone_model.get(), {&alone}, {alone.Cut(nullptr)});
      if (testing::Test::HasFatalFailure()) return -1;
    }
    if (!sessions[i].HasTheBitsOf(alone)) ++differ;
  }
  return differ;
}

class EngineDeterministicTest : public testing::TestWithParam<std::tuple<std::string, Mode>> {
 protected:
  void SetUp() override { SKIP_WITHOUT_DEVICE(mode()); }
  const std::string& name() const { return std::get<0>(GetParam()); }
  const Mode& mode() const { return std::get<1>(GetParam()); }
};

TEST_P(EngineDeterministicTest, AmidOthersASessionGetsTheBitsThatItGetsAlone) {
  for (const OneTokenSteps steps :
       {OneTokenSteps::kGraphs, OneTokenSteps::kPadded, OneTokenSteps::kUnpadded}) {
    EXPECT_EQ(SessionsThatDiffer(name(), mode(), true, steps), 0) << static_cast<int>(steps);
  }
}

// What the test above would see.
TEST_P(EngineDeterministicTest, OtherwiseTheyMayDiffer) {
  const int64_t differ = SessionsThatDiffer(name(), mode(), false, OneTokenSteps::kUnpadded);
  EXPECT_GE(differ, 0);
  RecordProperty("sessions_that_differ", absl::StrCat(differ));
  if (differ == 0) GTEST_SKIP() << "not with this device's library";
}

INSTANTIATE_TEST_SUITE_P(
    Models, EngineDeterministicTest,
    testing::Combine(testing::Values("transformer_deltanet", "transformer_deltanet_causal",
                                     "transformer_block", "deltanet_model", "deltanet_model_causal",
                                     "fla_default", "fla_head128", "fla_fused_mlp", "fla_tied"),
                     testing::ValuesIn(Modes())),
    [](const auto& info) {
      return absl::StrCat(std::get<0>(info.param), "_", std::get<1>(info.param).name);
    });

}  // namespace
}  // namespace deltanet
