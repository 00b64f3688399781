"""Codecs of the KV cache: how a key or a value vector is stored, and what that takes. What a codec computes: kernels/turboquant.py."""
from __future__ import annotations

from dataclasses import dataclass

from metalstep.kernels import params

FLOAT_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
TURBO_BITS = {"turbo2": 2, "turbo3": 3, "turbo4": 4}
NAMES = (*FLOAT_BYTES, *TURBO_BITS, "affine8")
SCALES = ("matched", "raw", "unbiased")
# Rotations are Hadamard matrices of m * 2^k elements. Source of those of 12, 20 and 28: Paley; see turboquant.hadamard_matrix.
BASES = (1, 12, 20, 28)
DIMS = (16, 512)  # elements of a vector, least and most


@dataclass(frozen=True)
class KVCodec:
    """How the vectors of a plane are stored.

    name: float32, float16, bfloat16; turbo2, turbo3, turbo4; affine8. Of turbo codecs: norm_dtype, float16 or float32, of the one scale
    that each vector has; scale, what that is (ms_kv_scale): matched, raw or unbiased.
    Raises: ValueError for another name or option.
    """

    name: str
    norm_dtype: str = "float16"
    scale: str = "matched"

    def __post_init__(self) -> None:
        for what, value, known in (
            ("codec", self.name, NAMES), ("norm_dtype", self.norm_dtype, ("float16", "float32")), ("scale", self.scale, SCALES)
        ):  # fmt: skip
            if value not in known:
                raise ValueError(f"kv_codec: {what} is {value!r}, expected one of {', '.join(known)}")

    @property
    def is_float(self) -> bool:
        return self.name in FLOAT_BYTES

    @property
    def is_turbo(self) -> bool:
        return self.name in TURBO_BITS

    @property
    def bits(self) -> int:
        """Of a stored element."""
        return TURBO_BITS.get(self.name, 8 if self.name == "affine8" else 8 * FLOAT_BYTES.get(self.name, 0))

    @property
    def code(self) -> int:
        """ms_kv_codec, with its bits."""
        if self.is_float:
            return int(getattr(params, f"MS_KV_{self.name.upper()}"))
        wide = params.MS_KV_WIDE_SCALES if self.is_turbo and self.norm_dtype == "float32" else 0
        return int(getattr(params, f"MS_KV_{self.name.upper()}")) | int(wide)

    @property
    def scale_code(self) -> int:
        """ms_kv_scale."""
        return int(getattr(params, f"MS_KV_SCALE_{self.scale.upper()}"))

    def words(self, dim: int) -> int:
        """uint32 words of a vector's codes; of floats, what they take."""
        return -(-dim * self.bits // 32)

    def groups(self, dim: int) -> int:
        """Groups of a vector's elements that have a scale of their own."""
        return dim // affine_group(dim) if self.name == "affine8" else 0 if self.is_float else 1

    def scale_bytes(self, dim: int) -> int:
        """Of a vector: its scales."""
        if self.is_turbo:
            return FLOAT_BYTES[self.norm_dtype]
        return 4 * self.groups(dim)

    def code_bytes(self, dim: int) -> int:
        """Of a vector without its scales."""
        return dim * FLOAT_BYTES[self.name] if self.is_float else 4 * self.words(dim)

    def vector_bytes(self, dim: int) -> int:
        """All that a vector takes in the cache."""
        return self.code_bytes(dim) + self.scale_bytes(dim)

    def scales_at(self, plane_bytes: int, dim: int) -> int:
        """4-byte words of a plane of so many bytes before its scales; 0 for floats. Raises: ValueError for a plane beyond 16 GiB."""
        if self.is_float:
            return 0
        words = plane_bytes // self.vector_bytes(dim) * self.words(dim)
        if words >= 1 << 32:
            raise ValueError(f"kv_codec: a plane of {plane_bytes:,} bytes, expected codes of up to 16 GiB; take a smaller kv_memory")
        return words

    def check_dim(self, dim: int) -> None:
        """Raises: ValueError for vectors of `dim` elements that the codec does not take."""
        if self.is_float:
            return
        if dim % 16 or not DIMS[0] <= dim <= DIMS[1] or (self.is_turbo and hadamard_base(dim) is None):
            known = ", ".join(str(d) for d in range(DIMS[0], DIMS[1] + 1, 16) if hadamard_base(d) is not None)
            raise ValueError(
                f"{self.name} takes vectors of {known} elements, and these have {dim}"
                if self.is_turbo
                else f"{self.name} takes vectors of a multiple of 16 elements from {DIMS[0]} to {DIMS[1]}, and these have {dim}"
            )


def hadamard_base(dim: int) -> int | None:
    """m of dim = m * 2^k for which there is a Hadamard matrix, or None."""
    for base in BASES:
        size, rest = divmod(dim, base)
        if rest == 0 and size > 0 and size & (size - 1) == 0:
            return base
    return None


def affine_group(dim: int) -> int:
    """Elements that share an affine8 scale. Raises: ValueError for a dim that no group divides."""
    for group in (64, 32, 16):
        if dim % group == 0:
            return group
    raise ValueError(f"affine8: vectors of {dim} elements, expected a multiple of 16")
