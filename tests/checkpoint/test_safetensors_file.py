"""The safetensors header: what files say, and what is refused."""
import json

import mlx.core as mx
import numpy as np
import pytest
from checkpoint_files import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st

from metalstep.checkpoint import CheckpointError
from metalstep.checkpoint.mapped_file import MappedFile
from metalstep.checkpoint.safetensors_file import read_safetensors

DTYPES = [
    *(mx.bool_, mx.uint8, mx.uint16, mx.uint32, mx.uint64, mx.int8, mx.int16, mx.int32, mx.int64),
    *(mx.float16, mx.bfloat16, mx.float32),
]


def read(path, data):
    path.write_bytes(data)
    file = MappedFile(path)
    try:
        return {name: (tensor.dtype, tensor.shape, tensor.numpy()) for name, tensor in read_safetensors(file).items()}
    finally:
        file.close()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_files_that_mlx_writes_are_read_back(tmp_path, dtype):
    arrays = {"a": (mx.arange(12).reshape(3, 4) - 5).astype(dtype), "b": mx.array(1).astype(dtype), "c": mx.zeros((0, 3), dtype)}
    mx.save_safetensors(str(tmp_path / "x.safetensors"), arrays)
    for name, (found, shape, values) in read(tmp_path / "x.safetensors", (tmp_path / "x.safetensors").read_bytes()).items():
        expected = arrays[name].astype(mx.float32) if mx.issubdtype(dtype, mx.floating) else arrays[name]
        assert found == str(dtype).removeprefix("mlx.core.").removesuffix("_")
        assert shape == expected.shape
        np.testing.assert_array_equal(values, np.array(expected))
        assert values.dtype == np.array(expected).dtype


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "the file is empty"),
        (b"abc", "3 bytes long, expected at least the 8 bytes"),
        (safetensors({}, length=1 << 40), "the header is said to be 1099511627776 bytes long, expected at most 2"),
        (safetensors({}, length=(1 << 64) - 1), "the header is said to be"),
        (safetensors(b"{"), "the header is not JSON"),
        (safetensors(b'{"\xff": 1}'), "the header is not JSON"),
        (safetensors(b"[" * 100_000), "the header is not JSON"),
        (safetensors([1]), "a JSON list, expected an object"),
        (safetensors(b'{"a": 1, "a": 2}'), "the name 'a' appears twice"),
        (safetensors({"__metadata__": {"a": 1}}), "__metadata__ is no object of strings"),
        (safetensors({"a": 1}), "tensor 'a' has no dtype, shape and data_offsets"),
        (safetensors({"a": {"dtype": "F32"}}), "tensor 'a' has no dtype, shape and data_offsets"),
        (safetensors({"a": entry("F4")}, bytes(8)), "dtype 'F4', expected one of BOOL.*mlx_lm.convert"),
        (safetensors({"a": entry(shape=(-2,))}, bytes(8)), "shape .-2., expected up to 8 sizes"),
        (safetensors({"a": entry(shape=(2.0,))}, bytes(8)), "shape .2.0., expected"),
        (safetensors({"a": entry(shape=(True,))}, bytes(8)), "shape .True., expected"),
        (safetensors({"a": entry(shape=(1,) * 9)}, bytes(8)), "expected up to 8 sizes"),
        (safetensors({"a": entry(shape=(1 << 62, 1 << 62))}, bytes(8)), "expected up to 8 sizes of 31 bits"),
        (safetensors({"a": entry(shape=(1 << 30, 1 << 30))}, bytes(8)), "has 8 bytes, expected 4611686018427387904"),
        (safetensors({"a": entry(shape=(3,))}, bytes(8)), "has 8 bytes, expected 12 for F32 .3."),
        (safetensors({"a": entry(offsets=(8, 0))}, bytes(8)), "data_offsets .8, 0., expected"),
        (safetensors({"a": entry(offsets=(0, 8, 9))}, bytes(8)), "data_offsets"),
        (safetensors({"a": entry()}, bytes(7)), "tensor 'a' ends at byte .*, but the file has"),
        (safetensors({"a": entry(offsets=(1 << 70, (1 << 70) + 8))}, bytes(8)), "ends at byte"),
        (safetensors({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12)), "tensors 'a' and 'b' overlap"),
    ],
)
def test_damaged_headers_are_refused_by_name(tmp_path, data, text):
    with pytest.raises(CheckpointError, match=text):
        read(tmp_path / "x.safetensors", data)


ENTRIES = {"a": entry(), "b": entry("BF16", (2, 2), (8, 16)), "c": entry("U8", (), (16, 17))}
VALID = safetensors({"__metadata__": {"format": "mlx"}, **ENTRIES}, bytes(17))
JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=3), lambda inner: st.lists(inner, max_size=3))


@settings(max_examples=300)
@given(changes=st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 255)), max_size=4), cut=st.integers(0, len(VALID)))
def test_mutated_files_never_crash(tmp_path_factory, changes, cut):
    data = bytearray(VALID)
    for at, byte in changes:
        data[at] = byte
    refuses_or_reads(tmp_path_factory, bytes(data[: cut or None]))


@settings(max_examples=200)
@given(dtype=JSON | st.just("F32"), shape=JSON | st.lists(st.integers(0, 1 << 70)), offsets=JSON | st.just([0, 8]))
def test_any_json_for_a_field_never_crashes(tmp_path_factory, dtype, shape, offsets):
    header = json.dumps({"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}})
    refuses_or_reads(tmp_path_factory, safetensors(header.encode("utf-8", "surrogatepass"), bytes(8)))


def refuses_or_reads(tmp_path_factory, data):
    try:
        read(tmp_path_factory.getbasetemp() / "fuzz.safetensors", data)
    except CheckpointError as error:
        assert str(error)
