"""A forward pass without a model: the next token is a hash of the whole context, read back from where the block tables say it lies.

Every row leaves its token in the slot that its slot mapping names, in a store with a place per slot of the cache. A wrong block, a stale
one, a wrong position or a token that came too late changes the hash, and so every token from there on.
"""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from metalstep.kernels import sample
from metalstep.kernels.launch import Buffer
from metalstep.kernels.native import NativeDevice, NativePlan
from metalstep.kv_cache import BLOCK_SIZE, CacheGroup
from metalstep.step_session import StartedStep, StepSession

PEAK = np.float32(10)  # logit of the token that follows; the others have 0
LOWEST = 10  # token ids below are never the next one
_MIX = np.uint64(0xD6E8FEB86659FD93)


def next_token(context: Sequence[int] | np.ndarray, windows: Sequence[int | None], vocab_size: int) -> int:
    """What follows `context`. windows: of each group of layers, in tokens; None: all. Order and number of the groups matter."""
    tokens = np.asarray(context, np.uint64)
    seen = [tokens if window is None else tokens[-window:] for window in windows]
    return fold([hash_of(part, len(tokens) - len(part)) for part in seen], vocab_size)


def hash_of(tokens: np.ndarray, first: int) -> int:
    """Of tokens, uint64, at positions from `first` on."""
    positions = np.arange(first, first + len(tokens), dtype=np.uint64)
    with np.errstate(over="ignore"):
        mixed = (tokens + np.uint64(1)) * _MIX ^ (positions + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ mixed >> np.uint64(29)) * _MIX
        return int(np.bitwise_xor.reduce(mixed ^ mixed >> np.uint64(32), initial=np.uint64(len(tokens))))


def fold(hashes: Sequence[int], vocab_size: int) -> int:
    total = 0
    for value in hashes:
        total = (total * 1_000_003 + value) % 2_305_843_009_213_693_951
    return LOWEST + total % (vocab_size - LOWEST)


def continuation(prompt: Sequence[int], count: int, windows: Sequence[int | None], vocab_size: int) -> list[int]:
    """The `count` tokens that greedy sampling gives after `prompt`."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens, windows, vocab_size))
    return tokens[len(prompt) :]


class HashForward:
    """A `metalstep.step_session.Forward` on the arrays of a session on the host device; what samples is the real kernel."""

    def __init__(self, device: NativeDevice, groups: Sequence[CacheGroup], num_blocks: int):
        self._device = device
        self.windows = [group.window for group in groups]
        self.store = np.full(num_blocks * BLOCK_SIZE, -1, np.int64)  # one for all groups, as block numbers are
        self._plan: NativePlan | None = None
        self._logits, self._place = np.empty((0, 0), np.float32), Buffer(0, 0, (0, 0), "float32")
        self._barrier = device.create_plan([], 1, 1)

    def start(self, session: StepSession, step: StartedStep) -> tuple[NativePlan, Buffer]:
        session.load(step.stage)
        plan, rows = self._plan or self._make_plan(session), step.rows
        self._barrier.wait(self._barrier.run())  # the step's inputs are in place, the step before has sampled
        arrays = session.arrays
        results = int(arrays.step["num_sampled"][0])
        assert (int(arrays.step["num_tokens"][0]), results) == (rows, sum(span.results for span in step.spans))
        assert step.decode == (rows == len(step.spans) == results)
        assert step.context == arrays.positions[:rows].max() + 1
        for slots in arrays.slot_mappings[:, :rows]:
            assert (slots >= BLOCK_SIZE).all(), "block 0 is nobody's"
            self.store[slots] = arrays.tokens[:rows]
        self._logits[:] = 0
        for result, row in enumerate(arrays.sampled_rows[:results]):
            self._logits[result, self._token(session, int(row))] = PEAK
        return plan, self._place

    def go_on(self, rows: int, context: int) -> None:
        """It looks at every input."""

    def release(self, slot: int) -> None:
        """The store has nothing that is one slot's."""

    def close(self) -> None:
        """The device is its owner's."""

    def _token(self, session: StepSession, row: int) -> int:
        arrays = session.arrays
        count = int(arrays.positions[row]) + 1
        hashes = []
        for group, window in enumerate(self.windows):
            first = 0 if window is None else max(0, count - window)
            positions = np.arange(first, count)
            blocks = arrays.block_tables[group, arrays.seq_ids[row], positions // BLOCK_SIZE]
            tokens = self.store[blocks * BLOCK_SIZE + positions % BLOCK_SIZE]
            hashes.append(hash_of(tokens.astype(np.uint64), first))
        return fold(hashes, arrays.sizes.vocab_size)

    def _make_plan(self, session: StepSession) -> NativePlan:
        sizes = session.arrays.sizes
        shape = (sizes.results, sizes.vocab_size)
        owner = self._device.create_buffer(4 * shape[0] * shape[1])
        self._logits, self._place = owner.numpy(np.float32, shape), Buffer(owner.handle, 0, shape, "float32")
        launches = sample.launches(
            self._place,
            session.arrays.buffers,
            vocab_size=sizes.vocab_size,
            max_rows=sizes.results,
            max_top=sizes.top,
            history_stride=sizes.history_stride,
        )
        self._plan = self._device.create_plan(launches, sizes.rows, sizes.results)
        return self._plan
