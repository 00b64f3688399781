#!/bin/sh
# The GPU kernels' and the GPU engine's tests on an NVIDIA GPU instead of simulated Metal: the same tests, the same kernels. Needs the driver
# and NVRTC (docs/cuda.md). usage: cuda.sh PYTHON [test|memcheck|racecheck]... [-- PYTEST OPTIONS]; without a mode: test.
# memcheck and racecheck run a few tests of each family of kernels under NVIDIA's compute-sanitizer.
set -eu
cd "$(dirname "$0")/.."
python=$1
shift
modes=
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  modes="$modes $1"
  shift
done
[ $# -eq 0 ] || shift
export METALSTEP_TEST_GPU="${METALSTEP_TEST_GPU:-cuda}"
few="tests/kernels/test_gpu_linear_epilogue.py tests/kernels/test_gpu_linear_half.py tests/kernels/test_gpu_attention_inside.py \
tests/kernels/test_gpu_attention_packed.py tests/kernels/test_gpu_attention_prompt.py tests/kernels/test_gpu_kv_encode.py \
tests/kernels/test_gpu_row_program_ops.py tests/kernels/test_gpu_sample.py tests/kernels/test_gpu_step_advance.py \
tests/kernels/test_gpu_step_load.py"

for mode in ${modes:-test}; do
  echo "cuda: $mode"
  started=$(date +%s)
  case $mode in
    test)
      "$python" -m pytest -q -n "${WORKERS:-8}" tests/kernels/test_gpu_*.py tests/engine/test_metal_*.py \
        tests/engine/test_gpu_agrees_with_host.py "$@"
      ;;
    *)
      # Every sixth test of each file: a sanitizer runs a kernel some hundred times as long.
      # shellcheck disable=SC2086  # few is a list
      compute-sanitizer --tool "$mode" --error-exitcode 9 --target-processes all \
        "$python" -m pytest -q -p no:xdist --every "${EVERY:-6}" $few "$@"
      ;;
  esac
  echo "cuda: $mode passed in $(($(date +%s) - started)) s"
done
