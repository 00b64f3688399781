"""Every family's captured step against mlx-lm fed the same tokens one at a time, after every pass."""
import functools
import sys

import numpy as np
import pytest
from families import FAMILIES, VOCAB, build
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten
from steps import mixed_steps, reference, run

from metalstep.capture import capture
from metalstep.capture.passes import Fusion, passes

# Both sides of the windows (8) and of original_max_position_embeddings (16) of families.py.
TEXTS = [[(7 * i + 13 * j) % VOCAB for j in range(length)] for i, length in enumerate((21, 10, 4))]
# mlx-lm's row is a matrix product of one row, ours of many: OpenBLAS adds both up in one order, Accelerate need not.
BLAS_TOLERANCE = 1e-5 if sys.platform == "darwin" else 0.0


@functools.cache
def prepared(family, quantized):
    """A model, its weights, its captured step and mlx-lm's logits of the texts."""
    model = build(family, quantized=quantized)
    references = [reference(model, text) for text in TEXTS]
    return dict(tree_flatten(model.parameters())), capture(model, family), references


def check(graph, weights, references, steps, tolerance, stage):
    found = run(graph, weights, TEXTS, steps)
    assert found
    for (sequence, position), logits in found.items():
        np.testing.assert_allclose(
            logits,
            references[sequence][position],
            rtol=0,
            atol=tolerance,
            err_msg=f"after {stage}: sequence {sequence}, position {position}",
        )

GPU_FUSIONS = [Fusion(("rms_norm",), attention=True), Fusion((), attention=False)]


@pytest.mark.parametrize("quantized", [True, False], ids=["4bit", "float32"])
@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=2, phases=[Phase.explicit, Phase.generate])  # a failing schedule is small already
@given(rows=st.integers(1, 12), takes=st.lists(st.integers(1, 9), min_size=1, max_size=3), sampled=st.integers(1, 3))
@example(rows=16, takes=[1, 9, 4], sampled=3)  # prefill chunks, decodes and padding in one step
def test_a_captured_step_computes_what_mlx_lm_does_after_every_pass(family, quantized, rows, takes, sampled):
    weights, captured, references = prepared(family, quantized)
    graph = captured.bound(rows, min(sampled, rows))
    steps = mixed_steps([len(t) for t in TEXTS], rows, [1] if graph.one_row_per_sequence else takes)
    tolerance = max(FAMILIES[family].tolerance, BLAS_TOLERANCE)
    check(graph, weights, references, steps, tolerance, "binding")
    for apply in passes(Fusion()):
        graph = apply(graph)
        check(graph, weights, references, steps, tolerance, getattr(apply, "__name__", "norm_prologues"))
    for fusion in GPU_FUSIONS:
        check(captured.graph(rows, min(sampled, rows), fusion), weights, references, steps, tolerance, str(fusion))


@pytest.mark.parametrize("family", [f for f in FAMILIES if f in ("qwen3_moe", "gpt_oss", "deepseek_v3")])
def test_a_step_large_enough_for_expert_sorting_computes_the_same(family):
    """mlx-lm sorts tokens by expert from 64 indices on; 40 rows of two experts each are 80."""
    weights, captured, references = prepared(family, True)
    steps = mixed_steps([len(t) for t in TEXTS], 40, [40])
    check(captured.graph(40, 3), weights, references, steps, FAMILIES[family].tolerance, "all passes")


@pytest.mark.parametrize("family", FAMILIES)
def test_prepared_weights_replace_what_they_were_computed_from(family):
    weights, captured, references = prepared(family, True)
    given_weights = {**weights, **captured.prepare(weights.__getitem__)}
    steps = mixed_steps([len(t) for t in TEXTS], 8, [3])
    tolerance = max(FAMILIES[family].tolerance, BLAS_TOLERANCE)
    check(captured.graph(8, 3), given_weights, references, steps, tolerance, "all passes")
