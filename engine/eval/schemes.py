"""The schemes that an evaluation compares, as `--schemes` names them, and models that run with them."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from metalstep.capture import capture
from metalstep.checkpoint import build_model, open_checkpoint
from metalstep.eval import reference_codecs
from metalstep.kernels.native import NativeDevice
from metalstep.kv_scheme import NAMES, VLLM_ALIASES, parse
from metalstep.model import DEFAULT_DEVICE, Model, load, make_target
from metalstep.native_model import NativeModel
from metalstep.plan.plan import Plan
from metalstep.plan.target import PlanShape

REFERENCES = tuple(reference_codecs.BLOCK_BYTES)
OPTIONS = ("boundary", "norm_dtype", "scale", "key_center", "dtype")  # of load's kv_...


@dataclass(frozen=True)
class EvalScheme:
    """label: as the caller wrote it. options: of load, `kv_...`."""

    label: str
    name: str
    options: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def is_reference(self) -> bool:
        return self.name in REFERENCES


def scheme_of(text: str) -> EvalScheme:
    """`turbo4`, `q8_0`, or with options behind colons: `turbo4:boundary=0:scale=raw`; `scale=matched/unbiased` is of keys and of values.

    Raises: ValueError for an unknown name, with the list of names, and for options that the scheme has not.
    """
    name, *given = text.strip().split(":")
    if name not in (*NAMES, *REFERENCES, *VLLM_ALIASES):
        raise ValueError(f"no scheme {name!r}, expected one of {', '.join((*NAMES, *REFERENCES))}")
    options: dict[str, Any] = {}
    for part in given:
        key, equals, value = part.partition("=")
        if key not in OPTIONS or not equals:
            raise ValueError(f"{text!r} has the option {part!r}, expected NAME=VALUE with a name of {', '.join(OPTIONS)}")
        if key == "boundary" and not value.isdecimal():
            raise ValueError(f"{text!r} has the boundary {value!r}, expected a number of layers")
        options[f"kv_{key}"] = int(value) if key == "boundary" else value.replace("/", ",")
    if name in REFERENCES:
        if options:
            raise ValueError(f"{text!r} has options, and {name} has none; leave them out")
    else:
        parse(name, **options)
    return EvalScheme(text.strip(), name, options)


def schemes_of(texts: list[str]) -> list[EvalScheme]:
    """Each once, in order. Raises: as scheme_of; ValueError for none."""
    schemes = list({(scheme := scheme_of(text)).label: scheme for text in texts if text.strip()}.values())
    if not schemes:
        raise ValueError(f"no scheme to compare, expected some of {', '.join((*NAMES, *REFERENCES))}")
    return schemes


def load_scheme(source: str | os.PathLike[str], scheme: EvalScheme, **options: Any) -> tuple[Model, Any]:
    """A model whose cache has the scheme, and its tokenizer. options: load's, of the device and of memory.

    Raises: as load, with strict; NotImplementedError for a reference codec on another device than the host.
    """
    if not scheme.is_reference:
        return load(source, strict=True, kv_scheme=scheme.name, **scheme.options, **options)
    return _load_reference(source, scheme.name, **options)


def kv_bytes_per_token(model: Model) -> int:
    """Of all layers, as the cache stores them; of a reference codec, as it would."""
    assert model.native is not None
    name = getattr(model.native, "codec", None)
    if name is None:
        return model.native.cache.bytes_per_token
    shapes = [shape for group in model.native.groups for shape in group.layers.values()]
    return sum(
        shape.heads * (reference_codecs.vector_bytes(name, shape.key_dim) + reference_codecs.vector_bytes(name, shape.value_dim))
        for shape in shapes
    )


class ReferenceModel(NativeModel):
    """A model on the host device whose keys and values are rounded through a reference codec. codec: set before `allocate_memory`."""

    codec: str

    def _make_plan(self, shape: PlanShape) -> Plan:
        rounding = partial(reference_codecs.emit, self.codec)
        self.cache.planes = {layer: replace(planes, rounding=rounding) for layer, planes in self.cache.planes.items()}
        return super()._make_plan(shape)


def _load_reference(
    source: str | os.PathLike[str],
    name: str,
    *,
    device: str | None = None,
    threads: int | None = None,
    arithmetic: str = "int16",
    kv_memory: int | float | str | None = None,
    max_context: int | None = None,
    batch_invariant: bool = False,
) -> tuple[Model, Any]:
    if (device or DEFAULT_DEVICE) != "host":
        raise NotImplementedError(f"{name} runs on the host device alone, to compare with; use that device, or leave it out of the schemes")
    target = make_target("host", threads=threads, arithmetic=arithmetic, batch_invariant=batch_invariant)
    assert target is not None
    checkpoint = open_checkpoint(source)
    opened: NativeDevice | None = None
    try:
        skeleton = build_model(checkpoint)
        tokenizer = checkpoint.tokenizer()
        opened = NativeDevice.open("host", threads or 0)
        captured = capture(skeleton, checkpoint.config.get("model_type", "the model"))
        native = ReferenceModel(captured, checkpoint, opened, target, parse("none", kv_dtype="float32"))
        native.codec = name
        for group in native.groups:
            for shape in group.layers.values():
                reference_codecs.check_dim(name, shape.key_dim)
                reference_codecs.check_dim(name, shape.value_dim)
        native.allocate_memory(kv_memory=kv_memory, max_context=max_context)
        native.warmup()
        return Model(checkpoint, skeleton, native, None), tokenizer
    except BaseException:
        if opened is not None:
            opened.close()
        checkpoint.close()
        raise
