#include "client/sequences.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>

namespace deltanet {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

Tensor FloatTensor(const Shape& shape, const std::vector<float>& values) {
  return {DType::kFloat32, shape,
          std::string(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(float))};
}

Tensor CountingTensor(const Shape& shape) {
  std::vector<float> values(NumElements(shape));
  std::iota(values.begin(), values.end(), 0.0f);
  return FloatTensor(shape, values);
}

std::vector<float> Values(const TensorView& tensor) {
  std::vector<float> values(NumElements(tensor.shape));
  std::memcpy(values.data(), tensor.data, values.size() * sizeof(float));
  return values;
}

TEST(SequencesTest, UnderstandsEveryRank) {
  const Tensor batch = CountingTensor({2, 3, 2}), single = CountingTensor({3, 2});
  const Tensor ids{DType::kInt64, {4}, std::string(32, '\0')},
      id_batch{DType::kInt64, {2, 2}, std::string(32, '\0')};
  struct Case {
    const Tensor& tensor;
    bool batched;
    int64_t count, tokens;
  };
  for (const Case& c : {Case{batch, true, 2, 3}, Case{single, false, 1, 3}, Case{ids, false, 1, 4},
                        Case{id_batch, true, 2, 2}}) {
    const absl::StatusOr<Sequences> sequences = Sequences::Of(c.tensor.view());
    ASSERT_TRUE(sequences.ok());
    EXPECT_EQ(sequences->batched(), c.batched);
    EXPECT_EQ(sequences->count(), c.count);
    EXPECT_EQ(sequences->tokens(), c.tokens);
  }
}

TEST(SequencesTest, RefusesOtherRanks) {
  const Tensor flat = CountingTensor({3}), deep = CountingTensor({1, 1, 1, 1});
  const Tensor ids{DType::kInt64, {1, 1, 1}, std::string(8, '\0')};
  for (const Tensor* tensor : {&flat, &deep, &ids}) {
    EXPECT_EQ(Sequences::Of(tensor->view()).status().code(), absl::StatusCode::kInvalidArgument);
  }
}

TEST(SequencesTest, SlicesAlongTime) {
  const Tensor tensor = CountingTensor({2, 3, 2});
  const Sequences sequences = *Sequences::Of(tensor.view());
  const TensorView slice = sequences.Slice(1, 1, 2);
  EXPECT_EQ(slice.shape, (Shape{2, 2}));
  EXPECT_THAT(Values(slice), ElementsAre(8, 9, 10, 11));
  EXPECT_EQ(sequences.Slice(0, 3, 0).shape, (Shape{0, 2}));
}

TEST(CutChunksTest, UsesLengthsRoundAndRound) {
  const std::vector<Chunk> chunks = CutChunks(12, {1, 4});
  std::vector<int64_t> lengths;
  int64_t end = 0;
  for (const Chunk& chunk : chunks) {
    EXPECT_EQ(chunk.begin, end);
    end += chunk.length;
    lengths.push_back(chunk.length);
  }
  EXPECT_THAT(lengths, ElementsAre(1, 4, 1, 4, 1, 1));
}

TEST(CutChunksTest, Boundaries) {
  EXPECT_EQ(CutChunks(8, {8}).size(), 1u);
  EXPECT_EQ(CutChunks(8, {9}).size(), 1u);
  EXPECT_EQ(CutChunks(8, {7}).size(), 2u);
  ASSERT_EQ(CutChunks(0, {4}).size(), 1u);
  EXPECT_EQ(CutChunks(0, {4})[0].length, 0);
}

// Any cut, joined again, is what was cut, with the sequences' chunks in any order among each other.
TEST(OutputJoinerTest, JoinsWhatWasCut) {
  std::mt19937 random(7);
  for (int round = 0; round < 50; ++round) {
    const int64_t count = 1 + random() % 4, tokens = random() % 40;
    const Tensor tensor = CountingTensor({count, tokens, 3});
    const Sequences sequences = *Sequences::Of(tensor.view());
    const std::vector<Chunk> chunks =
        CutChunks(tokens, {1 + static_cast<int64_t>(random() % 7), 1 + static_cast<int64_t>(random() % 7)});
    OutputJoiner joiner(count, true);
    std::vector<size_t> next(count, 0);
    for (size_t left = count * chunks.size(); left > 0;) {
      const size_t sequence = random() % count;
      if (next[sequence] == chunks.size()) continue;
      const Chunk& chunk = chunks[next[sequence]++];
      --left;
      const TensorView slice = sequences.Slice(sequence, chunk.begin, chunk.length);
      const Tensor part{slice.dtype, slice.shape,
                        std::string(static_cast<const char*>(slice.data), slice.bytes())};
      ASSERT_TRUE(joiner.Add(sequence, 100 + chunk.begin, part).ok());
    }
    const absl::StatusOr<Tensor> joined = joiner.Join();
    ASSERT_TRUE(joined.ok()) << joined.status();
    EXPECT_EQ(joined->shape, tensor.shape);
    EXPECT_EQ(joined->data, tensor.data);
  }
}

TEST(OutputJoinerTest, OneSequenceHasNoBatchDimension) {
  OutputJoiner joiner(1, false);
  ASSERT_TRUE(joiner.Add(0, 0, CountingTensor({0, 2})).ok());
  ASSERT_TRUE(joiner.Add(0, 0, CountingTensor({2, 2})).ok());
  EXPECT_EQ(joiner.Join()->shape, (Shape{2, 2}));
}

TEST(OutputJoinerTest, RefusesWhatDoesNotFit) {
  OutputJoiner joiner(2, true);
  EXPECT_EQ(joiner.Join().status().code(), absl::StatusCode::kFailedPrecondition);
  ASSERT_TRUE(joiner.Add(0, 5, CountingTensor({2, 2})).ok());
  const absl::Status gap = joiner.Add(0, 8, CountingTensor({1, 2}));
  EXPECT_EQ(gap.code(), absl::StatusCode::kDataLoss);
  EXPECT_THAT(std::string(gap.message()), HasSubstr("position 8, want 7"));
  EXPECT_EQ(joiner.Add(0, 7, CountingTensor({1, 3})).code(), absl::StatusCode::kDataLoss);
  EXPECT_EQ(joiner.Add(0, 7, CountingTensor({2})).code(), absl::StatusCode::kDataLoss);
  EXPECT_EQ(joiner.Add(0, 7, {DType::kFloat16, {1, 2}, std::string(4, 'x')}).code(),
            absl::StatusCode::kDataLoss);
  EXPECT_EQ(joiner.Join().status().code(), absl::StatusCode::kDataLoss);  // Sequence 1 has nothing.
  ASSERT_TRUE(joiner.Add(1, 0, CountingTensor({2, 2})).ok());
  EXPECT_TRUE(joiner.Join().ok());
}

TEST(TensorFileTest, RoundTrips) {
  const std::string path = testing::TempDir() + "/sequences_test_round_trip.safetensors";
  const Tensor tensor = CountingTensor({2, 3, 2});
  ASSERT_TRUE(WriteTensor(path, "output", tensor).ok());
  const absl::StatusOr<Tensor> back = ReadTensor(path, "output");
  ASSERT_TRUE(back.ok()) << back.status();
  EXPECT_EQ(back->dtype, tensor.dtype);
  EXPECT_EQ(back->shape, tensor.shape);
  EXPECT_EQ(back->data, tensor.data);
  EXPECT_EQ(ReadTensor(path, "input").status().code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(ReadTensor(path + ".not", "output").status().code(), absl::StatusCode::kNotFound);
}

TEST(CompareTest, RelativeToTheLargestMagnitude) {
  const absl::StatusOr<Difference> difference =
      Compare(FloatTensor({3}, {1, -8, 2}), FloatTensor({3}, {1.5, -8, 2}));
  ASSERT_TRUE(difference.ok());
  EXPECT_EQ(difference->largest, 0.5);
  EXPECT_EQ(difference->magnitude, 8);
  EXPECT_EQ(difference->relative(), 0.0625);
}

TEST(CompareTest, AcrossDTypes) {
  const Tensor half{DType::kFloat16, {1}, std::string("\x00\x3c", 2)};  // 1.0
  EXPECT_EQ(Compare(half, FloatTensor({1}, {1}))->relative(), 0);
}

TEST(CompareTest, WhatIsNotANumberNeverAgrees) {
  const float nan = std::numeric_limits<float>::quiet_NaN(),
              infinity = std::numeric_limits<float>::infinity();
  EXPECT_TRUE(std::isinf(Compare(FloatTensor({2}, {nan, 1}), FloatTensor({2}, {nan, 1}))->relative()));
  EXPECT_TRUE(std::isinf(Compare(FloatTensor({2}, {nan, 1}), FloatTensor({2}, {1, 1}))->relative()));
  EXPECT_TRUE(
      std::isinf(Compare(FloatTensor({2}, {infinity, 1}), FloatTensor({2}, {-infinity, 1}))->relative()));
  EXPECT_EQ(Compare(FloatTensor({2}, {0, 0}), FloatTensor({2}, {0, 0}))->relative(), 0);
}

TEST(CompareTest, RefusesWhatCannotBeCompared) {
  const Tensor ids{DType::kInt64, {1}, std::string(8, '\0')};
  EXPECT_EQ(Compare(ids, ids).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(Compare(CountingTensor({2, 1}), CountingTensor({1, 2})).status().code(),
            absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace deltanet
