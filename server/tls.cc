#include "server/tls.h"

#include <grpc/grpc_security_constants.h>
#include <grpcpp/security/tls_certificate_provider.h>
#include <grpcpp/security/tls_credentials_options.h>
#include <openssl/err.h>
#include <openssl/pem.h>
#include <openssl/x509.h>

#include <cerrno>
#include <cstdio>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "model/base/status_macros.h"

namespace deltanet {
namespace {

constexpr unsigned kRefreshSeconds = 2;

struct Free {
  void operator()(FILE* file) const { std::fclose(file); }
  void operator()(X509* certificate) const { X509_free(certificate); }
  void operator()(EVP_PKEY* key) const { EVP_PKEY_free(key); }
};

absl::Status Bad(const std::string& path, absl::string_view what) {
  return absl::InvalidArgumentError(absl::StrCat(path, " ", what));
}

absl::StatusOr<std::unique_ptr<FILE, Free>> Open(const std::string& path) {
  std::unique_ptr<FILE, Free> file(std::fopen(path.c_str(), "r"));
  if (file == nullptr) return Bad(path, absl::StrCat("cannot be read: ", std::strerror(errno)));
  return file;
}

// The first certificate in the file.
absl::StatusOr<std::unique_ptr<X509, Free>> ReadCertificate(const std::string& path) {
  ASSIGN_OR_RETURN(const auto file, Open(path));
  std::unique_ptr<X509, Free> certificate(PEM_read_X509(file.get(), nullptr, nullptr, nullptr));
  if (certificate == nullptr) return Bad(path, "holds no certificate, want one in PEM");
  return certificate;
}

// No passphrase: nobody is there to type it.
int NoPassphrase(char*, int, int, void*) { return -1; }

absl::StatusOr<std::unique_ptr<EVP_PKEY, Free>> ReadKey(const std::string& path) {
  ASSIGN_OR_RETURN(const auto file, Open(path));
  std::unique_ptr<EVP_PKEY, Free> key(PEM_read_PrivateKey(file.get(), nullptr, &NoPassphrase, nullptr));
  if (key == nullptr) return Bad(path, "holds no private key, want one in PEM and without a passphrase");
  return key;
}

absl::Status CheckFiles(const TlsFiles& files) {
  if (files.certificate.empty() && files.key.empty()) {
    if (files.client_ca.empty()) return absl::OkStatus();
    return Bad(files.client_ca,
               "is given as the clients' roots without a certificate and a key, want all three");
  }
  if (files.key.empty()) return Bad(files.certificate, "is given as certificate without its key, want both");
  if (files.certificate.empty()) return Bad(files.key, "is given as key without its certificate, want both");
  ASSIGN_OR_RETURN(const auto certificate, ReadCertificate(files.certificate));
  ASSIGN_OR_RETURN(const auto key, ReadKey(files.key));
  if (X509_check_private_key(certificate.get(), key.get()) != 1) {
    return Bad(files.key, absl::StrCat("is not the key of the certificate in ", files.certificate));
  }
  if (!files.client_ca.empty()) RETURN_IF_ERROR(ReadCertificate(files.client_ca).status());
  return absl::OkStatus();
}

}  // namespace

absl::Status CheckTlsFiles(const TlsFiles& files) {
  const absl::Status status = CheckFiles(files);
  ERR_clear_error();  // gRPC would take what OpenSSL has left on this thread for its own.
  return status;
}

absl::StatusOr<std::shared_ptr<grpc::ServerCredentials>> MakeServerCredentials(const TlsFiles& files) {
  RETURN_IF_ERROR(CheckTlsFiles(files));
  if (files.certificate.empty()) return grpc::InsecureServerCredentials();
  grpc::experimental::TlsServerCredentialsOptions options(
      std::make_shared<grpc::experimental::FileWatcherCertificateProvider>(files.key, files.certificate,
                                                                           files.client_ca, kRefreshSeconds));
  options.watch_identity_key_cert_pairs();
  if (!files.client_ca.empty()) {
    options.watch_root_certs();
    options.set_cert_request_type(GRPC_SSL_REQUEST_AND_REQUIRE_CLIENT_CERTIFICATE_AND_VERIFY);
  }
  return grpc::experimental::TlsServerCredentials(options);
}

}  // namespace deltanet
