#include "model/device.h"

#include <ATen/ops/empty.h>
#include <c10/core/CPUAllocator.h>

#include <cstring>
#include <optional>
#include <utility>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "model/base/check.h"
#include "model/model.h"
#include "model/torch_guard.h"

#ifdef DELTANET_CUDA
#include <ATen/cuda/CUDAContext.h>
#include <ATen/cuda/CUDAEvent.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace deltanet {
namespace {

at::Tensor Bytes(int64_t bytes, const at::TensorOptions& options) {
  return at::empty({bytes}, options.dtype(at::kByte));
}

#ifdef DELTANET_CUDA
c10::Device TorchDevice(const Device& device) {
  return {c10::DeviceType::CUDA, static_cast<c10::DeviceIndex>(device.index)};
}
#endif

}  // namespace

absl::Status CheckDevice(const Device& device) {
  if (device.type == DeviceType::kCpu) return absl::OkStatus();
#ifdef DELTANET_CUDA
  const int count = at::cuda::device_count();
  if (count == 0) {
    return absl::FailedPreconditionError(absl::StrCat(
        "device ", DeviceName(device), " was asked for, but no CUDA device (or no driver) is there"));
  }
  if (device.index >= count) {
    return absl::FailedPreconditionError(
        absl::StrCat("device ", DeviceName(device), " was asked for, want cuda:0 to cuda:", count - 1));
  }
  return absl::OkStatus();
#else
  return absl::FailedPreconditionError(
      absl::StrCat("device ", DeviceName(device), " was asked for, but this build has no CUDA support"));
#endif
}

absl::Status CheckAlive(const Device& device) {
  if (device.type == DeviceType::kCpu) return absl::OkStatus();
#ifdef DELTANET_CUDA
  // What was already reported and does not stay is taken away first.
  cudaGetLastError();
  const cudaError_t error = cudaDeviceSynchronize();
  if (error != cudaSuccess) {
    return absl::DataLossError(
        absl::StrCat("device ", DeviceName(device), " is lost: ", cudaGetErrorString(error)));
  }
#endif
  return absl::OkStatus();
}

int64_t FreeDeviceBytes(const Device& device) {
  if (device.type == DeviceType::kCpu) return 0;
#ifdef DELTANET_CUDA
  c10::cuda::CUDAGuard guard(TorchDevice(device));
  c10::cuda::CUDACachingAllocator::emptyCache();
  size_t free = 0, total = 0;
  C10_CUDA_CHECK(cudaMemGetInfo(&free, &total));
  return static_cast<int64_t>(free);
#else
  return 0;
#endif
}

std::optional<DeviceMemory> QueryDeviceMemory(const Device& device) {
  if (device.type == DeviceType::kCpu) return std::nullopt;
#ifdef DELTANET_CUDA
  const auto memory = CatchTorch("device memory", [&]() -> absl::StatusOr<DeviceMemory> {
    c10::cuda::CUDAGuard guard(TorchDevice(device));
    size_t free = 0, total = 0;
    C10_CUDA_CHECK(cudaMemGetInfo(&free, &total));
    return DeviceMemory{static_cast<int64_t>(total), static_cast<int64_t>(free)};
  });
  if (memory.ok()) return *memory;
#endif
  return std::nullopt;
}

struct DeviceBuffer::Storage {
  at::Tensor tensor;
};

DeviceBuffer::DeviceBuffer() = default;

DeviceBuffer::DeviceBuffer(const Device& device, int64_t bytes) : bytes_(bytes) {
  storage_ = std::make_unique<Storage>();
#ifdef DELTANET_CUDA
  if (device.type == DeviceType::kCuda) {
    storage_->tensor = Bytes(bytes, at::TensorOptions().device(TorchDevice(device)));
    data_ = static_cast<char*>(storage_->tensor.data_ptr());
    return;
  }
#endif
  DELTANET_CHECK(device.type == DeviceType::kCpu, "CheckDevice comes first");
  storage_->tensor = Bytes(bytes, at::TensorOptions());
  data_ = static_cast<char*>(storage_->tensor.data_ptr());
}

DeviceBuffer DeviceBuffer::HostFor(const Device& device, int64_t bytes) {
  DeviceBuffer buffer;
  buffer.storage_ = std::make_unique<Storage>();
  buffer.storage_->tensor = Bytes(bytes, at::TensorOptions().pinned_memory(device.type == DeviceType::kCuda));
  buffer.data_ = static_cast<char*>(buffer.storage_->tensor.data_ptr());
  buffer.bytes_ = bytes;
  return buffer;
}

DeviceBuffer::DeviceBuffer(DeviceBuffer&& other) noexcept
    : storage_(std::move(other.storage_)),
      data_(std::exchange(other.data_, nullptr)),
      bytes_(std::exchange(other.bytes_, 0)) {}

DeviceBuffer& DeviceBuffer::operator=(DeviceBuffer&& other) noexcept {
  storage_ = std::move(other.storage_);
  data_ = std::exchange(other.data_, nullptr);
  bytes_ = std::exchange(other.bytes_, 0);
  return *this;
}

DeviceBuffer::~DeviceBuffer() = default;

#ifdef DELTANET_CUDA

struct DeviceEvent::Handle {
  at::cuda::CUDAEvent event{cudaEventDisableTiming};
};
struct DeviceStream::Handle {
  c10::cuda::CUDAStream stream;
};
struct DeviceStream::Current::Guard {
  explicit Guard(c10::cuda::CUDAStream stream) : guard(stream) {}
  c10::cuda::CUDAStreamGuard guard;
};

DeviceEvent::DeviceEvent(const Device& device)
    : handle_(device.type == DeviceType::kCuda ? std::make_unique<Handle>() : nullptr) {}
void DeviceEvent::Synchronize() {
  if (handle_ != nullptr) handle_->event.synchronize();
}

DeviceStream::DeviceStream(const Device& device) {
  if (device.type == DeviceType::kCuda) {
    handle_ = std::make_unique<Handle>(
        Handle{c10::cuda::getStreamFromPool(/*isHighPriority=*/false, TorchDevice(device).index())});
  }
}
void* DeviceStream::handle() const { return handle_ != nullptr ? handle_->stream.stream() : nullptr; }
void DeviceStream::Copy(void* to, const void* from, int64_t bytes) {
  if (to == from || bytes == 0) return;
  if (handle_ == nullptr) {
    std::memcpy(to, from, bytes);
  } else {
    C10_CUDA_CHECK(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, handle_->stream.stream()));
  }
}
void DeviceStream::Record(DeviceEvent* event) {
  if (handle_ != nullptr) event->handle_->event.record(handle_->stream);
}
void DeviceStream::Await(const DeviceEvent& event) {
  if (handle_ != nullptr) event.handle_->event.block(handle_->stream);
}
void DeviceStream::Synchronize() {
  if (handle_ != nullptr) handle_->stream.synchronize();
}
DeviceStream::Current::Current(const DeviceStream& stream) {
  if (stream.handle_ != nullptr) {
    guard_ = std::make_unique<Guard>(stream.handle_->stream);
  }
}

#else

struct DeviceEvent::Handle {};
struct DeviceStream::Handle {};
struct DeviceStream::Current::Guard {};

DeviceEvent::DeviceEvent(const Device&) {}
void DeviceEvent::Synchronize() {}
DeviceStream::DeviceStream(const Device&) {}
void* DeviceStream::handle() const { return nullptr; }
void DeviceStream::Copy(void* to, const void* from, int64_t bytes) {
  if (to != from && bytes > 0) std::memcpy(to, from, bytes);
}
void DeviceStream::Record(DeviceEvent*) {}
void DeviceStream::Await(const DeviceEvent&) {}
void DeviceStream::Synchronize() {}
DeviceStream::Current::Current(const DeviceStream&) {}

#endif

DeviceEvent::~DeviceEvent() = default;
DeviceEvent::DeviceEvent(DeviceEvent&&) noexcept = default;
DeviceStream::~DeviceStream() {
#ifdef DELTANET_CUDA
  // For each stream on which a product ran, LibTorch would keep a workspace of cuBLAS's (some 32 MiB) for
  // ever.
  if (handle_ != nullptr) at::cuda::clearCublasWorkspaces();
#endif
}
DeviceStream::Current::~Current() = default;

}  // namespace deltanet
