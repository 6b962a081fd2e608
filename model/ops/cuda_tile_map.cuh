// Maps of matrices in a GPU's memory for its bulk copies, which put boxes of them into shared memory as tiles
// for the asynchronous products (cuda_sm90.cuh).
#ifndef DELTANET_MODEL_OPS_CUDA_TILE_MAP_CUH_
#define DELTANET_MODEL_OPS_CUDA_TILE_MAP_CUH_

#include <cuda.h>
#include <cuda_runtime.h>

#include <array>
#include <cstddef>
#include <cstdint>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

namespace deltanet {

// The map of an array of bfloat16 at a multiple of 16 bytes: the numbers of its elements along each
// dimension, the innermost first; the bytes from one to the next along all but the innermost, multiples of
// 16; and the elements of a box, 64 of the innermost for a tile. Without a swizzle a box's rows lie one behind
// the other. What is beyond the array reads as zero. INTERNAL if the driver refuses. Takes the host some
// 100 ns.
template <size_t kDimensions>
absl::Status MapBoxes(const void* data, const std::array<uint64_t, kDimensions>& sizes,
                      const std::array<uint64_t, kDimensions - 1>& strides,
                      const std::array<uint32_t, kDimensions>& box, CUtensorMap* map,
                      CUtensorMapSwizzle swizzle = CU_TENSOR_MAP_SWIZZLE_128B) {
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                                               cudaEnableDefault, &found);
    return error == cudaSuccess && found == cudaDriverEntryPointSuccess
               ? reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function)
               : nullptr;
  }();
  if (encode == nullptr) return absl::InternalError("the driver has no cuTensorMapEncodeTiled (CUDA 12.0)");
  std::array<uint32_t, kDimensions> steps;
  steps.fill(1);
  static_assert(sizeof(cuuint64_t) == sizeof(uint64_t) && sizeof(cuuint32_t) == sizeof(uint32_t));
  const CUresult result = encode(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, kDimensions, const_cast<void*>(data),
                                 sizes.data(), strides.data(), box.data(), steps.data(),
                                 CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result == CUDA_SUCCESS) return absl::OkStatus();
  return absl::InternalError(absl::StrCat("mapping an array [", absl::StrJoin(sizes, ","),
                                          "], innermost first, with ", absl::StrJoin(strides, ","),
                                          " bytes between: CUDA error ", static_cast<int>(result)));
}

// The map of a matrix [rows, columns], `stride` elements from row to row, for boxes [columns, rows].
inline absl::Status MapMatrix(const void* data, int64_t rows, int64_t columns, int64_t stride,
                              const std::array<uint32_t, 2>& box, CUtensorMap* map,
                              CUtensorMapSwizzle swizzle = CU_TENSOR_MAP_SWIZZLE_128B) {
  return MapBoxes<2>(data, {static_cast<uint64_t>(columns), static_cast<uint64_t>(rows)},
                     {2 * static_cast<uint64_t>(stride)}, box, map, swizzle);
}

}  // namespace deltanet

#endif  // DELTANET_MODEL_OPS_CUDA_TILE_MAP_CUH_
