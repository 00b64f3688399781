"""A row whose logits are not numbers ends its own request, and nobody else notices."""
from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from hash_engine import VOCAB, Job, greedy, hash_engine
from hash_forward import HashForward

FAILS = 8  # the step in which one row does


@pytest.mark.parametrize("v2", [False, True])
@pytest.mark.parametrize("async_scheduling", [False, True])
def test_a_row_that_fails_ends_its_request_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, async_scheduling: bool, v2: bool) -> None:
    draw = random.Random(1)
    jobs = [Job([draw.randrange(10, VOCAB) for _ in range(20 + i)], greedy(20)) for i in range(4)]
    start, steps, finished = HashForward.start, [0], {}

    def failing(self, session, step):
        plan, logits = start(self, session, step)
        steps[0] += 1
        if steps[0] == FAILS:
            self._logits[1] = np.nan
        return plan, logits

    with hash_engine(tmp_path, monkeypatch, v2=v2, async_scheduling=async_scheduling) as engine:
        monkeypatch.setattr(HashForward, "start", failing)
        take = engine._take

        def taken(*given):
            output = given[-1]
            if output.finished:
                finished[output.request_id] = output.outputs[0].finish_reason
            return take(*given)

        monkeypatch.setattr(engine, "_take", taken)
        engine.run(jobs)
        assert sorted(finished.values()) == ["error", "length", "length", "length"]
        engine.check_idle()
