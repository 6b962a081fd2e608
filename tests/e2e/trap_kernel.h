// A kernel that stops the device, for tests of what follows.
#ifndef DELTANET_TESTS_E2E_TRAP_KERNEL_H_
#define DELTANET_TESTS_E2E_TRAP_KERNEL_H_

namespace deltanet {

// Launches a kernel that traps and waits for it: from then on every CUDA call of this process fails.
void LaunchTrapKernel();

}  // namespace deltanet

#endif  // DELTANET_TESTS_E2E_TRAP_KERNEL_H_
