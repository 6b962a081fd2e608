#include "model/ops/readout.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <set>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "model/ops/philox.h"
#include "tests/model/ops/op_test_util.h"
#include "tests/model/ops/readout_problem.h"

namespace deltanet {
namespace {

TEST(PhiloxTest, KnownAnswers) {
  // Random123's kat_vectors.
  struct Known {
    PhiloxBlock counter;
    uint32_t key[2];
    PhiloxBlock out;
  };
  const Known known[] = {
      {{{0, 0, 0, 0}}, {0, 0}, {{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}}},
      {{{~0u, ~0u, ~0u, ~0u}}, {~0u, ~0u}, {{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}}},
      {{{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}},
       {0xa4093822, 0x299f31d0},
       {{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}}},
  };
  for (const Known& each : known) {
    const PhiloxBlock out = Philox4x32(each.counter, each.key[0], each.key[1]);
    for (int word = 0; word < 4; ++word) EXPECT_EQ(out.words[word], each.out.words[word]);
  }
}

TEST(PhiloxTest, TheUniformNumberIsTheFirstWordOfItsPosition) {
  EXPECT_EQ(ReadoutUniform(0, 0), 0x6627e8d5 * 0x1p-32);
  const PhiloxBlock block = Philox4x32({{0x89abcdef, 0x01234567, 0, 0}}, 0x76543210, 0xfedcba98);
  EXPECT_EQ(ReadoutUniform(0xfedcba9876543210, 0x0123456789abcdef), block.words[0] * 0x1p-32);
}

TEST(PhiloxTest, UniformNumbersAreUniformAndIndependentOfTheirNeighbours) {
  // Pairs of successive positions, and of successive seeds, over a grid of 16 x 16: 255 degrees of freedom,
  // of which chi-square exceeds 376 once in a million.
  constexpr int kGrid = 16, kPairs = 200000;
  for (const bool seeds : {false, true}) {
    std::vector<double> seen(kGrid * kGrid);
    for (int64_t i = 0; i < kPairs; ++i) {
      const double a = seeds ? ReadoutUniform(2 * i, 3) : ReadoutUniform(3, 2 * i);
      const double b = seeds ? ReadoutUniform(2 * i + 1, 3) : ReadoutUniform(3, 2 * i + 1);
      ASSERT_TRUE(a >= 0 && a < 1 && b >= 0 && b < 1);
      ++seen[static_cast<int>(a * kGrid) * kGrid + static_cast<int>(b * kGrid)];
    }
    double chi_square = 0;
    for (const double count : seen) {
      const double expected = 1.0 * kPairs / seen.size();
      chi_square += (count - expected) * (count - expected) / expected;
    }
    EXPECT_LT(chi_square, 376) << (seeds ? "seeds" : "positions");
  }
}

class ReadoutTest : public IsaTest {
 protected:
  static void Run(ReadoutProblem* problem, const OpContext& context) {
    const absl::Status status = Readout(problem->Args(), context);
    ASSERT_TRUE(status.ok()) << status;
  }

  // The ids that `draws` positions of one seed give.
  static std::vector<int32_t> Draw(const std::vector<float>& logits, ReadoutRequest request, int64_t draws) {
    std::vector<int32_t> ids;
    for (int64_t drawn = 0; drawn < draws;) {
      ReadoutProblem problem(static_cast<int64_t>(logits.size()));
      for (; problem.rows() < 10000 && drawn < draws; ++drawn) {
        request.counter = drawn;
        problem.Add(logits, request);
      }
      Run(&problem, SerialContext());
      for (int64_t m = 0; m < problem.rows(); ++m) ids.push_back(problem.id(m));
    }
    return ids;
  }
};

TEST_P(ReadoutTest, MatchesTheDefinition) {
  for (const int64_t W : {1, 2, 3, 5, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 127, 1000, 1023, 1025, 2500}) {
    for (const LogitKind kind : kLogitKinds) {
      SCOPED_TRACE("kind " + std::to_string(static_cast<int>(kind)));
      ReadoutProblem problem = EveryRequest(W, W % 2 == 0 ? 0 : 13, kind);
      Run(&problem, ThreadedContext());
      problem.Compare();
    }
  }
}

TEST_P(ReadoutTest, MatchesTheDefinitionOverARealVocabulary) {
  for (const LogitKind kind : {LogitKind::kNormal, LogitKind::kTies}) {
    SCOPED_TRACE("kind " + std::to_string(static_cast<int>(kind)));
    ReadoutProblem problem(32007, 4000);
    for (int32_t m = 0; m < 12; ++m) {
      problem.Add(Logits(kind, 32007, m), {.target = m % 4 == 0 ? 31999 + m / 2 : -1,
                                           .top = m % 3 == 0 ? 20 : 0,
                                           .sample = 1,
                                           .sampled_slot = m,
                                           .temperature = m % 2 == 0 ? 0.8f : 1.0f,
                                           .top_k = m % 6 == 1   ? 50
                                                    : m % 6 == 2 ? 20000
                                                                 : 0,
                                           .top_p = m % 5 < 2 ? 0.9f : 1.0f,
                                           .seed = 11,
                                           .counter = m});
    }
    Run(&problem, ThreadedContext());
    problem.Compare();
  }
}

// In a flat row the id is u itself, so that all of the stream, its order and the order of ids show.
TEST_P(ReadoutTest, AFlatRowGivesTheUniformNumber) {
  constexpr int64_t kIds = 1000;
  const ReadoutRequest request{.sample = 1, .temperature = 1.3f, .seed = 77};
  const std::vector<int32_t> ids = Draw(std::vector<float>(kIds, 4.5f), request, 3000);
  for (int64_t i = 0; i < static_cast<int64_t>(ids.size()); ++i) {
    EXPECT_EQ(ids[i], static_cast<int32_t>(std::floor(kIds * ReadoutUniform(77, i)))) << i;
  }
}

TEST_P(ReadoutTest, AtABoundaryTheUpperIdIsSampled) {
  std::vector<int32_t> ids;
  ReadoutProblem problem = BoundaryRows(&ids);
  Run(&problem, SerialContext());
  for (int64_t m = 0; m < problem.rows(); ++m) EXPECT_EQ(problem.id(m), ids[m]);
}

TEST_P(ReadoutTest, FrequenciesAreTheProbabilities) {
  constexpr int64_t kIds = 50, kDraws = 100000;
  const std::vector<float> logits = RandomNormal(kIds, 21);
  const ExactRow exact(logits.data(), kIds);
  const ReadoutRequest requests[] = {
      {.temperature = 0.7f},
      {.temperature = 1.0f},
      {.temperature = 1.5f},
      {.temperature = 1.0f, .top_k = 10},
      {.temperature = 1.0f, .top_p = 0.8f},
      {.temperature = 1.3f, .top_k = 20, .top_p = 0.9f},
  };
  for (ReadoutRequest request : requests) {
    SCOPED_TRACE("temperature " + std::to_string(request.temperature) + " top_k " +
                 std::to_string(request.top_k) + " top_p " + std::to_string(request.top_p));
    request.sample = 1;
    request.seed = 5;
    std::vector<double> seen(kIds);
    for (const int32_t id : Draw(logits, request, kDraws)) ++seen[id];
    const std::vector<double> p = exact.Sampled(request);
    double chi_square = 0, cells = 0;
    for (int64_t i = 0; i < kIds; ++i) {
      const double expected = kDraws * p[i];
      if (expected == 0) {
        EXPECT_EQ(seen[i], 0) << i;
        continue;
      }
      ASSERT_GT(expected, 5);
      chi_square += (seen[i] - expected) * (seen[i] - expected) / expected;
      ++cells;
    }
    // Exceeded once in a million (Wilson and Hilferty's approximation).
    const double freedom = cells - 1, part = 2 / (9 * freedom);
    EXPECT_LT(chi_square, freedom * std::pow(1 - part + 4.75 * std::sqrt(part), 3));
  }
}

// Draws from rows whose probabilities are known by construction find every id that may be sampled, no other.
TEST_P(ReadoutTest, WhatIsKeptIsExactlyWhatItShouldBe) {
  std::vector<float> logits;
  for (const double p : {0.05, 0.3, 0.1, 0.15, 0.15, 0.15, 0.1}) {
    logits.push_back(static_cast<float>(std::log(p)) + 3.0f);
  }
  struct Case {
    int32_t top_k;
    float top_p;
    std::set<int32_t> kept;
  };
  const Case cases[] = {
      {0, 1.0f, {0, 1, 2, 3, 4, 5, 6}},
      {1, 1.0f, {1}},
      {2, 1.0f, {1, 3}},  // 3, 4 and 5 are equal: lower ids first.
      {3, 1.0f, {1, 3, 4}},
      {4, 1.0f, {1, 3, 4, 5}},
      {5, 1.0f, {1, 2, 3, 4, 5}},
      {6, 1.0f, {1, 2, 3, 4, 5, 6}},
      {7, 1.0f, {0, 1, 2, 3, 4, 5, 6}},
      {100, 1.0f, {0, 1, 2, 3, 4, 5, 6}},
      {0, 1e-6f, {1}},
      {0, 0.29f, {1}},
      {0, 0.31f, {1, 3}},
      {0, 0.44f, {1, 3}},
      {0, 0.46f, {1, 3, 4}},
      {0, 0.61f, {1, 3, 4, 5}},
      {0, 0.76f, {1, 2, 3, 4, 5}},
      {0, 0.94f, {1, 2, 3, 4, 5, 6}},
      {0, 0.96f, {0, 1, 2, 3, 4, 5, 6}},
      // Of the four most likely, renormalized: 0.4, 0.2, 0.2, 0.2.
      {4, 0.39f, {1}},
      {4, 0.41f, {1, 3}},
      {4, 0.61f, {1, 3, 4}},
      {4, 0.81f, {1, 3, 4, 5}},
  };
  for (const Case& each : cases) {
    SCOPED_TRACE("top_k " + std::to_string(each.top_k) + " top_p " + std::to_string(each.top_p));
    const std::vector<int32_t> ids =
        Draw(logits, {.sample = 1, .temperature = 1.0f, .top_k = each.top_k, .top_p = each.top_p, .seed = 3},
             2000);
    EXPECT_EQ(std::set<int32_t>(ids.begin(), ids.end()), each.kept);
  }
}

TEST_P(ReadoutTest, LimitsOfSamplingAreGreedy) {
  for (const LogitKind kind : kLogitKinds) {
    SCOPED_TRACE("kind " + std::to_string(static_cast<int>(kind)));
    const std::vector<float> logits = Logits(kind, 321, 8);
    const int32_t greedy = ExactRow(logits.data(), 321).order()[0];
    for (const ReadoutRequest& request : {ReadoutRequest{.sample = 1},
                                          {.sample = 1, .temperature = 0.0f, .top_k = 9, .top_p = 0.9f},
                                          {.sample = 1, .temperature = 100.0f, .top_k = 1},
                                          {.sample = 1, .temperature = 100.0f, .top_p = 1e-9f},
                                          {.sample = 1, .temperature = 2.0f, .top_k = 40, .top_p = 1e-9f}}) {
      for (const int32_t id : Draw(logits, request, 20)) EXPECT_EQ(id, greedy);
    }
  }
}

TEST_P(ReadoutTest, ARowDependsNeitherOnItsNeighboursNorOnItsPlace) {
  constexpr int64_t kIds = 1500, kRows = 40;
  const auto add = [](ReadoutProblem* problem, int64_t which) {
    AddOfAllKinds(which, kIds, 10, problem);
  };
  ReadoutProblem together(kIds), reversed(kIds, 5);
  for (int64_t m = 0; m < kRows; ++m) {
    add(&together, m);
    add(&reversed, kRows - 1 - m);
  }
  Run(&together, SerialContext());
  Run(&reversed, ThreadedContext());
  for (int64_t m = 0; m < kRows; ++m) {
    ReadoutProblem alone(kIds);
    add(&alone, m);
    Run(&alone, SerialContext());
    EXPECT_EQ(alone.Results(0), together.Results(m)) << m;
    EXPECT_EQ(reversed.Results(kRows - 1 - m), together.Results(m)) << m;
  }
}

TEST_P(ReadoutTest, RowsThatAreNotFiniteSaySoAndStayInRange) {
  for (const int64_t W : {1, 7, 64, 300, 1025}) {
    ReadoutProblem problem = NonFiniteRows(W);
    Run(&problem, ThreadedContext());
    problem.Compare();
  }
}

INSTANTIATE_TEST_SUITE_P(Isa, ReadoutTest, EveryIsa(), [](const auto& info) { return IsaName(info.param); });

TEST(ReadoutContractTest, RefusesWhatItCannotDo) {
  ReadoutProblem problem(4);
  problem.Add({1, 2, 3, 4}, {.target = 2});
  const ReadoutArgs good = problem.Args();
  const auto code = [](const ReadoutArgs& args, const OpContext& context = SerialContext()) {
    return Readout(args, context).code();
  };
  EXPECT_EQ(code(good), absl::StatusCode::kOk);
  ReadoutArgs bad = good;
  bad.rows = -1;
  EXPECT_EQ(code(bad), absl::StatusCode::kInvalidArgument);
  bad = good;
  bad.vocabulary = 0;
  EXPECT_EQ(code(bad), absl::StatusCode::kInvalidArgument);
  bad.vocabulary = bad.logits_stride = kMaxReadoutVocabulary + 1;
  EXPECT_EQ(code(bad), absl::StatusCode::kInvalidArgument);
  bad = good;
  bad.logits_stride = 3;
  EXPECT_EQ(code(bad), absl::StatusCode::kInvalidArgument);
#ifndef DELTANET_CUDA
  EXPECT_EQ(code(good, CudaContext()), absl::StatusCode::kFailedPrecondition);
#endif
  EXPECT_EQ(code({.rows = 0, .vocabulary = 4, .logits_stride = 4}), absl::StatusCode::kOk);
}

}  // namespace
}  // namespace deltanet
