#!/bin/bash
# Installs what the project is built from: Debian 12's packages, and wheels pinned by version and hash into a folder outside
# the clone. Does nothing, quickly, where that has been done before.
#
#   deploy/install.sh [SET...]      default: cpu
#
#   cpu    compiler and libraries, CMake, Ninja, and of LibTorch what the CPU build needs
#   test   GoogleTest, Google Benchmark and a Python gRPC client
#   clang  Clang, for its thread-safety analysis
#   cuda   the rest of LibTorch's CUDA libraries, and nvcc
#   bench  what `import torch` needs, for the comparison with PyTorch
#
# DELTANET_CACHE   the folder; default ~/.cache/deltanet
# Mirrors and certificates: apt's configuration and pip's PIP_* variables apply.
set -euo pipefail
cd "$(dirname "$0")"
cache=${DELTANET_CACHE:-$HOME/.cache/deltanet}

packages=(ca-certificates python3 python3-venv)
requirements=()
[ $# -gt 0 ] || set -- cpu
for set in cpu "$@"; do
  case $set in
    cpu)
      packages+=(g++ ccache protobuf-compiler protobuf-compiler-grpc libprotobuf-dev libgrpc++-dev libabsl-dev
                 prometheus-cpp-dev libcpp-httplib-dev nlohmann-json3-dev)
      requirements+=(cpu) ;;
    test)
      packages+=(libgtest-dev libgmock-dev libbenchmark-dev)
      requirements+=(test) ;;
    clang) packages+=(clang) ;;
    cuda) requirements+=(cuda nvcc) ;;
    bench) requirements+=(cuda bench) ;;
    *)
      echo "install.sh: unknown set '$set', want cpu, test, clang, cuda or bench" >&2
      exit 2 ;;
  esac
done

# The programs are built against the libraries of one suite; others have other versions of them.
suite=$(. /etc/os-release && echo "${ID:-} ${VERSION_CODENAME:-}")
if [ "$suite" != "debian bookworm" ] || [ "$(uname -m)" != x86_64 ]; then
  echo "install.sh: this is '$suite' on $(uname -m), want 'debian bookworm' on x86_64" >&2
  exit 1
fi
missing=()
for package in "${packages[@]}"; do
  [ "$(dpkg-query -W -f='${db:Status-Abbrev}' "$package" 2>/dev/null)" = "ii " ] || missing+=("$package")
done
if [ ${#missing[@]} -gt 0 ]; then
  if [ "$(id -u)" != 0 ]; then
    echo "install.sh: these packages are missing, and installing them takes root: ${missing[*]}" >&2
    exit 1
  fi
  export DEBIAN_FRONTEND=noninteractive
  apt-get -qq update
  apt-get -qq install --no-install-recommends -o Dpkg::Use-Pty=0 "${missing[@]}" >/dev/null
fi

venv=$cache/venv
if [ ! -x "$venv/bin/pip" ]; then
  mkdir -p "$cache"
  /usr/bin/python3 -m venv "$venv"
fi
for set in "${requirements[@]}"; do
  # The stamp is the file that was installed, so that a change of a pin is seen.
  if ! cmp -s "requirements-$set.txt" "$venv/installed-$set.txt"; then
    "$venv/bin/pip" install --quiet --disable-pip-version-check --no-deps --require-hashes --only-binary :all: \
      -r "requirements-$set.txt"
    cp "requirements-$set.txt" "$venv/installed-$set.txt"
  fi
done
