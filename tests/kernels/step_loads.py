"""What step_load must do on any device."""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from harness import Harness
from programs import own_buffers
from samples import SAMPLED, assert_same

from metalstep.kernels import params, step_load
from metalstep.kernels.launch import Buffer

GUARD = 7  # words on either side of the region that must stay


@dataclass(frozen=True)
class Loaded:
    """What a launch was given, and what it left: the region's words, and those around it."""

    stage: np.ndarray
    sampled: np.ndarray
    region: np.ndarray
    around: np.ndarray


def load(h: Harness, stage: np.ndarray, sampled: np.ndarray, **sizes: int) -> Loaded:
    """Run it on a region full of -7."""
    words = sizes["words"]
    with own_buffers(h):
        whole = h.put(np.full(words + 2 * GUARD, -7, np.int32))
        region = Buffer(whole.handle, 4 * GUARD, (words,), "int32")
        stage_buffer, sampled_buffer = h.put(stage), h.put(sampled.view(np.uint8))
        h.run(h.step_load_launches(stage_buffer, sampled_buffer, region, **sizes), 1)
        left = h.get(whole, np.int32)
        assert_same(h.get(stage_buffer, np.int32), stage)
        assert_same(h.get(sampled_buffer, SAMPLED, sampled.shape), sampled)
    return Loaded(stage, sampled, left[GUARD:-GUARD], np.concatenate([left[:GUARD], left[-GUARD:]]))


def check_words(h: Harness, seed: int, words: int, place: float, share: float, steps: int, max_rows: int) -> None:
    """Any words, NaN among them; tokens anywhere in the region, none and all of it included."""
    rng = np.random.default_rng(seed)
    tokens_first = int(place * words)
    max_tokens = int(share * (words - tokens_first))
    stage = np.concatenate(
        [rng.integers(-(2**31), 2**31, words), rng.integers(-2, steps * max_rows, max_tokens)], dtype=np.int32, casting="same_kind"
    )
    sampled = np.zeros((steps, max_rows), SAMPLED)
    sampled["token"] = rng.integers(0, 2**31, sampled.shape)
    sampled["status"] = rng.choice([params.MS_SAMPLE_OK, params.MS_SAMPLE_NOT_FINITE, params.MS_SAMPLE_NOTHING_ALLOWED], sampled.shape)
    sizes = dict(words=words, tokens_first=tokens_first, max_tokens=max_tokens)
    loaded = load(h, stage, sampled, **sizes)
    assert_same(loaded.region, step_load.reference(stage, sampled, **sizes))
    assert (loaded.around == -7).all()


def check_laws(h: Harness) -> None:
    """The cases by name: a token that the host knows, one of the run's first step, one of its last, and rows that have failed."""
    sampled = np.zeros((2, 3), SAMPLED)
    sampled["token"] = [[10, 11, 12], [20, 21, 22]]
    sampled["status"][0, 1] = params.MS_SAMPLE_NOT_FINITE
    sampled["status"][1, 0] = params.MS_SAMPLE_NOTHING_ALLOWED
    staged, sources = np.arange(100, 108, dtype=np.int32), np.array([-1, 0, 5, 1, 3], np.int32)
    stage = np.concatenate([staged, sources])
    loaded = load(h, stage, sampled, words=8, tokens_first=2, max_tokens=5)
    assert loaded.region.tolist() == [100, 101, 102, 10, 22, 0, 0, 107]
    nothing = load(h, np.concatenate([staged, np.full(5, -1, np.int32)]), sampled, words=8, tokens_first=2, max_tokens=5)
    assert nothing.region.tolist() == staged.tolist()
