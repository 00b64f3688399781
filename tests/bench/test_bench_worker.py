"""What a worker makes of an engine's steps."""

import itertools

from hypothesis import example, given
from hypothesis import strategies as st

from metalstep.bench.worker import measure


class Counting:
    """An engine whose sequence i says i, i + 1000, .. after `delays[i]` steps, `per_step` tokens a step."""

    version = "0"

    def __init__(self, delays, per_step):
        self.delays, self.per_step = delays, per_step
        self.closed = False

    def greedy(self, prompts, tokens, **settings):
        self.settings = settings
        said = [itertools.count(i, 1000) for i in range(len(prompts))]
        try:
            yield [[] for _ in prompts]
            for step in itertools.count():
                yield [
                    [next(said[i]) for _ in range(self.per_step)] if step >= delay else []
                    for i, delay in enumerate(self.delays)
                ]
        finally:
            self.closed = True


@given(delays=st.lists(st.integers(0, 5), min_size=1, max_size=8), per_step=st.integers(1, 8), tokens=st.integers(0, 20))
@example(delays=[0, 3], per_step=1, tokens=5)  # the first sequence is ahead: what it has is not counted
def test_timed_are_the_tokens_behind_everyones_first(delays, per_step, tokens):
    engine = Counting(delays, per_step)
    result = measure(engine, [[1]] * len(delays), tokens, some="setting")
    assert engine.closed
    assert engine.settings == {"some": "setting"}
    assert len(result["steps_s"]) == len(result["step_tokens"]) == -(-tokens // per_step)
    assert all(count == len(delays) * per_step for count in result["step_tokens"])
    for i, ids in enumerate(result["ids"]):
        assert len(ids) >= tokens + 1
        assert ids == [i + 1000 * n for n in range(len(ids))]
