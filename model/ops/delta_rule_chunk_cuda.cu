// The delta rule on a Hopper GPU, in chunks of 64 tokens on the tensor cores.
//
// Chunkwise form. For one head, with the chunk's keys, queries and values as rows of K, Q, V, its betas as a
// diagonal B, and S at its start,
//
//   A = tril(B K K^T, -1)      T = (I + A)^-1 B      P = tril(Q K^T)
//   U = T (V - K S)            O = scale (Q S + P U)            S += K^T U
//
// T and P come from the chunk alone; the chain from chunk to chunk is K S, then U, then S.
//
// Tiling. A block has four warpgroups, one or two consumers and for the rest producers, and works through its
// share of the pieces (row, head, part of V) as planned (delta_rule_plan.h). A consumer has 64 columns of S.
// It works on transposes, so that everything that depends on S is a left operand and lives in its registers,
// where the result of one product, rounded to pairs, is the left operand of the next:
//
//   X^T = V^T - S^T K^T  [64, C]      U^T = X^T T^T  [64, C]      S^T += U^T K  [64, K]
//   O^T = S^T Q^T + U^T P^T  [64, C]
//
// S^T stays in float32 accumulators for the row's whole length; the products are asynchronous (wgmma), Q S
// and P U running while the chain rounds its operands. Producers run ahead: they copy the next chunk
// (bulk copies of tiles, 2 or 3 stages of q, k, v) and make T and P (2 or 3 slots) of a chunk while the
// consumers are at the one before. With two consumers (V = 128) one producer makes T and the other copies and
// makes P; with one consumer (V = 64, V = 256 split over four blocks, or V = 128 split over two, when there
// are fewer rows and heads than half the multiprocessors) two make T, of chunks in turn, as soon as its keys
// are there, and the third copies and makes P.
//
// With K = 256 S^T takes 128 of a thread's 240 registers and a stage 72 KiB. So S^T is rounded 16 columns at
// a time, on its way into S^T K^T and S^T Q^T, which go side by side; and U^T P^T comes before U^T K, so that
// the output is stored while S^T is updated.
//
// Split rows. One or few long rows leave multiprocessors idle. The plan may cut them into segments, whole
// chunks but for the last, in two passes. A segment's effect on the state before it, S' = M S + D, is the
// same recurrence without outputs: D from v and S = 0; M - I also from S = 0, with -k in the place of v.
//   1. SegmentEffectsKernel: M - I and D of the segments between the first and the last; a block has two
//      consumers of 64 columns of [M - I, D] each, and two producers that copy k and v and make T, of chunks
//      in turn. The two blocks that K = 128 takes are a cluster, in which each makes T of every second pair
//      of chunks for both. Beside it, the kernel above takes the first segments, with outputs.
//   2. JoinSegmentsKernel: the state after each, S' = S + (M - I) S + D, one after another, in float32 (the
//      product on operands split in two bfloat16, three products). Where beta = 0, M - I is 0 and S stays as
//      it was.
//   3. The kernel above, over all other segments (and rows) side by side, from those states.
// Between the passes two states [H, K, V] a segment are kept, in float32.
//
// T, on a warpgroup whose warp w has rows 16w to 16w+15 of A: each warp inverts its diagonal 16x16 block by
// substitution in float32, a lane a column. Then warp j goes down block column j in registers,
// T_ij = -T_ii (A_ij T_jj + ... + A_i,i-1 T_i-1,j), by mma on operands split in two bfloat16 (hi hi + hi lo +
// lo hi: 2^-16). No power of A is ever formed: with equal keys and beta near 2 they would grow like 2^n / n!.
//
// Precision. Operands of products are bfloat16, sums float32. T is used as hi + lo: what a chunk leaves of S
// along a key is 1 minus sums over T that cancel (equal keys, beta = 1.99: each token keeps -0.99 of it), and
// T rounded to bfloat16 makes that a factor beyond 1 (after 512 tokens the error is 1000 times the signal).
// X, U, P and S as an operand are rounded once: against float64 the error is below that of the definition
// with every value stored in bfloat16, and 1.3 to 1.7 times that of the definition with float32 state whose
// operands alone are rounded, for keys that are not nearly equal.
//
// Bytes a token and head: 2 (2K + V) read (q and k again for each part where V is split), 4 V (or 2 V,
// bfloat16) written; 8 K V a row and head. K = V = 128 and bfloat16 out: 1 KiB a token and head, so 8 rows of
// 2048 tokens with 16 heads are 285 MB: 66 us at 4.3 TB/s. Multiply-adds a chunk: 64 (3 K V + 2 64 K + 3 64
// V) = 5.8 M for K = V = 128, of which the tensor cores of a multiprocessor do 2048 a cycle: 2816 cycles a
// chunk, so 32 chunks take 51 us at 1.75 GHz; the chain alone (one consumer: 64 x 64 x (2 K + 64 2)) 640
// cycles and its latencies. K = V = 256: each part makes T and P again, 64 64 (5 K + 3 64) = 6.0 M or 2944
// cycles a chunk; 8 rows of 2048 tokens with 8 heads are 302 MB (70 us) and two parts a block (108 us).
//
// A row of 8192 tokens and 16 heads in five segments of some 26 chunks: the first pass computes 0.6 of the
// row's effects and 0.2 of the row, the last 0.8; 7 MB are kept between.
//
// Measured (28 November 2026, one H200, CUDA graph of one call, us, bfloat16 out; 16 heads of 128 unless
// said; delta_rule_cuda_bench; with float32 out up to 22 us more; in brackets where the row is not split):
//
//   8 rows of 2048     121             32 rows of 512             135      1 row of 512      23
//   1 row of 8192      123  (247)      64 rows of 64               81      1 row of 2048     50 (67)
//   1 row of 32768     415  (956)      32 ragged rows, 8913       102      2 rows of 8192   188 (248)
//   8 rows of 4096, 32 heads of 64                         218
//   8 rows of 2048, 8 heads of 256                         201
//
// Token by token, 8 rows of 2048 take 2505, with 8 heads of 256 7040.
//
// ncu, at its own clocks, which are lower: 8 rows of 2048 156, tensor cores busy for 44 % of the time, memory
// at 36 % of its peak (float32 out 175, 39 and 39 %); one row of 8192: the effects 82, tensor cores 31 %, and
// beside them the first segment 56; the join 12, tensor cores 11 %, memory 13 %; the segments 83,
// 43 and 27 %.
//
// What bounds it, by the clocks of each warpgroup (DELTANET_DELTA_RULE_CLOCKS). Two consumers: the one that
// makes T, 6200 cycles a chunk: 1300 waiting for K K^T behind the consumers' products, 2000 to store A and
// invert the diagonal, 700 at the barrier, 2200 down the columns; the consumers wait for 40 % of the time.
// Cutting T between both producers (A and the diagonal; the columns and P) took 141 us instead of 122, for
// their 64 registers a thread do not hold it. One consumer: the stages, of which there are three: each lives
// from its copy through T to the consumer's end with the chunk, in all 11,800 cycles, 3940 a chunk (the
// consumer is at it for 2900 of them, the tensor cores for 1150, and 1660 with T's and P's). T's makers
// waiting for the keys alone, with a barrier of their own, instead of for q, v and the copier's next turn too
// took 8 rows of 4096 with 32 heads of 64 from 237 to 218 us, 8 of 2048 with 8 of 256 from 214 to 201, one of
// 32768 from 456 to 443; sums of a product's small parts that do not wait for its large one's, one of 32768
// from 463 to 455. No gain there: S^T Q^T in two halves, behind X and behind U, or all of it behind X^T T^T
// (0 to 1 us less); the next chunk but one or two brought into the L2 (1 to 6 us more); T's columns as a
// right-looking elimination, with more products side by side (8 to 16 us more). The next piece's state
// brought into the L2 while this one's is loaded: 64 rows of 64 gain 1.5 %, 32 of 512 lose 5 (H100); by the
// producer that copies, 64 of 64 take 88 us instead of 82. Effects: where each block made all of T, that took
// 7400 cycles of each producer a chunk and so 3760 a chunk, 1280 of which the consumers waited, and one row
// of 8192 took 139 us: the first pass 62, the join 9, the last 70. K = 256: two stages, each of which lives
// through its copy, T and the consumer; such rows are not split. A row's first segment two thirds as long as
// the others: one row of 8192 131, of 32768 445, two of 8192 209.
//
// 64 rows of 64: a piece takes a consumer 16,400 cycles, 9,300 until its state is there and 3,100 to store
// it; the memory moves 2.5 TB/s meanwhile. Nothing of it is looking up where that is (the copier telling the
// consumers of the next piece: 84 us), nor how wide the loads are (16 bytes a lane, with values in the wrong
// places: 84, stores too 80).
#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "model/base/status_macros.h"
#include "model/ops/cuda_kernels.h"
#include "model/ops/cuda_sm90.cuh"
#include "model/ops/cuda_tile_map.cuh"
#include "model/ops/cuda_util.cuh"
#include "model/ops/cuda_vector.cuh"
#include "model/ops/delta_rule_cuda.h"

namespace deltanet {
namespace {

constexpr int kChunk = 64;            // C
constexpr int kBlockBytes = 16 * 48;  // A 16x16 block of bfloat16, rows 48 bytes apart: no bank conflicts.
constexpr int kOffDiagonal = 6;       // Blocks below the diagonal.

// Shared memory of a block, in bytes from its start. kWithOutputs: there are outputs, or else the effects of
// segments.
template <int kKeys, int kConsumers, bool kWithOutputs = true>
struct Layout {
  static constexpr bool kOutputs = kWithOutputs;
  static constexpr bool kSegments =
      !kOutputs || (kConsumers == 1 && kKeys <= 128);  // Where rows may be split.
  static constexpr int kMakers = kOutputs ? 2 : 1;     // Producers that make a chunk's T or P.
  static constexpr int kTurns =
      kConsumers == 1 || !kOutputs ? 2 : 1;                     // Producers that make T, of chunks in turn.
  static constexpr bool kWide = kKeys > 128;                    // Memory and registers are short.
  static constexpr int kStages = kWide ? 2 : kOutputs ? 3 : 4;  // Of q, k, v.
  // Of T (hi, lo) and P. A maker waits for its slot before T's last steps, which take longer than a
  // consumer's chunk: with two slots and one consumer those steps would be part of the chain. (Wide: there is
  // no room for a third.)
  static constexpr int kSlots = !kOutputs ? 4 : kConsumers == 1 && !kWide ? 3 : 2;
  static constexpr int kThreads = 512;
  // Of a thread, 512 in all four warpgroups.
  static constexpr int kConsumerRegisters = kWide ? 240 : kConsumers == 1 ? 208 : kOutputs ? 192 : 168;
  static constexpr int kMakerRegisters = kWide || !kOutputs ? 88 : kConsumers == 1 ? 112 : 64;  // Of T.
  static constexpr int kCopierRegisters = kWide ? 88 : kConsumers == 1 ? 80 : 64;
  static_assert(kConsumers * kConsumerRegisters + (kOutputs
                                                       ? (3 - kConsumers) * kMakerRegisters + kCopierRegisters
                                                       : 2 * kMakerRegisters) <=
                512);
  static constexpr int kKeyTiles = kKeys / 64;
  // Blocks of a cluster, each with a part of the effect of one segment and head: all need T, each makes its
  // share.
  static constexpr int kCluster = kOutputs ? 1 : kKeyTiles;
  static constexpr int kValueTiles = kOutputs ? kConsumers : kKeyTiles;
  static constexpr int kKeysAt = kOutputs ? kKeyTiles * kTileBytes : 0;  // In a stage: q, k, v or k, v.
  static constexpr int kValuesAt = kKeysAt + kKeyTiles * kTileBytes;
  static constexpr int kStageBytes = kValuesAt + kValueTiles * kTileBytes;
  static constexpr int kSlotBytes = (kOutputs ? 3 : 2) * kTileBytes;  // T hi, T lo, P

  static constexpr int kStage = 0;
  static constexpr int kSlot = kStage + kStages * kStageBytes;
  // A below the diagonal: block (i, k) is number i (i - 1) / 2 + k, its hi before its lo.
  // One such, and what follows it, for each of kTurns.
  static constexpr int kBlocks = kSlot + kSlots * kSlotBytes;
  // Of each warp, the diagonal block: first -A^T in float32, rows 20 floats apart, then T^T, hi and lo.
  static constexpr int kDiagonal = kBlocks + kOffDiagonal * 2 * kBlockBytes;
  static constexpr int kTurnBytes = (kOffDiagonal + 4) * 2 * kBlockBytes;
  // With one consumer T is what the chain waits for: its makers wait for the keys alone, not for q and v, and
  // read beta themselves. (With two their registers are too few: 8 rows of 2048 took 142 us instead of 122.)
  static constexpr bool kKeysAlone = kOutputs && kConsumers == 1;
  static constexpr int kBeta = kBlocks + kTurns * kTurnBytes;     // float[kStages or kTurns][kChunk]
  static constexpr int kBarriers = kBeta + kStages * kChunk * 4;  // uint64_t, as below.
  static constexpr int kBytes = kBarriers + 8 * ((kKeysAlone ? 3 : 2) * kStages + 2 * kSlots);
  static_assert(kBytes <= 227 * 1024);

  static constexpr int Loaded(int stage) { return kBarriers + 8 * stage; }
  static constexpr int StageFree(int stage) { return kBarriers + 8 * (kStages + stage); }
  static constexpr int Ready(int slot) { return kBarriers + 8 * (2 * kStages + slot); }
  static constexpr int SlotFree(int slot) { return kBarriers + 8 * (2 * kStages + kSlots + slot); }
  static constexpr int KeysLoaded(int stage) {
    return kKeysAlone ? kBarriers + 8 * (2 * (kStages + kSlots) + stage) : Loaded(stage);
  }
};

// What a kernel waits for of the one before it, beside which it may begin.
enum class Waits {
  kNothing,  // They go side by side.
  kStates,   // That one writes the states that this one reads.
  kAll,
};

struct Problem {
  RaggedRows rows;
  DeltaRuleArgs args;
  ChunkShares shares;  // Of rows.chunks, this launch's,
  int parts;           // and what a head is cut into there.
  Waits waits;
  CUtensorMap q, k, v;  // [columns / 64, tokens, 64], a box of them a copy.
};

// With DELTANET_DELTA_RULE_CLOCKS defined, where the cycles of each warpgroup of block 0 went.
#ifdef DELTANET_DELTA_RULE_CLOCKS
constexpr int kPhases = 10;
__device__ int spent_clocks[4][kPhases];
#endif

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

class Clocks {
 public:
#ifdef DELTANET_DELTA_RULE_CLOCKS
  // The time since the last mark was spent in `phase`.
  __device__ void Mark(int phase) {
    const int now = clock();
    spent_[phase] += now - last_;
    last_ = now;
  }
  __device__ void Keep() const {
    if (blockIdx.x != 0 || threadIdx.x % 128 != 0) return;
    for (int i = 0; i < kPhases; ++i) spent_clocks[threadIdx.x / 128][i] = spent_[i];
  }

 private:
  int spent_[kPhases] = {};
  int last_ = clock();
#else
  __device__ void Mark(int) {}
  __device__ void Keep() const {}
#endif
};

// A block's share of the work, as planned.
template <typename L>
struct Walk {
  const Problem* problem;
  int next, end;  // Of the plan's pieces.
  // The piece in hand.
  int row, head, part, tokens;
  int64_t begin;  // Its first token.
  int segment;    // Below 0: a whole row.

  __device__ explicit Walk(const Problem& of)
      : problem(&of),
        next(of.rows.chunks.numbers[of.shares.at + blockIdx.x]),
        end(of.rows.chunks.numbers[of.shares.at + blockIdx.x + 1]) {}

  __device__ bool Next() {
    if (next == end) return false;
    const ChunkPlan& plan = problem->rows.chunks;
    const int piece = plan.numbers[problem->shares.at + problem->shares.blocks + 1 + next++];
    const int heads = static_cast<int>(problem->args.heads);
    part = piece % problem->parts;
    head = piece / problem->parts % heads;
    row = piece / problem->parts / heads;
    segment = L::kSegments ? row - plan.rows : -1;
    if (segment < 0) {
      begin = problem->rows.offsets[row];
      tokens = problem->rows.offsets[row + 1] - static_cast<int>(begin);
    } else {
      const ChunkSegment& of_row = Segment();
      row = of_row.row;
      begin = problem->rows.offsets[row] + of_row.begin;
      tokens = of_row.tokens;
    }
    return true;
  }
  __device__ const ChunkSegment& Segment() const {
    const ChunkPlan& plan = problem->rows.chunks;
    return reinterpret_cast<const ChunkSegment*>(plan.numbers + plan.segments_at)[segment];
  }

  // Where the row's state [H, K, V] is before the piece, null if it is zero, and where it goes, null if
  // nobody wants it.
  __device__ const float* From() const {
    if (segment >= 0 && Segment().before >= 0) return State(Segment().before);
    return problem->rows.fresh[row] ? nullptr : problem->args.state.at(problem->rows.base_slot[row]);
  }
  __device__ float* To() const {
    if (segment < 0 || Segment().after < 0) return problem->args.state.at(problem->rows.work_slot[row]);
    return Segment().transition < 0 ? State(Segment().after) : nullptr;
  }
  __device__ float* State(int state) const {
    const DeltaRuleArgs& args = problem->args;
    return args.segment_states + int64_t{state} * (args.heads * args.key_dim * args.value_dim);
  }
};

// Queues the copy of a chunk of kChunk tokens to the `at`-th stage, on whose barriers it counts its bytes.
// The first lanes of three warps queue a part each, for a warp takes its time over one.
template <typename L, int kKeys, int kConsumers>
__device__ void CopyTiles(const Problem& problem, const Walk<L>& walk, int chunk, uint32_t base, int at,
                          int thread) {
  const int token = static_cast<int>(walk.begin) + chunk * kChunk;
  const int tile = walk.head * L::kKeyTiles;
  const uint32_t stage = base + L::kStage + at * L::kStageBytes, loaded = base + L::Loaded(at);
  const auto queue = [&](uint32_t to, const CUtensorMap* map, int first, int tiles, uint32_t barrier) {
    BarrierExpect(barrier, tiles * kTileBytes);
    CopyBox(to, map, 0, token, first, barrier);
  };
  if (thread == 0) {
    queue(stage + L::kKeysAt, &problem.k, tile, L::kKeyTiles, base + L::KeysLoaded(at));
  }
  if (L::kOutputs) {
    if (thread == 32) queue(stage, &problem.q, tile, L::kKeyTiles, loaded);
    if (thread == 64) {
      queue(stage + L::kValuesAt, &problem.v, tile + walk.part * kConsumers, kConsumers, loaded);
    }
  } else if (thread == 64 && (walk.part + 1) * kConsumers > L::kKeyTiles) {
    queue(stage + L::kValuesAt, &problem.v, tile, L::kValueTiles, loaded);
  }
}

// The same for a row's last tokens, fewer than kChunk: all 128 threads of a producer, `thread` this one's
// number. What is beyond `left` tokens is zero, whatever memory holds there.
template <typename L, int kKeys, int kConsumers>
__device__ void CopyTokens(const DeltaRuleArgs& args, const Walk<L>& walk, int chunk, uint32_t stage,
                           int thread) {
  const int left = walk.tokens - chunk * kChunk;
  const int64_t token = walk.begin + int64_t{chunk} * kChunk;
  const auto copy = [&](const void* from, int64_t first_column, auto pieces, uint32_t to) {
    constexpr int kPieces = decltype(pieces)::value;
    constexpr int kStep = 128 / kPieces;  // Tokens; the swizzle is the same for all or (4) differs by a bit.
    const int piece = thread % kPieces, row = thread / kPieces;
    const __nv_bfloat16* source = static_cast<const __nv_bfloat16*>(from) +
                                  (token + row) * args.token_stride + first_column + piece * 8;
    to += piece / 8 * kTileBytes + InTile(row, piece % 8);
#pragma unroll
    for (int i = 0; i < kChunk / kStep; ++i) {
      const bool there = row + i * kStep < left;
      CopyAsync16((to + i * kStep * 128) ^ (i * kStep % 8 << 4), there ? source : from, there);
      source += kStep * args.token_stride;
    }
  };
  using KeyPieces = std::integral_constant<int, kKeys / 8>;
  using ValuePieces = std::integral_constant<int, 8 * kConsumers>;
  copy(args.k, int64_t{walk.head} * kKeys, KeyPieces(), stage + L::kKeysAt);
  copy(args.q, int64_t{walk.head} * kKeys, KeyPieces(), stage);
  copy(args.v, int64_t{walk.head} * kKeys + walk.part * 64 * kConsumers, ValuePieces(), stage + L::kValuesAt);
}

// Rows by keys: G = X K^T over the tiles at `x` and `k`, queued as one group. g: 64 x 64 over the warpgroup.
template <int kKeyTiles>
__device__ void QueueGram(float (&g)[32], uint32_t x, uint32_t k) {
  const uint32_t x_tiles = TileByRows(x), k_tiles = TileByRows(k);
  AsyncProductsBegin();
#pragma unroll
  for (int step = 0; step < 4 * kKeyTiles; ++step) {
    const uint32_t at = step / 4 * kTileBytes + step % 4 * 32;
    AsyncProductShared(g, Further(x_tiles, at), Further(k_tiles, at), step > 0);
  }
  AsyncProductsEnd();
}

// x in two parts whose sum has twice bfloat16's bits: of a pair.
__device__ inline void Split(float low, float high, uint32_t* hi, uint32_t* lo) {
  *hi = PackBfloat16(low, high);
  *lo = PackBfloat16(low - LowBfloat16(*hi), high - HighBfloat16(*hi));
}

// d += a b in nearly float32, 16 x 16 x 16, operands split. b as LoadMatrices gives it: two column tiles.
__device__ inline void SplitProduct(float (&d)[2][4], const uint32_t (&a_hi)[4], const uint32_t (&a_lo)[4],
                                    const uint32_t (&b_hi)[4], const uint32_t (&b_lo)[4]) {
  float small[2][4] = {};  // Of their own: or each product would wait for two others.
#pragma unroll
  for (int n = 0; n < 2; ++n) WarpProduct(small[n], a_lo, b_hi[2 * n], b_hi[2 * n + 1]);
#pragma unroll
  for (int n = 0; n < 2; ++n) WarpProduct(d[n], a_hi, b_hi[2 * n], b_hi[2 * n + 1]);
#pragma unroll
  for (int n = 0; n < 2; ++n) WarpProduct(small[n], a_hi, b_lo[2 * n], b_lo[2 * n + 1]);
#pragma unroll
  for (int n = 0; n < 2; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) d[n][i] += small[n][i];
  }
}

// From G = K K^T, of warp w the rows 16 w to 16 w + 15 of A: what is left of the diagonal block to `blocks`,
// split, and the diagonal block as -A^T, [16][20], to `diagonal`.
__device__ void StoreA(const float (&g)[32], const float* beta, uint32_t blocks, float* diagonal, int warp,
                       int lane) {
  const int q = lane % 4, r = lane / 4;
  const float beta0 = beta[16 * warp + r], beta8 = beta[16 * warp + r + 8];
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const float* const left = g + 8 * k;  // Columns 16 k to 16 k + 7; then 8 more.
    const float* const right = left + 4;
    if (k < warp) {
      uint32_t hi[4], lo[4];
      Split(beta0 * left[0], beta0 * left[1], &hi[0], &lo[0]);
      Split(beta8 * left[2], beta8 * left[3], &hi[1], &lo[1]);
      Split(beta0 * right[0], beta0 * right[1], &hi[2], &lo[2]);
      Split(beta8 * right[2], beta8 * right[3], &hi[3], &lo[3]);
      const uint32_t at = blocks + (warp * (warp - 1) / 2 + k) * 2 * kBlockBytes +
                          (lane / 8 % 2 * 8 + lane % 8) * 48 + lane / 16 * 16;
      StoreMatrices(at, hi[0], hi[1], hi[2], hi[3]);
      StoreMatrices(at + kBlockBytes, lo[0], lo[1], lo[2], lo[3]);
    } else if (k == warp) {
      // 20 is 4 mod 8: the 32 lanes of a store have banks of their own.
      float* const at = diagonal + 2 * q * 20 + r;
      at[0] = -beta0 * left[0];
      at[20] = -beta0 * left[1];
      at[8] = -beta8 * left[2];
      at[28] = -beta8 * left[3];
      at[160] = -beta0 * right[0];
      at[180] = -beta0 * right[1];
      at[168] = -beta8 * right[2];
      at[188] = -beta8 * right[3];
    }
  }
}

// The warp's diagonal block, -A^T, turns into T^T = (I + A)^-T, split.
__device__ void InvertDiagonal(unsigned char* diagonal, int lane) {
  const float* const minus_a = reinterpret_cast<const float*>(diagonal);
  __syncwarp();
  // Column c of T, top down: once x_j is known, every row below takes its share of it. Columns of A are
  // loaded two steps ahead, and (by the barriers) no earlier: all of A would not fit the registers.
  const int c = lane % 16;
  float x[16];
#pragma unroll
  for (int i = 0; i < 16; ++i) x[i] = i == c ? 1.0f : 0.0f;
  float4 a[3][4];
  const auto load = [&](int j) {
#pragma unroll
    for (int i = (j + 1) / 4; i < 4; ++i)
      a[j % 3][i] = *reinterpret_cast<const float4*>(minus_a + 20 * j + 4 * i);
  };
  load(0);
  load(1);
#pragma unroll
  for (int j = 0; j < 15; ++j) {
    __syncwarp();
    if (j < 13) load(j + 2);
#pragma unroll
    for (int i = (j + 1) / 4; i < 4; ++i) {
      const float4 below = a[j % 3][i];
      if (4 * i + 0 > j) x[4 * i + 0] = fmaf(below.x, x[j], x[4 * i + 0]);
      if (4 * i + 1 > j) x[4 * i + 1] = fmaf(below.y, x[j], x[4 * i + 1]);
      if (4 * i + 2 > j) x[4 * i + 2] = fmaf(below.z, x[j], x[4 * i + 2]);
      if (4 * i + 3 > j) x[4 * i + 3] = fmaf(below.w, x[j], x[4 * i + 3]);
    }
  }
  __syncwarp();  // All have read A.
  if (lane < 16) {
    uint32_t hi[8], lo[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) Split(x[2 * i], x[2 * i + 1], &hi[i], &lo[i]);
    uint4* const to = reinterpret_cast<uint4*>(diagonal + 48 * c);
    to[0] = make_uint4(hi[0], hi[1], hi[2], hi[3]);
    to[1] = make_uint4(hi[4], hi[5], hi[6], hi[7]);
    to[kBlockBytes / 16] = make_uint4(lo[0], lo[1], lo[2], lo[3]);
    to[kBlockBytes / 16 + 1] = make_uint4(lo[4], lo[5], lo[6], lo[7]);
  }
}

// Writes block (i, j) of T B, given its transpose `t` without B, to the tiles T hi and T lo at `slot`.
__device__ inline void StoreBlock(const float (&t)[2][4], float beta0, float beta8, uint32_t slot, int i,
                                  int j, int lane) {
  uint32_t hi[4], lo[4];
  Split(beta0 * t[0][0], beta0 * t[0][1], &hi[0], &lo[0]);
  Split(beta8 * t[0][2], beta8 * t[0][3], &hi[1], &lo[1]);
  Split(beta0 * t[1][0], beta0 * t[1][1], &hi[2], &lo[2]);
  Split(beta8 * t[1][2], beta8 * t[1][3], &hi[3], &lo[3]);
  const uint32_t at = slot + InTile(16 * i + lane / 16 * 8 + lane % 8, 2 * j + lane / 8 % 2);
  StoreMatricesTransposed(at, hi[0], hi[1], hi[2], hi[3]);
  StoreMatricesTransposed(at + kTileBytes, lo[0], lo[1], lo[2], lo[3]);
}

// Warp j: block column j of T B to the slot, from what InvertDiagonal left of all four warps.
__device__ void InvertColumn(const float* beta, uint32_t blocks, uint32_t diagonals, uint32_t slot, int j,
                             int lane) {
  const float beta0 = beta[16 * j + lane / 4], beta8 = beta[16 * j + lane / 4 + 8];
  // Row of a block and half of it whose address this lane has, for blocks as they are and (T_ii^T) for A
  // operands or, transposed, B operands.
  const uint32_t as_b = (lane / 16 * 8 + lane % 8) * 48 + lane / 8 % 2 * 16;
  const uint32_t as_a = (lane / 8 % 2 * 8 + lane % 8) * 48 + lane / 16 * 16;

  uint32_t hi[4][4], lo[4][4];  // T_kj^T of k = j + 0, 1, 2 as A operands.
  LoadMatrices(hi[0], diagonals + j * 2 * kBlockBytes + as_a);
  LoadMatrices(lo[0], diagonals + j * 2 * kBlockBytes + kBlockBytes + as_a);
  {
    float t[2][4];
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      t[n / 2][n % 2 * 2] = LowBfloat16(hi[0][n]) + LowBfloat16(lo[0][n]);
      t[n / 2][n % 2 * 2 + 1] = HighBfloat16(hi[0][n]) + HighBfloat16(lo[0][n]);
    }
    StoreBlock(t, beta0, beta8, slot, j, j, lane);
  }
#pragma unroll
  for (int down = 1; down < 4; ++down) {
    const int i = j + down;
    if (i > 3) break;
    uint32_t t_hi[4], t_lo[4];
    LoadMatricesTransposed(t_hi, diagonals + i * 2 * kBlockBytes + as_a);
    LoadMatricesTransposed(t_lo, diagonals + i * 2 * kBlockBytes + kBlockBytes + as_a);
    float sum[2][4] = {};  // The transpose of A_ij T_jj + ... + A_i,i-1 T_i-1,j
#pragma unroll
    for (int k = 0; k < down; ++k) {
      uint32_t a_hi[4], a_lo[4];
      const uint32_t at = blocks + (i * (i - 1) / 2 + j + k) * 2 * kBlockBytes + as_b;
      LoadMatrices(a_hi, at);
      LoadMatrices(a_lo, at + kBlockBytes);
      SplitProduct(sum, hi[k], lo[k], a_hi, a_lo);
    }
    uint32_t s_hi[4], s_lo[4];
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      Split(-sum[n / 2][n % 2 * 2], -sum[n / 2][n % 2 * 2 + 1], &s_hi[n], &s_lo[n]);
    }
    float t[2][4] = {};
    SplitProduct(t, s_hi, s_lo, t_hi, t_lo);
    if (down < 3) {
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        Split(t[n / 2][n % 2 * 2], t[n / 2][n % 2 * 2 + 1], &hi[down][n], &lo[down][n]);
      }
    }
    StoreBlock(t, beta0, beta8, slot, i, j, lane);
  }
}

// P = tril(G), rounded. Of warp w the rows 16 w to 16 w + 15.
__device__ void RoundLowerTriangle(const float (&g)[32], uint32_t (&p)[16], int warp, int lane) {
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const int column = 8 * (i / 2) + 2 * (lane % 4);
    const int row = 16 * warp + lane / 4 + i % 2 * 8;
    p[i] = PackBfloat16(column <= row ? g[2 * i] : 0.0f, column + 1 <= row ? g[2 * i + 1] : 0.0f);
  }
}
__device__ void StoreLowerTriangle(const uint32_t (&p)[16], uint32_t tile, int warp, int lane) {
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    StoreMatrices(tile + InTile(16 * warp + lane / 8 % 2 * 8 + lane % 8, 2 * k + lane / 16), p[4 * k],
                  p[4 * k + 1], p[4 * k + 2], p[4 * k + 3]);
  }
}

// A producer that makes T (kT) of every kTurns-th chunk, from number `turn`, or copies chunks (kCopy) and
// makes P (kP), or makes both.
template <typename L, int kKeys, int kConsumers, bool kCopy, bool kT, bool kP>
__device__ void Produce(const Problem& problem, Walk<L> walk, unsigned char* memory, int turn, int thread) {
  const uint32_t base = SharedAddress(memory);
  const int warp = thread / 32;
  int lane = thread % 32;
  const DeltaRuleArgs& args = problem.args;

  int chunk = -1, chunks = 0;  // Of the chunk to be copied next.
  const auto next_chunk = [&] {
    if (++chunk < chunks) return true;
    if (!walk.Next()) return false;
    chunk = 0;
    chunks = (walk.tokens + kChunk - 1) / kChunk;
    return true;
  };
  Ring<L::kStages> copied;
  bool by_tokens = false;  // The last chunk that was copied.
  constexpr bool kReadsBeta = L::kKeysAlone ? kT : kCopy;
  __nv_bfloat16 next_beta = FromFloat<__nv_bfloat16>(0);  // As it came: nobody waits for it here.
  // Whose beta this thread reads. Of a maker a warp reads those of its rows of A.
  const auto row_of_beta = [&] { return kCopy ? thread : 16 * warp + lane; };
  const auto has_beta = [&] { return kCopy ? thread < kChunk : lane < 16; };
  const auto read_beta = [&] {
    const int token = chunk * kChunk + row_of_beta();
    if (has_beta() && token < walk.tokens) {
      next_beta =
          static_cast<const __nv_bfloat16*>(args.beta)[(walk.begin + token) * args.token_stride + walk.head];
    } else {
      next_beta = FromFloat<__nv_bfloat16>(0);
    }
  };
  Clocks clocks;
  const auto copy = [&] {
    clocks.Mark(0);
    BarrierWait(base + L::StageFree(copied.at), copied.parity ^ 1);
    clocks.Mark(1);
    by_tokens = walk.tokens - chunk * kChunk < kChunk;
    if (by_tokens) {
      CopyTokens<L, kKeys, kConsumers>(args, walk, chunk, base + L::kStage + copied.at * L::kStageBytes,
                                       thread);
    } else {
      CopyTiles<L, kKeys, kConsumers>(problem, walk, chunk, base, copied.at, thread);
      if (L::kKeysAlone) BarrierArrive(base + L::KeysLoaded(copied.at));
    }
    if (kReadsBeta) read_beta();
    copied.Next();
    clocks.Mark(2);
  };

  constexpr int kTurns = kCopy ? 1 : L::kTurns;
  Ring<L::kStages> stage;
  Ring<L::kSlots> slot;
  bool more = next_chunk();
  for (int i = 0; i < turn; ++i) {
    more = next_chunk();
    stage.Next();
    slot.Next();
  }
  if (kCopy) {
    if (more) copy();
    CopyAsyncCommit();
  } else if (kReadsBeta && more) {
    read_beta();
  }
  while (more) {
    Opaque(&lane);  // Or all addresses of the loop would be made before it, and spilled.
    float* const beta =
        reinterpret_cast<float*>(memory + L::kBeta) + (L::kKeysAlone ? turn : stage.at) * kChunk;
    const auto store_beta = [&](__nv_bfloat16 of_row) {
      if (has_beta()) beta[row_of_beta()] = ToFloat(of_row);
    };
    const __nv_bfloat16 this_beta = next_beta;
    for (int i = 0; i < kTurns; ++i) more = next_chunk();
    if (kReadsBeta && !kCopy) {
      store_beta(this_beta);
      __syncwarp();
      if (more) read_beta();
    }
    bool ahead = false;
    if (kCopy) {
      const bool this_by_tokens = by_tokens;
      // Nobody waits for a chunk that is there because the next one has no place yet.
      ahead = more && BarrierIsPast(base + L::StageFree(copied.at), copied.parity ^ 1);
      ahead = __shfl_sync(0xffffffffu, int{ahead}, 0) != 0;
      if (ahead) {
        copy();
        CopyAsyncCommit();
        CopyAsyncWait<1>();
      } else {
        CopyAsyncWait<0>();
      }
      if (kReadsBeta) store_beta(this_beta);
      FenceAsyncProxy();
      if (L::kKeysAlone && this_by_tokens) BarrierArrive(base + L::KeysLoaded(stage.at));
      BarrierArrive(base + L::Loaded(stage.at));
    }
    BarrierWait(base + L::KeysLoaded(stage.at), stage.parity);
    if (L::kKeysAlone && kP) BarrierWait(base + L::Loaded(stage.at), stage.parity);
    clocks.Mark(3);
    const uint32_t q = base + L::kStage + stage.at * L::kStageBytes;
    const uint32_t k = q + L::kKeysAt;
    const uint32_t to = base + L::kSlot + slot.at * L::kSlotBytes;
    const uint32_t blocks = base + L::kBlocks + turn * L::kTurnBytes;
    const uint32_t diagonals = base + L::kDiagonal + turn * L::kTurnBytes;
    unsigned char* const diagonal = memory + (diagonals - base) + warp * 2 * kBlockBytes;
    float a[32], g[32];
    uint32_t p[16];
    if constexpr (kT) QueueGram<L::kKeyTiles>(a, k, k);
    if constexpr (kP) QueueGram<L::kKeyTiles>(g, q, k);
    if constexpr (kT) {
      AsyncProductsWait<kP ? 1 : 0>();
      Pin(a);
      clocks.Mark(4);
      // Nobody is still reading what the chunk before left here: all have come to the barrier before.
      StoreA(a, beta, blocks, reinterpret_cast<float*>(diagonal), warp, lane);
    }
    if constexpr (kP) {
      clocks.Mark(0);
      AsyncProductsWait<0>();
      Pin(g);
      clocks.Mark(5);
      RoundLowerTriangle(g, p, warp, lane);
    }
    const auto copy_next = [&] {
      if (!more || ahead) return;
      copy();
      CopyAsyncCommit();
    };
    if (kCopy && !L::kWide) copy_next();
    if constexpr (kT) InvertDiagonal(diagonal, lane);
    clocks.Mark(6);
    BarrierWait(base + L::SlotFree(slot.at), slot.parity ^ 1);
    clocks.Mark(7);
    if constexpr (kP) StoreLowerTriangle(p, to + 2 * kTileBytes, warp, lane);
    if constexpr (kT) {
      NamedBarrier(1 + kConsumers + turn, 128);
      clocks.Mark(8);
      InvertColumn(beta, blocks, diagonals, to, warp, lane);
    }
    FenceAsyncProxy();
    BarrierArrive(base + L::Ready(slot.at));
    if (!kCopy) NamedBarrier(1 + kConsumers + turn, 128);
    // The next of two stages is free once the consumer is done with the chunk before, and then it wants P.
    if (kCopy && L::kWide) copy_next();
    clocks.Mark(9);
    for (int i = 0; i < kTurns; ++i) {
      stage.Next();
      slot.Next();
    }
  }
  // Other, stage free, copy, loaded, K K^T, Q K^T, diagonal, slot free, barrier, T.
  clocks.Keep();
}

// Of consumers. Queued as one group: S^T K^T, or S^T Q^T, with the chunk's keys or queries at `rows`.
template <int kKeys>
__device__ void QueueOfState(float (&x)[32], const uint32_t (&s_operand)[kKeys / 16][4], uint32_t rows) {
  AsyncProductsBegin();
#pragma unroll
  for (int i = 0; i < kKeys / 16; ++i) {
    AsyncProduct<64, false>(x, s_operand[i], Further(rows, i / 4 * kTileBytes + i % 4 * 32), i > 0);
  }
  AsyncProductsEnd();
}
// V^T as an operand.
__device__ inline void LoadValues(uint32_t (&operand)[4][4], uint32_t v_tile, int warp, int lane) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    LoadMatricesTransposed(operand[i],
                           v_tile + InTile(16 * i + lane / 16 * 8 + lane % 8, 2 * warp + lane / 8 % 2));
  }
}
// Queued as one group: X^T T^T, T in hi and lo.
__device__ inline void QueueOfT(float (&x)[32], const uint32_t (&operand)[4][4], uint32_t t_rows) {
  AsyncProductsBegin();
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    AsyncProduct<64, false>(x, operand[i % 4], Further(t_rows, i / 4 * kTileBytes + i % 4 * 32), i > 0);
  }
  AsyncProductsEnd();
}

// A consumer: 64 columns of S. `group` is its number.
template <typename L, int kKeys, int kConsumers, bool kNarrow>
__device__ void Consume(const Problem& problem, Walk<L> walk, unsigned char* memory, int group, int thread) {
  const uint32_t base = SharedAddress(memory);
  const int warp = thread / 32, lane = thread % 32;
  const int q = lane % 4, r = lane / 4;
  const DeltaRuleArgs& args = problem.args;
  constexpr int V = kKeys;
  const int64_t width = args.heads * V;

  Ring<L::kStages> stage;
  Ring<L::kSlots> slot;
  Clocks clocks;
  while (walk.Next()) {
    const int column = walk.head * V + (walk.part * kConsumers + group) * 64;  // In [H, V].
    const int64_t in_state =
        int64_t{walk.head} * (kKeys * V) + (walk.part * kConsumers + group) * 64 + 16 * warp + r + 2 * q * V;
    float s[kKeys / 2];  // S^T: of warp w the rows 16 w to 16 w + 15.
    if (const float* from = walk.From(); from == nullptr) {
#pragma unroll
      for (int i = 0; i < kKeys / 2; ++i) s[i] = 0.0f;
    } else {
      from += in_state;
#pragma unroll
      for (int i = 0; i < kKeys / 2; ++i) s[i] = from[(i / 4 * 8 + i % 2) * V + i / 2 % 2 * 8];
    }

    float o[32];          // O^T of a chunk, which is stored while the next one is worked on.
    uint32_t v_tile = 0;  // Of the chunk in hand. Once v is in registers, outputs go through it.
    const auto store_out = [&](int chunk) {
      const int64_t token = walk.begin + int64_t{chunk} * kChunk;
      const int left = walk.tokens - chunk * kChunk;
      if constexpr (kNarrow) {
        NamedBarrier(1 + group, 128);  // All four warps are done with what was there.
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* const x = o + 8 * i;
          StoreMatricesTransposed(v_tile + InTile(16 * i + lane / 16 * 8 + lane % 8, 2 * warp + lane / 8 % 2),
                                  PackBfloat16(args.scale * x[0], args.scale * x[1]),
                                  PackBfloat16(args.scale * x[2], args.scale * x[3]),
                                  PackBfloat16(args.scale * x[4], args.scale * x[5]),
                                  PackBfloat16(args.scale * x[6], args.scale * x[7]));
        }
        NamedBarrier(1 + group, 128);
        const unsigned char* const from = memory + (v_tile - base) + InTile(thread / 8, thread % 8);
        __nv_bfloat16* to = static_cast<__nv_bfloat16*>(args.out_bfloat16) + (token + thread / 8) * width +
                            column + thread % 8 * 8;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (thread / 8 + 16 * i < left) {
            *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from + 16 * 128 * i);
          }
          to += 16 * width;
        }
      } else {
        float* to = args.out + (token + 2 * q) * width + column + 16 * warp + r;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            if (8 * i + 2 * q + e % 2 < left) to[e % 2 * width + e / 2 * 8] = args.scale * o[4 * i + e];
          }
          to += 8 * width;
        }
      }
    };
    const auto free_stage = [&] {
      if (kNarrow) FenceAsyncProxy();  // The next copy goes where outputs went.
      BarrierArrive(base + L::StageFree(stage.at));
    };

    uint32_t s_operand[L::kWide ? 1 : kKeys / 16][4];
    const auto round_s = [&](int from, int to) {  // Of 16 columns of S^T each.
#pragma unroll
      for (int i = 4 * from; i < 4 * to; ++i) {
        s_operand[i / 4 - from][i % 4] = PackBfloat16(s[2 * i], s[2 * i + 1]);
      }
    };
    if constexpr (!L::kWide) round_s(0, kKeys / 16);

    const int chunks = (walk.tokens + kChunk - 1) / kChunk;
    for (int chunk = 0; chunk < chunks; ++chunk) {
      clocks.Mark(0);
      BarrierWait(base + L::Ready(slot.at), slot.parity);
      clocks.Mark(1);
      const uint32_t q_tiles = base + L::kStage + stage.at * L::kStageBytes;
      const uint32_t k_tiles = q_tiles + L::kKeysAt;
      v_tile = q_tiles + L::kValuesAt + group * kTileBytes;
      const uint32_t q_rows = TileByRows(q_tiles), k_rows = TileByRows(k_tiles);
      const uint32_t k_columns = TileByColumns(k_tiles);
      const uint32_t t_rows = TileByRows(base + L::kSlot + slot.at * L::kSlotBytes);  // T hi, T lo, P

      float x[32];
      if constexpr (L::kWide) {  // S^T K^T and S^T Q^T
#pragma unroll
        for (int i = 0; i < kKeys / 16; ++i) {
          if (i > 0) AsyncProductsWait<1>();  // Or there would be more operands than registers.
          round_s(i, i + 1);
          AsyncProductsBegin();
          AsyncProduct<64, false>(x, s_operand[0], Further(k_rows, i / 4 * kTileBytes + i % 4 * 32), i > 0);
          AsyncProduct<64, false>(o, s_operand[0], Further(q_rows, i / 4 * kTileBytes + i % 4 * 32), i > 0);
          AsyncProductsEnd();
        }
      } else {
        QueueOfState<kKeys>(x, s_operand, k_rows);
      }

      uint32_t operand[4][4];  // V^T, then X^T, then U^T.
      LoadValues(operand, v_tile, warp, lane);
      if constexpr (!L::kWide) {
        if (chunk > 0) store_out(chunk - 1);
        QueueOfState<kKeys>(o, s_operand, q_rows);
      }

      clocks.Mark(2);
      // With two consumers the other one's products fill the gap, and registers are short.
      AsyncProductsWait<kConsumers == 1 && !L::kWide ? 1 : 0>();
      Pin(x);
      clocks.Mark(3);
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        uint32_t& v = operand[i / 4][i % 4];
        v = PackBfloat16(LowBfloat16(v) - x[2 * i], HighBfloat16(v) - x[2 * i + 1]);
      }
      QueueOfT(x, operand, t_rows);
      clocks.Mark(4);
      AsyncProductsWait<0>();
      Pin(x);
      Pin(o);
      clocks.Mark(5);
#pragma unroll
      for (int i = 0; i < 16; ++i) operand[i / 4][i % 4] = PackBfloat16(x[2 * i], x[2 * i + 1]);
      const auto update_s = [&] {                       // S^T += U^T K
        constexpr int kColumns = std::min(kKeys, 128);  // ptxas refuses 256 for want of registers.
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#pragma unroll
          for (int at = 0; at < kKeys; at += kColumns) {
            AsyncProduct<kColumns, true>(s + at / 2, operand[i],
                                         Further(k_columns, at / 64 * kTileBytes + i * 16 * 128), true);
          }
        }
        AsyncProductsEnd();
      };
      const auto update_o = [&] {  // O^T += U^T P^T
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          AsyncProduct<64, false>(o, operand[i], Further(t_rows, 2 * kTileBytes + i * 32), true);
        }
        AsyncProductsEnd();
      };
      AsyncProductsBegin();
      if constexpr (L::kWide) {
        update_o();
        update_s();
        clocks.Mark(6);
        AsyncProductsWait<1>();
        Pin(o);
        store_out(chunk);
        clocks.Mark(7);
        AsyncProductsWait<0>();
        Pin(s);
        free_stage();
      } else {
        update_s();
        update_o();
        clocks.Mark(6);
        AsyncProductsWait<1>();
        Pin(s);
        clocks.Mark(7);
        if (chunk + 1 < chunks) free_stage();
        round_s(0, kKeys / 16);
        // Nothing is left pending over the loop's end: there the compiler would make every product wait.
        AsyncProductsWait<0>();
        Pin(o);
        if (chunk + 1 == chunks) {
          store_out(chunk);
          free_stage();
        }
      }
      BarrierArrive(base + L::SlotFree(slot.at));
      clocks.Mark(8);
      stage.Next();
      slot.Next();
    }

    if (float* to = walk.To(); to != nullptr) {
      to += in_state;
      bool finite = true;
#pragma unroll
      for (int i = 0; i < kKeys / 2; ++i) {
        to[(i / 4 * 8 + i % 2) * V + i / 2 % 2 * 8] = s[i];
        finite &= isfinite(s[i]);
      }
      if (!finite) args.nonfinite[walk.row] = 1;  // What is not finite stays so, to the row's end.
    }
    clocks.Mark(9);
  }
  // State in, ready, S K^T to S Q^T, wait, X, wait, U, wait, round S, state out.
  clocks.Keep();
}

// Which of a cluster's blocks makes T of a chunk of effects: in one slot, always the same.
template <typename L>
__device__ int MakerOfT(int chunk) {
  static_assert(L::kTurns == 2 && L::kSlots % (2 * L::kCluster) == 0);
  return chunk / 2 % L::kCluster;
}

// A producer of effects: copies every second chunk, from number `turn`, and makes T of those, or of every
// second of them where the cluster's other block makes the rest; T is sent to that one.
template <typename L, int kKeys, int kConsumers>
__device__ void ProduceEffect(const Problem& problem, Walk<L> walk, unsigned char* memory, int turn,
                              int thread) {
  const uint32_t base = SharedAddress(memory);
  const int warp = thread / 32;
  int lane = thread % 32;
  const DeltaRuleArgs& args = problem.args;
  const int rank = L::kCluster > 1 ? ClusterRank() : 0;
  walk.Next();  // A block has one piece.
  const int chunks = walk.tokens / kChunk;

  Ring<L::kStages> copied, stage;
  Ring<L::kSlots> slot;
  if (turn == 1) {
    copied.Next();
    stage.Next();
    slot.Next();
  }
  __nv_bfloat16 next_beta = FromFloat<__nv_bfloat16>(0);  // As it came: nobody waits for it here.
  Clocks clocks;
  const auto copy = [&](int chunk) {
    if (chunk >= chunks) return;
    clocks.Mark(0);
    BarrierWait(base + L::StageFree(copied.at), copied.parity ^ 1);
    clocks.Mark(1);
    CopyTiles<L, kKeys, kConsumers>(problem, walk, chunk, base, copied.at, thread);
    if (thread < kChunk) {
      const int64_t token = walk.begin + chunk * kChunk + thread;
      next_beta = static_cast<const __nv_bfloat16*>(args.beta)[token * args.token_stride + walk.head];
    }
    copied.Next();
    copied.Next();
    clocks.Mark(2);
  };
  const auto next = [&] {
    for (int i = 0; i < 2; ++i) {
      stage.Next();
      slot.Next();
    }
  };
  copy(turn);
  for (int chunk = turn; chunk < chunks; chunk += 2, next()) {
    Opaque(&lane);  // Or all addresses of the loop would be made before it, and spilled.
    float* const beta = reinterpret_cast<float*>(memory + L::kBeta) + stage.at * kChunk;
    if (thread < kChunk) beta[thread] = ToFloat(next_beta);
    BarrierArrive(base + L::Loaded(stage.at));
    if (MakerOfT<L>(chunk) != rank) {
      // The slot's last T has been here: the consumers were done with it when the chunk's stage was free.
      static_assert(L::kSlots == L::kStages);
      if (thread == 0) BarrierExpect(base + L::Ready(slot.at), L::kSlotBytes);
      BarrierArrive(base + L::Ready(slot.at));
      copy(chunk + 2);
      continue;
    }
    BarrierWait(base + L::Loaded(stage.at), stage.parity);
    clocks.Mark(3);
    const uint32_t k = base + L::kStage + stage.at * L::kStageBytes;
    const uint32_t to = base + L::kSlot + slot.at * L::kSlotBytes;
    const uint32_t blocks = base + L::kBlocks + turn * L::kTurnBytes;
    const uint32_t diagonals = base + L::kDiagonal + turn * L::kTurnBytes;
    unsigned char* const diagonal = memory + (diagonals - base) + warp * 2 * kBlockBytes;
    float a[32];
    QueueGram<L::kKeyTiles>(a, k, k);
    AsyncProductsWait<0>();
    Pin(a);
    clocks.Mark(4);
    StoreA(a, beta, blocks, reinterpret_cast<float*>(diagonal), warp, lane);
    copy(chunk + 2);
    InvertDiagonal(diagonal, lane);
    clocks.Mark(6);
    BarrierWait(base + L::SlotFree(slot.at), slot.parity ^ 1);
    clocks.Mark(7);
    NamedBarrier(1 + kConsumers + turn, 128);
    clocks.Mark(8);
    InvertColumn(beta, blocks, diagonals, to, warp, lane);
    FenceAsyncProxy();
    BarrierArrive(base + L::Ready(slot.at));
    NamedBarrier(1 + kConsumers + turn, 128);  // All are done with what the next chunk's A replaces.
    if (L::kCluster > 1 && thread == 0) {
      CopyToBlock(InBlock(to, rank ^ 1), to, L::kSlotBytes, InBlock(base + L::Ready(slot.at), rank ^ 1));
    }
    clocks.Mark(9);
  }
  // Other, stage free, copy, loaded, K K^T, -, diagonal, slot free, barrier, T.
  clocks.Keep();
}

// A consumer of effects: 64 columns of the transition less the identity, or of what a segment adds.
template <typename L, int kKeys, int kConsumers>
__device__ void ConsumeEffect(const Problem& problem, Walk<L> walk, unsigned char* memory, int group,
                              int thread) {
  const uint32_t base = SharedAddress(memory);
  const int warp = thread / 32, lane = thread % 32;
  const int q = lane % 4, r = lane / 4;
  constexpr int V = kKeys;
  walk.Next();  // A block has one piece.

  Ring<L::kStages> stage;
  Ring<L::kSlots> slot;
  Clocks clocks;
  const int strip = walk.part * kConsumers + group;  // Of the keys', then of the values' columns.
  const bool transition = strip < L::kKeyTiles;
  const uint32_t sign = transition ? 0x80008000u : 0;  // The values that make up the transition are -k.
  float s[kKeys / 2] = {};                             // As in Consume, and what follows.
  uint32_t s_operand[kKeys / 16][4] = {};

  for (int chunk = 0; chunk < walk.tokens / kChunk; ++chunk) {
    clocks.Mark(0);
    BarrierWait(base + L::Loaded(stage.at), stage.parity);
    BarrierWait(base + L::Ready(slot.at), slot.parity);
    clocks.Mark(1);
    const uint32_t k_tiles = base + L::kStage + stage.at * L::kStageBytes;
    const uint32_t v_tile = k_tiles + strip * kTileBytes;  // The values are behind the keys.
    const uint32_t k_rows = TileByRows(k_tiles), k_columns = TileByColumns(k_tiles);
    const uint32_t t_rows = TileByRows(base + L::kSlot + slot.at * L::kSlotBytes);

    float x[32];
    QueueOfState<kKeys>(x, s_operand, k_rows);
    uint32_t operand[4][4];  // V^T, then X^T, then U^T.
    LoadValues(operand, v_tile, warp, lane);
    clocks.Mark(2);
    AsyncProductsWait<0>();
    Pin(x);
    clocks.Mark(3);
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      uint32_t& v = operand[i / 4][i % 4];
      v ^= sign;
      v = PackBfloat16(LowBfloat16(v) - x[2 * i], HighBfloat16(v) - x[2 * i + 1]);
    }
    QueueOfT(x, operand, t_rows);
    clocks.Mark(4);
    AsyncProductsWait<0>();
    Pin(x);
    clocks.Mark(5);
    if (L::kCluster == 1) {
      BarrierArrive(base + L::SlotFree(slot.at));
    } else {
      __syncwarp();
      if (lane == 0) BarrierArriveThere(InBlock(base + L::SlotFree(slot.at), MakerOfT<L>(chunk)), 32);
    }
#pragma unroll
    for (int i = 0; i < 16; ++i) operand[i / 4][i % 4] = PackBfloat16(x[2 * i], x[2 * i + 1]);
    AsyncProductsBegin();
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // S^T += U^T K
      AsyncProduct<kKeys, true>(s, operand[i], Further(k_columns, i * 16 * 128), true);
    }
    AsyncProductsEnd();
    clocks.Mark(6);
    AsyncProductsWait<0>();
    Pin(s);
    clocks.Mark(7);
    BarrierArrive(base + L::StageFree(stage.at));
#pragma unroll
    for (int i = 0; i < kKeys / 4; ++i) s_operand[i / 4][i % 4] = PackBfloat16(s[2 * i], s[2 * i + 1]);
    clocks.Mark(8);
    stage.Next();
    slot.Next();
  }

  const ChunkSegment& segment = walk.Segment();
  const int column = (transition ? strip : strip - L::kKeyTiles) * 64;
  float* const to = walk.State(transition ? segment.transition : segment.after) +
                    int64_t{walk.head} * (kKeys * V) + column + 16 * warp + r + 2 * q * V;
#pragma unroll
  for (int i = 0; i < kKeys / 2; ++i) to[(i / 4 * 8 + i % 2) * V + i / 2 % 2 * 8] = s[i];
  clocks.Mark(9);
  // Other, ready, S K^T, wait, X, wait, U, wait, round S, effect out.
  clocks.Keep();
}

// What a block of both kernels begins with; returns its share.
template <typename L, int kConsumers>
__device__ Walk<L> Begin(const Problem& problem, unsigned char* memory) {
  const uint32_t base = SharedAddress(memory);
  const int thread = threadIdx.x;
  if (thread == 0) {
    for (int i = 0; i < L::kStages; ++i) {
      BarrierInit(base + L::Loaded(i), 128);
      if (L::kKeysAlone) BarrierInit(base + L::KeysLoaded(i), 128);
      BarrierInit(base + L::StageFree(i), 128 * kConsumers);
    }
    for (int i = 0; i < L::kSlots; ++i) {
      BarrierInit(base + L::Ready(i), 128 * L::kMakers);
      BarrierInit(base + L::SlotFree(i), 128 * kConsumers * L::kCluster);
    }
    BarrierInitFence();
  }
  // What is above T's diagonal stays zero.
  for (int i = thread; i < L::kSlots * L::kSlotBytes / 16; i += L::kThreads) {
    reinterpret_cast<uint4*>(memory + L::kSlot)[i] = make_uint4(0, 0, 0, 0);
  }
  FenceAsyncProxy();
  L::kCluster > 1 ? ClusterBarrier() : __syncthreads();
  return Walk<L>(problem);
}

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

template <int kKeys, int kConsumers, bool kNarrow>
__global__ void __launch_bounds__(Layout<kKeys, kConsumers>::kThreads, 1)
    DeltaRuleChunkKernel(const __grid_constant__ Problem problem) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using L = Layout<kKeys, kConsumers>;
  unsigned char* const memory = DynamicSharedMemory();
  const Walk<L> walk = Begin<L, kConsumers>(problem, memory);
  if (problem.waits == Waits::kAll) AwaitEarlier();
  LetNextBegin();  // Now, for it may be one that waits for nothing.

  const int thread = threadIdx.x;
  const int group = __shfl_sync(0xffffffffu, thread / 128, 0);
  if (group < kConsumers) {
    MoreRegisters<L::kConsumerRegisters>();
    if (problem.waits == Waits::kStates) AwaitEarlier();
    Consume<L, kKeys, kConsumers, kNarrow>(problem, walk, memory, group, thread % 128);
  } else if (group < 3) {
    FewerRegisters<L::kMakerRegisters>();
    Produce<L, kKeys, kConsumers, false, true, false>(problem, walk, memory, group - kConsumers,
                                                      thread % 128);
  } else {
    FewerRegisters<L::kCopierRegisters>();
    Produce<L, kKeys, kConsumers, true, false, true>(problem, walk, memory, 0, thread % 128);
  }
  AwaitEarlier();
#endif
}

// The effects of the segments between a row's first and its last.
template <int kKeys>
__global__ void __launch_bounds__(512, 1) SegmentEffectsKernel(const __grid_constant__ Problem problem) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  constexpr int kConsumers = 2;
  using L = Layout<kKeys, kConsumers, /*kWithOutputs=*/false>;
  unsigned char* const memory = DynamicSharedMemory();
  const Walk<L> walk = Begin<L, kConsumers>(problem, memory);
  if (problem.waits == Waits::kAll) AwaitEarlier();
  LetNextBegin();  // The first segments, which wait for nothing.

  const int thread = threadIdx.x;
  const int group = __shfl_sync(0xffffffffu, thread / 128, 0);
  if (group < kConsumers) {
    MoreRegisters<L::kConsumerRegisters>();
    ConsumeEffect<L, kKeys, kConsumers>(problem, walk, memory, group, thread % 128);
  } else {
    FewerRegisters<L::kMakerRegisters>();
    ProduceEffect<L, kKeys, kConsumers>(problem, walk, memory, group - kConsumers, thread % 128);
  }
  AwaitEarlier();
  if (L::kCluster > 1) ClusterBarrier();  // The other block is still being told of what is free.
#endif
}

constexpr int kJoinedColumns = 16;

// From the state after each split row's first segment and the effects of the next ones, the states after
// those: S' = S + (M - I) S + D, in place of D. Grid: columns / kJoinedColumns, heads, split rows; warp w has
// the state's rows 16 w to 16 w + 15. Transposed, as above, and in nearly float32.
template <int kKeys>
__global__ void __launch_bounds__(2 * kKeys)
    JoinSegmentsKernel(ChunkPlan plan, float* states, int64_t heads) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  constexpr int V = kKeys, kRow = kKeys + 8;  // Rows of shared memory without bank conflicts.
  __shared__ __align__(16) __nv_bfloat16 shared[2][2][kJoinedColumns * kRow];  // S^T hi, lo; in turn.
  LetNextBegin();
  AwaitEarlier();
  const SplitRow row = reinterpret_cast<const SplitRow*>(plan.numbers + plan.split_rows_at)[blockIdx.z];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int q = lane % 4, r = lane / 4;
  const auto state = [&](int number) {
    return states + (number * heads + blockIdx.y) * (kKeys * V) + blockIdx.x * kJoinedColumns +
           (16 * warp + 2 * q) * V + r;
  };
  const auto at = [](int t, int i) { return (8 * t + i % 2) * V + i / 2 * 8; };
  const int as_a = (lane / 8 % 2 * 8 + lane % 8) * kRow + lane / 16 * 8;
  // A lane loads four neighbours of M at once. So of each 16 inner indices 4 q to 4 q + 3 stand where 2 q,
  // 2 q + 1, 2 q + 8 and 2 q + 9 would, in both operands.
  const int as_c = r * kRow + 16 * warp + q + q % 2 * 7;

  float s[2][4], d[2][4], next_d[2][4];
  float4 m[2][kKeys / 16], next_m[2][kKeys / 16];
  const auto load = [&](int n) {  // The effect of the row's segment n, a step ahead.
    const float* const from = states +
                              ((row.first_transition + n - 1) * heads + blockIdx.y) * (kKeys * kKeys) +
                              (16 * warp + r) * kKeys + 4 * q;
#pragma unroll
    for (int i = 0; i < kKeys / 8; ++i) {
      next_m[i % 2][i / 2] = *reinterpret_cast<const float4*>(from + i % 2 * 8 * kKeys + i / 2 * 16);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) next_d[i / 4][i % 4] = state(row.first_state + n)[at(i / 4, i % 4)];
  };
#pragma unroll
  for (int i = 0; i < 8; ++i) s[i / 4][i % 4] = state(row.first_state)[at(i / 4, i % 4)];
  if (row.transitions > 0) load(1);
  for (int n = 1; n <= row.transitions; ++n) {
#pragma unroll
    for (int i = 0; i < kKeys / 8; ++i) m[i % 2][i / 2] = next_m[i % 2][i / 2];
#pragma unroll
    for (int i = 0; i < 8; ++i) d[i / 4][i % 4] = next_d[i / 4][i % 4];
    if (n < row.transitions) load(n + 1);

    __nv_bfloat16* const s_hi = shared[n % 2][0];
    __nv_bfloat16* const s_lo = shared[n % 2][1];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int to = as_c + i % 2 * 8 * kRow + i / 2 * 4;
      uint32_t hi, lo;
      Split(s[i / 2][i % 2 * 2], s[i / 2][i % 2 * 2 + 1], &hi, &lo);
      *reinterpret_cast<uint32_t*>(s_hi + to) = hi;
      *reinterpret_cast<uint32_t*>(s_lo + to) = lo;
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kKeys / 16; ++i) {
      uint32_t hi[4], lo[4], m_hi[4], m_lo[4];
      LoadMatrices(hi, SharedAddress(s_hi + as_a + 16 * i));
      LoadMatrices(lo, SharedAddress(s_lo + as_a + 16 * i));
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        Split(m[j][i].x, m[j][i].y, &m_hi[2 * j], &m_lo[2 * j]);
        Split(m[j][i].z, m[j][i].w, &m_hi[2 * j + 1], &m_lo[2 * j + 1]);
      }
      SplitProduct(d, hi, lo, m_hi, m_lo);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      state(row.first_state + n)[at(i / 4, i % 4)] = s[i / 4][i % 4] += d[i / 4][i % 4];
    }
  }
#endif
}

// The map of a [tokens, columns] matrix, rows args.token_stride apart, as [columns / 64, tokens, 64], of
// which a copy takes a chunk of `tiles`.
absl::Status MapTiles(const RaggedRows& rows, const DeltaRuleArgs& args, const void* from, int tiles,
                      CUtensorMap* map) {
  const auto bytes = static_cast<uint64_t>(args.token_stride) * sizeof(__nv_bfloat16);
  const auto columns = static_cast<uint64_t>(args.heads * args.key_dim);
  return MapBoxes<3>(from, {64, static_cast<uint64_t>(rows.tokens), columns / 64},
                     {bytes, kTileBytes / kChunk}, {64, kChunk, static_cast<uint32_t>(tiles)}, map);
}

// Launches a kernel of one block a multiprocessor, of a layout, over its shares of the plan.
template <typename L>
absl::Status LaunchShares(const char* name, void (*kernel)(Problem), const Problem& problem,
                          cudaStream_t stream) {
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, L::kBytes);
  if (error != cudaSuccess) {
    return absl::InternalError(
        absl::StrCat(name, " needs ", L::kBytes, " bytes of shared memory: ", cudaGetErrorString(error)));
  }
  return LaunchOverlapping(name, kernel,
                           {.grid = dim3(static_cast<unsigned>(problem.shares.blocks)),
                            .threads = L::kThreads,
                            .shared_bytes = L::kBytes,
                            .cluster = L::kCluster},
                           stream, problem);
}

// What the plan has for this launch.
template <int kKeys, int kConsumers>
absl::Status LaunchChunks(Problem problem, ChunkShares shares, Waits waits, cudaStream_t stream) {
  problem.shares = shares;
  problem.parts = kKeys / (64 * kConsumers);
  problem.waits = waits;
  RETURN_IF_ERROR(MapTiles(problem.rows, problem.args, problem.args.v, kConsumers, &problem.v));
  constexpr char kName[] = "DeltaRuleChunkKernel";
  using L = Layout<kKeys, kConsumers>;
  return problem.args.out_bfloat16 != nullptr
             ? LaunchShares<L>(kName, DeltaRuleChunkKernel<kKeys, kConsumers, true>, problem, stream)
             : LaunchShares<L>(kName, DeltaRuleChunkKernel<kKeys, kConsumers, false>, problem, stream);
}

// The effects of the segments between, beside them the first segments, from which follow the states that the
// last launch begins its segments with.
template <int kKeys>
absl::Status LaunchFirstPass(Problem problem, Waits waits, cudaStream_t stream) {
  const ChunkPlan& plan = problem.rows.chunks;
  if (plan.effects.blocks > 0) {
    using L = Layout<kKeys, 2, /*kWithOutputs=*/false>;
    problem.shares = plan.effects;
    problem.parts = L::kKeyTiles;
    problem.waits = waits;
    RETURN_IF_ERROR(MapTiles(problem.rows, problem.args, problem.args.v, L::kValueTiles, &problem.v));
    RETURN_IF_ERROR(LaunchShares<L>("SegmentEffectsKernel", SegmentEffectsKernel<kKeys>, problem, stream));
    waits = Waits::kNothing;
  }
  RETURN_IF_ERROR((LaunchChunks<kKeys, 1>(problem, plan.first, waits, stream)));
  if (plan.effects.blocks == 0) return absl::OkStatus();
  const dim3 grid(kKeys / kJoinedColumns, static_cast<unsigned>(problem.args.heads),
                  static_cast<unsigned>(plan.split_rows));
  return LaunchOverlapping("JoinSegmentsKernel", JoinSegmentsKernel<kKeys>,
                           {.grid = grid, .threads = 2 * kKeys}, stream, plan, problem.args.segment_states,
                           problem.args.heads);
}

template <int kKeys>
absl::Status Launch(const RaggedRows& rows, const DeltaRuleArgs& args, bool with_short_rows,
                    cudaStream_t stream) {
  const ChunkPlan& plan = rows.chunks;
  Problem problem{.rows = rows, .args = args};
  RETURN_IF_ERROR(MapTiles(rows, args, args.q, kKeys / 64, &problem.q));
  RETURN_IF_ERROR(MapTiles(rows, args, args.k, kKeys / 64, &problem.k));
  Waits waits = with_short_rows ? Waits::kNothing : Waits::kAll;
  if constexpr (kKeys <= 128) {
    if (plan.split_rows > 0) {
      RETURN_IF_ERROR(LaunchFirstPass<kKeys>(problem, waits, stream));
      waits = Waits::kStates;
    }
  }
  const ChunkShares all{.at = 0, .blocks = plan.blocks};
  if constexpr (kKeys == 128) {
    if (plan.parts == 1) return LaunchChunks<kKeys, 2>(problem, all, waits, stream);
  }
  return LaunchChunks<kKeys, 1>(problem, all, waits, stream);
}

}  // namespace

int64_t DeltaRuleChunkCudaBlocks(int device, DType dtype, int64_t key_dim, int64_t value_dim) {
  const auto get = [device](cudaDeviceAttr attribute) {
    int value = 0;
    return cudaDeviceGetAttribute(&value, attribute, device) == cudaSuccess ? value : 0;
  };
  const bool hopper =
      get(cudaDevAttrComputeCapabilityMajor) == 9 && get(cudaDevAttrComputeCapabilityMinor) == 0;
  const bool has_kernel = dtype == DType::kBFloat16 && key_dim == value_dim &&
                          (key_dim == 64 || key_dim == 128 || key_dim == 256);
  return hopper && has_kernel &&
                 RunsHopperCode(reinterpret_cast<const void*>(&DeltaRuleChunkKernel<64, 1, true>))
             ? get(cudaDevAttrMultiProcessorCount)
             : 0;
}

bool DeltaRuleChunkCudaTakes(const DeltaRuleArgs& args) {
  int device = 0;
  return args.token_stride % 8 == 0 && Aligned16({args.q, args.k, args.v, args.out_bfloat16}) &&
         cudaGetDevice(&device) == cudaSuccess &&
         DeltaRuleChunkCudaBlocks(device, args.dtype, args.key_dim, args.value_dim) > 0;
}

absl::Status DeltaRuleChunkCuda(const RaggedRows& rows, const DeltaRuleArgs& args, bool with_short_rows,
                                void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  if (args.key_dim == 64) return Launch<64>(rows, args, with_short_rows, cuda_stream);
  if (args.key_dim == 128) return Launch<128>(rows, args, with_short_rows, cuda_stream);
  return Launch<256>(rows, args, with_short_rows, cuda_stream);
}

#ifdef DELTANET_DELTA_RULE_CLOCKS
// For benchmarks: the clocks of the last launch, by warpgroup.
void CopyDeltaRuleClocks(int (*clocks)[10]) {
  cudaMemcpyFromSymbol(clocks, spent_clocks, sizeof(spent_clocks));
}
#endif

}  // namespace deltanet
