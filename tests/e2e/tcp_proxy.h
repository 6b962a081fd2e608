// A TCP proxy on a free port of the loopback, for tests of connections that die in unfriendly ways.
#ifndef DELTANET_TESTS_E2E_TCP_PROXY_H_
#define DELTANET_TESTS_E2E_TCP_PROXY_H_

#include <atomic>
#include <thread>

namespace deltanet {

// Forwards each connection to `port`, both ways. Destroying it resets all of them.
class TcpProxy {
 public:
  explicit TcpProxy(int port);
  ~TcpProxy();

  int port() const { return port_; }
  // From now on nothing is forwarded any more, and no connection is closed: as if a cable had been pulled.
  void Freeze() { frozen_ = true; }

 private:
  void Run();

  const int target_;
  int port_ = 0;
  int listener_ = -1;
  int stop_[2] = {-1, -1};  // A pipe; closing the second end stops the thread.
  std::atomic<bool> frozen_{false};
  std::thread thread_;
};

}  // namespace deltanet

#endif  // DELTANET_TESTS_E2E_TCP_PROXY_H_
