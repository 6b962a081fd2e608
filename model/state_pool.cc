#include "model/state_pool.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "model/base/check.h"

namespace deltanet {

StateSlot::StateSlot(StateSlot&& other) noexcept
    : pool_(std::exchange(other.pool_, nullptr)), index_(std::exchange(other.index_, -1)) {}

StateSlot& StateSlot::operator=(StateSlot&& other) noexcept {
  if (this != &other) {
    Release();
    pool_ = std::exchange(other.pool_, nullptr);
    index_ = std::exchange(other.index_, -1);
  }
  return *this;
}

StateSlot::~StateSlot() { Release(); }

void StateSlot::Release() {
  if (pool_ == nullptr) return;
  pool_->Return(index_);
  pool_ = nullptr;
  index_ = -1;
}

StatePool::StatePool(int64_t num_slots) : num_slots_(num_slots) {
  free_.reserve(num_slots);
  for (int64_t i = num_slots - 1; i >= 0; --i) free_.push_back(static_cast<int32_t>(i));
}

StatePool::~StatePool() { DELTANET_CHECK(free_slots() == num_slots_, "a state slot outlived its pool"); }

absl::StatusOr<StateSlot> StatePool::Acquire() {
  MutexLock lock(&mu_);
  if (free_.empty()) {
    return absl::ResourceExhaustedError(absl::StrCat("all ", num_slots_, " state slots are in use"));
  }
  const int32_t index = free_.back();
  free_.pop_back();
  return StateSlot(this, index);
}

int64_t StatePool::free_slots() const {
  MutexLock lock(&mu_);
  return static_cast<int64_t>(free_.size());
}

void StatePool::Return(int32_t index) {
  MutexLock lock(&mu_);
  free_.push_back(index);
  DELTANET_CHECK(static_cast<int64_t>(free_.size()) <= num_slots_, "a state slot was given back twice");
}

}  // namespace deltanet
