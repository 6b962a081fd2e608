// How likely each id of a sequence is after those before it.
//
//   score HOST:PORT
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <vector>

#include "client/client.h"

int main(int argc, char** argv) {
  if (argc != 2) return 2;
  auto client = deltanet::Client::Connect(argv[1], {});
  if (!client.ok()) return 1;

  const std::vector<int64_t> ids = {1, 2, 3, 4, 5};
  auto scores = client->Score(ids, /*top_tokens=*/0, {});
  if (!scores.ok()) {
    std::fprintf(stderr, "%s\n", scores.status().ToString().c_str());
    return 1;
  }
  double total = 0;
  for (size_t i = 0; i < scores->log_probs.size(); ++i) {
    std::printf("%lld: %.2f\n", static_cast<long long>(ids[scores->output_position + i]),
                scores->log_probs[i]);
    total += scores->log_probs[i];
  }
  std::printf("perplexity %.0f\n", std::exp(-total / static_cast<double>(scores->log_probs.size())));
  return 0;
}
