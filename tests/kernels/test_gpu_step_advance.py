"""step_advance on a GPU: what it does to the step's inputs, and that K steps of one run are K runs of one step."""
from dataclasses import replace

import numpy as np
import pytest
from gpu_harness import GpuHarness
from hypothesis import example, given, settings
from hypothesis import strategies as st
from programs import own_buffers
from samples import SAMPLED, SAMPLING, STEP, STRIDE, assert_same, tables

from metalstep.kernels import step_advance as reference
from metalstep.kernels.gpu import sample, step_advance
from metalstep.kernels.sample import Parameters


@pytest.fixture(scope="module")
def g():
    with GpuHarness() as harness:
        yield harness


@given(
    seed=st.integers(0, 9999), rows=st.integers(0, 9) | st.sampled_from([64, 65, 130]), groups=st.integers(1, 3),
    block_size=st.sampled_from([1, 3, 16]), advance=st.booleans(), index=st.integers(0, 3), thread_order=st.integers(0, 3),
)  # fmt: skip
@example(seed=1, rows=130, groups=3, block_size=3, advance=True, index=2, thread_order=1)
@settings(max_examples=30, deadline=None)
def test_rows_move_to_their_next_position(g, seed, rows, groups, block_size, advance, index, thread_order):
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
    with own_buffers(g), pytest.MonkeyPatch.context() as environment:
        environment.setenv("METALSTEP_SIM_SEED", str(thread_order))
        buffers = g.step(
            tokens, ids=arrays["tokens"], positions=arrays["positions"], seq_ids=arrays["seq_ids"], sampled=arrays["sampled_rows"],
            sampling=sampling,
        )  # fmt: skip
        buffers = replace(
            buffers,
            step=g.put(step.view(np.uint32)),
            limits=g.put(arrays["limits"]),
            sampled=g.put(sampled.view(np.uint8)),
            slot_mappings=tuple(g.put(slots) for slots in arrays["slots"]),
            block_tables=tuple(g.put(table) for table in arrays["tables"]),
        )
        g.run(step_advance.launches(buffers, block_size=block_size, max_rows=max_rows), max(tokens, 1), max_rows)
        expected = reference.reference(step[0], arrays, block_size)
        assert_same(g.get(buffers.step, STEP, (1,)), step)
        for parts, name in ((buffers.slot_mappings, "slots"), (buffers.block_tables, "tables")):
            assert_same(np.array([g.get(part, np.int32) for part in parts]), expected.pop(name))
        for name, array in expected.items():
            assert_same(g.get(getattr(buffers, name), array.dtype, array.shape), array)


# ---- steps of one run ---------------------------------------------------------------------------------------------------------
@given(seed=st.integers(0, 9999), rows=st.integers(1, 5), steps=st.integers(1, 6), vocab=st.sampled_from([5, 2049]))
@settings(max_examples=12, deadline=None)
def test_steps_of_one_run_are_runs_of_one_step(g, seed, rows, steps, vocab):
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
        with own_buffers(g):
            table = np.arange(rows * max_blocks, dtype=np.int32).reshape(rows, max_blocks)
            step = g.step(rows, positions=t.positions, seq_ids=np.arange(rows), tables=table, sampling=t.sampling)
            step = replace(
                step,
                limits=g.put(t.positions + further),
                sampled=g.put(np.zeros((runs * steps, max_rows), SAMPLED).view(np.uint8)),
                top=g.put(np.zeros((runs * steps, max_rows, 4), np.uint32)),
                biases=g.put(t.biases.view(np.uint8)),
                history=g.put(t.history),
                counts=g.put(t.counts),
            )
            g.device.numpy(step.step, STEP, (1,))["advance"] = 1
            workspace = g.empty((sample.workspace_bytes(vocab, max_rows) // 4,))
            sizes = dict(vocab_size=vocab, max_rows=max_rows, max_top=2, history_stride=STRIDE, workspace=workspace)
            launches = sample.launches(g.put(logits), step, **sizes)
            launches += step_advance.launches(step, block_size=16, max_rows=max_rows)
            for launch in launches:
                launch.barrier = True
            plan = g.device.create_plan(launches, max_rows, max_rows)
            for _ in range(runs):
                plan.wait(plan.run(steps))
            plan.close()
            left = [step.step, step.tokens, step.positions, step.sampling, step.sampled, step.top, step.history, step.counts]
            return [g.get(buffer, np.uint8, (buffer.nbytes,)) for buffer in (*left, *step.slot_mappings)]

    for one, other in zip(launched(1, steps), launched(steps, 1), strict=True):
        np.testing.assert_array_equal(one, other)


# ---- refusals -----------------------------------------------------------------------------------------------------------------
def test_a_group_has_block_tables_and_a_slot_mapping(g):
    step = g.step(1)
    with pytest.raises(ValueError, match="there are 2 slot mappings and 1 block tables; give each group"):
        step_advance.launches(replace(step, slot_mappings=step.slot_mappings * 2), block_size=16, max_rows=1)
    for sizes in (dict(block_size=0, max_rows=1), dict(block_size=16, max_rows=0)):
        with pytest.raises(ValueError, match="expected 1 or more"):
            step_advance.launches(step, **sizes)


@pytest.mark.parametrize("groups", [0, step_advance.MAX_GROUPS])
def test_as_many_groups_as_metal_binds_buffers(g, groups):
    step = g.step(2, sampled=[1])
    step = replace(step, slot_mappings=step.slot_mappings * groups, block_tables=step.block_tables * groups)
    g.run(step_advance.launches(step, block_size=16, max_rows=1), 2)
    assert g.get(step.step, STEP, (1,))["index"] == 1
    more = replace(step, slot_mappings=step.slot_mappings * 20, block_tables=step.block_tables * 20)
    if groups:
        with pytest.raises(NotImplementedError, match=f"groups of layers, and a GPU's launch binds {groups}; share block tables"):
            step_advance.launches(more, block_size=16, max_rows=1)
