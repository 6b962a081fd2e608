// A `delta_net` layer's operators on a GPU, at the sizes of the 1.3B model in bfloat16 (d = 2048, 16 heads of
// 128, f = 5632). A JSON line a case: the median time of a CUDA graph that holds one call, the bytes that the
// call has to move in that time, and that rate as a share of a plain copy's, measured first. Steps of few
// tokens stay in the L2. Besides, the readout of 32,000 ids, and products in float32 of the sizes of narrow
// models.
//
// Products of few tokens have what surrounds them in a layer with them (FusedGemm, on Hopper), those of many
// are added to the residual stream where a layer adds them, and measured with the gate too where it has one.
// Of products a graph holds a row, each with another matrix, so that these come from memory, and the time is
// one's share of the row's. Operands are random: of zeros, a library's product of many tokens is faster than
// the device has power for.
//
//   ops_cuda_bench [REPLAYS]     (30)
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "model/base/round_up.h"
#include "model/device.h"
#include "model/ops/cuda_util.cuh"
#include "model/ops/elementwise.h"
#include "model/ops/gemm.h"
#include "model/ops/output_norm.h"
#include "model/ops/readout.h"
#include "model/ops/rms_norm.h"
#include "model/ops/short_conv.h"
#include "tests/bench/cuda_bench_util.cuh"

namespace deltanet {
namespace {

constexpr int64_t kD = 2048, kHeads = 16, kSize = 128, kF = 5632, kTaps = 4;
constexpr int64_t kQkv = 3 * kD, kGate = kQkv + kHeads;
constexpr int64_t kZStride = RoundUp(kGate + kD, 64), kOutStride = RoundUp(kGate, 64);
constexpr int64_t kMostFusedTokens = 128, kVocabulary = 32000;
constexpr int64_t kMatrixBytes = int64_t{512} << 20;  // Of weights: many times the L2.
constexpr Device kDevice = {.type = DeviceType::kCuda, .index = 0};
constexpr RmsEpsilon kNormEpsilon = {.after = 0.0f, .inside = 1e-5f};

// Values between -1 and 1.
__global__ void RandomKernel(__nv_bfloat16* values, int64_t size) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < size; i += step) {
    uint32_t bits = static_cast<uint32_t>(i) * 2654435761u;
    bits = (bits ^ bits >> 15) * 2246822519u;
    values[i] = __float2bfloat16_rn(static_cast<float>(bits >> 8) * 0x1p-23f - 1.0f);
  }
}

class Bench {
 public:
  Bench(int64_t most_tokens, int replays)
      : replays_(replays),
        stream_(kDevice),
        current_(stream_),
        x_(most_tokens * kD),
        scale_(kF),
        narrow_(most_tokens * kD),
        normed_(most_tokens * kD),
        wide_(most_tokens * 2 * kF),
        gated_(most_tokens * 2 * kF),
        squares_(kMostFusedTokens * SquaresWidth(kD)),
        matrices_(kDevice, kMatrixBytes) {
    Clear(x_, most_tokens * kD);
    Clear(scale_, kF);
    Clear(narrow_, most_tokens * kD);
    Clear(squares_, kMostFusedTokens * SquaresWidth(kD));
    Fill(wide_.data(), most_tokens * 2 * kF);
    Fill(matrices_.data(), kMatrixBytes / 2);
    const int64_t bytes = most_tokens * kF * 2;
    const double us = MedianMicroseconds(stream(), replays_, [&] {
      Check(cudaMemcpyAsync(gated_.data(), wide_.data(), bytes, cudaMemcpyDeviceToDevice, stream()), "copy");
      return absl::OkStatus();
    });
    copy_rate_ = 2.0 * static_cast<double>(bytes) / us;
    Print("copy", most_tokens, us, 2.0 * static_cast<double>(bytes));
  }

  void Norm(int64_t N) {
    const AddRmsNormArgs args{.rows = N,
                              .width = kD,
                              .x = x_.data(),
                              .scale = scale_.data(),
                              .epsilon = kNormEpsilon,
                              .normed_dtype = DType::kBFloat16,
                              .normed = normed_.data()};
    Measure("RmsNorm", N, 6.0 * kD * N, [&] { return AddRmsNorm(args, context()); });
  }

  void Gated(int64_t N) {
    const GatedUnitArgs args{.kind = GateKind::kSiluFirst,
                             .rows = N,
                             .width = kF,
                             .dtype = DType::kBFloat16,
                             .x = wide_.data(),
                             .out = gated_.data()};
    Measure("GatedUnit", N, 6.0 * kF * N, [&] { return GatedUnit(args, context()); });
  }

  void Output(int64_t N) {
    const OutputNormArgs args{.rows = N,
                              .groups = kHeads,
                              .width = kSize,
                              .dtype = DType::kBFloat16,
                              .x = narrow_.data(),
                              .scale = scale_.data(),
                              .epsilon = kNormEpsilon,
                              .gate = wide_.data() + kGate,
                              .gate_stride = kZStride,
                              .out = normed_.data()};
    Measure("OutputNorm", N, 6.0 * kD * N, [&] { return OutputNorm(args, context()); });
  }

  // m rows times a matrix [n, k], or added to the residual stream.
  void Product(const char* op, int64_t m, int64_t n, int64_t k, bool accumulate = false) {
    const int64_t matrices = kMatrixBytes / (2 * n * k);
    GemmArgs args{.dtype = DType::kBFloat16,
                  .c_dtype = accumulate ? DType::kFloat32 : DType::kBFloat16,
                  .m = m,
                  .n = n,
                  .k = k,
                  .a = wide_.data(),
                  .lda = k,
                  .ldb = k,
                  .c = accumulate ? static_cast<void*>(x_.data()) : gated_.data(),
                  .ldc = n,
                  .accumulate = accumulate};
    const double us = MedianMicroseconds(stream(), replays_, [&]() -> absl::Status {
      for (int64_t i = 0; i < matrices; ++i) {
        args.b = matrices_.data() + i * n * k * 2;
        if (absl::Status status = Gemm(args, context()); !status.ok()) return status;
      }
      return absl::OkStatus();
    });
    const double c_bytes = accumulate ? 8.0 : 2.0;
    Print(op, m, us / static_cast<double>(matrices),
          2.0 * static_cast<double>(n * k + m * k) + c_bytes * static_cast<double>(m * n));
  }

  // m rows times a matrix [n, k]; with an RMSNorm before it, or not.
  FusedGemmArgs Fused(int64_t m, int64_t n, int64_t k, FusedGemmArgs::Then then, bool normed) const {
    FusedGemmArgs args{.gemm = {.dtype = DType::kBFloat16,
                                .c_dtype = DType::kBFloat16,
                                .m = m,
                                .n = n,
                                .k = k,
                                .a = wide_.data(),
                                .lda = k,
                                .b = matrices_.data(),
                                .ldb = k,
                                .c = gated_.data(),
                                .ldc = then == FusedGemmArgs::Then::kGate ? n / 2 : n}};
    if (normed) args.squares = squares_.data();
    args.epsilon = kNormEpsilon;
    args.then = then;
    args.gate = GateKind::kSiluFirst;
    if (then == FusedGemmArgs::Then::kAdd) {
      args.x = x_.data();
      args.scale = scale_.data();
      args.x_squares = squares_.data();
    }
    return args;
  }

  // These products in turn.
  void Products(const char* op, std::vector<FusedGemmArgs> turn) {
    int64_t elements = 0;
    double bytes = 0;
    for (const FusedGemmArgs& args : turn) {
      if (!FusedGemmTakes(args, context())) return;
      const GemmArgs& gemm = args.gemm;
      elements += gemm.n * gemm.k;
      bytes += 2.0 * static_cast<double>(gemm.n * gemm.k + gemm.m * (gemm.k + gemm.ldc));
    }
    const int64_t turns = kMatrixBytes / (2 * elements);
    const double us = MedianMicroseconds(stream(), replays_, [&]() -> absl::Status {
      const char* matrix = matrices_.data();
      for (int64_t i = 0; i < turns; ++i) {
        for (FusedGemmArgs& args : turn) {
          args.gemm.b = matrix;
          matrix += 2 * args.gemm.n * args.gemm.k;
          if (absl::Status status = FusedGemm(args, context()); !status.ok()) return status;
        }
      }
      return absl::OkStatus();
    });
    Print(op, turn[0].gemm.m, us / static_cast<double>(turns), bytes);
  }

  // In float32, m rows times one matrix [n, k] again and again: as in a step of a narrow model it is in the
  // L2.
  void SmallProduct(int64_t m, int64_t n, int64_t k) {
    const GemmArgs args{.m = m,
                        .n = n,
                        .k = k,
                        .a = x_.data(),
                        .lda = k,
                        .b = wide_.data(),
                        .ldb = k,
                        .c = gated_.data(),
                        .ldc = n};
    constexpr int kTimes = 20;
    const double us = MedianMicroseconds(stream(), replays_, [&]() -> absl::Status {
      for (int i = 0; i < kTimes; ++i) {
        if (absl::Status status = Gemm(args, context()); !status.ok()) return status;
      }
      return absl::OkStatus();
    });
    const std::string op = absl::StrCat("float32 product of a narrow layer, ", n, " x ", k);
    Print(op.c_str(), m, us / kTimes, 4.0 * static_cast<double>(n * k + m * k + m * n));
  }

  void GatedProduct(int64_t m) {
    Products("product to gate and up, gated", {Fused(m, 2 * kF, kD, FusedGemmArgs::Then::kGate, false)});
  }

  void LayersProducts(int64_t m) {
    using Then = FusedGemmArgs::Then;
    const FusedGemmArgs qkv = Fused(m, kGate, kD, Then::kStore, true),
                        out = Fused(m, kD, kD, Then::kAdd, false),
                        ff_in = Fused(m, 2 * kF, kD, Then::kGate, true),
                        ff_out = Fused(m, kD, kF, Then::kAdd, false);
    Products("product to q, k, v, beta", {qkv});
    Products("product out", {out});
    Products("product to gate and up", {ff_in});
    Products("product down", {ff_out});
    Products("these four in turn", {qkv, out, ff_in, ff_out});
    Products("product to logits", {Fused(m, kVocabulary, kD, Then::kStore, false)});
  }

  // M rows of normal logits, which a step has in the L2 when it reads them, as here.
  void ReadoutOf(const char* op, int64_t M, const ReadoutRequest& request) {
    std::vector<float> host(M * kVocabulary);
    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    for (float& logit : host) logit = normal(random);
    const Array<float> logits(host), log_probs(M), top_log_probs(M * kMaxTopTokens);
    const Array<int32_t> ids(M), top_ids(M * kMaxTopTokens);
    const Array<ReadoutRequest> requests(std::vector<ReadoutRequest>(M, request));
    const ReadoutArgs args{.rows = M,
                           .vocabulary = kVocabulary,
                           .logits = logits.data(),
                           .logits_stride = kVocabulary,
                           .requests = requests.data(),
                           .ids = ids.data(),
                           .log_probs = log_probs.data(),
                           .top_ids = top_ids.data(),
                           .top_log_probs = top_log_probs.data()};
    Measure(op, M, 4.0 * kVocabulary * M, [&] { return Readout(args, context()); });
  }

  // R rows of T tokens.
  void Conv(int64_t R, int64_t T) {
    const int64_t N = R * T, tail = (kTaps - 1) * kQkv;
    std::vector<int32_t> offsets = {0}, token_row, base, work;
    for (int32_t r = 0; r < R; ++r) {
      offsets.push_back(offsets.back() + static_cast<int32_t>(T));
      token_row.resize(offsets.back(), r);
      base.push_back(2 * r);
      work.push_back(2 * r + 1);
    }
    const Array<int32_t> offsets_there(offsets), token_row_there(token_row), base_there(base),
        work_there(work);
    const Array<uint8_t> fresh(std::vector<uint8_t>(R, 0));
    const Array<float> pool(2 * R * tail), weight(kTaps * kQkv);
    Clear(pool, 2 * R * tail);
    Clear(weight, kTaps * kQkv);
    const RaggedRows rows{.rows = R,
                          .tokens = N,
                          .shortest = T,
                          .longest = T,
                          .offsets = offsets_there.data(),
                          .token_row = token_row_there.data(),
                          .base_slot = base_there.data(),
                          .work_slot = work_there.data(),
                          .fresh = fresh.data(),
                          .in_place = false};
    const ShortConvQkvArgs args{.heads = kHeads,
                                .key_dim = kSize,
                                .value_dim = kSize,
                                .taps = kTaps,
                                .dtype = DType::kBFloat16,
                                .z = wide_.data(),
                                .z_stride = kZStride,
                                .weight = weight.data(),
                                .tail = {.pool = pool.data(), .slot_stride = tail, .offset = 0},
                                .out = gated_.data(),
                                .out_stride = kOutStride};
    const double bytes = 4.0 * kGate * N + 4.0 * tail * R;
    Measure(T == 1 ? "ShortConvQkv, a token a row" : "ShortConvQkv", N, bytes,
            [&] { return ShortConvQkv(rows, args, context()); });
  }

 private:
  template <typename T>
  void Clear(const Array<T>& array, int64_t size) {
    Check(cudaMemset(array.data(), 0, size * sizeof(T)), "clearing");
  }
  void Fill(void* values, int64_t size) {
    RandomKernel<<<4096, 256>>>(static_cast<__nv_bfloat16*>(values), size);
    Check(cudaDeviceSynchronize(), "filling");
  }
  cudaStream_t stream() const { return static_cast<cudaStream_t>(stream_.handle()); }
  OpContext context() const {
    return {.device = kDevice, .parallel_for = NotOnTheHost, .stream = stream_.handle()};
  }
  void Measure(const char* op, int64_t tokens, double bytes, absl::FunctionRef<absl::Status()> call) {
    Print(op, tokens, MedianMicroseconds(stream(), replays_, call), bytes);
  }
  void Print(const char* op, int64_t tokens, double us, double bytes) const {
    std::printf("{\"op\": \"%s\", \"tokens\": %lld, \"us\": %.1f, \"gb_per_s\": %.0f, \"of_copy\": %.2f}\n",
                op, static_cast<long long>(tokens), us, bytes / us * 1e-3, bytes / us / copy_rate_);
    std::fflush(stdout);
  }

  const int replays_;
  const DeviceStream stream_;
  const DeviceStream::Current current_;  // LibTorch makes the products of many tokens.
  double copy_rate_ = 0;                 // Bytes a microsecond, read and written.
  const Array<float> x_, scale_;
  const Array<uint16_t> narrow_, normed_, wide_, gated_;
  const Array<float> squares_;
  const DeviceBuffer matrices_;  // LibTorch's, which so is ready to make products.
};

}  // namespace
}  // namespace deltanet

int main(int argc, char** argv) {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::printf("no GPU\n");
    return 77;
  }
  deltanet::Bench bench(16384, argc > 1 ? std::atoi(argv[1]) : 30);
  for (const int64_t m : {1, 16, 32, 64, 128}) bench.LayersProducts(m);
  for (const int64_t m : {512, 2048, 16384}) {
    bench.Product("product to q, k, v, beta", m, deltanet::kGate, deltanet::kD);
    bench.Product("product out", m, deltanet::kD, deltanet::kD, /*accumulate=*/true);
    bench.Product("product to gate and up", m, 2 * deltanet::kF, deltanet::kD);
    bench.GatedProduct(m);
    bench.Product("product down", m, deltanet::kD, deltanet::kF, /*accumulate=*/true);
  }
  for (const int64_t m : {1, 16, 64, 256}) {
    bench.SmallProduct(m, 193, 192);
    bench.SmallProduct(m, 64, 64);
  }
  for (const int64_t tokens : {1, 32, 256, 2048, 16384}) {
    bench.Norm(tokens);
    bench.Gated(tokens);
    bench.Output(tokens);
    if (tokens <= 256) bench.Conv(tokens, 1);
    if (tokens > 1) bench.Conv(1, tokens);
  }
  bench.Conv(8, 2048);
  for (const int64_t rows : {64, 256}) {
    bench.ReadoutOf("readout, the likeliest", rows, {.sample = 1});
    bench.ReadoutOf("readout, sampled", rows, {.sample = 1, .temperature = 1});
    bench.ReadoutOf("readout, sampled of the likeliest 50", rows,
                    {.sample = 1, .temperature = 1, .top_k = 50});
    bench.ReadoutOf("readout, sampled of 0.9 of the mass", rows,
                    {.sample = 1, .temperature = 1, .top_p = 0.9f});
    bench.ReadoutOf("readout, the likeliest 64", rows, {.top = 64});
  }
  return 0;
}
