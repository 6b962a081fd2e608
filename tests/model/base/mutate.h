// Random damage to a valid input, for tests that a parser survives anything.
#ifndef DELTANET_TESTS_MODEL_BASE_MUTATE_H_
#define DELTANET_TESTS_MODEL_BASE_MUTATE_H_

#include <algorithm>
#include <cstddef>
#include <random>
#include <string>

namespace deltanet {

// Changes `bytes` in one to three places, all before `limit` (at most its size): a flipped bit, another byte,
// a cut, a removed, repeated or swapped stretch, or an inserted piece of JSON.
inline std::string Mutate(std::string bytes, size_t limit, std::mt19937* random) {
  static constexpr const char* kPieces[] = {"{",
                                            "}",
                                            "[",
                                            "]",
                                            "\"",
                                            ",",
                                            ":",
                                            "-",
                                            "0",
                                            "1e9",
                                            "null",
                                            "true",
                                            "\\u",
                                            "[[[[[",
                                            "{}",
                                            "\xff",
                                            "0.5",
                                            "18446744073709551615",
                                            "1e999",
                                            "9223372036854775807",
                                            "\"__metadata__\":{},",
                                            "4294967296"};
  const auto below = [random](size_t n) { return n == 0 ? 0 : (*random)() % n; };
  for (size_t n = 1 + below(3); n > 0; --n) {
    const size_t size = std::min(limit, bytes.size());
    const size_t at = below(size), length = std::min(below(16), size - at);
    switch (below(7)) {
      case 0:
        if (at < size) bytes[at] ^= static_cast<char>(1 << below(8));
        break;
      case 1:
        if (at < size) bytes[at] = static_cast<char>(below(256));
        break;
      case 2:
        bytes.resize(at);
        break;
      case 3:
        bytes.erase(at, length);
        break;
      case 4:
        bytes.insert(below(size), bytes.substr(at, length));
        break;
      case 5:
        if (at < size) std::swap(bytes[at], bytes[below(size)]);
        break;
      default:
        bytes.insert(at, kPieces[below(std::size(kPieces))]);
    }
  }
  return bytes;
}

}  // namespace deltanet

#endif  // DELTANET_TESTS_MODEL_BASE_MUTATE_H_
