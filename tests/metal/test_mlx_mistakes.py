"""Mistakes planted in MLX's kernels show in what they compute: the comparison with MLX is one that can fail."""
import os
import re
import shutil
import sys

import mlx_headers
import numpy as np
import pytest
from mlx_launch import MlxKernels
from mlx_quantized import QUANTIZED_HEADERS, quantized_matmul_error

pytestmark = [
    pytest.mark.skipif(sys.platform == "darwin", reason="this machine's Metal is not simulated"),
    pytest.mark.skipif(
        shutil.which(os.environ.get("METALSTEP_CLANG", "clang++")) is None,
        reason="simulated Metal needs clang++: put it on PATH or set METALSTEP_CLANG",
    ),
]
INSTANCE = 'instantiate_kernel("qmm_t", affine_qmm_t, half, 64, 4, false, false)'
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
SEEDS = (0, 3)
ROUNDING = 2e-3  # relative, of a kernel without a mistake


def errors(monkeypatch, change) -> list[float]:
    """Of a quantised matmul with edges of 18 rows and columns whose source is changed, in two orders of threads."""
    whole = mlx_headers.source(QUANTIZED_HEADERS, INSTANCE)
    library, found = MlxKernels(change(whole)), []
    for seed in SEEDS:
        monkeypatch.setenv("METALSTEP_SIM_SEED", str(seed))
        found.append(quantized_matmul_error(np.random.default_rng(0), library, 50, 50))
    return found


def test_without_a_mistake_there_is_rounding_alone(monkeypatch):
    assert max(errors(monkeypatch, lambda text: text)) <= ROUNDING


def test_another_mapping_of_lanes_to_elements_is_seen(monkeypatch):
    """MLX computes the place of a lane's elements itself; the simulator's must be the same."""
    mapping = "return short2{fn, fm};"
    assert mapping in mlx_headers.source(QUANTIZED_HEADERS)
    assert min(errors(monkeypatch, lambda text: text.replace(mapping, "return short2{fm, fn};"))) > 0.1


@pytest.mark.parametrize("which", range(4))
def test_a_missing_barrier_is_seen_in_some_order(monkeypatch, which):
    """The two barriers of the loop over k with edges of rows and columns, and the two with edges of rows."""

    def change(text: str) -> str:
        start = text.index("qmm_t_impl(")
        at = start + [m.start() for m in re.finditer(re.escape(BARRIER), text[start:])][which]
        return text[:at] + ";" + text[at + len(BARRIER) :]

    assert max(errors(monkeypatch, change)) > ROUNDING
