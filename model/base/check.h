// Checks for broken invariants of our own: they end the process. What a caller, a file or a device can cause
// is an absl::Status instead. (LibTorch defines CHECK; hence the longer name.)
#ifndef DELTANET_MODEL_BASE_CHECK_H_
#define DELTANET_MODEL_BASE_CHECK_H_

#include <cstdio>
#include <cstdlib>

// Ends the process, naming file, line and condition, if `condition` is false. `message` is a string literal.
#define DELTANET_CHECK(condition, message)                                                              \
  do {                                                                                                  \
    if (!(condition)) {                                                                                 \
      std::fprintf(stderr, "%s:%d: check failed: %s: %s\n", __FILE__, __LINE__, #condition, (message)); \
      std::abort();                                                                                     \
    }                                                                                                   \
  } while (false)

#endif  // DELTANET_MODEL_BASE_CHECK_H_
