"""`load` and the model it returns: native where the model can be captured, eager through mlx-lm where it cannot."""
from __future__ import annotations

import inspect
import logging
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from metalstep import loading, trace
from metalstep.capture import CaptureError, capture
from metalstep.checkpoint import Checkpoint, build_model, load_weights_eager, open_checkpoint
from metalstep.choices import DEFAULT_DEVICE as DEFAULT_DEVICE
from metalstep.choices import DEVICES as DEVICES
from metalstep.choices import device_kind
from metalstep.engine import Engine
from metalstep.kernels.linear import ARITHMETIC
from metalstep.kernels.native import KernelError, NativeDevice, NativeUnavailable
from metalstep.kv_scheme import PLAIN, KVScheme, parse
from metalstep.native_model import NativeModel
from metalstep.plan.host_target import HostTarget
from metalstep.plan.target import Target
from metalstep.token_ids import batch_ids, check_tokens

logger = logging.getLogger("metalstep")


class Model:
    """A loaded model. Callable like an mlx-lm model: `model(ids[None])` gives logits [batch, length, vocab] in float32.

    native: the captured model on its device, or None when it runs eagerly through mlx-lm. fallback_reason: why it does, or None.
    config: mlx-lm's config.json as a dict. eager: the mlx-lm model, with weights only when native is None.
    """

    def __init__(self, checkpoint: Checkpoint, eager: Any, native: NativeModel | None, fallback_reason: str | None):
        self.config = checkpoint.config
        self.model_type: str = checkpoint.config.get("model_type", "")
        self.native = native
        self.eager = eager
        self.fallback_reason = fallback_reason
        self._checkpoint = checkpoint
        self._engine = Engine(native) if native is not None else None

    @property
    def engine(self) -> Engine:
        """What runs this model's requests, for long-lived use: submit, cancel, stats. Every call on this model shares it.

        Raises: NotImplementedError for a model that runs eagerly.
        """
        if self._engine is None:
            raise NotImplementedError(
                f"the model runs eagerly ({self.fallback_reason}), so it has no engine; use generate or stream_generate"
            )
        return self._engine

    def make_cache(self) -> Any:
        """An empty prompt cache, what mlx-lm's make_prompt_cache asks a model for."""
        from metalstep.models.cache import make_prompt_cache

        return make_prompt_cache(self)

    def check_input_embeddings(self) -> None:
        """Raises: ValueError when mlx-lm's model does not take input_embeddings."""
        if "input_embeddings" not in inspect.signature(type(self.eager).__call__).parameters:
            raise ValueError(f"{self.model_type} does not take input_embeddings; pass token ids")

    @property
    def args(self) -> Any:
        """mlx-lm's ModelArgs."""
        return self.eager.args

    @property
    def layers(self) -> Any:
        """mlx-lm's layers: structure only when the model runs natively."""
        return self.eager.layers

    def __call__(self, inputs: mx.array, cache: Any = None, **refused: Any) -> mx.array:
        """Logits of every position: inputs int [batch, length] -> float32 [batch, length, vocab].

        Raises: NotImplementedError for a cache or other mlx-lm arguments on a native model (stream_generate keeps its own cache);
        ValueError for another shape or ids outside the vocabulary.
        """
        ids = batch_ids(inputs)
        if self.native is None:
            if vocab_size := self.config.get("vocab_size"):
                check_tokens(ids.reshape(-1), vocab_size)
            logits: mx.array = self.eager(inputs, cache=cache, **refused)
            return logits
        if cache is not None or refused:
            names = [*(["cache"] if cache is not None else []), *refused]
            raise NotImplementedError(
                f"model(..., {names[0]}=...) is not supported on a native model; use stream_generate, which keeps the cache itself, "
                "or load(..., device='eager')"
            )
        return mx.array(np.stack([self.engine.logits(row.tolist()) for row in ids]))

    def explain(self) -> dict[str, Any]:
        """How this model runs: see `metalstep explain`."""
        head: dict[str, Any] = {
            "model_type": self.model_type,
            "native": self.native is not None,
            "fallback_reason": self.fallback_reason,
            "file_bytes": self._checkpoint.file_bytes,
        }
        if self.native is None:
            return {**head, "device": "eager", "launches_per_token": None, "launches": []}
        return {**head, **self.native.explain()}

    @property
    def device_description(self) -> str:
        """The device in words, e.g. `host (avx512, 2 threads)`."""
        if self.native is None:
            return f"eager MLX on {mx.default_device()}"
        info = self.native.device.info
        detail = ", ".join(filter(None, [info.isa, f"{info.threads} threads" if info.threads else ""]))
        return f"{info.name} ({detail})" if detail else info.name

    def close(self) -> None:
        """Give back the device's memory. The model is unusable afterwards."""
        if self._engine is not None:
            self._engine.close()
        if self.native is not None:
            self.native.close()
        self._checkpoint.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def load(
    path_or_hf_repo: str | os.PathLike[str],
    tokenizer_config: dict[str, Any] | None = None,
    model_config: dict[str, Any] | None = None,
    adapter_path: str | None = None,
    lazy: bool = False,
    return_config: bool = False,
    revision: str | None = None,
    *,
    quantize: str | None = None,
    device: str | None = None,
    threads: int | None = None,
    strict: bool = False,
    arithmetic: str = "int16",
    kv_dtype: str = "float16",
    kv_scheme: str = "none",
    kv_bits: int | None = None,
    kv_norm_dtype: str | None = None,
    kv_scale: str | Sequence[str] | Mapping[str, str] | None = None,
    kv_boundary: int | None = None,
    kv_key_center: str | None = None,
    kv_memory: int | float | str | None = None,
    max_context: int | None = None,
    batch_invariant: bool = False,
) -> tuple[Any, ...]:
    """Load a model and its tokenizer.

    path_or_hf_repo: "smollm2" (the packaged SmolLM2-135M-Instruct), a .gguf file, a directory or a Hugging Face id of an mlx-lm model
    (docs/models.md). revision: branch, tag or commit of a Hugging Face id. quantize: "4bit", "8bit", "4bit:32", "mxfp4", "mixed_4_6", ...:
    quantise a floating-point model while it is loaded, to the bits that `metalstep convert` would write.
    device: "metal" (an Apple GPU), "cuda" (an NVIDIA GPU, "cuda:1" the second one), "host" (the native step on the CPU), "metal-sim" (the
    GPU's shaders simulated on the CPU: for tests, slow) or "eager" (mlx-lm's own graph); None takes "metal" on a Mac and "host" elsewhere.
    threads: of the host device; None takes what the process may use. strict: raise instead of falling back to eager MLX. arithmetic: of
    the host device, "int16" (near-exact) or "int8" (faster with many rows, less exact). batch_invariant: a request's logits are the same
    bits whatever else is in its batch; always so on the host device, slower on a GPU. kv_dtype: float16, bfloat16 or float32, of keys and
    values that are not encoded.
    kv_scheme: none, or how the KV cache is encoded: affine8, turbo8v4, turbo4, turbo4v2, ... (docs/turboquant.md; kv_bits, kv_norm_dtype,
    kv_scale, kv_boundary, kv_key_center: see kv_scheme.parse); a model that would run eagerly is refused then.
    max_context: tokens of the longest sequence, at most the model's limit; None takes that limit or what fits. kv_memory: of the KV
    cache, in bytes, as text ("8GB"), or a fraction of the free memory; None takes half of it (a quarter on an Apple GPU, nine tenths on an
    NVIDIA one), or what 64 sequences of max_context need if that is less. The host device takes memory when it is first written.
    tokenizer_config, model_config: overrides of the files' own, as in mlx-lm. lazy has no effect: weights are packed when loaded.
    Returns: (Model, mlx-lm TokenizerWrapper), and with return_config the config as a third.
    Raises: CheckpointError for files that cannot be used; CaptureError and KernelError with strict; ValueError for an option.
    """
    if adapter_path is not None:
        raise NotImplementedError("adapter_path is not supported; fuse the adapter with `mlx_lm.fuse` and load the result")
    scheme = parse(
        kv_scheme,
        kv_dtype=kv_dtype,
        kv_bits=kv_bits,
        kv_norm_dtype=kv_norm_dtype,
        kv_scale=kv_scale,
        kv_boundary=kv_boundary,
        kv_key_center=kv_key_center,
    )
    device = device or DEFAULT_DEVICE
    target = make_target(device, threads=threads, arithmetic=arithmetic, batch_invariant=batch_invariant)
    if device == "eager" and kv_memory is not None:
        raise ValueError(f"kv_memory is {kv_memory!r} on eager, which is mlx-lm's own; it is an option of the devices that run natively")
    check_scheme(scheme, device)
    tracing = trace.current()  # a file that cannot be written is refused before anything is loaded
    checkpoint = open_checkpoint(path_or_hf_repo, revision, quantize)
    native: NativeModel | None = None
    try:
        checkpoint.config.update(model_config or {})
        skeleton = build_model(checkpoint)  # before the tokenizer: this checks the config
        tokenizer = checkpoint.tokenizer(tokenizer_config)  # before the weights: what it leaves free serves the rest of the load
        reason: str | None = "device='eager' was asked for"
        if target is not None:
            native, reason = _native(
                checkpoint, skeleton, device, threads, target, strict, scheme, {"kv_memory": kv_memory, "max_context": max_context}
            )  # fmt: skip
        if native is None:
            loading.stage("loading weights with MLX")
            load_weights_eager(skeleton, checkpoint, eager_dtype())
            if tracing is not None:
                warnings.warn("METALSTEP_TRACE is set, and a model that runs eagerly has no steps to trace", RuntimeWarning, stacklevel=2)
        model = Model(checkpoint, skeleton, native, reason)
        return (model, tokenizer, model.config) if return_config else (model, tokenizer)
    except BaseException:
        try:
            if native is not None:
                native.close()
        finally:
            checkpoint.close()
        raise


def make_target(device: str, *, threads: int | None, arithmetic: str, batch_invariant: bool) -> Target | None:
    """What `device` asks for; None for eager. The options are `load`'s. Raises: ValueError for one that does not fit."""
    kind = device_kind(device)
    if arithmetic not in tuple(ARITHMETIC):
        raise ValueError(f"arithmetic is {arithmetic!r}, expected one of {', '.join(ARITHMETIC)}")
    if not isinstance(batch_invariant, bool):
        raise ValueError(f"batch_invariant is {batch_invariant!r:.80}, expected True or False")
    if device == "eager":
        for name, given in (("batch_invariant", batch_invariant or None), ("threads", threads)):
            if given is not None:
                raise ValueError(f"{name} is {given!r} on eager, which is mlx-lm's own; it is an option of the devices that run natively")
        return None
    if device == "host":
        return HostTarget(arithmetic)
    if arithmetic != "int16":
        raise ValueError(f"arithmetic is {arithmetic!r} on {device}, which computes in float32; it is an option of the host device")
    if threads is not None:
        raise ValueError(f"threads is {threads} on {device}; it is an option of the host device")
    from metalstep.plan.gpu_target import GpuTarget

    return GpuTarget("nvidia" if kind == "cuda" else "apple", batch_invariant=batch_invariant)


def open_device(name: str, threads: int, target: Target) -> NativeDevice:
    """Open a device that runs natively, and let its target use what was measured on it and what is installed for it.

    Raises: as NativeDevice.open.
    """
    device = NativeDevice.open(name, threads)
    if device_kind(name) == "host":
        return device
    from metalstep.plan.gpu_target import GpuTarget
    from metalstep.tuning_files import tuning_of

    if not isinstance(target, GpuTarget):
        return device
    try:
        target.tuning = tuning_of(device.info.name, target.kind)
    except BaseException:
        device.close()
        raise
    if target.library:
        try:
            device.kernel("library_gemm")
        except ValueError as error:  # says what is missing; kernels of our own do the same, with long prompts more slowly
            logger.info("%s", error)
            target.library = False
    return device


def check_scheme(scheme: KVScheme, device: str) -> None:
    """Raises: ValueError for a compressed cache on eager: it would be silently another."""
    if scheme.compressed and device == "eager":
        raise ValueError(
            f"kv_scheme is {scheme.name!r} on eager, whose cache is mlx-lm's own; choose a device that runs natively, or 'none'"
        )


def eager_dtype() -> mx.Dtype | None:
    """Of floats that MLX computes with: None, the checkpoint's own, except on the CPU, where half-precision matmuls take seconds per
    token and are inaccurate."""
    return mx.float32 if mx.default_device() == mx.Device(mx.cpu) else None


def _native(
    checkpoint: Checkpoint,
    skeleton: Any,
    device_name: str,
    threads: int | None,
    target: Target,
    strict: bool,
    scheme: KVScheme,
    options: dict[str, Any],
) -> tuple[NativeModel | None, str | None]:
    """The native model, or None and why not (after one warning). options: of NativeModel.allocate_memory."""
    try:
        device = open_device(device_name, threads or 0, target)
    except NativeUnavailable as error:
        return None, why_eager(error, device_name, "", strict=strict, scheme=scheme)
    model_type = checkpoint.config.get("model_type", "the model")
    try:
        loading.stage("reading the model's structure")
        captured = capture(skeleton, model_type)
        loading.stage("loading weights", checkpoint.file_bytes)
        native = NativeModel(captured, checkpoint, device, target, scheme)
        native.allocate_memory(**options)
        loading.stage("warming up" if device_name == "host" else "compiling kernels, which takes longer the first time")
        native.warmup()
        return native, None
    except (CaptureError, KernelError) as error:
        device.close()
        return None, why_eager(error, device_name, model_type, strict=strict, scheme=scheme)
    except BaseException:
        device.close()
        raise


def why_eager(
    error: NativeUnavailable | CaptureError | KernelError, device: str, model_type: str, *, strict: bool, scheme: KVScheme = PLAIN
) -> str:
    """The reason to run through eager MLX, after one warning.

    Raises: the error with strict, with a scheme that compresses the cache, and where eager MLX is no answer to it.
    """
    # Who asks for the simulator wants nothing else.
    if isinstance(error, CaptureError):
        text = str(error) if str(error).startswith(model_type) else f"{model_type} has no native step yet: {error}"
        if scheme.compressed:
            raise CaptureError(f"{text}; an eager cache is not encoded: load it with kv_scheme='none', not {scheme.name!r}") from error
        if strict:
            raise CaptureError(f"{text}; load it without strict=True to run it through eager MLX") from error
    elif strict or scheme.compressed or device == "metal-sim":
        raise error
    elif isinstance(error, KernelError):
        text = f"the compiler of {device} does not take a kernel of metalstep, which is a bug to report: {error}"
    else:
        text = str(error)
    warnings.warn(f"{text}\nRunning through eager MLX, which is slower.", RuntimeWarning, stacklevel=4)
    return text
