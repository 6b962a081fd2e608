#include "model/ops/delta_rule_plan.h"

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <set>
#include <tuple>
#include <vector>

#include "gtest/gtest.h"

namespace deltanet {
namespace {

std::vector<int32_t> Offsets(const std::vector<int32_t>& lengths) {
  std::vector<int32_t> offsets(lengths.size() + 1, 0);
  std::partial_sum(lengths.begin(), lengths.end(), offsets.begin() + 1);
  return offsets;
}

struct Planned {
  ChunkPlan plan;
  std::vector<std::vector<int32_t>> shares;  // Of each block, in order.
};

Planned Plan(const std::vector<int32_t>& lengths, int64_t heads, int64_t columns, int64_t blocks) {
  std::vector<int32_t> memory(MaxChunkPlanSize(static_cast<int64_t>(lengths.size()), heads, columns, blocks),
                              -1);
  Planned planned{.plan = PlanChunks(Offsets(lengths), heads, columns, blocks, memory.data()), .shares = {}};
  EXPECT_LE(planned.plan.size(), static_cast<int64_t>(memory.size()));
  const int32_t* const pieces = memory.data() + planned.plan.blocks + 1;
  for (int32_t b = 0; b < planned.plan.blocks; ++b) {
    planned.shares.emplace_back(pieces + memory[b], pieces + memory[b + 1]);
  }
  return planned;
}

int64_t Chunks(int64_t tokens) { return (tokens + 63) / 64; }

const std::vector<int32_t> kRagged = {1,  3,   17,   40,   64, 65, 100, 128, 130, 200, 256, 300, 31,  77, 513, 700,
                                      1024, 1500, 90, 45, 12, 333, 222, 111, 64, 64, 800, 950, 60, 5,  9,  999};

TEST(ChunkPlan, HoldsEveryHeadOfEveryLongRowOnce) {
  for (const auto& [lengths, heads, columns, blocks] :
       std::vector<std::tuple<std::vector<int32_t>, int64_t, int64_t, int64_t>>{
           {{17}, 1, 64, 132},
           {{16, 17, 0, 1, 4000}, 3, 128, 132},
           {kRagged, 16, 128, 132},
           {kRagged, 16, 64, 7},
           {{17}, 1, 256, 132},
           {kRagged, 16, 256, 132},
           {std::vector<int32_t>(70, 64), 16, 128, 132}}) {
    const Planned planned = Plan(lengths, heads, columns, blocks);
    std::multiset<int32_t> got;
    for (const std::vector<int32_t>& share : planned.shares) got.insert(share.begin(), share.end());
    std::multiset<int32_t> want;
    for (size_t r = 0; r < lengths.size(); ++r) {
      for (int64_t i = 0; lengths[r] > kDeltaRuleFewTokens && i < heads * planned.plan.parts; ++i) {
        want.insert(static_cast<int32_t>(static_cast<int64_t>(r) * heads * planned.plan.parts + i));
      }
    }
    EXPECT_EQ(got, want);
    EXPECT_LE(planned.plan.blocks, blocks);
  }
}

TEST(ChunkPlan, SplitsColumnsOnlyWhereBlocksWouldBeIdle) {
  EXPECT_EQ(Plan({500, 600, 10, 10, 10, 10, 10}, 16, 128, 132).plan.parts, 2);  // 32 heads of long rows.
  EXPECT_EQ(Plan(std::vector<int32_t>(5, 100), 16, 128, 132).plan.parts, 1);
  EXPECT_EQ(Plan({500}, 16, 64, 132).plan.parts, 1);
  EXPECT_EQ(Plan({500}, 16, 128, 132).plan.blocks, 32);
  EXPECT_EQ(Plan({500}, 16, 64, 132).plan.blocks, 16);
}

TEST(ChunkPlan, QuartersWideHeadsAlways) {
  EXPECT_EQ(Plan({500}, 2, 256, 132).plan.parts, 4);
  EXPECT_EQ(Plan({500}, 2, 256, 132).plan.blocks, 8);
  EXPECT_EQ(Plan(std::vector<int32_t>(100, 100), 16, 256, 132).plan.parts, 4);
}

TEST(ChunkPlan, OfShortRowsIsEmpty) {
  EXPECT_EQ(Plan({16, 0, 1}, 4, 64, 8).plan.blocks, 0);
  EXPECT_EQ(Plan({}, 4, 64, 8).plan.size(), 0);
}

TEST(ChunkPlan, NoBlockHasMuchMoreThanItsShare) {
  const Planned planned = Plan(kRagged, 16, 128, 132);
  int64_t all = 0, most = 0, longest = 0;
  for (const std::vector<int32_t>& share : planned.shares) {
    int64_t chunks = 0, before = INT64_MAX;
    for (const int32_t piece : share) {
      const int64_t of_piece = Chunks(kRagged[piece / 16]);
      EXPECT_LE(of_piece, before) << "a longer piece after a shorter one";
      before = of_piece;
      chunks += of_piece;
      longest = std::max(longest, of_piece);
    }
    all += chunks;
    most = std::max(most, chunks);
  }
  EXPECT_LE(most, std::max(longest, all / 132) + 2);
}

}  // namespace
}  // namespace deltanet
