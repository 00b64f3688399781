"""metalstep tune's search: what it keeps, and that a table it makes asks for nothing that computes something else."""
import itertools
from dataclasses import replace

import numpy as np
import pytest
from gpu_device import DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st

from metalstep import tune
from metalstep.kernels.gpu.linear_candidates import candidates
from metalstep.kernels.gpu.linear_tables import KINDS, dump, load, table
from metalstep.kernels.gpu.linear_tuning import Entry
from metalstep.kernels.native import NativeDevice
from metalstep.model import open_device
from metalstep.plan.gpu_target import GpuTarget
from metalstep.tune import Tuner, differences, with_entry
from metalstep.tune_model import Linear, RandomCheckpoint, TuneModel
from metalstep.tuning_files import tuning_file, tuning_of

LINEARS = (Linear("gate + up", 6144, 1024, 4, 6 << 20, False), Linear("down", 1024, 3072, 4, 3 << 20, True))


class TimedModel:
    """Stands for a device: a step takes as long as its geometries differ from `best`, by linear. tried: what was asked for."""

    def __init__(self, best, wrong=lambda entry: False):
        self.best, self.wrong, self.tried = best, wrong, 0

    def plan_rows(self, rows):
        return rows

    def linears(self, rows, tuning):
        return list(LINEARS)

    def step(self, rows, tuning):
        self.tried += 1
        return TimedStep(self, geometries(tuning, rows))


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


def geometries(tuning, rows):
    return [bare(tuning.entry(x.outputs, x.k, rows, x.bits)) for x in LINEARS]


def tried(kind, x, rows):
    return [entry for entry in candidates(kind, x.outputs, x.k, rows) if x.has_planes or entry.planes == 1]


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data(), rows=st.sampled_from([1, 8, 32, 64]))
@settings(max_examples=20, deadline=None)
def test_it_finds_the_geometry_that_is_best_in_every_number(kind, data, rows):
    """Where each number has its own best, whichever it is. Entries for other rows keep what they hold for."""
    best = [data.draw(st.sampled_from(tried(kind, x, rows))) for x in LINEARS]
    before, tuner = table(kind), Tuner(table(kind))
    point = tuner.tune(TimedModel(best), "shape", rows, 60)
    assert geometries(tuner.table, rows) == best
    assert point.ratio >= 1 and point.wrong == 0
    assert load(dump(tuner.table)) == tuner.table
    for other in (1, 2, 4, 8, 16, 32, 64, 512):
        for x in LINEARS:
            entry = before.entry(x.outputs, x.k, other, x.bits)
            if other > rows or (entry.rows is not None and entry.rows < rows):
                assert tuner.table.entry(x.outputs, x.k, other, x.bits) == entry


@pytest.mark.parametrize("rows", [1, 2, 4, 8, 16, 32, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_from_every_geometry_one_that_is_nearer_to_any_other_is_in_reach(kind, rows):
    for x, start in zip(LINEARS, geometries(table(kind), rows), strict=True):
        usable = tried(kind, x, rows)
        for here, best in itertools.product([*usable, start if x.has_planes else replace(start, planes=1)], usable):
            near = (entry for entry in usable if differences(entry, here) <= tune.REACH)
            assert here == best or any(differences(entry, best) < differences(here, best) for entry in near), (here, best)


@pytest.mark.parametrize("kind", KINDS)
def test_a_geometry_with_other_logits_is_never_kept(kind):
    now = geometries(table(kind), 8)
    near = next(e for e in tried(kind, LINEARS[0], 8) if differences(e, now[0]) == 1)
    model = TimedModel([near, now[1]], wrong=lambda entry: differences(entry, near) == 0)
    tuner = Tuner(table(kind))
    point = tuner.tune(model, "shape", 8, 60)
    assert point.wrong >= 1
    assert differences(geometries(tuner.table, 8)[0], near)


def test_what_gains_nothing_leaves_the_table_as_it_was():
    before = table("nvidia")
    tuner = Tuner(before)
    point = tuner.tune(TimedModel(geometries(before, 32)), "shape", 32, 60)
    assert (point.ratio, point.changes, tuner.table) == (1.0, (), before)
    assert point.tried > 0


def test_the_time_that_is_given_ends_the_search():
    model = TimedModel([bare(table("nvidia").entry(1, 1, 1))] * 2)
    Tuner(table("nvidia")).tune(model, "shape", 8, 0)
    assert model.tried <= 2  # the step itself, and what it is compared with


SIZES = st.sampled_from([1024, 2560, 6144])
POINTS = st.tuples(st.sampled_from([1, 8, 32]), SIZES, SIZES, st.sampled_from([4, 8]))  # rows, outputs, k, bits


@given(points=st.lists(POINTS, min_size=1, max_size=8, unique=True), order=st.randoms(use_true_random=False))
def test_each_linear_gets_its_own_entry_in_whatever_order_they_were_tuned(points, order):
    tuning = table("nvidia")
    usable = itertools.cycle(candidates("nvidia", 1024, 1024, 1))
    wanted = dict(zip(points, usable, strict=False))
    order.shuffle(points)
    for point in points:
        rows, outputs, k, bits = point
        tuning = with_entry(tuning, Linear("", outputs, k, bits, 0, True), rows, wanted[point])
    for (rows, outputs, k, bits), entry in wanted.items():
        assert bare(tuning.entry(outputs, k, rows, bits)) == entry
    again = with_entry(tuning, Linear("", outputs, k, bits, 0, True), rows, wanted[points[0]])
    assert len(again.entries) == len(tuning.entries)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_has_the_same_logits_with_every_geometry_that_is_tried(kind):
    """On the device, for each linear of a model: a sample of its candidates, with planes and without."""
    model = TuneModel(NativeDevice.open(DEVICE), kind, RandomCheckpoint("tiny"), rows=8, context=20)
    try:
        reference = model.step(8, table(kind))
        want = reference.logits()
        reference.close()
        assert np.ptp(want) > 0.1 and np.isfinite(want).all()
        linears = model.linears(8, table(kind))
        assert {x.k for x in linears} == {128, 256} and 2000 in {x.outputs for x in linears}
        for x in linears:
            usable = tried(kind, x, 8)
            for entry in usable[:: max(1, len(usable) // 2)]:
                step = model.step(8, with_entry(table(kind), x, 8, entry))
                error = np.abs(step.logits() - want).max()
                step.close()
                assert error <= tune.LOGITS_ERROR / 4 * np.ptp(want), entry
    finally:
        model.close()


def test_the_table_of_a_device_is_used_unless_another_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("METALSTEP_CACHE", str(tmp_path))
    packaged = table("nvidia")
    assert tuning_of("A GPU, 80 GB", "nvidia") == packaged
    own, other = replace(packaged, library_rows=777), replace(packaged, library_rows=888)
    file = tuning_file("A GPU, 80 GB")
    assert file.name == "a-gpu-80-gb.json"
    file.parent.mkdir()
    file.write_text(dump(own))
    (tmp_path / "other.json").write_text(dump(other))
    assert tuning_of("A GPU, 80 GB", "nvidia") == own
    assert tuning_of("A GPU, 40 GB", "nvidia") == packaged, "another GPU of the same process has another table"
    with pytest.warns(UserWarning, match=r"80-gb\.json: it is a table for GPUs of kind nvidia, expected one for apple; it is ignored"):
        assert tuning_of("A GPU, 80 GB", "apple") == table("apple")
    monkeypatch.setenv("METALSTEP_TUNING", str(tmp_path / "other.json"))
    assert tuning_of("A GPU, 80 GB", "nvidia") == tuning_of("A GPU, 40 GB", "nvidia") == other


def test_two_devices_with_tables_of_their_own_each_keep_theirs(tmp_path, monkeypatch):
    """Also for plans that are made behind the opening of the other one."""
    monkeypatch.setenv("METALSTEP_CACHE", str(tmp_path))
    targets = {rows: GpuTarget("nvidia", library=False) for rows in (300, 400)}
    tuning_file("x").parent.mkdir()
    for rows, target in targets.items():
        tuning_file(NativeDevice.open(DEVICE).info.name).write_text(dump(replace(table("nvidia"), norm_rows=[(None, rows)])))
        open_device(DEVICE, 0, target).close()
    for rows, target in targets.items():
        linears = target.fusion(target.plan_shape(1, decode=True, context=1)).linears
        assert linears.tuning.most_normed(64) == rows


@pytest.mark.parametrize("content", [b"{}", b"5", b"[" * 100_000, b"\x80\xff", b""])
def test_a_file_that_is_no_table_is_ignored_with_a_warning(content, tmp_path, monkeypatch):
    monkeypatch.setenv("METALSTEP_CACHE", str(tmp_path))
    file = tuning_file("GPU")
    file.parent.mkdir()
    file.write_bytes(content)
    with pytest.warns(UserWarning, match=r"gpu\.json: .*; it is ignored: make it again with `metalstep tune`, or delete it"):
        assert tuning_of("GPU", "apple") == table("apple")


def test_a_folder_in_a_table_s_place_is_ignored_with_a_warning(tmp_path, monkeypatch):
    monkeypatch.setenv("METALSTEP_CACHE", str(tmp_path))
    tuning_file("GPU").mkdir(parents=True)
    with pytest.warns(UserWarning, match=r"gpu\.json: it is no file; it is ignored"):
        assert tuning_of("GPU", "apple") == table("apple")


def test_a_named_file_that_is_no_table_is_an_error(tmp_path, monkeypatch):
    """Where a device is opened: later, a model would be blamed for it."""
    file = tmp_path / "table.json"
    file.write_text("null")
    monkeypatch.setenv("METALSTEP_TUNING", str(file))
    with pytest.raises(ValueError, match=r"METALSTEP_TUNING=.*table\.json: tuning table: it is null, expected .*; unset METALSTEP_TUNING"):
        tuning_of("GPU", "apple")


def test_a_device_without_a_name_has_a_file_with_one():
    assert tuning_file("").name == tuning_file("⌘").name == "gpu.json"
