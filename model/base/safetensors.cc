#include "model/base/safetensors.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <optional>
#include <set>

#include "absl/strings/str_cat.h"
#include "model/base/check.h"
#include "model/base/json_handler.h"
#include "model/base/status_macros.h"

namespace deltanet {
namespace {

static_assert(std::endian::native == std::endian::little, "the format's numbers are little-endian");

constexpr char kMetadata[] = "__metadata__";
constexpr int64_t kLengthBytes = 8;  // Of the header's length, at the start of the file.

struct DTypeTag {
  DType dtype;
  absl::string_view tag;
};
constexpr DTypeTag kDTypeTags[] = {{DType::kFloat32, "F32"},
                                   {DType::kFloat16, "F16"},
                                   {DType::kBFloat16, "BF16"},
                                   {DType::kFloat64, "F64"},
                                   {DType::kInt64, "I64"}};

absl::string_view TagOf(DType dtype) {
  for (const DTypeTag& known : kDTypeTags) {
    if (known.dtype == dtype) return known.tag;
  }
  DELTANET_CHECK(false, "unknown dtype");
}

// Element count x element size, or nothing if either product overflows.
std::optional<int64_t> CheckedBytes(const Shape& shape, DType dtype) {
  int64_t bytes = DTypeBytes(dtype);
  for (const int64_t size : shape) {
    if (__builtin_mul_overflow(bytes, size, &bytes)) return std::nullopt;
  }
  return bytes;
}

// Collects the entries of a header. file_offset counts from the start of the data until
// ParseSafetensorsHeader moves it.
class HeaderHandler : public JsonHandler {
 public:
  std::map<std::string, SafetensorsEntry> TakeEntries() { return std::move(entries_); }

  bool start_object(std::size_t) override {
    switch (place_) {
      case Place::kStart:
        place_ = Place::kHeader;
        return true;
      case Place::kTensorStart:
        place_ = Place::kTensor;
        dtype_.reset();
        shape_.reset();
        offsets_.reset();
        return true;
      case Place::kMetadataStart:
        place_ = Place::kMetadata;
        return true;
      default:
        return Unexpected("an object");
    }
  }

  bool key(std::string& name) override {
    switch (place_) {
      case Place::kHeader:
        if (name == kMetadata) {
          if (has_metadata_) return Fail(absl::StrCat(kMetadata, " appears twice"));
          has_metadata_ = true;
          place_ = Place::kMetadataStart;
          return true;
        }
        if (entries_.count(name) != 0) return Fail(absl::StrCat("tensor ", Quoted(name), " appears twice"));
        name_ = name;
        place_ = Place::kTensorStart;
        return true;
      case Place::kTensor: {
        const bool is_dtype = name == "dtype", is_shape = name == "shape";
        if (!is_dtype && !is_shape && name != "data_offsets") {
          return FailTensor(
              absl::StrCat("unknown key ", Quoted(name), ", want dtype, shape or data_offsets"));
        }
        if (is_dtype ? dtype_.has_value() : is_shape ? shape_.has_value() : offsets_.has_value()) {
          return FailTensor(absl::StrCat(name, " appears twice"));
        }
        place_ = is_dtype ? Place::kDType : is_shape ? Place::kShapeStart : Place::kOffsetsStart;
        return true;
      }
      case Place::kMetadata:
        if (!metadata_keys_.insert(name).second) {
          return Fail(absl::StrCat(kMetadata, " key ", Quoted(name), " appears twice"));
        }
        place_ = Place::kMetadataValue;
        return true;
      default:
        return Unexpected("a key");
    }
  }

  bool end_object() override {
    if (place_ == Place::kTensor) {
      place_ = Place::kHeader;
      return AddEntry();
    }
    place_ = place_ == Place::kMetadata ? Place::kHeader : Place::kEnd;
    return true;
  }

  bool start_array(std::size_t) override {
    if (place_ == Place::kShapeStart) {
      shape_.emplace();
      place_ = Place::kShape;
    } else if (place_ == Place::kOffsetsStart) {
      offsets_.emplace();
      place_ = Place::kOffsets;
    } else {
      return Unexpected("an array");
    }
    return true;
  }

  bool end_array() override {
    place_ = Place::kTensor;
    return true;
  }

  bool string(std::string& value) override {
    if (place_ == Place::kMetadataValue) {
      place_ = Place::kMetadata;
      return true;
    }
    if (place_ != Place::kDType) return Unexpected(Quoted(value));
    for (const DTypeTag& known : kDTypeTags) {
      if (known.tag == value) dtype_ = known.dtype;
    }
    if (!dtype_)
      return FailTensor(absl::StrCat("dtype is ", Quoted(value), ", want F32, F16, BF16, F64 or I64"));
    place_ = Place::kTensor;
    return true;
  }

  bool number_unsigned(uint64_t value) override {
    if (place_ != Place::kShape && place_ != Place::kOffsets) return Unexpected(absl::StrCat(value));
    if (value > INT64_MAX) return FailTensor(absl::StrCat("number ", value, " is too large"));
    Shape& list = place_ == Place::kShape ? *shape_ : *offsets_;
    const int64_t limit = place_ == Place::kShape ? SafetensorsReader::kMaxRank : 2;
    if (static_cast<int64_t>(list.size()) == limit) {
      return FailTensor(absl::StrCat(place_ == Place::kShape ? "shape" : "data_offsets", " has more than ",
                                     limit, " numbers"));
    }
    list.push_back(static_cast<int64_t>(value));
    return true;
  }

 protected:
  bool Unexpected(absl::string_view found) override {
    switch (place_) {
      case Place::kTensorStart:
        return FailTensor(absl::StrCat("found ", found, ", want an object"));
      case Place::kDType:
        return FailTensor(absl::StrCat("dtype is ", found, ", want a string"));
      case Place::kShapeStart:
      case Place::kShape:
        return FailTensor(absl::StrCat("shape has ", found, ", want a list of integers of at least 0"));
      case Place::kOffsetsStart:
      case Place::kOffsets:
        return FailTensor(absl::StrCat("data_offsets has ", found, ", want two integers of at least 0"));
      case Place::kMetadataStart:
        return Fail(absl::StrCat(kMetadata, " is ", found, ", want an object"));
      case Place::kMetadataValue:
        return Fail(absl::StrCat(kMetadata, " has ", found, ", want a string"));
      default:
        return Fail(absl::StrCat("found ", found, ", want an object of tensors"));
    }
  }

 private:
  // What the next event must belong to.
  enum class Place {
    kStart,
    kHeader,
    kTensorStart,
    kTensor,
    kDType,
    kShapeStart,
    kShape,
    kOffsetsStart,
    kOffsets,
    kMetadataStart,
    kMetadata,
    kMetadataValue,
    kEnd
  };

  bool FailTensor(absl::string_view message) {
    return Fail(absl::StrCat("tensor ", Quoted(name_), ": ", message));
  }

  bool AddEntry() {
    if (!dtype_) return FailTensor("has no dtype");
    if (!shape_) return FailTensor("has no shape");
    if (!offsets_) return FailTensor("has no data_offsets");
    if (offsets_->size() != 2) {
      return FailTensor(absl::StrCat("data_offsets has ", offsets_->size(), " numbers, want 2"));
    }
    const int64_t begin = (*offsets_)[0], end = (*offsets_)[1];
    if (begin > end)
      return FailTensor(absl::StrCat("data_offsets ", ShapeString(*offsets_), " end before they begin"));
    const std::optional<int64_t> bytes = CheckedBytes(*shape_, *dtype_);
    if (!bytes) return FailTensor(absl::StrCat("shape ", ShapeString(*shape_), " is too large"));
    if (end - begin != *bytes) {
      return FailTensor(absl::StrCat("data_offsets ", ShapeString(*offsets_), " hold ", end - begin,
                                     " bytes, want ", *bytes, " for shape ", ShapeString(*shape_), " in ",
                                     TagOf(*dtype_)));
    }
    entries_.emplace(std::move(name_), SafetensorsEntry{*dtype_, std::move(*shape_), begin, *bytes});
    return true;
  }

  Place place_ = Place::kStart;
  std::map<std::string, SafetensorsEntry> entries_;
  bool has_metadata_ = false;
  std::set<std::string> metadata_keys_;
  // The tensor being read.
  std::string name_;
  std::optional<DType> dtype_;
  std::optional<Shape> shape_;
  std::optional<Shape> offsets_;
};

// Closes on destruction.
class FileDescriptor {
 public:
  explicit FileDescriptor(int value) : value_(value) {}
  FileDescriptor(const FileDescriptor&) = delete;
  FileDescriptor& operator=(const FileDescriptor&) = delete;
  ~FileDescriptor() {
    if (value_ >= 0) close(value_);
  }
  int get() const { return value_; }
  int Release() { return std::exchange(value_, -1); }

 private:
  int value_;
};

// DATA_LOSS if the bytes are not there or cannot be read; the message does not name the file.
absl::Status ReadAt(int file_descriptor, int64_t offset, int64_t bytes, char* to) {
  int64_t done = 0;
  while (done < bytes) {
    const ssize_t got = pread(file_descriptor, to + done, bytes - done, offset + done);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return absl::DataLossError(std::strerror(errno));
    if (got == 0) {
      return absl::DataLossError(absl::StrCat("ends at byte ", offset + done, ", want ", offset + bytes));
    }
    done += got;
  }
  return absl::OkStatus();
}

absl::Status WithPath(const absl::Status& status, absl::string_view path) {
  return absl::Status(status.code(), absl::StrCat(path, ": ", status.message()));
}

absl::Status WriteError(const std::string& path, int error) {
  const std::string message = absl::StrCat("cannot write ", path, ": ", std::strerror(error));
  switch (error) {
    case ENOENT:
    case ENOTDIR:
      return absl::NotFoundError(message);
    case EACCES:
    case EPERM:
    case EROFS:
      return absl::PermissionDeniedError(message);
    case ENOSPC:
    case EDQUOT:
    case EFBIG:
      return absl::ResourceExhaustedError(message);
    default:
      return absl::InternalError(message);
  }
}

// 0 or an errno.
int WriteAll(int file_descriptor, const void* data, int64_t bytes) {
  const char* from = static_cast<const char*>(data);
  while (bytes > 0) {
    const ssize_t written = write(file_descriptor, from, bytes);
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) return errno;
    from += written;
    bytes -= written;
  }
  return 0;
}

}  // namespace

absl::StatusOr<std::map<std::string, SafetensorsEntry>> ParseSafetensorsHeader(absl::string_view header_json,
                                                                               int64_t data_start,
                                                                               int64_t file_bytes) {
  if (data_start < 0 || data_start > file_bytes) {
    return absl::InvalidArgumentError(
        absl::StrCat("the data begin at byte ", data_start, " of a file of ", file_bytes));
  }
  // The format wants it; the parser would skip white space and a byte order mark.
  if (header_json.empty() || header_json[0] != '{') {
    return absl::InvalidArgumentError("header does not begin with '{'");
  }
  HeaderHandler handler;
  if (const absl::Status status = handler.Parse(header_json); !status.ok()) {
    return absl::InvalidArgumentError(absl::StrCat("header: ", status.message()));
  }
  std::map<std::string, SafetensorsEntry> entries = handler.TakeEntries();

  std::vector<std::map<std::string, SafetensorsEntry>::value_type*> in_order;
  for (auto& named : entries) in_order.push_back(&named);
  std::sort(in_order.begin(), in_order.end(), [](const auto* a, const auto* b) {
    return std::pair(a->second.file_offset, a->second.bytes) <
           std::pair(b->second.file_offset, b->second.bytes);
  });
  const int64_t data_bytes = file_bytes - data_start;
  int64_t covered =
      0;  // Every tensor must begin where the one before ended, and the last one end with the file.
  for (auto* named : in_order) {
    SafetensorsEntry& entry = named->second;
    if (entry.file_offset != covered) {
      return absl::InvalidArgumentError(
          absl::StrCat("tensor ", Quoted(named->first), " begins at data byte ", entry.file_offset, ", want ",
                       covered, entry.file_offset < covered ? ": tensors overlap" : ": a gap"));
    }
    covered += entry.bytes;  // No overflow: data_offsets held the sum.
    if (covered > data_bytes) {
      return absl::InvalidArgumentError(absl::StrCat("tensor ", Quoted(named->first), " ends at data byte ",
                                                     covered, ", but the file holds ", data_bytes,
                                                     " bytes of data"));
    }
    entry.file_offset += data_start;
  }
  if (covered != data_bytes) {
    return absl::InvalidArgumentError(absl::StrCat("the file holds ", data_bytes, " bytes of data, want ",
                                                   covered, ": bytes of no tensor at the end"));
  }
  return entries;
}

absl::StatusOr<SafetensorsReader> SafetensorsReader::Open(const std::string& path) {
  // O_NONBLOCK: a named pipe must be refused, not waited for.
  FileDescriptor file(open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  if (file.get() < 0) {
    const std::string message = absl::StrCat("cannot open ", path, ": ", std::strerror(errno));
    return errno == ENOENT || errno == ENOTDIR ? absl::NotFoundError(message)
                                               : absl::PermissionDeniedError(message);
  }
  struct stat info;
  if (fstat(file.get(), &info) != 0)
    return absl::DataLossError(absl::StrCat(path, ": ", std::strerror(errno)));
  if (!S_ISREG(info.st_mode)) return absl::InvalidArgumentError(absl::StrCat(path, ": not a regular file"));
  const int64_t file_bytes = info.st_size;
  if (file_bytes < kLengthBytes) {
    return absl::InvalidArgumentError(
        absl::StrCat(path, ": has ", file_bytes, " bytes, want at least ", kLengthBytes));
  }
  uint64_t header_bytes = 0;
  if (const absl::Status status = ReadAt(file.get(), 0, kLengthBytes, reinterpret_cast<char*>(&header_bytes));
      !status.ok()) {
    return WithPath(status, path);
  }
  const uint64_t limit = std::min(kMaxHeaderBytes, file_bytes - kLengthBytes);
  if (header_bytes > limit) {
    return absl::InvalidArgumentError(absl::StrCat(
        path, ": header has ", header_bytes, " bytes, want at most ", limit,
        limit == static_cast<uint64_t>(kMaxHeaderBytes) ? ""
                                                        : ": the file is truncated, or not safetensors"));
  }
  std::string header(header_bytes, '\0');
  if (const absl::Status status = ReadAt(file.get(), kLengthBytes, header_bytes, header.data());
      !status.ok()) {
    return WithPath(status, path);
  }
  auto entries =
      ParseSafetensorsHeader(header, kLengthBytes + static_cast<int64_t>(header_bytes), file_bytes);
  if (!entries.ok()) return WithPath(entries.status(), path);
  return SafetensorsReader(path, file.Release(), *std::move(entries));
}

SafetensorsReader::SafetensorsReader(std::string path, int file_descriptor,
                                     std::map<std::string, SafetensorsEntry> entries)
    : path_(std::move(path)), file_descriptor_(file_descriptor), entries_(std::move(entries)) {}

SafetensorsReader::SafetensorsReader(SafetensorsReader&& other) noexcept
    : path_(std::move(other.path_)),
      file_descriptor_(std::exchange(other.file_descriptor_, -1)),
      entries_(std::move(other.entries_)) {}

SafetensorsReader& SafetensorsReader::operator=(SafetensorsReader&& other) noexcept {
  std::swap(path_, other.path_);
  std::swap(file_descriptor_, other.file_descriptor_);
  std::swap(entries_, other.entries_);
  return *this;
}

SafetensorsReader::~SafetensorsReader() {
  if (file_descriptor_ >= 0) close(file_descriptor_);
}

absl::StatusOr<const SafetensorsEntry*> SafetensorsReader::Find(absl::string_view name) const {
  const auto found = entries_.find(std::string(name));
  if (found == entries_.end())
    return absl::NotFoundError(absl::StrCat(path_, " has no tensor ", Quoted(name)));
  return &found->second;
}

absl::Status SafetensorsReader::Read(const SafetensorsEntry& entry, void* to) const {
  return ReadRange(entry, 0, entry.bytes, to);
}

absl::Status SafetensorsReader::ReadRange(const SafetensorsEntry& entry, int64_t offset, int64_t bytes,
                                          void* to) const {
  DELTANET_CHECK(offset >= 0 && bytes >= 0 && bytes <= entry.bytes - offset, "a range within the entry");
  const absl::Status status =
      ReadAt(file_descriptor_, entry.file_offset + offset, bytes, static_cast<char*>(to));
  return status.ok() ? status : WithPath(status, path_);
}

absl::StatusOr<SafetensorsWriter> SafetensorsWriter::Create(const std::string& path,
                                                            const std::vector<Tensor>& tensors) {
  std::string header = "{";
  std::set<absl::string_view> names;
  int64_t end = 0;
  for (const Tensor& tensor : tensors) {
    if (tensor.name == kMetadata)
      return absl::InvalidArgumentError(absl::StrCat(kMetadata, " is no tensor's name"));
    if (!names.insert(tensor.name).second) {
      return absl::InvalidArgumentError(absl::StrCat("tensor ", Quoted(tensor.name), " is given twice"));
    }
    std::string name;
    try {
      name = nlohmann::json(tensor.name).dump();
    } catch (const nlohmann::json::type_error&) {
      return absl::InvalidArgumentError(absl::StrCat("tensor name ", Quoted(tensor.name), " is not UTF-8"));
    }
    const int64_t begin = end;
    end += NumElements(tensor.shape) * DTypeBytes(tensor.dtype);
    absl::StrAppend(&header, names.size() == 1 ? "" : ",", name, ":{\"dtype\":\"", TagOf(tensor.dtype),
                    "\",\"shape\":", ShapeString(tensor.shape), ",\"data_offsets\":[", begin, ",", end, "]}");
  }
  header.push_back('}');
  header.append((kLengthBytes - header.size() % kLengthBytes) % kLengthBytes, ' ');
  const uint64_t header_bytes = header.size();
  header.insert(0, reinterpret_cast<const char*>(&header_bytes), kLengthBytes);

  // Not mkstemp, which would leave the file readable by its owner alone. What a crash left behind is stepped
  // over.
  std::string temporary;
  int file_descriptor = -1;
  constexpr int kAttempts = 100;
  for (int i = 0; i < kAttempts && file_descriptor < 0; ++i) {
    temporary = absl::StrCat(path, ".tmp", i);
    file_descriptor = open(temporary.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    if (file_descriptor < 0 && errno != EEXIST) break;
  }
  if (file_descriptor < 0) return WriteError(temporary, errno);
  SafetensorsWriter writer(path, temporary, file_descriptor, end);
  if (const int error = WriteAll(file_descriptor, header.data(), header.size()); error != 0) {
    return WriteError(path, error);
  }
  return writer;
}

SafetensorsWriter::SafetensorsWriter(std::string path, std::string temporary, int file_descriptor,
                                     int64_t missing_bytes)
    : path_(std::move(path)),
      temporary_(std::move(temporary)),
      file_descriptor_(file_descriptor),
      missing_bytes_(missing_bytes) {}

SafetensorsWriter::SafetensorsWriter(SafetensorsWriter&& other) noexcept
    : path_(std::move(other.path_)),
      temporary_(std::move(other.temporary_)),
      file_descriptor_(std::exchange(other.file_descriptor_, -1)),
      missing_bytes_(other.missing_bytes_) {}

SafetensorsWriter::~SafetensorsWriter() {
  if (file_descriptor_ < 0) return;
  close(file_descriptor_);
  unlink(temporary_.c_str());
}

absl::Status SafetensorsWriter::Append(const void* data, int64_t bytes) {
  DELTANET_CHECK(bytes <= missing_bytes_, "no more than the tensors hold");
  if (const int error = WriteAll(file_descriptor_, data, bytes); error != 0) return WriteError(path_, error);
  missing_bytes_ -= bytes;
  return absl::OkStatus();
}

absl::Status SafetensorsWriter::Finish() {
  DELTANET_CHECK(missing_bytes_ == 0, "all that the tensors hold");
  int error = close(std::exchange(file_descriptor_, -1)) != 0 ? errno : 0;
  if (error == 0 && std::rename(temporary_.c_str(), path_.c_str()) != 0) error = errno;
  if (error == 0) return absl::OkStatus();
  unlink(temporary_.c_str());
  return WriteError(path_, error);
}

absl::Status WriteSafetensors(const std::string& path,
                              const std::vector<std::pair<std::string, TensorView>>& tensors) {
  std::vector<const std::pair<std::string, TensorView>*> in_order;
  for (const auto& tensor : tensors) {
    DELTANET_CHECK(tensor.second.device.type == DeviceType::kCpu, "tensors to be written are on the CPU");
    in_order.push_back(&tensor);
  }
  std::stable_sort(in_order.begin(), in_order.end(), [](const auto* a, const auto* b) {
    return DTypeBytes(a->second.dtype) > DTypeBytes(b->second.dtype);
  });
  std::vector<SafetensorsWriter::Tensor> described;
  for (const auto* tensor : in_order) {
    described.push_back({tensor->first, tensor->second.shape, tensor->second.dtype});
  }
  ASSIGN_OR_RETURN(SafetensorsWriter writer, SafetensorsWriter::Create(path, described));
  for (const auto* tensor : in_order) {
    RETURN_IF_ERROR(writer.Append(tensor->second.data, tensor->second.bytes()));
  }
  return writer.Finish();
}

}  // namespace deltanet
