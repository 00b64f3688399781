"""Plans on paper and the time predicted for them: what is counted, and how predictions compare with published speeds."""
from __future__ import annotations

import itertools

import families
import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import write_model

import metalstep
from metalstep.capture import CaptureError
from metalstep.checkpoint import open_checkpoint
from metalstep.chips import CHIPS, find_chip
from metalstep.explain import explain_on_paper
from metalstep.launch_model import EXPECTED, FAST, LABEL, SLOW, Cost, predict
from metalstep.plan.gpu_target import GpuTarget
from metalstep.plan.host_target import HostTarget
from metalstep.shapes import SHAPES, ShapeCheckpoint, parameter_count

LAYERS = 28  # of Qwen3-0.6B
COST = Cost(weight_bytes=1 << 20, kv_bytes=0, other_bytes=0, flops=0)
costs = st.lists(
    st.builds(Cost, *(st.integers(0, 1 << 24) for _ in range(3)), st.integers(0, 10**10)), min_size=1, max_size=6
)


def on_paper(name: str, *, chip: str | None = None, bits: int = 4, group_size: int = 64, **options) -> dict:
    checkpoint = ShapeCheckpoint(name, bits=bits, group_size=group_size)
    return explain_on_paper(checkpoint, GpuTarget(), chip=chip and find_chip(chip), **options)


@pytest.fixture(scope="module")
def qwen3():
    return on_paper("qwen3-0.6b", chip="m4-max", context=1024)


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_has_the_parameters_that_are_recorded_for_it(name):
    checkpoint = ShapeCheckpoint(name, bits=16)
    checkpoint.build()
    assert parameter_count(checkpoint.tensors) == SHAPES[name].parameters


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_is_planned_for_a_gpu(name):
    report = on_paper(name)
    assert report["native"], report["fallback_reason"]


@pytest.mark.parametrize("context", [1, 256, 257, 1000, 1024])
def test_a_token_of_qwen3_takes_five_launches_a_layer_and_150_in_all(context):
    report = on_paper("qwen3-0.6b", context=context)
    assert report["launches_per_token"] == len(report["launches"]) <= 150
    assert report["barriers_per_token"] <= report["launches_per_token"]
    attention = [i for i, launch in enumerate(report["launches"]) if "attention" in launch["ops"]]
    assert len(attention) == LAYERS
    assert {b - a for a, b in itertools.pairwise(attention)} == {5}


def test_weights_and_cache_of_qwen3_are_what_its_config_says(qwen3):
    linear = LAYERS * (1024 * (2 * 2048 + 2 * 1024) + 3 * 1024 * 3072) + 151936 * 1024
    assert qwen3["weight_bytes_per_token"] == linear * 9 // 16  # 4 bits, and two bfloat16 per 64
    position = LAYERS * 2 * 8 * 128 * 2
    assert qwen3["kv_bytes_per_token"] == position
    assert qwen3["kv_bytes_per_step"] == position * (1024 + 1)  # all are read, one is written
    assert qwen3["flops_per_step"] == 2 * (linear + LAYERS * 1024 * 16 * (128 + 128))
    assert 0 < qwen3["other_bytes_per_step"] < 0.02 * qwen3["weight_bytes_per_token"]


def test_launches_add_up_to_the_totals(qwen3):
    launches, prediction = qwen3["launches"], qwen3["prediction"]
    for key, total in (("kv_bytes", "kv_bytes_per_step"), ("other_bytes", "other_bytes_per_step"), ("flops", "flops_per_step")):
        assert sum(launch[key] for launch in launches) == qwen3[total]
    assert sum(launch["predicted_us"] for launch in launches) + EXPECTED.step_us == pytest.approx(prediction["step_us"])
    assert prediction["label"] == LABEL
    low, high = prediction["step_us_range"]
    assert low < prediction["step_us"] < high


def test_more_sequences_read_the_weights_once_and_each_its_own_cache():
    one, four = (on_paper("smollm2-135m", batch=batch, context=512) for batch in (1, 4))
    assert four["weight_bytes_per_token"] == one["weight_bytes_per_token"]
    for key in ("kv_bytes_per_step", "flops_per_step"):
        assert four[key] == 4 * one[key]


def test_a_window_bounds_what_its_layers_read():
    position = 2 * 256 * 2  # of one layer of gemma-3-1b: one kv head
    report = on_paper("gemma-3-1b", context=2048)
    local, everything = 22, 4  # of 26 layers every sixth sees all
    assert report["kv_bytes_per_step"] == position * (local * (512 + 1) + everything * (2048 + 1))


@pytest.mark.parametrize(("bits", "group_size", "per_weight"), [(4, 32, 5), (8, 64, 8.5), (3, 128, 3.25), (16, 64, 16)])
def test_quantisation_decides_the_weights_bytes(bits, group_size, per_weight):
    report = on_paper("llama-3.2-1b", bits=bits, group_size=group_size)
    assert report["weight_bytes_per_token"] == 1_235_746_816 * per_weight / 8  # all but its norms


def test_nothing_of_a_large_model_is_allocated():
    mx.reset_peak_memory()
    assert on_paper("qwen3-32b", context=32768, batch=64)["kv_bytes_per_step"] > 1 << 39
    assert mx.get_peak_memory() < 16 << 20


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "phi3_longrope"])
def test_a_plan_on_paper_is_the_devices(family, tmp_path):
    """The same launches in the same order with the same barriers as the plan that the host device runs."""
    config = {"model_type": families.FAMILIES[family].model_type, **families.BASE, **families.FAMILIES[family].config}
    quantisation = {"group_size": 32, "bits": 4}
    directory = write_model(tmp_path / family, families.build(family, quantized=True), config, quantisation)
    model, _ = metalstep.load(directory, device="host", threads=1, strict=True)
    with model:
        real = model.explain()
    with open_checkpoint(directory) as checkpoint:
        paper = explain_on_paper(checkpoint, HostTarget("int16"), context=64)
    for key in ("launches_per_token", "barriers_per_token", "kv_bytes_per_token", "arena_bytes", "arithmetic"):
        assert paper[key] == real[key], key
    for a, b in zip(paper["launches"], real["launches"], strict=True):
        assert {key: a[key] for key in ("kernel", "ops", "barrier")} == {key: b[key] for key in ("kernel", "ops", "barrier")}


def test_a_model_without_kernels_says_why(tmp_path):
    config = {"model_type": "qwen3_moe", **families.BASE, **families.EXPERTS}
    directory = write_model(tmp_path / "moe", families.build("qwen3_moe", quantized=False), config)
    with open_checkpoint(directory) as checkpoint:
        report = explain_on_paper(checkpoint, GpuTarget(), context=64)
        assert not report["native"]
        assert report["fallback_reason"]
        with pytest.raises(CaptureError):
            explain_on_paper(checkpoint, GpuTarget(), context=64, strict=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 65}, "batch is 65, expected 1 to 64"),
        ({"batch": 0}, "batch is 0"),
        ({"context": 8193}, "context is 8193, expected 1 to the model's own limit of 8192"),
        ({"bits": 7}, "bits is 7, expected one of"),
        ({"group_size": 16}, "group_size is 16, expected one of 32, 64, 128"),
    ],
)
def test_options_that_no_plan_has_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        on_paper("smollm2-135m", **options)


@pytest.mark.parametrize("name", ["M4 Max", "m4-max", "Apple M4 Max"])
def test_a_chip_is_found_as_people_write_it(name):
    assert find_chip(name) is CHIPS["m4-max"]


@given(costs, st.data())
def test_a_barrier_never_makes_a_step_faster(launches, data):
    barriers = data.draw(st.lists(st.booleans(), min_size=len(launches), max_size=len(launches)))
    some = predict(launches, barriers, CHIPS["m2"])
    every = predict(launches, [True] * len(launches), CHIPS["m2"])
    assert some.total_us <= every.total_us * (1 + 1e-9)
    assert some.total_us >= max(some.dispatch_us, some.memory_us, some.arithmetic_us) * (1 - 1e-9)
    assert every.total_us <= (every.dispatch_us + every.memory_us + every.arithmetic_us) * (1 + 1e-9)


@given(costs)
def test_the_slow_constants_bound_the_fast_ones(launches):
    barriers = [True] * len(launches)
    times = [predict(launches, barriers, CHIPS["m3-max"], constants).total_us for constants in (FAST, EXPECTED, SLOW)]
    assert times == sorted(times)


def test_launches_between_barriers_share_the_memory_and_overlap_with_arithmetic():
    moves, computes = COST, Cost(0, 0, 0, 10**8)
    chip = find_chip("m1")
    together = predict([moves, computes], [True, False], chip)
    apart = predict([moves, computes], [True, True], chip)
    saved = apart.total_us - together.total_us
    assert saved == pytest.approx(min(apart.memory_us, apart.arithmetic_us) + EXPECTED.launch_us - EXPECTED.overlapped_us)
    both = predict([moves, moves], [True, False], chip)
    assert sum(both.launches_us) == pytest.approx(EXPECTED.launch_us + EXPECTED.overlapped_us + both.memory_us)


# Speeds that others publish for mlx-lm and engines on MLX (docs/launch-model.md has their sources): chip, layers, launches of a layer
# that wait and that overlap (read off mlx-lm's model code), GB that a token reads, tokens/s.
QWEN3, LLAMA, QWEN2 = (12, 7), (11, 6), (12, 8)
PUBLISHED = [
    ("m4-max", 28, QWEN3, 0.335, 552),
    ("m5-max", 28, QWEN3, 0.335, 641),
    ("m5-max", 36, QWEN3, 2.263, 190.3),
    ("m5-max", 36, QWEN3, 4.257, 112.3),
    ("m5-max", 16, LLAMA, 0.695, 550.9),
    ("m5-max", 32, LLAMA, 4.221, 117.5),
    ("m5-max", 30, LLAMA, 0.076, 879),
    ("m5-max", 24, QWEN2, 0.278, 674.7),
    ("m4-max", 36, QWEN3, 2.574, 134.5),
    ("m4-max", 36, QWEN3, 3.580, 104.7),
    ("m4-max", 36, QWEN3, 4.585, 86.9),
    ("m4-max", 36, QWEN3, 8.356, 52.5),
    ("m3-pro", 36, QWEN3, 2.574, 44.6),
    ("m4-pro", 28, QWEN3, 0.633, 284.2),
    ("m3-ultra", 36, QWEN3, 4.342, 112.9),
]


@pytest.mark.parametrize(("chip", "layers", "launches", "gigabytes", "speed"), PUBLISHED)
def test_published_speeds_of_mlx_lm_lie_in_the_range_predicted_for_its_launches(chip, layers, launches, gigabytes, speed):
    waiting, overlapping = launches
    barriers = ([True] * waiting + [False] * overlapping) * layers + [True] * 8
    costs = [Cost(int(gigabytes * 1e9 / len(barriers)), 0, 0, 0)] * len(barriers)
    slow, expected, fast = (1e6 / predict(costs, barriers, find_chip(chip), c).total_us for c in (SLOW, EXPECTED, FAST))
    assert slow <= speed <= fast
    assert expected == pytest.approx(speed, rel=0.15)
