#include "model/ops/delta_rule_plan.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <queue>
#include <utility>
#include <vector>

namespace deltanet {
namespace {

constexpr int64_t kChunk = 64;
// What a piece costs beside its chunks: its state in and out, and the first chunk's way through the pipeline;
// in chunks (64 rows of one chunk take 11 us a piece, 8 rows of 32 chunks 4 us a chunk, on an H200).
constexpr int64_t kPieceCost = 2;
// Heads that a block cannot hold whole: of 256 rows it has the registers for 64 columns.
constexpr int64_t kWideColumns = 256, kWideParts = 4;

// For the choice whether to split rows, in nanoseconds on an H200: a chunk of all columns of 128 a block, and
// of 64 columns a block, or of the effects that a block works on; what follows the effects, and of it each
// segment. (28 November 2026: rows alone 3300 and 1860 to 1920 a chunk; in segments, both passes, 3350 where
// few blocks are at work, 3850 where all are.)
constexpr int64_t kWholeChunk = 3300, kStripChunk = 1900;
constexpr int64_t kJoin = 6000, kJoinSegment = 1300;
constexpr int64_t kLeastSplit = 12 * kChunk;  // Tokens; shorter rows are never split.

// A row or segment, and what each of its pieces costs, in chunks.
struct Unit {
  int64_t cost, number;
};

// Shares out `pieces` pieces of each unit, the costliest first, among at most `blocks`; appends to `plan`,
// which has `*size` numbers.
ChunkShares Share(std::vector<Unit> units, int64_t pieces, int64_t blocks, int32_t* plan, int32_t* size) {
  if (units.empty()) return {};
  std::stable_sort(units.begin(), units.end(), [](const Unit& a, const Unit& b) { return a.cost > b.cost; });
  blocks = std::min(blocks, static_cast<int64_t>(units.size()) * pieces);
  std::vector<std::vector<int32_t>> share(blocks);
  using Load = std::pair<int64_t, int64_t>;  // Cost, block.
  std::priority_queue<Load, std::vector<Load>, std::greater<>> loads;
  for (int64_t b = 0; b < blocks; ++b) loads.emplace(0, b);
  for (const Unit& unit : units) {
    for (int64_t i = 0; i < pieces; ++i) {
      const auto [load, block] = loads.top();
      loads.pop();
      share[block].push_back(static_cast<int32_t>(unit.number * pieces + i));
      loads.emplace(load + unit.cost, block);
    }
  }
  const ChunkShares shares{.at = *size, .blocks = static_cast<int32_t>(blocks)};
  int32_t* const begins = plan + shares.at;
  int32_t* const all = begins + blocks + 1;
  int32_t count = 0;
  for (int64_t b = 0; b < blocks; ++b) {
    begins[b] = count;
    std::copy(share[b].begin(), share[b].end(), all + count);
    count += static_cast<int32_t>(share[b].size());
  }
  begins[blocks] = count;
  *size += shares.blocks + 1 + count;
  return shares;
}

// Whether whole heads of `rows` rows would leave half of the blocks idle. Only then, and where rows are split,
// is a head of 128 columns worked on in halves, each of which takes more than half its time.
bool LeaveHalfIdle(size_t rows, int64_t heads, int64_t blocks) {
  return 2 * static_cast<int64_t>(rows) * heads <= blocks;
}

// How long rows are cut: into as few segments of equal length as have at most `chunks` chunks.
struct Cut {
  int64_t chunks = INT64_MAX;

  int64_t Segments(int64_t row_chunks) const { return 1 + (row_chunks - 1) / chunks; }
};

// Of long rows of these chunks, the cut that takes least time, or none.
Cut BestCut(const std::vector<Unit>& rows, int64_t heads, int64_t columns, int64_t blocks) {
  int64_t longest = 0, total = 0;
  for (const Unit& row : rows) {
    longest = std::max(longest, row.cost);
    total += row.cost + kPieceCost;
  }
  const int64_t strips = columns / 64;  // Pieces of a head, in either pass.
  if (columns == kWideColumns || longest * kChunk < kLeastSplit) return {};
  // Whole rows, as PlanChunks would have them.
  const auto time = [&](int64_t most, int64_t all, int64_t pieces, int64_t chunk) {
    return chunk * std::max(most + kPieceCost, all * heads * pieces / blocks);
  };
  const bool in_strips = strips == 1 || LeaveHalfIdle(rows.size(), heads, blocks);
  int64_t least =
      in_strips ? time(longest, total, strips, kStripChunk) : time(longest, total, 1, kWholeChunk);
  least = least * 9 / 10;
  Cut best;
  for (int64_t segments = 2; segments <= longest; ++segments) {
    const Cut cut{.chunks = (longest + segments - 1) / segments};
    int64_t first_pass = 0, most = 0, all = 0;
    for (const Unit& row : rows) {
      const int64_t n = cut.Segments(row.cost);
      first_pass += heads * strips * (n - 1);
      most = std::max(most, n);
      all += n > 1 ? row.cost - row.cost / n + (n - 1) * kPieceCost : row.cost + kPieceCost;
    }
    if (first_pass > blocks) break;
    const int64_t took = kStripChunk * (cut.chunks + kPieceCost) + kJoin + kJoinSegment * (most - 2) +
                         time(cut.chunks, all, strips, kStripChunk);
    if (took < least) {
      least = took;
      best = cut;
    }
  }
  return best;
}

}  // namespace

int64_t MaxChunkPlanSize(int64_t rows, int64_t heads, int64_t columns, int64_t blocks) {
  constexpr int64_t kSegmentNumbers = (sizeof(ChunkSegment) + sizeof(SplitRow)) / sizeof(int32_t);
  const int64_t pieces = std::max(blocks, rows * heads * (columns / 64));
  // Of a split, each pass has at most `blocks` pieces, and a segment at least one of them.
  return blocks + 1 + pieces + blocks + 2 * (2 * blocks + 1) + 2 * blocks / heads * kSegmentNumbers;
}

int64_t MaxSegmentStates(int64_t tokens, int64_t heads, int64_t columns, int64_t blocks) {
  if (columns == kWideColumns || tokens < kLeastSplit) return 0;
  return 2 * blocks / (heads * (columns / 64));
}

ChunkPlan PlanChunks(absl::Span<const int32_t> offsets, int64_t heads, int64_t columns, int64_t blocks,
                     bool splits, int32_t* plan) {
  std::vector<Unit> rows;
  for (size_t r = 0; r + 1 < offsets.size(); ++r) {
    const int64_t tokens = offsets[r + 1] - offsets[r];
    if (tokens > kDeltaRuleFewTokens) {
      rows.push_back({.cost = (tokens + kChunk - 1) / kChunk, .number = static_cast<int64_t>(r)});
    }
  }
  if (rows.empty()) return {};
  const Cut cut = splits ? BestCut(rows, heads, columns, blocks) : Cut();

  ChunkPlan made{.numbers = plan, .rows = static_cast<int32_t>(std::max<size_t>(1, offsets.size()) - 1)};
  std::vector<Unit> units, first, effects;
  std::vector<ChunkSegment> segments;
  std::vector<SplitRow> split_rows;
  int32_t states = 0;
  for (const Unit& row : rows) {
    const auto n = static_cast<int32_t>(cut.Segments(row.cost));
    if (n == 1) {
      units.push_back({.cost = row.cost + kPieceCost, .number = row.number});
      continue;
    }
    const SplitRow split{.transitions = n - 2, .first_state = states, .first_transition = states + n - 1};
    split_rows.push_back(split);
    states += 2 * n - 3;
    const auto tokens = offsets[row.number + 1] - offsets[row.number];
    int64_t begin = 0;
    for (int32_t i = 0; i < n; ++i) {
      const int64_t end = row.cost * (i + 1) / n;
      const Unit unit{.cost = end - begin + kPieceCost,
                      .number = made.rows + static_cast<int64_t>(segments.size())};
      (i == 0 ? first : units).push_back(unit);
      if (i > 0 && i < n - 1) effects.push_back(unit);
      ChunkSegment segment{.row = static_cast<int32_t>(row.number),
                           .begin = static_cast<int32_t>(begin * kChunk)};
      segment.tokens = std::min(tokens, static_cast<int32_t>(end * kChunk)) - segment.begin;
      if (i > 0) segment.before = split.first_state + i - 1;
      if (i < n - 1) segment.after = split.first_state + i;
      if (i > 0 && i < n - 1) segment.transition = split.first_transition + i - 1;
      segments.push_back(segment);
      begin = end;
    }
  }

  int64_t parts = 1;
  if (columns == kWideColumns) parts = kWideParts;
  if (columns == 128 && (LeaveHalfIdle(rows.size(), heads, blocks) || !split_rows.empty())) parts = 2;
  made.parts = static_cast<int32_t>(parts);
  made.blocks = Share(units, heads * parts, blocks, plan, &made.size).blocks;
  made.first = Share(first, heads * parts, blocks, plan, &made.size);
  made.effects = Share(effects, heads * parts, blocks, plan, &made.size);
  const auto append = [&](const auto& numbers) {
    const int32_t at = made.size;
    if (numbers.empty()) return at;
    std::memcpy(plan + at, numbers.data(), numbers.size() * sizeof(numbers[0]));
    made.size += static_cast<int32_t>(numbers.size() * sizeof(numbers[0]) / sizeof(int32_t));
    return at;
  };
  made.split_rows = static_cast<int32_t>(split_rows.size());
  made.split_rows_at = append(split_rows);
  made.segments_at = append(segments);
  return made;
}

}  // namespace deltanet
