"""Prompts whose linears NVIDIA's library multiplies: plans for such GPUs, on whatever GPU the tests have."""
from dataclasses import replace

import numpy as np
import pytest
from gpu_device import DEVICE

from metalstep.capture import capture
from metalstep.kernels.gpu.linear_tables import table
from metalstep.kernels.native import NativeDevice
from metalstep.native_model import NativeModel
from metalstep.plan.gpu_target import GpuTarget
from metalstep.plan.step_arrays import SAMPLING, StepBatch
from metalstep.tune_model import RandomCheckpoint

PROMPT = 70  # tokens: more than a plan with planes of sums has rows
HALF_ROUNDING = 2e-3  # of the range of logits: weights and activations rounded to float16 a few times, here and there


@pytest.fixture(scope="module")
def planned():
    """The kernels and the last row's logits of a prompt, by the rows from which on the library is used and whether bits are invariant."""
    found = {}

    def run(library_rows, batch_invariant=False):
        key = (library_rows, batch_invariant)
        if key not in found:
            tuning = replace(table("nvidia"), library_rows=library_rows)
            found[key] = _run(GpuTarget("nvidia", batch_invariant=batch_invariant, library=True, tuning=tuning))
        return found[key]

    return run


def _run(target):
    checkpoint = RandomCheckpoint("tiny")
    native = NativeModel(capture(checkpoint.build(), "qwen3"), checkpoint, NativeDevice.open(DEVICE), target)
    try:
        native.allocate([-(-PROMPT // 16)], max_context=PROMPT, max_seqs=1)
        arrays, every = native.arrays, np.arange(PROMPT, dtype=np.int32)
        table = arrays.block_tables[0, 0]
        arrays.edit(table)[...] = np.arange(table.size)[::-1]
        sampling = np.zeros(1, SAMPLING)
        sampling["target"] = -1
        plan = native.plan_for(PROMPT, decode=False, context=PROMPT)
        plan.run(StepBatch(7 * every % 2000, every, np.zeros(PROMPT, np.int32), every[-1:], sampling, every[-1:]))
        return [entry.launch.kernel for entry in plan.launches], plan.logits(0, 1)[0]
    finally:
        native.close()


def test_a_prompt_has_the_same_logits_with_the_library_and_without(planned):
    """All linears of a layer but the last one's end, of which only sampled rows are wanted."""
    kernels, with_library = planned(16)
    others, without = planned(None)
    assert "library_gemm" not in others
    assert kernels.count("library_gemm") >= 3 + 1 + 1 + 1 + 3  # q, k, v; o; gate with up; down
    assert any(name.startswith("linear_finish") for name in kernels)
    assert np.isfinite(without).all() and np.ptp(without) > 1
    assert np.abs(with_library - without).max() <= HALF_ROUNDING * np.ptp(without)


def test_fewer_rows_than_the_table_says_are_multiplied_by_tiles(planned):
    assert "library_gemm" not in planned(1 << 20)[0]


def test_rows_whose_bits_depend_on_nothing_else_are_not_the_librarys(planned):
    assert "library_gemm" not in planned(16, batch_invariant=True)[0]
