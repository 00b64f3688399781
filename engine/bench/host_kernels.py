"""Microbenchmarks of the host device's kernels, against what the processors read and compute at most, and against MLX's own ops."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, cast

from metalstep.bench.host_cases import HostCase
from metalstep.bench.host_inputs import HostInputs
from metalstep.bench.limits import Limits
from metalstep.bench.machine import machine
from metalstep.bench.mlx_ops import MAX_COPIES as MLX_COPIES
from metalstep.bench.mlx_ops import MlxOp, MlxRuns, against_mlx, mlx_op
from metalstep.bench.statistics import summary
from metalstep.kernels.gpu.bench_case import BenchSizes
from metalstep.kernels.native import NativeDevice, NativePlan

ROTATED_BYTES = 128 << 20  # of copies of weights or caches together: more than a last cache holds
MAX_COPIES = 1024
REPEATS = 16  # of a case in one run, at least
MAX_STEPS = 32
CALL_S = 0.02  # that a sample should take
CASE_S = 3.0  # after which a case has samples enough, if there are LEAST
LEAST = 3
STEPPED = ("sample", "step_advance")  # leave a result per step
NOT_TIMED = "allocating, filling and packing buffers, making plans, a first call; of MLX a first evaluation"


def bench_host_kernels(
    device: NativeDevice,
    sizes: BenchSizes,
    cases: Sequence[HostCase],
    *,
    samples: int,
    against: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Measure each case, and with `against` MLX's own op for it in turns; the limits before, between and after, of which the best counts.

    Returns machine, device, threads, not_timed, limits (by threads) and rows. A row has op, case, name, rows, context, copies, repeats,
    steps; bytes and streamed (of these, from memory), macs and arithmetic; run_us, gb_s of bytes, gflop_s (fp32) or gmac_s (integers);
    limit_us, the least time by the limits, limit (memory, cache or arithmetic: what that is) and fraction of it reached; with `against`
    mlx (see against_mlx).
    """
    limits = Limits(device)
    try:
        limits.sample()
        rows = []
        for number, case in enumerate(cases):
            progress(f"{case.name} ({number + 1} of {len(cases)})")
            rows.append(_measure(device, sizes, case, samples, against, limits))
            limits.sample()
        for row in rows:
            add_limit(row, limits)
        facts = limits.facts()
    finally:
        limits.close()
    return {
        "machine": machine(),
        "device": device.info.name,
        "isa": device.info.isa,
        "threads": device.info.threads,
        "not_timed": NOT_TIMED,
        "limits": facts,
        "rows": rows,
    }


def add_limit(row: dict[str, Any], limits: Limits) -> None:
    """How near a row is to what the device could do."""
    roof = limits.roof()
    seconds = roof.seconds(row["streamed"], row["bytes"], row["macs"], row["arithmetic"])
    name, least = max(seconds.items(), key=lambda entry: entry[1])
    row["limit_us"], row["limit"] = least * 1e6, name
    row["fraction"] = row["limit_us"] / row["run_us"]["median"]


def _measure(device: NativeDevice, sizes: BenchSizes, case: HostCase, samples: int, against: bool, limits: Limits) -> dict[str, Any]:
    probe = max(limits.roof().seconds(case.streamed, case.nbytes, case.macs, case.arithmetic).values())
    inputs = HostInputs(device, sizes, REPEATS * MAX_STEPS if case.op in STEPPED else 1)
    plan: NativePlan | None = None
    try:
        launches = case.launches(inputs)
        own, copies = inputs.weight_bytes, 1
        if own:  # so many that none is in a cache when its turn comes again, unless arithmetic takes longer than that anyhow
            copies = max(1, min(-(-ROTATED_BYTES // own), round(2 * CALL_S / probe), MAX_COPIES))
        for _ in range(copies - 1):
            launches += case.launches(inputs)
        rounds = -(-REPEATS // copies)
        repeats = copies * rounds
        plan = device.create_plan(launches * rounds, case.rows, case.rows)

        def run(steps: int) -> float:
            """Microseconds of the case once."""
            assert plan is not None
            inputs.rewind()
            began = time.perf_counter()
            plan.wait(plan.run(steps))
            return (time.perf_counter() - began) / (steps * repeats) * 1e6

        run(1)
        steps = max(1, min(MAX_STEPS, round(CALL_S * 1e6 / (run(1) * repeats))))
        op = mlx_op(sizes, case, case.codec) if against else None
        mlx = MlxRuns(op, min(copies, MLX_COPIES), CALL_S) if op else None
        ours, theirs = _turns(lambda: run(steps), mlx.sample if mlx else None, samples)
    finally:
        if plan is not None:
            plan.close()
        inputs.close()
    streamed = case.streamed if own * copies * 2 >= ROTATED_BYTES or copies == 1 else 0  # else a cache holds them all
    return row(case, streamed, copies, repeats, steps, ours, op, theirs, against)


def _turns(ours: Callable[[], float], theirs: Callable[[], float] | None, samples: int) -> tuple[list[float], list[float]]:
    """Up to `samples` of each, in turns; every other pair runs backwards."""
    times: tuple[list[float], list[float]] = [], []
    began = time.perf_counter()
    for number in range(samples):
        order = (0, 1) if number % 2 else (1, 0)
        for side in order:
            if side == 0:
                times[0].append(ours())
            elif theirs is not None:
                times[1].append(theirs())
        if number + 1 >= LEAST and time.perf_counter() - began > CASE_S:
            break
    return times


def row(
    case: HostCase,
    streamed: int,
    copies: int,
    repeats: int,
    steps: int,
    ours: list[float],
    op: MlxOp | None,
    theirs: list[float],
    against: bool,
) -> dict[str, Any]:
    """A case's row without its limit. streamed: bytes that came from memory. ours, theirs: µs of the case once."""
    run_us = summary(ours, best="min")
    median = float(cast(float, run_us["median"]))
    rate = case.macs / median / 1e3
    rates = {} if not case.macs else {"gflop_s": 2 * rate} if case.arithmetic in ("fp32", None) else {"gmac_s": rate}
    return {
        "op": case.op,
        "case": case.case,
        "name": case.name,
        "rows": case.rows,
        "context": case.context or None,
        "copies": copies,
        "repeats": repeats,
        "steps": steps,
        "bytes": case.nbytes,
        "streamed": streamed,
        "macs": case.macs,
        "arithmetic": case.arithmetic,
        "run_us": run_us,
        "gb_s": case.nbytes / median / 1e3,
        **rates,
        **({"mlx": against_mlx(op, theirs, ours)} if against else {}),
    }
