// Whether two arrays are the same bit for bit: NaNs of the same bits are, and 0 and -0 are not.
#ifndef DELTANET_TESTS_TESTING_SAME_BITS_H_
#define DELTANET_TESTS_TESTING_SAME_BITS_H_

#include <cstdint>
#include <cstring>
#include <vector>

namespace deltanet {

template <typename T>
bool SameBits(const T* a, const T* b, int64_t count) {
  return count == 0 || std::memcmp(a, b, count * sizeof(T)) == 0;
}

template <typename T>
bool SameBits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && SameBits(a.data(), b.data(), static_cast<int64_t>(a.size()));
}

}  // namespace deltanet

#endif  // DELTANET_TESTS_TESTING_SAME_BITS_H_
