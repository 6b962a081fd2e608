#include "model/base/checkpoint.h"

#include <sys/stat.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <random>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/model/base/mutate.h"
#include "tests/model/base/unprivileged.h"

namespace deltanet {
namespace {

using testing::HasSubstr;

using Files = std::map<std::string, std::string>;

TEST(ParseCheckpointIndexTest, TakesTheMapAlone) {
  const auto files = ParseCheckpointIndex(
      R"({"metadata":{"total_size":12,"weight_map":{"x":[1]}},"weight_map":{"a":"one","b":"two"},"more":[null]})");
  ASSERT_TRUE(files.ok()) << files.status();
  EXPECT_EQ(*files, (Files{{"a", "one"}, {"b", "two"}}));
  EXPECT_EQ(*ParseCheckpointIndex(R"({"weight_map":{}})"), Files());
}

TEST(ParseCheckpointIndexTest, ReadsWhatIsWritten) {
  const Files files = {{"a", "model-00001-of-00002.safetensors"},
                       {"b \"c\"", "model-00002-of-00002.safetensors"}};
  const std::string json = CheckpointIndexJson(files, 1234);
  EXPECT_THAT(json, HasSubstr("\"total_size\": 1234"));
  EXPECT_EQ(*ParseCheckpointIndex(json), files);
}

struct BadIndex {
  const char* name;
  std::string json;
  const char* message;
};
class BadIndexTest : public testing::TestWithParam<BadIndex> {};

TEST_P(BadIndexTest, IsRefused) {
  const auto files = ParseCheckpointIndex(GetParam().json);
  EXPECT_EQ(files.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(files.status().message()), HasSubstr(GetParam().message));
}

INSTANTIATE_TEST_SUITE_P(
    Indices, BadIndexTest,
    testing::Values(
        BadIndex{"Empty", "", "not valid JSON at byte"},
        BadIndex{"Cut", R"({"weight_map":{"a":"b")", "not valid JSON at byte"},
        BadIndex{"Array", "[]", "found an array, want an object"},
        BadIndex{"Number", "7", "found 7, want an object"},
        BadIndex{"Deep", std::string(1000000, '['), "found an array"},
        BadIndex{"NoMap", R"({"metadata":{}})", "'weight_map' is missing, want an object"},
        BadIndex{"MapTwice", R"({"weight_map":{},"weight_map":{}})", "'weight_map' appears twice"},
        BadIndex{"MapArray", R"({"weight_map":[]})", "'weight_map' is an array, want an object"},
        BadIndex{"MapNull", R"({"weight_map":null})", "'weight_map' is null, want an object"},
        BadIndex{"TensorTwice", R"({"weight_map":{"a":"b","a":"b"}})", "tensor 'a' appears twice"},
        BadIndex{"FileNumber", R"({"weight_map":{"a":3}})", "tensor 'a' is in 3, want the name of a file"},
        BadIndex{"FileObject", R"({"weight_map":{"a":{"b":"c"}}})", "tensor 'a' is in an object, want"},
        BadIndex{"FileList", R"({"weight_map":{"a":["b"]}})", "tensor 'a' is in an array, want"},
        BadIndex{"FileEmpty", R"({"weight_map":{"a":""}})", "want the name of a file in the same directory"},
        BadIndex{"FileAbsolute", R"({"weight_map":{"a":"/etc/passwd"}})",
                 "tensor 'a' is in '/etc/passwd', want"},
        BadIndex{"FileAbove", R"({"weight_map":{"a":"../b"}})", "tensor 'a' is in '../b', want"},
        BadIndex{"FileBelow", R"({"weight_map":{"a":"b/c"}})", "tensor 'a' is in 'b/c', want"},
        BadIndex{"FileDirectory", R"({"weight_map":{"a":".."}})", "tensor 'a' is in '..', want"},
        BadIndex{"FileNul", R"({"weight_map":{"a":"b\u0000c"}})", "tensor 'a' is in 'b\\x00\\x63', want"}),
    [](const auto& info) { return info.param.name; });

TEST(ParseCheckpointIndexTest, SurvivesMutations) {
  const std::string valid = CheckpointIndexJson({{"a", "x.safetensors"}, {"b", "y.safetensors"}}, 9);
  std::mt19937 random(17);
  int accepted = 0, refused = 0;
  for (int i = 0; i < 10000; ++i) {
    const std::string json = Mutate(valid, valid.size(), &random);
    const auto files = ParseCheckpointIndex(json);
    if (!files.ok()) {
      ASSERT_EQ(files.status().code(), absl::StatusCode::kInvalidArgument) << json;
      ++refused;
      continue;
    }
    ++accepted;
    for (const auto& [tensor, file] : *files) {
      ASSERT_FALSE(file.empty() || file == "." || file == "..") << json;
      ASSERT_EQ(file.find('/'), std::string::npos) << json;
    }
  }
  EXPECT_GT(accepted, 100);
  EXPECT_GT(refused, 1000);
}

class CheckpointTest : public testing::Test {
 protected:
  CheckpointTest() {
    std::string pattern = testing::TempDir() + "/checkpoint_test.XXXXXX";
    directory_ = mkdtemp(pattern.data());
  }
  ~CheckpointTest() override { std::filesystem::remove_all(directory_); }

  std::string Path(const std::string& name) const { return directory_ + "/" + name; }
  // A file with float tensors of 3 elements: each tensor's first element says which it is.
  void WriteTensors(const std::string& file, const std::map<std::string, float>& tensors) {
    std::vector<std::vector<float>> values;
    std::vector<std::pair<std::string, TensorView>> views;
    values.reserve(tensors.size());
    for (const auto& [name, first] : tensors) {
      values.push_back({first, first + 1, first + 2});
      views.emplace_back(name, TensorView{values.back().data(), {3}, DType::kFloat32, {}});
    }
    ASSERT_TRUE(WriteSafetensors(Path(file), views).ok());
  }
  void WriteIndex(const Files& files) { WriteText(kCheckpointIndex, CheckpointIndexJson(files, 0)); }
  void WriteText(const std::string& file, const std::string& text) { std::ofstream(Path(file)) << text; }

  // Two shards and their index.
  void WriteSharded() {
    WriteTensors("one", {{"a", 10}, {"c", 30}});
    WriteTensors("two", {{"b", 20}});
    WriteIndex({{"a", "one"}, {"b", "two"}, {"c", "one"}});
  }
  absl::Status Refused() const {
    const absl::Status status = Checkpoint::Open(directory_).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr(directory_));
    return status;
  }

  std::string directory_;
};

void ExpectTensor(const Checkpoint& checkpoint, const std::string& name, float first) {
  const auto entry = checkpoint.Find(name);
  ASSERT_TRUE(entry.ok()) << entry.status();
  float values[3] = {};
  ASSERT_TRUE(checkpoint.Read(**entry, values).ok());
  EXPECT_EQ(values[0], first);
  float last = 0;
  ASSERT_TRUE(checkpoint.ReadRange(**entry, 8, 4, &last).ok());
  EXPECT_EQ(last, first + 2);
}

TEST_F(CheckpointTest, OneFile) {
  WriteTensors(kCheckpointFile, {{"a", 1}, {"b", 2}});
  auto checkpoint = Checkpoint::Open(directory_);
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  EXPECT_EQ(checkpoint->path(), Path(kCheckpointFile));
  EXPECT_EQ(checkpoint->entries().size(), 2u);
  ExpectTensor(*checkpoint, "a", 1);
  ExpectTensor(*checkpoint, "b", 2);
  const Checkpoint moved = *std::move(checkpoint);
  ExpectTensor(moved, "b", 2);
  const absl::Status missing = moved.Find("c").status();
  EXPECT_EQ(missing.code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(missing.message(), Path(kCheckpointFile) + " has no tensor 'c'");
}

TEST_F(CheckpointTest, SeveralFiles) {
  WriteSharded();
  WriteTensors("three", {{"a", 40}});  // Not in the index: not looked at.
  const auto checkpoint = Checkpoint::Open(directory_);
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  EXPECT_EQ(checkpoint->path(), Path(kCheckpointIndex));
  EXPECT_EQ(checkpoint->entries().size(), 3u);
  ExpectTensor(*checkpoint, "a", 10);
  ExpectTensor(*checkpoint, "b", 20);
  ExpectTensor(*checkpoint, "c", 30);
}

TEST_F(CheckpointTest, NeitherFormIsNotFound) {
  const absl::Status status = Checkpoint::Open(directory_).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(status.message()), HasSubstr(Path(kCheckpointFile)));
  EXPECT_THAT(std::string(status.message()), HasSubstr(kCheckpointIndex));
}

TEST_F(CheckpointTest, BothFormsAreRefused) {
  WriteSharded();
  WriteTensors(kCheckpointFile, {{"a", 1}});
  EXPECT_EQ(Refused().message(),
            directory_ + " has both model.safetensors and model.safetensors.index.json, want one");
}

TEST_F(CheckpointTest, AMissingFileIsNotFound) {
  WriteSharded();
  std::filesystem::remove(Path("two"));
  const absl::Status status = Checkpoint::Open(directory_).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(status.message()),
              HasSubstr(Path(kCheckpointIndex) + ": cannot open " + Path("two")));
}

TEST_F(CheckpointTest, IndexAndFilesMustAgree) {
  WriteSharded();
  WriteIndex({{"a", "one"}, {"b", "two"}, {"c", "one"}, {"d", "two"}});
  EXPECT_EQ(Refused().message(),
            Path(kCheckpointIndex) + ": tensor 'd' should be in " + Path("two") + ", which has none");
  WriteIndex({{"a", "one"}, {"b", "two"}});
  EXPECT_EQ(Refused().message(), Path("one") + " has tensor 'c', which model.safetensors.index.json has not");
  WriteSharded();
  WriteTensors("two", {{"a", 40}, {"b", 20}});
  EXPECT_EQ(Refused().message(),
            "tensor 'a' is in both " + Path("two") + " and " + Path("one") + ", want it in one");
}

TEST_F(CheckpointTest, ErrorsNameTheFile) {
  WriteSharded();
  WriteText("two", "short");
  EXPECT_THAT(std::string(Refused().message()), HasSubstr(Path("two") + ": has 5 bytes"));
  WriteText(kCheckpointIndex, R"({"weight_map":{"a":"../one"}})");
  EXPECT_THAT(std::string(Refused().message()),
              HasSubstr(Path(kCheckpointIndex) + ": tensor 'a' is in '../one'"));
  std::filesystem::remove(Path(kCheckpointIndex));
  std::filesystem::create_directory(Path(kCheckpointIndex));
  EXPECT_THAT(std::string(Refused().message()), HasSubstr(": not a regular file"));
}

TEST_F(CheckpointTest, PermissionDenied) {
  WriteSharded();
  ASSERT_EQ(chmod(Path("two").c_str(), 0), 0);
  ASSERT_EQ(chmod(directory_.c_str(), 0755), 0);
  absl::Status status;
  {
    const Unprivileged unprivileged;
    status = Checkpoint::Open(directory_).status();
  }
  EXPECT_EQ(status.code(), absl::StatusCode::kPermissionDenied) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr(Path("two")));
}

TEST_F(CheckpointTest, AFileThatShrinksIsDataLoss) {
  WriteSharded();
  const auto checkpoint = Checkpoint::Open(directory_);
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  const SafetensorsEntry& entry = **checkpoint->Find("b");
  ASSERT_EQ(truncate(Path("two").c_str(), entry.file_offset + 6), 0);
  float values[3];
  EXPECT_TRUE(checkpoint->ReadRange(entry, 2, 4, values).ok());
  const absl::Status lost = checkpoint->ReadRange(entry, 4, 8, values);
  EXPECT_EQ(lost.code(), absl::StatusCode::kDataLoss);
  EXPECT_EQ(lost.message(), absl::StrCat(Path("two"), ": ends at byte ", entry.file_offset + 6, ", want ",
                                         entry.file_offset + 12));
  ExpectTensor(*checkpoint, "a", 10);
}

}  // namespace
}  // namespace deltanet
