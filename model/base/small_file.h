// Reading of a model directory's small files, whole.
#ifndef DELTANET_MODEL_BASE_SMALL_FILE_H_
#define DELTANET_MODEL_BASE_SMALL_FILE_H_

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"

namespace deltanet {

// All of a regular file. NOT_FOUND if it is not there, PERMISSION_DENIED if it cannot be opened,
// INVALID_ARGUMENT if it is no regular file, cannot be read or has more than `max_bytes`; the message names
// it. Thread-safe.
absl::StatusOr<std::string> ReadSmallFile(const std::string& path, int64_t max_bytes);

}  // namespace deltanet

#endif  // DELTANET_MODEL_BASE_SMALL_FILE_H_
