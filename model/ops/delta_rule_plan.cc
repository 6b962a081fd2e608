#include "model/ops/delta_rule_plan.h"

#include <algorithm>
#include <cstdint>
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

}  // namespace

int64_t MaxChunkPlanSize(int64_t rows, int64_t heads, int64_t columns, int64_t blocks) {
  return blocks + 1 + std::max(blocks, rows * heads * (columns == kWideColumns ? kWideParts : 1));
}

ChunkPlan PlanChunks(absl::Span<const int32_t> offsets, int64_t heads, int64_t columns, int64_t blocks,
                     int32_t* plan) {
  std::vector<std::pair<int64_t, int64_t>> rows;  // Cost, row.
  for (size_t r = 0; r + 1 < offsets.size(); ++r) {
    const int64_t tokens = offsets[r + 1] - offsets[r];
    if (tokens > kDeltaRuleFewTokens) {
      rows.emplace_back((tokens + kChunk - 1) / kChunk + kPieceCost, static_cast<int64_t>(r));
    }
  }
  if (rows.empty()) return {};
  std::stable_sort(rows.begin(), rows.end(), [](const auto& a, const auto& b) { return a.first > b.first; });

  // Half the columns of a head take more than half its time: V is split only where blocks would be idle, or
  // must be.
  const int64_t heads_of_rows = static_cast<int64_t>(rows.size()) * heads;
  int64_t parts = 1;
  if (columns == kWideColumns) parts = kWideParts;
  if (columns == 128 && 2 * heads_of_rows <= blocks) parts = 2;
  blocks = std::min(blocks, heads_of_rows * parts);
  std::vector<std::vector<int32_t>> share(blocks);
  using Load = std::pair<int64_t, int64_t>;  // Cost, block.
  std::priority_queue<Load, std::vector<Load>, std::greater<>> loads;
  for (int64_t b = 0; b < blocks; ++b) loads.emplace(0, b);
  for (const auto& [cost, row] : rows) {
    for (int64_t i = 0; i < heads * parts; ++i) {
      const auto [load, block] = loads.top();
      loads.pop();
      share[block].push_back(static_cast<int32_t>(row * heads * parts + i));
      loads.emplace(load + cost, block);
    }
  }

  int32_t* const pieces = plan + blocks + 1;
  int64_t count = 0;
  for (int64_t b = 0; b < blocks; ++b) {
    plan[b] = static_cast<int32_t>(count);
    std::copy(share[b].begin(), share[b].end(), pieces + count);
    count += static_cast<int64_t>(share[b].size());
  }
  plan[blocks] = static_cast<int32_t>(count);
  return {.pieces = plan, .blocks = static_cast<int32_t>(blocks), .parts = static_cast<int32_t>(parts)};
}

}  // namespace deltanet
