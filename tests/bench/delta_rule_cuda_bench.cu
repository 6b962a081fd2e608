// The delta rule alone on a GPU, by both kernels, in the cases that prefill is measured by, and the mixer of
// `delta_net` in those of decode, with its convolutions and without: bfloat16 inputs side by side as the
// engine has them, states read from one slot and written to another, beside a plain copy of the same slots. A
// JSON line a case: the median time of a CUDA graph that holds one call, the bytes that the call has to move
// in that time, and the largest difference between the kernels' outputs.
//
//   delta_rule_cuda_bench [REPLAYS]     (30)
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "model/ops/cuda_util.cuh"
#include "model/ops/delta_net_mixer.h"
#include "model/ops/delta_rule.h"
#include "model/ops/delta_rule_cuda.h"
#include "tests/bench/cuda_bench_util.cuh"

namespace deltanet {

#ifdef DELTANET_DELTA_RULE_CLOCKS
void CopyDeltaRuleClocks(int (*clocks)[10]);
#endif

namespace {

// Roughly normal, a function of `index`.
__device__ float Noise(uint64_t index) {
  float sum = 0;
  uint64_t x = index * 0x9e3779b97f4a7c15u + 12345;
  for (int i = 0; i < 4; ++i) {
    x ^= x >> 31;
    x *= 0xbf58476d1ce4e5b9u;
    x ^= x >> 29;
    sum += static_cast<float>(x & 0xffff) * (1.0f / 65536) - 0.5f;
  }
  return sum * 1.7f;
}

__device__ uint16_t RoundToBfloat16(float x) {
  const uint32_t bits = __float_as_uint(x);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// A block a token: unit queries and keys, normal values, betas in (0, 1).
__global__ void FillInputs(uint16_t* inputs, int64_t stride, int heads, int size) {
  uint16_t* const token = inputs + blockIdx.x * stride;
  const int width = heads * size;
  for (int head = threadIdx.x; head < 3 * heads; head += blockDim.x) {
    const uint64_t first = blockIdx.x * stride + head * size;
    float squares = 0;
    for (int i = 0; i < size; ++i) squares += Noise(first + i) * Noise(first + i);
    const float scale = head < 2 * heads ? rsqrtf(squares) : 1.0f;
    for (int i = 0; i < size; ++i) token[head * size + i] = RoundToBfloat16(scale * Noise(first + i));
  }
  for (int head = threadIdx.x; head < heads; head += blockDim.x) {
    token[3 * width + head] = RoundToBfloat16(1.0f / (1.0f + expf(-Noise(~(blockIdx.x * stride + head)))));
  }
}
__global__ void FillStates(float* states, int64_t count) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < count;
       i += gridDim.x * int64_t{blockDim.x}) {
    states[i] = 0.1f * Noise(i);
  }
}

// Copies base slots' states to the work slots, a head of 128 a block of 256 threads.
__global__ void CopyStates(RaggedRows rows, SlotView state, int heads) {
  constexpr int kHeld = 16;
  const int row = blockIdx.x / heads;
  const int64_t at = int64_t{blockIdx.x} % heads * (128 * 128) + 4 * threadIdx.x;
  const float* const from = state.pool + rows.base_slot[row] * state.slot_stride + state.offset + at;
  float* const to = state.pool + rows.work_slot[row] * state.slot_stride + state.offset + at;
  float4 held[kHeld];
#pragma unroll
  for (int i = 0; i < kHeld; ++i) held[i] = __ldcs(reinterpret_cast<const float4*>(from + 1024 * i));
#pragma unroll
  for (int i = 0; i < kHeld; ++i) __stcs(reinterpret_cast<float4*>(to + 1024 * i), held[i]);
}

void PrintClocks() {
#ifdef DELTANET_DELTA_RULE_CLOCKS
  int clocks[4][10];
  CopyDeltaRuleClocks(clocks);
  for (const auto& group : clocks) {
    std::printf("    cycles:");
    for (const int spent : group) std::printf(" %9d", spent);
    std::printf("\n");
  }
#endif
}

void Run(const std::string& name, const std::vector<int32_t>& lengths, int heads, int size, int replays) {
  const int32_t R = static_cast<int32_t>(lengths.size());
  std::vector<int32_t> offsets = {0}, base, work;
  for (int32_t r = 0; r < R; ++r) {
    offsets.push_back(offsets.back() + lengths[r]);
    base.push_back(2 * r);
    work.push_back(2 * r + 1);
  }
  const int64_t N = offsets.back(), width = int64_t{heads} * size;
  const int64_t stride = (3 * width + heads + 63) / 64 * 64, slot = width * size;
  const Array<int32_t> offsets_there(offsets), base_there(base), work_there(work);
  const Array<uint8_t> fresh(std::vector<uint8_t>(R, 0));
  const Array<int32_t> nonfinite(std::vector<int32_t>(R, 0));
  const Array<uint16_t> inputs(N * stride), narrow(N * width);
  const Array<float> states(2 * R * slot), out(N * width);
  FillInputs<<<static_cast<unsigned>(N), 64>>>(inputs.data(), stride, heads, size);
  FillStates<<<1024, 256>>>(states.data(), 2 * R * slot);
  Check(cudaDeviceSynchronize(), "filling");

  cudaStream_t stream;
  Check(cudaStreamCreate(&stream), "stream");
  const OpContext context{
      .device = {.type = DeviceType::kCuda, .index = 0}, .parallel_for = NotOnTheHost, .stream = stream};
  RaggedRows rows{.rows = R,
                  .tokens = N,
                  .shortest = *std::min_element(lengths.begin(), lengths.end()),
                  .longest = *std::max_element(lengths.begin(), lengths.end()),
                  .offsets = offsets_there.data(),
                  .base_slot = base_there.data(),
                  .work_slot = work_there.data(),
                  .fresh = fresh.data()};
  const int64_t blocks = DeltaRuleChunkBlocks(context.device, DType::kBFloat16, size, size);
  std::vector<int32_t> plan(MaxChunkPlanSize(R, heads, size, blocks));
  if (blocks > 0) rows.chunks = PlanChunks(offsets, heads, size, blocks, /*splits=*/true, plan.data());
  const Array<int32_t> plan_there(plan);
  rows.chunks.numbers = plan_there.data();
  const Array<float> segment_states(std::max<int64_t>(1, MaxSegmentStates(N, heads, size, blocks) * slot));
  std::vector<float> first;
  for (const auto& [path, path_name] :
       {std::pair(DeltaRuleCudaPath::kTokens, "tokens"), std::pair(DeltaRuleCudaPath::kChunks, "chunks")}) {
    for (const bool is_narrow : {false, true}) {
      DeltaRuleArgs args{.heads = heads,
                         .key_dim = size,
                         .value_dim = size,
                         .dtype = DType::kBFloat16,
                         .q = inputs.data(),
                         .k = inputs.data() + width,
                         .v = inputs.data() + 2 * width,
                         .beta = inputs.data() + 3 * width,
                         .token_stride = stride,
                         .scale = 1.0f / std::sqrt(static_cast<float>(size)),
                         .state = {.pool = states.data(), .slot_stride = slot, .offset = 0},
                         .out = out.data(),
                         .nonfinite = nonfinite.data(),
                         .segment_states = segment_states.data()};
      if (is_narrow) args.out_bfloat16 = narrow.data();
      const bool chunks = path == DeltaRuleCudaPath::kChunks;
      if (chunks && !DeltaRuleChunkCudaTakes(args)) continue;
      if (!chunks && is_narrow) continue;
      SetDeltaRuleCudaPathForTesting(path);
      const double us =
          MedianMicroseconds(stream, chunks ? replays : 5, [&] { return DeltaRule(rows, args, context); });
      std::vector<float> got(N * width);
      if (is_narrow) {
        const std::vector<uint16_t> raw = narrow.Host();
        for (size_t i = 0; i < got.size(); ++i) {
          const uint32_t bits = uint32_t{raw[i]} << 16;
          std::memcpy(&got[i], &bits, 4);
        }
      } else {
        got = out.Host();
      }
      double difference = 0, largest = 0;
      if (first.empty()) first = got;
      for (size_t i = 0; i < got.size(); ++i) {
        const double d = std::fabs(double{got[i]} - first[i]);
        if (!(d <= difference)) difference = d;
        largest = std::max(largest, std::fabs(double{first[i]}));
      }
      const double bytes = static_cast<double>(N) * heads * (3 * size + 1) * 2 +
                           static_cast<double>(N) * width * (is_narrow ? 2 : 4) + 8.0 * R * slot;
      std::printf(
          "{\"case\": \"%s\", \"kernel\": \"%s\", \"out\": \"%s\", \"us\": %.1f, \"tb_per_s\": %.3f, "
          "\"difference\": %.2e, \"largest\": %.3f}\n",
          name.c_str(), path_name, is_narrow ? "bfloat16" : "float32", us, bytes / us * 1e-6, difference,
          largest);
      if (chunks) PrintClocks();
      std::fflush(stdout);
    }
  }
  SetDeltaRuleCudaPathForTesting(DeltaRuleCudaPath::kDefault);
  cudaStreamDestroy(stream);
}

// Sessions of `tokens` tokens each through a mixer of 16 heads of 128. Without convolutions (0 taps) that is
// the delta rule with its L2 norms and an output norm, and of what is in slots the state alone.
void RunMixer(int sessions, int tokens, int taps, int replays) {
  constexpr int kHeads = 16, kSize = 128, kMostTaps = 4;
  constexpr int64_t kWidth = kHeads * kSize, kStride = 3 * kWidth + 64, kState = kWidth * kSize;
  constexpr int64_t kSlot = kState + (kMostTaps - 1) * 3 * kWidth / 2;
  const int64_t N = int64_t{sessions} * tokens;
  std::vector<int32_t> offsets = {0}, base, work, token_row;
  for (int32_t r = 0; r < sessions; ++r) {
    offsets.push_back(offsets.back() + tokens);
    base.push_back(2 * r);
    work.push_back(2 * r + 1);
    token_row.insert(token_row.end(), tokens, r);
  }
  const Array<int32_t> offsets_there(offsets), base_there(base), work_there(work), token_row_there(token_row);
  const Array<uint8_t> fresh(std::vector<uint8_t>(sessions, 0));
  const Array<int32_t> nonfinite(std::vector<int32_t>(sessions, 0));
  const Array<uint16_t> z(N * kStride), qkv(N * kStride), mixed(N * kWidth), out(N * kWidth);
  const Array<float> slots(2 * sessions * kSlot), weight(std::vector<float>(kMostTaps * 3 * kWidth, 0.3f));
  const Array<float> scale(std::vector<float>(kSize, 1.0f));
  FillInputs<<<static_cast<unsigned>(N), 64>>>(z.data(), kStride, kHeads, kSize);
  FillStates<<<1024, 256>>>(slots.data(), 2 * sessions * kSlot);
  Check(cudaDeviceSynchronize(), "filling");

  cudaStream_t stream;
  Check(cudaStreamCreate(&stream), "stream");
  const OpContext context{
      .device = {.type = DeviceType::kCuda, .index = 0}, .parallel_for = NotOnTheHost, .stream = stream};
  const RaggedRows rows{.rows = sessions,
                        .tokens = N,
                        .shortest = tokens,
                        .longest = tokens,
                        .offsets = offsets_there.data(),
                        .token_row = token_row_there.data(),
                        .base_slot = base_there.data(),
                        .work_slot = work_there.data(),
                        .fresh = fresh.data()};
  const SlotView state{.pool = slots.data(), .slot_stride = kSlot, .offset = 0};
  DeltaNetMixerArgs args;
  args.conv = {.heads = kHeads,
               .key_dim = kSize,
               .value_dim = kSize,
               .taps = taps,
               .dtype = DType::kBFloat16,
               .z = z.data(),
               .z_stride = kStride,
               .weight = weight.data(),
               .tail = {.pool = slots.data(), .slot_stride = kSlot, .offset = kState},
               .out = qkv.data(),
               .out_stride = kStride};
  args.rule = {.heads = kHeads,
               .key_dim = kSize,
               .value_dim = kSize,
               .dtype = DType::kBFloat16,
               .q = qkv.data(),
               .k = qkv.data() + kWidth,
               .v = qkv.data() + 2 * kWidth,
               .beta = qkv.data() + 3 * kWidth,
               .token_stride = kStride,
               .scale = 1.0f / std::sqrt(static_cast<float>(kSize)),
               .state = state,
               .out_bfloat16 = mixed.data(),
               .nonfinite = nonfinite.data()};
  args.norm = {.rows = N,
               .groups = kHeads,
               .width = kSize,
               .dtype = DType::kBFloat16,
               .x = mixed.data(),
               .scale = scale.data(),
               .epsilon = {.after = 0, .inside = 1e-5f},
               .out = out.data()};
  const double us = MedianMicroseconds(stream, replays, [&] { return DeltaNetMixer(rows, args, context); });
  const double bytes = 8.0 * sessions * (taps > 0 ? kSlot : kState) +
                       2.0 * static_cast<double>(N) * (3 * kWidth + kHeads + kWidth);
  std::printf("{\"case\": \"mixer%s, %d x %d, 16 heads of 128\", \"us\": %.1f, \"tb_per_s\": %.3f}\n",
              taps > 0 ? "" : " without convolutions", sessions, tokens, us, bytes / us * 1e-6);
  if (tokens == 1 && taps == 0) {
    const double copy_us = MedianMicroseconds(stream, replays, [&] {
      CopyStates<<<sessions * kHeads, 256, 0, stream>>>(rows, state, kHeads);
      return LaunchStatus("CopyStates");
    });
    std::printf("{\"case\": \"states copied, %d, 16 heads of 128\", \"us\": %.1f, \"tb_per_s\": %.3f}\n",
                sessions, copy_us, 8e-6 * sessions * kState / copy_us);
  }
  std::fflush(stdout);
  cudaStreamDestroy(stream);
}

}  // namespace
}  // namespace deltanet

int main(int argc, char** argv) {
  using deltanet::Run;
  using deltanet::RunMixer;
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::printf("no GPU\n");
    return 77;
  }
  const int replays = argc > 1 ? std::atoi(argv[1]) : 30;
  Run("8 x 2048, 16 heads of 128", std::vector<int32_t>(8, 2048), 16, 128, replays);
  Run("1 x 8192, 16 heads of 128", {8192}, 16, 128, replays);
  Run("1 x 32768, 16 heads of 128", {32768}, 16, 128, replays);
  Run("32 x 512, 16 heads of 128", std::vector<int32_t>(32, 512), 16, 128, replays);
  Run("64 x 64, 16 heads of 128", std::vector<int32_t>(64, 64), 16, 128, replays);
  Run("32 ragged rows, 16 heads of 128",
      {1,    3,    17, 40, 64, 65,  100, 128, 130, 200, 256, 300, 31, 77, 513, 700,
       1024, 1500, 90, 45, 12, 333, 222, 111, 64,  64,  800, 950, 60, 5,  9,   999},
      16, 128, replays);
  Run("8 x 4096, 32 heads of 64", std::vector<int32_t>(8, 4096), 32, 64, replays);
  Run("8 x 2048, 8 heads of 256", std::vector<int32_t>(8, 2048), 8, 256, replays);
  Run("1 x 512, 16 heads of 128", {512}, 16, 128, replays);
  Run("1 x 2048, 16 heads of 128", {2048}, 16, 128, replays);
  Run("2 x 8192, 16 heads of 128", {8192, 8192}, 16, 128, replays);
  for (const int sessions : {1, 16, 64, 256, 1024}) {
    for (const int taps : {4, 0}) RunMixer(sessions, 1, taps, replays);
  }
  for (const int tokens : {8, 16}) RunMixer(64, tokens, 4, replays);
  return 0;
}
