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

}  // namespace deltanet
