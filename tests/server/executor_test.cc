#include "server/executor.h"

#include <pthread.h>

#include <numeric>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "gtest/gtest.h"
#include "model/base/mutex.h"

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

TEST(ExecutorTest, OneThreadRunsTasksInTheirOrder) {
  std::vector<int> ran;
  {
    Executor executor("executor", 1);
    for (int i = 0; i < 1000; ++i) executor.Run([&ran, i] { ran.push_back(i); });
  }
  std::vector<int> expected(1000);
  std::iota(expected.begin(), expected.end(), 0);
  EXPECT_EQ(ran, expected);
}

TEST(ExecutorTest, TasksOfManyGiversAllRunOnTheThreadsOfTheExecutor) {
  constexpr int kGivers = 4, kTasks = 500;
  Mutex mutex;
  std::set<pthread_t> threads;
  int ran = 0;
  {
    Executor executor("executor", 2);
    std::vector<Thread> giving;
    for (int g = 0; g < kGivers; ++g) {
      giving.emplace_back("giver", [&] {
        for (int i = 0; i < kTasks; ++i) {
          executor.Run([&] {
            MutexLock lock(&mutex);
            threads.insert(pthread_self());
            ++ran;
          });
        }
      });
    }
    for (Thread& giver : giving) giver.Join();
  }
  EXPECT_EQ(ran, kGivers * kTasks);
  EXPECT_LE(threads.size(), 2u);
  EXPECT_EQ(threads.count(pthread_self()), 0u);
}

TEST(ExecutorTest, AThreadThatHasNothingToDoIsWoken) {
  Mutex mutex;
  CondVar changed;
  int ran = 0;
  Executor executor("executor", 1);
  for (int i = 1; i <= 200; ++i) {  // Each comes when the thread has run the one before, or is about to wait.
    executor.Run([&] {
      MutexLock lock(&mutex);
      ++ran;
      changed.NotifyAll();
    });
    MutexLock lock(&mutex);
    while (ran < i) changed.Wait(&mutex);
  }
}

TEST(ExecutorTest, TwoThreadsRunTwoTasksAtATime) {
  Mutex mutex;
  CondVar changed;
  int there = 0;
  Executor executor("executor", 2);
  for (int i = 0; i < 2; ++i) {
    executor.Run([&] {  // Ends only when the other one runs too.
      MutexLock lock(&mutex);
      ++there;
      changed.NotifyAll();
      while (there < 2) changed.Wait(&mutex);
    });
  }
}

TEST(ExecutorTest, ATaskMayGiveAnother) {
  bool ran = false;
  {
    Executor executor("executor", 1);
    executor.Run([&] { executor.Run([&] { ran = true; }); });
  }
  EXPECT_TRUE(ran);
}

}  // namespace
}  // namespace deltanet
