"""Microbenchmarks of the GPU kernels: the cases that kernels/gpu/ states, on shapes of public models and random numbers."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from metalstep.bench.kernel_inputs import CaseInputs
from metalstep.bench.machine import SIMULATED, machine
from metalstep.bench.mlx_ops import MAX_COPIES as MLX_COPIES
from metalstep.bench.mlx_ops import MlxRuns, against_mlx, mlx_op
from metalstep.bench.statistics import summary
from metalstep.chips import Chip
from metalstep.kernels.gpu import attention, linear, row_program, sample, step_advance, step_load
from metalstep.kernels.gpu.bench_case import BenchCase, BenchSizes
from metalstep.kernels.launch import Buffer, Launch
from metalstep.kernels.native import NativeDevice, NativePlan
from metalstep.kv_plane import BLOCK_SIZE
from metalstep.plan.gpu_target import DECODE_ROWS, NORM_ROWS, SPLIT_LEN
from metalstep.plan.paper import PaperDevice
from metalstep.shapes import BITS, GROUP_SIZES, SHAPES

OPS: dict[str, Callable[[BenchSizes], list[BenchCase]]] = {
    "linear": linear.bench_cases,
    "attention": attention.bench_cases,
    "row_program": row_program.bench_cases,
    "sample": sample.bench_cases,
    "step_advance": step_advance.bench_cases,
    "step_load": step_load.bench_cases,
}
COMPUTES = ("linear", "attention")  # ops whose work are multiply-adds
TINY = "tiny"  # a shape of no model, for the simulator
TINY_CONFIG = dict(
    model_type="qwen3", hidden_size=128, intermediate_size=256, num_attention_heads=4, num_key_value_heads=2, head_dim=64, vocab_size=2000
)
HEAD_NORMS = ("qwen3", "gemma3_text")  # model types that norm queries and keys
ROTATED_BYTES = 256 << 20  # of copies of the weights together: more than the last cache of any of Apple's chips holds
MEMORY_SHARE = 0.5  # of the device's memory that is left, for one case
MAX_COPIES = 64
REPEATS = 16  # of a case in one command buffer, at least
CALL_S = 0.02  # that a timed call should take: steps are chosen for it
MAX_STEPS = 32
COPY, COPIED_BYTES, COPIES_TIMED, COPY_SAMPLES = "a copy", 1 << 30, 8, 5
SIMULATED_WORK = 5_000_000  # of a case that a simulator runs without being asked to
NOT_TIMED = "allocating and filling buffers, compiling kernels, making plans, a first call"


@dataclass(frozen=True)
class LeftOut:
    """A case that is not measured, and why."""

    name: str
    reason: str


def shape_sizes(
    shape: str,
    rows: Sequence[int],
    contexts: Sequence[int],
    *,
    bits: int = 4,
    group_size: int = 64,
    kv_dtype: str = "float16",
    kind: str = "apple",
) -> BenchSizes:
    """Sizes of a shape's layers. shape: of shapes.SHAPES, or "tiny". kind: of the GPU. Raises: ValueError for what is not known."""
    name = shape.lower()
    if name != TINY and name not in SHAPES:
        raise ValueError(f"shape is {shape!r}, expected one of {', '.join([TINY, *SHAPES])}")
    if bits not in (*BITS, 16) or group_size not in GROUP_SIZES:
        known = f"{', '.join(map(str, BITS))} or 16 bits in groups of {', '.join(map(str, GROUP_SIZES))}"
        raise ValueError(f"weights of {bits} bits in groups of {group_size}, expected {known}; MLX has no other")
    config: dict[str, Any] = TINY_CONFIG if name == TINY else SHAPES[name].config
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    return BenchSizes(
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_q_heads=heads,
        num_kv_heads=config["num_key_value_heads"],
        head_dim=head_dim,
        rope_dims=int(head_dim * config.get("partial_rotary_factor", 1.0)),
        head_norms=config["model_type"] in HEAD_NORMS,
        vocab_size=config["vocab_size"],
        bits=bits,
        group_size=group_size,
        kv_dtype=kv_dtype,
        block_size=BLOCK_SIZE,
        rows=tuple(sorted(set(rows))),
        contexts=tuple(sorted(set(contexts))),
        norm_rows=NORM_ROWS,
        max_sampled=DECODE_ROWS[-1],
        split_len=SPLIT_LEN,
        kind=kind,
    )


def bench_cases(sizes: BenchSizes, ops: Sequence[str]) -> list[BenchCase]:
    """The cases of `ops`, in order."""
    return [case for op in ops for case in OPS[op](sizes)]


def bench_kernels(
    device: NativeDevice,
    sizes: BenchSizes,
    cases: Sequence[BenchCase],
    *,
    samples: int,
    chip: Chip | None = None,
    simulated: bool = False,
    large: bool = False,
    against: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Measure each case. simulated: one copy of each and as few calls as can be, and cases of much work only with `large`.

    Returns machine, device, not_timed, rows and left_out (cases that are not measured, with the reason). A row has op, case, name, rows,
    context; kernels, launches and threadgroups of the case once; copies of its weights; bytes; alone_us (each launch by itself, by the
    GPU's clock, summed), run_us (one after another, by the host's clock), gb_s of bytes in run_us, gflop_s where there is arithmetic to
    count, with a chip the fraction of its bandwidth, and with `against` mlx (see against_mlx). On a GPU with memory of its own that
    fraction is of what a copy within it moves, measured in the same run.
    A sample of alone_us is a mean over `repeats`, one of run_us over a call of `steps` times `repeats`.
    """
    rows: list[dict[str, Any]] = []
    left_out: list[LeftOut] = []
    name, gb_s = (chip.name, chip.bandwidth) if chip else (None, None) if device.unified else (COPY, copy_gb_s(device))
    for number, case in enumerate(cases):
        progress(f"{case.name} ({number + 1} of {len(cases)})")
        if simulated and not large and case.work > SIMULATED_WORK:
            left_out.append(LeftOut(case.name, "large for a simulator"))
            continue
        try:
            row = _measure(device, sizes, case, samples, simulated, against)
        except MemoryError as error:
            left_out.append(LeftOut(case.name, str(error)))
            continue
        if gb_s is not None:
            row["fraction"] = row["gb_s"] / gb_s
        rows.append(row)
    return {
        "machine": machine(),
        "device": device.info.name,
        "simulated": simulated,
        "note": SIMULATED if simulated else None,
        "not_timed": NOT_TIMED,
        "chip": name,
        "chip_gb_s": gb_s,
        "rows": rows,
        "left_out": [vars(entry) for entry in left_out],
    }


def copy_gb_s(device: NativeDevice) -> float:
    """GB/s that a copy within the device's memory moves, bytes read and bytes written together: the best of some."""
    source, target = (device.create_buffer(COPIED_BYTES, shared=False) for _ in range(2))
    regions = [Buffer(owner.handle, 0, (COPIED_BYTES,), "uint8") for owner in (source, target)]
    best = math.inf
    try:
        for _ in range(COPY_SAMPLES):
            began = time.perf_counter()
            for _ in range(COPIES_TIMED):
                device.copy(*regions)
            target.read("uint8", (1,))  # behind them
            best = min(best, time.perf_counter() - began)
    finally:
        source.close()
        target.close()
    return 2 * COPIED_BYTES * COPIES_TIMED / best / 1e9


def case_bytes(sizes: BenchSizes, case: BenchCase) -> tuple[int, int]:
    """Bytes of one copy of a case's weights or cache, and of its other buffers; nothing is allocated."""
    paper = PaperDevice("metal")
    inputs = CaseInputs(cast(NativeDevice, paper), sizes, REPEATS * MAX_STEPS, write=False)
    case.launches(inputs)
    return inputs.weight_bytes, paper.nbytes - inputs.weight_bytes


def _copies(device: NativeDevice, sizes: BenchSizes, case: BenchCase) -> int:
    """So many that none is in a cache when its turn comes again, as far as the memory allows. Raises: MemoryError if it holds not one."""
    own, shared = case_bytes(sizes, case)
    left = device.memory_left()
    may = left * MEMORY_SHARE if left else math.inf  # 0: the device does not know
    if own + shared > may:
        raise MemoryError(f"it takes {(own + shared) / 1e9:.1f} GB, and of the {left / 1e9:.1f} GB left a case may have {may / 1e9:.1f}")
    if not own:
        return 1
    fit = MAX_COPIES if may == math.inf else int(may - shared) // own
    return min(-(-ROTATED_BYTES // own), MAX_COPIES, fit)


def _measure(
    device: NativeDevice, sizes: BenchSizes, case: BenchCase, samples: int, simulated: bool, against: bool
) -> dict[str, Any]:
    """The row of one case. Raises: MemoryError."""
    copies = min(_copies(device, sizes, case), 1 if simulated else MAX_COPIES)
    rounds = 1 if simulated else -(-REPEATS // copies)
    repeats = copies * rounds
    inputs = CaseInputs(device, sizes, repeats * MAX_STEPS)
    plan: NativePlan | None = None
    try:
        made = [case.launches(inputs) for _ in range(copies)]
        one = made[0]
        plan = device.create_plan([launch for _ in range(rounds) for copy in made for launch in behind(copy)], case.rows, case.rows)

        def run(steps: int) -> float:
            """Seconds of a call."""
            assert plan is not None
            inputs.rewind()
            began = time.perf_counter()
            plan.wait(plan.run(steps))
            return time.perf_counter() - began

        first = run(1)
        steps = 1 if simulated else max(1, min(MAX_STEPS, round(CALL_S / min(first, run(1)))))
        op = mlx_op(sizes, case) if against else None
        mlx = MlxRuns(op, min(copies, MLX_COPIES), CALL_S) if op else None
        alone, together, theirs = [], [], []
        for _ in range(samples):
            inputs.rewind()
            alone.append(sum(plan.profile()) / repeats / 1e3)
            together.append(run(steps) / (steps * repeats) * 1e6)
            if mlx is not None:
                theirs.append(mlx.sample())
    finally:
        if plan is not None:
            plan.close()
        inputs.close()
    run_us = summary(together, best="min")
    return {
        "op": case.op,
        "case": case.case,
        "name": case.name,
        "rows": case.rows,
        "context": case.context or None,
        "kernels": [launch.kernel for launch in one],
        "launches": len(one),
        "threadgroups": sum(math.prod(launch.grid) for launch in one),
        "copies": copies,
        "repeats": repeats,
        "steps": steps,
        "bytes": case.nbytes,
        "alone_us": summary(alone, best="min"),
        "run_us": run_us,
        "gb_s": case.nbytes / float(cast(float, run_us["mean"])) / 1e3,
        **({"gflop_s": 2 * case.work / float(cast(float, run_us["mean"])) / 1e3} if case.op in COMPUTES else {}),
        **({"mlx": against_mlx(op, theirs, together)} if against else {}),
    }


def behind(launches: Sequence[Launch]) -> list[Launch]:
    """`launches`, the first behind a barrier: in a step an op waits for the one before it."""
    return [replace(launches[0], barrier=True), *launches[1:]]
