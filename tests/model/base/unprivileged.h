// For tests of permissions, which root is not subject to.
#ifndef DELTANET_TESTS_MODEL_BASE_UNPRIVILEGED_H_
#define DELTANET_TESTS_MODEL_BASE_UNPRIVILEGED_H_

#include <unistd.h>

#include "model/base/check.h"

namespace deltanet {

// While it lives, a process that began as root has no rights over others' files.
class Unprivileged {
 public:
  Unprivileged() : root_(geteuid() == 0) {
    if (root_) DELTANET_CHECK(seteuid(kNobody) == 0, "root may become anybody");
  }
  ~Unprivileged() {
    if (root_) DELTANET_CHECK(seteuid(0) == 0, "the real user is still root");
  }
  Unprivileged(const Unprivileged&) = delete;
  Unprivileged& operator=(const Unprivileged&) = delete;

 private:
  static constexpr uid_t kNobody = 65534;

  const bool root_;
};

}  // namespace deltanet

#endif  // DELTANET_TESTS_MODEL_BASE_UNPRIVILEGED_H_
