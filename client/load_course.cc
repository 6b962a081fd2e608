#include "client/load_course.h"

#include <algorithm>
#include <thread>

namespace deltanet {
namespace {

// gRPC's timers count whole milliseconds; below this we poll, with short naps between.
constexpr std::chrono::milliseconds kPollBelow{2};
constexpr std::chrono::microseconds kNap{50};

}  // namespace

bool NextEvent(grpc::CompletionQueue* queue, Instant wake, void** tag, bool* ok) {
  const Instant::duration wait = std::max(wake - SteadyClock::now(), Instant::duration::zero());
  const bool poll = wait < kPollBelow;
  const auto deadline =
      std::chrono::system_clock::now() + (poll ? Instant::duration::zero() : wait - kPollBelow / 2);
  switch (queue->AsyncNext(tag, ok, deadline)) {
    case grpc::CompletionQueue::GOT_EVENT:
      return true;
    case grpc::CompletionQueue::TIMEOUT:
      if (poll) std::this_thread::sleep_for(std::min<Instant::duration>(wait, kNap));
      return false;
    case grpc::CompletionQueue::SHUTDOWN:
      return false;
  }
  return false;
}

std::optional<Instant> Course::AwaitStart(const absl::Status& warm) {
  MutexLock lock(&mu_);
  failure_.Update(warm);
  ++arrived_;
  if (arrived_ == connections_) {
    start_ = SteadyClock::now();
    changed_.NotifyAll();
  }
  while (arrived_ < connections_) changed_.Wait(&mu_);
  if (!failure_.ok()) return std::nullopt;
  return start_;
}

void Course::Leave() {
  MutexLock lock(&mu_);
  ++left_;
  changed_.NotifyAll();
}

absl::Status Course::AwaitEnd(const std::function<void(absl::Duration)>& progress) {
  Instant shown = SteadyClock::now();
  mu_.Lock();
  while (left_ < connections_) {
    changed_.WaitFor(&mu_, absl::Milliseconds(200));
    const Instant now = SteadyClock::now();
    if (start_ == Instant() || now - shown < std::chrono::seconds(1)) continue;
    shown = now;
    const absl::Duration elapsed = absl::FromChrono(now - start_);
    mu_.Unlock();
    progress(elapsed);
    mu_.Lock();
  }
  const absl::Status failure = failure_;
  mu_.Unlock();
  return failure;
}

std::optional<int64_t> Course::Claim() {
  const int64_t number = claimed_.fetch_add(1, std::memory_order_relaxed);
  if (count_ && number >= *count_) return std::nullopt;
  return number;
}

}  // namespace deltanet
