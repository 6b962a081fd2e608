#include "model/base/checkpoint.h"

#include <sys/stat.h>

#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "model/base/check.h"
#include "model/base/json_handler.h"
#include "model/base/small_file.h"
#include "model/base/status_macros.h"

namespace deltanet {
namespace {

constexpr char kWeightMap[] = "weight_map";

// Collects the entries of `weight_map`; what else there is is skipped.
class IndexHandler : public JsonHandler {
 public:
  bool found() const { return found_; }
  std::map<std::string, std::string> TakeFiles() { return std::move(files_); }

  bool start_object(std::size_t) override { return Open("an object", true); }
  bool end_object() override { return Close(); }
  bool start_array(std::size_t) override { return Open("an array", false); }
  bool end_array() override { return Close(); }
  bool key(std::string& name) override {
    if (depth_ == 1) {
      in_map_ = name == kWeightMap;
      if (in_map_ && found_) return Fail(absl::StrCat("'", kWeightMap, "' appears twice"));
      found_ |= in_map_;
    } else if (in_map_) {
      if (files_.count(name) != 0) return Fail(absl::StrCat("tensor ", Quoted(name), " appears twice"));
      name_ = name;
    }
    return true;
  }
  bool null() override { return Scalar("null"); }
  bool boolean(bool value) override { return Scalar(value ? "true" : "false"); }
  bool number_integer(int64_t value) override { return Scalar(absl::StrCat(value)); }
  bool number_unsigned(uint64_t value) override { return Scalar(absl::StrCat(value)); }
  bool number_float(double, const std::string& text) override { return Scalar(text.substr(0, 100)); }
  bool string(std::string& value) override {
    if (depth_ != 2 || !in_map_) return Scalar(Quoted(value));
    // A path would lead out of the directory.
    if (value.empty() || value == "." || value == ".." || value.find('/') != std::string::npos ||
        value.find('\0') != std::string::npos) {
      return Fail(absl::StrCat("tensor ", Quoted(name_), " is in ", Quoted(value),
                               ", want the name of a file in the same directory"));
    }
    files_.emplace(name_, value);
    return true;
  }

 protected:
  bool Unexpected(absl::string_view found) override {
    if (depth_ == 0) return Fail(absl::StrCat("found ", found, ", want an object"));
    if (depth_ == 1) return Fail(absl::StrCat("'", kWeightMap, "' is ", found, ", want an object"));
    return Fail(absl::StrCat("tensor ", Quoted(name_), " is in ", found, ", want the name of a file"));
  }

 private:
  bool Scalar(absl::string_view found) { return depth_ == 0 || in_map_ ? Unexpected(found) : true; }
  bool Open(absl::string_view found, bool is_object) {
    const bool expected = is_object && (depth_ == 0 || depth_ == 1);
    if ((depth_ == 0 || in_map_) && !expected) return Unexpected(found);
    ++depth_;
    return true;
  }
  bool Close() {
    --depth_;
    return true;
  }

  int64_t depth_ = 0;  // Of nesting: 1 in the index itself.
  bool in_map_ = false;
  bool found_ = false;
  std::string name_;
  std::map<std::string, std::string> files_;
};

}  // namespace

absl::StatusOr<std::map<std::string, std::string>> ParseCheckpointIndex(absl::string_view json) {
  IndexHandler handler;
  RETURN_IF_ERROR(handler.Parse(json));
  if (!handler.found()) {
    return absl::InvalidArgumentError(absl::StrCat("'", kWeightMap, "' is missing, want an object"));
  }
  return handler.TakeFiles();
}

std::string CheckpointIndexJson(const std::map<std::string, std::string>& file_of, int64_t total_bytes) {
  nlohmann::ordered_json json;
  json["metadata"]["total_size"] = total_bytes;
  json[kWeightMap] = file_of;
  return json.dump(2) + "\n";
}

Checkpoint::Checkpoint(std::string path, std::vector<SafetensorsReader> files,
                       std::map<std::string, SafetensorsEntry> entries)
    : path_(std::move(path)), files_(std::move(files)), entries_(std::move(entries)) {}

absl::StatusOr<Checkpoint> Checkpoint::Open(const std::string& directory) {
  const auto path_of = [&](absl::string_view name) { return absl::StrCat(directory, "/", name); };
  const auto is_there = [](const std::string& path) {
    struct stat info;
    return stat(path.c_str(), &info) == 0;
  };
  const std::string single = path_of(kCheckpointFile), index = path_of(kCheckpointIndex);
  std::vector<SafetensorsReader> files;
  std::map<std::string, SafetensorsEntry> entries;
  if (!is_there(index)) {
    absl::StatusOr<SafetensorsReader> file = SafetensorsReader::Open(single);
    if (absl::IsNotFound(file.status())) {
      return absl::NotFoundError(absl::StrCat(file.status().message(), "; nor is there ", kCheckpointIndex));
    }
    RETURN_IF_ERROR(file.status());
    entries = file->entries();
    files.push_back(*std::move(file));
    return Checkpoint(single, std::move(files), std::move(entries));
  }
  if (is_there(single)) {
    return absl::InvalidArgumentError(
        absl::StrCat(directory, " has both ", kCheckpointFile, " and ", kCheckpointIndex, ", want one"));
  }

  const auto in_index = [&](const absl::Status& status) {
    return absl::Status(status.code(), absl::StrCat(index, ": ", status.message()));
  };
  ASSIGN_OR_RETURN(const std::string json, ReadSmallFile(index, SafetensorsReader::kMaxHeaderBytes));
  const auto file_of = ParseCheckpointIndex(json);
  if (!file_of.ok()) return in_index(file_of.status());
  std::map<absl::string_view, int> numbers;  // Of files, by name.
  for (const auto& [tensor, name] : *file_of) {
    if (!numbers.emplace(name, static_cast<int>(files.size())).second) continue;
    absl::StatusOr<SafetensorsReader> file = SafetensorsReader::Open(path_of(name));
    if (absl::IsNotFound(file.status())) return in_index(file.status());
    RETURN_IF_ERROR(file.status());
    files.push_back(*std::move(file));
  }
  for (const auto& [tensor, name] : *file_of) {
    const int number = numbers.at(name);
    const auto found = files[number].entries().find(tensor);
    if (found == files[number].entries().end()) {
      return absl::InvalidArgumentError(absl::StrCat(index, ": tensor ", Quoted(tensor), " should be in ",
                                                     files[number].path(), ", which has none"));
    }
    SafetensorsEntry& entry = entries[tensor] = found->second;
    entry.file = number;
  }
  for (const SafetensorsReader& file : files) {
    for (const auto& [tensor, unused] : file.entries()) {
      const auto indexed = entries.find(tensor);
      if (indexed == entries.end()) {
        return absl::InvalidArgumentError(absl::StrCat(file.path(), " has tensor ", Quoted(tensor),
                                                       ", which ", kCheckpointIndex, " has not"));
      }
      const SafetensorsReader& wanted = files[indexed->second.file];
      if (&wanted == &file) continue;
      return absl::InvalidArgumentError(absl::StrCat("tensor ", Quoted(tensor), " is in both ", file.path(),
                                                     " and ", wanted.path(), ", want it in one"));
    }
  }
  return Checkpoint(index, std::move(files), std::move(entries));
}

absl::StatusOr<const SafetensorsEntry*> Checkpoint::Find(absl::string_view name) const {
  const auto found = entries_.find(std::string(name));
  if (found == entries_.end())
    return absl::NotFoundError(absl::StrCat(path_, " has no tensor ", Quoted(name)));
  return &found->second;
}

absl::Status Checkpoint::Read(const SafetensorsEntry& entry, void* to) const {
  return files_[entry.file].Read(entry, to);
}

absl::Status Checkpoint::ReadRange(const SafetensorsEntry& entry, int64_t offset, int64_t bytes,
                                   void* to) const {
  return files_[entry.file].ReadRange(entry, offset, bytes, to);
}

}  // namespace deltanet
