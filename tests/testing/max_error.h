// How far two arrays of numbers are from each other. A NaN is never lost on the way, so that what was not
// written shows.
#ifndef DELTANET_TESTS_TESTING_MAX_ERROR_H_
#define DELTANET_TESTS_TESTING_MAX_ERROR_H_

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace deltanet {

// Raises `*largest` to `error`. NaN counts as larger than anything.
inline void KeepLargest(double error, double* largest) {
  if (!std::isnan(*largest) && !(error <= *largest)) *largest = error;
}

// Largest difference; NaN if any is.
template <typename A, typename B>
double MaxError(const A* a, const B* b, int64_t count) {
  double largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    KeepLargest(std::fabs(static_cast<double>(a[i]) - static_cast<double>(b[i])), &largest);
  }
  return largest;
}

template <typename T>
double MaxMagnitude(const T* a, int64_t count) {
  double magnitude = 0;
  for (int64_t i = 0; i < count; ++i) magnitude = std::max(magnitude, std::fabs(static_cast<double>(a[i])));
  return magnitude;
}

}  // namespace deltanet

#endif  // DELTANET_TESTS_TESTING_MAX_ERROR_H_
