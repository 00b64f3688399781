"""What step_advance must do on any device: checks of one launch, and of the steps of a run."""
from __future__ import annotations

from dataclasses import replace

import numpy as np
from harness import Harness
from programs import own_buffers
from samples import SAMPLED, SAMPLING, STEP, STRIDE, assert_same, tables

from metalstep.kernels import step_advance
from metalstep.kernels.sample import Parameters


def check_rows(h: Harness, seed: int, rows: int, groups: int, block_size: int, advance: bool, index: int) -> None:
    """Rows at their limit, rows without a sample, sequences that no table has, blocks that are freed: all stay or have no slot."""
    rng = np.random.default_rng(seed)
    seqs, max_blocks, max_rows = 3, 4, rows + 1
    tokens = rows + int(rng.integers(0, 3))
    sampling = np.zeros(rows, SAMPLING)
    for field in ("flags", "counter", "counted"):
        sampling[field] = rng.integers(0, 8, rows)
    sampled = np.zeros((5, max_rows), SAMPLED)
    sampled["token"] = rng.integers(0, 99, sampled.shape)
    sampled["status"] = rng.random(sampled.shape) < 0.2
    arrays = dict(
        tokens=rng.integers(0, 99, tokens).astype(np.int32),
        positions=rng.integers(0, max_blocks * block_size + 2, tokens).astype(np.int32),
        seq_ids=rng.integers(-1, seqs + 2, tokens).astype(np.int32),
        sampled_rows=rng.permutation(tokens + 1)[:rows].astype(np.int32),  # one may be no row
        limits=rng.integers(0, max_blocks * block_size + 4, rows).astype(np.int32),
        tables=rng.integers(-1, 50, (groups, seqs, max_blocks)).astype(np.int32),
        slots=rng.integers(0, 99, (groups, tokens)).astype(np.int32),
        sampling=sampling,
        sampled=sampled,
    )
    step = np.zeros(1, STEP)
    step["num_tokens"], step["num_sampled"], step["num_seqs"], step["max_blocks"] = tokens, rows, seqs, max_blocks
    step["index"], step["advance"] = index, advance
    with own_buffers(h):
        buffers = h.step(
            tokens, ids=arrays["tokens"], positions=arrays["positions"], seq_ids=arrays["seq_ids"], sampled=arrays["sampled_rows"],
            sampling=sampling,
        )  # fmt: skip
        buffers = replace(
            buffers,
            step=h.put(step.view(np.uint32)),
            limits=h.put(arrays["limits"]),
            sampled=h.put(sampled.view(np.uint8)),
            slot_mappings=tuple(h.put(slots) for slots in arrays["slots"]),
            block_tables=tuple(h.put(table) for table in arrays["tables"]),
        )
        h.run(h.step_advance_launches(buffers, block_size=block_size, max_rows=max_rows), max(tokens, 1), max_rows)
        expected = step_advance.reference(step[0], arrays, block_size)
        assert_same(h.get(buffers.step, STEP, (1,)), step)
        for parts, name in ((buffers.slot_mappings, "slots"), (buffers.block_tables, "tables")):
            assert_same(np.array([h.get(part, np.int32) for part in parts]), expected.pop(name))
        for name, array in expected.items():
            assert_same(h.get(getattr(buffers, name), array.dtype, array.shape), array)


def check_steps(h: Harness, seed: int, rows: int, steps: int, vocab: int) -> None:
    """Sampling with penalties feeds on what earlier steps committed, and writes each step's results to its own row."""
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((rows, vocab)).astype(np.float32)
    some = []
    for _ in range(rows):
        history = rng.integers(0, vocab, rng.integers(1, STRIDE - steps))
        some.append(
            Parameters(
                temperature=float(rng.choice([0.0, 1.0])), repetition_penalty=1.3, frequency_penalty=2.0, presence_penalty=0.5,
                presence_window=int(rng.choice([0, 4])), history=history, counted=len(history), top=2, min_tokens=3, counter=1,
                stop_tokens=[0, 1], bias={2: 1.0},
            )
        )  # fmt: skip
    t = tables(some, vocab, seed=seed, commit=True)
    max_rows, max_blocks = rows + 2, 4
    further = rng.integers(1, steps + 3, rows).astype(np.int32)  # positions: some rows come to their limit

    def launched(runs, steps):
        """`runs` runs of `steps` steps each; all that they left."""
        with own_buffers(h):
            table = np.arange(rows * max_blocks, dtype=np.int32).reshape(rows, max_blocks)
            step = h.step(rows, positions=t.positions, seq_ids=np.arange(rows), tables=table, sampling=t.sampling)
            step = replace(
                step,
                limits=h.put(t.positions + further),
                sampled=h.put(np.zeros((runs * steps, max_rows), SAMPLED).view(np.uint8)),
                top=h.put(np.zeros((runs * steps, max_rows, 4), np.uint32)),
                biases=h.put(t.biases.view(np.uint8)),
                history=h.put(t.history),
                counts=h.put(t.counts),
            )
            h.device.numpy(step.step, STEP, (1,))["advance"] = 1
            sizes = dict(vocab_size=vocab, max_rows=max_rows, max_top=2, history_stride=STRIDE)
            launches = h.sample_launches(h.put(logits), step, **sizes) + h.step_advance_launches(step, block_size=16, max_rows=max_rows)
            for launch in launches:
                launch.barrier = True
            plan = h.device.create_plan(launches, max_rows, max_rows)
            for _ in range(runs):
                plan.wait(plan.run(steps))
            plan.close()
            left = [step.step, step.tokens, step.positions, step.sampling, step.sampled, step.top, step.history, step.counts]
            return [h.get(buffer, np.uint8, (buffer.nbytes,)) for buffer in (*left, *step.slot_mappings)]

    for one, other in zip(launched(1, steps), launched(steps, 1), strict=True):
        np.testing.assert_array_equal(one, other)
