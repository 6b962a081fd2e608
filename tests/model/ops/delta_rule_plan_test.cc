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

using Shares = std::vector<std::vector<int32_t>>;  // Of each block, in order.

struct Planned {
  ChunkPlan plan;
  Shares shares, first, effects;
  std::vector<ChunkSegment> segments;
  std::vector<SplitRow> split_rows;
};

Planned Plan(const std::vector<int32_t>& lengths, int64_t heads, int64_t columns, int64_t blocks,
             bool splits = false) {
  std::vector<int32_t> memory(MaxChunkPlanSize(static_cast<int64_t>(lengths.size()), heads, columns, blocks),
                              -1);
  Planned planned;
  planned.plan = PlanChunks(Offsets(lengths), heads, columns, blocks, splits, memory.data());
  EXPECT_LE(planned.plan.size, static_cast<int64_t>(memory.size()));
  const auto shares = [&](const ChunkShares& of) {
    Shares got;
    const int32_t* const begins = memory.data() + of.at;
    const int32_t* const pieces = begins + of.blocks + 1;
    for (int32_t b = 0; b < of.blocks; ++b) got.emplace_back(pieces + begins[b], pieces + begins[b + 1]);
    return got;
  };
  planned.shares = shares({.at = 0, .blocks = planned.plan.blocks});
  planned.first = shares(planned.plan.first);
  planned.effects = shares(planned.plan.effects);
  const auto* const split_rows =
      reinterpret_cast<const SplitRow*>(memory.data() + planned.plan.split_rows_at);
  planned.split_rows.assign(split_rows, split_rows + planned.plan.split_rows);
  const auto* const segments =
      reinterpret_cast<const ChunkSegment*>(memory.data() + planned.plan.segments_at);
  planned.segments.assign(
      segments, reinterpret_cast<const ChunkSegment*>(memory.data() +
                                                      std::max(planned.plan.size, planned.plan.segments_at)));
  return planned;
}

int64_t Chunks(int64_t tokens) { return (tokens + 63) / 64; }

const std::vector<int32_t> kRagged = {1,   3,   17, 40,  64,  65,   100,  128, 130, 200, 256,
                                      300, 31,  77, 513, 700, 1024, 1500, 90,  45,  12,  333,
                                      222, 111, 64, 64,  800, 950,  60,   5,   9,   999};

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
  EXPECT_EQ(Plan({}, 4, 64, 8).plan.size, 0);
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

TEST(ChunkPlan, SplitsLongRowsWhereBlocksWouldBeIdle) {
  EXPECT_EQ(Plan({8192}, 16, 128, 132, true).segments.size(), 5);
  EXPECT_EQ(Plan({2048}, 16, 128, 132, true).segments.size(), 5);
  EXPECT_EQ(Plan({8192, 8192}, 16, 128, 132, true).segments.size(), 6);
  EXPECT_EQ(Plan({16384}, 32, 64, 132, true).segments.size(), 5);
  EXPECT_GT(Plan({1024}, 4, 128, 132, true).segments.size(), 4);
  EXPECT_EQ(Plan({32768, 500, 30, 1, 700}, 16, 128, 132, true).plan.split_rows, 1);
}

TEST(ChunkPlan, LeavesRowsWholeWhereASplitWouldNotPay) {
  for (const auto& [lengths, heads, columns] :
       std::vector<std::tuple<std::vector<int32_t>, int64_t, int64_t>>{
           {{512}, 16, 128},
           {{1024, 1024}, 16, 128},
           {{4096, 4096, 4096}, 16, 128},
           {std::vector<int32_t>(8, 2048), 16, 128},
           {std::vector<int32_t>(4, 8192), 16, 128},
           {kRagged, 16, 128},
           {{8192}, 8, 256}}) {
    const Planned may = Plan(lengths, heads, columns, 132, true),
                  must_not = Plan(lengths, heads, columns, 132);
    EXPECT_EQ(may.plan.split_rows, 0);
    EXPECT_EQ(may.shares, must_not.shares);
  }
  EXPECT_EQ(Plan({32768}, 16, 128, 132).plan.split_rows, 0);
}

// Each row's segments, one after another, are the row; all but the last are whole chunks; each begins with
// the state after the one before, which is there by the first pass: first segments and effects, no more than
// a piece a block, in states of their own. They are as long as one another, for what comes of one pass waits
// for the longest.
TEST(ChunkPlan, SegmentsMakeUpTheirRows) {
  for (const auto& [lengths, heads, columns] :
       std::vector<std::tuple<std::vector<int32_t>, int64_t, int64_t>>{
           {{8192}, 16, 128},
           {{32768, 5, 20, 2000, 1999}, 2, 128},
           {{1900, 2000, 2100}, 1, 64},
           {{16384, 30}, 32, 64},
           {{3001, 0, 2500, 100, 17, 900}, 2, 128}}) {
    const Planned planned = Plan(lengths, heads, columns, 132, true);
    ASSERT_GT(planned.plan.split_rows, 0);
    const auto R = static_cast<int32_t>(lengths.size());
    EXPECT_EQ(planned.plan.rows, R);
    const auto per_row = static_cast<int32_t>(heads * planned.plan.parts);
    const auto units = [&](const Shares& shares, bool one_each) {
      std::multiset<int32_t> got;
      for (const std::vector<int32_t>& share : shares) {
        if (one_each) EXPECT_EQ(share.size(), 1);
        for (const int32_t piece : share) got.insert(piece / per_row);
      }
      return got;
    };
    std::multiset<int32_t> want, want_first, want_effects;
    const auto add = [&](int32_t unit, std::multiset<int32_t>* to) {
      for (int32_t i = 0; i < per_row; ++i) to->insert(unit);
    };
    std::vector<int32_t> covered(R, 0), state(R, -1);
    std::set<int32_t> states;
    std::vector<int64_t> shortest(R, INT64_MAX), longest(R, 0);  // Of a row's segments, in chunks.
    for (size_t s = 0; s < planned.segments.size(); ++s) {
      const ChunkSegment& segment = planned.segments[s];
      const auto unit = static_cast<int32_t>(R + s);
      EXPECT_EQ(segment.begin, covered[segment.row]);
      EXPECT_EQ(segment.before, state[segment.row]);
      EXPECT_GT(segment.tokens, 0);
      covered[segment.row] += segment.tokens;
      state[segment.row] = segment.after;
      add(unit, segment.before < 0 ? &want_first : &want);
      const bool between = segment.before >= 0 && segment.after >= 0;
      if (between) add(unit, &want_effects);
      EXPECT_EQ(segment.transition >= 0, between);
      if (segment.after >= 0) EXPECT_EQ(segment.tokens % 64, 0);
      shortest[segment.row] = std::min(shortest[segment.row], Chunks(segment.tokens));
      longest[segment.row] = std::max(longest[segment.row], Chunks(segment.tokens));
      for (const int32_t kept : {segment.after, segment.transition}) {
        if (kept >= 0) EXPECT_TRUE(states.insert(kept).second);
      }
    }
    int64_t tokens = 0;
    for (int32_t r = 0; r < R; ++r) {
      tokens += lengths[r];
      if (covered[r] > 0) {
        EXPECT_EQ(covered[r], lengths[r]);
        EXPECT_LE(longest[r], shortest[r] + 1);
        EXPECT_EQ(state[r], -1) << "the last segment leaves its state in the slot";
      } else if (lengths[r] > kDeltaRuleFewTokens) {
        add(r, &want);
      }
    }
    EXPECT_EQ(units(planned.shares, false), want);
    EXPECT_EQ(units(planned.first, true), want_first);
    EXPECT_EQ(units(planned.effects, true), want_effects);
    EXPECT_LE(planned.first.size() + planned.effects.size(), 132);
    // The parts of an effect are neighbours.
    for (size_t b = 1; b < planned.effects.size(); ++b) {
      if (b % planned.plan.parts != 0) EXPECT_EQ(planned.effects[b][0], planned.effects[b - 1][0] + 1);
    }
    EXPECT_LT(*states.rbegin(), MaxSegmentStates(tokens, heads, columns, 132));
    for (const SplitRow& row : planned.split_rows) {
      for (int32_t i = 0; i < row.transitions; ++i) {
        const auto is = [&](const ChunkSegment& segment) {
          return segment.before == row.first_state + i && segment.after == row.first_state + i + 1 &&
                 segment.transition == row.first_transition + i;
        };
        EXPECT_EQ(std::count_if(planned.segments.begin(), planned.segments.end(), is), 1);
      }
    }
  }
}

}  // namespace
}  // namespace deltanet
