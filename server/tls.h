// TLS from certificate files.
#ifndef DELTANET_SERVER_TLS_H_
#define DELTANET_SERVER_TLS_H_

#include <grpcpp/security/server_credentials.h>

#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace deltanet {

// Paths of PEM files; all empty: no TLS.
struct TlsFiles {
  std::string certificate;  // The server's, and those between it and a root.
  std::string key;          // Its private key, without a passphrase.
  std::string client_ca;    // Roots: clients must have a certificate that these vouch for. Empty: any client.
};

// The files are there and fit together: a certificate and its key (both or neither), roots only with those.
// INVALID_ARGUMENT names the file and what is wrong with it.
absl::Status CheckTlsFiles(const TlsFiles& files);

// What a gRPC server listens with, from files that may be replaced while it runs: connections made some
// seconds after a Refresh see the new ones. Thread-compatible. Outlives the gRPC server.
class TlsCertificates {
 public:
  // Errors as CheckTlsFiles.
  static absl::StatusOr<std::unique_ptr<TlsCertificates>> Load(const TlsFiles& files);
  ~TlsCertificates();

  std::shared_ptr<grpc::ServerCredentials> credentials() const;

  // Reads the files again and takes up what has changed. Files that CheckTlsFiles would refuse, as where one
  // of a pair is replaced before the other, are logged once, and those from before stay. May block, as files
  // do.
  void Refresh();

 private:
  class Impl;
  explicit TlsCertificates(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace deltanet

#endif  // DELTANET_SERVER_TLS_H_
