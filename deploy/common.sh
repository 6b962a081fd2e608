# Sourced by the scripts beside it: where things are, and how to run a noisy command.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
cache=${DELTANET_CACHE:-$HOME/.cache/deltanet}
export PATH=$cache/venv/bin:$PATH CCACHE_DIR=${CCACHE_DIR:-$cache/ccache}

# quietly NAME COMMAND...: runs the command with its output in build/NAME.log, says how long it took, and shows the end of
# that file if it failed.
quietly() {
  local name=$1 start=$SECONDS
  shift
  mkdir -p build
  if ! "$@" >"build/$name.log" 2>&1; then
    tail -n 60 "build/$name.log" >&2
    echo "$name failed; all of its output is in build/$name.log" >&2
    return 1
  fi
  echo "$name: $((SECONDS - start)) s"
}
