"""Memory that plans have in common: nobody gets the same twice, and rows of logits lent from it stay what they were."""
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from metalstep.kernels.native import NativeDevice
from metalstep.plan.logits import HostRow, LogitsRing
from metalstep.plan.step_memory import StepMemory


@given(plans=st.lists(st.lists(st.integers(1, 5000), min_size=1, max_size=4), min_size=1, max_size=6))
def test_a_plan_s_buffers_are_apart_and_later_plans_use_them_again(plans):
    with NativeDevice.open("host") as device:
        memory, handles = StepMemory(device), set()
        for sizes in sorted(plans, reverse=True, key=lambda sizes: sorted(sizes, reverse=True)):
            taken = []
            for size in sizes:
                owner = memory.take(size, taken)
                assert owner.nbytes >= size and owner.handle not in taken
                taken.append(owner.handle)
            handles.update(taken)
        assert len(memory._owners) == len(handles)
        again = [memory.take(size, ()).handle for sizes in plans for size in sizes]
        assert set(again) <= handles


@given(steps=st.lists(st.tuples(st.integers(0, 2), st.booleans()), min_size=1, max_size=20))
def test_rows_lent_by_any_plan_outlive_the_steps_of_all(steps):
    """Three plans in one memory, the last with places of its own for logits: its steps overwrite the others' all the same."""
    with NativeDevice.open("host") as device:
        memory = StepMemory(device)
        arena = np.zeros((2, 5), np.float32)
        own = [np.zeros((2, 5), np.float32) for _ in range(2)]
        rows, lent = [[list(map(HostRow, place)) for place in places] for places in ([arena], own)], []
        rings = [LogitsRing(rows[0], memory.lent), LogitsRing(rows[0], memory.lent), LogitsRing(rows[1])]
        for number, (plan, kept) in enumerate(steps):
            ring = rings[plan]
            memory.keep_lent()
            place = ring.advance()
            arena[:] = np.nan
            (own if plan == 2 else [arena])[place][:] = [[number], [-number]]
            rows = [ring.lend(row) for row in (0, 1)]
            if kept:
                lent.append((number, rows))
        for number, rows in lent:
            assert [set(row.numpy().tolist()) for row in rows] == [{number}, {-number}]
