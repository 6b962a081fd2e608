// The only place where the server makes threads.
#ifndef DELTANET_SERVER_EXECUTOR_H_
#define DELTANET_SERVER_EXECUTOR_H_

#include <deque>
#include <string>
#include <thread>
#include <vector>

#include "absl/functional/any_invocable.h"
#include "model/base/mutex.h"

namespace deltanet {

// A named thread that is joined on destruction: its owner sees to it that the body returns. Move-only.
class Thread {
 public:
  Thread() = default;
  // `name` (at most 15 characters are kept) shows in debuggers and in top.
  Thread(const std::string& name, absl::AnyInvocable<void()> body);
  Thread(Thread&&) = default;
  Thread& operator=(Thread&&) = default;
  ~Thread();

  void Join();  // Does nothing if there is no thread.

 private:
  std::thread thread_;
};

// Runs tasks on a few threads of its own, in the order in which they were given: for what would keep the
// thread that gives them too long. Thread-safe. Destruction runs what was given before, and joins.
class Executor {
 public:
  // `name` as Thread has it; at least 1 thread.
  Executor(const std::string& name, int threads);
  ~Executor();

  // Never blocks. A task may give others; none may block.
  void Run(absl::AnyInvocable<void()> task);

 private:
  void Work();

  Mutex mu_;
  CondVar changed_;
  std::deque<absl::AnyInvocable<void()>> tasks_ ABSL_GUARDED_BY(mu_);  // Oldest first.
  int idle_ ABSL_GUARDED_BY(mu_) = 0;  // Threads that wait and have not been notified.
  bool stopping_ ABSL_GUARDED_BY(mu_) = false;
  std::vector<Thread> threads_;  // Constant after construction.
};

}  // namespace deltanet

#endif  // DELTANET_SERVER_EXECUTOR_H_
