"""One thread at a time, visitors first, and no interrupt that others have to wait for."""
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from interrupt_at import InterruptAt

from metalstep.turn import LOOK_SECONDS, Turn


def take(turn, body):
    """As the engine does it: again until it was this thread's turn."""
    while (result := turn.run(body)) is None:
        turn.sleep()
    return result


@pytest.mark.parametrize("enter", [take, Turn.visit])
def test_bodies_never_overlap(enter):
    turn, inside, most = Turn(), [], []

    def body():
        inside.append(1)
        most.append(len(inside))
        inside.pop()
        return True

    def work(i):
        for _ in range(300):
            (enter if i % 2 else Turn.visit)(turn, body)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(most) == 1800 and set(most) == {1}


@pytest.mark.parametrize("enter", [Turn.run, Turn.visit])
def test_a_turn_inside_of_a_turn_is_refused(enter):
    turn = Turn()

    def nested():
        assert turn.mine
        with pytest.raises(RuntimeError, match="called from inside of its own step"):
            enter(turn, lambda: True)
        return True

    assert enter(turn, nested) and not turn.mine
    assert Turn.visit(Turn(), lambda: enter(turn, lambda: True))  # another engine's


@pytest.mark.parametrize("enter", [Turn.run, Turn.visit])
def test_it_is_refused_while_somebody_waits_for_the_turn_too(enter):
    turn, visited = Turn(), []
    visitor = threading.Thread(target=lambda: turn.visit(lambda: visited.append(1) or True))

    def body():
        visitor.start()
        while not turn.awaited:
            pass
        with pytest.raises(RuntimeError, match="called from inside of its own step"):
            enter(turn, lambda: True)
        return True

    assert turn.run(body)
    visitor.join()
    assert visited == [1]


def test_a_visit_of_its_own_that_was_left_behind_holds_a_thread_up_no_longer():
    """Two interrupts, one in the clean-up of the other, can leave it."""
    turn = Turn()
    turn._visitors[threading.get_ident()] = None
    assert turn.run(lambda: 5) == 5


def test_a_result_and_an_error_come_through():
    turn = Turn()
    assert turn.visit(lambda: None) is None and turn.run(lambda: 5) == 5
    for enter in (turn.run, turn.visit):
        with pytest.raises(ZeroDivisionError):
            enter(lambda: 1 // 0)
    assert turn.run(lambda: 6) == 6


@settings(max_examples=40)
@given(points=st.lists(st.integers(1, 160), min_size=1, max_size=3), visits=st.booleans(), contended=st.booleans())
def test_whoever_is_interrupted_has_left(points, visits, contended):
    """In the middle of entering, leaving, sleeping or waking others. Several at once take a moment longer to be noticed."""
    turn, done, turns = Turn(), threading.Event(), []

    def other():
        while not done.is_set() or not turns:
            turns.append(take(turn, lambda: True))

    thread = threading.Thread(target=other, daemon=True)
    if contended:
        thread.start()
    for _ in range(3):
        try:
            with InterruptAt(points):
                (turn.visit if visits else turn.run)(lambda: True)
        except KeyboardInterrupt:
            assert not turn.mine
    if not contended:
        thread.start()
    done.set()
    thread.join(timeout=60 + LOOK_SECONDS)
    assert not thread.is_alive()
    assert turn.visit(lambda: 7) == 7 and not turn._visitors and not turn._holder
