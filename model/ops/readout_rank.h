// The order of a row's ids by their probability, which both variants of the readout (readout.cc and
// readout_cuda.cu) select by.
#ifndef DELTANET_MODEL_OPS_READOUT_RANK_H_
#define DELTANET_MODEL_OPS_READOUT_RANK_H_

#include <bit>
#include <cstdint>

namespace deltanet {

// Of a finite logit and its id: the smaller, the more likely, and of equals the one with the lower id. The
// upper word is a function of the logit alone. -0 equals 0.
using Rank = uint64_t;

constexpr uint32_t RankWordOf(float logit) {
  const int32_t bits = std::bit_cast<int32_t>(logit + 0.0f);
  return static_cast<uint32_t>(bits ^ (~(bits >> 31) & 0x7fffffff));  // Without a branch: signs are random.
}
constexpr Rank RankOf(uint32_t word, uint32_t id) { return static_cast<Rank>(word) << 32 | id; }
constexpr Rank RankOf(float logit, uint32_t id) { return RankOf(RankWordOf(logit), id); }

constexpr int32_t IdOf(Rank rank) { return static_cast<int32_t>(rank & 0xffffffffu); }
constexpr float LogitOfWord(uint32_t word) {
  return std::bit_cast<float>(word >> 31 != 0 ? word : ~word & 0x7fffffffu);
}

}  // namespace deltanet

#endif  // DELTANET_MODEL_OPS_READOUT_RANK_H_
