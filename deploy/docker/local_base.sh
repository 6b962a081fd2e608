#!/bin/bash
# Makes sure that there is an image debian:bookworm-slim. Where the engine has none and no registry hands one out, makes one with
# debootstrap (as root), so that the Dockerfile builds unchanged.
#
#   deploy/docker/local_base.sh
set -euo pipefail
image=debian:bookworm-slim
if docker image inspect "$image" >/dev/null 2>&1 || docker pull --quiet "$image" 2>/dev/null; then
  exit
fi
if ! command -v debootstrap >/dev/null; then
  if [ "$(id -u)" != 0 ]; then
    echo "local_base.sh: no registry has $image, and debootstrap, which would make it, is missing: installing it takes root" >&2
    exit 1
  fi
  apt-get -qq update
  DEBIAN_FRONTEND=noninteractive apt-get -qq install --no-install-recommends debootstrap >/dev/null
fi
root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
log=$root.log
if ! debootstrap --variant=minbase --include=ca-certificates bookworm "$root" >"$log" 2>&1; then
  tail -n 20 "$log" >&2
  echo "local_base.sh: debootstrap failed; all of its output is in $log" >&2
  exit 1
fi
rm "$log"
# A machine that trusts authorities of its own needs them in its builds as well.
if compgen -G '/usr/local/share/ca-certificates/*.crt' >/dev/null; then
  cp /usr/local/share/ca-certificates/*.crt "$root/usr/local/share/ca-certificates/"
  chroot "$root" update-ca-certificates >/dev/null 2>&1
fi
rm -rf "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/*
tar -C "$root" -c . | docker import --change 'CMD ["bash"]' --message 'made by deploy/docker/local_base.sh' - "$image" >/dev/null
echo "made $image with debootstrap"
