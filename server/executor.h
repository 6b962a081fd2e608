// The only place where the server makes threads.
#ifndef DELTANET_SERVER_EXECUTOR_H_
#define DELTANET_SERVER_EXECUTOR_H_

#include <string>
#include <thread>

#include "absl/functional/any_invocable.h"

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

}  // namespace deltanet

#endif  // DELTANET_SERVER_EXECUTOR_H_
