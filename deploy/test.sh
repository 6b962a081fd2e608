#!/bin/bash
# Builds everything and runs every test; takes a fresh Debian 12 machine (as root) or one where that was done before.
#
#   deploy/test.sh           the release build and its tests
#   deploy/test.sh --full    before that: AddressSanitizer with UndefinedBehaviorSanitizer over the tests,
#                            ThreadSanitizer over those about threads, and Clang's thread-safety analysis;
#                            where a Docker engine answers, the images and the docker-compose stack; two minutes
#                            of mixed clients and faults (tests/python/soak.py)
set -euo pipefail
source "$(dirname "$0")/common.sh"
case ${1:-} in
  "") full= ;;
  --full) full=1 ;;
  *)
    echo "usage: deploy/test.sh [--full]" >&2
    exit 2 ;;
esac

build() {
  quietly "$1-configure" cmake --preset "$1" -DBUILD_TESTING=ON
  quietly "$1-build" cmake --build --preset "$1"
}

quietly install deploy/install.sh cpu test ${full:+clang}
if [ "$full" ]; then
  build clang
  build tsan
  quietly tsan-test ctest --preset tsan -j"$(nproc)"
  build asan
  quietly asan-test ctest --preset asan -j"$(nproc)" -LE '^bench$'
  if docker info >/dev/null 2>&1; then
    tests/docker/stack_test.py
  else
    echo "docker: skipped, since no engine answers \`docker info\`"
  fi
fi
build release
if [ "$full" ]; then
  PYTHONPATH=build/release/tests/python/stubs PYTHONDONTWRITEBYTECODE=1 python \
    tests/python/soak.py build/release/bin/deltanet-server build/release/bin/deltanet-client
fi
ctest --preset release -j"$(nproc)"
