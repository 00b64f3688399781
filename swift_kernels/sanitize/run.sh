#!/bin/sh
# Builds the host kernels and their random driver under each sanitizer and runs them: about two minutes. Needs clang with the
# sanitizers' run-time libraries: METALSTEP_CLANG, or the one on PATH. SECONDS_EACH: how long each build runs (default 15).
set -eu
cd "$(dirname "$0")/.."
clang=${METALSTEP_CLANG:-$(command -v clang || true)}
if [ -z "$clang" ]; then
  echo "sanitize: no clang on PATH; install one or set METALSTEP_CLANG" >&2
  exit 1
fi
# The thread sanitizer of a Swift toolchain watches libdispatch, and so must be linked with it.
swift=$(dirname "$(realpath "$clang")")/../lib/swift/linux
dispatch=
[ -e "$swift/libdispatch.so" ] && dispatch="-L$swift -Wl,-rpath,$swift -ldispatch -lBlocksRuntime"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# sanitize NAME FLAGS...: builds with FLAGS and runs for SECONDS_EACH.
sanitize() {
  name=$1
  shift
  echo "sanitize: $name"
  mkdir "$work/$name"
  for source in Sources/CKernels/*.c sanitize/*.c; do
    "$clang" -x c -std=c11 -g -ffp-contract=fast -fno-math-errno -fno-omit-frame-pointer -fno-sanitize-recover=all "$@" \
      -I Sources/CKernels -I Sources/CKernels/include -I Sources/CMetalStep/include \
      -c "$source" -o "$work/$name/$(basename "$source" .c).o"
  done
  # shellcheck disable=SC2086  # dispatch is a list
  "$clang" "$@" "$work/$name"/*.o $dispatch -lm -lpthread -o "$work/$name/run" 2>"$work/link" ||
    { cat "$work/link" >&2 && exit 1; }  # else gold's hundred warnings about the run-time library's symbols
  "$work/$name/run" "${SECONDS_EACH:-15}"
}

# Optimised, the checks of each address take the compiler minutes in unrolled vector code: they are made in the first build.
sanitize address -O0 -fsanitize=address,undefined
sanitize undefined -O1 -fsanitize=undefined -fno-sanitize=null,alignment,pointer-overflow,object-size
sanitize thread -O1 -fsanitize=thread
