"""Sleep and wake up: what is asleep holds no model, and a wake-up that fails leaves it asleep."""
from __future__ import annotations

import random

import pytest
from hash_engine import VOCAB, Job, greedy, hash_engine
from hash_worker import HashModel


def test_a_wake_up_that_fails_can_be_tried_again(tmp_path, monkeypatch):
    """As where another process has the memory, and gives it back later."""
    draw = random.Random(5)
    jobs = [Job([draw.randrange(10, VOCAB) for _ in range(20 + i)], greedy(10)) for i in range(4)]
    failed = []

    def fail(model, *_, **__):
        failed.append(model)
        raise MemoryError("buffer: 20 GB are more than the device has left")

    with hash_engine(tmp_path, monkeypatch, enable_sleep_mode=True) as engine:
        engine.check(jobs)
        engine.llm.sleep()
        with monkeypatch.context() as patched:
            patched.setattr(HashModel, "allocate", fail)
            for _ in range(2):
                with pytest.raises(MemoryError, match="20 GB"):
                    engine.llm.wake_up()
                assert engine.stats() == {"asleep": True}
        assert len(failed) == 2
        for model in failed:
            with pytest.raises(ValueError, match="the device is closed"):
                model.device.create_buffer(1)
        engine.llm.wake_up()
        engine.check(jobs)
        engine.check_idle()
