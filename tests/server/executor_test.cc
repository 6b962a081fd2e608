#include "server/executor.h"

#include <pthread.h>

#include <string>
#include <utility>

#include "gtest/gtest.h"

namespace deltanet {
namespace {

TEST(ThreadTest, RunsUnderItsNameAndIsJoinedOnDestruction) {
  char name[16] = "";
  {
    Thread thread("a-rather-long-name", [&] { pthread_getname_np(pthread_self(), name, sizeof(name)); });
  }
  EXPECT_EQ(std::string(name), "a-rather-long-n");
}

TEST(ThreadTest, JoinAndMove) {
  int ran = 0;
  Thread thread("first", [&] { ++ran; });
  Thread moved = std::move(thread);
  moved.Join();
  EXPECT_EQ(ran, 1);
  moved.Join();     // No thread any more.
  Thread().Join();  // Never one.
}

}  // namespace
}  // namespace deltanet
