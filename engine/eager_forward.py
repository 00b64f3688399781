"""Steps of a model that has no native plan: mlx-lm's own graph computes the logits, the engine's sampler picks the tokens.

Sequences run one after another, each with a prompt cache of mlx-lm's: a sequence's results do not depend on who runs beside it.
"""
from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import CacheList, make_prompt_cache

from metalstep.choices import KV_DTYPES
from metalstep.kernels import sample
from metalstep.kernels.kv_codec import KVCodec
from metalstep.kernels.launch import Buffer
from metalstep.kernels.native import NativeDevice, NativePlan, NativeUnavailable
from metalstep.kv_cache import CacheGroup, LayerShape
from metalstep.kv_plane import BLOCK_SIZE
from metalstep.native_model import step_sizes
from metalstep.plan.request_slots import RequestSlots
from metalstep.plan.step_arrays import StepArrays
from metalstep.step_session import Span, StartedStep, StepSession

FLOAT = 4  # bytes of a logit


def cache_groups(skeleton: Any, dtype: str) -> list[CacheGroup]:
    """What a token keeps in mlx-lm's caches, as one group: layers without keys and values are left out, windows are not counted on.

    A model whose layers all have a state of fixed size gets one layer in which a block is as large as that state. dtype: see cache_dtype.
    """
    codec = KVCodec(dtype)
    layers: dict[object, LayerShape] = {}
    state = 0
    for index, entry in enumerate(_traced(skeleton)[1]):
        parts = list(_parts(entry))
        pairs = [(part.keys, part.values) for part in parts if _has_keys(part)]
        if len(pairs) == 1:
            keys, values = pairs[0]
            layers[index] = LayerShape(keys.shape[1], keys.shape[3], values.shape[3], codec, codec)
        elif pairs:
            k, v = (sum(pair[i].shape[1] * pair[i].shape[3] for pair in pairs) for i in range(2))
            layers[index] = LayerShape(1, k, v, codec, codec)
        state += sum(math.prod(x.shape) for part in parts for x in getattr(part, "cache", ()) if x is not None)
    if not layers:
        half = max(state // (2 * BLOCK_SIZE), 1)
        layers[0] = LayerShape(1, half, half, codec, codec)
    return [CacheGroup(None, layers)]


def cache_dtype(skeleton: Any, dtype: mx.Dtype | None) -> str:
    """Of keys and values: a name of KV_DTYPES. dtype: of the weights once they are loaded, None: the skeleton's."""
    if dtype is None:
        pairs = (part.keys.dtype for entry in _traced(skeleton)[1] for part in _parts(entry) if _has_keys(part))
        dtype = next(pairs, mx.float32)
    name = str(dtype).rpartition(".")[2]
    return name if name in KV_DTYPES else "float32"


def eager_session(
    model: Any, config: dict[str, Any], *, max_context: int, max_seqs: int, groups: int = 1, threads: int = 0
) -> StepSession:
    """Steps of mlx-lm's `model`, weights included. The thread that calls `begin` is the one that MLX works in.

    config: the checkpoint's. max_context: tokens of the longest sequence. max_seqs: that run at once. groups: that `set_blocks` may
    name; what it says is ignored, the caches are mlx-lm's. threads: of the sampler; 0: the device's own choice.
    Raises: NativeUnavailable without the launcher, whose kernels sample.
    """
    try:
        device = NativeDevice.open("host", threads)
    except NativeUnavailable as error:
        name = config.get("model_type", "the model")
        raise NativeUnavailable(f"{name} runs through eager MLX, but its tokens are sampled by the native launcher: {error}") from error
    try:
        vocab_size = _traced(model)[0].shape[-1]
        arrays = StepArrays(device, step_sizes(max_seqs, groups, max_context, vocab_size))
        return StepSession(device, arrays, RequestSlots(arrays), EagerForward(model, device, arrays))
    except BaseException:
        device.close()
        raise


@dataclass
class _Sequence:
    """cache: mlx-lm's, one entry per layer. length: tokens in it. failed: it was given a token that the model has not."""

    cache: list[Any]
    length: int = 0
    failed: bool = False


class EagerForward:
    """See Forward. Logits are in place when `start` returns, and the session's device samples from there."""

    def __init__(self, model: Any, device: NativeDevice, arrays: StepArrays):
        sizes = arrays.sizes
        self._model, self._device, self._vocab_size = model, device, sizes.vocab_size
        self._sequences: dict[int, _Sequence] = {}  # by slot
        shape = (sizes.results, sizes.vocab_size)
        owner = device.create_buffer(shape[0] * shape[1] * FLOAT)
        self._logits, self._place = owner.numpy(np.float32, shape), Buffer(owner.handle, 0, shape, "float32")
        launches = sample.launches(
            self._place,
            arrays.buffers,
            vocab_size=sizes.vocab_size,
            max_rows=sizes.results,
            max_top=sizes.top,
            history_stride=sizes.history_stride,
        )
        self._sampler = device.create_plan(launches, sizes.rows, sizes.results)

    def start(self, session: StepSession, step: StartedStep) -> tuple[NativePlan, Buffer]:
        session.load(step.stage)
        session.settle()  # the sampler of the step before reads the same logits, and this step's tokens may come from it
        at = 0
        for span in step.spans:
            self._run(span, self._logits[at : at + span.results])
            at += span.results
        return self._sampler, self._place

    def go_on(self, rows: int, context: int) -> None:
        """mlx-lm's model is given tokens."""

    def release(self, slot: int) -> None:
        if self._sequences.pop(slot, None) is not None:
            mx.clear_cache()

    def close(self) -> None:
        self._sequences.clear()
        self._sampler.close()
        self._device.close()
        mx.clear_cache()

    def _run(self, span: Span, out: np.ndarray) -> None:
        """A span through the model. out: float32 [wanted, vocab], receives its logits.

        Rows before the first wanted one run by themselves, without logits, which is also how mlx-lm splits a prompt.
        """
        sequence = self._sequence(span)
        ids = np.array(span.tokens, np.int64)
        if span.last is not None:
            token = span.last.token
            assert token is not None  # its step is settled
            ids[-1] = token
        sequence.length += len(ids)
        sequence.failed |= bool(((ids < 0) | (ids >= self._vocab_size)).any())  # MLX reads beyond the table
        if sequence.failed:
            out[:] = np.nan  # this sequence alone fails
            return
        rows = span.wanted
        before = rows[0] if rows else len(ids)
        if before:
            self._model(mx.array(ids[None, :before]), cache=sequence.cache)
            _evaluate(sequence.cache)
            mx.clear_cache()  # chunks differ in size, so their memory is of no use to the next
        if before < len(ids):
            logits = self._model(mx.array(ids[None, before:]), cache=sequence.cache)
            wanted = logits[0, mx.array([row - before for row in rows])].astype(mx.float32)
            _evaluate(sequence.cache, wanted)
            out[:] = np.array(wanted)

    def _sequence(self, span: Span) -> _Sequence:
        if span.first == 0:
            self._sequences[span.slot] = _Sequence(make_prompt_cache(self._model))
        sequence = self._sequences.get(span.slot)
        length = 0 if sequence is None else sequence.length
        if sequence is None or length != span.first:
            raise ValueError(
                f"a span of slot {span.slot} begins at position {span.first} and its cache has {length} tokens; go on where the last span "
                "ended, or begin at 0: an eager model's caches are not shared between sequences"
            )
        return sequence


def _evaluate(cache: list[Any], *arrays: mx.array) -> None:
    mx.eval(arrays, [entry.state for entry in cache])


def _traced(model: Any) -> tuple[mx.array, list[Any]]:
    """Logits and prompt cache of one token, of which only shapes and dtypes are known: nothing is evaluated."""
    cache = make_prompt_cache(model)
    return model(mx.array([[0]]), cache=cache), cache


def _parts(entry: Any) -> Iterator[Any]:
    """The caches of one layer."""
    if isinstance(entry, CacheList):
        for part in entry.caches:
            yield from _parts(part)
    else:
        yield entry


def _has_keys(part: Any) -> bool:
    return isinstance(getattr(part, "keys", None), mx.array) and isinstance(getattr(part, "values", None), mx.array)
