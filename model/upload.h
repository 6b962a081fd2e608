// Filling a device's memory from the host without a second copy of it there.
#ifndef DELTANET_MODEL_UPLOAD_H_
#define DELTANET_MODEL_UPLOAD_H_

#include <cstdint>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "model/device.h"

namespace deltanet {

// On the CPU everything is written where it belongs. On CUDA it passes through a small ring of pinned pieces,
// so that a piece is filled while those before it are copied. Confined to one thread. Throws what LibTorch
// throws.
class Uploader {
 public:
  static constexpr int64_t kPieceBytes = int64_t{8} << 20;

  explicit Uploader(const Device& device);
  ~Uploader();  // Waits for what is under way.

  // Fills `bytes` bytes at `to`, on the device: calls fill(offset, count, piece) for one piece after another
  // (at most kPieceBytes; its offset a multiple of that), which fills `piece`, on the host. Stops at the
  // first error and returns it; what is at `to` is then unspecified.
  using Fill = absl::FunctionRef<absl::Status(int64_t offset, int64_t count, char* piece)>;
  absl::Status Write(char* to, int64_t bytes, Fill fill);

  // Blocks until all is there.
  void Finish();

 private:
  static constexpr int kPieces = 4;

  struct Piece {
    DeviceBuffer host;
    DeviceEvent copied;
  };

  const bool on_cpu_;
  DeviceStream stream_;
  std::vector<Piece> ring_;  // Empty on the CPU.
  size_t next_ = 0;
};

}  // namespace deltanet

#endif  // DELTANET_MODEL_UPLOAD_H_
