#include "client/flags.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace deltanet {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

class FlagsTest : public testing::Test {
 protected:
  FlagsTest() {
    flags_.Add("text", "TEXT", "some text", &text_);
    flags_.Add("number", "N", "a number", 1, &number_);
    flags_.Add("maybe", "N", "perhaps a number", 0, &maybe_);
    flags_.Add("large", "N", "a large number", &large_);
    flags_.AddRepeated("word", "WORD", "a word; repeat it for more", &words_);
    flags_.Add("list", "N[,N...]", "numbers", 1, &list_);
    flags_.Add("ratio", "X", "a ratio", &ratio_);
    flags_.Add("timeout", "TIME", "a time", &timeout_);
    flags_.Add("dtype", "a dtype", &dtype_);
    flags_.Add("verbose", "say more", &verbose_);
    flags_.AddChoice("side", {"left", "right"}, "a side", &side_);
  }

  std::string Error(const std::vector<std::string>& arguments) {
    const absl::Status status = flags_.Parse(arguments);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    return std::string(status.message());
  }

  FlagSet flags_{"program command", "Does something."};
  std::string text_ = "default text";
  int64_t number_ = 42;
  std::optional<int64_t> maybe_;
  std::optional<uint64_t> large_;
  std::vector<std::string> words_;
  std::vector<int64_t> list_ = {1, 2};
  double ratio_ = 0.5;
  absl::Duration timeout_ = absl::InfiniteDuration();
  DType dtype_ = DType::kFloat32;
  bool verbose_ = false;
  std::string side_ = "left";
};

TEST_F(FlagsTest, NothingGivenKeepsDefaults) {
  ASSERT_TRUE(flags_.Parse({}).ok());
  EXPECT_EQ(text_, "default text");
  EXPECT_EQ(number_, 42);
  EXPECT_FALSE(maybe_.has_value());
  EXPECT_FALSE(large_.has_value());
  EXPECT_THAT(words_, ElementsAre());
  EXPECT_FALSE(flags_.given("number"));
}

TEST_F(FlagsTest, ReadsEveryKind) {
  ASSERT_TRUE(flags_
                  .Parse({"--text",
                          "--dashes",
                          "--number=7",
                          "--maybe",
                          "0",
                          "--large",
                          "18446744073709551615",
                          "--word",
                          "a b",
                          "--word=",
                          "--list",
                          "3,1,4",
                          "--ratio=1e-4",
                          "--timeout",
                          "1.5s",
                          "--dtype",
                          "bfloat16",
                          "--verbose",
                          "--side",
                          "right"})
                  .ok());
  EXPECT_EQ(text_, "--dashes");
  EXPECT_EQ(number_, 7);
  EXPECT_EQ(maybe_, 0);
  EXPECT_EQ(large_, ~uint64_t{0});
  EXPECT_THAT(words_, ElementsAre("a b", ""));
  EXPECT_THAT(list_, ElementsAre(3, 1, 4));
  EXPECT_EQ(ratio_, 1e-4);
  EXPECT_EQ(timeout_, absl::Milliseconds(1500));
  EXPECT_EQ(dtype_, DType::kBFloat16);
  EXPECT_TRUE(verbose_);
  EXPECT_EQ(side_, "right");
  EXPECT_TRUE(flags_.given("number"));
}

TEST_F(FlagsTest, ValueMayBeEmptyOrHoldAnEqualsSign) {
  ASSERT_TRUE(flags_.Parse({"--text=a=b"}).ok());
  EXPECT_EQ(text_, "a=b");
  FlagSet flags("p", "s");
  flags.Add("text", "TEXT", "some text", &text_);
  ASSERT_TRUE(flags.Parse({"--text="}).ok());
  EXPECT_EQ(text_, "");
}

TEST_F(FlagsTest, ErrorsNameFlagValueAndWanted) {
  EXPECT_EQ(Error({"--nothing", "1"}), "unknown flag --nothing; see --help");
  EXPECT_EQ(Error({"stray"}), "unexpected argument 'stray'; see --help");
}

TEST_F(FlagsTest, MissingValue) { EXPECT_EQ(Error({"--number"}), "--number wants a value: N"); }

TEST_F(FlagsTest, RepeatedFlag) {
  EXPECT_EQ(Error({"--number", "1", "--number=2"}), "--number is given twice");
}

TEST_F(FlagsTest, ValueForASwitch) {
  EXPECT_EQ(Error({"--verbose=yes"}), "--verbose takes no value, found 'yes'");
}

struct BadValue {
  const char* flag;
  const char* value;
  const char* want;
};

class BadValueTest : public FlagsTest, public testing::WithParamInterface<BadValue> {};

TEST_P(BadValueTest, IsNamed) {
  const BadValue& bad = GetParam();
  EXPECT_THAT(Error({bad.flag, bad.value}),
              AllOf(HasSubstr(bad.flag), HasSubstr("'" + std::string(bad.value) + "'"), HasSubstr(bad.want)));
}

INSTANTIATE_TEST_SUITE_P(Kinds, BadValueTest,
                         testing::Values(BadValue{"--number", "0", "an integer of at least 1"},
                                         BadValue{"--number", "1.5", "an integer of at least 1"},
                                         BadValue{"--number", "", "an integer of at least 1"},
                                         BadValue{"--number", "99999999999999999999",
                                                  "an integer of at least 1"},
                                         BadValue{"--maybe", "-1", "an integer of at least 0"},
                                         BadValue{"--large", "-1", "at least 0 and below 2^64"},
                                         BadValue{"--large", "18446744073709551616", "below 2^64"},
                                         BadValue{"--list", "1,,2", "integers of at least 1"},
                                         BadValue{"--list", "1,0", "integers of at least 1"},
                                         BadValue{"--list", "", "integers of at least 1"},
                                         BadValue{"--ratio", "-0.1", "a number of at least 0"},
                                         BadValue{"--ratio", "nan", "a number of at least 0"},
                                         BadValue{"--ratio", "inf", "a number of at least 0"},
                                         BadValue{"--timeout", "10", "a time with its unit"},
                                         BadValue{"--timeout", "0s", "of more than 0"},
                                         BadValue{"--timeout", "-1s", "of more than 0"},
                                         BadValue{"--dtype", "int64", "float32, float16 or bfloat16"},
                                         BadValue{"--side", "up", "left or right"}));

TEST_F(FlagsTest, RequiredFlagsAndArgumentsMustBeGiven) {
  std::string id;
  flags_.Require("text");
  flags_.AddPositional("ID", "the thing", &id);
  EXPECT_EQ(Error({"x"}), "--text TEXT is missing");
  FlagSet other("p", "s");
  other.AddPositional("ID", "the thing", &id);
  EXPECT_EQ(other.Parse({}).message(), "ID is missing");
  ASSERT_TRUE(other.Parse({"thing"}).ok());
  EXPECT_EQ(id, "thing");
  EXPECT_EQ(other.Parse({"thing"}).message(), "unexpected argument 'thing'; see --help");
}

TEST_F(FlagsTest, HelpWinsOverErrors) {
  flags_.Require("text");
  ASSERT_TRUE(flags_.Parse({"--nothing", "--help"}).ok());
  EXPECT_TRUE(flags_.help_wanted());
}

TEST_F(FlagsTest, HelpSaysFlagsDefaultsAndWhatIsRequired) {
  std::string id;
  flags_.Require("text");
  flags_.AddPositional("ID", "the thing", &id);
  const std::string help = flags_.Help();
  EXPECT_THAT(help,
              AllOf(HasSubstr("Usage: program command --text TEXT [flags] ID"), HasSubstr("Does something."),
                    HasSubstr("some text (required)"), HasSubstr("a number (default 42)"),
                    HasSubstr("numbers (default 1,2)"), HasSubstr("a time (default none)"),
                    HasSubstr("--side left|right"), HasSubstr("--verbose\n      say more\n")));
}

}  // namespace
}  // namespace deltanet
