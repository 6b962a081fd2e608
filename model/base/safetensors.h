// Reading and writing of safetensors files: an 8-byte little-endian header length, a JSON header
// {"name": {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {...}}, then the bytes.
//
// The reader trusts nothing: the header is bounded (kMaxHeaderBytes) and must lie within the file; every
// tensor's range must lie within the file, match its shape and dtype without overflow, and overlap no other;
// together they cover the data without a gap; no key is repeated or unknown. All is checked before anything
// is allocated from a number of the file. Data is read with pread, so that a file that shrinks under us is an
// error and not a SIGBUS.
#ifndef DELTANET_MODEL_BASE_SAFETENSORS_H_
#define DELTANET_MODEL_BASE_SAFETENSORS_H_

#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "model/base/tensor_view.h"

namespace deltanet {

// One tensor of a file.
struct SafetensorsEntry {
  DType dtype = DType::kFloat32;
  Shape shape;
  int64_t file_offset = 0;  // Of the first byte, from the start of the file.
  int64_t bytes = 0;
  int file = 0;  // Of a checkpoint's files, the one that holds it (see checkpoint.h).
};

// An open file and its checked header. Thread-safe: all reads are positioned. Movable.
class SafetensorsReader {
 public:
  static constexpr int64_t kMaxHeaderBytes = int64_t{100} << 20;
  static constexpr int64_t kMaxRank = 32;  // Sizes of one shape.

  // NOT_FOUND if there is no such file, PERMISSION_DENIED if it cannot be opened, DATA_LOSS if it cannot be
  // read, INVALID_ARGUMENT if it is no regular file, truncated or malformed, or holds a dtype other than F32,
  // F16, BF16, F64 and I64; the message names the file, the tensor, the value found and the value wanted.
  static absl::StatusOr<SafetensorsReader> Open(const std::string& path);

  SafetensorsReader(SafetensorsReader&& other) noexcept;
  SafetensorsReader& operator=(SafetensorsReader&& other) noexcept;
  ~SafetensorsReader();

  const std::string& path() const { return path_; }
  // By name, in the order of names.
  const std::map<std::string, SafetensorsEntry>& entries() const { return entries_; }
  // NOT_FOUND names the tensor and the file. The pointer lives as long as the reader.
  absl::StatusOr<const SafetensorsEntry*> Find(absl::string_view name) const;

  // Reads all of `entry`'s bytes to `to`, which has entry.bytes bytes. DATA_LOSS if the file has shrunk or
  // cannot be read; `to` is then unspecified.
  absl::Status Read(const SafetensorsEntry& entry, void* to) const;
  // The same for `bytes` of them, from byte `offset` of the entry on. The caller keeps within the entry.
  absl::Status ReadRange(const SafetensorsEntry& entry, int64_t offset, int64_t bytes, void* to) const;

 private:
  SafetensorsReader(std::string path, int file_descriptor, std::map<std::string, SafetensorsEntry> entries);

  std::string path_;
  int file_descriptor_ = -1;
  std::map<std::string, SafetensorsEntry> entries_;
};

// Parses and checks the JSON header of a file of `file_bytes` bytes whose data begins at `data_start`. Split
// from Open so that tests can feed it anything. Errors as Open, without the file's name.
absl::StatusOr<std::map<std::string, SafetensorsEntry>> ParseSafetensorsHeader(absl::string_view header_json,
                                                                               int64_t data_start,
                                                                               int64_t file_bytes);

// Writes a file piece by piece, for tensors that together need not fit into memory: a temporary file beside
// `path`, which Finish renames to it; without Finish `path` is as it was. Confined to one thread. Movable.
class SafetensorsWriter {
 public:
  struct Tensor {
    std::string name;
    Shape shape;
    DType dtype = DType::kFloat32;
  };

  // The tensors in the order of the file: where all have elements of one size, or the larger come first, each
  // is aligned. INVALID_ARGUMENT for a name that is repeated, reserved or not UTF-8; NOT_FOUND (no such
  // directory), PERMISSION_DENIED, RESOURCE_EXHAUSTED (disk full) or INTERNAL from the file system.
  static absl::StatusOr<SafetensorsWriter> Create(const std::string& path,
                                                  const std::vector<Tensor>& tensors);

  SafetensorsWriter(SafetensorsWriter&& other) noexcept;
  SafetensorsWriter& operator=(SafetensorsWriter&&) = delete;
  ~SafetensorsWriter();

  // The next bytes of the tensors' data, however they are cut. Errors of the file system as Create.
  absl::Status Append(const void* data, int64_t bytes);
  // Once all bytes of all tensors are there. Errors of the file system as Create.
  absl::Status Finish();

 private:
  SafetensorsWriter(std::string path, std::string temporary, int file_descriptor, int64_t missing_bytes);

  std::string path_;
  std::string temporary_;
  int file_descriptor_ = -1;
  int64_t missing_bytes_ = 0;
};

// Writes CPU tensors to `path`, replacing it at once. The data are ordered by element size, so that each
// tensor is aligned. Errors as SafetensorsWriter; after one, `path` is as it was.
absl::Status WriteSafetensors(const std::string& path,
                              const std::vector<std::pair<std::string, TensorView>>& tensors);

}  // namespace deltanet

#endif  // DELTANET_MODEL_BASE_SAFETENSORS_H_
