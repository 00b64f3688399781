"""A trace leaves nothing behind, evaluates no weight, and is the same step for any number of rows."""
import contextlib
import threading

import mlx.core as mx
import numpy as np
import pytest
from families import FAMILIES, build
from interrupt_at import InterruptAt, looks
from mlx.utils import tree_flatten
from mlx_lm.models import llama

from metalstep.capture import capture
from metalstep.capture.bind import bind
from metalstep.capture.markers import tracing
from metalstep.capture.passes import Fusion, passes
from metalstep.capture.rows import TracePair
from metalstep.capture.trace import trace


def form(graph):
    """What a graph is, as comparable data."""
    number = {}

    def known(value):
        return number.setdefault(value, len(number)), value.shape, str(value.dtype), value.rows, value.kind, value.name

    return [
        (part.op, [known(v) for v in part.inputs], [known(v) for v in part.outputs], repr(sorted(part.attrs.items())))
        for node in graph.nodes
        for part in node.parts
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_two_small_traces_give_what_a_direct_trace_of_more_rows_does(family):
    """16 rows stay below the 64 indices from which mlx-lm sorts experts."""
    model = build(family, quantized=True)
    solved = TracePair(trace(model, 2), trace(model, 3)).at(16, 16)
    direct = TracePair(trace(model, 16), trace(model, 17)).at(16, 16)
    assert form(solved) == form(direct)


@pytest.mark.parametrize("tokens", [1, 2, 4, 7, 64])
def test_a_dimension_that_equals_the_row_count_is_not_taken_for_rows(tokens):
    """4 heads, 2 KV heads and 64 hidden elements: the graph has the same form for every number of rows but one."""
    captured = capture(build("qwen3", quantized=True), "qwen3")
    ops = [[part.op for part in node.parts] for node in captured.graph(tokens, 1).launches]
    assert ops == [[part.op for part in node.parts] for node in captured.graph(13, 5).launches]


def test_graphs_of_one_model_do_not_share_nodes():
    captured = capture(build("llama", quantized=True), "llama")
    first, second = captured.graph(4, 2), captured.graph(5, 2)
    assert not set(first.nodes) & set(second.nodes)
    assert captured.graph(4, 2) is first


def test_row_counts_that_do_not_fit_are_refused():
    captured = capture(build("llama", quantized=True), "llama")
    with pytest.raises(ValueError, match=r"graph: sampled is 5, expected 1 to 4 \(tokens\)"):
        captured.graph(4, 5)


def test_no_weight_is_evaluated():
    """The model's weights would take 1 GiB."""
    args = llama.ModelArgs("llama", 4096, 4, 8192, 32, 1e-5, 32000)
    model = llama.Model(args)
    weights = dict(tree_flatten(model.parameters()))
    assert sum(w.nbytes for w in weights.values()) > 1 << 30
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    capture(model, "llama")
    assert mx.get_peak_memory() - before < 1 << 20
    assert all(after is weights[name] for name, after in tree_flatten(model.parameters()))


def test_other_threads_keep_mlx_s_own_functions_while_a_model_is_traced():
    x = mx.arange(8, dtype=mx.float32)
    expected, wrong, seen = np.array(mx.fast.rms_norm(x, None, 1e-5)), [], []
    done = threading.Event()

    def compute():
        while not done.is_set():
            seen.append(mx.fast.rms_norm.__name__)
            if not np.array_equal(np.array(mx.fast.rms_norm(x, None, 1e-5)), expected):
                wrong.append(1)

    models = [build("llama", quantized=True), build("gemma3_text", quantized=True)]
    counts = {}
    threads = [
        threading.Thread(target=lambda i=i, m=m: counts.update({i: len(capture(m, "x").graph(7, 5).launches)}))
        for i, m in enumerate(models)
    ]
    other = threading.Thread(target=compute)
    for thread in (other, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    other.join()
    assert seen and not wrong
    assert counts == {0: 2 * 6 + 2, 1: 2 * 8 + 2}


def test_passes_keep_a_graph_s_inputs_and_its_logits():
    pair = TracePair(*(trace(build("llama", quantized=True), rows) for rows in (2, 3)))
    graph = bind(pair.at(9, 4))
    for apply in passes(Fusion(attention=True)):
        graph = apply(graph)
        assert {"ids", "positions"} <= set(graph.inputs)
        assert graph.outputs[0].shape in ((9, 1, 96), (4, 1, 96))


def test_an_interrupt_wherever_the_interpreter_looks_for_one_leaves_mlx_as_it_was():
    """In putting the functions back, too: a marker that stayed would give zeros to whoever computes eagerly."""
    patched = [(mx.fast, "rope"), (mx.fast, "rms_norm"), (mx, "dequantize"), (mx, "contiguous"), (mx.metal, "is_available")]
    before, device = [getattr(*place) for place in patched], mx.default_device()
    with InterruptAt() as counting, tracing():
        pass
    points = sorted(n for (code, at), times in counting.places.items() if at in looks(code) for n in times)
    assert len(points) > 20
    for point in points:
        with contextlib.suppress(KeyboardInterrupt), InterruptAt([point]), tracing():
            pass
        assert [getattr(*place) for place in patched] == before and mx.default_device() == device
