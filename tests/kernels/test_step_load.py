"""step_load: what it makes of a stage, and what it refuses."""
import numpy as np
import pytest
import step_loads
from hypothesis import example, given, settings
from hypothesis import strategies as st
from programs import own_buffers

from metalstep.kernels import params, step_load
from metalstep.kernels.launch import Buffer, Launch


@given(
    seed=st.integers(0, 9999), words=st.integers(1, 200), place=st.floats(0, 1), share=st.floats(0, 1), steps=st.integers(1, 3),
    max_rows=st.integers(1, 5), threads=st.integers(1, 3),
)  # fmt: skip
@example(seed=1, words=1, place=0.0, share=1.0, steps=1, max_rows=1, threads=3)
@example(seed=2, words=50, place=1.0, share=1.0, steps=1, max_rows=2, threads=2)
@settings(max_examples=80)
def test_words_are_the_stage_s_and_tokens_their_source_s(by_threads, seed, words, place, share, steps, max_rows, threads):
    step_loads.check_words(by_threads[threads], seed, words, place, share, steps, max_rows)


def test_a_source_below_zero_keeps_the_token_and_a_failed_row_gives_zero(by_threads):
    for harness in by_threads.values():
        step_loads.check_laws(harness)


# ---- steps one behind the other -----------------------------------------------------------------------------------------------
def test_loads_in_flight_see_the_results_of_the_run_before(by_threads):
    """What the results are when a launch starts counts, not what they were when it was queued."""
    h = by_threads[2]
    with own_buffers(h):
        results = [h.put(np.zeros(1, params.record("MSSampled")).view(np.uint8)) for _ in range(2)]
        stages = [h.put(np.array([token, 0, 0, 0, -1, -1, -1, -1], np.int32)) for token in (5, 9)]
        region = h.put(np.zeros(4, np.int32))
        first = h.step_load_launches(stages[0], results[0], results[1], words=4, tokens_first=0, max_tokens=4)  # a result of 5
        h.device.numpy(stages[1], np.int32, (8,))[4] = 0
        second = h.step_load_launches(stages[1], results[1], region, words=4, tokens_first=0, max_tokens=4)
        plans = [h.device.create_plan(launches, 1, 1) for launches in (first, second)]
        tickets = [plan.run() for plan in plans]
        plans[1].wait(tickets[1])
        for plan in plans:
            plan.close()
        assert h.get(region, np.int32).tolist() == [5, 0, 0, 0]


# ---- refusals -----------------------------------------------------------------------------------------------------------------
def constants(**fields):
    return params.pack("MSStepLoadParams", **(dict(words=8, tokens_first=2, max_tokens=6) | fields))


@pytest.mark.parametrize(
    ("constants", "binds", "why"),
    [
        (b"", 3, "constants are not one MSStepLoadParams"),
        (constants() + bytes(4), 3, "constants are not one MSStepLoadParams"),
        (constants(), 2, "fewer bindings than ms_step_load_slot names"),
        (constants(words=0, tokens_first=0, max_tokens=0), 3, "words is 0"),
        (constants(max_tokens=7), 3, "the tokens end behind the last word"),
        (constants(tokens_first=9, max_tokens=0), 3, "the tokens end behind the last word"),
        (constants(tokens_first=2**32 - 1, max_tokens=2), 3, "the tokens end behind the last word"),
        (constants(tokens_first=2, max_tokens=2**32 - 1), 3, "the tokens end behind the last word"),
    ],
)
def test_constants_that_do_not_fit_are_refused(h, constants, binds, why):
    bindings = [h.empty((64,)) for _ in range(binds)]
    with pytest.raises(ValueError, match=rf"launch 0 \(step_load\): .*{why}"):
        h.device.create_plan([Launch("step_load", bindings, constants, (1, 1, 1), (1, 1, 1))], 1, 1)


def region(handle, nbytes, offset=0):
    return Buffer(handle, offset, (nbytes,), "uint8")


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (dict(words=0, tokens_first=0, max_tokens=0), "tokens 0 to 0 of 0 words, expected a part of at least 1 word"),
        (dict(tokens_first=-1), "tokens -1 to 3 of 8 words"),
        (dict(max_tokens=-1), "tokens 2 to 1 of 8 words"),
        (dict(tokens_first=5), "tokens 5 to 9 of 8 words"),
        (dict(stage=region(1, 47)), "stage is 47 bytes at offset 0, expected 48 or more at a multiple of 4"),
        (dict(stage=region(1, 48, 2)), "stage is 48 bytes at offset 2, expected 48 or more"),
        (dict(sampled=region(2, 15)), "sampled is 15 bytes at offset 0, expected 16 or more"),
        (dict(region=region(3, 31)), "region is 31 bytes at offset 0, expected 32 or more"),
        (dict(region=region(1, 32, 44)), "the region overlaps stage, expected a place of its own"),
        (dict(region=region(2, 32)), "the region overlaps sampled, expected a place of its own"),
    ],
)
def test_sizes_and_places_that_do_not_fit_are_refused(changes, why):
    fields = dict(stage=region(1, 48), sampled=region(2, 16), region=region(3, 32), words=8, tokens_first=2, max_tokens=4)
    [launch] = step_load.launches(**fields)
    assert [buffer.handle for buffer in launch.bindings] == [1, 2, 3]
    assert step_load.launches(**fields | dict(region=region(1, 32, 48)))  # of one buffer, side by side
    with pytest.raises(ValueError, match=f"step_load: .*{why}"):
        step_load.launches(**fields | changes)
