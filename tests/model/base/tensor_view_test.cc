#include "model/base/tensor_view.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "gtest/gtest.h"

namespace deltanet {
namespace {

constexpr DType kFloatTypes[] = {DType::kFloat32, DType::kFloat16, DType::kBFloat16, DType::kFloat64};
constexpr double kInfinity = std::numeric_limits<double>::infinity();

TEST(TensorViewTest, NamesAndSizes) {
  EXPECT_EQ(DTypeName(DType::kFloat32), "float32");
  EXPECT_EQ(DTypeName(DType::kFloat16), "float16");
  EXPECT_EQ(DTypeName(DType::kBFloat16), "bfloat16");
  EXPECT_EQ(DTypeName(DType::kFloat64), "float64");
  EXPECT_EQ(DTypeName(DType::kInt64), "int64");
  EXPECT_EQ(DTypeBytes(DType::kFloat32), 4);
  EXPECT_EQ(DTypeBytes(DType::kFloat16), 2);
  EXPECT_EQ(DTypeBytes(DType::kBFloat16), 2);
  EXPECT_EQ(DTypeBytes(DType::kFloat64), 8);
  EXPECT_EQ(DTypeBytes(DType::kInt64), 8);
  EXPECT_EQ(DeviceName({}), "cpu");
  EXPECT_EQ(DeviceName({DeviceType::kCuda, 3}), "cuda:3");
}

TEST(TensorViewTest, Shapes) {
  EXPECT_EQ(NumElements({}), 1);
  EXPECT_EQ(NumElements({8, 128, 64}), 65536);
  EXPECT_EQ(NumElements({8, 0, 64}), 0);
  EXPECT_EQ(ShapeString({}), "[]");
  EXPECT_EQ(ShapeString({8, 128, 64}), "[8,128,64]");
  const MutableTensorView view = {nullptr, {3, 5}, DType::kFloat16, {}};
  EXPECT_EQ(TensorView(view).bytes(), 30);
}

// A 16-bit format, from its definition and in double arithmetic.
struct Format16 {
  DType dtype;
  int exponent_bits;
  int mantissa_bits;

  uint16_t infinity() const { return static_cast<uint16_t>(((1 << exponent_bits) - 1) << mantissa_bits); }
  double Value(uint16_t bits) const {
    const int bias = (1 << (exponent_bits - 1)) - 1;
    const int exponent = (bits >> mantissa_bits) & ((1 << exponent_bits) - 1);
    const int mantissa = bits & ((1 << mantissa_bits) - 1);
    const double sign = bits & 0x8000 ? -1 : 1;
    if (exponent == (1 << exponent_bits) - 1) return mantissa == 0 ? sign * kInfinity : std::nan("");
    const int integer = exponent == 0 ? mantissa : mantissa + (1 << mantissa_bits);
    return sign * std::ldexp(integer, std::max(exponent, 1) - bias - mantissa_bits);
  }
  // The nearest value's bits, ties to the even ones, found by bisection. x is not NaN.
  uint16_t Nearest(double x) const {
    const double magnitude = std::abs(x);
    uint16_t low = 0, high = infinity();  // Value(low) <= magnitude, and Value(high) above it or infinite.
    while (high - low > 1) {
      const uint16_t middle = static_cast<uint16_t>((low + high) / 2);
      (Value(middle) <= magnitude ? low : high) = middle;
    }
    // What lies beyond the largest value rounds as if the exponent went on.
    const double step = Value(low) - Value(low - (low > 0));
    const double above = high == infinity() ? Value(low) + step : Value(high);
    const double down = magnitude - Value(low), up = above - magnitude;
    const bool take_high = up < down || (up == down && high % 2 == 0);
    return static_cast<uint16_t>((take_high ? high : low) | (std::signbit(x) ? 0x8000 : 0));
  }
};

class Format16Test : public testing::TestWithParam<Format16> {};

INSTANTIATE_TEST_SUITE_P(Formats, Format16Test,
                         testing::Values(Format16{DType::kFloat16, 5, 10}, Format16{DType::kBFloat16, 8, 7}),
                         [](const auto& info) { return std::string(DTypeName(info.param.dtype)); });

TEST_P(Format16Test, WidensEveryValueExactly) {
  const Format16 format = GetParam();
  std::vector<uint16_t> all(65536);
  for (int i = 0; i < 65536; ++i) all[i] = static_cast<uint16_t>(i);
  std::vector<float> floats(65536);
  std::vector<double> doubles(65536);
  std::vector<uint16_t> back(65536), back_from_double(65536);
  ConvertElements(all.data(), format.dtype, floats.data(), DType::kFloat32, 65536);
  ConvertElements(all.data(), format.dtype, doubles.data(), DType::kFloat64, 65536);
  ConvertElements(floats.data(), DType::kFloat32, back.data(), format.dtype, 65536);
  ConvertElements(doubles.data(), DType::kFloat64, back_from_double.data(), format.dtype, 65536);
  for (int i = 0; i < 65536; ++i) {
    const double want = format.Value(all[i]);
    if (std::isnan(want)) {
      ASSERT_TRUE(std::isnan(floats[i]) && std::isnan(doubles[i])) << i;
      ASSERT_TRUE(std::isnan(format.Value(back[i])) && std::isnan(format.Value(back_from_double[i]))) << i;
      continue;
    }
    ASSERT_EQ(floats[i], want) << i;
    ASSERT_EQ(doubles[i], want) << i;
    ASSERT_EQ(back[i], all[i]);  // Also tells -0 from 0.
    ASSERT_EQ(back_from_double[i], all[i]);
  }
}

TEST_P(Format16Test, RoundsToNearestEven) {
  const Format16 format = GetParam();
  std::mt19937_64 random(1);
  std::vector<double> inputs;
  // Every midpoint between neighbours, and just beside it: further than a float can tell, for the doubles.
  for (uint16_t bits = 0; bits + 1 < format.infinity(); ++bits) {
    const double middle = (format.Value(bits) + format.Value(bits + 1)) / 2;
    for (const double x : {middle, std::nextafter(middle, kInfinity), std::nextafter(middle, 0.0)}) {
      inputs.push_back(random() % 2 == 0 ? x : -x);
    }
  }
  const double largest = format.Value(format.infinity() - 1);
  const double half_step = (largest - format.Value(format.infinity() - 2)) / 2;
  for (const double x : {largest, largest + half_step, std::nextafter(largest + half_step, 0.0), largest * 4,
                         1e300, kInfinity, 1e-300, 0.0}) {
    inputs.push_back(x);
    inputs.push_back(-x);
  }
  for (int i = 0; i < 20000; ++i) {
    const float x = std::bit_cast<float>(static_cast<uint32_t>(random()));
    if (!std::isnan(x)) inputs.push_back(x);
  }
  std::vector<float> floats(inputs.begin(), inputs.end());
  std::vector<uint16_t> from_double(inputs.size()), from_float(inputs.size());
  ConvertElements(inputs.data(), DType::kFloat64, from_double.data(), format.dtype, inputs.size());
  ConvertElements(floats.data(), DType::kFloat32, from_float.data(), format.dtype, floats.size());
  for (size_t i = 0; i < inputs.size(); ++i) {
    ASSERT_EQ(from_double[i], format.Nearest(inputs[i])) << inputs[i];
    ASSERT_EQ(from_float[i], format.Nearest(floats[i])) << floats[i];
  }
}

TEST(ConvertElementsTest, NanStaysNan) {
  // A NaN whose payload is only in the bits that narrowing drops must not become an infinity.
  for (const uint32_t bits : {0x7f800001u, 0xff800001u, 0x7fc00000u, 0x7fffffffu, 0xffffffffu}) {
    const float nan = std::bit_cast<float>(bits);
    for (const DType narrow : {DType::kFloat16, DType::kBFloat16}) {
      uint16_t stored = 0;
      float back = 0;
      ConvertElements(&nan, DType::kFloat32, &stored, narrow, 1);
      ConvertElements(&stored, narrow, &back, DType::kFloat32, 1);
      EXPECT_TRUE(std::isnan(back)) << std::hex << bits;
    }
  }
}

TEST(ConvertElementsTest, BetweenTheTwoNarrowFormats) {
  const float values[] = {1.0f, -3.5f, 65536.0f, 0x1p-20f, 0x1.ffp0f};
  uint16_t bfloat16[5], float16[5], back[5];
  ConvertElements(values, DType::kFloat32, bfloat16, DType::kBFloat16, 5);
  ConvertElements(bfloat16, DType::kBFloat16, float16, DType::kFloat16, 5);
  EXPECT_EQ(float16[0], 0x3c00);
  EXPECT_EQ(float16[1], 0xc300);
  EXPECT_EQ(float16[2], 0x7c00);  // Beyond float16: infinite.
  EXPECT_EQ(float16[3], 0x0010);  // Subnormal in float16.
  EXPECT_EQ(float16[4], 0x4000);  // Rounded to 2 in bfloat16.
  ConvertElements(float16, DType::kFloat16, back, DType::kBFloat16, 5);
  EXPECT_EQ(back[1], bfloat16[1]);
  EXPECT_EQ(back[3], bfloat16[3]);
}

TEST(ConvertElementsTest, AnyLengthAndAlignment) {
  std::mt19937 random(2);
  for (const DType from : kFloatTypes) {
    for (const DType to : kFloatTypes) {
      for (const int64_t count : {0, 1, 3, 7, 8, 15, 17, 33, 67}) {
        std::vector<double> values(count);
        for (double& value : values) value = std::normal_distribution<double>()(random);
        std::vector<char> source(count * DTypeBytes(from) + 1), aligned(count * DTypeBytes(from));
        ConvertElements(values.data(), DType::kFloat64, aligned.data(), from, count);
        std::copy(aligned.begin(), aligned.end(), source.begin() + 1);
        const int64_t to_bytes = count * DTypeBytes(to);
        std::vector<char> target(to_bytes + 2, 'x');
        ConvertElements(source.data() + 1, from, target.data() + 1, to, count);
        for (int64_t i = 0; i < count; ++i) {
          char one[8];  // Against one element at a time, which no vector loop touches.
          ConvertElements(aligned.data() + i * DTypeBytes(from), from, one, to, 1);
          ASSERT_EQ(std::memcmp(one, target.data() + 1 + i * DTypeBytes(to), DTypeBytes(to)), 0)
              << DTypeName(from) << " to " << DTypeName(to) << ", " << i << " of " << count;
        }
        EXPECT_EQ(target.front(), 'x');
        EXPECT_EQ(target.back(), 'x');
      }
    }
  }
}

TEST(ConvertElementsTest, TheSameTypeIsCopiedBitForBit) {
  const uint32_t signalling_nan = 0x7f800001;
  uint32_t copy = 0;
  ConvertElements(&signalling_nan, DType::kFloat32, &copy, DType::kFloat32, 1);
  EXPECT_EQ(copy, signalling_nan);
  const int64_t ids[] = {0, -1, INT64_MAX, INT64_MIN};
  int64_t copies[4] = {};
  ConvertElements(ids, DType::kInt64, copies, DType::kInt64, 4);
  EXPECT_TRUE(std::equal(ids, ids + 4, copies));
}

TEST(ConvertElementsDeathTest, IntegersDoNotConvert) {
  int64_t id = 1;
  float value = 1;
  EXPECT_DEATH(ConvertElements(&id, DType::kInt64, &value, DType::kFloat32, 1),
               "int64 converts only to int64");
  EXPECT_DEATH(ConvertElements(&value, DType::kFloat32, &id, DType::kInt64, 1), "no such conversion");
}

TEST(AllFiniteTest, FindsOneAnywhere) {
  constexpr int64_t kCount = 10001;
  for (const DType dtype : kFloatTypes) {
    const int64_t size = DTypeBytes(dtype);
    std::vector<char> buffer(kCount * size + 1);
    char* const data = buffer.data() + 1;  // Unaligned.
    // The largest finite values count as finite, and so do subnormal ones.
    const double largest = dtype == DType::kFloat16    ? 65504.0
                           : dtype == DType::kBFloat16 ? 0x1.fep127
                           : dtype == DType::kFloat32  ? std::numeric_limits<float>::max()
                                                       : std::numeric_limits<double>::max();
    const double samples[] = {0.0,     -0.0,     1.5,
                              largest, -largest, dtype == DType::kFloat16 ? 0x1p-24 : 0x1p-130};
    for (int64_t i = 0; i < kCount; ++i) {
      ConvertElements(&samples[i % std::size(samples)], DType::kFloat64, data + i * size, dtype, 1);
    }
    EXPECT_TRUE(AllFinite(data, dtype, kCount)) << DTypeName(dtype);
    for (const double bad : {kInfinity, -kInfinity, std::nan("")}) {
      for (const int64_t at : {int64_t{0}, int64_t{4095}, int64_t{4096}, kCount - 1}) {
        char saved[8];
        std::memcpy(saved, data + at * size, size);
        ConvertElements(&bad, DType::kFloat64, data + at * size, dtype, 1);
        EXPECT_FALSE(AllFinite(data, dtype, kCount)) << DTypeName(dtype) << " " << bad << " at " << at;
        EXPECT_TRUE(AllFinite(data, dtype, at)) << DTypeName(dtype) << " before " << at;
        std::memcpy(data + at * size, saved, size);
      }
    }
  }
  EXPECT_TRUE(AllFinite(nullptr, DType::kFloat32, 0));
  const int64_t ids[] = {INT64_MAX, INT64_MIN, 0x7ff0000000000000};
  EXPECT_TRUE(AllFinite(ids, DType::kInt64, 3));
}

}  // namespace
}  // namespace deltanet
