"""limits: reads every word as often as it says, computes whatever the number of threads, and refuses what does not fit."""
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from programs import own_buffers

from metalstep.kernels import limits, params
from metalstep.kernels.launch import Buffer, Launch


@given(seed=st.integers(0, 9999), words=st.integers(1, 1500), rounds=st.integers(1, 4), threads=st.integers(1, 3))
@example(seed=1, words=1, rounds=1, threads=3)
@example(seed=2, words=129, rounds=3, threads=1)
@settings(max_examples=40)
def test_a_read_sums_every_word_in_every_round(by_threads, seed, words, rounds, threads):
    h = by_threads[threads]
    values = np.random.default_rng(seed).integers(0, 1 << 32, words, np.uint32)
    with own_buffers(h):
        out = h.put(np.zeros(threads, np.uint32))
        h.run(limits.launches("read", h.put(values), out, rounds=rounds), 1)
        total = int(h.get(out, np.uint32).sum(dtype=np.uint64))
    assert total % (1 << 32) == rounds * int(values.sum(dtype=np.uint64)) % (1 << 32)


@pytest.mark.parametrize("threads", [1, 3])
def test_multiply_adds_tend_to_the_fixed_point_and_products_grow_with_the_rounds(by_threads, threads):
    """x = x / 2 + 1 is 2 in the end, in every lane of every thread alike; sums of the same products are linear in the rounds."""
    h = by_threads[threads]
    with own_buffers(h):
        words, out = h.put(np.full(params.MS_LIMITS_OPERANDS, 0x01010101, np.uint32)), h.put(np.zeros(threads, np.uint32))
        h.run(limits.launches("fma", words, out, rounds=2), 1)
        sums = h.get(out, np.uint32).view(np.float32)
        assert (sums == sums[0]).all() and sums[0] % 2 == 0 and sums[0] >= 2 * 4
        for kind in ("dot_int16", "dot_int8"):
            found = []
            for rounds in (1, 3):
                h.run(limits.launches(kind, words, out, rounds=rounds), 1)
                found.append(h.get(out, np.uint32).astype(np.uint64))
            assert found[0].all() and ((3 * found[0]) % (1 << 32) == found[1]).all()


def constants(**fields):
    return params.pack("MSLimitsParams", **(dict(kind=params.MS_LIMIT_READ, words=8, rounds=1, results=64) | fields))


@pytest.mark.parametrize(
    ("constants", "binds", "why"),
    [
        (b"", 2, "constants are not one MSLimitsParams"),
        (constants(), 1, "fewer bindings than ms_limits_slot names"),
        (constants(kind=4), 2, "kind is none of ms_limit"),
        (constants(rounds=0), 2, "rounds is not 1 to MS_LIMITS_MAX_ROUNDS"),
        (constants(rounds=2**32 - 1), 2, "rounds is not 1 to MS_LIMITS_MAX_ROUNDS"),
        (constants(kind=params.MS_LIMIT_DOT_INT8), 2, "words is below MS_LIMITS_OPERANDS"),
        (constants(results=0), 2, "fewer results than threads"),
    ],
)
def test_constants_that_do_not_fit_are_refused(h, constants, binds, why):
    bindings = [h.empty((64,)) for _ in range(binds)]
    with pytest.raises(ValueError, match=rf"launch 0 \(limits\): .*{why}"):
        h.device.create_plan([Launch("limits", bindings, constants, (1, 1, 1), (1, 1, 1))], 1, 1)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (dict(kind="write"), "kind is 'write', expected one of read, fma, dot_int16, dot_int8"),
        (dict(words=Buffer(0, 0, (8,), "float32")), "words has dtype float32, expected uint32"),
        (dict(kind="fma"), "words has 8 elements, expected 4096 or more"),
        (dict(rounds=0), "rounds is 0, expected 1 to"),
    ],
)
def test_a_wrong_call_is_refused(changes, why):
    call = dict(kind="read", words=Buffer(0, 0, (8,), "uint32"), out=Buffer(1, 0, (1,), "uint32"), rounds=1) | changes
    with pytest.raises(ValueError, match=f"limits: {why}"):
        limits.launches(call.pop("kind"), call.pop("words"), call.pop("out"), **call)
