// Element types, devices, and views of memory that somebody else owns: the vocabulary in which the rooms
// speak of tensors, so that LibTorch's headers stay out of every header.
#ifndef DELTANET_MODEL_BASE_TENSOR_VIEW_H_
#define DELTANET_MODEL_BASE_TENSOR_VIEW_H_

#include <cstdint>
#include <string>

#include "absl/container/inlined_vector.h"
#include "absl/strings/string_view.h"

namespace deltanet {

enum class DType : uint8_t { kFloat32, kFloat16, kBFloat16, kFloat64, kInt64 };

// Bytes of one element.
int64_t DTypeBytes(DType dtype);
// "float32", "float16", "bfloat16", "float64", "int64".
absl::string_view DTypeName(DType dtype);

enum class DeviceType : uint8_t { kCpu, kCuda };

struct Device {
  DeviceType type = DeviceType::kCpu;
  int index = 0;  // Of CUDA devices; 0 for the CPU.

  friend bool operator==(const Device&, const Device&) = default;
};

// "cpu", "cuda:0".
std::string DeviceName(const Device& device);

using Shape = absl::InlinedVector<int64_t, 4>;

// Product of the sizes; 1 for a scalar. The caller knows that it does not overflow.
int64_t NumElements(const Shape& shape);
// "[8,128,64]".
std::string ShapeString(const Shape& shape);

// A dense row-major tensor that is only looked at; owns nothing.
struct TensorView {
  const void* data = nullptr;
  Shape shape;
  DType dtype = DType::kFloat32;
  Device device;

  int64_t bytes() const { return NumElements(shape) * DTypeBytes(dtype); }
};

// The same, to be written to.
struct MutableTensorView {
  void* data = nullptr;
  Shape shape;
  DType dtype = DType::kFloat32;
  Device device;

  operator TensorView() const { return {data, shape, dtype, device}; }
};

// Copies `count` elements between two CPU buffers, converting between float32, float16, bfloat16 and float64
// (round to nearest even; what is too large becomes infinite, NaN stays NaN). int64 only to int64. The
// buffers may be unaligned and must not overlap. Thread-safe.
void ConvertElements(const void* from, DType from_dtype, void* to, DType to_dtype, int64_t count);

// False if one of `count` elements on the CPU is infinite or NaN. The buffer may be unaligned. Thread-safe.
bool AllFinite(const void* data, DType dtype, int64_t count);

}  // namespace deltanet

#endif  // DELTANET_MODEL_BASE_TENSOR_VIEW_H_
