"""Tuning tables of the GPU's linear: what is data, how it is chosen from, and what is refused."""
import itertools
import json
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metalstep.kernels.gpu.linear_candidates import candidates
from metalstep.kernels.gpu.linear_tables import KINDS, PLANES, dump, load, named, table
from metalstep.kernels.gpu.linear_tuning import Entry, HalfTiles, Matvec, Tiles, invalid

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
    tuning = table(kind)
    entry = tuning.entry(outputs, k, rows, bits, invariant=invariant)
    assert invalid(entry.shape) == ""
    planes = tuning.planes(outputs, k, rows, bits, invariant=invariant)
    assert planes == (1 if rows <= tuning.most_normed(outputs, invariant=invariant) else entry.planes)
    assert planes == 1 or isinstance(entry.shape, HalfTiles)


@given(kind=st.sampled_from(KINDS), outputs=SIZES, k=SIZES, rows=ROWS)
def test_candidates_are_possible_and_there_are_some(kind, outputs, k, rows):
    found = candidates(kind, outputs, k, rows)
    assert found and all(invalid(e.shape) == "" for e in found)
    assert all(e.planes == 1 or isinstance(e.shape, HalfTiles) for e in found)
    assert len(set(found)) == len(found)


@pytest.mark.parametrize("kind", KINDS)
def test_an_invariant_row_is_summed_in_one_order_in_all_plans(kind):
    """Splits and words, and the planes of a linear, set that order; rows, strips and columns do not."""
    tuning = table(kind)
    for outputs in (1024, 4096, 151936):
        entries = [tuning.entry(outputs, 1024, rows, invariant=True) for rows in (1, 8, 9, 64, 65, 2048)]
        assert len({e.planes for e in entries}) == 1
        orders = {(s.splits, s.words) if isinstance(s, HalfTiles) else s for s in (e.shape for e in entries)}
        assert len(orders) == 1
    assert tuning.most_normed(1024, invariant=True) in (0, 1 << 31)


def test_limits_are_upper_bounds_and_none_is_no_limit():
    entry = Entry(Matvec(1, 1, 1), bits=4, rows=8, k=64)
    assert entry.holds(4, 8, 10**9, 64)
    assert not any((entry.holds(5, 8, 1, 64), entry.holds(4, 9, 1, 64), entry.holds(4, 8, 1, 65)))


def test_norms_belong_inside_of_linears_up_to_the_rows_of_the_first_pair_that_holds():
    tuning = replace(table("nvidia"), norm_rows=[(64, 7), (None, 0)])
    assert (tuning.most_normed(64), tuning.most_normed(65)) == (7, 0)


def test_a_named_table_takes_the_place_of_its_kind_s(tmp_path, monkeypatch):
    other = replace(table("nvidia"), norm_rows=[(None, 5)])
    assert table("nvidia") != other
    file = tmp_path / "table.json"
    file.write_text(dump(other))
    apple = table("apple")
    monkeypatch.setenv("METALSTEP_TUNING", str(file))
    assert table("nvidia") == other and table("apple") == apple


def changed(**fields):
    return json.dumps(json.loads(dump(table("nvidia"))) | fields)


def with_entry(**entry):
    return changed(entries=[{"shape": HALF} | entry])


def with_shape(**shape):
    return with_entry(shape=shape)


def with_values(name, **values):
    return changed(**{name: json.loads(dump(table("nvidia")))[name] | values})


HALF = {"type": "half_tiles", "rows": 8, "strips": 2, "columns": 1, "splits": 2, "words": 4, "ahead": 1}
MATVEC = {"type": "matvec", "rows": 4, "simdgroups": 4, "splits": 1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "no JSON"),
        ("5", "it is 5, expected an object with the fields kind, entries"),
        ("null", "it is null, expected an object"),
        ("true", "it is true, expected an object"),
        ("NaN", "it is nan, expected an object"),
        ("[1]", "it is a list, expected an object"),
        ("[" * 100_000, "nested too deeply, expected an object"),
        ("1" * 5000, "no JSON"),
        ("{}", "it has no field kind, expected kind, entries"),
        (changed(more=1), "it has a field 'more', expected kind, entries"),
        (changed(kind="abacus"), "kind is 'abacus', expected one of apple, nvidia"),
        (changed(kind=["nvidia"]), "kind is a list, expected one of"),
        (changed(entries=[]), "the last of entries must hold for all"),
        (changed(entries=5), "entries is 5, expected a list"),
        (changed(entries={}), "entries is an object, expected a list"),
        (changed(invariant=[{"rows": 8, "shape": HALF}]), "the last of invariant must hold for all"),
        (changed(invariant=[5]), r"invariant\[0\] is 5, expected an object"),
        (changed(entries=[{"rows": 8}]), r"entries\[0\] has no field shape"),
        (with_entry(rows="8"), r"entries\[0\].rows is '8', expected an integer of 1 or more"),
        (with_entry(bits=True), r"entries\[0\].bits is true, expected an integer"),
        (with_entry(k=0), r"entries\[0\].k is 0, expected an integer of 1"),
        (with_entry(outputs=1.5), r"entries\[0\].outputs is 1.5, expected an integer"),
        (with_entry(planes=3), r"entries\[0\].planes is 3, expected one of 1, 2, 4, 8, 16"),
        (with_entry(planes=True), r"entries\[0\].planes is true"),
        (with_entry(planes=2, shape=MATVEC), r"entries\[0\].planes is 2, expected 1: only half_tiles"),
        (with_entry(shape=[]), r"entries\[0\].shape is a list, expected an object whose type is one of matvec"),
        (with_shape(type="cubes"), r"entries\[0\].shape.type is 'cubes', expected one of matvec, tiles, half_tiles"),
        (with_shape(type=[]), r"entries\[0\].shape.type is a list"),
        (with_shape(type="tiles", rows=8), r"entries\[0\].shape has no field strips"),
        (with_shape(**MATVEC | {"words": 1}), r"entries\[0\].shape has a field 'words'"),
        (with_shape(**HALF | {"splits": 3}), "no power of two"),
        (with_shape(**HALF | {"rows": 12}), "no multiple of 8"),
        (with_shape(**HALF | {"columns": 40}), "more than 32 simdgroups"),
        (with_shape(**HALF | {"rows": 64, "bands": 3}), "no multiple of 8 in each band"),
        (with_shape(**HALF | {"rows": 64, "columns": 16}), "more sums than threadgroup memory holds"),
        (with_shape(**HALF | {"splits": 32, "columns": 1, "staged": True}), "stages more of x than threadgroup memory holds"),
        (with_shape(**HALF | {"rows": 8000, "splits": 1}), "more than 256 rows"),
        (with_shape(**HALF | {"strips": 1000, "splits": 1}), "more than 64 sums of 8x8"),
        (with_shape(**HALF | {"ahead": "one"}), "ahead is 'one', expected an integer"),
        (with_shape(**HALF | {"ahead": 9}), "nothing ahead, or more than 8"),
        (with_shape(**HALF | {"staged": 1}), "staged is 1, expected true or false"),
        (with_shape(type="tiles", rows=64, strips=2, columns=1, splits=4), "more of x or more sums than threadgroup memory"),
        (with_shape(**MATVEC | {"rows": 9}), "more than 8"),
        (with_shape(**MATVEC | {"simdgroups": 0}), "simdgroups is 0, expected an integer of 1"),
        (changed(norm_rows=5), "norm_rows is 5, expected a list"),
        (changed(norm_rows=[5]), r"norm_rows\[0\] is 5, expected a pair"),
        (changed(norm_rows=[[0, 1]]), r"norm_rows\[0\]\[0\] is 0, expected an integer of 1"),
        (changed(norm_rows=[[None, -1]]), r"norm_rows\[0\]\[1\] is -1, expected an integer of 0"),
        (changed(library_rows=0), "library_rows is 0, expected an integer of 1"),
        (changed(library_rows=False), "library_rows is false, expected an integer of 1"),
        (changed(tile_values=[]), "tile_values is a list, expected an object"),
        (changed(tile_values={}), "tile_values has no field 1, expected 1, 2, 3"),
        (with_values("tile_values", **{"7": [32]}), "tile_values has a field '7'"),
        (with_values("tile_values", **{"4": []}), r"tile_values\[4\] is a list, expected a list of some of 32, 16, 8"),
        (with_values("tile_values", **{"8": [4]}), r"tile_values\[8\] is a list, expected a list of some of 32, 16, 8, "),
        (with_values("matvec_values", **{"3": [16]}), r"matvec_values\[3\] is a list, expected a list of some of 32, "),
        (with_values("matvec_values", **{"4": [8, 16]}), r"matvec_values\[4\] is \[8, 16\], expected the most first"),
        (with_values("matvec_values", **{"4": [32]}), r"matvec_values\[4\] is \[32\], expected 16 or fewer as the last"),
    ],
)
def test_what_is_no_table_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        load(text)


JUNK = (None, True, False, 0, 1, 3, 8, 32, -1, 10**30, 1.5, float("nan"), float("inf"), "", "8", "tiles", "\ud800", [], [1], {}, {"a": 1})


def places(value):
    """(container, key) of everything within a JSON value."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from places(value[key])


@pytest.mark.parametrize("kind", KINDS)
def test_a_table_with_anything_anywhere_is_one_or_is_refused_by_name(kind):
    """What loads has a possible shape for every linear, and what is refused says where."""
    rng = random.Random(kind)
    text = dump(table(kind))
    loaded = refused = 0
    for _ in range(600):
        data = json.loads(text)
        for _ in range(rng.choice((1, 1, 1, 2))):
            place, key = rng.choice(list(places(data)))
            if rng.random() < 0.1:
                del place[key]
            else:
                place[key] = rng.choice(JUNK)
        try:
            tuning = load(json.dumps(data))
        except ValueError as error:
            assert str(error).startswith("tuning table: ") and len(str(error)) < 500
            assert any(name in str(error) for name in ("it ", "kind", "entries", "invariant", "_rows", "_values"))
            refused += 1
            continue
        loaded += 1
        for outputs, k, rows, bits, invariant in itertools.product((1, 4096), (1, 19456), (1, 8, 2048), (1, 4, 32), (False, True)):
            assert invalid(tuning.entry(outputs, k, rows, bits, invariant=invariant).shape) == ""
            assert tuning.planes(outputs, k, rows, bits, invariant=invariant) in PLANES
        assert load(dump(tuning)) == tuning
    assert loaded > 20 and refused > 200


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "can be read there"),
        (b"\x80\xff\x00", "JSON in UTF-8, but other bytes"),
        (b"[1]", "it is a list"),
        ("folder", "it is no file"),
    ],
)
def test_a_named_file_that_is_no_table_is_named_with_its_variable(content, message, tmp_path, monkeypatch):
    file = tmp_path / "table.json"
    if content == "folder":
        file.mkdir()
    elif content is not None:
        file.write_bytes(content)
    monkeypatch.setenv("METALSTEP_TUNING", str(file))
    for ask in (named, lambda: table("apple"), lambda: table("nvidia")):
        with pytest.raises(ValueError, match=message) as caught:
            ask()
        assert str(caught.value).startswith(f"METALSTEP_TUNING={file}: ")
        assert str(caught.value).endswith("; unset METALSTEP_TUNING, or make a new table with `metalstep tune`")


def test_a_kind_without_a_table_is_refused():
    with pytest.raises(ValueError, match="no tuning for devices of kind 'abacus'; there is one for apple, nvidia"):
        table("abacus")


def test_shapes_say_what_is_impossible():
    assert invalid(Tiles(rows=8, strips=0, columns=1, splits=1)) and invalid(Matvec(rows=4, simdgroups=4, splits=3))
    assert not invalid(Tiles(rows=64, strips=2, columns=4, splits=1))
