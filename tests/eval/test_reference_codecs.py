"""q8_0 and q4_0: the row program against numpy, numpy against the definition, and what a cache of them costs."""
import numpy as np
import pytest
from harness import Harness
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from programs import run

from metalstep.eval import reference_codecs as codecs

NAMES = sorted(codecs.BLOCK_BYTES)


@pytest.fixture(scope="module")
def h():
    with Harness(threads=1) as harness:
        yield harness


def rows(dim, heads=2):
    elements = st.floats(-1000, 1000, width=32) | st.sampled_from([0.0, -0.0, 1.0, -8.0, 127.0, 1e-3])
    return arrays.arrays(np.float32, (3, heads * dim), elements=elements)


@pytest.mark.parametrize("name", NAMES)
@given(x=st.sampled_from([32, 64, 96]).flatmap(lambda dim: st.tuples(st.just(dim), rows(dim))))
@example(x=(32, np.zeros((1, 64), np.float32)))  # a block of zeros has a scale of 0
@example(x=(64, np.full((2, 64), -3.0, np.float32)))
@example(x=(32, np.full((1, 64), 1e-38, np.float32)))
@settings(max_examples=40)
def test_the_row_program_gives_numpys_bits(h, name, x):
    dim, values = x
    got = run(h, lambda program, register: codecs.emit(name, program, register, dim), values)
    np.testing.assert_array_equal(got, codecs.reference(name, values))


def slow(name, block):
    """One block, as quantize_row_q8_0 and quantize_row_q4_0 are written down."""
    if name == "q8_0":
        d = np.float32(max(abs(block))) / np.float32(127)
    else:
        d = np.float32(max(block, key=lambda v: (abs(v), v))) / np.float32(-8)
    inverse = np.float32(1) / d if abs(d) >= np.finfo(np.float32).tiny else np.float32(0)
    stored = np.float32(np.float16(d))
    if name == "q8_0":
        return [np.float32(round(float(v * inverse))) * stored for v in block]
    return [(np.float32(min(15, int(v * inverse + np.float32(8.5)))) - np.float32(8)) * stored for v in block]


@pytest.mark.parametrize("name", NAMES)
@given(block=arrays.arrays(np.float32, 32, elements=st.floats(-100, 100, width=32)))
@example(block=np.full(32, 1e-38, np.float32))  # the inverse of its step is infinite
def test_a_block_is_the_definitions(name, block):
    np.testing.assert_array_equal(codecs.reference(name, block), np.array(slow(name, block), np.float32))


@pytest.mark.parametrize(("name", "steps"), [("q8_0", 127), ("q4_0", 8)])
@given(seed=st.integers(0, 999))
def test_the_error_is_at_most_a_step(name, steps, seed):
    """Half a step, but q4_0 has no code for the largest magnitude's opposite, and scales are float16."""
    x = np.random.default_rng(seed).standard_normal((7, 64)).astype(np.float32)
    largest = np.abs(x.reshape(7, 2, 32)).max(-1, keepdims=True)
    error = np.abs(codecs.reference(name, x) - x).reshape(7, 2, 32)
    assert (error <= largest / steps * (0.5 if name == "q8_0" else 1.0) + largest * 2.0**-10).all()


@pytest.mark.parametrize("name", NAMES)
def test_blocks_do_not_see_each_other(name):
    x = np.random.default_rng(3).standard_normal((1, 64)).astype(np.float32)
    louder = x.copy()
    louder[:, 32:] *= 100
    np.testing.assert_array_equal(codecs.reference(name, x)[:, :32], codecs.reference(name, louder)[:, :32])


def test_bytes_are_llama_cpps():
    assert [codecs.vector_bytes("q8_0", dim) for dim in (32, 64, 128)] == [34, 68, 136]
    assert [codecs.vector_bytes("q4_0", dim) for dim in (32, 64, 128)] == [18, 36, 72]


@pytest.mark.parametrize("name", NAMES)
def test_vectors_that_are_no_whole_blocks_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} takes vectors of a multiple of 32 elements, and these have 80; leave it out"):
        codecs.check_dim(name, 80)
