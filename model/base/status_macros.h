// The two macros that carry an absl::Status up the stack.
#ifndef DELTANET_MODEL_BASE_STATUS_MACROS_H_
#define DELTANET_MODEL_BASE_STATUS_MACROS_H_

#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

// Returns the status of `expression` from the enclosing function unless it is OK.
#define RETURN_IF_ERROR(expression)                           \
  do {                                                        \
    if (absl::Status status_ = (expression); !status_.ok()) { \
      return status_;                                         \
    }                                                         \
  } while (false)

#define DELTANET_CONCAT_INNER_(a, b) a##b
#define DELTANET_CONCAT_(a, b) DELTANET_CONCAT_INNER_(a, b)

// `ASSIGN_OR_RETURN(auto x, F())`: x is the value of the StatusOr, or the enclosing function returns its
// status.
#define ASSIGN_OR_RETURN(lhs, expression) \
  ASSIGN_OR_RETURN_IMPL_(DELTANET_CONCAT_(status_or_, __LINE__), lhs, expression)
#define ASSIGN_OR_RETURN_IMPL_(temporary, lhs, expression)   \
  auto temporary = (expression);                             \
  if (!temporary.ok()) return std::move(temporary).status(); \
  lhs = *std::move(temporary)

#endif  // DELTANET_MODEL_BASE_STATUS_MACROS_H_
