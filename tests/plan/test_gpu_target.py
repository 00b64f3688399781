"""What plans for GPUs are made of, by kind, on paper: how many launches, which rows are float16, where linears leave planes."""
import functools
import itertools
from collections import Counter
from dataclasses import replace

import pytest

from metalstep.capture import capture
from metalstep.checkpoint import build_model
from metalstep.kernels.gpu.linear_tables import table
from metalstep.plan.gpu_target import KINDS, GpuTarget
from metalstep.plan.paper import paper_plan
from metalstep.shapes import ShapeCheckpoint

CONTEXT = 200  # no kind divides it
SAMPLER = 4  # process, weigh, finish, step_advance


@functools.cache
def captured(shape):
    checkpoint = ShapeCheckpoint(shape, bits=4, group_size=64)
    return capture(build_model(checkpoint), "qwen3"), checkpoint


def plan(shape, kind, rows, **options):
    model, checkpoint = captured(shape)
    return paper_plan(model, checkpoint.tensors, GpuTarget(kind, **options), rows=rows, context=CONTEXT)


@pytest.mark.parametrize("rows", [1, 8, 32, 64])
@pytest.mark.parametrize(("shape", "kind"), [("qwen3-0.6b", "apple"), ("qwen3-0.6b", "nvidia"), ("qwen3-4b", "nvidia")])
def test_a_layer_is_five_launches_or_seven(shape, kind, rows):
    """qkv, attention, o, gate and up, down; and its two norms where the table does not have linears norm. Before all layers the embedding,
    rotations and (there) the first norm; behind them the head."""
    layers, hidden = {"qwen3-0.6b": (28, 1024), "qwen3-4b": (36, 2560)}[shape]
    launches = plan(shape, kind, rows).launches
    per_layer = 5 if rows <= table(kind).most_normed(hidden) else 7
    assert len(launches) == 1 + per_layer * layers + 1 + SAMPLER
    assert [entry.ops for entry in launches[-SAMPLER:]] == [["sample"]] * 3 + [["step_advance"]]
    assert launches[0].ops[:2] == ["rope_angles", "embedding"]


def test_apples_rows_are_float32():
    for rows in (1, 64):
        for entry in plan("qwen3-0.6b", "apple", rows).launches[:-SAMPLER]:
            assert all(buffer.dtype != "float16" for buffer in (*entry.access.writes, *entry.access.reads) if len(buffer.shape) == 2)


@pytest.mark.parametrize("rows", [1, 32])
def test_linears_for_nvidia_read_float16_unless_they_norm(rows):
    """And what else reads anything reads float32: residuals, queries, keys, values, logits."""
    shape = plan("qwen3-0.6b", "nvidia", rows)
    for entry in shape.launches[:-SAMPLER]:
        read = {buffer.dtype for buffer in entry.access.reads if buffer.handle == shape.arena}
        if entry.launch.kernel.startswith("linear"):
            norms = "rms_norm" in entry.ops
            assert read == ({"float32"} if norms else {"float16", "float32"} if "Add" in entry.ops else {"float16"})
        else:
            assert read <= {"float32"}


def test_planes_are_added_up_by_the_next_norm():
    launches = plan("qwen3-0.6b", "nvidia", 32).launches
    tuned = {table("nvidia").planes(1024, k, 32) for k in (2048, 3072)}
    assert min(tuned) > 1
    planes = Counter()
    for entry, after in itertools.pairwise(launches):
        written = [buffer for buffer in entry.access.writes if len(buffer.shape) == 3]
        if entry.launch.kernel.startswith("linear") and written:
            assert entry.ops == ["QuantizedMatmul"] and after.ops == ["Add", "rms_norm"]
            assert written[0].dtype == "float32" and written[0] in after.access.reads
            planes[written[0].shape[0]] += 1
    assert set(planes) == tuned and sum(planes.values()) == 2 * 28


def test_invariant_plans_do_the_same_for_any_rows():
    few, many = (plan("qwen3-0.6b", "nvidia", rows, batch_invariant=True).launches for rows in (1, 64))
    assert [entry.ops for entry in few] == [entry.ops for entry in many]


@pytest.mark.parametrize("kind", KINDS)
def test_plans_that_take_in_the_same_have_one_graph(kind):
    """Whatever their contexts, and whatever table says the same of fusions in other shapes."""
    model, _ = captured("qwen3-0.6b")
    tuning = table(kind)
    shapes = [replace(entry, shape=tuning.entries[0].shape, planes=entry.planes) for entry in tuning.entries]
    planes = [replace(entry, planes=3 - entry.planes if entry.planes < 3 else 1) for entry in tuning.entries]

    def graph(tuning, rows, context):
        target = GpuTarget(kind, tuning=tuning)
        return model.graph(7, 5, target.fusion(target.plan_shape(rows, decode=True, context=context)))

    known = graph(tuning, 32, 100)
    assert graph(replace(tuning, entries=shapes), 30, 9000) is known
    assert graph(replace(tuning, entries=planes), 32, 100) is not known
    assert graph(tuning, 64, 100) is not known


def test_plans_have_room_for_as_many_rows_as_the_target_says():
    for kind in KINDS:
        target = GpuTarget(kind)
        assert target.plan_shape(target.max_rows, decode=False, context=1).tokens == target.max_rows
        for rows in (1, 3, 64):
            shape = target.plan_shape(rows, decode=True, context=9000)
            assert shape.tokens >= rows and shape.sampled == shape.tokens and shape.splits * shape.split_len >= 9000


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="a GPU of kind 'amd'; expected one of apple, nvidia"):
        GpuTarget("amd")
