"""The sampler's GPU launches with numpy arrays in and out: samples.py's rows and tables, and the host's answer to the same."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from gpu_harness import GpuHarness
from programs import own_buffers
from samples import NO_TOP, NOTHING, SAMPLED, SAMPLING, STEP, TOP, Result, Tables, tables

from metalstep.kernels import params
from metalstep.kernels.gpu import sample, step_advance
from metalstep.kernels.sample import Parameters


def run(h: GpuHarness, logits: np.ndarray, t: Tables, *, plan_rows: int | None = None, max_top: int = 8, steps: int = 1) -> Result:
    """As samples.run; the workspace is full of NaN before."""
    rows, vocab = logits.shape
    plan_rows = plan_rows or rows
    with own_buffers(h):
        step = h.step(rows, positions=t.positions, sampling=t.sampling)
        h.device.numpy(step.step, STEP, (1,))["advance"] = steps > 1
        step = replace(
            step,
            sampled=h.put(np.full((steps, plan_rows), NOTHING, SAMPLED).view(np.uint8)),
            top=h.put(np.full((steps, plan_rows, max_top), NO_TOP, TOP).view(np.uint8)),
            biases=h.put(t.biases.view(np.uint8)),
            masks=h.put(t.masks),
            history=h.put(t.history),
            counts=h.put(t.counts),
        )
        buffer = h.put(logits.astype(np.float32, copy=False))
        sizes = dict(vocab_size=vocab, max_rows=plan_rows, max_top=max_top, history_stride=t.history.shape[1])
        launches = sample.launches(buffer, step, **sizes, workspace=h.empty((sample.workspace_bytes(vocab, plan_rows) // 4,)))
        if steps > 1:
            launches += step_advance.launches(step, block_size=16, max_rows=plan_rows)
            launches[0].barrier = launches[-1].barrier = True
        plan = h.device.create_plan(launches, plan_rows, plan_rows)
        plan.wait(plan.run(steps))
        plan.close()
        shape = (steps, plan_rows) if steps > 1 else (plan_rows,)
        return Result(
            h.get(step.sampled, SAMPLED, shape),
            h.get(step.top, TOP, (*shape, max_top)),
            h.get(buffer),
            h.get(step.history, np.int32),
            h.get(step.counts, np.uint32),
            h.get(step.sampling, SAMPLING, (rows,)),
        )


def draw(
    h: GpuHarness, logits: np.ndarray, rows: Sequence[Parameters], *, seed: int | np.ndarray = 0, counters: Any = None, **options: Any
) -> Result:
    """As samples.draw."""
    t = tables(rows, logits.shape[1], seed=seed)
    if counters is not None:
        t.sampling["counter"] = counters
    return run(h, logits, t, **options)


def draw_many(h: GpuHarness, logits: np.ndarray, p: Parameters, draws: int, seed: int = 0) -> np.ndarray:
    """Tokens of `draws` draws from one row of logits: 32 rows in steps of one run, each with its own counter."""
    rows = 32
    steps = max(draws // rows, 2)
    t = tables([p] * rows, len(logits), seed=seed)
    t.sampling["counter"] = np.arange(rows) * steps
    out = run(h, np.tile(logits, (rows, 1)), t, steps=steps)
    assert (out.sampled["status"] == params.MS_SAMPLE_OK).all()
    return out.sampled["token"].ravel()
