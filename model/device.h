// A device as the engine uses it: memory, streams of work, events between them. On the CPU a stream does its
// work at once and host and device memory are the same. Everything here throws what LibTorch throws: call it
// under CatchTorch.
#ifndef DELTANET_MODEL_DEVICE_H_
#define DELTANET_MODEL_DEVICE_H_

#include <cstdint>
#include <memory>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "model/base/tensor_view.h"

namespace deltanet {

// OK if this build and this machine have `device`; FAILED_PRECONDITION says what is missing.
absl::Status CheckDevice(const Device& device);

// OK unless the device is lost: an error of CUDA's that stays, whatever is asked of the device next. Waits
// for the device.
absl::Status CheckAlive(const Device& device);

// Bytes of memory that are free on a CUDA device, counting what LibTorch's allocator holds and does not use.
// 0 on the CPU.
int64_t FreeDeviceBytes(const Device& device);

// Memory on a device, uninitialised, aligned to 64 bytes, given back on destruction. Move-only; a default
// buffer is empty. Pages of a large buffer on the CPU cost nothing until they are touched.
class DeviceBuffer {
 public:
  DeviceBuffer();
  DeviceBuffer(const Device& device, int64_t bytes);
  DeviceBuffer(DeviceBuffer&& other) noexcept;
  DeviceBuffer& operator=(DeviceBuffer&& other) noexcept;
  ~DeviceBuffer();

  // Host memory that `device` copies to and from without a detour (pinned, for CUDA).
  static DeviceBuffer HostFor(const Device& device, int64_t bytes);

  char* data() const { return data_; }
  template <typename T>
  T* as() const {
    return reinterpret_cast<T*>(data_);
  }
  int64_t bytes() const { return bytes_; }

 private:
  struct Storage;
  std::unique_ptr<Storage> storage_;
  char* data_ = nullptr;
  int64_t bytes_ = 0;
};

// A point in a stream's work.
class DeviceEvent {
 public:
  explicit DeviceEvent(const Device& device);
  ~DeviceEvent();
  DeviceEvent(DeviceEvent&&) noexcept;

  void Synchronize();  // Blocks until the work before it is done.

 private:
  friend class DeviceStream;
  struct Handle;
  std::unique_ptr<Handle> handle_;  // Null on the CPU.
};

// Work of a stream, captured once and then launched as one, any number of times. What it reads and writes stays
// where it was when it was captured. Move-only; a default graph is empty.
class DeviceGraph {
 public:
  DeviceGraph();
  DeviceGraph(DeviceGraph&&) noexcept;
  DeviceGraph& operator=(DeviceGraph&&) noexcept;
  ~DeviceGraph();

  // Whether streams of this device capture: CUDA's do, where work is long in coming; on the CPU it is done at
  // once.
  static bool Supported(const Device& device);

 private:
  friend class DeviceStream;
  struct Handle;
  std::unique_ptr<Handle> handle_;
};

// An order of work on a device. Confined to one thread. Its end waits for its work.
class DeviceStream {
 public:
  explicit DeviceStream(const Device& device);
  ~DeviceStream();

  void* handle() const;  // cudaStream_t; null on the CPU.

  // Between host and device, either way. Does nothing if both are the same memory.
  void Copy(void* to, const void* from, int64_t bytes);
  void Record(DeviceEvent* event);
  void Await(const DeviceEvent& event);  // What follows here runs after the event.
  void Synchronize();

  // What `work` queues on this stream, which is not run now. `work` has been run here by this thread, so that all
  // that is allocated, loaded or chosen on first use is there; it queues on no other stream, waits for nothing,
  // allocates nothing and copies no pageable memory. Its error, if it has one. Wants DeviceGraph::Supported.
  absl::StatusOr<DeviceGraph> Capture(absl::FunctionRef<absl::Status()> work);
  void Launch(const DeviceGraph& graph);  // Not empty, captured from this stream.

  // Makes this stream the one that LibTorch's operators use on this thread, while it lives.
  class Current {
   public:
    explicit Current(const DeviceStream& stream);
    ~Current();

   private:
    struct Guard;
    std::unique_ptr<Guard> guard_;
  };

 private:
  struct Handle;
  std::unique_ptr<Handle> handle_;
};

}  // namespace deltanet

#endif  // DELTANET_MODEL_DEVICE_H_
