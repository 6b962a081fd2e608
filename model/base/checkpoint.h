// A model directory's weights, in one file or in several.
#ifndef DELTANET_MODEL_BASE_CHECKPOINT_H_
#define DELTANET_MODEL_BASE_CHECKPOINT_H_

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "model/base/safetensors.h"

namespace deltanet {

inline constexpr char kCheckpointFile[] = "model.safetensors";
inline constexpr char kCheckpointIndex[] = "model.safetensors.index.json";

// DIRECTORY/model.safetensors, or the files that DIRECTORY/model.safetensors.index.json names:
// {"weight_map": {"tensor": "file in the same directory", ...}}, other keys being ignored. Open files and
// their checked headers; thread-safe, as all reads are positioned. Movable.
class Checkpoint {
 public:
  // NOT_FOUND if neither form is there or a file that the index names is not. INVALID_ARGUMENT if both forms
  // are there; if the index is malformed, is larger than SafetensorsReader::kMaxHeaderBytes or names a file
  // that is not one in the directory itself; or if the index and its files disagree: each tensor must be in
  // the file that the index names, in no other, and no tensor may be unknown to the index. Otherwise as
  // SafetensorsReader. The message names the file, the tensor, what was found and what is wanted.
  static absl::StatusOr<Checkpoint> Open(const std::string& directory);

  // What to name in a message about the whole: the path of the one file, or of the index.
  const std::string& path() const { return path_; }
  // By name, in the order of names.
  const std::map<std::string, SafetensorsEntry>& entries() const { return entries_; }
  // NOT_FOUND names the tensor and path(). The pointer lives as long as the checkpoint.
  absl::StatusOr<const SafetensorsEntry*> Find(absl::string_view name) const;

  // As SafetensorsReader's, of one of entries().
  absl::Status Read(const SafetensorsEntry& entry, void* to) const;
  absl::Status ReadRange(const SafetensorsEntry& entry, int64_t offset, int64_t bytes, void* to) const;

 private:
  Checkpoint(std::string path, std::vector<SafetensorsReader> files,
             std::map<std::string, SafetensorsEntry> entries);

  std::string path_;
  std::vector<SafetensorsReader> files_;
  std::map<std::string, SafetensorsEntry> entries_;
};

// The text of an index: `file_of` says where each tensor is. For writers.
std::string CheckpointIndexJson(const std::map<std::string, std::string>& file_of, int64_t total_bytes);

// Parses one. INVALID_ARGUMENT as Open, without the file's name.
absl::StatusOr<std::map<std::string, std::string>> ParseCheckpointIndex(absl::string_view json);

}  // namespace deltanet

#endif  // DELTANET_MODEL_BASE_CHECKPOINT_H_
