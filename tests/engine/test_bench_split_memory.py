"""Benchmarks on a GPU whose memory the host does not see, in small: what they write reaches the device, and requests go on behind them."""

import pytest
from engines import TEXT, load
from gpu_device import DEVICE
from split_memory import split_memory  # noqa: F401  # of all that is loaded here

import metalstep
from metalstep.bench.device_step import SAMPLES, device_step_seconds
from metalstep.bench.host_time import bench_host_time
from metalstep.bench.launches import bench_launches
from metalstep.bench.prompts import Prompts


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    loaded = load("qwen3", tmp_path_factory.mktemp("qwen3") / "m", device=DEVICE, kv_memory="32MB", max_context=224)
    with loaded:
        yield loaded


@pytest.fixture
def greedy(model):
    """What a request gives before a benchmark and behind it."""

    def tokens():
        request = metalstep.Request(TEXT[:9], metalstep.SamplingParams(), 6)
        return [output.token for output in model.engine.submit(request)]

    before = tokens()
    yield
    assert tokens() == before


@pytest.mark.parametrize("batch", [1, 3])
def test_a_step_is_timed_on_the_device_alone(model, greedy, batch):
    times = device_step_seconds(model, Prompts(range(3, 90)).take(batch, 7), 4)
    assert len(times) == SAMPLES


def test_a_profile_has_each_launch(model, greedy):
    result = bench_launches(model, Prompts(range(90, 3, -1)), context=8, steps=2, batch=2)
    assert sum(row["count"] for row in result["rows"]) == len(model.native.plan_for(2, decode=True, context=10).launches)
    assert result["total_us"] > 0


def test_host_time_is_a_part_of_a_step(model, greedy):
    class Words:
        def encode(self, text):
            return [0] * len(text.split())

    result = bench_host_time(model, Words(), Prompts(range(3, 97)), tokens=5, batch=2)
    assert 0 < result["host_us"] < result["step_us"]
