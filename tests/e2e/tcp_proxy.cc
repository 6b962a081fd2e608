#include "tests/e2e/tcp_proxy.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <vector>

#include "model/base/check.h"

namespace deltanet {
namespace {

sockaddr_in Loopback(int port) {
  sockaddr_in address = {};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<uint16_t>(port));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  return address;
}

// Closing it sends a reset instead of a regular end.
void ResetOnClose(int fd) {
  const linger at_once = {1, 0};
  setsockopt(fd, SOL_SOCKET, SO_LINGER, &at_once, sizeof(at_once));
}

bool SendAll(int fd, const char* data, ssize_t size) {
  while (size > 0) {
    const ssize_t sent = send(fd, data, size, MSG_NOSIGNAL);
    if (sent <= 0) return false;
    data += sent;
    size -= sent;
  }
  return true;
}

}  // namespace

TcpProxy::TcpProxy(int port) : target_(port) {
  listener_ = socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address = Loopback(0);
  socklen_t size = sizeof(address);
  DELTANET_CHECK(
      bind(listener_, reinterpret_cast<sockaddr*>(&address), size) == 0 && listen(listener_, 16) == 0 &&
          getsockname(listener_, reinterpret_cast<sockaddr*>(&address), &size) == 0 && pipe(stop_) == 0,
      "the proxy cannot listen");
  port_ = ntohs(address.sin_port);
  thread_ = std::thread([this] { Run(); });
}

TcpProxy::~TcpProxy() {
  close(stop_[1]);
  thread_.join();
  close(stop_[0]);
  close(listener_);
}

void TcpProxy::Run() {
  // The ends of connection i are 2i and 2i + 1.
  std::vector<int> ends;
  while (true) {
    std::vector<pollfd> polled = {{stop_[0], POLLIN, 0}, {listener_, POLLIN, 0}};
    for (const int fd : ends) polled.push_back({frozen_ ? -1 : fd, POLLIN, 0});
    poll(polled.data(), polled.size(), -1);
    if (polled[0].revents != 0) break;
    if (polled[1].revents != 0) {
      const int near = accept(listener_, nullptr, nullptr);
      const int far = socket(AF_INET, SOCK_STREAM, 0);
      const sockaddr_in address = Loopback(target_);
      if (connect(far, reinterpret_cast<const sockaddr*>(&address), sizeof(address)) != 0) {
        close(near);
        close(far);
        continue;
      }
      for (const int fd : {near, far}) {
        ResetOnClose(fd);
        ends.push_back(fd);
      }
    }
    for (size_t i = 2; i < polled.size(); ++i) {
      if (polled[i].revents == 0 || frozen_) continue;
      const size_t end = i - 2, other = end ^ 1;
      char buffer[16384];
      const ssize_t got = recv(ends[end], buffer, sizeof(buffer), 0);
      if (got > 0 && SendAll(ends[other], buffer, got)) continue;
      for (const size_t closed : {end, other}) {  // poll leaves a negative descriptor out.
        if (ends[closed] >= 0) close(ends[closed]);
        ends[closed] = -1;
      }
    }
  }
  for (const int fd : ends) {
    if (fd >= 0) close(fd);
  }
}

}  // namespace deltanet
