// Gated units, the embedding lookup and what is carried between steps on a GPU, each value read and written
// once: a thread a value, in gated units and the lookup 16 bytes of them where a row's width and place allow.
//
// Bytes a token of a gated unit: 3 f values: 33 KiB of bfloat16 at f = 5632, 554 MB for 16,384 tokens, which
// take 129 us at 4.3 TB/s. ncu (27 November 2026, one H200, at clocks of its own): 130 us at 85 % of the
// memory's peak. The lookup of 16,384 ids, 2048 of them different, d = 2048: 59 us at 43 %, of 134 MB that it
// writes and 8 that it reads: a thread waits for its id and then for one vector of the row, and has no second
// one on its way. That is once a step, of 70 ms; with single tokens it takes 4 to 5 us, as what is carried
// does (3 to 5 us), which is a launch and two or three waits, at under 1 %.
#include <cstdint>

#include "model/ops/cuda_kernels.h"
#include "model/ops/cuda_util.cuh"
#include "model/ops/cuda_vector.cuh"

namespace deltanet {
namespace {

constexpr int kThreads = 256;

// A grid of rows and their pieces, for a thread a vector.
dim3 RowPieces(int64_t rows, int64_t vectors, int threads) {
  return {static_cast<unsigned>(rows), static_cast<unsigned>(Pieces(vectors, threads))};
}

// A block is a piece of a row, a thread kN neighbouring values of it.
template <typename T, int kN>
__global__ void GatedUnitKernel(GatedUnitArgs args) {
  LetNextBegin();
  AwaitEarlier();
  const int64_t n = blockIdx.x, f = args.width;
  const int64_t i = kN * (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x);
  if (i >= f) return;
  const T* const x = static_cast<const T*>(args.x) + n * 2 * f + i;
  float first[kN], second[kN];
  Load<kN>(x, first);
  Load<kN>(x + f, second);
  if (args.bias != nullptr) {
    float first_bias[kN], second_bias[kN];
    Load<kN>(args.bias + i, first_bias);
    Load<kN>(args.bias + f + i, second_bias);
#pragma unroll
    for (int j = 0; j < kN; ++j) first[j] += first_bias[j], second[j] += second_bias[j];
  }
#pragma unroll
  for (int j = 0; j < kN; ++j) first[j] = Gated<T>(args.kind, first[j], second[j]);
  Store<kN>(first, static_cast<T*>(args.out) + n * f + i);
}

template <typename T>
absl::Status LaunchGatedUnit(const GatedUnitArgs& args, cudaStream_t stream) {
  constexpr int kN = 16 / sizeof(T);
  if (args.width % kN == 0 && Aligned16({args.x, args.bias, args.out})) {
    const int threads = BlockThreads(args.width / kN);
    return LaunchOverlapping("GatedUnitKernel", GatedUnitKernel<T, kN>,
                             {.grid = RowPieces(args.rows, args.width / kN, threads), .threads = threads}, stream,
                             args);
  }
  const int threads = BlockThreads(args.width);
  return LaunchOverlapping("GatedUnitKernel", GatedUnitKernel<T, 1>,
                           {.grid = RowPieces(args.rows, args.width, threads), .threads = threads}, stream, args);
}

// A block is a piece of a token's row, a thread kN neighbouring values of it.
template <typename T, int kN>
__global__ void EmbedKernel(RaggedRows rows, EmbedArgs args) {
  const int64_t n = blockIdx.x;
  const int64_t i = kN * (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x);
  if (i >= args.width) return;
  int64_t id = args.ids[n];
  if (id == kSampledId) id = __float_as_int(*args.sampled.at(rows.base_slot[rows.token_row[n]]));
  float values[kN];
  Load<kN>(static_cast<const T*>(args.table) + id * args.width + i, values);
  Store<kN>(values, args.out + n * args.width + i);
}

template <typename T>
void LaunchEmbed(const RaggedRows& rows, const EmbedArgs& args, cudaStream_t stream) {
  constexpr int kN = 16 / sizeof(T);
  if (args.width % kN == 0 && Aligned16({args.table, args.out})) {
    const int threads = BlockThreads(args.width / kN);
    EmbedKernel<T, kN><<<RowPieces(rows.tokens, args.width / kN, threads), threads, 0, stream>>>(rows, args);
  } else {
    const int threads = BlockThreads(args.width);
    EmbedKernel<T, 1><<<RowPieces(rows.tokens, args.width, threads), threads, 0, stream>>>(rows, args);
  }
}

// A thread alone reads and writes its value of each place, so base may be work.
__global__ void CarryKernel(RaggedRows rows, CarryArgs args) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= rows.rows * args.width) return;
  const int64_t r = index / args.width, i = index % args.width;
  const float before = rows.fresh[r] != 0 ? 0.0f : args.carried.at(rows.base_slot[r])[i];
  args.x[rows.tokens * args.width + index] = before;
  if (rows.work_slot[r] < 0) return;
  const int64_t end = rows.offsets[r + 1];
  args.carried.at(rows.work_slot[r])[i] = end > rows.offsets[r] ? args.x[(end - 1) * args.width + i] : before;
}

unsigned Blocks(int64_t values) { return static_cast<unsigned>(Pieces(values, kThreads)); }

}  // namespace

absl::Status GatedUnitCuda(const GatedUnitArgs& args, void* stream) {
  if (args.rows == 0) return absl::OkStatus();
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  return args.dtype == DType::kBFloat16 ? LaunchGatedUnit<__nv_bfloat16>(args, cuda_stream)
                                        : LaunchGatedUnit<float>(args, cuda_stream);
}

absl::Status EmbedCuda(const RaggedRows& rows, const EmbedArgs& args, void* stream) {
  if (rows.tokens == 0) return absl::OkStatus();
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  if (args.dtype == DType::kBFloat16) {
    LaunchEmbed<__nv_bfloat16>(rows, args, cuda_stream);
  } else {
    LaunchEmbed<float>(rows, args, cuda_stream);
  }
  return LaunchStatus("EmbedKernel");
}

absl::Status CarryCuda(const RaggedRows& rows, const CarryArgs& args, void* stream) {
  if (rows.rows == 0) return absl::OkStatus();
  CarryKernel<<<Blocks(rows.rows * args.width), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(rows, args);
  return LaunchStatus("CarryKernel");
}

}  // namespace deltanet
