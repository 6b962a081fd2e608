// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011): random bits as a
// function of a counter and a key, with nothing remembered in between. On the CPU and in CUDA kernels.
#ifndef DELTANET_MODEL_OPS_PHILOX_H_
#define DELTANET_MODEL_OPS_PHILOX_H_

#include <cstdint>

namespace deltanet {

struct PhiloxBlock {
  uint32_t words[4];
};

constexpr PhiloxBlock Philox4x32(PhiloxBlock counter, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53u} * counter.words[0];
    const uint64_t product1 = uint64_t{0xCD9E8D57u} * counter.words[2];
    counter = {
        {static_cast<uint32_t>(product1 >> 32) ^ counter.words[1] ^ key0, static_cast<uint32_t>(product1),
         static_cast<uint32_t>(product0 >> 32) ^ counter.words[3] ^ key1, static_cast<uint32_t>(product0)}};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return counter;
}

// A sampler's random number in [0, 1), a multiple of 2^-32. Words count from the least significant: the key
// is the two of `seed`, the counter those of `counter` and two zeros.
constexpr double PhiloxUniform(uint64_t seed, int64_t counter) {
  const uint64_t position = static_cast<uint64_t>(counter);
  const PhiloxBlock block =
      Philox4x32({{static_cast<uint32_t>(position), static_cast<uint32_t>(position >> 32), 0, 0}},
                 static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
  return block.words[0] * 0x1p-32;
}

}  // namespace deltanet

#endif  // DELTANET_MODEL_OPS_PHILOX_H_
