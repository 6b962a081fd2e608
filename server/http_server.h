// The plain HTTP side of the server: metrics for Prometheus, and two probes.
//
//   GET /metrics   the text format
//   GET /healthz   200 while the process runs
//   GET /readyz    200 while it takes requests, else 503
//
// (cpp-httplib and not prometheus::Exposer: its threads have stacks too small for a process that holds
// cuBLAS.)
#ifndef DELTANET_SERVER_HTTP_SERVER_H_
#define DELTANET_SERVER_HTTP_SERVER_H_

#include <functional>
#include <memory>
#include <string>

#include "absl/status/statusor.h"

namespace deltanet {

// Serves from Start until it is destroyed, on threads of its own; the handlers are called on those, several
// at a time.
class HttpServer {
 public:
  struct Handlers {
    std::function<std::string()> metrics;
    std::function<bool()> ready;
  };

  // Listens on host:port; port 0 picks a free one. UNAVAILABLE, naming both, if that cannot be had.
  static absl::StatusOr<std::unique_ptr<HttpServer>> Start(const std::string& host, int port,
                                                           Handlers handlers);
  ~HttpServer();

  int port() const;

 private:
  class Impl;
  explicit HttpServer(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace deltanet

#endif  // DELTANET_SERVER_HTTP_SERVER_H_
