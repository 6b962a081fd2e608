#!/bin/bash
# Lays out what the run stage of the Dockerfile copies: under /image/libraries the shared libraries that the programs load, and
# their licences; under /image/programs the programs; under /image/volumes folders for a model and for data, empty.
#
#   deploy/docker/collect.sh PROGRAM...
#
# What libraries load by themselves while they run, and only for what this service does not do, stays behind: cuDNN's engines,
# the runtime compiler, linear-algebra solvers.
set -euo pipefail
site_packages=$(echo "$DELTANET_CACHE"/venv/lib/python3*/site-packages)
libraries=/image/libraries/usr/lib/x86_64-linux-gnu
documents=/image/libraries/usr/share/doc
mkdir -p "$libraries" "$documents" /image/libraries/{etc,lib64} /image/programs/usr/{bin,share/doc/deltanet} /image/volumes/{model,data}
# By this file the NVIDIA runtime knows in which folder the loader looks for the driver's libraries.
cp /etc/debian_version /image/libraries/etc/

licence_of() {
  local file=$1 name package record licence
  case $file in
    "$site_packages"/*)
      name=${file#"$site_packages"/}
      record=$(grep -lF "$name," "$site_packages"/*.dist-info/RECORD)
      name=$(basename "${record%/RECORD}" .dist-info)
      [ ! -d "$documents/$name" ] || return 0
      if [ -d "${record%/RECORD}/licenses" ]; then
        cp -r "${record%/RECORD}/licenses" "$documents/$name"
      else
        licence=$(grep -oP '^[^,]*/LICENSE[^,/]*(?=,)' "$record")
        install -D -m644 "$site_packages/$licence" "$documents/$name/$(basename "$licence")"
      fi ;;
    *)
      package=$(dpkg-query -S "$file" 2>/dev/null || dpkg-query -S "${file#/usr}")
      name=${package%%:*}
      mkdir -p "$documents/$name"
      cp -L "/usr/share/doc/$name/copyright" "$documents/$name/" ;;
  esac
}

# The driver's libraries come with the GPU.
ldd=$(LD_LIBRARY_PATH=$site_packages/torch/lib:$site_packages/nvidia/cu13/lib ldd "$@")
missing=$(grep 'not found' <<<"$ldd" | grep -v libcuda.so.1 | sort -u || true)
if [ -n "$missing" ]; then
  echo "collect.sh: libraries are missing: $missing" >&2
  exit 1
fi
grep -oP '(=> |^\s+)\K/\S+' <<<"$ldd" | sort -u | while read -r path; do
  file=$(realpath "$path")
  # Under the name that programs load it by.
  case $path in
    /lib64/*) cp "$file" "/image/libraries$path" ;;
    *) cp "$file" "$libraries/$(basename "$path")" ;;
  esac
  licence_of "$file"
done
cp -r /usr/share/common-licenses /image/libraries/usr/share/
cp "$@" /image/programs/usr/bin/
cp LICENSE /image/programs/usr/share/doc/deltanet/
