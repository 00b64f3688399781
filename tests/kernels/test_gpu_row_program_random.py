"""Random row programs: a GPU computes what the host device does, whatever is fused, reused or waited for."""
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from gpu_harness import GpuHarness
from gpu_programs import KINDS, scratch
from harness import Harness
from programs import own_buffers
from random_programs import RandomProgram

from metalstep.kernels import params, row_program
from metalstep.kernels.gpu import row_homes
from metalstep.kernels.gpu import row_program as gpu_row_program
from metalstep.kernels.gpu.row_codegen import RowKernel

ROWS, PLAN_ROWS = 3, 4
STEP = dict(ids=[2, -3, 8], positions=[0, 7, 300], slots=[3, -1, 0])
# Twelve steps of a few roundings of numbers up to 30, summed up over up to 600 elements, through functions that do not steepen by more
# than 3 (a norm of eps 0.1): far from what a wrong element would be off by.
TOLERANCE = 2e-3
# Then an element may be rounded to the neighbour.
STEPS = {params.MS_FLOAT16: 2**-10, params.MS_BFLOAT16: 2**-7}


def on_host(h, random):
    """What each buffer holds after it."""
    with own_buffers(h):
        buffers = [to_host(h, slot) for slot in random.slots]
        step = h.step(ROWS, **STEP)
        h.run(row_program.launches(random.program, step, buffers, params.MS_ROWS_TOKENS, PLAN_ROWS), PLAN_ROWS)
        return [from_host(h, slot, buffer) for slot, buffer in zip(random.slots, buffers, strict=True)]


def to_host(h, slot):
    """The host device has the place in a block as the last axis of keys, and tables in panels."""
    if slot.table:
        n, k = slot.array.shape
        return h.pack(slot.array, bits=32, group_size=0, dtype=params.MS_FLOAT32, n=n, k=k).buffer
    return h.put(slot.array.swapaxes(2, 3) if slot.keys else slot.array)


def from_host(h, slot, buffer):
    if slot.table:
        return slot.array
    array = h.get(buffer, slot.array.dtype)
    return array.swapaxes(2, 3) if slot.keys else array


def numbers(array, dtype):
    if dtype == params.MS_BFLOAT16:
        return np.array(mx.array(array).view(mx.bfloat16).astype(mx.float32))
    return array.astype(np.float32)


def differences(randoms, kind):
    """Which programs leave other numbers than on the host device: seeds, with the first buffer and numpy's words."""
    found = {}
    with GpuHarness() as gpu, Harness() as host:
        gpu.kind = kind
        step, launches, bound = gpu.step(ROWS, **STEP), [], []
        for random in randoms:
            buffers = [gpu.put(slot.array) for slot in random.slots]
            memory = scratch(gpu, random.program, PLAN_ROWS)
            launches += gpu_row_program.launches(
                random.program, step, buffers, params.MS_ROWS_TOKENS, PLAN_ROWS, scratch=memory, kind=kind
            )
            bound.append(buffers)
        gpu.run(launches, PLAN_ROWS)
        for random, buffers in zip(randoms, bound, strict=True):
            for i, (slot, buffer, want) in enumerate(zip(random.slots, buffers, on_host(host, random), strict=True)):
                got = numbers(gpu.get(buffer, slot.array.dtype), slot.dtype)
                options = dict(rtol=STEPS.get(slot.dtype, 0), atol=TOLERANCE)
                if not np.allclose(got, numbers(want, slot.dtype), equal_nan=True, **options):
                    found.setdefault(random.seed, f"buffer {i}: {got} instead of {numbers(want, slot.dtype)}")
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", range(3))
def test_programs_compute_what_the_host_computes(batch, kind):
    assert differences([RandomProgram(seed) for seed in range(25 * batch, 25 * batch + 25)], kind) == {}


@pytest.mark.parametrize("kind", KINDS)
def test_wide_programs_compute_what_the_host_computes(kind):
    assert differences([RandomProgram(seed, sizes=[33, 1024, 2400, 5000]) for seed in range(100, 110)], kind) == {}


@pytest.fixture
def made_anew():
    """Kernels are kept by program; a test that changes how they are made wants its own."""
    gpu_row_program._kernel.cache_clear()
    yield
    gpu_row_program._kernel.cache_clear()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("shared", "held"), [(2400, 8), (600, 8), (600, 0)])
def test_programs_in_little_memory_share_it_and_spill(monkeypatch, made_anew, shared, held, kind):
    """As if the threadgroup had `shared` bytes, and a thread registers for `held` elements of a value."""
    monkeypatch.setattr(row_homes, "SHARED_BYTES", shared)
    monkeypatch.setattr(row_homes, "HELD", held)
    randoms = [RandomProgram(seed) for seed in range(25)]
    assert any(gpu_row_program.scratch_bytes(random.program, 1, kind=kind) for random in randoms)
    assert differences(randoms, kind) == {}


@pytest.mark.simulator  # a GPU may do the right thing by chance
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mistake", ["threadgroup", "simdgroup"])
def test_a_missing_barrier_shows(monkeypatch, made_anew, mistake, kind):
    kernel = RowKernel.kernel

    def without(self):
        made = kernel(self)
        lines = [line for line in made.text.splitlines() if f"{mistake}_barrier" not in line]
        return replace(made, name="no_" + made.name, text="\n".join(lines).replace(f" {made.name}(", f" no_{made.name}("))

    monkeypatch.setattr(RowKernel, "kernel", without)
    assert differences([RandomProgram(seed) for seed in (range(5) if mistake == "threadgroup" else range(25))], kind)
