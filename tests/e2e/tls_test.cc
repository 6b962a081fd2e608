// TLS and mutual TLS, with certificates that the openssl program makes.
#include "server/tls.h"

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/e2e/test_server.h"

namespace deltanet {
namespace {

using ::testing::HasSubstr;

// A directory with authorities "a" and "b", each with a certificate for 127.0.0.1: a.ca.pem, a.pem, a.key,
// ...
class Certificates {
 public:
  Certificates() {
    std::string directory = ::testing::TempDir() + "/tls.XXXXXX";
    EXPECT_NE(mkdtemp(directory.data()), nullptr);
    directory_ = directory;
    for (const std::string name : {"a", "b"}) {
      const std::string at = absl::StrCat(directory_, "/", name);
      Run(absl::StrCat(
          "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=", name,
          "-ca -keyout ", at, ".ca.key -out ", at, ".ca.pem"));
      Run(absl::StrCat("openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=", name,
                       " -keyout ", at, ".key -out ", at, ".csr"));
      std::ofstream(at + ".ext") << "subjectAltName=IP:127.0.0.1\n";
      Run(absl::StrCat("openssl x509 -req -days 2 -in ", at, ".csr -CA ", at, ".ca.pem -CAkey ", at,
                       ".ca.key -CAcreateserial -extfile ", at, ".ext -out ", at, ".pem"));
    }
  }
  ~Certificates() { std::filesystem::remove_all(directory_); }

  std::string Path(const std::string& name) const { return absl::StrCat(directory_, "/", name); }
  // Replaces one file by a copy of another, in one go.
  void Replace(const std::string& name, const std::string& by) const {
    std::filesystem::copy_file(Path(by), Path("new"));
    std::filesystem::rename(Path("new"), Path(name));
  }

 private:
  static void Run(const std::string& command) {
    EXPECT_EQ(std::system((command + " 2>/dev/null >/dev/null").c_str()), 0) << command;
  }

  std::string directory_;
};

class TlsTest : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    setenv("GRPC_VERBOSITY", "NONE", 1);  // Handshakes that fail are what is wanted here.
    certificates_ = new Certificates;
  }
  static void TearDownTestSuite() { delete certificates_; }

  static std::string Path(const std::string& name) { return certificates_->Path(name); }
  static ServerOptions Options(const TlsFiles& files) {
    ServerOptions options;
    options.tls = files;
    return options;
  }
  static absl::Status CallWith(const TestServer& server, const std::optional<TlsOptions>& tls) {
    const auto client = Client::Connect(server.target(), {.tls = tls, .timeout = absl::Seconds(10)});
    if (!client.ok()) return client.status();
    return client->ListModels().status();
  }

  static Certificates* certificates_;
};

Certificates* TlsTest::certificates_ = nullptr;

TEST_F(TlsTest, AClientThatTrustsTheAuthorityIsServed) {
  TestServer server(FakeModelOptions{}, Options({Path("a.pem"), Path("a.key"), ""}));
  EXPECT_TRUE(CallWith(server, TlsOptions{.ca = Path("a.ca.pem")}).ok());
  EXPECT_EQ(CallWith(server, TlsOptions{.ca = Path("b.ca.pem")}).code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(CallWith(server, std::nullopt).code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(server.Get("/readyz"), HasSubstr("HTTP/1.1 200")) << "probes need no certificate";
}

TEST_F(TlsTest, MutualTlsRefusesClientsWithoutAGoodCertificate) {
  TestServer server(FakeModelOptions{}, Options({Path("a.pem"), Path("a.key"), Path("a.ca.pem")}));
  const TlsOptions good{Path("a.ca.pem"), Path("a.pem"), Path("a.key")};
  EXPECT_TRUE(CallWith(server, good).ok());
  EXPECT_EQ(CallWith(server, TlsOptions{.ca = Path("a.ca.pem")}).code(), absl::StatusCode::kUnavailable);
  const TlsOptions foreign{Path("a.ca.pem"), Path("b.pem"), Path("b.key")};
  EXPECT_EQ(CallWith(server, foreign).code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(server.Get("/healthz"), HasSubstr("HTTP/1.1 200"));
}

TEST_F(TlsTest, RenewedFilesAreTakenUpAndOpenConnectionsGoOn) {
  for (const char* name : {".pem", ".key"}) {
    certificates_->Replace(absl::StrCat("live", name), absl::StrCat("a", name));
  }
  TestServer server(FakeModelOptions{}, Options({Path("live.pem"), Path("live.key"), ""}));
  const auto open = Client::Connect(server.target(), {.tls = TlsOptions{.ca = Path("a.ca.pem")}});
  ASSERT_TRUE(open.ok() && open->ListModels().ok());
  for (const char* name : {".key", ".pem"}) {
    certificates_->Replace(absl::StrCat("live", name), absl::StrCat("b", name));
  }
  // New connections until one finds the new certificate; the test's time limit ends it.
  while (!CallWith(server, TlsOptions{.ca = Path("b.ca.pem")}).ok()) {
  }
  EXPECT_FALSE(CallWith(server, TlsOptions{.ca = Path("a.ca.pem")}).ok());
  EXPECT_TRUE(open->ListModels().ok());
}

TEST_F(TlsTest, AHalfRenewedPairLeavesTheOldOneServed) {
  for (const char* name : {".pem", ".key"}) {
    certificates_->Replace(absl::StrCat("half", name), absl::StrCat("a", name));
  }
  TestServer server(FakeModelOptions{}, Options({Path("half.pem"), Path("half.key"), ""}));
  const TlsOptions trust_a{.ca = Path("a.ca.pem")}, trust_b{.ca = Path("b.ca.pem")};
  // For longer than it takes to look at the files, and for gRPC to look at what was made of them.
  const auto expect_the_old_one = [&](const char* what) {
    const absl::Time end = absl::Now() + absl::Seconds(3);
    while (absl::Now() < end && !HasFailure()) {
      EXPECT_TRUE(CallWith(server, trust_a).ok()) << what;
    }
  };
  certificates_->Replace("half.pem", "b.pem");
  expect_the_old_one("the new certificate and the old key");
  std::ofstream(Path("half.key")) << "-----BEGIN";
  expect_the_old_one("half a key");
  EXPECT_FALSE(CallWith(server, trust_b).ok());

  certificates_->Replace("half.key", "b.key");
  while (!CallWith(server, trust_b).ok()) {
  }
  EXPECT_FALSE(CallWith(server, trust_a).ok());
}

TEST_F(TlsTest, TheClientsRootsAreRenewedToo) {
  certificates_->Replace("roots.pem", "a.ca.pem");
  TestServer server(FakeModelOptions{}, Options({Path("a.pem"), Path("a.key"), Path("roots.pem")}));
  const TlsOptions client_a{Path("a.ca.pem"), Path("a.pem"), Path("a.key")};
  const TlsOptions client_b{Path("a.ca.pem"), Path("b.pem"), Path("b.key")};
  EXPECT_TRUE(CallWith(server, client_a).ok());
  EXPECT_FALSE(CallWith(server, client_b).ok());
  certificates_->Replace("roots.pem", "b.ca.pem");
  while (!CallWith(server, client_b).ok()) {
  }
  EXPECT_FALSE(CallWith(server, client_a).ok());
}

TEST_F(TlsTest, FilesThatDoNotFitTogetherAreNamed) {
  std::ofstream(Path("noise.pem")) << "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
  struct Case {
    TlsFiles files;
    std::string message;
  };
  for (const Case& c : std::vector<Case>{
           {{Path("a.pem"), "", ""}, Path("a.pem") + " is given as certificate without its key"},
           {{"", Path("a.key"), ""}, Path("a.key") + " is given as key without its certificate"},
           {{"", "", Path("a.ca.pem")}, Path("a.ca.pem") + " is given as the clients' roots without"},
           {{Path("none"), Path("a.key"), ""}, Path("none") + " cannot be read: No such file"},
           {{Path("noise.pem"), Path("a.key"), ""}, Path("noise.pem") + " holds no certificate"},
           {{Path("a.pem"), Path("a.pem"), ""}, Path("a.pem") + " holds no private key"},
           {{Path("a.pem"), Path("b.key"), ""}, Path("b.key") + " is not the key of the certificate in"},
           {{Path("a.pem"), Path("a.key"), Path("a.key")}, Path("a.key") + " holds no certificate"}}) {
    const absl::Status status = CheckTlsFiles(c.files);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(std::string(status.message()), HasSubstr(c.message));
    std::vector<NamedModel> models;
    models.push_back({"m", std::make_unique<FakeModel>(FakeModelOptions{})});
    EXPECT_EQ(Server::Start(Options(c.files), std::move(models)).status(), status);
  }
  EXPECT_TRUE(CheckTlsFiles({}).ok());
  EXPECT_TRUE(CheckTlsFiles({Path("a.pem"), Path("a.key"), Path("b.ca.pem")}).ok());
}

TEST_F(TlsTest, AClientsFilesAreNamedToo) {
  const auto none = Client::Connect("127.0.0.1:1", {.tls = TlsOptions{.ca = Path("none")}});
  EXPECT_THAT(std::string(none.status().message()), HasSubstr("cannot read " + Path("none")));
  const auto half = Client::Connect("127.0.0.1:1", {.tls = TlsOptions{.certificate = Path("a.pem")}});
  EXPECT_EQ(half.status().code(), absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace deltanet
