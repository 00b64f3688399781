"""params: structs and constants as the headers have them."""
import re
import struct
from importlib import resources

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metalstep.kernels import check, params
from metalstep.kernels.launch import Buffer

WORD = st.integers(0, 2**32 - 1)


def test_every_enumerator_of_the_headers_is_an_attribute():
    for header in params.HEADERS:
        text = (resources.files("metalstep.metal") / header).read_text()
        for name, value in re.findall(r"\b(MS_\w+)\s*=\s*(0x[0-9a-f]+|\d+)\s*[,}]", text):
            assert getattr(params, name) == int(value, 0), name


def test_an_unknown_constant_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no constant 'MS_OP_NOTHING'"):
        _ = params.MS_OP_NOTHING


@given(dst=WORD, n=WORD, imm0=st.floats(width=32, allow_nan=False), strides=st.lists(st.integers(-(2**31), 2**31 - 1), max_size=4))
def test_fields_land_where_the_header_puts_them(dst, n, imm0, strides):
    packed = params.pack("MSInstr", op=params.MS_OP_GATHER, dst=dst, n=n, imm0=imm0, strides=strides)
    words = struct.unpack("<8I3f10I4i", packed)
    assert words[0] == params.MS_OP_GATHER and words[1] == dst and words[5] == n and words[8] == imm0
    assert list(words[21:]) == strides + [0] * (4 - len(strides))
    assert len(packed) == params.size("MSInstr") == 100


def test_fields_that_are_not_given_are_zero():
    assert params.pack("MSLinearParams") == bytes(params.size("MSLinearParams"))


def test_records_are_the_structs_of_the_headers():
    values = [(3, 0.5), (-1, 0.25), (2**31 - 1, -1.125)]
    records = np.array(values, params.record("MSTokenBias"))
    assert records.tobytes() == b"".join(struct.pack("<if", *row) for row in values)
    sampling = np.zeros(1, params.record("MSSampling"))
    sampling["target"], sampling["counter"] = -1, 2**32 - 1
    assert sampling.tobytes() == params.pack("MSSampling", target=-1, counter=2**32 - 1)
    assert np.array([(-1, 0.5, 2, 3)], params.record("MSSampled")).tobytes() == struct.pack("<if2I", -1, 0.5, 2, 3)
    with pytest.raises(TypeError, match="no struct 'MSNothing'"):
        params.record("MSNothing")


def test_numpy_numbers_are_numbers():
    assert params.pack("MSTokenBias", token=np.int64(49152), bias=np.float32(0.5)) == struct.pack("<if", 49152, 0.5)


@pytest.mark.parametrize(
    "struct_name, fields, error, text",
    [
        ("MSInstr", {"width": 1}, TypeError, "MSInstr has no field 'width'; it has op, dst, a, b, c, n"),
        ("MSNothing", {}, TypeError, "no struct 'MSNothing'"),
        ("int32_t", {}, TypeError, "no struct 'int32_t'"),
        ("a b c", {}, TypeError, "no struct 'a b c'"),
        ("MSInstr", {"n": -1}, ValueError, "MSInstr.n cannot be -1"),
        ("MSInstr", {"n": 2**32}, ValueError, "MSInstr.n cannot be 4294967296"),
        ("MSInstr", {"dims": [1, 2, 3, 4, 5]}, ValueError, r"MSInstr.dims cannot be \[1, 2, 3, 4, 5\]"),
        ("MSInstr", {"n": 1.5}, TypeError, "MSInstr.n cannot be 1.5"),
        ("MSInstr", {"imm0": "one"}, TypeError, "MSInstr.imm0 cannot be 'one'"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(struct_name, fields, error, text):
    with pytest.raises(error, match=text):
        params.pack(struct_name, **fields)


def test_checks_say_what_was_wrong_and_what_was_expected():
    x = Buffer(0, 0, (4, 32), "float32")
    check.shape("norm", "x", x, (4, 32), "the step's rows")
    check.dtype("norm", "x", x, ["float32", "float16"])
    check.divides("attention", "num_q_heads", 9, "num_kv_heads", 3)
    with pytest.raises(ValueError, match=r"norm: x has shape \(4, 32\), expected \(4, 64\) \(hidden_size\)"):
        check.shape("norm", "x", x, (4, 64), "hidden_size")
    with pytest.raises(ValueError, match="norm: x is float32, expected float16 or bfloat16"):
        check.dtype("norm", "x", x, ["float16", "bfloat16"])
    for value, by in [(8, 3), (8, 0), (0, 3), (-3, 3)]:
        with pytest.raises(ValueError, match=f"num_q_heads is {value}, expected a positive multiple of num_kv_heads"):
            check.divides("attention", "num_q_heads", value, "num_kv_heads", by)


def test_a_region_knows_its_bytes():
    assert Buffer(0, 0, (3, 5), "bfloat16").nbytes == 30
    assert Buffer(0, 0, (), "float32").nbytes == 4
    with pytest.raises(ValueError, match="dtype 'complex64' is unknown"):
        _ = Buffer(0, 0, (1,), "complex64").nbytes
