"""Every family that must run natively, from a directory on disk to logits: host kernels against MLX in float32."""
import mlx.core as mx
import numpy as np
import pytest
from families import BASE, FAMILIES, VOCAB, build
from steps import mixed_steps, reference
from tiny import write_model

import metalstep
from metalstep.kv_cache import BLOCK_SIZE
from metalstep.plan.step_arrays import SAMPLING, StepBatch

NATIVE = [name for name, family in FAMILIES.items() if family.native]
LENGTHS = (41, 19, 6)  # both sides of every window (8) and original_max_position_embeddings (16) of the configurations
TEXTS = [[(7 * i + 13 * j) % VOCAB for j in range(n)] for i, n in enumerate(LENGTHS)]
RANGE = 1e-3  # of a row's range of logits: 15-bit activations and the cache's float16


@pytest.fixture(scope="module", params=[(n, q) for n in NATIVE for q in (True, False)], ids=lambda p: f"{p[0]}-{'4bit' if p[1] else 'f32'}")
def family(request, tmp_path_factory):
    """(natively loaded model, mlx-lm's logits of TEXTS)."""
    name, quantized = request.param
    model = build(name, quantized=quantized)
    config = {"model_type": FAMILIES[name].model_type, **BASE, **FAMILIES[name].config}
    directory = write_model(
        tmp_path_factory.mktemp(name), model, config, {"group_size": 32, "bits": 4} if quantized else None
    )
    native, _ = metalstep.load(directory, strict=True)
    with native:
        yield native, [reference(model, text) for text in TEXTS]


def within(got, want):
    spread = want.max(-1, keepdims=True) - want.min(-1, keepdims=True)
    return (np.abs(got - want) / spread).max()


def test_logits_are_within_a_thousandth_of_their_range(family):
    model, expected = family
    for text, want in zip(TEXTS, expected, strict=True):
        assert within(np.array(model(mx.array([text]))[0]), want) <= RANGE


def test_ragged_mixed_batches_give_each_sequence_its_own_bits(family):
    """Prefill chunks and decodes of several sequences in one step; every row as if it were alone."""
    model, expected = family
    native = model.native
    alone = [model.engine.logits(text) for text in TEXTS]
    plan, arrays = native.plan_for(16), native.arrays
    room = -(-max(LENGTHS) // BLOCK_SIZE)
    for sequence in range(len(TEXTS)):  # blocks in an order of their own, and away from those of the engine's last request
        blocks = 60 - np.arange(room) * len(TEXTS) - sequence
        for table in arrays.block_tables[:, sequence, :room]:
            arrays.edit(table)[:] = blocks
    greedy = np.zeros(16, SAMPLING)
    greedy["target"] = greedy["state"] = -1
    for step in mixed_steps(LENGTHS, 12, takes=(1, 5, 4)):
        rows = [(s, p) for s, p in step if s >= 0]
        results = plan.run(
            StepBatch(
                tokens=[TEXTS[s][p] for s, p in rows],
                positions=[p for _, p in rows],
                seq_ids=[s for s, _ in rows],
                sampled_rows=list(range(len(rows)))[::-1],
                sampling=greedy[: len(rows)],
            )
        )
        for i, (s, p) in enumerate(rows[::-1]):
            np.testing.assert_array_equal(plan.logits(i, 1)[0], alone[s][p])
            assert results[i]["token"] == alone[s][p].argmax()
            assert within(plan.logits(i, 1)[0], expected[s][p]) <= RANGE


@pytest.mark.parametrize("name", NATIVE)
def test_checkpoints_in_bfloat16_give_what_their_rounded_weights_do(name, tmp_path):
    model = build(name, quantized=False)
    model.set_dtype(mx.bfloat16)
    config = {"model_type": FAMILIES[name].model_type, **BASE, **FAMILIES[name].config}
    write_model(tmp_path / name, model, config)
    model.set_dtype(mx.float32)
    native, _ = metalstep.load(tmp_path / name, strict=True)
    with native:
        assert within(native.engine.logits(TEXTS[1]), reference(model, TEXTS[1])) <= 10 * RANGE  # constants are bfloat16 in its code
