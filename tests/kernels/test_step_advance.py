"""step_advance: what it does to the step's inputs, and that K steps of one run are K runs of one step."""
from dataclasses import replace

import numpy as np
import pytest
import step_advances
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import own_buffers

from metalstep.kernels import params, step_advance
from metalstep.kernels.launch import Launch


@given(
    seed=st.integers(0, 9999), rows=st.integers(0, 9), groups=st.integers(1, 3), block_size=st.sampled_from([1, 3, 16]),
    advance=st.booleans(), index=st.integers(0, 3), threads=st.integers(1, 3),
)  # fmt: skip
@settings(max_examples=60)
def test_rows_move_to_their_next_position(by_threads, seed, rows, groups, block_size, advance, index, threads):
    step_advances.check_rows(by_threads[threads], seed, rows, groups, block_size, advance, index)


# ---- steps of one run ---------------------------------------------------------------------------------------------------------
@given(
    seed=st.integers(0, 9999), rows=st.integers(1, 9), steps=st.integers(1, 6), threads=st.integers(1, 3), vocab=st.sampled_from([5, 4097]),
)  # fmt: skip
@settings(max_examples=30)
def test_steps_of_one_run_are_runs_of_one_step(by_threads, seed, rows, steps, threads, vocab):
    step_advances.check_steps(by_threads[threads], seed, rows, steps, vocab)


# ---- refusals -----------------------------------------------------------------------------------------------------------------
def constants(**fields):
    return params.pack("MSStepAdvanceParams", **(dict(block_size=16, groups=1, max_rows=1) | fields))


@pytest.mark.parametrize(
    ("constants", "binds", "why"),
    [
        (b"", 10, "constants are not one MSStepAdvanceParams"),
        (constants(block_size=0), 10, "block_size is 0"),
        (constants(max_rows=0), 10, "max_rows is less than the sampled rows"),
        (constants(groups=2), 10, "fewer bindings than ms_step_advance_slot names"),
        (constants(groups=2**31), 10, "fewer bindings than ms_step_advance_slot names"),
        (constants(groups=2**32 - 1), 10, "fewer bindings than ms_step_advance_slot names"),
        (constants(groups=0), 7, "fewer bindings than ms_step_advance_slot names"),
    ],
)
def test_constants_that_do_not_fit_are_refused(h, constants, binds, why):
    bindings = [h.empty((64,)) for _ in range(binds)]
    with pytest.raises(ValueError, match=rf"launch 0 \(step_advance\): .*{why}"):
        h.device.create_plan([Launch("step_advance", bindings, constants, (1, 1, 1), (1, 1, 1))], 1, 1)


@given(words=st.lists(st.integers(0, 40) | st.integers(0, 2**32 - 1), max_size=4))
@settings(max_examples=40)
def test_any_constants_are_refused_or_run(h, words):
    """The step is zero: no rows."""
    with own_buffers(h):
        bindings = [h.put(np.zeros(64, np.float32)) for _ in range(12)]
        launch = Launch("step_advance", bindings, np.array(words, np.uint32).tobytes(), (1, 1, 1), (1, 1, 1))
        try:
            plan = h.device.create_plan([launch], 1, 1)
        except ValueError as error:
            assert str(error)
            return
        plan.wait(plan.run(1))
        plan.close()


def test_a_group_has_block_tables_and_a_slot_mapping(h):
    step = h.step(1)
    with pytest.raises(ValueError, match="there are 2 slot mappings and 1 block tables; give each group"):
        step_advance.launches(replace(step, slot_mappings=step.slot_mappings * 2), block_size=16, max_rows=1)
    for sizes in (dict(block_size=0, max_rows=1), dict(block_size=16, max_rows=0)):
        with pytest.raises(ValueError, match="expected 1 or more"):
            step_advance.launches(step, **sizes)
