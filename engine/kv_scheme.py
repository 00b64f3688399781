"""Schemes of the KV cache by name: which codec each layer's keys and values have. Nothing here imports MLX.

Grammar and options: "turbo<K>v<V>" has K bits of keys (0: floats, 8: affine) and V bits of values; docs/turboquant.md.
"""
from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from metalstep.kernels.kv_codec import FLOAT_BYTES, SCALES, KVCodec

K_BITS = (0, 2, 3, 4, 8)
V_BITS = (2, 3, 4)
NAMES = ("none", "affine8", "turbo4", "turbo3", "turbo2", *(f"turbo{k}v{v}" for k in K_BITS for v in V_BITS))
# What vLLM calls its schemes. The name is theirs, the bytes are ours.
VLLM_ALIASES = {
    "turboquant_k8v4": "turbo8v4", "turboquant_4bit_nc": "turbo4", "turboquant_k3v4_nc": "turbo3v4", "turboquant_3bit_nc": "turbo3"
}  # fmt: skip
# What vllm-metal calls bits of keys and of values.
K_QUANT = {"q8_0": 8, "int8": 8, "uint8": 8, "q4_0": 4, "int4": 4, "uint4": 4, "int2": 2, "uint2": 2}
V_QUANT = {"q2_0": 2, "q3_0": 3, "q4_0": 4}
BOUNDARY = 2  # first and last layers that a fragile scheme stores as affine8
CENTERS = ("auto", "off")
OPTIONS = ("kv_bits", "kv_norm_dtype", "kv_scale", "kv_boundary", "kv_key_center", "kv_start")  # of a scheme, beside its name

Codecs = tuple[KVCodec, KVCodec]  # of keys and of values


@dataclass(frozen=True)
class KVScheme:
    """name: one of NAMES. k, v: codecs of the layers; boundary: so many first and last layers are affine8 where there are four times as
    many. key_center: "auto" takes the mean of a calibration off the keys before they are encoded where there is one; "off" does not."""

    name: str
    k: KVCodec
    v: KVCodec
    boundary: int = 0
    key_center: str = "off"

    @property
    def compressed(self) -> bool:
        return not (self.k.is_float and self.v.is_float)

    @property
    def centers(self) -> bool:
        """Whether keys are centred where a calibration says by what."""
        return self.key_center == "auto" and not self.k.is_float

    def layer_codecs(self, layers: int) -> list[Codecs]:
        """Codecs of each of `layers` layers that have a KV cache, in the model's order."""
        own, edge, edges = (self.k, self.v), (KVCodec("affine8"), KVCodec("affine8")), self._edges(layers)
        return [edge if i < edges or i >= layers - edges else own for i in range(layers)]

    def _edges(self, layers: int) -> int:
        """Boundary layers at either end of so many."""
        return self.boundary if layers >= 4 * self.boundary else 0

    def describe(self, layers: int) -> str:
        """In words, of a model with so many layers that have a KV cache: the name, and options that are not the defaults."""
        words = [self.name] if self.name != "none" else [self.k.name]
        for which, codec in (("keys", self.k), ("values", self.v)):
            words += [f"{which} {codec.scale}"] if codec.scale != "matched" else []
        words += ["float32 norms"] if "float32" in (self.k.norm_dtype, self.v.norm_dtype) and self.compressed else []
        words += [f"{self.k.name} keys"] if self.compressed and self.k.is_float and self.k.name != "float16" else []
        edges = self._edges(layers)
        words += [f"{edges}+{edges} layers affine8"] if edges else []
        return ", ".join(words)


PLAIN = KVScheme("none", KVCodec("float16"), KVCodec("float16"))


def parse(
    name: str = "none",
    *,
    kv_dtype: str = "float16",
    kv_bits: int | None = None,
    kv_norm_dtype: str | None = None,
    kv_scale: str | Sequence[str] | Mapping[str, str] | None = None,
    kv_boundary: int | None = None,
    kv_key_center: str | None = None,
    kv_start: int | None = None,
) -> KVScheme:
    """The scheme that a name and options say.

    name: see NAMES, or vLLM's for the same (VLLM_ALIASES). kv_dtype: of what is not encoded. kv_bits: of keys; only a check.
    kv_norm_dtype: f16 (default) or f32, of each vector's scale. kv_scale: matched (default), raw or unbiased; for keys and values apart
    "matched,unbiased" or {"k": ..., "v": ...}. kv_boundary: layers at either end that are affine8; None: 2 where keys have 2 to 4 bits or
    values 2, else 0. kv_key_center: auto (default) or off. kv_start: 0, tokens that stay floats.
    Raises: ValueError for an unknown name, which lists the known ones, and for options that contradict it or each other.
    """
    if kv_dtype not in tuple(FLOAT_BYTES):
        raise ValueError(f"kv_dtype is {kv_dtype!r}, expected one of {', '.join(sorted(FLOAT_BYTES))}")
    canonical = VLLM_ALIASES.get(name, name) if isinstance(name, str) else name
    if canonical not in NAMES:
        raise ValueError(f"kv_scheme is {name!r:.60}, expected one of {', '.join(NAMES)} (or {', '.join(VLLM_ALIASES)})")
    k_bits, v_bits = _bits(canonical)
    options = {"kv_norm_dtype": kv_norm_dtype, "kv_scale": kv_scale, "kv_boundary": kv_boundary or None, "kv_key_center": kv_key_center}
    if k_bits is None or v_bits is None:
        options |= {"kv_key_center": None} if canonical == "affine8" or kv_key_center == "off" else {}
        if given := [option for option, value in options.items() if value is not None]:
            raise ValueError(f"{given[0]} is an option of turbo schemes, and kv_scheme is {canonical!r}; leave it out, or choose one")
    if kv_start not in (None, 0) or isinstance(kv_start, bool):
        raise ValueError(f"kv_start is {kv_start!r}, expected 0: every token is encoded when it is written; leave it out")
    expected = {"none": 8 * FLOAT_BYTES[kv_dtype], "affine8": 8}.get(canonical, k_bits)
    if kv_bits is not None and (isinstance(kv_bits, bool) or kv_bits != expected):
        raise ValueError(f"kv_bits is {kv_bits!r}, and keys of {canonical!r} have {expected}; leave it out, or choose another scheme")
    floats, affine = KVCodec(kv_dtype), KVCodec("affine8")
    if canonical == "none":
        return KVScheme(canonical, floats, floats)
    center = kv_key_center or "auto"
    if center not in CENTERS:
        raise ValueError(f"kv_key_center is {kv_key_center!r}, expected one of {', '.join(CENTERS)}")
    if canonical == "affine8":
        return KVScheme(canonical, affine, affine, key_center=center)
    assert k_bits is not None and v_bits is not None
    norm = _norm_dtype(kv_norm_dtype)
    k_scale, v_scale = _scales(kv_scale)
    k = floats if k_bits == 0 else affine if k_bits == 8 else KVCodec(f"turbo{k_bits}", norm, k_scale)
    v = KVCodec(f"turbo{v_bits}", norm, v_scale)
    if not k.is_turbo and k_scale != v_scale and kv_scale is not None and not isinstance(kv_scale, str):
        raise ValueError(f"kv_scale is {k_scale!r} for keys, and those of {canonical!r} have no such scale; give that of values alone")
    return KVScheme(canonical, k, v, _boundary(canonical, kv_boundary, fragile=k.is_turbo or v_bits == 2), center)


def alias(turboquant: Any, k_quant: Any = None, v_quant: Any = None) -> str:
    """The scheme of vllm-metal's options. Raises: ValueError for bits that no scheme has."""
    if turboquant is not True:
        raise ValueError(f"turboquant is {turboquant!r}, expected true; leave it and k_quant and v_quant out for a plain cache")
    k, v = k_quant or "q8_0", v_quant or "q3_0"  # its own defaults
    for name, value, known in (("k_quant", k, K_QUANT), ("v_quant", v, V_QUANT)):
        if value not in tuple(known):
            raise ValueError(f"{name} is {value!r:.40}, expected one of {', '.join(known)}; or name a kv_scheme: {', '.join(NAMES)}")
    return f"turbo{K_QUANT[k]}v{V_QUANT[v]}"


def _bits(name: str) -> tuple[int | None, int | None]:
    """Of keys and values of a turbo scheme."""
    if both := re.fullmatch(r"turbo([234])", name):
        return int(both[1]), int(both[1])
    if apart := re.fullmatch(r"turbo([02348])v([234])", name):
        return int(apart[1]), int(apart[2])
    return None, None


def _norm_dtype(given: str | None) -> str:
    known = {None: "float16", "f16": "float16", "float16": "float16", "f32": "float32", "float32": "float32"}
    if given not in tuple(known):
        raise ValueError(f"kv_norm_dtype is {given!r}, expected f16 or f32")
    return known[given]


def _scales(given: Any) -> tuple[str, str]:
    """Of keys and of values."""
    if given is None:
        return SCALES[0], SCALES[0]
    if isinstance(given, Mapping):
        if unknown := sorted(set(map(str, given)) - {"k", "v"}):
            raise ValueError(f"kv_scale has {unknown[0]!r}, expected k and v")
        both = [given.get("k", SCALES[0]), given.get("v", SCALES[0])]
    else:
        both = given.split(",") if isinstance(given, str) else list(given) if isinstance(given, (list, tuple)) else [given]
        both = both * 2 if len(both) == 1 else both
    if len(both) != 2 or any(scale not in SCALES for scale in both):
        raise ValueError(f"kv_scale is {given!r:.60}, expected {', '.join(SCALES)}, or two with a comma between: of keys, of values")
    return both[0], both[1]


def _boundary(name: str, given: Any, *, fragile: bool) -> int:
    if given is None:
        return BOUNDARY if fragile else 0
    if isinstance(given, bool) or not isinstance(given, int) or given < 0:
        raise ValueError(f"kv_boundary is {given!r}, expected a number of layers, 0 for none")
    if given and not fragile:
        raise ValueError(f"kv_boundary is {given}, and {name!r} has bits enough: all its layers are stored alike; leave it out")
    return given
