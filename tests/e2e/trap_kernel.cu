#include "tests/e2e/trap_kernel.h"

namespace deltanet {
namespace {

__global__ void TrapKernel() { asm volatile("trap;"); }

}  // namespace

void LaunchTrapKernel() {
  TrapKernel<<<1, 1>>>();
  cudaDeviceSynchronize();
}

}  // namespace deltanet
