// 200 sessions at once, on calls and streams that are cut, cancelled, late and disconnected at random: every
// answer is the one that the session would have got alone, and in the end nothing is left held.
#ifndef DELTANET_TESTS_E2E_CONCURRENCY_H_
#define DELTANET_TESTS_E2E_CONCURRENCY_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"
#include "tests/e2e/test_server.h"

namespace deltanet {

inline constexpr int kThreads = 20;
inline constexpr int kSessionsPerThread = 10;
inline constexpr int64_t kMaxTokens = 1000;

// What a model makes of a sequence that it has for itself.
class SoloRun {
 public:
  virtual ~SoloRun() = default;
  // All outputs, [T, output_width] for `input` of [T, width]. Thread-safe.
  virtual std::vector<float> Outputs(const std::vector<float>& input) = 0;

  int64_t width = 0, output_width = 0, lookahead = 0;
  double tolerance = 0;  // Of an output among others, as a part of the largest.
};

// One sequence, and how far its client knows it to be.
struct Sequence {
  std::vector<float> input;
  std::vector<float> expected;
  int64_t tokens = 0;
  int64_t output_width = 0;
  int64_t lookahead = 0;
  double error = 0;      // That its outputs may have.
  int64_t position = 0;  // The next token to send.
  bool done = false;

  Sequence(SoloRun* solo, uint32_t seed, int64_t tokens)
      : input(RandomValues(seed, tokens, solo->width)),
        expected(solo->Outputs(input)),
        tokens(tokens),
        output_width(solo->output_width),
        lookahead(solo->lookahead) {
    for (const float value : expected) error = std::max(error, solo->tolerance * std::fabs(value));
  }

  // An answer to the tokens [begin, end): its output is where it has to be and what it has to be.
  void Check(const Tensor& output, int64_t output_position, int64_t begin, int64_t end) const {
    const int64_t first = std::max<int64_t>(0, begin - lookahead);
    const int64_t last = end == tokens ? tokens : std::max<int64_t>(0, end - lookahead);
    ASSERT_EQ(output_position, first);
    const std::vector<float> got = Floats(output);
    ASSERT_EQ(static_cast<int64_t>(got.size()), (last - first) * output_width);
    for (size_t i = 0; i < got.size(); ++i) {
      ASSERT_LE(std::fabs(got[i] - expected[first * output_width + static_cast<int64_t>(i)]), error)
          << "output " << first * output_width + static_cast<int64_t>(i);
    }
  }
};

class Worker {
 public:
  Worker(const TestServer& server, SoloRun* solo, int number)
      : solo_(solo), client_(server.Connect()), number_(number), random_(number) {
    EXPECT_TRUE(client_.ListModels().ok());  // Connected, before deadlines count.
  }

  void Run() {
    RunStateless();
    RunStream();
    RunNamed();
  }

 private:
  int64_t Random(int64_t least, int64_t most) {
    return std::uniform_int_distribution<int64_t>(least, most)(random_);
  }
  bool Chance(double probability) { return std::bernoulli_distribution(probability)(random_); }
  Sequence NewSequence() {
    return Sequence(solo_, static_cast<uint32_t>(random_()), Random(1, kMaxTokens));
  }

  void RunStateless() {
    for (int i = 0; i < 5; ++i) {
      const Sequence sequence = NewSequence();
      ForwardOptions options;
      if (Chance(0.3)) options.timeout = absl::Microseconds(Random(1, 3000));
      const auto result = client_.Forward(AllTokens(sequence.input, solo_->width), options);
      if (result.ok()) {
        sequence.Check(result->output, result->output_position, 0, sequence.tokens);
      } else {
        EXPECT_EQ(result.status().code(), absl::StatusCode::kDeadlineExceeded) << result.status();
      }
    }
  }

  // Sessions of the stream's own, pipelined; messages that are bad or late are sent again; now and then the
  // connection is lost, and with it the sessions.
  void RunStream() {
    std::vector<Sequence> sequences;
    for (int s = 0; s < kSessionsPerThread; ++s) sequences.push_back(NewSequence());
    const auto finished = [&] {
      return std::all_of(sequences.begin(), sequences.end(), [](const Sequence& s) { return s.done; });
    };
    while (!finished()) {
      const auto stream = client_.OpenStream({});
      std::vector<bool> out_of_step(sequences.size());
      for (Sequence& sequence : sequences) {
        if (!sequence.done) sequence.position = 0;  // The sessions of the stream before have gone with it.
      }
      int rounds_left = Chance(0.3) ? static_cast<int>(Random(1, 6)) : 1000000;
      while (!finished() && rounds_left-- > 0) {
        ASSERT_NO_FATAL_FAILURE(Round(stream.get(), &sequences, &out_of_step));
      }
      if (finished()) {
        EXPECT_TRUE(stream->Finish().ok());
      } else {
        stream->Cancel();
      }
    }
  }

  struct Sent {
    uint32_t session;
    int64_t begin;
    int64_t end;
  };

  // Sends a few messages, reads their answers.
  void Round(ForwardStream* stream, std::vector<Sequence>* sequences, std::vector<bool>* out_of_step) {
    std::vector<std::vector<Sent>> sent(sequences->size());
    int count = 0;
    for (uint32_t s = 0; s < sequences->size(); ++s) {
      Sequence& sequence = (*sequences)[s];
      int64_t position = sequence.position;
      for (int64_t i = Random(0, 3); i > 0 && !sequence.done && position < sequence.tokens; --i) {
        const int64_t end = std::min(sequence.tokens, position + Random(1, 80));
        StreamRequest request;
        request.stream_session = s;
        request.input = Tokens(sequence.input, position, end, solo_->width);
        request.end_of_sequence = end == sequence.tokens;
        if ((*out_of_step)[s]) request.expected_position = position;
        (*out_of_step)[s] = false;
        if (Chance(0.05)) request.input.shape = {1, solo_->width - 1};
        if (Chance(0.1)) request.timeout = absl::Microseconds(Random(1, 500));
        ASSERT_TRUE(stream->Write(request));
        sent[s].push_back({s, position, end});
        position = end;
        ++count;
      }
    }
    std::vector<size_t> answered(sequences->size());
    for (; count > 0; --count) {
      StreamResponse response;
      ASSERT_TRUE(stream->Read(&response));
      const uint32_t s = response.stream_session;
      Sequence& sequence = (*sequences)[s];
      const Sent& message = sent[s][answered[s]++];
      if (response.status.ok()) {
        ASSERT_EQ(message.begin, sequence.position) << "applied behind a lost message";
        sequence.Check(response.output, response.output_position, message.begin, message.end);
        ASSERT_EQ(response.committed_position, message.end);
        sequence.position = message.end;
        sequence.done = message.end == sequence.tokens;
      } else {
        const std::string reason = ErrorReason(response.status);
        ASSERT_TRUE(reason == reason::kInvalidRequest || reason == reason::kDeadline ||
                    reason == reason::kSessionOutOfStep || reason == reason::kPositionMismatch)
            << response.status;
        ASSERT_EQ(response.committed_position, sequence.position);
        (*out_of_step)[s] = true;
      }
    }
  }

  // Sessions with names, moved between unary calls and streams that come and go.
  void RunNamed() {
    std::vector<Sequence> sequences;
    for (int s = 0; s < kSessionsPerThread; ++s) sequences.push_back(NewSequence());
    for (size_t s = 0; s < sequences.size(); ++s) {
      Sequence& sequence = sequences[s];
      const std::string id = absl::StrCat("t", number_, "-", s);
      bool created = false;
      while (!sequence.done) {
        const int64_t end = std::min(sequence.tokens, sequence.position + Random(1, 80));
        const TensorView input = Tokens(sequence.input, sequence.position, end, solo_->width);
        const bool last = end == sequence.tokens;
        const SessionChoice session{id, !created};
        std::optional<int64_t> expected;
        if (created) expected = sequence.position;
        absl::Status status;
        if (Chance(0.5)) {
          ForwardOptions options{.session = session, .end_of_sequence = last, .expected_position = expected};
          if (created && Chance(0.2)) options.timeout = absl::Microseconds(Random(1, 1000));
          const auto result = client_.Forward(input, options);
          status = result.status();
          if (result.ok()) sequence.Check(result->output, result->output_position, sequence.position, end);
        } else {
          const auto stream = client_.OpenStream({});
          StreamResponse response;
          EXPECT_TRUE(stream->Write(
              {.session = session, .input = input, .end_of_sequence = last, .expected_position = expected}));
          if (created && Chance(0.2)) {
            stream->Cancel();
            status = absl::CancelledError();
          } else {
            ASSERT_TRUE(stream->Read(&response));
            status = response.status;
            if (status.ok())
              sequence.Check(response.output, response.output_position, sequence.position, end);
            EXPECT_TRUE(stream->Finish().ok());
          }
        }
        created = true;
        if (status.ok()) {
          sequence.position = end;
          sequence.done = last;
        } else {
          // What was given up may have been applied or not: ask where the session stands.
          ASSERT_NO_FATAL_FAILURE(FindPosition(id, &sequence));
        }
      }
    }
  }

  void FindPosition(const std::string& id, Sequence* sequence) {
    while (true) {
      // A position that no session has: the answer says the right one, and nothing is applied.
      const auto probe = client_.Forward(Tokens(sequence->input, 0, 1, solo_->width),
                                         {.session = SessionChoice{id}, .expected_position = kMaxTokens + 1});
      const std::string reason = ErrorReason(probe.status());
      if (reason == reason::kSessionAttached)
        continue;  // The server has not yet heard that the stream is gone.
      if (reason == reason::kSessionEnded) {
        sequence->done = true;
        return;
      }
      ASSERT_EQ(reason, reason::kPositionMismatch) << probe.status();
      ASSERT_TRUE(absl::SimpleAtoi(ErrorMetadata(probe.status(), "committed_position"), &sequence->position));
      return;
    }
  }

  SoloRun* const solo_;
  const Client client_;
  const int number_;
  std::mt19937 random_;
};

// Runs the workers against the server and holds it to what it has to be afterwards: nothing held.
inline void RunConcurrently(TestServer* server, SoloRun* solo, int64_t num_slots) {
  std::vector<std::unique_ptr<Worker>> workers;
  for (int t = 0; t < kThreads; ++t) workers.push_back(std::make_unique<Worker>(*server, solo, t));
  std::vector<std::thread> threads;
  for (const std::unique_ptr<Worker>& worker : workers) {
    threads.emplace_back([&worker] { worker->Run(); });
  }
  for (std::thread& thread : threads) thread.join();
  // Streams that were cancelled at the very end are gone as soon as the server hears of it.
  while (server->Metric("deltanet_sessions{model=\"m\"}") > 0) continue;
  EXPECT_TRUE(server->server().Shutdown(absl::Minutes(1)));
  EXPECT_EQ(server->Metric("deltanet_slots_free{model=\"m\"}"), num_slots);
  EXPECT_EQ(server->Metric("deltanet_queued_works"), 0);
  EXPECT_EQ(server->Metric("deltanet_queued_tokens"), 0);
  EXPECT_EQ(server->Metric("deltanet_errors_total{reason=\"INTERNAL\"}"), 0);
  // It was not all too easy.
  for (const char* reason : {reason::kInvalidRequest, reason::kDeadline, reason::kSessionOutOfStep}) {
    EXPECT_GT(server->Metric(absl::StrCat("deltanet_errors_total{reason=\"", reason, "\"}")), 0) << reason;
  }
}

}  // namespace deltanet

#endif  // DELTANET_TESTS_E2E_CONCURRENCY_H_
