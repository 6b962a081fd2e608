#include "model/upload.h"

#include <algorithm>

#include "model/base/status_macros.h"

namespace deltanet {

Uploader::Uploader(const Device& device) : on_cpu_(device.type == DeviceType::kCpu), stream_(device) {
  if (on_cpu_) return;
  for (int i = 0; i < kPieces; ++i) {
    ring_.push_back({DeviceBuffer::HostFor(device, kPieceBytes), DeviceEvent(device)});
  }
}

Uploader::~Uploader() {
  try {
    stream_.Synchronize();
  } catch (...) {  // The device is lost, and nothing is under way; who uses it next is told.
  }
}

absl::Status Uploader::Write(char* to, int64_t bytes, Fill fill) {
  for (int64_t offset = 0; offset < bytes; offset += kPieceBytes) {
    const int64_t count = std::min(kPieceBytes, bytes - offset);
    if (on_cpu_) {
      RETURN_IF_ERROR(fill(offset, count, to + offset));
      continue;
    }
    Piece& piece = ring_[next_];
    next_ = (next_ + 1) % ring_.size();
    piece.copied.Synchronize();  // The last use of it.
    RETURN_IF_ERROR(fill(offset, count, piece.host.data()));
    stream_.Copy(to + offset, piece.host.data(), count);
    stream_.Record(&piece.copied);
  }
  return absl::OkStatus();
}

void Uploader::Finish() { stream_.Synchronize(); }

}  // namespace deltanet
