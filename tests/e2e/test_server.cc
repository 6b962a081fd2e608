#include "tests/e2e/test_server.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <random>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "model/base/check.h"

namespace deltanet {

TestServer::TestServer(const FakeModels& models) : TestServer(models, ServerOptions()) {}
TestServer::TestServer(const FakeModelOptions& model) : TestServer(FakeModels{{"m", model}}) {}
TestServer::TestServer(const FakeModelOptions& model, const ServerOptions& options,
                       const std::string& tokenizer)
    : TestServer(FakeModels{{"m", model}}, options, tokenizer) {}

TestServer::TestServer(const FakeModels& models, const ServerOptions& options, const std::string& tokenizer) {
  std::vector<NamedModel> named;
  for (const auto& [name, model_options] : models) {
    auto model = std::make_unique<FakeModel>(model_options);
    models_.push_back(model.get());
    named.push_back({name, std::move(model)});
    if (!model_options.takes_tokens || tokenizer.empty()) continue;
    auto loaded = Tokenizer::Load(absl::StrCat(DELTANET_TESTDATA, "/tokenizer/", tokenizer));
    DELTANET_CHECK(loaded.ok(), "the test's tokenizer is not there");
    named.back().tokenizer = *std::move(loaded);
  }
  Start(std::move(named), options);
}

TestServer::TestServer(std::vector<NamedModel> models, const ServerOptions& options) {
  Start(std::move(models), options);
}

void TestServer::Start(std::vector<NamedModel> models, const ServerOptions& options) {
  absl::StatusOr<std::unique_ptr<Server>> server = Server::Start(options, std::move(models));
  DELTANET_CHECK(server.ok(), "the test's server does not start");
  server_ = *std::move(server);
  client_ = std::make_unique<Client>(Connect());
}

std::string TestServer::target() const { return absl::StrCat("127.0.0.1:", server_->port()); }

Client TestServer::Connect() const {
  absl::StatusOr<Client> client = Client::Connect(target(), {});
  DELTANET_CHECK(client.ok(), "the test's client does not connect");
  return *std::move(client);
}

std::string TestServer::Get(const std::string& path) const {
  const int fd = socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address = {};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<uint16_t>(server_->metrics_port()));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  std::string response;
  if (connect(fd, reinterpret_cast<sockaddr*>(&address), sizeof(address)) == 0) {
    const std::string request =
        absl::StrCat("GET ", path, " HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
    if (send(fd, request.data(), request.size(), MSG_NOSIGNAL) == static_cast<ssize_t>(request.size())) {
      char buffer[4096];
      for (ssize_t n = 0; (n = recv(fd, buffer, sizeof(buffer), 0)) > 0;) response.append(buffer, n);
    }
  }
  close(fd);
  return response;
}

double TestServer::Metric(const std::string& sample) const {
  const std::string text = Get("/metrics");
  for (absl::string_view line : absl::StrSplit(text, '\n')) {
    double value = 0;
    if (absl::ConsumePrefix(&line, absl::StrCat(sample, " ")) &&
        absl::SimpleAtod(absl::StripAsciiWhitespace(line), &value)) {
      return value;
    }
  }
  return -1;
}

std::vector<float> RandomValues(uint32_t seed, int64_t tokens, int64_t width) {
  std::mt19937 random(seed);
  std::uniform_real_distribution<float> uniform(-1, 1);
  std::vector<float> values(tokens * width);
  for (float& value : values) value = uniform(random);
  return values;
}

TensorView Tokens(const std::vector<float>& values, int64_t begin, int64_t end, int64_t width) {
  return {values.data() + begin * width, {end - begin, width}, DType::kFloat32, {}};
}

TensorView AllTokens(const std::vector<float>& values, int64_t width) {
  return Tokens(values, 0, static_cast<int64_t>(values.size()) / width, width);
}

std::vector<float> Floats(const Tensor& tensor) {
  std::vector<float> values(NumElements(tensor.shape));
  ConvertElements(tensor.data.data(), tensor.dtype, values.data(), DType::kFloat32,
                  static_cast<int64_t>(values.size()));
  return values;
}

void Append(const std::vector<float>& values, std::vector<float>* to) {
  to->insert(to->end(), values.begin(), values.end());
}

}  // namespace deltanet
