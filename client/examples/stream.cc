// Streams a sequence chunk by chunk.
//
//   stream HOST:PORT
#include <algorithm>
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "client/client.h"

int main(int argc, char** argv) {
  if (argc != 2) return 2;
  auto client = deltanet::Client::Connect(argv[1], {});
  if (!client.ok()) return 1;

  const int tokens = 100, width = 64, chunk = 16;
  const std::vector<float> x(tokens * width, 0.5f);  // [T, d_model]
  auto stream = client->OpenStream({});
  deltanet::StreamResponse reply;
  for (int begin = 0; begin < tokens; begin += chunk) {
    const int size = std::min(chunk, tokens - begin);
    deltanet::StreamRequest request;
    request.input = {&x[begin * width], {size, width}, deltanet::DType::kFloat32};
    request.end_of_sequence = begin + size == tokens;
    if (!stream->Write(request) || !stream->Read(&reply) || !reply.status.ok()) break;
    std::printf("%lld outputs from position %lld on\n", static_cast<long long>(reply.output.shape[0]),
                static_cast<long long>(reply.output_position));
  }
  const absl::Status status = reply.status.ok() ? stream->Finish() : reply.status;
  if (!status.ok()) std::fprintf(stderr, "%s\n", status.ToString().c_str());
  return status.ok() ? 0 : 1;
}
