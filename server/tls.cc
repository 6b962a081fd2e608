#include "server/tls.h"

#include <fcntl.h>
#include <grpc/grpc_security_constants.h>
#include <grpcpp/security/tls_certificate_provider.h>
#include <grpcpp/security/tls_credentials_options.h>
#include <openssl/err.h>
#include <openssl/pem.h>
#include <openssl/x509.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "model/base/check.h"
#include "model/base/status_macros.h"
#include "server/log.h"

namespace deltanet {
namespace {

constexpr unsigned kWatchSeconds = 1;

struct Free {
  void operator()(FILE* file) const { std::fclose(file); }
  void operator()(BIO* bio) const { BIO_free(bio); }
  void operator()(X509* certificate) const { X509_free(certificate); }
  void operator()(EVP_PKEY* key) const { EVP_PKEY_free(key); }
};

absl::Status Bad(const std::string& path, absl::string_view what) {
  return absl::InvalidArgumentError(absl::StrCat(path, " ", what));
}

absl::StatusOr<std::string> Read(const std::string& path) {
  const std::unique_ptr<FILE, Free> file(std::fopen(path.c_str(), "r"));
  std::string text;
  char buffer[4096];
  size_t size = 0;
  while (file != nullptr && (size = std::fread(buffer, 1, sizeof(buffer), file.get())) > 0) {
    text.append(buffer, size);
  }
  if (file == nullptr || std::ferror(file.get())) {
    return Bad(path, absl::StrCat("cannot be read: ", std::strerror(errno)));
  }
  return text;
}

std::unique_ptr<BIO, Free> Open(const std::string& text) {
  return std::unique_ptr<BIO, Free>(BIO_new_mem_buf(text.data(), static_cast<int>(text.size())));
}

// The first certificate in `text`, which is the file's.
absl::StatusOr<std::unique_ptr<X509, Free>> ParseCertificate(const std::string& path,
                                                             const std::string& text) {
  std::unique_ptr<X509, Free> certificate(PEM_read_bio_X509(Open(text).get(), nullptr, nullptr, nullptr));
  if (certificate == nullptr) return Bad(path, "holds no certificate, want one in PEM");
  return certificate;
}

// No passphrase: nobody is there to type it.
int NoPassphrase(char*, int, int, void*) { return -1; }

absl::StatusOr<std::unique_ptr<EVP_PKEY, Free>> ParseKey(const std::string& path, const std::string& text) {
  std::unique_ptr<EVP_PKEY, Free> key(
      PEM_read_bio_PrivateKey(Open(text).get(), nullptr, &NoPassphrase, nullptr));
  if (key == nullptr) return Bad(path, "holds no private key, want one in PEM and without a passphrase");
  return key;
}

struct Contents {
  std::string certificate;
  std::string key;
  std::string client_ca;

  bool operator==(const Contents&) const = default;
};

absl::StatusOr<Contents> ReadAndCheckFiles(const TlsFiles& files) {
  Contents contents;
  if (files.certificate.empty() && files.key.empty()) {
    if (files.client_ca.empty()) return contents;
    return Bad(files.client_ca,
               "is given as the clients' roots without a certificate and a key, want all three");
  }
  if (files.key.empty()) return Bad(files.certificate, "is given as certificate without its key, want both");
  if (files.certificate.empty()) return Bad(files.key, "is given as key without its certificate, want both");
  ASSIGN_OR_RETURN(contents.certificate, Read(files.certificate));
  ASSIGN_OR_RETURN(const auto certificate, ParseCertificate(files.certificate, contents.certificate));
  ASSIGN_OR_RETURN(contents.key, Read(files.key));
  ASSIGN_OR_RETURN(const auto key, ParseKey(files.key, contents.key));
  if (X509_check_private_key(certificate.get(), key.get()) != 1) {
    return Bad(files.key, absl::StrCat("is not the key of the certificate in ", files.certificate));
  }
  if (!files.client_ca.empty()) {
    ASSIGN_OR_RETURN(contents.client_ca, Read(files.client_ca));
    RETURN_IF_ERROR(ParseCertificate(files.client_ca, contents.client_ca).status());
  }
  return contents;
}

absl::StatusOr<Contents> ReadFiles(const TlsFiles& files) {
  absl::StatusOr<Contents> contents = ReadAndCheckFiles(files);
  ERR_clear_error();  // gRPC would take what OpenSSL has left on this thread for its own.
  return contents;
}

// A file in memory, replaced in one go: what is under its path is the old content or the new one.
class SharedFile {
 public:
  ~SharedFile() {
    if (fd_ >= 0) close(fd_);
  }

  // Once there is content.
  std::string path() const { return absl::StrCat("/proc/self/fd/", fd_); }

  absl::Status Replace(const std::string& content) {
    const int fd = memfd_create("deltanet-tls", MFD_CLOEXEC);
    if (fd < 0) return Failed();
    if (write(fd, content.data(), content.size()) != static_cast<ssize_t>(content.size())) {
      const absl::Status status = Failed();
      close(fd);
      return status;
    }
    if (fd_ < 0) {
      fd_ = fd;
    } else {
      DELTANET_CHECK(dup3(fd, fd_, O_CLOEXEC) == fd_, "an open descriptor can be replaced");
      close(fd);
    }
    return absl::OkStatus();
  }

 private:
  static absl::Status Failed() {
    return absl::ResourceExhaustedError(
        absl::StrCat("cannot keep a certificate in memory: ", std::strerror(errno)));
  }

  int fd_ = -1;
};

}  // namespace

absl::Status CheckTlsFiles(const TlsFiles& files) { return ReadFiles(files).status(); }

class TlsCertificates::Impl {
 public:
  explicit Impl(const TlsFiles& files) : files_(files) {}

  absl::Status Load() {
    ASSIGN_OR_RETURN(const Contents contents, ReadFiles(files_));
    if (files_.certificate.empty()) {
      credentials_ = grpc::InsecureServerCredentials();
      return absl::OkStatus();
    }
    RETURN_IF_ERROR(Publish(contents));
    const bool asks_clients = !files_.client_ca.empty();
    grpc::experimental::TlsServerCredentialsOptions options(
        std::make_shared<grpc::experimental::FileWatcherCertificateProvider>(
            identity_.path(), identity_.path(), asks_clients ? client_ca_.path() : "", kWatchSeconds));
    options.watch_identity_key_cert_pairs();
    if (asks_clients) {
      options.watch_root_certs();
      options.set_cert_request_type(GRPC_SSL_REQUEST_AND_REQUIRE_CLIENT_CERTIFICATE_AND_VERIFY);
    }
    credentials_ = grpc::experimental::TlsServerCredentials(options);
    return absl::OkStatus();
  }

  const std::shared_ptr<grpc::ServerCredentials>& credentials() const { return credentials_; }

  void Refresh() {
    const absl::StatusOr<Contents> contents = ReadFiles(files_);
    absl::Status status = contents.status();
    if (contents.ok() && *contents != served_) {
      status = Publish(*contents);
      if (status.ok()) Log(LogLevel::kInfo, "tls_files_renewed");
    }
    if (!status.ok() && status != refused_) {
      Log(LogLevel::kWarning, "tls_files_refused", {{"message", std::string(status.message())}});
    }
    refused_ = status;
  }

 private:
  absl::Status Publish(const Contents& contents) {
    if (contents.client_ca != served_.client_ca) RETURN_IF_ERROR(client_ca_.Replace(contents.client_ca));
    // In one file, which gRPC reads twice (and again if it changed in between): it never sees half a pair.
    RETURN_IF_ERROR(identity_.Replace(absl::StrCat(contents.key, "\n", contents.certificate)));
    served_ = contents;
    return absl::OkStatus();
  }

  const TlsFiles files_;
  Contents served_;
  absl::Status refused_;  // Why what the last Refresh read is not served.
  // What gRPC watches.
  SharedFile identity_;
  SharedFile client_ca_;
  std::shared_ptr<grpc::ServerCredentials> credentials_;  // Shared as gRPC wants it.
};

absl::StatusOr<std::unique_ptr<TlsCertificates>> TlsCertificates::Load(const TlsFiles& files) {
  auto impl = std::make_unique<Impl>(files);
  RETURN_IF_ERROR(impl->Load());
  return std::unique_ptr<TlsCertificates>(new TlsCertificates(std::move(impl)));
}

TlsCertificates::TlsCertificates(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
TlsCertificates::~TlsCertificates() = default;

std::shared_ptr<grpc::ServerCredentials> TlsCertificates::credentials() const { return impl_->credentials(); }
void TlsCertificates::Refresh() { impl_->Refresh(); }

}  // namespace deltanet
