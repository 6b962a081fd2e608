// Continues a prompt token by token.
//
//   generate HOST:PORT
#include <cstdint>
#include <cstdio>
#include <vector>

#include "client/client.h"

int main(int argc, char** argv) {
  if (argc != 2) return 2;
  auto client = deltanet::Client::Connect(argv[1], {});
  if (!client.ok()) return 1;

  deltanet::GenerateOptions options;
  options.prompt = std::vector<int64_t>{1, 2, 3};  // With a tokenizer: "Once upon".
  options.max_tokens = 8;
  auto generated = client->Generate(options, [](const deltanet::Generated& part) {
    for (const deltanet::TokenResult& token : part.tokens) {
      std::printf("%lld ", static_cast<long long>(token.id));  // With a tokenizer: part.text.
    }
    std::fflush(stdout);
    return true;  // False cancels.
  });
  if (!generated.ok()) {
    std::fprintf(stderr, "%s\n", generated.status().ToString().c_str());
    return 1;
  }
  std::printf("\n%lld tokens in, %lld out\n", static_cast<long long>(generated->prompt_tokens),
              static_cast<long long>(generated->generated_tokens));
  return 0;
}
