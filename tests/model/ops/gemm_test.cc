// Matrix products: right, within their bounds, and in a fixed order where they are wanted so.
#include "model/ops/gemm.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"
#include "model/device.h"
#include "tests/model/engine_modes.h"
#include "tests/model/ops/op_test_util.h"

namespace deltanet {
namespace {

struct Sizes {
  int64_t n, k;
};
// Around vectors, tiles and blocks, and those of models.
constexpr Sizes kSizes[] = {{1, 1},   {1, 9},    {2, 15},   {3, 17},    {5, 7},     {7, 64},    {8, 33},
                            {11, 31}, {12, 100}, {23, 65},  {24, 24},   {25, 129},  {64, 64},   {193, 64},
                            {65, 66}, {97, 300}, {384, 96}, {256, 256}, {300, 512}, {1000, 40}, {144, 1400}};

// `values` as `dtype` on the device, when it returns.
DeviceBuffer OnDevice(const std::vector<float>& values, DType dtype, const Device& device, DeviceStream* stream) {
  const int64_t count = static_cast<int64_t>(values.size()), bytes = count * DTypeBytes(dtype);
  std::vector<char> raw(bytes);
  ConvertElements(values.data(), DType::kFloat32, raw.data(), dtype, count);
  DeviceBuffer buffer(device, bytes);
  stream->Copy(buffer.data(), raw.data(), bytes);
  stream->Synchronize();
  return buffer;
}

// A product of random operands on a device, kept in `dtype`, into `c_dtype`, or added to random values.
class Product {
 public:
  Product(const Mode& mode, const Sizes& sizes, int64_t rows, DType c_dtype = DType::kFloat32,
          int64_t band = 3, bool accumulate = false)
      : mode_(mode),
        sizes_(sizes),
        c_dtype_(c_dtype),
        accumulate_(accumulate),
        stride_(sizes.n + band),
        stream_(mode.device),
        a_(Rounded(RandomNormal(rows * sizes.k, 1), mode.dtype)),
        b_(Rounded(RandomNormal(sizes.n * sizes.k, 2, 1 / std::sqrt(static_cast<float>(sizes.k))),
                   mode.dtype)),
        before_(accumulate ? RandomNormal(rows * sizes.n, 3) : std::vector<float>(rows * sizes.n)),
        b_on_device_(OnDevice(b_, mode.dtype, mode.device, &stream_)) {}

  const float* a(int64_t row) const { return a_.data() + row * sizes_.k; }
  const float* b(int64_t column) const { return b_.data() + column * sizes_.k; }
  // What the row's product is added to; zeros, where it is not.
  const float* before(int64_t row) const { return before_.data() + row * sizes_.n; }

  absl::Status Check() {
    const DeviceStream::Current current(stream_);
    return CheckFixedOrder(Args(), {mode_.device, RunSerially, stream_.handle()});
  }

  // The product of these rows of a, of which -1 is one of NaN. [rows, n + band], NaN at first.
  std::vector<float> Run(const std::vector<int64_t>& rows, bool fixed_order,
                         ParallelFor parallel_for = RunSerially) {
    const int64_t m = static_cast<int64_t>(rows.size());
    const int64_t whole = GemmRows(m, fixed_order, mode_.device);
    std::vector<float> a(whole * sizes_.k, kNaN);
    for (int64_t i = 0; i < m; ++i) {
      if (rows[i] >= 0) std::copy_n(this->a(rows[i]), sizes_.k, a.begin() + i * sizes_.k);
    }
    const DeviceBuffer a_on_device = OnDevice(a, mode_.dtype, mode_.device, &stream_);
    // A row more on either side, to stay NaN.
    std::vector<float> c((whole + 2) * stride_, kNaN);
    for (int64_t i = 0; accumulate_ && i < m; ++i) {
      if (rows[i] >= 0) std::copy_n(before(rows[i]), sizes_.n, c.begin() + (i + 1) * stride_);
    }
    const DeviceBuffer c_on_device = OnDevice(c, c_dtype_, mode_.device, &stream_);
    GemmArgs args = Args();
    args.m = m;
    args.a = a_on_device.data();
    args.c = c_on_device.data() + stride_ * DTypeBytes(c_dtype_);
    args.ldc = stride_;
    args.fixed_order = fixed_order;
    {
      const DeviceStream::Current current(stream_);
      const absl::Status status = Gemm(args, {mode_.device, parallel_for, stream_.handle()});
      EXPECT_TRUE(status.ok()) << status;
    }
    std::vector<char> raw(c.size() * DTypeBytes(c_dtype_));
    stream_.Copy(raw.data(), c_on_device.data(), static_cast<int64_t>(raw.size()));
    stream_.Synchronize();
    ConvertElements(raw.data(), c_dtype_, c.data(), DType::kFloat32, static_cast<int64_t>(c.size()));
    const auto is_nan = [](float x) { return std::isnan(x); };
    EXPECT_TRUE(std::all_of(c.begin(), c.begin() + stride_, is_nan)) << "before the product";
    EXPECT_TRUE(std::all_of(c.end() - stride_, c.end(), is_nan)) << "behind the product";
    return {c.begin() + stride_, c.begin() + (m + 1) * stride_};
  }

 private:
  GemmArgs Args() const {
    GemmArgs args;
    args.dtype = mode_.dtype;
    args.c_dtype = c_dtype_;
    args.n = sizes_.n;
    args.k = args.lda = args.ldb = sizes_.k;
    args.b = b_on_device_.data();
    args.accumulate = accumulate_;
    return args;
  }

  const Mode mode_;
  const Sizes sizes_;
  const DType c_dtype_;
  const bool accumulate_;
  const int64_t stride_;
  DeviceStream stream_;
  const std::vector<float> a_, b_, before_;
  const DeviceBuffer b_on_device_;
};

// Sums as plain code has them in float32. Tensor cores cut off what an addition has beyond float32's last place
// instead of rounding, so for bfloat16 on a GPU plain code does.
class PlainSum {
 public:
  explicit PlainSum(const Mode& mode)
      : cuts_off_(mode.device.type == DeviceType::kCuda && mode.dtype == DType::kBFloat16) {}
  void Add(float a, float b) {
    if (!cuts_off_) {
      sum_ += a * b;
      return;
    }
    const double exact = static_cast<double>(sum_) + static_cast<double>(a) * b;
    sum_ = static_cast<float>(exact);
    if (std::fabs(static_cast<double>(sum_)) > std::fabs(exact)) sum_ = std::nextafter(sum_, 0.0f);
  }
  float value() const { return sum_; }

 private:
  const bool cuts_off_;
  float sum_ = 0;
};

class GemmTest : public testing::TestWithParam<Mode> {
 protected:
  void SetUp() override { SKIP_WITHOUT_DEVICE(GetParam()); }
};
INSTANTIATE_TEST_SUITE_P(Modes, GemmTest, testing::ValuesIn(Modes()),
                         [](const auto& info) { return info.param.name; });

TEST_P(GemmTest, IsAsGoodAsPlainSumsAndWritesItsColumnsAlone) {
  for (const Sizes& sizes : kSizes) {
    for (const int64_t m : {0, 1, 2, 3, 5, 13, 100, 130}) {
      for (const bool accumulate : {false, true}) {
        SCOPED_TRACE(absl::StrCat("[", m, ",", sizes.k, "] x [", sizes.k, ",", sizes.n, "]",
                                  accumulate ? ", added" : ""));
        Product product(GetParam(), sizes, m, DType::kFloat32, 3, accumulate);
        std::vector<int64_t> rows(m);
        for (int64_t i = 0; i < m; ++i) rows[i] = i;
        std::vector<float> plain(m * sizes.n), got(m * sizes.n);
        std::vector<double> exact(m * sizes.n);
        for (int64_t i = 0; i < m; ++i) {
          for (int64_t j = 0; j < sizes.n; ++j) {
            PlainSum sum(GetParam());
            for (int64_t l = 0; l < sizes.k; ++l) {
              sum.Add(product.a(i)[l], product.b(j)[l]);
              exact[i * sizes.n + j] += static_cast<double>(product.a(i)[l]) * product.b(j)[l];
            }
            plain[i * sizes.n + j] = product.before(i)[j] + sum.value();
            exact[i * sizes.n + j] += product.before(i)[j];
          }
        }
        for (const bool fixed_order : {false, true}) {
          const std::vector<float> c =
              product.Run(rows, fixed_order, fixed_order ? RunInShreds : RunSerially);
          for (int64_t i = 0; i < m; ++i) {
            std::copy_n(c.begin() + i * (sizes.n + 3), sizes.n, got.begin() + i * sizes.n);
            for (int64_t j = sizes.n; j < sizes.n + 3; ++j) ASSERT_TRUE(std::isnan(c[i * (sizes.n + 3) + j]));
          }
          ExpectAsGoodAsPlain(got.data(), plain.data(), exact.data(), m * sizes.n,
                              fixed_order ? "fixed" : "free");
        }
      }
    }
  }
}

#ifdef DELTANET_CUDA
// What a product of bfloat16 operands may become.
constexpr struct Kind {
  DType c_dtype;
  bool accumulate;
} kKinds[] = {{DType::kFloat32, false}, {DType::kBFloat16, false}, {DType::kFloat32, true}};

// Products that a step of the 1.3B model makes, and such of odd sizes, with few rows. Of large ones some columns are
// looked at, the last ones among them.
TEST(GemmCudaTest, OfFewRowsIsAsGoodAsPlainSumsAndWritesItsColumnsAlone) {
  const Mode mode{"cuda_bfloat16", {DeviceType::kCuda, 0}, DType::kBFloat16};
  SKIP_WITHOUT_DEVICE(mode);
  constexpr Sizes kFewRowsSizes[] = {{6160, 2048}, {2048, 2048}, {11264, 2048}, {2048, 5632}, {32000, 256},
                                     {1001, 2056}, {129, 72},    {127, 5632},   {1, 520},     {77, 64}};
  constexpr int64_t kMostRows = 129;
  std::vector<int64_t> rows(kMostRows);
  for (int64_t i = 0; i < kMostRows; ++i) rows[i] = i;
  for (const Sizes& sizes : kFewRowsSizes) {
    for (const Kind& kind : kKinds) {
      const DType c_dtype = kind.c_dtype;
      const int64_t band = kind.accumulate ? 0 : c_dtype == DType::kFloat32 ? 3 : 8 + (8 - sizes.n % 8) % 8;
      Product product(mode, sizes, kMostRows, c_dtype, band, kind.accumulate);
      std::vector<int64_t> columns;
      for (int64_t j = sizes.n - 1; j >= 0; j -= j > sizes.n - 20 ? 1 : 1 + sizes.n / 40) columns.push_back(j);
      const int64_t count = static_cast<int64_t>(columns.size());
      std::vector<float> plain(kMostRows * count);
      std::vector<double> exact(kMostRows * count);
      for (int64_t i = 0; i < kMostRows; ++i) {
        for (int64_t j = 0; j < count; ++j) {
          PlainSum sum(mode);
          for (int64_t l = 0; l < sizes.k; ++l) {
            sum.Add(product.a(i)[l], product.b(columns[j])[l]);
            exact[i * count + j] += static_cast<double>(product.a(i)[l]) * product.b(columns[j])[l];
          }
          plain[i * count + j] = product.before(i)[columns[j]] + sum.value();
          exact[i * count + j] += product.before(i)[columns[j]];
        }
      }
      for (const int64_t m : {1, 5, 8, 9, 16, 17, 33, 64, 65, 128, 129}) {
        SCOPED_TRACE(absl::StrCat("[", m, ",", sizes.k, "] x [", sizes.k, ",", sizes.n, "] into ",
                                  DTypeName(c_dtype)));
        const std::vector<float> c = product.Run({rows.begin(), rows.begin() + m}, false);
        std::vector<float> got(m * count);
        for (int64_t i = 0; i < m; ++i) {
          for (int64_t j = 0; j < count; ++j) got[i * count + j] = c[i * (sizes.n + band) + columns[j]];
          for (int64_t j = 0; j < sizes.n; ++j) ASSERT_FALSE(std::isnan(c[i * (sizes.n + band) + j]));
          for (int64_t j = sizes.n; j < sizes.n + band; ++j) {
            ASSERT_TRUE(std::isnan(c[i * (sizes.n + band) + j]));
          }
        }
        ExpectAsGoodAsPlain(got.data(), plain.data(), exact.data(), m * count, "few rows", c_dtype);
        const std::vector<float> again = product.Run({rows.begin(), rows.begin() + m}, false);
        for (int64_t i = 0; i < m; ++i) {
          ASSERT_TRUE(SameBits(&c[i * (sizes.n + band)], &again[i * (sizes.n + band)], sizes.n));
        }
      }
    }
  }
}

// Of many rows, some rows and columns are looked at.
TEST(GemmCudaTest, OfManyRowsIsAsGoodAsPlainSumsAndWritesItsColumnsAlone) {
  const Mode mode{"cuda_bfloat16", {DeviceType::kCuda, 0}, DType::kBFloat16};
  SKIP_WITHOUT_DEVICE(mode);
  for (const int64_t m : {1027, 2560, 4099}) {
    std::vector<int64_t> rows(m);
    std::iota(rows.begin(), rows.end(), 0);
    for (const Sizes& sizes : {Sizes{2048, 256}, {11264, 64}, {6160, 64}, {264, 2048}}) {
      for (const Kind& kind : kKinds) {
        SCOPED_TRACE(absl::StrCat("[", m, ",", sizes.k, "] x [", sizes.k, ",", sizes.n, "] into ",
                                  DTypeName(kind.c_dtype), kind.accumulate ? ", added" : ""));
        const int64_t band = 128 - sizes.n % 128;  // Rows of c begin where the library likes them to.
        Product product(mode, sizes, m, kind.c_dtype, band, kind.accumulate);
        const std::vector<float> c = product.Run(rows, false);
        std::vector<float> got, plain;
        std::vector<double> exact;
        for (int64_t i = 0; i < m; ++i) {
          const float* const row = &c[i * (sizes.n + band)];
          ASSERT_TRUE(std::none_of(row, row + sizes.n, [](float x) { return std::isnan(x); }));
          ASSERT_TRUE(
              std::all_of(row + sizes.n, row + sizes.n + band, [](float x) { return std::isnan(x); }));
          for (int64_t j = i % 131; i % 67 == 0 && j < sizes.n; j += 131) {
            PlainSum sum(mode);
            double exact_sum = 0;
            for (int64_t l = 0; l < sizes.k; ++l) {
              sum.Add(product.a(i)[l], product.b(j)[l]);
              exact_sum += static_cast<double>(product.a(i)[l]) * product.b(j)[l];
            }
            got.push_back(row[j]);
            plain.push_back(product.before(i)[j] + sum.value());
            exact.push_back(product.before(i)[j] + exact_sum);
          }
        }
        ExpectAsGoodAsPlain(got.data(), plain.data(), exact.data(), static_cast<int64_t>(got.size()),
                            "many rows", kind.c_dtype);
      }
    }
  }
}

// What surrounds a product: a norm's factor before it, an addition or a gate after it.
TEST(GemmCudaTest, FusedIsAsGoodAsPlainCodeAndWritesItsColumnsAlone) {
  using Then = FusedGemmArgs::Then;
  const Mode mode{"cuda_bfloat16", {DeviceType::kCuda, 0}, DType::kBFloat16};
  SKIP_WITHOUT_DEVICE(mode);
  DeviceStream stream(mode.device);
  const OpContext context{mode.device, RunSerially, stream.handle()};
  const DeviceStream::Current current(stream);
  const auto on_device = [&](const std::vector<float>& values, DType dtype) {
    return OnDevice(values, dtype, mode.device, &stream);
  };
  const auto on_host = [&](const DeviceBuffer& buffer, DType dtype) {
    std::vector<char> raw(buffer.bytes());
    stream.Copy(raw.data(), buffer.data(), buffer.bytes());
    stream.Synchronize();
    std::vector<float> values(buffer.bytes() / DTypeBytes(dtype));
    ConvertElements(raw.data(), dtype, values.data(), DType::kFloat32, static_cast<int64_t>(values.size()));
    return values;
  };
  constexpr RmsEpsilon kEpsilons = {.after = 0.25f, .inside = 0.5f};
  // With the last, a gate's blocks have all of k, in more steps than a ring has stages.
  for (const Sizes& sizes : {Sizes{264, 72}, Sizes{136, 1024}, Sizes{1032, 200}, Sizes{8, 512},
                             Sizes{13000, 24}, Sizes{136, 8192}, Sizes{5816, 392}}) {
    const int64_t n = sizes.n, k = sizes.k;
    const std::vector<float> b = Rounded(RandomNormal(n * k, 2, 1 / std::sqrt(static_cast<float>(k))), mode.dtype);
    const DeviceBuffer b_there = on_device(b, mode.dtype);
    const std::vector<float> scale = RandomNormal(n, 3);
    const DeviceBuffer scale_there = on_device(scale, DType::kFloat32);
    for (const int64_t m : {1, 7, 8, 16, 17, 32, 33, 64, 100, 128}) {
      // What is expected of the largest takes the CPU seconds.
      if (n * k > 2000000 && m != 17 && m != 64 && m != 128) continue;
      const std::vector<float> a = Rounded(RandomNormal(m * k, 1), mode.dtype);
      const DeviceBuffer a_there = on_device(a, mode.dtype);
      std::vector<float> squares = RandomNormal(m * SquaresWidth(k), 4);
      for (float& square : squares) square *= square * static_cast<float>(k);
      const DeviceBuffer squares_there = on_device(squares, DType::kFloat32);
      const std::vector<float> before = RandomNormal(m * n, 5);
      std::vector<float> factors(m), plain(m * n);  // Of the products.
      std::vector<double> exact_factors(m), exact(m * n);
      for (int64_t i = 0; i < m; ++i) {
        float sum = 0;
        double exact_sum = 0;
        for (int64_t j = 0; j < SquaresWidth(k); ++j) {
          sum += squares[i * SquaresWidth(k) + j];
          exact_sum += squares[i * SquaresWidth(k) + j];
        }
        factors[i] = 1 / (std::sqrt(sum / static_cast<float>(k) + kEpsilons.inside) + kEpsilons.after);
        exact_factors[i] =
            1 / (std::sqrt(exact_sum / static_cast<double>(k) + kEpsilons.inside) + kEpsilons.after);
        for (int64_t j = 0; j < n; ++j) {
          PlainSum product(mode);
          for (int64_t l = 0; l < k; ++l) {
            product.Add(a[i * k + l], b[j * k + l]);
            exact[i * n + j] += static_cast<double>(a[i * k + l]) * b[j * k + l];
          }
          plain[i * n + j] = product.value();
        }
      }
      for (const Then then : {Then::kStore, Then::kGate, Then::kAdd}) {
        for (const bool norm : {false, true}) {
          SCOPED_TRACE(absl::StrCat("[", m, ",", k, "] x [", k, ",", n, "], then ", static_cast<int>(then),
                                    norm ? ", normed" : ""));
          const int64_t columns = then == Then::kGate ? n / 2 : n, stride = columns + 4;
          const DeviceBuffer c = on_device(std::vector<float>(m * stride, kNaN), mode.dtype);
          const DeviceBuffer x = on_device(before, DType::kFloat32);
          const DeviceBuffer x_squares = on_device(std::vector<float>(m * SquaresWidth(n), kNaN), DType::kFloat32);
          FusedGemmArgs args;
          args.gemm.dtype = args.gemm.c_dtype = mode.dtype;
          args.gemm.m = m;
          args.gemm.n = n;
          args.gemm.k = args.gemm.lda = args.gemm.ldb = k;
          args.gemm.a = a_there.data();
          args.gemm.b = b_there.data();
          args.gemm.c = c.data();
          args.gemm.ldc = stride;
          if (norm) args.squares = squares_there.as<float>();
          args.epsilon = kEpsilons;
          args.then = then;
          args.gate = norm ? GateKind::kSiluFirst : GateKind::kSigmoidSecond;
          args.x = x.as<float>();
          args.scale = scale_there.as<float>();
          args.x_squares = x_squares.as<float>();
          if (!FusedGemmTakes(args, context)) {
            EXPECT_EQ(FusedGemm(args, context).code(), absl::StatusCode::kInvalidArgument);
            GTEST_SKIP() << "this device has no fused products";
          }
          const absl::Status status = FusedGemm(args, context);
          ASSERT_TRUE(status.ok()) << status;

          std::vector<float> plain_c(m * columns), plain_x(before), plain_squares(m * SquaresWidth(n)), got_c;
          std::vector<double> exact_c(m * columns), exact_x(m * n), exact_squares(m * SquaresWidth(n));
          for (int64_t i = 0; i < m; ++i) {
            const float factor = norm ? factors[i] : 1.0f;
            const double exact_factor = norm ? exact_factors[i] : 1.0;
            for (int64_t j = 0; j < columns; ++j) {
              const float p = plain[i * n + j] * factor;
              const double q = exact[i * n + j] * exact_factor;
              float* const to = &plain_c[i * columns + j];
              double* const exact_to = &exact_c[i * columns + j];
              if (then == Then::kStore) {
                *to = p, *exact_to = q;
              } else if (then == Then::kGate) {
                const float second = plain[i * n + columns + j] * factor;
                const double exact_second = exact[i * n + columns + j] * exact_factor;
                *to = norm ? p / (1 + std::exp(-p)) * second : p / (1 + std::exp(-second));
                *exact_to = norm ? q / (1 + std::exp(-q)) * exact_second : q / (1 + std::exp(-exact_second));
              } else {
                const float sum = plain_x[i * n + j] += p;
                const double exact_sum = exact_x[i * n + j] = before[i * n + j] + q;
                *to = sum * scale[j], *exact_to = exact_sum * scale[j];
                plain_squares[i * SquaresWidth(n) + j / kSquaresOf] += sum * sum;
                exact_squares[i * SquaresWidth(n) + j / kSquaresOf] += exact_sum * exact_sum;
              }
            }
          }
          const std::vector<float> all_c = on_host(c, mode.dtype);
          for (int64_t i = 0; i < m; ++i) {
            got_c.insert(got_c.end(), all_c.begin() + i * stride, all_c.begin() + i * stride + columns);
            for (int64_t j = columns; j < stride; ++j) ASSERT_TRUE(std::isnan(all_c[i * stride + j]));
          }
          ExpectAsGoodAsPlain(got_c.data(), plain_c.data(), exact_c.data(), m * columns, "c", mode.dtype);
          const std::vector<float> got_x = on_host(x, DType::kFloat32);
          if (then != Then::kAdd) {
            EXPECT_TRUE(SameBits(got_x.data(), before.data(), m * n));
            continue;
          }
          ExpectAsGoodAsPlain(got_x.data(), plain_x.data(), exact_x.data(), m * n, "x");
          ExpectAsGoodAsPlain(on_host(x_squares, DType::kFloat32).data(), plain_squares.data(),
                              exact_squares.data(), m * SquaresWidth(n), "squares");
        }
      }
    }
  }
}

// A gate after a product of many rows, some of whose values are looked at. Behind the operands' rows is NaN.
TEST(GemmCudaTest, GatedOfManyRowsIsAsGoodAsPlainCodeAndWritesItsColumnsAlone) {
  const Mode mode{"cuda_bfloat16", {DeviceType::kCuda, 0}, DType::kBFloat16};
  SKIP_WITHOUT_DEVICE(mode);
  DeviceStream stream(mode.device);
  const OpContext context{mode.device, RunSerially, stream.handle()};
  const DeviceStream::Current current(stream);
  constexpr int64_t kBand = 8, kMostRows = 4099;
  int taken = 0;
  for (const Sizes& sizes :
       {Sizes{16, 72}, Sizes{272, 64}, Sizes{400, 1032}, Sizes{2000, 8}, Sizes{5648, 200}}) {
    const int64_t f = sizes.n / 2, k = sizes.k, k_stride = k + kBand, c_stride = f + kBand;
    const auto matrix = [&](int64_t rows, uint32_t seed, float deviation) {
      std::vector<float> x = Rounded(RandomNormal(rows * k_stride, seed, deviation), mode.dtype);
      for (int64_t i = 0; i < rows; ++i) std::fill_n(x.begin() + i * k_stride + k, kBand, kNaN);
      return x;
    };
    const std::vector<float> a = matrix(kMostRows, 1, 1);
    const std::vector<float> b = matrix(sizes.n, 2, 1 / std::sqrt(static_cast<float>(k)));
    const DeviceBuffer a_there = OnDevice(a, mode.dtype, mode.device, &stream);
    const DeviceBuffer b_there = OnDevice(b, mode.dtype, mode.device, &stream);
    for (const int64_t m : {1025, 1100, 2050, 4099}) {
      const bool silu = m % 2 == 0;
      SCOPED_TRACE(absl::StrCat("[", m, ",", k, "] x [", k, ",", sizes.n, "]"));
      const DeviceBuffer c =
          OnDevice(std::vector<float>((m + 2) * c_stride, kNaN), mode.dtype, mode.device, &stream);
      FusedGemmArgs args;
      args.gemm.dtype = args.gemm.c_dtype = mode.dtype;
      args.gemm.m = m;
      args.gemm.n = sizes.n;
      args.gemm.k = k;
      args.gemm.a = a_there.data();
      args.gemm.b = b_there.data();
      args.gemm.lda = args.gemm.ldb = k_stride;
      args.gemm.c = c.data() + c_stride * DTypeBytes(mode.dtype);
      args.gemm.ldc = c_stride;
      args.then = FusedGemmArgs::Then::kGate;
      args.gate = silu ? GateKind::kSiluFirst : GateKind::kSigmoidSecond;
      // Of the device alone: a size that is not taken fails.
      if (taken == 0 && !FusedGemmTakes(args, context)) GTEST_SKIP() << "this device has no fused products";
      ASSERT_TRUE(FusedGemmTakes(args, context));
      ++taken;
      const absl::Status status = FusedGemm(args, context);
      ASSERT_TRUE(status.ok()) << status;
      std::vector<char> raw(c.bytes());
      stream.Copy(raw.data(), c.data(), c.bytes());
      stream.Synchronize();
      std::vector<float> all(raw.size() / DTypeBytes(mode.dtype));
      ConvertElements(raw.data(), mode.dtype, all.data(), DType::kFloat32, static_cast<int64_t>(all.size()));
      for (int64_t i = 0; i < m + 2; ++i) {
        for (int64_t j = 0; j < c_stride; ++j) {
          ASSERT_EQ(std::isnan(all[i * c_stride + j]), i == 0 || i > m || j >= f) << i << ", " << j;
        }
      }
      std::vector<float> got, plain;
      std::vector<double> exact;
      for (int64_t at = 0; at < m * f; at += m * f / 5000 | 1) {
        const int64_t i = at / f, j = at % f;
        PlainSum sums[2] = {PlainSum(mode), PlainSum(mode)};
        double exact_sums[2] = {};
        for (int64_t l = 0; l < k; ++l) {
          for (int half = 0; half < 2; ++half) {
            const float from_a = a[i * k_stride + l], from_b = b[(half * f + j) * k_stride + l];
            sums[half].Add(from_a, from_b);
            exact_sums[half] += static_cast<double>(from_a) * from_b;
          }
        }
        const float x = sums[0].value(), y = sums[1].value();
        const double exact_x = exact_sums[0], exact_y = exact_sums[1];
        got.push_back(all[(i + 1) * c_stride + j]);
        plain.push_back(silu ? x / (1 + std::exp(-x)) * y : x / (1 + std::exp(-y)));
        exact.push_back(silu ? exact_x / (1 + std::exp(-exact_x)) * exact_y
                             : exact_x / (1 + std::exp(-exact_y)));
      }
      ExpectAsGoodAsPlain(got.data(), plain.data(), exact.data(), static_cast<int64_t>(got.size()), "c",
                          mode.dtype);
    }
  }
}
#endif

// Rows of products, of up to `most` of them, in which a row's bits are not those that it has in a product of
// its own.
int64_t RowsThatDiffer(const Mode& mode, const Sizes& sizes, bool fixed_order, ParallelFor parallel_for,
                       bool accumulate = false, int64_t most = 300) {
  constexpr int64_t kRows = 64;
  Product product(mode, sizes, kRows, DType::kFloat32, 3, accumulate);
  std::vector<std::vector<float>> alone;
  for (int64_t i = 0; i < kRows; ++i) alone.push_back(product.Run({i}, fixed_order));
  std::mt19937 random(static_cast<uint32_t>(sizes.n * 10000 + sizes.k));
  int64_t differ = 0;
  for (const int64_t m : {2, 3, 4, 7, 16, 64, 127, 128, 129, 300}) {
    if (m > most) break;
    std::vector<int64_t> rows(m);
    for (int64_t& row : rows) row = static_cast<int64_t>(random() % (kRows + 1)) - 1;
    const std::vector<float> c = product.Run(rows, fixed_order, parallel_for);
    for (int64_t i = 0; i < m; ++i) {
      if (rows[i] >= 0 && !SameBits(&c[i * (sizes.n + 3)], alone[rows[i]].data(), sizes.n)) ++differ;
    }
  }
  return differ;
}

TEST_P(GemmTest, InAFixedOrderARowsBitsAreItsOwn) {
  for (const Sizes& sizes : kSizes) {
    for (const bool accumulate : {false, true}) {
      SCOPED_TRACE(absl::StrCat("n ", sizes.n, ", k ", sizes.k, accumulate ? ", added" : ""));
      EXPECT_EQ(RowsThatDiffer(GetParam(), sizes, true, RunSerially, accumulate), 0);
      EXPECT_EQ(RowsThatDiffer(GetParam(), sizes, true, RunInShreds, accumulate), 0);
    }
  }
}

// Of few rows the product in float32 is our own on both devices (on the CPU up to 16).
TEST_P(GemmTest, OfFewRowsInFloat32ARowsBitsAreItsOwn) {
  const Mode& mode = GetParam();
  if (mode.dtype != DType::kFloat32) GTEST_SKIP() << "of float32";
  const int64_t most = mode.device.type == DeviceType::kCpu ? 16 : 128;
  for (const Sizes& sizes : kSizes) {
    for (const bool accumulate : {false, true}) {
      SCOPED_TRACE(absl::StrCat("n ", sizes.n, ", k ", sizes.k, accumulate ? ", added" : ""));
      EXPECT_EQ(RowsThatDiffer(mode, sizes, false, RunSerially, accumulate, most), 0);
    }
  }
}

TEST_P(GemmTest, AFixedOrderCanBeTried) {
  for (const Sizes& sizes : kSizes) {
    EXPECT_TRUE(Product(GetParam(), sizes, 1).Check().ok());
    EXPECT_TRUE(Product(GetParam(), sizes, 1, DType::kFloat32, 3, true).Check().ok());
  }
}

// What the tests above would see.
TEST_P(GemmTest, OtherwiseTheyDependOnTheNumberOfRows) {
  int64_t differ = 0;
  for (const Sizes& sizes : kSizes) differ += RowsThatDiffer(GetParam(), sizes, false, RunSerially);
  RecordProperty("rows_that_differ", absl::StrCat(differ));
  if (differ == 0) GTEST_SKIP() << "not with this device's library";
}

TEST_P(GemmTest, WhatIsImpossibleIsRefused) {
  float value[4] = {};
  GemmArgs good;
  good.m = good.n = good.k = good.lda = good.ldb = good.ldc = 1;
  good.a = good.b = good.c = value;
  const OpContext cpu{Device{}, RunSerially};
  EXPECT_TRUE(Gemm(good, cpu).ok());
  const auto refused = [&](auto change) {
    GemmArgs args = good;
    change(&args);
    EXPECT_EQ(Gemm(args, cpu).code(), absl::StatusCode::kInvalidArgument);
  };
  refused([](GemmArgs* args) { args->m = -1; });
  refused([](GemmArgs* args) { args->n = 0; });
  refused([](GemmArgs* args) { args->k = 2; });  // Beyond lda and ldb.
  refused([](GemmArgs* args) { args->dtype = DType::kBFloat16; });
  refused([](GemmArgs* args) {
    args->dtype = args->c_dtype = DType::kFloat64;
    args->fixed_order = true;
  });
  refused([](GemmArgs* args) {
    args->dtype = args->c_dtype = DType::kFloat64;
    args->accumulate = true;
  });
}

// Of every build of the CPU's own product.
class FixedOrderTest : public IsaTest {};
INSTANTIATE_TEST_SUITE_P(Isa, FixedOrderTest, EveryIsa(),
                         [](const auto& info) { return IsaName(info.param); });

TEST_P(FixedOrderTest, ARowsBitsAreItsOwn) {
  const Mode cpu = Modes().front();
  for (const Sizes& sizes : kSizes) {
    EXPECT_EQ(RowsThatDiffer(cpu, sizes, true, RunSerially), 0) << "n " << sizes.n << ", k " << sizes.k;
    EXPECT_EQ(RowsThatDiffer(cpu, sizes, true, RunInShreds), 0) << "n " << sizes.n << ", k " << sizes.k;
  }
}

}  // namespace
}  // namespace deltanet
