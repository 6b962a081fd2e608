// Who holds which state slot of a model. The memory itself belongs to the Model; this keeps the accounts.
#ifndef DELTANET_MODEL_STATE_POOL_H_
#define DELTANET_MODEL_STATE_POOL_H_

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "model/base/mutex.h"

namespace deltanet {

class StatePool;

// One slot, given back on destruction. Move-only; the pool outlives it. A moved-from or default slot holds
// nothing.
class StateSlot {
 public:
  StateSlot() = default;
  StateSlot(StateSlot&& other) noexcept;
  StateSlot& operator=(StateSlot&& other) noexcept;
  ~StateSlot();

  explicit operator bool() const { return pool_ != nullptr; }
  int32_t index() const { return index_; }  // -1 if it holds nothing.
  void Release();                           // Gives the slot back now.

 private:
  friend class StatePool;
  StateSlot(StatePool* pool, int32_t index) : pool_(pool), index_(index) {}

  StatePool* pool_ = nullptr;
  int32_t index_ = -1;
};

// Thread-safe. Owned by the batcher, beside its Model; outlives every slot (checked).
class StatePool {
 public:
  explicit StatePool(int64_t num_slots);
  ~StatePool();

  // RESOURCE_EXHAUSTED if none is free. The slot's content is whatever was there: start it fresh. Never
  // blocks.
  absl::StatusOr<StateSlot> Acquire();

  int64_t num_slots() const { return num_slots_; }
  int64_t free_slots() const;

 private:
  friend class StateSlot;
  void Return(int32_t index);

  const int64_t num_slots_;

  mutable Mutex mu_;
  std::vector<int32_t> free_ ABSL_GUARDED_BY(mu_);  // Used as a stack: what was used last is warm.
};

}  // namespace deltanet

#endif  // DELTANET_MODEL_STATE_POOL_H_
