"""What lowering relies on in the graph behind the passes, and how many launches a step takes."""
import math

import pytest
from families import FAMILIES, build

from metalstep.capture import capture
from metalstep.kernels.elementwise import is_elementwise
from metalstep.plan.row_compiler import HANDLERS, rope_key

NATIVE = [name for name, family in FAMILIES.items() if family.native]
MATMULS = ("Matmul", "QuantizedMatmul")


@pytest.fixture(params=NATIVE, scope="module")
def native(request):
    """(family name, graph of 3 layers, quantised model, 7 rows of which 5 are sampled)."""
    return request.param, capture(build(request.param, quantized=True, layers=3), request.param).graph(7, 5)


@pytest.mark.parametrize("quantized", [True, False], ids=["4bit", "float32"])
@pytest.mark.parametrize("family", FAMILIES)
def test_launches_per_layer_stay_within_the_family_s_number(family, quantized):
    fewer, more = (
        len(capture(build(family, quantized=quantized, layers=n), family).graph(7, 5).launches) for n in (2, 4)
    )
    per_layer = FAMILIES[family].per_layer
    assert more - fewer <= 2 * per_layer
    assert more <= 4 * per_layer + 4  # and the embedding, the head, and what the first or last layer adds


def test_only_operations_with_kernels_are_left(native):
    _, graph = native
    assert set(graph.count()) == {"attention", "linear", "row_program", "take_rows", "view"}
    for node in graph.nodes:
        if node.op == "row_program":
            assert all(p.op == "view" or p.op in HANDLERS or is_elementwise(p.op) for p in node.parts)
        elif node.op == "take_rows":
            assert node.attrs["folded"]


def test_linears_multiply_by_the_weight_itself(native):
    _, graph = native
    products = [p for node in graph.nodes if node.op == "linear" for p in node.parts if p.op in MATMULS]
    assert products
    for product in products:
        assert product.inputs[1].kind == "weight" and product.inputs[1].name in graph.weights
        assert product.attrs["transpose"]
        if product.op == "QuantizedMatmul":
            assert (product.attrs["bits"], product.attrs["group_size"], product.attrs["mode"]) == (4, 32, "affine")


def test_each_weight_is_read_once_and_none_is_forgotten(native):
    """The output head may share the embedding's table."""
    _, graph = native
    read = [v.name for node in graph.nodes for p in node.parts if p.op in MATMULS for v in p.inputs[1:]]
    assert len(read) == len(set(read))
    used = {v.name for node in [*graph.nodes, *graph.prepare] for v in node.inputs if v.kind == "weight"}
    assert used - set(graph.weights) == {v.name for node in graph.prepare for v in node.outputs if v.kind == "weight"}
    assert set(graph.weights) <= used


def test_every_stored_result_has_one_row_per_token_or_sampled_row(native):
    _, graph = native
    for node in graph.launches:
        for value in node.outputs:
            assert value.rows in ("tokens", "sampled")
            assert value.shape[0] == (7 if value.rows == "tokens" else 5)
    assert graph.outputs[0].rows == "sampled"


def test_views_are_never_made_by_launches(native):
    """A launch reads a view where it uses it, so no output is a view and no body reads a view of another launch's body."""
    _, graph = native
    stored = {v for node in graph.launches for v in node.outputs} | set(graph.weights.values()) | set(graph.inputs.values())
    for node in graph.launches:
        inside = {v for p in node.parts for v in p.outputs}
        for part in node.parts:
            for value in part.inputs:
                root = value
                while root.node and root.node.op in ("view", "take_rows") and root not in inside - stored:
                    root = root.node.inputs[0]
                assert root in stored or root in inside or root.kind in ("const", "weight")
        for value in node.outputs:
            assert all(value not in p.outputs for p in node.parts if p.op == "view")


def test_layers_share_their_rope_angles(native):
    """At most one configuration of rope per kind of layer, however many layers compute their own frequencies."""
    name, graph = native
    keys = {rope_key(p) for node in graph.nodes for p in node.parts if p.op == "rope"}
    assert len(keys) <= (2 if name.startswith("gemma3") else 1)


def test_after_the_last_attention_only_sampled_rows_are_computed(native):
    _, graph = native
    last = max(i for i, node in enumerate(graph.nodes) if node.op == "attention")
    behind = [node for node in graph.nodes[last + 1 :] if node.op in ("linear", "row_program")]
    assert behind and all(v.rows == "sampled" for node in behind for v in node.outputs)


def test_an_epilogue_s_columns_are_as_wide_as_its_result(native):
    _, graph = native
    for node in graph.nodes:
        if node.op == "linear":
            products = {v: p for p in node.parts if p.op in MATMULS for v in p.outputs}
            for part in node.parts:
                if is_elementwise(part.op):
                    read = [v for v in part.inputs if v in products or (v.node and v.node.op == "view")]
                    width = math.prod(part.out.shape[1:])
                    assert all(math.prod(v.shape[1:]) == width for v in read if v.rows)
