"""GPU kernels on a device whose memory the host does not see: the same bits as where it does, nothing sent that is not needed, no byte
wanted that is not there."""
from __future__ import annotations

import gc
import sys
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
from engines import TEXT, check, kinds, load, rows
from split_memory import SplitDevice, split_devices
from workload import answers, requests

from metalstep import Request, SamplingParams, model
from metalstep.kv_plane import BLOCK_SIZE
from metalstep.plan.gpu_target import GpuTarget
from metalstep.request import STREAMED_STEPS
from metalstep.scheduler import Scheduler

DEVICE = "metal" if sys.platform == "darwin" else "metal-sim"
OPTIONS = {"device": DEVICE, "kv_memory": "32MB", "max_context": 224}


@contextmanager
def planned_as(kind):
    """Models that are loaded meanwhile are planned for GPUs of this kind, on whatever device."""
    with pytest.MonkeyPatch.context() as patch:
        invariant = "batch_invariant"
        patch.setattr(model, "make_target", lambda *_, **options: GpuTarget(kind, batch_invariant=options[invariant], library=False))
        yield


def load_pair(path, **options):
    """The same weights where the host sees the device's memory, and where it does not."""
    with planned_as("nvidia"):
        unified = load("qwen3", path, **OPTIONS, **options)
        with split_devices():
            split = load("qwen3", path, **OPTIONS, **options)
    assert isinstance(split.native.device, SplitDevice) and split.native.max_rows > 512
    return unified, split


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    unified, split = load_pair(tmp_path_factory.mktemp("qwen3"))
    with unified, split:
        yield unified, split


@pytest.fixture(scope="module")
def invariant(tmp_path_factory):
    """A pair whose requests do not depend on who runs beside them."""
    unified, split = load_pair(tmp_path_factory.mktemp("qwen3"), batch_invariant=True)
    with unified, split:
        yield unified, split


def test_every_kind_of_request_gets_the_same_bits(pair):
    wanted = requests(9, pair[0].native.vocab_size, longest=90, seed=11, tokens=(3, 12))
    for steps in (STREAMED_STEPS, 4, 32):
        expected, got = (answers(m.engine, [replace(request, decode_steps=steps) for request in wanted]) for m in pair)
        assert got == expected
    expected, got = ([rows(start(m.engine, None)) for start in kinds(m, 20)] for m in pair)
    assert got == expected
    np.testing.assert_array_equal(*(m.engine.logits(TEXT[:70]) for m in pair))
    check(pair[1])


def test_logits_that_somebody_keeps_outlive_the_steps_behind_them(pair):
    """One stream, whose plan has places for them, and several, whose rows have none of their own."""
    for count in (1, 3):
        kept = []
        for m in pair:
            streams = [m.engine.submit(Request(TEXT[i : 20 + i], max_tokens=9, keep_logits=True)) for i in range(count)]
            outputs = [[] for _ in streams]
            while not all(stream.finished for stream in streams):
                for stream, held in zip(streams, outputs, strict=True):
                    held += [output for output in [next(stream, None)] if output is not None]
            kept.append([[output.logits.numpy() for output in held] for held in outputs])
        np.testing.assert_array_equal(*kept)
        assert len(kept[0][0]) == 9


def test_rows_that_were_kept_on_the_device_are_used_again(pair):
    split = pair[1]

    def buffers():
        streams = [split.engine.submit(Request(TEXT[i : 9 + i], max_tokens=6, keep_logits=True)) for i in range(2)]
        while not all(stream.finished for stream in streams):
            held = [next(stream, None) for stream in streams]
        del held, streams
        gc.collect()
        return len(split.native.device._memory)

    buffers()
    assert buffers() == buffers()


def test_a_steady_decode_sends_next_to_nothing(pair):
    """A write per time that its table grows or its results begin again at the first row, and no reading back."""
    engine, device = pair[1].engine, pair[1].native.device
    stream = engine.submit(Request(TEXT[:5], max_tokens=150))
    for _ in range(3):
        next(stream)
    device.writes.clear()
    reads = device.reads
    count = sum(1 for _ in stream)
    assert len(device.writes) <= 3 * (count // BLOCK_SIZE + 2) and sum(device.writes) < 2 * count
    assert device.reads == reads


@pytest.mark.parametrize(("tokens", "early"), [(40, False), (60, True)])
def test_a_run_is_queued_before_the_results_of_the_one_before_it(invariant, monkeypatch, tokens, early):
    """And what it gives is what would have come anyway, whoever stops, is cancelled or comes in between. early: the device is done with it
    before anybody looks at those results."""
    expected, split = invariant
    made = []
    if early:
        later = SplitDevice._later
        monkeypatch.setattr(SplitDevice, "_later", lambda device, *work, **run: (later(device, *work, **run), device.finish())[0])
    ahead = Scheduler.ahead
    monkeypatch.setattr(Scheduler, "ahead", lambda *args: made.append(ahead(*args)) or made[-1])
    alike = [
        Request(TEXT[i : 30 + i], SamplingParams(seed=i, temperature=1.0), tokens, frozenset({7, 50 + i}), decode_steps=8) for i in range(5)
    ]
    whole = answers(expected.engine, alike)
    assert not made
    assert answers(split.engine, alike) == whole
    assert any(schedule is not None for schedule in made)
    made.clear()
    sum(1 for _ in split.engine.submit(Request(TEXT[:9], max_tokens=tokens, decode_steps=8)))
    assert sum(schedule is not None for schedule in made) >= tokens // 8 - 2
    first, second, *others = (split.engine.submit(request) for request in alike)
    assert [(next(first).token) for _ in range(3)] == [token for token, *_ in whole[0][:3]]
    second.close()
    late = split.engine.submit(replace(alike[1], decode_steps=1))
    assert [output.token for output in late] == [token for token, *_ in whole[1]]
    for stream, wanted in zip(others, whole[2:], strict=True):
        assert [output.token for output in stream] == [token for token, *_ in wanted]
    first.close()
    del first, second, others, late, stream
    check(split)


def test_memory_is_asked_for_before_it_is_taken(tmp_path, monkeypatch):
    """A cache gets its part of what the weights and the steps' values leave, and more than that is refused with the numbers."""
    left = 48 << 20
    monkeypatch.setattr(SplitDevice, "memory_left", lambda device: left)
    options = {**OPTIONS, "kv_memory": None}
    with planned_as("nvidia"), split_devices():
        with load("llama", tmp_path / "a", **options) as m:
            values = left - m.native.memory_for_cache(224)
            assert 0 < values < left
        with pytest.raises(ValueError, match=r"kv_memory is '47MiB', .* left beside the weights .*smaller kv_memory"):
            load("llama", tmp_path / "b", **{**options, "kv_memory": "47MiB"})
        left = values + 4096
        with pytest.raises(ValueError, match=r"a KV cache of .* bytes holds"):
            load("llama", tmp_path / "c", **options)
