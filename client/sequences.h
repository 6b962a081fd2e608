// Cutting sequences along time, joining what comes back, and the files they lie in.
#ifndef DELTANET_CLIENT_SEQUENCES_H_
#define DELTANET_CLIENT_SEQUENCES_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "client/client.h"
#include "model/base/tensor_view.h"

namespace deltanet {

// The sequences of an input tensor: of ids [T] or [B, T], or of values [T, width] or [B, T, width]. Owns
// nothing.
class Sequences {
 public:
  // INVALID_ARGUMENT for another rank.
  static absl::StatusOr<Sequences> Of(const TensorView& tensor);

  bool batched() const { return batched_; }  // There is a B.
  int64_t count() const { return count_; }   // B, or 1.
  int64_t tokens() const { return tokens_; }
  // Tokens [begin, begin + length) of one sequence, as a sequence without a B.
  TensorView Slice(int64_t sequence, int64_t begin, int64_t length) const;

 private:
  TensorView tensor_;
  bool batched_ = false;
  int64_t count_ = 1;
  int64_t tokens_ = 0;
};

// A run of tokens.
struct Chunk {
  int64_t begin = 0;
  int64_t length = 0;
};

// Cuts `tokens` into runs of `lengths`, each at least 1, in turn, round and round; the last may be shorter.
// Without tokens there is one run of none.
std::vector<Chunk> CutChunks(int64_t tokens, const std::vector<int64_t>& lengths);

// Puts a stream's outputs together again. Not thread-safe.
class OutputJoiner {
 public:
  // `batched`: the result is [sequences, T', width]; otherwise sequences is 1 and it is [T', width].
  OutputJoiner(int64_t sequences, bool batched);

  // The next output of one sequence. DATA_LOSS if it is not [T', width], or begins elsewhere than where the
  // output before it has ended, or has another width or dtype.
  absl::Status Add(int64_t sequence, int64_t output_position, const Tensor& output);

  // FAILED_PRECONDITION if nothing was added; DATA_LOSS if the sequences differ in length.
  absl::StatusOr<Tensor> Join() const;

 private:
  struct Part {
    bool started = false;
    int64_t next_position = 0;
    int64_t tokens = 0;
    std::string data;
  };

  const bool batched_;
  std::vector<Part> parts_;
  bool started_ = false;
  DType dtype_ = DType::kFloat32;
  int64_t width_ = 0;
};

// Reads one tensor of a safetensors file; errors as SafetensorsReader.
absl::StatusOr<Tensor> ReadTensor(const std::string& path, const std::string& name);
// Writes a file of one tensor; errors as WriteSafetensors.
absl::Status WriteTensor(const std::string& path, const std::string& name, const Tensor& tensor);

// How far two tensors are apart.
struct Difference {
  double largest = 0;    // |a - b|; infinite where either is NaN, or infinities differ.
  double magnitude = 0;  // The largest finite |a| or |b|.

  double relative() const;  // largest / magnitude; 0 where both are 0.
};
// INVALID_ARGUMENT if the shapes differ or a tensor is not of floats.
absl::StatusOr<Difference> Compare(const Tensor& a, const Tensor& b);

}  // namespace deltanet

#endif  // DELTANET_CLIENT_SEQUENCES_H_
