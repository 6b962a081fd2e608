#include "server/http_server.h"

#include <httplib.h>
#include <sched.h>

#include <utility>

#include "absl/strings/str_cat.h"
#include "server/executor.h"

namespace deltanet {

class HttpServer::Impl {
 public:
  explicit Impl(Handlers handlers) : handlers_(std::move(handlers)) {
    server_.new_task_queue = [] { return new httplib::ThreadPool(2); };
    // A client that is slow or stays connected holds one of the two threads no longer than this.
    server_.set_read_timeout(5);
    server_.set_write_timeout(5);
    server_.set_keep_alive_timeout(1);
    server_.set_payload_max_length(1024);
    // Not SO_REUSEPORT, the library's default: a second server on the same port shall fail, not share it.
    server_.set_socket_options([](socket_t socket) {
      const int on = 1;
      setsockopt(socket, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
    });
    server_.Get("/metrics", [this](const httplib::Request&, httplib::Response& response) {
      response.set_content(handlers_.metrics(), "text/plain; version=0.0.4; charset=utf-8");
    });
    server_.Get("/healthz", [](const httplib::Request&, httplib::Response& response) {
      response.set_content("ok\n", "text/plain");
    });
    server_.Get("/readyz", [this](const httplib::Request&, httplib::Response& response) {
      const bool ready = handlers_.ready();
      response.status = ready ? 200 : 503;
      response.set_content(ready ? "ready\n" : "not ready\n", "text/plain");
    });
  }

  ~Impl() {
    if (port_ > 0) server_.stop();
  }

  bool Listen(const std::string& host, int port) {
    if (port == 0) {
      port = server_.bind_to_any_port(host);
    } else if (!server_.bind_to_port(host, port)) {
      port = -1;
    }
    if (port <= 0) return false;
    port_ = port;
    thread_ = Thread("http", [this] { server_.listen_after_bind(); });
    // stop() does nothing before the thread has come this far, and there is no other sign of it.
    while (!server_.is_running()) sched_yield();
    return true;
  }

  int port() const { return port_; }

 private:
  const Handlers handlers_;
  httplib::Server server_;
  int port_ = 0;
  Thread thread_;  // Last: joined before the rest dies.
};

absl::StatusOr<std::unique_ptr<HttpServer>> HttpServer::Start(const std::string& host, int port,
                                                              Handlers handlers) {
  auto impl = std::make_unique<Impl>(std::move(handlers));
  if (!impl->Listen(host, port)) {
    return absl::UnavailableError(absl::StrCat("cannot listen for HTTP on ", host, ":", port));
  }
  return std::unique_ptr<HttpServer>(new HttpServer(std::move(impl)));
}

HttpServer::HttpServer(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
HttpServer::~HttpServer() = default;

int HttpServer::port() const { return impl_->port(); }

}  // namespace deltanet
