// Where LibTorch's exceptions stop: LibTorch throws, the rest of the project returns absl::Status.
#ifndef DELTANET_MODEL_TORCH_GUARD_H_
#define DELTANET_MODEL_TORCH_GUARD_H_

#include "absl/status/status.h"
#include "absl/strings/string_view.h"

namespace deltanet {

// The status of the exception being handled: RESOURCE_EXHAUSTED if memory ran out, INTERNAL for anything
// else, with `what` ("decode step") and the exception's first line in the message. Only within a catch block.
absl::Status StatusOfCurrentException(absl::string_view what);

// Returns what `body` returns (an absl::Status or StatusOr), or the status of what it throws.
template <typename Body>
auto CatchTorch(absl::string_view what, Body&& body) -> decltype(body()) {
  try {
    return body();
  } catch (...) {
    return StatusOfCurrentException(what);
  }
}

}  // namespace deltanet

#endif  // DELTANET_MODEL_TORCH_GUARD_H_
