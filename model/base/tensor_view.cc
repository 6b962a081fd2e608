#include "model/base/tensor_view.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <type_traits>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "model/base/check.h"

namespace deltanet {
namespace {

// Storage types, so that the two 16-bit formats are told apart by type.
struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// The conversions below have no branches, only selects, so that the loops over them vectorise.

float ToFloat(float x) { return x; }
float ToFloat(BFloat16 x) { return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
float ToFloat(Float16 x) {
  const int32_t magnitude = x.bits & 0x7fff;
  const int32_t shifted = magnitude << 13;
  const int32_t normal = shifted + (112 << 23);  // Exponent bias 15 becomes 127.
  const int32_t special = shifted | 0x7f800000;  // Infinity, NaN.
  const int32_t subnormal = std::bit_cast<int32_t>(static_cast<float>(magnitude) * 0x1p-24f);
  const int32_t finite = magnitude < 0x0400 ? subnormal : normal;
  const int32_t sign = (x.bits & 0x8000) << 16;
  return std::bit_cast<float>(sign | (magnitude >= 0x7c00 ? special : finite));
}

// Rounded to odd: toward zero, then the last bit set if that was not exact. A second rounding, to a format
// with at least two bits fewer, then gives what rounding once would have.
float RoundToOdd(double x) {
  const float nearest = static_cast<float>(x);
  const double back = nearest;
  if (back == x || x != x) return nearest;
  uint32_t bits = std::bit_cast<uint32_t>(nearest);
  if ((back > x) == (x > 0)) --bits;  // Was rounded away from zero.
  return std::bit_cast<float>(bits | 1);
}

template <typename To>
To FromFloat(float x);
template <>
float FromFloat<float>(float x) {
  return x;
}
template <>
double FromFloat<double>(float x) {
  return x;
}
template <>
BFloat16 FromFloat<BFloat16>(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const uint32_t nan = (bits >> 16) | 0x0040;  // Quiet, so that dropping the low bits leaves no infinity.
  const int32_t magnitude = static_cast<int32_t>(bits & 0x7fffffff);
  return {static_cast<uint16_t>(magnitude > 0x7f800000 ? nan : rounded)};
}
template <>
Float16 FromFloat<Float16>(float x) {
  const int32_t bits = std::bit_cast<int32_t>(x);
  const int32_t magnitude = bits & 0x7fffffff;
  const int32_t normal = (magnitude - (112 << 23) + 0x0fff + ((magnitude >> 13) & 1)) >> 13;
  // A float in [0.5, 1) counts in steps of 2^-24, as a subnormal float16 does: the addition rounds.
  const int32_t subnormal =
      std::bit_cast<int32_t>(std::bit_cast<float>(magnitude) + 0.5f) - std::bit_cast<int32_t>(0.5f);
  const int32_t finite = magnitude < 0x38800000 ? subnormal : normal;         // 2^-14
  const int32_t infinite_or_nan = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;   // NaN : infinity
  const int32_t result = magnitude >= 0x47800000 ? infinite_or_nan : finite;  // 2^16
  return {static_cast<uint16_t>(((bits >> 16) & 0x8000) | result)};
}

template <typename From, typename To>
To Convert(From x) {
  return FromFloat<To>(ToFloat(x));
}
template <>
float Convert<double, float>(double x) {
  return static_cast<float>(x);
}
template <>
Float16 Convert<double, Float16>(double x) {
  return FromFloat<Float16>(RoundToOdd(x));
}
template <>
BFloat16 Convert<double, BFloat16>(double x) {
  return FromFloat<BFloat16>(RoundToOdd(x));
}

template <typename From, typename To>
void ConvertLoop(const char* __restrict from, char* __restrict to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    From x;
    std::memcpy(&x, from + i * sizeof(From), sizeof(From));
    const To y = Convert<From, To>(x);
    std::memcpy(to + i * sizeof(To), &y, sizeof(To));
  }
}

template <typename From>
void ConvertFrom(const char* from, char* to, DType to_dtype, int64_t count) {
  switch (to_dtype) {
    case DType::kFloat32:
      return ConvertLoop<From, float>(from, to, count);
    case DType::kFloat16:
      return ConvertLoop<From, Float16>(from, to, count);
    case DType::kBFloat16:
      return ConvertLoop<From, BFloat16>(from, to, count);
    case DType::kFloat64:
      if constexpr (!std::is_same_v<From, double>) return ConvertLoop<From, double>(from, to, count);
      break;
    case DType::kInt64:
      break;
  }
  DELTANET_CHECK(false, "no such conversion");
}

// Whether no element has all bits of `exponent` set: what infinities and NaNs have.
template <typename Bits>
bool NoneHasExponent(const char* data, int64_t count, Bits exponent) {
  constexpr int64_t kBlock = 4096;  // Looked at without a branch.
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t end = std::min(count, begin + kBlock);
    Bits found = 0;
    for (int64_t i = begin; i < end; ++i) {
      Bits bits;
      std::memcpy(&bits, data + i * sizeof(Bits), sizeof(Bits));
      found |= (bits & exponent) == exponent;
    }
    if (found != 0) return false;
  }
  return true;
}

}  // namespace

int64_t DTypeBytes(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return 4;
    case DType::kFloat16:
    case DType::kBFloat16:
      return 2;
    case DType::kFloat64:
    case DType::kInt64:
      return 8;
  }
  DELTANET_CHECK(false, "unknown dtype");
}

absl::string_view DTypeName(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return "float32";
    case DType::kFloat16:
      return "float16";
    case DType::kBFloat16:
      return "bfloat16";
    case DType::kFloat64:
      return "float64";
    case DType::kInt64:
      return "int64";
  }
  DELTANET_CHECK(false, "unknown dtype");
}

std::string DeviceName(const Device& device) {
  return device.type == DeviceType::kCpu ? "cpu" : absl::StrCat("cuda:", device.index);
}

int64_t NumElements(const Shape& shape) {
  int64_t product = 1;
  for (const int64_t size : shape) product *= size;
  return product;
}

std::string ShapeString(const Shape& shape) { return absl::StrCat("[", absl::StrJoin(shape, ","), "]"); }

void ConvertElements(const void* from, DType from_dtype, void* to, DType to_dtype, int64_t count) {
  if (count == 0) return;
  if (from_dtype == to_dtype) {
    std::memcpy(to, from, count * DTypeBytes(from_dtype));
    return;
  }
  const char* const source = static_cast<const char*>(from);
  char* const target = static_cast<char*>(to);
  switch (from_dtype) {
    case DType::kFloat32:
      return ConvertFrom<float>(source, target, to_dtype, count);
    case DType::kFloat16:
      return ConvertFrom<Float16>(source, target, to_dtype, count);
    case DType::kBFloat16:
      return ConvertFrom<BFloat16>(source, target, to_dtype, count);
    case DType::kFloat64:
      return ConvertFrom<double>(source, target, to_dtype, count);
    case DType::kInt64:
      break;
  }
  DELTANET_CHECK(false, "int64 converts only to int64");
}

bool AllFinite(const void* data, DType dtype, int64_t count) {
  const char* const bytes = static_cast<const char*>(data);
  switch (dtype) {
    case DType::kFloat32:
      return NoneHasExponent<uint32_t>(bytes, count, 0x7f800000);
    case DType::kFloat16:
      return NoneHasExponent<uint16_t>(bytes, count, 0x7c00);
    case DType::kBFloat16:
      return NoneHasExponent<uint16_t>(bytes, count, 0x7f80);
    case DType::kFloat64:
      return NoneHasExponent<uint64_t>(bytes, count, 0x7ff0000000000000);
    case DType::kInt64:
      return true;
  }
  DELTANET_CHECK(false, "unknown dtype");
}

}  // namespace deltanet
