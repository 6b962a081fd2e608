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

// What a gRPC server listens with; errors as CheckTlsFiles. The files are read again every few seconds, so
// that a certificate can be renewed while the server runs: connections made after that see the new ones.
// Files that do not fit together then refuse new connections until they do.
absl::StatusOr<std::shared_ptr<grpc::ServerCredentials>> MakeServerCredentials(const TlsFiles& files);

}  // namespace deltanet

#endif  // DELTANET_SERVER_TLS_H_
