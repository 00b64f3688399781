#!/bin/sh
# The GPU kernels' tests in the simulator with kernels compiled for the address and thread sanitizers and with fast mathematics, and
# with threads in other orders. usage: sanitize.sh PYTHON [MODE...]; modes: address, thread, fast-math, seed-N. One instance per
# template and more: the tests named here are few and small, since a sanitizer's compile takes seconds.
set -eu
cd "$(dirname "$0")/../.."
python=$1
shift
[ $# -gt 0 ] || set -- address thread fast-math seed-1 seed-3
clang=$(command -v "${METALSTEP_CLANG:-clang++}")
tests="tests/kernels/test_gpu_linear_epilogue.py \
tests/kernels/test_gpu_linear_half.py::test_gate_and_up_meet_in_the_epilogue_and_a_residual_is_added_in_place \
tests/kernels/test_gpu_linear_half.py::test_a_norm_of_x_is_fused tests/kernels/test_gpu_attention.py tests/kernels/test_gpu_attention_inside.py \
tests/kernels/test_gpu_attention_packed.py::test_contexts_around_a_power_of_two_agree_with_the_reference \
tests/kernels/test_gpu_attention_packed.py::test_the_new_position_counts_as_the_cache_holds_it \
tests/kernels/test_gpu_attention_tiles.py::test_the_new_position_counts_as_the_cache_holds_it \
tests/kernels/test_gpu_attention_tiles.py::test_a_negative_slot_is_not_written \
tests/kernels/test_gpu_attention_prompt.py::test_rows_that_the_step_does_not_have_are_left \
tests/kernels/test_gpu_attention_prompt.py::test_results_of_float16_are_those_of_float32_rounded \
tests/kernels/test_gpu_attention_prompt.py::test_a_row_does_not_see_later_positions_of_its_tile \
tests/kernels/test_gpu_kv_encode.py::test_heads_blocks_and_codecs_of_all_sorts_land_in_their_places \
tests/kernels/test_gpu_row_program_ops.py tests/kernels/test_gpu_embedding.py tests/kernels/test_gpu_sample.py \
tests/kernels/test_gpu_step_advance.py tests/kernels/test_gpu_step_load.py"
# What fast mathematics does not promise: exact rounding, equal bits, NaN and infinity.
exact="embedding or row_program_ops or bits or later_positions or not_finite or kv_encode"

for mode in "$@"; do
  echo "sanitize: GPU kernels, $mode"
  started=$(date +%s)
  case $mode in
    seed-*)
      # shellcheck disable=SC2086  # tests is a list
      METALSTEP_SIM_SEED=${mode#seed-} "$python" -m pytest -q $tests
      ;;
    thread)
      tsan=$("$clang" -print-file-name=libclang_rt.tsan-"$(uname -m)".so)
      dispatch=$(dirname "$(realpath "$clang")")/../lib/swift/linux/libdispatch.so
      [ -e "$dispatch" ] && tsan="$tsan:$dispatch"
      # shellcheck disable=SC2086
      LD_PRELOAD="$tsan" TSAN_OPTIONS=ignore_noninstrumented_modules=1 METALSTEP_SIM_SANITIZE=thread "$python" -m pytest -q $tests
      ;;
    fast-math)
      # shellcheck disable=SC2086
      METALSTEP_SIM_SANITIZE=fast-math "$python" -m pytest -q $tests -k "not ($exact)"
      ;;
    *)
      # shellcheck disable=SC2086
      METALSTEP_SIM_SANITIZE=$mode "$python" -m pytest -q $tests
      ;;
  esac
  echo "sanitize: GPU kernels, $mode passed in $(($(date +%s) - started)) s"
done
