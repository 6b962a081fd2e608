#!/bin/bash
# From a clone to a streamed reply: installs what the build needs (as root on Debian 12), builds the two programs, makes a
# small random model, starts the server, and sends one sequence through it twice: whole, and as a stream of chunks.
#
#   deploy/run.sh           ends with the server's clean shutdown
#   deploy/run.sh --keep    leaves the server running, on 127.0.0.1:50051, until Ctrl-C
set -euo pipefail
source "$(dirname "$0")/common.sh"
case ${1:-} in
  "") port=0 keep= ;;
  --keep) port=50051 keep=1 ;;
  *)
    echo "usage: deploy/run.sh [--keep]" >&2
    exit 2 ;;
esac

quietly install deploy/install.sh cpu
quietly configure cmake --preset release -DBUILD_TESTING=OFF
quietly build cmake --build --preset release --target deltanet-server deltanet-client
export PATH=$PWD/build/release/bin:$PATH

run() {
  echo "+ $*"
  "$@"
}

dir=$(mktemp -d)
cd "$dir"
server=
trap '[ -z "$server" ] || kill "$server" 2>/dev/null; rm -rf "$dir"' EXIT
run deltanet-client make-model --family transformer_deltanet --d-model 64 --num-layers 6 --chunk-size 4 --output model

# In a session of its own, so that Ctrl-C reaches it once, from here.
setsid deltanet-server --model demo=model --listen "127.0.0.1:$port" --metrics-listen 127.0.0.1:0 \
  2>server.log &
server=$!
# The log says the address once the server takes calls.
until port=$(grep -oP ' listening host=\S+ port=\K\d+' server.log); do
  if ! kill -0 "$server" 2>/dev/null; then
    cat server.log >&2
    exit 1
  fi
  sleep 0.05
done
address=127.0.0.1:$port
echo "deltanet-server listens on $address"
run deltanet-client health --server "$address"
run deltanet-client make-input --shape 8,128,64 --seed 1 --output x.safetensors
run deltanet-client forward --server "$address" --input x.safetensors --output one-shot.safetensors
run deltanet-client stream --server "$address" --input x.safetensors --output streamed.safetensors \
  --chunk 16,1,7
for name in one-shot streamed; do
  # A safetensors file ends with the values.
  echo "last values, $name:$(tail -c 16 "$name.safetensors" | od -An -tf4)"
done
run deltanet-client compare --a one-shot.safetensors --b streamed.safetensors

if [ "$keep" ]; then
  echo "The server runs on $address; Ctrl-C stops it. The files of this run are in $dir."
  trap 'kill -TERM "$server"' INT TERM
  wait "$server" || true  # Until it ends, or a signal comes.
else
  kill -TERM "$server"
fi
status=0
wait "$server" || status=$?
server=
if [ "$status" != 0 ]; then
  tail server.log >&2
  echo "the server ended with $status, want 0" >&2
  exit 1
fi
echo "The server ended cleanly."
