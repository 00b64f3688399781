"""metalstep tune's search: what it keeps, and that a table it makes asks for nothing that computes something else."""
import itertools
from dataclasses import replace

import numpy as np
import pytest
from gpu_device import DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st

from metalstep import tune
from metalstep.kernels.gpu import linear_tuning
from metalstep.kernels.gpu.linear_tuning import Entry
from metalstep.kernels.native import NativeDevice
from metalstep.tune import Tuner, differences, with_entry
from metalstep.tune_model import Linear, RandomCheckpoint, TuneModel
from metalstep.tuning_files import tuning_file, use_tuning

KINDS = linear_tuning.KINDS
LINEARS = (Linear("gate + up", 6144, 1024, 4, 6 << 20, False), Linear("down", 1024, 3072, 4, 3 << 20, True))
LINEARS_KEY = [(x.outputs, x.k) for x in LINEARS]


class TimedModel:
    """Stands for a device: a step takes as long as its geometries differ from `best`, by linear. tried: what was asked for."""

    def __init__(self, kind, best, wrong=lambda entry: False):
        self.kind, self.best, self.wrong, self.tried = kind, best, wrong, 0

    def plan_rows(self, rows):
        return rows

    def linears(self, rows):
        return list(LINEARS)

    def step(self, rows):
        self.tried += 1
        return TimedStep(self, [linear_tuning.entry(self.kind, x.outputs, x.k, rows, x.bits) for x in LINEARS])


class TimedStep:
    def __init__(self, model, entries):
        self.model, self.entries = model, entries

    def compile(self):
        pass

    def time(self, steps=32):
        apart = [differences(entry, best) for entry, best in zip(self.entries, self.model.best, strict=True)]
        return 1e-3 * (1 + sum(apart))

    def logits(self):
        wrong = any(map(self.model.wrong, self.entries))
        return np.linspace(-1, 1, 64, dtype=np.float32).reshape(2, 32) * (-1 if wrong else 1)

    def close(self):
        pass


def bare(entry):
    return Entry(entry.shape, planes=entry.planes)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data(), rows=st.sampled_from([1, 8, 32, 64]))
@settings(max_examples=20, deadline=None)
def test_it_finds_the_geometry_that_is_best_in_every_number(kind, data, rows):
    """Where each number has its own best, whichever it is. Entries for other rows keep what they hold for."""
    best = []
    for x in LINEARS:
        usable = [e for e in linear_tuning.candidates(kind, x.outputs, x.k, rows, x.bits) if x.has_planes or e.planes == 1]
        best.append(bare(data.draw(st.sampled_from(usable))))
    model, tuner = TimedModel(kind, best), Tuner(kind)
    point = tuner.tune(model, "shape", rows, 60)
    with linear_tuning.using(tuner.table):
        for x, b in zip(LINEARS, best, strict=True):
            assert bare(linear_tuning.entry(kind, x.outputs, x.k, rows, x.bits)) == b
    assert point.ratio >= 1 and point.wrong == 0
    assert linear_tuning.load(linear_tuning.dump(tuner.table)) == tuner.table
    for other in (1, 2, 4, 8, 16, 32, 64, 512):
        for x in LINEARS:
            before = linear_tuning.entry(kind, x.outputs, x.k, other, x.bits)
            if other > rows or (before.rows is not None and before.rows < rows):
                with linear_tuning.using(tuner.table):
                    assert linear_tuning.entry(kind, x.outputs, x.k, other, x.bits) == before


@pytest.mark.parametrize("kind", KINDS)
def test_a_geometry_with_other_logits_is_never_kept(kind):
    now = [bare(linear_tuning.entry(kind, x.outputs, x.k, 8, x.bits)) for x in LINEARS]
    near = [e for e in linear_tuning.candidates(kind, *LINEARS_KEY[0], 8) if differences(e, now[0]) == 1 and e.planes == 1]
    model = TimedModel(kind, [bare(near[0]), now[1]], wrong=lambda entry: differences(entry, near[0]) == 0)
    tuner = Tuner(kind)
    point = tuner.tune(model, "shape", 8, 60)
    assert point.wrong >= 1
    with linear_tuning.using(tuner.table):
        assert differences(linear_tuning.entry(kind, *LINEARS_KEY[0], 8), near[0])


def test_what_gains_nothing_leaves_the_table_as_it_was():
    now = [bare(linear_tuning.entry("nvidia", x.outputs, x.k, 32, x.bits)) for x in LINEARS]
    tuner = Tuner("nvidia")
    before = tuner.table
    point = tuner.tune(TimedModel("nvidia", now), "shape", 32, 60)
    assert (point.ratio, point.changes, tuner.table) == (1.0, (), before)
    assert point.tried > 0


def test_the_time_that_is_given_ends_the_search():
    model = TimedModel("nvidia", [Entry(linear_tuning.geometry("nvidia", 1, 1, 1))] * 2)
    Tuner("nvidia").tune(model, "shape", 8, 0)
    assert model.tried <= 2  # the step itself, and what it is compared with


SIZES = st.sampled_from([1024, 2560, 6144])
POINTS = st.tuples(st.sampled_from([1, 8, 32]), SIZES, SIZES, st.sampled_from([4, 8]))  # rows, outputs, k, bits


@given(points=st.lists(POINTS, min_size=1, max_size=8, unique=True), order=st.randoms(use_true_random=False))
def test_each_linear_gets_its_own_entry_in_whatever_order_they_were_tuned(points, order):
    table = linear_tuning.table("nvidia")
    usable = itertools.cycle(linear_tuning.candidates("nvidia", 1024, 1024, 1))
    wanted = {point: bare(entry) for point, entry in zip(points, usable, strict=False)}
    order.shuffle(points)
    for point in points:
        rows, outputs, k, bits = point
        table = with_entry(table, Linear("", outputs, k, bits, 0, True), rows, wanted[point])
    with linear_tuning.using(table):
        for (rows, outputs, k, bits), entry in wanted.items():
            assert bare(linear_tuning.entry("nvidia", outputs, k, rows, bits)) == entry
    again = with_entry(table, Linear("", outputs, k, bits, 0, True), rows, wanted[points[0]])
    assert len(again.entries) == len(table.entries)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_has_the_same_logits_with_every_geometry_that_is_tried(kind):
    """On the device, for each linear of a model: a sample of its candidates, with planes and without."""
    model = TuneModel(NativeDevice.open(DEVICE), kind, RandomCheckpoint("tiny"), rows=8, context=20)
    try:
        reference = model.step(8)
        want = reference.logits()
        reference.close()
        assert np.ptp(want) > 0.1 and np.isfinite(want).all()
        linears = model.linears(8)
        assert {x.k for x in linears} == {128, 256} and 2000 in {x.outputs for x in linears}
        for x in linears:
            usable = [e for e in linear_tuning.candidates(kind, x.outputs, x.k, 8, x.bits) if x.has_planes or e.planes == 1]
            for entry in usable[:: max(1, len(usable) // 2)]:
                with linear_tuning.using(with_entry(linear_tuning.table(kind), x, 8, entry)):
                    step = model.step(8)
                error = np.abs(step.logits() - want).max()
                step.close()
                assert error <= tune.LOGITS_ERROR / 4 * np.ptp(want), entry
    finally:
        model.close()


def test_the_table_of_a_device_is_used_unless_another_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("METALSTEP_CACHE", str(tmp_path))
    monkeypatch.setattr(linear_tuning, "_used", {})
    assert use_tuning("A GPU, 80 GB") is None
    table = replace(linear_tuning.table("nvidia"), library_rows=777)
    file = tuning_file("A GPU, 80 GB")
    file.parent.mkdir()
    file.write_text(linear_tuning.dump(table))
    assert file.name == "a-gpu-80-gb.json"
    monkeypatch.setenv("METALSTEP_TUNING", str(file))
    assert use_tuning("A GPU, 80 GB") is None
    monkeypatch.delenv("METALSTEP_TUNING")
    assert use_tuning("A GPU, 80 GB") == file
    assert linear_tuning.table("nvidia").library_rows == 777


@pytest.mark.parametrize("content", [b"{}", b"5", b"[" * 100_000, b"\x80\xff", b""])
def test_a_file_that_is_no_table_is_ignored_with_a_warning(content, tmp_path, monkeypatch):
    monkeypatch.setenv("METALSTEP_CACHE", str(tmp_path))
    file = tuning_file("GPU")
    file.parent.mkdir()
    file.write_bytes(content)
    with pytest.warns(UserWarning, match=r"gpu\.json: .*; it is ignored: make it again with `metalstep tune`, or delete it"):
        assert use_tuning("GPU") is None


def test_a_folder_in_a_table_s_place_is_ignored_with_a_warning(tmp_path, monkeypatch):
    monkeypatch.setenv("METALSTEP_CACHE", str(tmp_path))
    tuning_file("GPU").mkdir(parents=True)
    with pytest.warns(UserWarning, match=r"gpu\.json: it is no file; it is ignored"):
        assert use_tuning("GPU") is None


def test_a_named_file_that_is_no_table_is_an_error(tmp_path, monkeypatch):
    """Where a device is opened: later, a model would be blamed for it."""
    file = tmp_path / "table.json"
    file.write_text("null")
    monkeypatch.setenv("METALSTEP_TUNING", str(file))
    with pytest.raises(ValueError, match=r"METALSTEP_TUNING=.*table\.json: tuning table: it is null, expected .*; unset METALSTEP_TUNING"):
        use_tuning("GPU")


def test_a_device_without_a_name_has_a_file_with_one():
    assert tuning_file("").name == tuning_file("⌘").name == "gpu.json"
