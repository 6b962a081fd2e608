// The CUDA variants of the operators. The doors (delta_rule.cc, ...) validate and call these, nobody else
// does. Each queues its kernels on `stream` (a cudaStream_t) and returns INTERNAL if a launch fails.
#ifndef DELTANET_MODEL_OPS_CUDA_KERNELS_H_
#define DELTANET_MODEL_OPS_CUDA_KERNELS_H_

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "model/ops/carry.h"
#include "model/ops/conv_qkv.h"
#include "model/ops/delta_net_mixer.h"
#include "model/ops/delta_rule.h"
#include "model/ops/elementwise.h"
#include "model/ops/gemm.h"
#include "model/ops/output_norm.h"
#include "model/ops/readout.h"
#include "model/ops/rms_norm.h"
#include "model/ops/short_conv.h"

namespace deltanet {

// Whether DeltaNetStepCuda can do this work, and the rows of at most kDeltaRuleFewTokens tokens; the others it
// leaves alone.
bool DeltaNetStepCudaTakes(const DeltaNetMixerArgs& args);
absl::Status DeltaNetStepCuda(const RaggedRows& rows, const DeltaNetMixerArgs& args, void* stream);
absl::Status DeltaRuleCuda(const RaggedRows& rows, const DeltaRuleArgs& args, void* stream);
absl::Status GatherTapsCuda(const RaggedRows& rows, const GatherTapsArgs& args, void* stream);
absl::Status ConvQkvActivationCuda(const RaggedRows& rows, const ConvQkvActivationArgs& args, void* stream);
absl::Status ShortConvQkvCuda(const RaggedRows& rows, const ShortConvQkvArgs& args, void* stream);
// Whether GemmSkinnyCuda can make this product on the current device.
bool GemmSkinnyCudaTakes(const FusedGemmArgs& args);
absl::Status GemmSkinnyCuda(const FusedGemmArgs& args, void* stream);
// The same of GemmGatedCuda; products of few rows it takes only if they fit its tiles.
bool GemmGatedCudaTakes(const FusedGemmArgs& args);
absl::Status GemmGatedCuda(const FusedGemmArgs& args, void* stream);
// Whether it has made the product, or left it alone, for there is no kernel to be preferred; on the current device, of
// which `cublas_lt` is a cublasLtHandle_t.
absl::StatusOr<bool> GemmLtCuda(const GemmArgs& args, void* cublas_lt, void* stream);
// Whether GemmSmallCuda is to be preferred for this product.
bool GemmSmallCudaTakes(const GemmArgs& args);
absl::Status GemmSmallCuda(const GemmArgs& args, void* stream);
absl::Status AddRmsNormCuda(const AddRmsNormArgs& args, void* stream);
absl::Status GatedUnitCuda(const GatedUnitArgs& args, void* stream);
absl::Status OutputNormCuda(const OutputNormArgs& args, void* stream);
absl::Status EmbedCuda(const RaggedRows& rows, const EmbedArgs& args, void* stream);
absl::Status CarryCuda(const RaggedRows& rows, const CarryArgs& args, void* stream);
absl::Status ReadoutCuda(const ReadoutArgs& args, void* stream);

}  // namespace deltanet

// In a door: returns `call` if the context's device is a GPU and this build has kernels for it.
#ifdef DELTANET_CUDA
#define CUDA_DOOR(call)                                          \
  do {                                                           \
    if (context.device.type == DeviceType::kCuda) return (call); \
  } while (false)
#else
#define CUDA_DOOR(call) \
  do {                  \
  } while (false)
#endif

#endif  // DELTANET_MODEL_OPS_CUDA_KERNELS_H_
