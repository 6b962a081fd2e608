#include "server/executor.h"

#include <pthread.h>

#include <utility>

namespace deltanet {

Thread::Thread(const std::string& name, absl::AnyInvocable<void()> body)
    : thread_([name = name.substr(0, 15), body = std::move(body)]() mutable {
        pthread_setname_np(pthread_self(), name.c_str());
        body();
      }) {}

Thread::~Thread() { Join(); }

void Thread::Join() {
  if (thread_.joinable()) thread_.join();
}

Executor::Executor(const std::string& name, int threads) {
  for (int i = 0; i < threads; ++i) threads_.emplace_back(name, [this] { Work(); });
}

Executor::~Executor() {
  {
    MutexLock lock(&mu_);
    stopping_ = true;
  }
  changed_.NotifyAll();
  for (Thread& thread : threads_) thread.Join();
}

void Executor::Run(absl::AnyInvocable<void()> task) {
  bool notify = false;
  {
    MutexLock lock(&mu_);
    tasks_.push_back(std::move(task));
    notify = idle_ > 0;  // Those that are awake look for more before they wait.
    if (notify) --idle_;
  }
  if (notify) changed_.NotifyOne();
}

void Executor::Work() {
  while (true) {
    absl::AnyInvocable<void()> task;
    {
      MutexLock lock(&mu_);
      while (tasks_.empty()) {
        if (stopping_) return;
        ++idle_;
        changed_.Wait(&mu_);
      }
      task = std::move(tasks_.front());
      tasks_.pop_front();
    }
    task();
  }
}

}  // namespace deltanet
