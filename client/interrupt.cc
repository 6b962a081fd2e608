#include "client/interrupt.h"

#include <fcntl.h>
#include <signal.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <utility>

#include "model/base/check.h"

namespace deltanet {
namespace {

// A signal handler may do little more than write to a pipe, which wakes the thread.
constexpr char kInterrupted = 'i', kEnd = 'e';
std::atomic<int> write_end{-1};
struct sigaction previous;

void Tell(char what) {
  while (::write(write_end.load(), &what, 1) < 0 && errno == EINTR) {
  }
}

void OnSignal(int /*signal*/) {
  const int saved = errno;
  Tell(kInterrupted);
  errno = saved;
}

}  // namespace

InterruptHandler::InterruptHandler(std::function<void()> on_interrupt)
    : on_interrupt_(std::move(on_interrupt)) {
  DELTANET_CHECK(write_end.load() == -1, "two interrupt handlers at a time");
  int ends[2];
  DELTANET_CHECK(::pipe2(ends, O_CLOEXEC) == 0, "no pipe for interrupts");
  read_end_ = ends[0];
  write_end = ends[1];
  thread_ = std::thread([this] {
    char what = kEnd;
    while (::read(read_end_, &what, 1) < 0 && errno == EINTR) {
    }
    if (what == kInterrupted) on_interrupt_();
  });
  struct sigaction action = {};
  action.sa_handler = OnSignal;
  action.sa_flags = SA_RESETHAND | SA_RESTART;
  DELTANET_CHECK(::sigaction(SIGINT, &action, &previous) == 0, "SIGINT cannot be handled");
}

InterruptHandler::~InterruptHandler() {
  ::sigaction(SIGINT, &previous, nullptr);
  Tell(kEnd);
  thread_.join();
  ::close(write_end.exchange(-1));
  ::close(read_end_);
}

}  // namespace deltanet
