"""A captured model on a device: its weights, its cache, its plans, and the steps of a sequence."""
from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from metalstep.capture import CapturedModel
from metalstep.checkpoint import Checkpoint
from metalstep.explain import explain_plan
from metalstep.kernels import params
from metalstep.kernels.native import NativeDevice
from metalstep.kv_cache import BLOCK_SIZE, PagedKVCache, Sequence
from metalstep.plan.decode_inputs import DecodeInputs
from metalstep.plan.logits import Logits
from metalstep.plan.lower import Sizes, lower
from metalstep.plan.plan import Plan, StepArrays, StepBatch
from metalstep.plan.weights import WeightStore
from metalstep.sampling import SamplingParams
from metalstep.token_ids import check_tokens

PREFILL_ROWS = 512  # rows of a prefill step
LOGITS_ROWS = 64  # rows of a step that gives every row's logits
MAX_SEQS = 64  # sequences in one step
DEFAULT_CONTEXT = 4096  # tokens, when neither the model nor the caller says
KV_MEMORY_FRACTION = 0.5  # of the free memory, when max_context is not given
GREEDY = SamplingParams(seed=0)
RUN_NAMES = itertools.count()  # of sequences in this process
SHAPE_ROWS = Sizes(tokens=7, sampled=5)  # any row counts: a lowered graph's rows are data


@dataclass(slots=True)
class Token:
    """A sampled token; logprob under the model's own distribution; rank 1 is the most likely."""

    token: int
    logprob: float
    rank: int


@dataclass
class _State:
    """A sequence and the request it belongs to."""

    sequence: Sequence = field(default_factory=Sequence)
    counter: int = 0


class NativeModel:
    """Runs a captured model on `device`. Steps of several threads take turns; each `SequenceRun` has blocks of its own.

    max_context: tokens that the cache holds in all, at most the model's own limit; None takes that limit or what fits into half
    of the free memory. kv_dtype: float16, bfloat16 or float32. arithmetic: of quantised linears, "int16" (near-exact) or "int8".
    Raises: CaptureError for an operation without a kernel; ValueError for an option.
    """

    def __init__(
        self,
        captured: CapturedModel,
        checkpoint: Checkpoint,
        device: NativeDevice,
        *,
        max_context: int | None = None,
        kv_dtype: str = "float16",
        arithmetic: str = "int16",
    ):
        self.device = device
        self.arithmetic = arithmetic
        self._graph = captured.graph(SHAPE_ROWS.tokens, SHAPE_ROWS.sampled)
        self._lock = threading.Lock()
        self._closed = False
        self._plans: dict[tuple[int, int], Plan] = {}
        prepared = captured.prepare(lambda name: mx.array(checkpoint.tensors[name].numpy()))
        self.weights = WeightStore(device, checkpoint.tensors, prepared)
        limit = checkpoint.config.get("max_position_embeddings")
        if limit is not None and not (isinstance(limit, int) and limit > 0):
            raise ValueError(f"the config's max_position_embeddings is {limit!r}, expected a positive integer")
        self.model_context = limit
        self.cache = self._make_cache(max_context, kv_dtype)
        self.max_context = min(x for x in (self.cache.num_blocks * BLOCK_SIZE, self.model_context, max_context) if x)
        self.decode_plan = self.plan(1, 1)
        self.decode_inputs = DecodeInputs(self.decode_plan)
        self.vocab_size = self.decode_plan.vocab_size

    def _make_cache(self, max_context: int | None, kv_dtype: str) -> PagedKVCache:
        if max_context is not None and not (isinstance(max_context, int) and 1 <= max_context < 2**31):
            raise ValueError(f"max_context is {max_context!r}, expected an integer number of tokens from 1")
        limit = self.model_context or max_context or DEFAULT_CONTEXT
        wanted = min(max_context or limit, limit)
        probe = PagedKVCache(self.device, self._graph, 0, kv_dtype)
        if max_context is None:
            free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
            fits = int(free * KV_MEMORY_FRACTION / max(1, probe.bytes_per_token))
            wanted = max(BLOCK_SIZE, min(wanted, fits))
        return PagedKVCache(self.device, self._graph, -(-wanted // BLOCK_SIZE), kv_dtype)

    def plan(self, tokens: int, sampled: int) -> Plan:
        """The plan for steps of up to `tokens` rows, `sampled` of them sampled; made on first use."""
        key = (tokens, sampled)
        if key in self._plans:
            return self._plans[key]
        with self._lock:
            self.check_open()
            if key not in self._plans:  # another thread may have been first
                sizes = Sizes(tokens, sampled)
                arrays = StepArrays(self.device, sizes, min(tokens, MAX_SEQS), self.cache.num_blocks)
                lowered = lower(
                    self._graph, self.device, self.weights, self.cache.planes, arrays.buffers, sizes, self.arithmetic
                )
                self._plans[key] = Plan(self.device, lowered, arrays, sizes)
            return self._plans[key]

    def warmup(self) -> None:
        """Make the plans that generation uses, so that the first request does not."""
        self.plan(PREFILL_ROWS, 1)

    def run(self, plan: Plan, batch: StepBatch) -> np.ndarray:
        """One step of `plan`; see Plan.run. Raises: ValueError for token ids outside the vocabulary."""
        check_tokens(np.asarray(batch.tokens), self.vocab_size)
        with self._lock:
            self.check_open()
            return plan.run(batch).copy()

    def start(self, sampling: SamplingParams) -> SequenceRun:
        """A new, empty sequence. Raises: ValueError when the model is closed."""
        self.check_open()
        return SequenceRun(self, sampling)

    def check_open(self) -> None:
        """Raises: ValueError when the model is closed. For whoever holds the lock, so that it stays open meanwhile."""
        if self._closed:
            raise ValueError("the model is closed; load it again")

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """Logits of every position of one fresh sequence: tokens int [length] -> float32 [length, vocab]."""
        run = self.start(GREEDY)
        try:
            run.reserve(len(tokens))
            out = np.empty((len(tokens), self.vocab_size), np.float32)
            plan = self.plan(LOGITS_ROWS, LOGITS_ROWS)
            for at in range(0, len(tokens), LOGITS_ROWS):
                chunk = tokens[at : at + LOGITS_ROWS]
                batch = run.batch(chunk, range(len(chunk)))
                check_tokens(chunk, self.vocab_size)
                with self._lock:
                    self.check_open()
                    plan.run(batch)
                    out[at : at + len(chunk)] = plan.logits[: len(chunk)]
                run.advance(len(chunk))
            return out
        finally:
            run.close()

    def explain(self) -> dict[str, Any]:
        """What one decode step launches and reads: see `metalstep explain`."""
        info = self.device.info
        return {
            "device": info.name,
            "isa": info.isa,
            "threads": info.threads,
            "arithmetic": self.arithmetic,
            "kv_bytes_per_token": self.cache.bytes_per_token,
            "max_context": self.max_context,
            **explain_plan(self.decode_plan),
        }

    def close(self) -> None:
        """Give the device's memory back; the step in progress ends first."""
        with self._lock:
            self._closed = True
            for plan in self._plans.values():
                plan.close()
            self._plans.clear()
            self.device.close()


class SequenceRun:
    """One sequence in progress: prefill, then a token at a time. Close it to give its blocks back."""

    def __init__(self, model: NativeModel, sampling: SamplingParams):
        self._model = model
        self.sampling = sampling
        self._state = _State()
        self._name = next(RUN_NAMES)
        self.logits = Logits(np.empty(0, np.float32))

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        return self._state.sequence.length

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` in all. Raises: ValueError beyond the context; OutOfBlocksError."""
        if tokens > self._model.max_context:
            limit = self._model.model_context
            more = ", which is the model's own limit; shorten the prompt"
            if limit != self._model.max_context:
                more = f"; shorten the prompt, or load with a larger max_context (the model's limit: {limit or 'not stated'})"
            raise ValueError(f"{tokens} tokens do not fit into the context of {self._model.max_context}{more}")
        self._model.cache.grow(self._state.sequence, tokens)

    def batch(self, tokens: np.ndarray, sampled: range | list[int]) -> StepBatch:
        """A step of this sequence alone: `tokens` go to the next positions; `sampled` are row numbers."""
        sequence, count = self._state.sequence, len(tokens)
        return StepBatch(
            tokens,
            np.arange(sequence.length, sequence.length + count, dtype=np.int32),
            np.zeros(count, np.int32),
            sequence.slots(sequence.length, count),
            [sequence.blocks],
            np.asarray(sampled, np.int32),
            [self.sampling] * len(sampled),
            [self._state.counter] * len(sampled),
        )

    def advance(self, tokens: int) -> None:
        """Count `tokens` as written to the cache."""
        self._state.sequence.length += tokens

    def prefill(self, tokens: np.ndarray, progress: Callable[[int, int], None] | None = None, rows: int = PREFILL_ROWS) -> Token:
        """Put the prompt into the cache in chunks of `rows` and sample the token behind it.

        progress: called with the tokens done and the total before each chunk and at the end.
        """
        check_tokens(tokens, self._model.vocab_size)
        self.reserve(self.length + len(tokens))
        rows = max(1, min(rows, PREFILL_ROWS))
        for at in range(0, len(tokens), rows):
            if progress:
                progress(at, len(tokens))
            chunk = tokens[at : at + rows]
            last = at + rows >= len(tokens)
            plan = self._model.plan(1, 1) if len(chunk) == 1 else self._model.plan(PREFILL_ROWS, 1)
            batch = self.batch(chunk, [len(chunk) - 1] if last else [])
            with self._model._lock:
                self._model.check_open()
                sampled = plan.run(batch)
                if last:
                    self._keep(plan, *sampled[0].item())
            self.advance(len(chunk))
        if progress:
            progress(len(tokens), len(tokens))
        return self._token

    def decode(self, token: int) -> Token:
        """Feed `token` and sample the one behind it."""
        model, state = self._model, self._state
        sequence = state.sequence
        position, blocks = sequence.length, sequence.blocks
        if position >= model.max_context:
            self.reserve(position + 1)
        if position == len(blocks) * BLOCK_SIZE:
            model.cache.grow(sequence, position + 1)
        owner, slot = (self._name, len(blocks)), sequence.slot(position)
        with model._lock:
            model.check_open()
            result = model.decode_inputs.step(owner, self.sampling, blocks, token, position, slot, state.counter)
            self._keep(model.decode_plan, *result)
        sequence.length = position + 1
        return self._token

    def _keep(self, plan: Plan, token: int, logprob: float, rank: int, status: int) -> None:
        """Hold on to what the next step overwrites. Called with the model's lock held."""
        self.logits = plan.lend_logits()
        if status != params.MS_SAMPLE_OK:
            raise RuntimeError(
                "the model's logits are not finite, so no token can be sampled; its weights or the prompt drive it out of range"
            )
        self._token = Token(token, logprob, rank)
        self._state.counter += 1

    def close(self) -> None:
        """Give the blocks back; more than once is fine."""
        self._model.cache.release(self._state.sequence)
