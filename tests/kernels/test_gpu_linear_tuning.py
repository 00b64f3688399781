"""Tuning tables of the GPU's linear: what is data, how it is chosen from, and what is refused."""
import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metalstep.kernels.gpu import linear_tuning
from metalstep.kernels.gpu.linear_tuning import (
    KINDS,
    Entry,
    HalfTiles,
    Matvec,
    Tiles,
    candidates,
    dump,
    invalid,
    load,
    table,
)

SIZES = st.sampled_from([1, 100, 1024, 4096, 19456, 151936])
ROWS = st.sampled_from([1, 2, 4, 5, 8, 16, 33, 64, 65, 2048])
BITS = st.sampled_from([1, 4, 8, 16, 32])


@pytest.mark.parametrize("kind", KINDS)
def test_a_table_is_what_it_was_written_from(kind):
    tuning = table(kind)
    assert tuning.kind == kind
    assert dump(load(dump(tuning))) == dump(tuning)
    assert load(dump(tuning)) == tuning


@given(kind=st.sampled_from(KINDS), outputs=SIZES, k=SIZES, rows=ROWS, bits=BITS, invariant=st.booleans())
def test_every_linear_has_a_possible_shape(kind, outputs, k, rows, bits, invariant):
    entry = linear_tuning.entry(kind, outputs, k, rows, bits, invariant=invariant)
    assert invalid(entry.shape) == ""
    assert linear_tuning.geometry(kind, outputs, k, rows, bits, invariant=invariant) == entry.shape
    planes = linear_tuning.planes(kind, outputs, k, rows, bits, invariant=invariant)
    assert planes == (1 if rows <= linear_tuning.norm_rows(kind, outputs, invariant=invariant) else entry.planes)
    assert planes == 1 or isinstance(entry.shape, HalfTiles)


@given(kind=st.sampled_from(KINDS), outputs=SIZES, k=SIZES, rows=ROWS, bits=BITS)
def test_candidates_are_possible_and_there_are_some(kind, outputs, k, rows, bits):
    found = candidates(kind, outputs, k, rows, bits)
    assert found and all(invalid(e.shape) == "" for e in found)
    assert all(e.planes == 1 or isinstance(e.shape, HalfTiles) for e in found)
    assert len(set(found)) == len(found)


@pytest.mark.parametrize("kind", KINDS)
def test_an_invariant_row_is_summed_in_one_order_in_all_plans(kind):
    """Splits and words, and the planes of a linear, set that order; rows, strips and columns do not."""
    for outputs in (1024, 4096, 151936):
        entries = [linear_tuning.entry(kind, outputs, 1024, rows, invariant=True) for rows in (1, 8, 9, 64, 65, 2048)]
        assert len({e.planes for e in entries}) == 1
        orders = {(s.splits, s.words) if isinstance(s, HalfTiles) else s for s in (e.shape for e in entries)}
        assert len(orders) == 1
    assert linear_tuning.norm_rows(kind, 1024, invariant=True) in (0, 1 << 31)


def test_limits_are_upper_bounds_and_none_is_no_limit():
    entry = Entry(Matvec(1, 1, 1), bits=4, rows=8, k=64)
    assert entry.holds(4, 8, 10**9, 64)
    assert not any((entry.holds(5, 8, 1, 64), entry.holds(4, 9, 1, 64), entry.holds(4, 8, 1, 65)))


def test_another_table_takes_a_kind_s_place_for_a_while_or_by_its_file(tmp_path, monkeypatch):
    other = replace(table("nvidia"), norm_rows=[(None, 5)])
    with linear_tuning.using(other):
        assert linear_tuning.norm_rows("nvidia", 100) == 5
        with linear_tuning.using(replace(other, norm_rows=[(64, 7), (None, 0)])):
            assert (linear_tuning.norm_rows("nvidia", 64), linear_tuning.norm_rows("nvidia", 65)) == (7, 0)
        assert linear_tuning.norm_rows("nvidia", 100) == 5
    assert table("nvidia") != other
    file = tmp_path / "table.json"
    file.write_text(dump(other))
    apple = table("apple")
    monkeypatch.setenv("METALSTEP_TUNING", str(file))
    assert table("nvidia") == other and table("apple") == apple


def changed(**fields):
    return json.dumps(json.loads(dump(table("nvidia"))) | fields)


def with_shape(**shape):
    return changed(entries=[{"shape": shape}])


HALF = {"type": "half_tiles", "rows": 8, "strips": 2, "columns": 1, "splits": 2, "words": 4, "ahead": 1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "no JSON"),
        ("[]", "has the fields"),
        (changed(more=1), "has the fields"),
        (changed(kind="abacus"), "of kind 'abacus', expected one of apple, nvidia"),
        (changed(entries=[]), "the last of entries"),
        (changed(invariant=[{"rows": 8, "shape": HALF}]), "the last of invariant"),
        (with_shape(type="cubes"), r"entries\[0\] of a tuning table: 'cubes'"),
        (with_shape(type="tiles", rows=8), r"entries\[0\] of a tuning table"),
        (with_shape(**HALF | {"splits": 3}), "no power of two"),
        (with_shape(**HALF | {"rows": 12}), "no multiple of 8"),
        (with_shape(**HALF | {"columns": 40}), "more than 32 simdgroups"),
        (with_shape(**HALF | {"rows": 64, "bands": 3}), "no multiple of 8 in each band"),
        (with_shape(**HALF | {"rows": 64, "columns": 16}), "more sums than threadgroup memory holds"),
        (with_shape(**HALF | {"ahead": "one"}), "a number that is none"),
        (with_shape(type="matvec", rows=9, simdgroups=2, splits=1), "more than 8 rows"),
    ],
)
def test_what_is_no_table_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        load(text)


def test_a_kind_without_a_table_is_refused():
    with pytest.raises(ValueError, match="no tuning for devices of kind 'abacus'; there is one for apple, nvidia"):
        linear_tuning.geometry("abacus", 1, 1, 1)


def test_shapes_say_what_is_impossible():
    assert invalid(Tiles(rows=8, strips=0, columns=1, splits=1)) and invalid(Matvec(rows=4, simdgroups=4, splits=3))
    assert not invalid(Tiles(rows=64, strips=2, columns=4, splits=1))
