#include "model/base/safetensors.h"

#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <csignal>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/model/base/mutate.h"
#include "tests/model/base/unprivileged.h"

namespace deltanet {
namespace {

using testing::HasSubstr;

void WriteBytes(const std::string& path, const std::string& bytes) {
  std::ofstream(path, std::ios::binary).write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
}
std::string ReadBytes(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

// A file's bytes: length, header, data.
std::string File(const std::string& header, const std::string& data) {
  const uint64_t length = header.size();
  return std::string(reinterpret_cast<const char*>(&length), 8) + header + data;
}

class SafetensorsTest : public testing::Test {
 protected:
  SafetensorsTest() {
    std::string pattern = testing::TempDir() + "/safetensors_test.XXXXXX";
    directory_ = mkdtemp(pattern.data());
    path_ = directory_ + "/file.safetensors";
  }
  ~SafetensorsTest() override { std::filesystem::remove_all(directory_); }

  int64_t FilesInDirectory() const {
    return std::distance(std::filesystem::directory_iterator(directory_),
                         std::filesystem::directory_iterator());
  }

  std::string directory_;
  std::string path_;
};

// A valid header over 24 bytes of data, and its parts.
constexpr char kHeader[] =
    R"({"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]},)"
    R"("b":{"dtype":"I64","shape":[],"data_offsets":[16,24]}})";

std::string TensorHeader(const std::string& fields) { return "{\"a\":{" + fields + "}}"; }

TEST(ParseSafetensorsHeaderTest, ValidHeader) {
  const auto entries = ParseSafetensorsHeader(kHeader, 1000, 1024);
  ASSERT_TRUE(entries.ok()) << entries.status();
  ASSERT_EQ(entries->size(), 2u);
  const SafetensorsEntry& a = entries->at("a");
  EXPECT_EQ(a.dtype, DType::kFloat32);
  EXPECT_EQ(a.shape, Shape({2, 2}));
  EXPECT_EQ(a.file_offset, 1000);
  EXPECT_EQ(a.bytes, 16);
  const SafetensorsEntry& b = entries->at("b");
  EXPECT_EQ(b.dtype, DType::kInt64);
  EXPECT_EQ(b.shape, Shape());
  EXPECT_EQ(b.file_offset, 1016);
  EXPECT_EQ(b.bytes, 8);
}

TEST(ParseSafetensorsHeaderTest, EmptyTensorsAndNoTensors) {
  EXPECT_TRUE(ParseSafetensorsHeader("{}", 10, 10).ok());
  EXPECT_TRUE(ParseSafetensorsHeader("{}   ", 10, 10).ok());  // Writers pad with spaces.
  const auto entries = ParseSafetensorsHeader(
      R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[0,7],"data_offsets":[0,0]},)"
      R"("c":{"dtype":"F16","shape":[0],"data_offsets":[4,4]}})",
      8, 12);
  ASSERT_TRUE(entries.ok()) << entries.status();
  EXPECT_EQ(entries->at("b").bytes, 0);
}

struct BadHeader {
  const char* name;
  std::string header;
  const char* message;
};
class BadHeaderTest : public testing::TestWithParam<BadHeader> {};

// Over 16 bytes of data.
TEST_P(BadHeaderTest, IsRefused) {
  const auto entries = ParseSafetensorsHeader(GetParam().header, 100, 116);
  EXPECT_EQ(entries.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(entries.status().message()), HasSubstr(GetParam().message));
}

INSTANTIATE_TEST_SUITE_P(
    Headers, BadHeaderTest,
    testing::Values(
        BadHeader{"Empty", "", "does not begin with '{'"},
        BadHeader{"Space", " {}", "does not begin with '{'"},
        BadHeader{"ByteOrderMark", "\xef\xbb\xbf{}", "does not begin with '{'"},
        BadHeader{"Array", "[]", "does not begin with '{'"},
        BadHeader{"Cut", R"({"a":)", "not valid JSON at byte"},
        BadHeader{"TwoValues", "{}{}", "not valid JSON at byte"},
        BadHeader{"NotUtf8", "{\"\xff\xfe\":{}}", "not valid JSON at byte"},
        BadHeader{"Comment", "{/**/}", "not valid JSON at byte"},
        BadHeader{"NestedArrays", TensorHeader(R"("dtype":"F32","shape":)" + std::string(1000000, '[')),
                  "shape has an array"},
        BadHeader{"NestedObjects", TensorHeader(R"("dtype":)" + std::string(1000000, '{')),
                  "dtype is an object"},
        BadHeader{"TensorNull", R"({"a":null})", "tensor 'a': found null, want an object"},
        BadHeader{"TensorArray", R"({"a":[1]})", "tensor 'a': found an array, want an object"},
        BadHeader{"RepeatedTensor",
                  R"({"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},)"
                  R"("a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}})",
                  "tensor 'a' appears twice"},
        BadHeader{"RepeatedKey",
                  TensorHeader(R"("dtype":"F32","dtype":"F32","shape":[4],"data_offsets":[0,16])"),
                  "dtype appears twice"},
        BadHeader{"RepeatedShape",
                  TensorHeader(R"("dtype":"F32","shape":[4],"shape":[4],"data_offsets":[0,16])"),
                  "shape appears twice"},
        BadHeader{"RepeatedOffsets",
                  TensorHeader(R"("dtype":"F32","shape":[4],"data_offsets":[0,16],"data_offsets":[0,16])"),
                  "data_offsets appears twice"},
        BadHeader{"UnknownKey", TensorHeader(R"("dtype":"F32","shape":[4],"data_offsets":[0,16],"x":1)"),
                  "tensor 'a': unknown key 'x', want dtype, shape or data_offsets"},
        BadHeader{"NoDtype", TensorHeader(R"("shape":[4],"data_offsets":[0,16])"), "has no dtype"},
        BadHeader{"NoShape", TensorHeader(R"("dtype":"F32","data_offsets":[0,16])"), "has no shape"},
        BadHeader{"NoOffsets", TensorHeader(R"("dtype":"F32","shape":[4])"), "has no data_offsets"},
        BadHeader{"DtypeUnsupported", TensorHeader(R"("dtype":"I8","shape":[16],"data_offsets":[0,16])"),
                  "tensor 'a': dtype is 'I8', want F32, F16, BF16, F64 or I64"},
        BadHeader{"DtypeNumber", TensorHeader(R"("dtype":1,"shape":[4],"data_offsets":[0,16])"),
                  "dtype is 1"},
        BadHeader{"ShapeNumber", TensorHeader(R"("dtype":"F32","shape":4,"data_offsets":[0,16])"),
                  "shape has 4"},
        BadHeader{"ShapeNegative", TensorHeader(R"("dtype":"F32","shape":[-4],"data_offsets":[0,16])"),
                  "shape has -4, want a list of integers of at least 0"},
        BadHeader{"ShapeReal", TensorHeader(R"("dtype":"F32","shape":[4.0],"data_offsets":[0,16])"),
                  "shape has 4.0"},
        BadHeader{"ShapeString", TensorHeader(R"("dtype":"F32","shape":["4"],"data_offsets":[0,16])"),
                  "shape has '4'"},
        BadHeader{"ShapeHuge",
                  TensorHeader(R"("dtype":"F32","shape":[9223372036854775808],"data_offsets":[0,16])"),
                  "number 9223372036854775808 is too large"},
        BadHeader{"ShapeHuger",
                  TensorHeader(R"("dtype":"F32","shape":[18446744073709551616],"data_offsets":[0,16])"),
                  "shape has 18446744073709551616"},
        BadHeader{"NumberOutOfRange", TensorHeader(R"("dtype":"F32","shape":[1e999],"data_offsets":[0,16])"),
                  "number out of range at byte"},
        BadHeader{"ProductOverflows",  // 2^62 elements, times 4 bytes: 0 in 64 bits.
                  TensorHeader(R"("dtype":"F32","shape":[2147483648,2147483648],"data_offsets":[0,0])"),
                  "shape [2147483648,2147483648] is too large"},
        BadHeader{"ProductOverflowsBeforeZero",
                  TensorHeader(R"("dtype":"F32","shape":[4294967296,4294967296,0],"data_offsets":[0,0])"),
                  "is too large"},
        BadHeader{"OffsetsOne", TensorHeader(R"("dtype":"F32","shape":[4],"data_offsets":[16])"),
                  "data_offsets has 1 numbers, want 2"},
        BadHeader{"OffsetsThree", TensorHeader(R"("dtype":"F32","shape":[4],"data_offsets":[0,16,16])"),
                  "data_offsets has more than 2 numbers"},
        BadHeader{"OffsetsReal", TensorHeader(R"("dtype":"F32","shape":[4],"data_offsets":[0,16.5])"),
                  "data_offsets has 16.5"},
        BadHeader{"OffsetsNegative", TensorHeader(R"("dtype":"F32","shape":[4],"data_offsets":[-16,0])"),
                  "data_offsets has -16, want two integers of at least 0"},
        BadHeader{"OffsetsBackwards", TensorHeader(R"("dtype":"F32","shape":[4],"data_offsets":[16,0])"),
                  "end before they begin"},
        BadHeader{"BytesDisagree", TensorHeader(R"("dtype":"F16","shape":[4],"data_offsets":[0,16])"),
                  "data_offsets [0,16] hold 16 bytes, want 8 for shape [4] in F16"},
        BadHeader{"BeyondTheFile", TensorHeader(R"("dtype":"F32","shape":[5],"data_offsets":[0,20])"),
                  "tensor 'a' ends at data byte 20, but the file holds 16 bytes of data"},
        BadHeader{
            "FarBeyondTheFile",
            TensorHeader(
                R"("dtype":"F32","shape":[1],"data_offsets":[9223372036854775803,9223372036854775807])"),
            "a gap"},
        BadHeader{
            "HugeTensor",
            TensorHeader(
                R"("dtype":"F64","shape":[1152921504606846975],"data_offsets":[0,9223372036854775800])"),
            "but the file holds 16 bytes"},
        BadHeader{"Overlap",
                  R"({"a":{"dtype":"F32","shape":[3],"data_offsets":[0,12]},)"
                  R"("b":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}})",
                  "tensor 'b' begins at data byte 8, want 12: tensors overlap"},
        BadHeader{"SameRange",
                  R"({"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},)"
                  R"("b":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}})",
                  "tensors overlap"},
        BadHeader{"Gap",
                  R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},)"
                  R"("b":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}})",
                  "tensor 'b' begins at data byte 8, want 4: a gap"},
        BadHeader{"TrailingBytes", TensorHeader(R"("dtype":"F32","shape":[3],"data_offsets":[0,12])"),
                  "the file holds 16 bytes of data, want 12"},
        BadHeader{"MetadataString", R"({"__metadata__":"pt"})", "__metadata__ is 'pt', want an object"},
        BadHeader{"MetadataNumber", R"({"__metadata__":{"a":1}})", "__metadata__ has 1, want a string"},
        BadHeader{"MetadataNested", R"({"__metadata__":{"a":{}}})",
                  "__metadata__ has an object, want a string"},
        BadHeader{"MetadataTwice", R"({"__metadata__":{},"__metadata__":{}})", "__metadata__ appears twice"},
        BadHeader{"MetadataKeyTwice", R"({"__metadata__":{"a":"","a":""}})",
                  "__metadata__ key 'a' appears twice"}),
    [](const auto& info) { return info.param.name; });

TEST(ParseSafetensorsHeaderTest, RankIsBounded) {
  std::string ones = "1";
  for (int64_t i = 1; i < SafetensorsReader::kMaxRank; ++i) ones += ",1";
  const auto header = [](const std::string& shape) {
    return TensorHeader(R"("dtype":"F32","data_offsets":[0,4],"shape":[)" + shape + "]");
  };
  EXPECT_TRUE(ParseSafetensorsHeader(header(ones), 100, 104).ok());
  const auto one_more = ParseSafetensorsHeader(header(ones + ",1"), 100, 104);
  EXPECT_EQ(one_more.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(one_more.status().message()), HasSubstr("shape has more than 32 numbers"));
}

TEST(ParseSafetensorsHeaderTest, DataMustBeginWithinTheFile) {
  EXPECT_EQ(ParseSafetensorsHeader("{}", 11, 10).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(ParseSafetensorsHeader("{}", -1, 10).status().code(), absl::StatusCode::kInvalidArgument);
}

TEST(ParseSafetensorsHeaderTest, HostileNamesAreEscapedAndCutInMessages) {
  const auto entries = ParseSafetensorsHeader("{\"\\n" + std::string(100000, 'x') + "\":1}", 100, 116);
  EXPECT_LT(entries.status().message().size(), 300u);
  EXPECT_THAT(std::string(entries.status().message()), HasSubstr("'\\nxxx"));
}

TEST(ParseSafetensorsHeaderTest, SurvivesMutations) {
  std::mt19937 random(3);
  const std::string valid = kHeader;
  int accepted = 0, refused = 0;
  for (int i = 0; i < 20000; ++i) {
    const std::string header = Mutate(valid, valid.size(), &random);
    const auto entries = ParseSafetensorsHeader(header, 1000, 1024);
    if (!entries.ok()) {
      ASSERT_EQ(entries.status().code(), absl::StatusCode::kInvalidArgument) << header;
      ++refused;
      continue;
    }
    ++accepted;
    int64_t bytes = 0;
    for (const auto& [name, entry] : *entries) {
      ASSERT_GE(entry.file_offset, 1000) << header;
      ASSERT_LE(entry.file_offset + entry.bytes, 1024) << header;
      ASSERT_EQ(entry.bytes, NumElements(entry.shape) * DTypeBytes(entry.dtype)) << header;
      bytes += entry.bytes;
    }
    ASSERT_EQ(bytes, 24) << header;
  }
  EXPECT_GT(accepted, 100);
  EXPECT_GT(refused, 10000);
}

TEST_F(SafetensorsTest, RoundTrip) {
  const float floats[] = {1, 2, 3, 4, 5, 6};
  const uint16_t halves[] = {0x3c00, 0x4000, 0x7c00};
  const double doubles[] = {0.1};
  const int64_t ids[] = {7, -1};
  const std::string odd_name = "odd \"name\"\n\xc3\xa9";
  ASSERT_TRUE(WriteSafetensors(path_, {{"halves", {halves, {3}, DType::kFloat16, {}}},
                                       {"floats", {floats, {2, 3}, DType::kFloat32, {}}},
                                       {odd_name, {ids, {2, 1}, DType::kInt64, {}}},
                                       {"brain", {halves, {1, 3}, DType::kBFloat16, {}}},
                                       {"scalar", {doubles, {}, DType::kFloat64, {}}},
                                       {"empty", {nullptr, {0, 5}, DType::kFloat32, {}}}})
                  .ok());
  EXPECT_EQ(FilesInDirectory(), 1);
  const auto reader = SafetensorsReader::Open(path_);
  ASSERT_TRUE(reader.ok()) << reader.status();
  EXPECT_EQ(reader->path(), path_);
  EXPECT_EQ(reader->entries().size(), 6u);
  for (const auto& [name, entry] : reader->entries()) {
    EXPECT_EQ(entry.file_offset % DTypeBytes(entry.dtype), 0) << name;  // Aligned.
  }
  const auto expect = [&](const std::string& name, DType dtype, const Shape& shape, const void* bytes) {
    const auto entry = reader->Find(name);
    ASSERT_TRUE(entry.ok()) << entry.status();
    EXPECT_EQ((*entry)->dtype, dtype);
    EXPECT_EQ((*entry)->shape, shape);
    std::string data((*entry)->bytes, '\0');
    ASSERT_TRUE(reader->Read(**entry, data.data()).ok());
    EXPECT_EQ(data, std::string(static_cast<const char*>(bytes), data.size())) << name;
  };
  expect("halves", DType::kFloat16, {3}, halves);
  expect("floats", DType::kFloat32, {2, 3}, floats);
  expect(odd_name, DType::kInt64, {2, 1}, ids);
  expect("brain", DType::kBFloat16, {1, 3}, halves);
  expect("scalar", DType::kFloat64, {}, doubles);
  expect("empty", DType::kFloat32, {0, 5}, "");

  const auto missing = reader->Find("flots");
  EXPECT_EQ(missing.status().code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(missing.status().message()), HasSubstr("'flots'"));
  EXPECT_THAT(std::string(missing.status().message()), HasSubstr(path_));
}

TEST_F(SafetensorsTest, ReadsWhatTheReferenceWriterWrote) {
  const auto reader = SafetensorsReader::Open(std::string(DELTANET_TESTDATA) +
                                              "/golden/transformer_deltanet_causal/golden.safetensors");
  ASSERT_TRUE(reader.ok()) << reader.status();
  ASSERT_EQ(reader->entries().size(), 3u);
  const auto state = reader->Find("state");
  ASSERT_TRUE(state.ok()) << state.status();
  EXPECT_EQ((*state)->shape, Shape({6, 3, 1, 64, 64}));
  std::vector<float> values(NumElements((*state)->shape));
  ASSERT_TRUE(reader->Read(**state, values.data()).ok());
  EXPECT_TRUE(AllFinite(values.data(), DType::kFloat32, static_cast<int64_t>(values.size())));
}

TEST_F(SafetensorsTest, AnOpenFileStaysReadableWhenReplaced) {
  const float before = 1, after = 2;
  ASSERT_TRUE(WriteSafetensors(path_, {{"x", {&before, {1}, DType::kFloat32, {}}}}).ok());
  auto reader = SafetensorsReader::Open(path_);
  ASSERT_TRUE(reader.ok());
  ASSERT_TRUE(WriteSafetensors(path_, {{"x", {&after, {1}, DType::kFloat32, {}}}}).ok());
  float value = 0;
  ASSERT_TRUE(reader->Read(reader->entries().at("x"), &value).ok());
  EXPECT_EQ(value, before);

  auto other = SafetensorsReader::Open(path_);
  ASSERT_TRUE(other.ok());
  *reader = *std::move(other);
  const SafetensorsReader moved = *std::move(reader);
  ASSERT_TRUE(moved.Read(moved.entries().at("x"), &value).ok());
  EXPECT_EQ(value, after);
}

TEST_F(SafetensorsTest, OpenNamesWhatIsNotThere) {
  const auto reader = SafetensorsReader::Open(path_);
  EXPECT_EQ(reader.status().code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(reader.status().message()), HasSubstr(path_));
}

TEST_F(SafetensorsTest, OpenRefusesWhatIsNoRegularFile) {
  EXPECT_EQ(SafetensorsReader::Open(directory_).status().code(), absl::StatusCode::kInvalidArgument);
  ASSERT_EQ(mkfifo(path_.c_str(), 0600), 0);
  EXPECT_EQ(SafetensorsReader::Open(path_).status().code(),
            absl::StatusCode::kInvalidArgument);  // Does not hang.
}

TEST_F(SafetensorsTest, PermissionDenied) {
  WriteBytes(path_, File("{}", ""));
  ASSERT_EQ(chmod(path_.c_str(), 0), 0);
  ASSERT_EQ(chmod(directory_.c_str(), 0555), 0);
  absl::Status opened, written;
  {
    const Unprivileged unprivileged;
    opened = SafetensorsReader::Open(path_).status();
    written = WriteSafetensors(path_, {});
  }
  EXPECT_EQ(opened.code(), absl::StatusCode::kPermissionDenied) << opened;
  EXPECT_EQ(written.code(), absl::StatusCode::kPermissionDenied) << written;
  ASSERT_EQ(chmod(directory_.c_str(), 0755), 0);
}

TEST_F(SafetensorsTest, TruncatedAnywhereIsRefused) {
  const std::string bytes = File(kHeader, std::string(24, 'x'));
  WriteBytes(path_, bytes);
  EXPECT_TRUE(SafetensorsReader::Open(path_).ok());
  for (size_t size = 0; size < bytes.size(); ++size) {
    WriteBytes(path_, bytes.substr(0, size));
    const auto reader = SafetensorsReader::Open(path_);
    ASSERT_EQ(reader.status().code(), absl::StatusCode::kInvalidArgument) << size;
    ASSERT_THAT(std::string(reader.status().message()), HasSubstr(path_));
  }
  WriteBytes(path_, bytes + "x");
  EXPECT_EQ(SafetensorsReader::Open(path_).status().code(), absl::StatusCode::kInvalidArgument);
}

TEST_F(SafetensorsTest, HeaderLengthIsCheckedBeforeItIsAllocated) {
  for (const uint64_t length : {uint64_t{3}, uint64_t{1} << 40, uint64_t{1} << 63, ~uint64_t{0}}) {
    WriteBytes(path_, std::string(reinterpret_cast<const char*>(&length), 8) + "{}");
    EXPECT_EQ(SafetensorsReader::Open(path_).status().code(), absl::StatusCode::kInvalidArgument) << length;
  }
  // Within the file (a sparse one), but above the bound.
  const uint64_t length = SafetensorsReader::kMaxHeaderBytes + 1;
  WriteBytes(path_, std::string(reinterpret_cast<const char*>(&length), 8));
  ASSERT_EQ(truncate(path_.c_str(), 2 * SafetensorsReader::kMaxHeaderBytes), 0);
  const auto reader = SafetensorsReader::Open(path_);
  EXPECT_EQ(reader.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(reader.status().message()),
              HasSubstr("header has 104857601 bytes, want at most 104857600"));
}

TEST_F(SafetensorsTest, AFileThatShrinksIsDataLoss) {
  WriteBytes(path_, File(kHeader, std::string(24, 'x')));
  const auto reader = SafetensorsReader::Open(path_);
  ASSERT_TRUE(reader.ok());
  ASSERT_EQ(truncate(path_.c_str(), 8 + sizeof(kHeader) - 1 + 20), 0);
  char data[24];
  EXPECT_TRUE(reader->Read(reader->entries().at("a"), data).ok());
  const absl::Status lost = reader->Read(reader->entries().at("b"), data);
  EXPECT_EQ(lost.code(), absl::StatusCode::kDataLoss);
  EXPECT_THAT(std::string(lost.message()), HasSubstr(path_));
}

TEST_F(SafetensorsTest, WriteRefusesBadNames) {
  const float x = 1;
  const TensorView view = {&x, {1}, DType::kFloat32, {}};
  EXPECT_EQ(WriteSafetensors(path_, {{"x", view}, {"x", view}}).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(WriteSafetensors(path_, {{"__metadata__", view}}).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(WriteSafetensors(path_, {{"\xff", view}}).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(FilesInDirectory(), 0);
}

TEST_F(SafetensorsTest, WriteNeedsItsDirectory) {
  EXPECT_EQ(WriteSafetensors(directory_ + "/none/file", {}).code(), absl::StatusCode::kNotFound);
}

TEST_F(SafetensorsTest, WriteOverADirectoryIsInternalAndLeavesNothingBehind) {
  ASSERT_EQ(mkdir(path_.c_str(), 0755), 0);
  EXPECT_EQ(WriteSafetensors(path_, {}).code(), absl::StatusCode::kInternal);
  EXPECT_EQ(FilesInDirectory(), 1);
}

TEST_F(SafetensorsTest, WriteStepsOverWhatACrashLeft) {
  WriteBytes(path_ + ".tmp0", "half a file");
  ASSERT_TRUE(WriteSafetensors(path_, {}).ok());
  EXPECT_TRUE(SafetensorsReader::Open(path_).ok());
  EXPECT_EQ(ReadBytes(path_ + ".tmp0"), "half a file");
}

TEST_F(SafetensorsTest, AFullDiskIsResourceExhaustedAndChangesNothing) {
  WriteBytes(path_, "as it was");
  const std::vector<float> values(100000);
  rlimit saved;
  ASSERT_EQ(getrlimit(RLIMIT_FSIZE, &saved), 0);
  const rlimit small = {4096, saved.rlim_max};
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &small), 0);
  const absl::Status full = WriteSafetensors(path_, {{"x", {values.data(), {100000}, DType::kFloat32, {}}}});
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &saved), 0);
  std::signal(SIGXFSZ, handler);
  EXPECT_EQ(full.code(), absl::StatusCode::kResourceExhausted) << full;
  EXPECT_EQ(ReadBytes(path_), "as it was");
  EXPECT_EQ(FilesInDirectory(), 1);
}

TEST_F(SafetensorsTest, WritesInPieces) {
  const float floats[] = {1, 2, 3, 4, 5, 6};
  const std::vector<SafetensorsWriter::Tensor> tensors = {{"a", {2, 2}, DType::kFloat32},
                                                          {"b", {2}, DType::kFloat32}};
  WriteBytes(path_, "as it was");
  {
    auto dropped = SafetensorsWriter::Create(path_, tensors);
    ASSERT_TRUE(dropped.ok()) << dropped.status();
    ASSERT_TRUE(dropped->Append(floats, 10).ok());
    EXPECT_EQ(FilesInDirectory(), 2);
  }
  EXPECT_EQ(FilesInDirectory(), 1);
  EXPECT_EQ(ReadBytes(path_), "as it was");

  auto writer = SafetensorsWriter::Create(path_, tensors);
  ASSERT_TRUE(writer.ok()) << writer.status();
  const char* const bytes = reinterpret_cast<const char*>(floats);
  ASSERT_TRUE(writer->Append(bytes, 7).ok());
  SafetensorsWriter moved = *std::move(writer);
  ASSERT_TRUE(moved.Append(bytes + 7, 17).ok());
  EXPECT_EQ(ReadBytes(path_), "as it was");
  ASSERT_TRUE(moved.Finish().ok());
  EXPECT_EQ(FilesInDirectory(), 1);
  const std::string in_pieces = ReadBytes(path_);
  ASSERT_TRUE(WriteSafetensors(path_, {{"a", {floats, {2, 2}, DType::kFloat32, {}}},
                                       {"b", {floats + 4, {2}, DType::kFloat32, {}}}})
                  .ok());
  EXPECT_EQ(in_pieces, ReadBytes(path_));
}

TEST_F(SafetensorsTest, SurvivesMutatedFiles) {
  std::mt19937 random(4);
  const std::string valid = File(kHeader, std::string(24, 'x'));
  int accepted = 0, refused = 0;
  for (int i = 0; i < 3000; ++i) {
    WriteBytes(path_, Mutate(valid, i % 2 == 0 ? 40 : valid.size(), &random));
    const auto reader = SafetensorsReader::Open(path_);
    if (!reader.ok()) {
      ASSERT_EQ(reader.status().code(), absl::StatusCode::kInvalidArgument) << reader.status();
      ++refused;
      continue;
    }
    ++accepted;
    for (const auto& [name, entry] : reader->entries()) {
      std::string data(entry.bytes, '\0');
      ASSERT_TRUE(reader->Read(entry, data.data()).ok()) << name;
    }
  }
  EXPECT_GT(accepted, 10);
  EXPECT_GT(refused, 1000);
}

}  // namespace
}  // namespace deltanet
