#!/bin/sh
# Builds the host kernels and their random driver for 64-bit Arm and runs them under QEMU's user emulation: the NEON kernels on a
# machine that has none. Needs clang, aarch64-linux-gnu-gcc and qemu-aarch64 (Debian: gcc-aarch64-linux-gnu, qemu-user).
# SECONDS_EACH: how long it runs (default 15).
set -eu
cd "$(dirname "$0")/.."
clang=${METALSTEP_CLANG:-clang}
for tool in "$clang" aarch64-linux-gnu-gcc qemu-aarch64; do
  command -v "$tool" >/dev/null || { echo "neon: no $tool on PATH; install gcc-aarch64-linux-gnu and qemu-user" >&2; exit 1; }
done
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for source in Sources/CKernels/*.c sanitize/*.c; do
  "$clang" --target=aarch64-linux-gnu -x c -std=c11 -O1 -ffp-contract=fast -fno-math-errno -Wall -Wextra -Werror \
    -I Sources/CKernels -I Sources/CKernels/include -I Sources/CMetalStep/include \
    -c "$source" -o "$work/$(basename "$source" .c).o"
done
aarch64-linux-gnu-gcc -static "$work"/*.o -lm -lpthread -o "$work/run"
qemu-aarch64 "$work/run" "${SECONDS_EACH:-15}"
