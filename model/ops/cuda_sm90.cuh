// What kernels for Hopper (sm_90a) use beyond CUDA C++, one function an instruction: barriers in shared
// memory, asynchronous copies, clusters, 8x8 matrices between shared memory and registers, matrix products of
// a warp and of a warpgroup. Only code compiled for sm_90a may call them.
//
// Fragments. q = lane % 4, r = lane / 4.
//   An 8x8 matrix of bfloat16 in a register of each lane: row r, columns 2q (low half) and 2q + 1.
//   C or D, 16 x 8 float32, four registers: (r, 2q), (r, 2q + 1), (r + 8, 2q), (r + 8, 2q + 1).
//   A, 16 x 16 bfloat16, four registers: rows r, r + 8 of columns 2q, 2q + 1; then of columns 2q + 8, 2q + 9.
//   B, 16 x 8, two registers: rows 2q, 2q + 1 (then 2q + 8, 2q + 9) of column r.
// So the C of two neighbouring column tiles, rounded to pairs, is the A of the product that follows. Of a
// warpgroup's 64 rows, warp w has rows 16 w to 16 w + 15 as a warp's product would.
//
// Tiles of the asynchronous products in shared memory: 64 rows of 64 bfloat16 (128 bytes), 8192 bytes at a
// multiple of 1024; of row i, the 16-byte piece j is stored at place j ^ (i % 8) ("128-byte swizzle").
#ifndef DELTANET_MODEL_OPS_CUDA_SM90_CUH_
#define DELTANET_MODEL_OPS_CUDA_SM90_CUH_

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace deltanet {

constexpr int kTileBytes = 8192;

// The byte of a tile where piece `piece` (of 16 bytes) of row `row` begins.
__device__ inline uint32_t InTile(int row, int piece) {
  return static_cast<uint32_t>(row * 128 + ((piece ^ (row & 7)) << 4));
}

__device__ inline unsigned char* DynamicSharedMemory() {
  extern __shared__ __align__(1024) unsigned char dynamic_shared_memory[];
  return dynamic_shared_memory;
}
__device__ inline uint32_t SharedAddress(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Two floats as bfloat16, `low` in the low half.
__device__ inline uint32_t PackBfloat16(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}
__device__ inline float LowBfloat16(uint32_t packed) { return __uint_as_float(packed << 16); }
__device__ inline float HighBfloat16(uint32_t packed) { return __uint_as_float(packed & 0xffff0000u); }

// Barriers in shared memory. A phase ends with the arrival of `count`; waiting for the parity of the phase
// before the first passes at once.
__device__ inline void BarrierInit(uint32_t barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
// Makes initialised barriers visible to the asynchronous proxy and other blocks; before the block's barrier.
__device__ inline void BarrierInitFence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ inline void BarrierArrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ inline bool BarrierTry(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{.reg .pred p;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.b32 %0, 1, 0, p;}\n"
      : "=r"(done)
      : "r"(barrier), "r"(parity)
      : "memory");
  return done != 0;
}
// The same without ever waiting: BarrierTry may, for a while.
__device__ inline bool BarrierIsPast(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{.reg .pred p;\n"
      "mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.b32 %0, 1, 0, p;}\n"
      : "=r"(done)
      : "r"(barrier), "r"(parity)
      : "memory");
  return done != 0;
}
__device__ inline void BarrierWait(uint32_t barrier, uint32_t parity) {
  while (!BarrierTry(barrier, parity)) {
  }
}
// Walks over the stages or slots of a ring in turn, with the parity of their barriers.
template <int kSize>
struct Ring {
  int at = 0;
  uint32_t parity = 0;
  __device__ void Next() {
    if (++at == kSize) {
      at = 0;
      parity ^= 1;
    }
  }
};

// A barrier among `threads` threads; 0 is __syncthreads().
__device__ inline void NamedBarrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Queues a copy of 16 bytes to shared memory, or of 16 zeros if not `there`.
__device__ inline void CopyAsync16(uint32_t to, const void* from, bool there) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to),
               "l"(__cvta_generic_to_global(from)), "r"(there ? 16 : 0)
               : "memory");
}
__device__ inline void CopyAsyncCommit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits for all but the last `kPending` groups of this thread.
template <int kPending>
__device__ inline void CopyAsyncWait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}
// Orders this thread's writes to shared memory before what the asynchronous proxy reads after it was told.
__device__ inline void FenceAsyncProxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Lets the phase in hand end only when `bytes` more have been copied.
__device__ inline void BarrierExpect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}
// Arrives, and lets the phase end only when `bytes` more have been copied.
__device__ inline void BarrierArriveExpecting(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

// Copies by one thread of a whole box of a matrix, as a map of it says; what lies outside the matrix is zero,
// and counts. `x` is the first element of a row, `y` the row, `z` the matrix. A map is a kernel's parameter
// (__grid_constant__).
__device__ inline void CopyBox(uint32_t to, const CUtensorMap* map, int x, int y, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], "
      "[%4];" ::"r"(to),
      "l"(map), "r"(x), "r"(y), "r"(barrier)
      : "memory");
}
__device__ inline void CopyBox(uint32_t to, const CUtensorMap* map, int x, int y, int z, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], "
      "[%5];" ::"r"(to),
      "l"(map), "r"(x), "r"(y), "r"(z), "r"(barrier)
      : "memory");
}
// The same into each of the cluster's blocks whose ranks are bits of `blocks`, to the same place, on the same
// barrier.
__device__ inline void CopyBoxToBlocks(uint32_t to, const CUtensorMap* map, int x, int y, uint32_t barrier,
                                       uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
      "[%1, {%2, %3}], [%4], %5;" ::"r"(to),
      "l"(map), "r"(x), "r"(y), "r"(barrier), "h"(blocks)
      : "memory");
}
// A copy by one thread of `bytes` from global to shared memory, which a barrier counts; both ends and `bytes`
// are multiples of 16.
__device__ inline void CopyBulk(uint32_t to, const void* from, int bytes, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
      "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(barrier)
      : "memory");
}
// The ways back. Of a box, what lies outside the matrix is left alone.
__device__ inline void CopyBoxOut(const CUtensorMap* map, int x, int y, uint32_t from) {
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];\n"
      "cp.async.bulk.commit_group;" ::"l"(map),
      "r"(x), "r"(y), "r"(from)
      : "memory");
}
__device__ inline void CopyBulkOut(void* to, uint32_t from, int bytes) {
  asm volatile(
      "cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;\n"
      "cp.async.bulk.commit_group;" ::"l"(__cvta_generic_to_global(to)),
      "r"(from), "r"(bytes)
      : "memory");
}
// Waits until what this thread copies out has been read: shared memory may then be overwritten, or go.
__device__ inline void CopyOutWait() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
// Brings the map itself nearer.
__device__ inline void PrefetchMap(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Clusters: blocks that reach one another's shared memory. A kernel launched without is a cluster of one.
__device__ inline int ClusterBlocks() {
  uint32_t blocks;
  asm("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(blocks));
  return static_cast<int>(blocks);
}
__device__ inline int ClusterRank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctaid.x;" : "=r"(rank));
  return static_cast<int>(rank);
}
// A barrier among all threads of the cluster; what they wrote before it is visible to all, and what they asked for
// has come.
__device__ inline void ClusterBarrier() {
  asm volatile(
      "barrier.cluster.arrive.release;\n"
      "barrier.cluster.wait.acquire;" ::
          : "memory");
}
// The same for what they wrote into their own blocks' shared memory alone: it does not wait for the device's.
__device__ inline void ClusterBarrierOfShared() {
  asm volatile(
      "fence.release.sync_restrict::shared::cta.cluster;\n"
      "barrier.cluster.arrive.relaxed;\n"
      "barrier.cluster.wait.acquire;" ::
          : "memory");
}
// A barrier of the cluster in two halves, for blocks that have written nothing but their barriers yet.
__device__ inline void ClusterArrive() { asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory"); }
__device__ inline void ClusterWait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }
// Where the cluster's block `rank` has what this block has at `address`.
__device__ inline uint32_t InBlock(uint32_t address, int rank) {
  uint32_t there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
  return there;
}
// `count` arrivals at a barrier, given as InBlock gives it.
__device__ inline void BarrierArriveThere(uint32_t barrier, int count) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
// Queues a copy of this block's memory to another block's, on whose barrier it counts its bytes; `to` and
// `barrier` as InBlock gives them.
__device__ inline void CopyToBlock(uint32_t to, uint32_t from, int bytes, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
      "r"(from), "r"(bytes), "r"(barrier)
      : "memory");
}
// Queues 16 bytes to another block's memory, on whose barrier they count; likewise. Only of a cluster of more
// than one block.
__device__ inline void StoreToBlock(uint32_t to, const float4& x, uint32_t barrier) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(to),
      "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w), "r"(barrier)
      : "memory");
}
// Four floats of another block's memory, at an address as InBlock gives it.
__device__ inline float4 LoadFromBlock(uint32_t address) {
  float4 x;
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
               : "r"(address)
               : "memory");
  return x;
}

// Four 8x8 matrices: lane 8 m + i has the address of row i of matrix m.
__device__ inline void LoadMatrices(uint32_t (&x)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(address)
               : "memory");
}
__device__ inline void LoadMatricesTransposed(uint32_t (&x)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(address)
               : "memory");
}
__device__ inline void StoreMatrices(uint32_t address, uint32_t x0, uint32_t x1, uint32_t x2, uint32_t x3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(x0),
               "r"(x1), "r"(x2), "r"(x3)
               : "memory");
}
__device__ inline void StoreMatricesTransposed(uint32_t address, uint32_t x0, uint32_t x1, uint32_t x2,
                                               uint32_t x3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
               "r"(x0), "r"(x1), "r"(x2), "r"(x3)
               : "memory");
}

// d += a b, 16 x 8 x 16, by a warp.
__device__ inline void WarpProduct(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Asynchronous products of a warpgroup, 64 x N x 16. Between Begin and End registers of `d` and `a` may not
// be touched; products of groups but the last `kPending` are complete after AsyncProductsWait.
__device__ inline void AsyncProductsBegin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void AsyncProductsEnd() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ inline void AsyncProductsWait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Keeps the compiler from moving what touches `x` over this line: it does not know that products are pending.
template <int N>
__device__ inline void Pin(float (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(x[i])::"memory");
}

// Operands in tiles, as the low half of a descriptor; the high half is the same for all, and an operand some
// bytes further on is Further. By rows: row n of the tile is row (of A) or column (of B) n of the operand,
// its elements are the product's inner index, of which 16 are taken from `address` on. By columns: the tile's
// rows are the inner index, its elements the operand's columns, the next 64 of them a tile further on.
constexpr uint32_t kTileHigh = 1u << 30 | 1024 >> 4;  // 128-byte swizzle, 8 rows are 1024 bytes.
// In a cluster an address has the block's rank in its high bits, which are not for a descriptor.
__device__ inline uint32_t TileByRows(uint32_t address) { return 1u << 16 | (address & 0x3ffff) >> 4; }
__device__ inline uint32_t TileByColumns(uint32_t address) {
  return uint32_t{kTileBytes >> 4} << 16 | (address & 0x3ffff) >> 4;
}
constexpr uint32_t Further(uint32_t tile, uint32_t bytes) { return tile + (bytes >> 4); }

#define DELTANET_F4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define DELTANET_F8(i)                                                                        \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])

// d = (add ? d : 0) + a b, b by columns if kTransposed. d: N / 2 floats, a: four registers.
template <int N, bool kTransposed>
__device__ inline void AsyncProduct(float* d, const uint32_t* a, uint32_t b, bool add) {
  static_assert(N == 64 || N == 128);
  if constexpr (N == 64) {
    asm volatile(
        "{.reg .pred p;\n.reg .b64 b;\nsetp.ne.b32 p, %38, 0;\nmov.b64 b, {%36, %37};\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, "
        "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
        "}, {%32, %33, %34, %35}, b, p, 1, 1, %39;}\n"
        : DELTANET_F8(0), DELTANET_F8(8), DELTANET_F8(16), DELTANET_F8(24)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "r"(kTileHigh), "r"(int{add}),
          "n"(int{kTransposed}));
  } else if constexpr (N == 128) {
    asm volatile(
        "{.reg .pred p;\n.reg .b64 b;\nsetp.ne.b32 p, %70, 0;\nmov.b64 b, {%68, %69};\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, "
        "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, "
        "%38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, "
        "%56, %57, %58, %59, %60, %61, %62, %63"
        "}, {%64, %65, %66, %67}, b, p, 1, 1, %71;}\n"
        : DELTANET_F8(0), DELTANET_F8(8), DELTANET_F8(16), DELTANET_F8(24), DELTANET_F8(32), DELTANET_F8(40),
          DELTANET_F8(48), DELTANET_F8(56)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "r"(kTileHigh), "r"(int{add}),
          "n"(int{kTransposed}));
  }
}

// The same with A in shared memory, both by rows.
template <int N = 64>
__device__ inline void AsyncProductShared(float* d, uint32_t a, uint32_t b, bool add) {
  static_assert(N == 8 || N == 16 || N == 32 || N == 48 || N == 64 || N == 88 || N == 96 || N == 128 ||
                N == 176);
  if constexpr (N == 8) {
    asm volatile(
        "{.reg .pred p;\n.reg .b64 a, b;\nsetp.ne.b32 p, %7, 0;\n"
        "mov.b64 a, {%4, %6};\nmov.b64 b, {%5, %6};\n"
        "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3"
        "}, a, b, p, 1, 1, 0, 0;}\n"
        : DELTANET_F4(0)
        : "r"(a), "r"(b), "r"(kTileHigh), "r"(int{add}));
  } else if constexpr (N == 16) {
    asm volatile(
        "{.reg .pred p;\n.reg .b64 a, b;\nsetp.ne.b32 p, %11, 0;\n"
        "mov.b64 a, {%8, %10};\nmov.b64 b, {%9, %10};\n"
        "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7"
        "}, a, b, p, 1, 1, 0, 0;}\n"
        : DELTANET_F8(0)
        : "r"(a), "r"(b), "r"(kTileHigh), "r"(int{add}));
  } else if constexpr (N == 32) {
    asm volatile(
        "{.reg .pred p;\n.reg .b64 a, b;\nsetp.ne.b32 p, %19, 0;\n"
        "mov.b64 a, {%16, %18};\nmov.b64 b, {%17, %18};\n"
        "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
        "}, a, b, p, 1, 1, 0, 0;}\n"
        : DELTANET_F8(0), DELTANET_F8(8)
        : "r"(a), "r"(b), "r"(kTileHigh), "r"(int{add}));
  } else if constexpr (N == 48) {
    asm volatile(
        "{.reg .pred p;\n.reg .b64 a, b;\nsetp.ne.b32 p, %27, 0;\n"
        "mov.b64 a, {%24, %26};\nmov.b64 b, {%25, %26};\n"
        "wgmma.mma_async.sync.aligned.m64n48k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, "
        "%20, %21, %22, %23"
        "}, a, b, p, 1, 1, 0, 0;}\n"
        : DELTANET_F8(0), DELTANET_F8(8), DELTANET_F8(16)
        : "r"(a), "r"(b), "r"(kTileHigh), "r"(int{add}));
  } else if constexpr (N == 64) {
    asm volatile(
        "{.reg .pred p;\n.reg .b64 a, b;\nsetp.ne.b32 p, %35, 0;\n"
        "mov.b64 a, {%32, %34};\nmov.b64 b, {%33, %34};\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, "
        "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
        "}, a, b, p, 1, 1, 0, 0;}\n"
        : DELTANET_F8(0), DELTANET_F8(8), DELTANET_F8(16), DELTANET_F8(24)
        : "r"(a), "r"(b), "r"(kTileHigh), "r"(int{add}));
  } else if constexpr (N == 88) {
    asm volatile(
        "{.reg .pred p;\n.reg .b64 a, b;\nsetp.ne.b32 p, %47, 0;\n"
        "mov.b64 a, {%44, %46};\nmov.b64 b, {%45, %46};\n"
        "wgmma.mma_async.sync.aligned.m64n88k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, "
        "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, "
        "%40, %41, %42, %43"
        "}, a, b, p, 1, 1, 0, 0;}\n"
        : DELTANET_F8(0), DELTANET_F8(8), DELTANET_F8(16), DELTANET_F8(24), DELTANET_F8(32), DELTANET_F4(40)
        : "r"(a), "r"(b), "r"(kTileHigh), "r"(int{add}));
  } else if constexpr (N == 96) {
    asm volatile(
        "{.reg .pred p;\n.reg .b64 a, b;\nsetp.ne.b32 p, %51, 0;\n"
        "mov.b64 a, {%48, %50};\nmov.b64 b, {%49, %50};\n"
        "wgmma.mma_async.sync.aligned.m64n96k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, "
        "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, "
        "%40, %41, %42, %43, %44, %45, %46, %47"
        "}, a, b, p, 1, 1, 0, 0;}\n"
        : DELTANET_F8(0), DELTANET_F8(8), DELTANET_F8(16), DELTANET_F8(24), DELTANET_F8(32),
          DELTANET_F8(40)
        : "r"(a), "r"(b), "r"(kTileHigh), "r"(int{add}));
  } else if constexpr (N == 128) {
    asm volatile(
        "{.reg .pred p;\n.reg .b64 a, b;\nsetp.ne.b32 p, %67, 0;\n"
        "mov.b64 a, {%64, %66};\nmov.b64 b, {%65, %66};\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, "
        "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, "
        "%40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, "
        "%60, %61, %62, %63"
        "}, a, b, p, 1, 1, 0, 0;}\n"
        : DELTANET_F8(0), DELTANET_F8(8), DELTANET_F8(16), DELTANET_F8(24), DELTANET_F8(32), DELTANET_F8(40),
          DELTANET_F8(48), DELTANET_F8(56)
        : "r"(a), "r"(b), "r"(kTileHigh), "r"(int{add}));
  } else if constexpr (N == 176) {
    asm volatile(
        "{.reg .pred p;\n.reg .b64 a, b;\nsetp.ne.b32 p, %91, 0;\n"
        "mov.b64 a, {%88, %90};\nmov.b64 b, {%89, %90};\n"
        "wgmma.mma_async.sync.aligned.m64n176k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, "
        "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, "
        "%40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, "
        "%60, %61, %62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
        "%80, %81, %82, %83, %84, %85, %86, %87"
        "}, a, b, p, 1, 1, 0, 0;}\n"
        : DELTANET_F8(0), DELTANET_F8(8), DELTANET_F8(16), DELTANET_F8(24), DELTANET_F8(32), DELTANET_F8(40),
          DELTANET_F8(48), DELTANET_F8(56), DELTANET_F8(64), DELTANET_F8(72), DELTANET_F8(80)
        : "r"(a), "r"(b), "r"(kTileHigh), "r"(int{add}));
  }
}

#undef DELTANET_F4
#undef DELTANET_F8

// The compiler takes it that x may have changed here, and computes nothing from it in advance.
__device__ inline void Opaque(int* x) { asm volatile("" : "+r"(*x)); }

// Moves registers of this warpgroup to or from the block's others. All its warps, once.
template <int kRegisters>
__device__ inline void MoreRegisters() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ inline void FewerRegisters() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace deltanet

#endif  // DELTANET_MODEL_OPS_CUDA_SM90_CUH_
