// Ctrl-C as something that a command can act on.
#ifndef DELTANET_CLIENT_INTERRUPT_H_
#define DELTANET_CLIENT_INTERRUPT_H_

#include <functional>
#include <thread>

namespace deltanet {

// While this lives, the first SIGINT calls `on_interrupt`, on a thread of this class's, instead of ending the
// process; a second one ends it as ever. At most one at a time in a process. The destructor waits for the
// call to return, and puts back what was there before.
class InterruptHandler {
 public:
  explicit InterruptHandler(std::function<void()> on_interrupt);
  ~InterruptHandler();
  InterruptHandler(const InterruptHandler&) = delete;
  InterruptHandler& operator=(const InterruptHandler&) = delete;

 private:
  const std::function<void()> on_interrupt_;
  int read_end_;
  std::thread thread_;
};

}  // namespace deltanet

#endif  // DELTANET_CLIENT_INTERRUPT_H_
