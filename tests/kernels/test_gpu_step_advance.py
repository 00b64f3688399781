"""step_advance on a GPU: what it does to the step's inputs, and that K steps of one run are K runs of one step."""
from dataclasses import replace

import pytest
import step_advances
from hypothesis import example, given, settings
from hypothesis import strategies as st
from samples import STEP

from metalstep.kernels.gpu import step_advance


@given(
    seed=st.integers(0, 9999), rows=st.integers(0, 9) | st.sampled_from([64, 65, 130]), groups=st.integers(1, 3),
    block_size=st.sampled_from([1, 3, 16]), advance=st.booleans(), index=st.integers(0, 3), thread_order=st.integers(0, 3),
)  # fmt: skip
@example(seed=1, rows=130, groups=3, block_size=3, advance=True, index=2, thread_order=1)
@settings(max_examples=30, deadline=None)
def test_rows_move_to_their_next_position(g, seed, rows, groups, block_size, advance, index, thread_order):
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("METALSTEP_SIM_SEED", str(thread_order))
        step_advances.check_rows(g, seed, rows, groups, block_size, advance, index)


# ---- steps of one run ---------------------------------------------------------------------------------------------------------
@given(seed=st.integers(0, 9999), rows=st.integers(1, 5), steps=st.integers(1, 6), vocab=st.sampled_from([5, 2049]))
@settings(max_examples=12, deadline=None)
def test_steps_of_one_run_are_runs_of_one_step(g, seed, rows, steps, vocab):
    step_advances.check_steps(g, seed, rows, steps, vocab)


# ---- refusals -----------------------------------------------------------------------------------------------------------------
def test_a_group_has_block_tables_and_a_slot_mapping(g):
    step = g.step(1)
    with pytest.raises(ValueError, match="there are 2 slot mappings and 1 block tables; give each group"):
        step_advance.launches(replace(step, slot_mappings=step.slot_mappings * 2), block_size=16, max_rows=1)
    for sizes in (dict(block_size=0, max_rows=1), dict(block_size=16, max_rows=0)):
        with pytest.raises(ValueError, match="expected 1 or more"):
            step_advance.launches(step, **sizes)


@pytest.mark.parametrize("groups", [0, step_advance.MAX_GROUPS])
def test_as_many_groups_as_metal_binds_buffers(g, groups):
    step = g.step(2, sampled=[1])
    step = replace(step, slot_mappings=step.slot_mappings * groups, block_tables=step.block_tables * groups)
    g.run(step_advance.launches(step, block_size=16, max_rows=1), 2)
    assert g.get(step.step, STEP, (1,))["index"] == 1
    more = replace(step, slot_mappings=step.slot_mappings * 20, block_tables=step.block_tables * 20)
    if groups:
        with pytest.raises(NotImplementedError, match=f"groups of layers, and a GPU's launch binds {groups}; share block tables"):
            step_advance.launches(more, block_size=16, max_rows=1)
