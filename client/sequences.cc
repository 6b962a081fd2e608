#include "client/sequences.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "model/base/check.h"
#include "model/base/safetensors.h"
#include "model/base/status_macros.h"

namespace deltanet {

absl::StatusOr<Sequences> Sequences::Of(const TensorView& tensor) {
  const size_t rank = tensor.dtype == DType::kInt64 ? 1 : 2;
  Sequences sequences;
  sequences.tensor_ = tensor;
  if (tensor.shape.size() == rank) {
    sequences.tokens_ = tensor.shape[0];
  } else if (tensor.shape.size() == rank + 1) {
    sequences.batched_ = true;
    sequences.count_ = tensor.shape[0];
    sequences.tokens_ = tensor.shape[1];
  } else {
    return absl::InvalidArgumentError(
        absl::StrCat("the input is ", DTypeName(tensor.dtype), ShapeString(tensor.shape), ", want ",
                     tensor.dtype == DType::kInt64 ? "[T] or [B,T]" : "[T,width] or [B,T,width]"));
  }
  return sequences;
}

TensorView Sequences::Slice(int64_t sequence, int64_t begin, int64_t length) const {
  DELTANET_CHECK(sequence >= 0 && sequence < count_ && begin >= 0 && length >= 0 && begin + length <= tokens_,
                 "a slice is out of range");
  TensorView slice = tensor_;
  if (batched_) slice.shape.erase(slice.shape.begin());
  slice.shape[0] = 1;
  const int64_t token_bytes = slice.bytes();
  slice.shape[0] = length;
  slice.data = static_cast<const char*>(tensor_.data) + (sequence * tokens_ + begin) * token_bytes;
  return slice;
}

std::vector<Chunk> CutChunks(int64_t tokens, const std::vector<int64_t>& lengths) {
  DELTANET_CHECK(!lengths.empty(), "no chunk lengths");
  std::vector<Chunk> chunks;
  int64_t begin = 0;
  do {
    const int64_t wanted = lengths[chunks.size() % lengths.size()];
    DELTANET_CHECK(wanted >= 1, "a chunk length is less than 1");
    const int64_t length = std::min(wanted, tokens - begin);
    chunks.push_back({begin, length});
    begin += length;
  } while (begin < tokens);
  return chunks;
}

OutputJoiner::OutputJoiner(int64_t sequences, bool batched) : batched_(batched), parts_(sequences) {}

absl::Status OutputJoiner::Add(int64_t sequence, int64_t output_position, const Tensor& output) {
  if (output.shape.size() != 2) {
    return absl::DataLossError(
        absl::StrCat("an output is ", ShapeString(output.shape), ", want [tokens,width]"));
  }
  if (std::exchange(started_, true)) {
    if (output.shape[1] != width_ || output.dtype != dtype_) {
      return absl::DataLossError(absl::StrCat("an output is of width ", output.shape[1], " and ",
                                              DTypeName(output.dtype), ", want ", width_, " and ",
                                              DTypeName(dtype_), " as before"));
    }
  } else {
    width_ = output.shape[1];
    dtype_ = output.dtype;
  }
  Part& part = parts_[sequence];
  if (std::exchange(part.started, true) && output_position != part.next_position) {
    return absl::DataLossError(absl::StrCat("sequence ", sequence, " has an output from position ",
                                            output_position, ", want ", part.next_position));
  }
  part.next_position = output_position + output.shape[0];
  part.tokens += output.shape[0];
  part.data += output.data;
  return absl::OkStatus();
}

absl::StatusOr<Tensor> OutputJoiner::Join() const {
  if (!started_) return absl::FailedPreconditionError("there is no output to join");
  Tensor joined;
  joined.dtype = dtype_;
  if (batched_) joined.shape.push_back(static_cast<int64_t>(parts_.size()));
  joined.shape.push_back(parts_[0].tokens);
  joined.shape.push_back(width_);
  for (size_t i = 0; i < parts_.size(); ++i) {
    if (parts_[i].tokens != parts_[0].tokens) {
      return absl::DataLossError(absl::StrCat("sequence ", i, " has ", parts_[i].tokens,
                                              " tokens of output, want ", parts_[0].tokens,
                                              " as sequence 0"));
    }
    joined.data += parts_[i].data;
  }
  return joined;
}

absl::StatusOr<Tensor> ReadTensor(const std::string& path, const std::string& name) {
  ASSIGN_OR_RETURN(const SafetensorsReader reader, SafetensorsReader::Open(path));
  ASSIGN_OR_RETURN(const SafetensorsEntry* const entry, reader.Find(name));
  Tensor tensor{entry->dtype, entry->shape, std::string(entry->bytes, '\0')};
  RETURN_IF_ERROR(reader.Read(*entry, tensor.data.data()));
  return tensor;
}

absl::Status WriteTensor(const std::string& path, const std::string& name, const Tensor& tensor) {
  return WriteSafetensors(path, {{name, tensor.view()}});
}

double Difference::relative() const {
  if (largest == 0) return 0;
  return magnitude == 0 ? std::numeric_limits<double>::infinity() : largest / magnitude;
}

absl::StatusOr<Difference> Compare(const Tensor& a, const Tensor& b) {
  for (const Tensor* tensor : {&a, &b}) {
    if (tensor->dtype == DType::kInt64) {
      return absl::InvalidArgumentError("a tensor is int64, want a dtype of floats");
    }
  }
  if (a.shape != b.shape) {
    return absl::InvalidArgumentError(
        absl::StrCat("shapes differ: ", ShapeString(a.shape), " and ", ShapeString(b.shape)));
  }
  const int64_t count = NumElements(a.shape);
  std::vector<double> values_a(count), values_b(count);
  ConvertElements(a.data.data(), a.dtype, values_a.data(), DType::kFloat64, count);
  ConvertElements(b.data.data(), b.dtype, values_b.data(), DType::kFloat64, count);
  Difference difference;
  for (int64_t i = 0; i < count; ++i) {
    const double x = values_a[i], y = values_b[i];
    for (const double value : {x, y}) {
      if (std::isfinite(value)) difference.magnitude = std::max(difference.magnitude, std::abs(value));
    }
    const double apart = x == y ? 0 : std::abs(x - y);
    difference.largest =
        std::max(difference.largest, std::isnan(apart) ? std::numeric_limits<double>::infinity() : apart);
  }
  return difference;
}

}  // namespace deltanet
