// The commands on a model over tokens.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/client/command_fixture.h"

namespace deltanet {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

class LettersCommandsTest : public CommandsTest {
 protected:
  LettersCommandsTest() : CommandsTest(FakeService::Model::kLetters) {}
};

TEST_F(LettersCommandsTest, ModelsSayWhatTheyGenerate) {
  EXPECT_THAT(
      Ask("models", {}).out,
      AllOf(HasSubstr("ids in [0,128): int64\n"), HasSubstr("at most 100 tokens a call, from text or ids\n"),
            HasSubstr("a text begins with 1\n"), HasSubstr("a text ends with   2\n")));
  FakeService values;
  EXPECT_THAT(RunCommand({"models", "--server", values.address()}).out, Not(HasSubstr("generates")));
}

}  // namespace
}  // namespace deltanet
