// What the tests of deltanet-client's commands have in common.
#ifndef DELTANET_TESTS_CLIENT_COMMAND_FIXTURE_H_
#define DELTANET_TESTS_CLIENT_COMMAND_FIXTURE_H_

#include <gtest/gtest.h>

#include <filesystem>
#include <sstream>
#include <string>
#include <vector>

#include "client/command.h"
#include "tests/client/fake_service.h"

namespace deltanet {

struct Result {
  int exit_status;
  std::string out;
  std::string err;
};

inline Result RunCommand(const std::vector<std::string>& arguments) {
  std::ostringstream out, err;
  const int exit_status = RunClient(arguments, {out, err});
  return {exit_status, out.str(), err.str()};
}

// Runs in a directory of its own, beside a fake server.
class CommandsTest : public testing::Test {
 protected:
  explicit CommandsTest(FakeService::Model model = FakeService::Model::kSum) : service_(model) {}

  void SetUp() override {
    directory_ = testing::TempDir() + "/commands_test_" +
                 testing::UnitTest::GetInstance()->current_test_info()->name();
    std::filesystem::remove_all(directory_);
    std::filesystem::create_directories(directory_);
  }
  void TearDown() override { std::filesystem::remove_all(directory_); }

  std::string Path(const std::string& name) const { return directory_ + "/" + name; }

  // `command` with --server and what else is given.
  Result Ask(const std::string& command, std::vector<std::string> rest) const {
    rest.insert(rest.begin(), {command, "--server", service_.address()});
    return RunCommand(rest);
  }
  // forward or stream, from input to `output`.
  Result AskWithFiles(const std::string& command, const std::string& output,
                      std::vector<std::string> rest) const {
    rest.insert(rest.end(), {"--input", Path("input"), "--output", Path(output)});
    return Ask(command, rest);
  }
  void MakeInput(const std::string& shape) {
    const Result made = Ask("make-input", {"--shape", shape, "--seed", "3", "--output", Path("input")});
    ASSERT_EQ(made.exit_status, 0) << made.err;
  }

  FakeService service_;
  std::string directory_;
};

}  // namespace deltanet

#endif  // DELTANET_TESTS_CLIENT_COMMAND_FIXTURE_H_
