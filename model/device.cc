#include "model/device.h"

#include <ATen/ops/empty.h>
#include <c10/core/CPUAllocator.h>

#include <cstring>
#include <map>
#include <optional>
#include <tuple>
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

// That LibTorch's allocator has made so far on the stream's device.
int64_t Allocations(const c10::cuda::CUDAStream& stream) {
  return c10::cuda::CUDACachingAllocator::getDeviceStats(stream.device_index())
      .allocation[static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE)]
      .allocated;
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
struct DeviceGraph::Handle {
  ~Handle() {
    if (executable != nullptr) C10_CUDA_ERROR_HANDLED(cudaGraphExecDestroy(executable));
  }
  cudaGraphExec_t executable = nullptr;
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

bool DeviceGraph::Supported(const Device& device) { return device.type == DeviceType::kCuda; }

// A stream of its own: LibTorch hands those of its pool out in turn, to several at a time, and what it keeps for a
// stream (see the destructor) could not be told from another's.
DeviceStream::DeviceStream(const Device& device) {
  if (device.type == DeviceType::kCuda) {
    const c10::cuda::CUDAGuard guard(TorchDevice(device));
    cudaStream_t stream = nullptr;
    C10_CUDA_CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    handle_ = std::make_unique<Handle>(
        Handle{c10::cuda::getStreamFromExternal(stream, TorchDevice(device).index())});
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
absl::StatusOr<DeviceGraph> DeviceStream::Capture(absl::FunctionRef<absl::Status()> work) {
  DELTANET_CHECK(handle_ != nullptr, "DeviceGraph::Supported comes first");
  const cudaStream_t stream = handle_->stream.stream();
  const int64_t allocations_before = Allocations(handle_->stream);
  // Other threads may use the device as they like meanwhile.
  C10_CUDA_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  const absl::Status status = CatchTorch("capturing", [&] { return work(); });
  cudaGraph_t captured = nullptr;
  const cudaError_t ended = cudaStreamEndCapture(stream, &captured);
  DeviceGraph graph;
  graph.handle_ = std::make_unique<DeviceGraph::Handle>();
  cudaError_t instantiated = cudaSuccess;
  if (captured != nullptr) {
    instantiated = cudaGraphInstantiate(&graph.handle_->executable, captured, 0);
    C10_CUDA_ERROR_HANDLED(cudaGraphDestroy(captured));
  }
  if (!status.ok()) {
    cudaGetLastError();  // What there is to say of the capture follows from that.
    return status;
  }
  C10_CUDA_CHECK(ended);
  C10_CUDA_CHECK(instantiated);
  // Memory that was given back by now is somebody else's when the graph runs.
  if (const int64_t allocations = Allocations(handle_->stream) - allocations_before; allocations > 0) {
    return absl::InternalError(absl::StrCat("capturing made ", allocations, " allocations, want none"));
  }
  // Not at the first launch.
  C10_CUDA_CHECK(cudaGraphUpload(graph.handle_->executable, stream));
  return graph;
}
void DeviceStream::Launch(const DeviceGraph& graph) {
  C10_CUDA_CHECK(cudaGraphLaunch(graph.handle_->executable, handle_->stream.stream()));
}
DeviceStream::Current::Current(const DeviceStream& stream) {
  if (stream.handle_ != nullptr) {
    guard_ = std::make_unique<Guard>(stream.handle_->stream);
  }
}

#else

struct DeviceEvent::Handle {};
struct DeviceGraph::Handle {};
struct DeviceStream::Handle {};
struct DeviceStream::Current::Guard {};

DeviceEvent::DeviceEvent(const Device&) {}
void DeviceEvent::Synchronize() {}
bool DeviceGraph::Supported(const Device&) { return false; }
DeviceStream::DeviceStream(const Device&) {}
void* DeviceStream::handle() const { return nullptr; }
void DeviceStream::Copy(void* to, const void* from, int64_t bytes) {
  if (to != from && bytes > 0) std::memcpy(to, from, bytes);
}
void DeviceStream::Record(DeviceEvent*) {}
void DeviceStream::Await(const DeviceEvent&) {}
void DeviceStream::Synchronize() {}
absl::StatusOr<DeviceGraph> DeviceStream::Capture(absl::FunctionRef<absl::Status()>) {
  DELTANET_CHECK(false, "DeviceGraph::Supported comes first");
  return DeviceGraph();
}
void DeviceStream::Launch(const DeviceGraph&) {}
DeviceStream::Current::Current(const DeviceStream&) {}

#endif

DeviceEvent::~DeviceEvent() = default;
DeviceEvent::DeviceEvent(DeviceEvent&&) noexcept = default;
DeviceGraph::DeviceGraph() = default;
DeviceGraph::DeviceGraph(DeviceGraph&&) noexcept = default;
DeviceGraph& DeviceGraph::operator=(DeviceGraph&&) noexcept = default;
DeviceGraph::~DeviceGraph() = default;
DeviceStream::~DeviceStream() {
#ifdef DELTANET_CUDA
  if (handle_ == nullptr) return;
  const cudaStream_t stream = handle_->stream.stream();
  C10_CUDA_ERROR_HANDLED(cudaStreamSynchronize(stream));
  // For each stream on which a product ran, LibTorch would keep a workspace of cuBLAS's (some 32 MiB) for ever.
  // Those of other streams stay: graphs captured there go on using them.
  for (auto* workspaces :
       {&at::cuda::cublas_handle_stream_to_workspace(), &at::cuda::cublaslt_handle_stream_to_workspace()}) {
    const std::unique_lock lock(workspaces->mutex);  // Both are LibTorch's.
    std::erase_if(workspaces->map, [&](const auto& entry) { return std::get<1>(entry.first) == stream; });
  }
  C10_CUDA_ERROR_HANDLED(cudaStreamDestroy(stream));
#endif
}
DeviceStream::Current::~Current() = default;

}  // namespace deltanet
