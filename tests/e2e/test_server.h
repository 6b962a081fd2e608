// The real Server on a free port of the loopback, over FakeModels or others, and what tests say to it.
#ifndef DELTANET_TESTS_E2E_TEST_SERVER_H_
#define DELTANET_TESTS_E2E_TEST_SERVER_H_

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/types/span.h"
#include "client/client.h"
#include "proto/wire.h"
#include "server/server.h"
#include "tests/testing/fake_model.h"

namespace deltanet {

constexpr int64_t kWidth = 3;        // Of FakeModel's input by default.
constexpr int64_t kOutputWidth = 8;  // Of its output.

// Models by name.
using FakeModels = std::vector<std::pair<std::string, FakeModelOptions>>;

// A server and a client of it. The fake models may be steered while they serve.
class TestServer {
 public:
  explicit TestServer(const FakeModels& models);
  // `tokenizer` is a folder of tests/testdata/tokenizer; models over ids have that one. Empty: none.
  TestServer(const FakeModels& models, const ServerOptions& options, const std::string& tokenizer = "");
  // One model, "m".
  explicit TestServer(const FakeModelOptions& model);
  TestServer(const FakeModelOptions& model, const ServerOptions& options, const std::string& tokenizer = "");

  // Models that are there.
  TestServer(std::vector<NamedModel> models, const ServerOptions& options);

  Server& server() { return *server_; }
  // Of those that this made.
  FakeModel& model(size_t number = 0) { return *models_[number]; }
  const Client& client() const { return *client_; }
  std::string target() const;
  Client Connect() const;

  // What GET `path` of the HTTP port answers: the whole response, headers included.
  std::string Get(const std::string& path) const;
  // The value of one sample of /metrics, e.g. `deltanet_sessions{model="m"}`; -1 if it is not there.
  double Metric(const std::string& sample) const;

 private:
  void Start(std::vector<NamedModel> models, const ServerOptions& options);

  std::vector<FakeModel*> models_;  // The server's.
  std::unique_ptr<Server> server_;
  std::unique_ptr<Client> client_;
};

// [tokens, width] random values.
std::vector<float> RandomValues(uint32_t seed, int64_t tokens, int64_t width = kWidth);

// Tokens [begin, end) of `values` as [T, width].
TensorView Tokens(const std::vector<float>& values, int64_t begin, int64_t end, int64_t width = kWidth);
TensorView AllTokens(const std::vector<float>& values, int64_t width = kWidth);

// The elements as float32, whatever their dtype.
std::vector<float> Floats(const Tensor& tensor);

void Append(const std::vector<float>& values, std::vector<float>* to);

}  // namespace deltanet

#endif  // DELTANET_TESTS_E2E_TEST_SERVER_H_
