"""A model for a server that schedules its steps itself: loaded, then given the cache that the server has planned, then stepped."""
from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from metalstep import trace
from metalstep.capture import CapturedModel, CaptureError, capture
from metalstep.checkpoint import build_model, load_weights_eager, open_checkpoint
from metalstep.eager_forward import cache_dtype, cache_groups, eager_session
from metalstep.explain import explain_cache
from metalstep.kernels.native import KernelError, NativeDevice
from metalstep.kv_cache import CacheGroup, SchemeError
from metalstep.kv_plane import BLOCK_SIZE
from metalstep.kv_scheme import PLAIN, KVScheme
from metalstep.memory_size import free_memory
from metalstep.model import DEFAULT_DEVICE, check_scheme, eager_dtype, make_target, open_device, why_eager
from metalstep.native_model import MAX_SEQS, NativeModel
from metalstep.plan.paper import paper_plan
from metalstep.plan.target import Target
from metalstep.step_session import NativeForward, StepSession


class ServedModel:
    """groups: of layers that share block tables. fallback_reason: why it runs through eager MLX, which keeps caches of its own, or None.

    Blocks are numbered over all groups, 0 is nobody's. After `allocate`, `session` takes steps. Close it to give the memory back.
    """

    def __init__(
        self,
        source: str | os.PathLike[str],
        *,
        device: str | None = None,
        threads: int | None = None,
        arithmetic: str = "int16",
        scheme: KVScheme = PLAIN,
        batch_invariant: bool = False,
        strict: bool = False,
    ):
        """The options are `metalstep.load`'s, as are the errors, except that the launcher is needed in any case: it samples.

        scheme: of a native cache (kv_scheme.parse); eager MLX keeps what it computes with, and is refused where the scheme compresses.
        """
        trace.current()  # a path that cannot be written is refused before anything is loaded
        self.device_name = device or DEFAULT_DEVICE
        check_scheme(scheme, self.device_name)
        self.scheme = scheme
        self._threads = threads or 0
        self._strict = strict
        target = make_target(self.device_name, threads=threads, arithmetic=arithmetic, batch_invariant=batch_invariant)
        self.session: StepSession | None = None
        self._native: NativeModel | None = None
        self.fallback_reason: str | None = "device='eager' was asked for"
        self._checkpoint = open_checkpoint(source)
        device_opened: NativeDevice | None = None
        try:
            self._skeleton = build_model(self._checkpoint)
            if target is not None:
                captured = capture(self._skeleton, self.model_type)
                device_opened = open_device(self.device_name, self._threads, target)
                self._check_plan(captured, target)
                self._native = NativeModel(captured, self._checkpoint, device_opened, target, scheme)
                self.fallback_reason = None
        except (CaptureError, KernelError) as error:
            self._fall_back(error, device_opened)
        except BaseException:
            self.close()
            if device_opened is not None:
                device_opened.close()
            raise

    @property
    def model_type(self) -> str:
        return str(self._checkpoint.config.get("model_type", "the model"))

    @property
    def native(self) -> bool:
        """Whether steps are native. What has no kernel is known from the start, what a device's compiler refuses after `allocate`."""
        return self._native is not None

    @property
    def groups(self) -> list[CacheGroup]:
        if self._native is not None:
            return self._native.groups
        return cache_groups(self._skeleton, cache_dtype(self._skeleton, eager_dtype()))

    @property
    def weight_bytes(self) -> int:
        return self._checkpoint.file_bytes

    @property
    def kv_bytes_per_token(self) -> int:
        return sum(group.token_bytes for group in self.groups)

    def kv_memory(self, part: float | None = None) -> int:
        """Bytes for a KV cache. part: of the memory that is free behind the weights; None: what `metalstep.load` takes when nobody says."""
        if self._native is None:
            return int(free_memory() * (0.25 if part is None else part))
        left = self._native.memory_for_cache()
        part = self._native.target.kv_memory if part is None else part
        if not self._native.device.unified:
            return int((left or 0) * part)
        free = free_memory() - self.weight_bytes
        return int((free if left is None else min(free, left)) * part)

    def allocate(self, num_blocks: int, *, max_context: int, max_seqs: int, groups: Sequence[CacheGroup] | None = None) -> StepSession:
        """Make the cache and what runs on it: once.

        num_blocks: of BLOCK_SIZE tokens, numbered over all groups. max_context: tokens of the longest sequence. max_seqs: that run at
        once. groups: as the server divides the layers; None: as `groups` has them.
        Raises: MemoryError; RuntimeError with the device's text; with `strict`, what keeps a model from running natively.
        """
        if self._native is not None:
            native = self._native
            parts = list(groups or native.groups)
            try:
                native.allocate(
                    [num_blocks] * len(parts),
                    max_context=max_context,
                    max_seqs=max_seqs,
                    groups=parts,
                    one_pool=True,
                )
                session = StepSession(native.device, native.arrays, native.slots, NativeForward(native), native.target.step_load)
                native.warmup(min(max_seqs, MAX_SEQS), session.stages)
            except (CaptureError, KernelError) as error:
                self._native = None
                self._fall_back(error, native.device)
            else:
                self.session = session
                return session
        load_weights_eager(self._skeleton, self._checkpoint, eager_dtype())
        self.session = eager_session(
            self._skeleton,
            self._checkpoint.config,
            max_context=max_context,
            max_seqs=max_seqs,
            groups=len(groups or self.groups),
            threads=self._threads,
        )
        return self.session

    def facts(self) -> Mapping[str, object]:
        """For a server's log: how the model runs."""
        if self._native is None:
            return {"device": "eager", "reason": self.fallback_reason}
        info = self._native.device.info
        return {
            "device": info.name,
            **({"isa": info.isa, "threads": info.threads} if info.isa else {}),
            "launches_per_step": len(self._native.decode_plan.launches),
            "kv_scheme": self.scheme.describe(sum(len(group.layers) for group in self.groups)),
            "kv_bytes_per_token": self.kv_bytes_per_token,
            **self._native.target.facts(),
        }

    def explain_cache(self) -> dict[str, Any] | None:
        """How each layer's cache is encoded (metalstep.explain.explain_cache), and whether a calibration would centre keys; None: eager."""
        if self._native is None:
            return None
        means = self._native.key_means
        return {**explain_cache(self.scheme, self.groups, len(means)), "keys_can_be_centred": self.scheme.centers}

    def close(self) -> None:
        """Once; a second time does nothing. Raises: RuntimeError with the text of a device that has failed, when all is given back."""
        session, native = self.session, self._native
        self.session = self._native = None
        try:
            if session is not None:
                session.close()
        finally:
            try:
                if native is not None:
                    native.close()
            finally:
                self._checkpoint.close()

    def _check_plan(self, captured: CapturedModel, target: Target) -> None:
        """Plan a step on paper: a server sizes its cache before there are plans, and eager caches have other groups and bytes.

        Raises: CaptureError for what has no kernel.
        """
        try:
            paper_plan(captured, self._checkpoint.tensors, target, rows=1, context=BLOCK_SIZE, scheme=self.scheme)
        except SchemeError:
            raise
        except ValueError as error:  # the model's sizes
            raise CaptureError(str(error)) from error

    def _fall_back(self, error: CaptureError | KernelError, device: NativeDevice | None) -> None:
        if device is not None:
            device.close()
        try:
            self.fallback_reason = why_eager(error, self.device_name, self.model_type, strict=self._strict, scheme=self.scheme)
        except BaseException:
            self._checkpoint.close()
            raise
