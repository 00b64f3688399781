"""What the codecs of the KV cache compute, in numpy: the reference of every device's kernels.

A turbo codec stores the direction of a vector as indices of a codebook, after a rotation that makes its elements nearly normal, and
its norm. Source: Zandieh et al., TurboQuant, arXiv 2504.19874, algorithm 1, with a randomised Hadamard matrix for the rotation. affine8
stores bytes, a step and a least element for each group. Arithmetic is float32 unless a comment says otherwise.

    codes, scales = encode(x, KVCodec("turbo4"), K_SEED)
    close = decode(codes, scales, KVCodec("turbo4"), x.shape[-1], K_SEED)
"""
from __future__ import annotations

import functools

import numpy as np

from metalstep.kernels.kv_codec import KVCodec, affine_group, hadamard_base

K_SEED, V_SEED = 42, 43  # of the rotations' signs
MOST_FLOAT16 = np.float32(65504)
# A vector whose squared norm is less counts as zero: below, squares are subnormal, and a device may take them for 0.
LEAST_SQUARE = np.float32(2.0**-100)

# Positive halves of the Lloyd-Max codebooks of N(0, 1), by bits: centroids, and the boundaries half-way between them.
CENTROIDS = {
    2: (0.4527800346, 1.5104176085),
    3: (0.2450941789, 0.7560052812, 1.3439092785, 2.1519457045),
    4: (0.1283950299, 0.3880482995, 0.6567591185, 0.9423404565, 1.2562311973, 1.6180463860, 2.0690172265, 2.7325895710),
}
BOUNDARIES = {
    2: (0.9815988216,),
    3: (0.5005497301, 1.0499572799, 1.7479274915),
    4: (0.2582216647, 0.5224037090, 0.7995497875, 1.0992858269, 1.4371387917, 1.8435318063, 2.4008033988),
}
# Mean squared error of a normal vector, relative to its square: what quantising costs with a codebook of so many bits.
DISTORTIONS = {2: 0.1174818478, 3: 0.0345477608, 4: 0.0095010080}

# Rows of the Hadamard matrices of 12, 20 and 28 (Paley's, in MLX's order): bit j is set where column j is -1.
HADAMARD_ROWS = {
    12: (0x002, 0xaab, 0x3c8, 0x96e, 0xf20, 0x5ba, 0xc8c, 0x6e6, 0x23c, 0xb96, 0x8f0, 0xe5a),
    20: (
        0x933de, 0x2e3bd, 0x5477b, 0xa0ef7, 0x499ef, 0x637c1, 0xc6ba2, 0x8d764, 0x1aee8, 0x359f0, 0x0fa53, 0x174a7,
        0x26d4e, 0x45e9c, 0x83d39, 0xf7a6d, 0xef4fa, 0xdedd5, 0xbdf8b, 0x7bf36,
    ),
    28: (
        0xcd69e7e, 0x9ad7c7d, 0x37ab8fb, 0x6d571f7, 0xd8ae3ef, 0xb3587df, 0x66b4f3f, 0xb467f43, 0x6acbe87, 0xd593d8e,
        0xab27b9c, 0x564f7b8, 0xac9aff0, 0x5b31fe1, 0x87fb325, 0x0ff66ca, 0x1decd95, 0x39ddb2a, 0x71bf654, 0xe17eca9,
        0xc2fd9d2, 0xfcf1299, 0xfbe2532, 0xf7c4ae4, 0xef8d549, 0xdf1ea13, 0xbe3d4a6, 0x7e7a94c,
    ),
}  # fmt: skip


def codebook(bits: int, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Centroids [2^bits] and boundaries [2^bits - 1] of the elements of unit vectors of `dim`, ascending, float32."""
    root = np.sqrt(np.float64(dim))
    centroids = np.array(CENTROIDS[bits]) / root
    boundaries = np.array(BOUNDARIES[bits]) / root
    return (
        np.concatenate([-centroids[::-1], centroids]).astype(np.float32),
        np.concatenate([-boundaries[::-1], [0.0], boundaries]).astype(np.float32),
    )


# ---- rotation -----------------------------------------------------------------------------------------------------------------
def sign_words(dim: int, seed: int) -> np.ndarray:
    """The rotation's signs as uint32 words: bit i % 32 of word i / 32 is set where element i changes its sign. Source: SplitMix64."""
    mask = (1 << 64) - 1
    state, words = (seed * 0x100000001 + dim) & mask, []
    for _ in range(0, dim, 64):
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = state
        z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ z >> 27) * 0x94D049BB133111EB) & mask
        z ^= z >> 31
        words += [z & 0xFFFFFFFF, z >> 32]
    return np.array(words[: -(-dim // 32)], np.uint32)


@functools.cache
def signs(dim: int, seed: int) -> np.ndarray:
    """The rotation's signs, 1 or -1, float32 [dim]."""
    bits = np.unpackbits(sign_words(dim, seed).view(np.uint8), bitorder="little")[:dim]
    return 1 - 2 * bits.astype(np.float32)


def hadamard_matrix(base: int) -> np.ndarray:
    """float32 [base, base] of 1 and -1, for 1, 12, 20 and 28. That of 12 is symmetric, those of 20 and 28 are not."""
    if base == 1:
        return np.ones((1, 1), np.float32)
    rows = np.array(HADAMARD_ROWS[base], np.uint32)
    return (1.0 - 2.0 * (rows[:, None] >> np.arange(base, dtype=np.uint32) & 1)).astype(np.float32)


def hadamard(x: np.ndarray, transpose: bool = False) -> np.ndarray:
    """kron(H_m, H_2^k) of the last axis, of m * 2^k elements: H_2^k in Sylvester's order, stage by stage; not divided by anything.

    Raises: ValueError for an axis for which there is no such matrix.
    """
    dim = x.shape[-1]
    base = hadamard_base(dim)
    if base is None:
        raise ValueError(f"turboquant: no Hadamard matrix of {dim}, expected m * 2^k with m one of 1, 12, 20, 28")
    x, h = x.astype(np.float32), 1
    while h < dim // base:
        pairs = x.reshape(*x.shape[:-1], -1, 2, h)
        x = np.stack([pairs[..., 0, :] + pairs[..., 1, :], pairs[..., 0, :] - pairs[..., 1, :]], -2).reshape(x.shape)
        h *= 2
    if base == 1:
        return x
    matrix = hadamard_matrix(base)
    blocks = x.reshape(*x.shape[:-1], base, dim // base)
    return np.asarray(np.matmul(matrix.T if transpose else matrix, blocks)).reshape(x.shape)


def rotate(x: np.ndarray, seed: int) -> np.ndarray:
    """R x of the last axis: signs, Hadamard, divided by sqrt(dim). float32, same shape; R is orthogonal."""
    dim = x.shape[-1]
    return hadamard(x.astype(np.float32) * signs(dim, seed)) * np.float32(1 / np.sqrt(dim))


def rotate_back(y: np.ndarray, seed: int) -> np.ndarray:
    """R^T y of the last axis. float32, same shape."""
    dim = y.shape[-1]
    return hadamard(y, transpose=True) * np.float32(1 / np.sqrt(dim)) * signs(dim, seed)


# ---- codes as words -----------------------------------------------------------------------------------------------------------
def pack(indices: np.ndarray, bits: int) -> np.ndarray:
    """indices [..., dim] below 2^bits as uint32 words [..., ceil(dim * bits / 32)].

    Element j has bits [j * bits, (j + 1) * bits), LSB first; what is left of the last word is 0.
    """
    dim = indices.shape[-1]
    parts = (indices[..., None].astype(np.uint32) >> np.arange(bits, dtype=np.uint32) & 1).astype(np.uint8)
    stream = np.zeros((*indices.shape[:-1], -(-dim * bits // 32) * 32), np.uint8)
    stream[..., : dim * bits] = parts.reshape(*indices.shape[:-1], dim * bits)
    return np.packbits(stream, axis=-1, bitorder="little").view("<u4")


def unpack(words: np.ndarray, bits: int, dim: int) -> np.ndarray:
    """The indices [..., dim], uint32, of pack's words."""
    stream = np.unpackbits(np.ascontiguousarray(words, "<u4").view(np.uint8), axis=-1, count=dim * bits, bitorder="little")
    parts = stream.reshape(*words.shape[:-1], dim, bits).astype(np.uint32)
    return np.asarray((parts << np.arange(bits, dtype=np.uint32)).sum(-1, dtype=np.uint32))


# ---- encode and decode --------------------------------------------------------------------------------------------------------
def encode(x: np.ndarray, codec: KVCodec, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Vectors x [..., dim] as codes, uint32 [..., words(dim)], and scales.

    Scales of a turbo codec: [..., 1] of norm_dtype, float16 saturating at 65504. Of affine8: float16 [..., groups, 2], the step and the
    least element. Of floats: [..., 0], the codes being the rounded elements' bits. A vector that is not finite, or whose norm (turbo)
    or scales (affine8) are beyond their dtype's range, has codes of 0 and scales of NaN. A turbo vector of zeros: codes and scale of 0.
    Raises: ValueError for a dim that the codec does not take.
    """
    codec.check_dim(x.shape[-1])
    x = x.astype(np.float32)
    with np.errstate(all="ignore"):
        if codec.is_float:
            return _encode_float(x, codec), np.zeros((*x.shape[:-1], 0), np.float16)
        return _encode_turbo(x, codec, seed) if codec.is_turbo else _encode_affine(x)


def decode(codes: np.ndarray, scales: np.ndarray, codec: KVCodec, dim: int, seed: int) -> np.ndarray:
    """The vectors that `codes` and `scales` stand for, float32 [..., dim]."""
    if codec.is_float:
        return _decode_float(codes, codec, dim)
    indices = unpack(codes, codec.bits, dim)
    scales = scales.astype(np.float32)
    if codec.is_turbo:
        return rotate_back(codebook(codec.bits, dim)[0][indices] * scales, seed)
    grouped = indices.reshape(*indices.shape[:-1], -1, affine_group(dim)).astype(np.float32)
    return np.asarray(scales[..., 1:] + grouped * scales[..., :1]).reshape(indices.shape)


def unit(x: np.ndarray, seed: int) -> np.ndarray:
    """What a turbo codec quantises: the rotated unit vectors of x, float32. First the Hadamard matrix, so that zeros stay exact."""
    dim = x.shape[-1]
    return hadamard(x * signs(dim, seed)) * (np.float32(1) / (_norm(x) * np.float32(np.sqrt(dim))))


def quantise(y: np.ndarray, bits: int) -> np.ndarray:
    """Indices of y's elements: how many boundaries lie below each. An element on a boundary has the lower index."""
    return np.searchsorted(codebook(bits, y.shape[-1])[1], y).astype(np.uint32)


def _norm(x: np.ndarray) -> np.ndarray:
    return np.sqrt((x * x).sum(-1, keepdims=True, dtype=np.float32))


def _encode_turbo(x: np.ndarray, codec: KVCodec, seed: int) -> tuple[np.ndarray, np.ndarray]:
    dim = x.shape[-1]
    square = (x * x).sum(-1, keepdims=True, dtype=np.float32)
    finite = square < np.inf
    some = finite & (square >= LEAST_SQUARE)
    x = np.where(some, x, np.float32(1))
    y, norm = unit(x, seed), _norm(x)
    indices = quantise(y, codec.bits)
    q = codebook(codec.bits, dim)[0][indices]
    if codec.scale == "raw":
        gamma = norm
    elif codec.scale == "unbiased":
        gamma = norm / (q * y).sum(-1, keepdims=True, dtype=np.float32)
    else:
        gamma = norm / _norm(q)
    if codec.norm_dtype == "float16":
        gamma = np.minimum(gamma, MOST_FLOAT16)
    gamma = np.where(some, gamma, np.where(finite, np.float32(0), np.float32(np.nan)))
    return pack(np.where(some, indices, 0), codec.bits), gamma.astype(codec.norm_dtype)


def _encode_affine(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    grouped = x.reshape(*x.shape[:-1], -1, affine_group(x.shape[-1]))
    # Rounded away from the elements, so that they lie between lo and lo + 255 step; + 0 makes 0 of -0.
    low = float16_down(grouped.min(-1, keepdims=True) + np.float32(0))
    lo = low.astype(np.float32)
    step = -float16_down(-((grouped.max(-1, keepdims=True) - lo) / np.float32(255) + np.float32(0)))
    s = step.astype(np.float32)
    indices = np.minimum(np.rint((grouped - lo) / np.where(s > 0, s, 1)), 255)
    ok = np.isfinite(grouped).all((-1, -2), keepdims=True) & np.isfinite(np.concatenate([lo, s], -1)).all((-1, -2), keepdims=True)
    indices = np.where(ok & (s > 0), indices, 0).reshape(x.shape).astype(np.uint32)
    return pack(indices, 8), np.where(ok, np.concatenate([step, low], -1), np.float16(np.nan))


def float16_down(x: np.ndarray) -> np.ndarray:
    """The largest float16 that is not above x; -inf below the range."""
    nearest = x.astype(np.float16)
    return np.where(nearest.astype(np.float32) > x, np.nextafter(nearest, np.float16(-np.inf)), nearest)


def _encode_float(x: np.ndarray, codec: KVCodec) -> np.ndarray:
    if codec.name == "bfloat16":  # half to even
        bits = x.view(np.uint32)
        rounded = np.where(np.isnan(x), bits >> 16 | 0x40, (bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    else:
        rounded = x.astype(codec.name).view(np.uint32 if codec.name == "float32" else np.uint16)
    return pack(rounded, codec.bits)


def _decode_float(codes: np.ndarray, codec: KVCodec, dim: int) -> np.ndarray:
    bits = unpack(codes, codec.bits, dim)
    if codec.name == "float16":
        return bits.astype(np.uint16).view(np.float16).astype(np.float32)
    return (bits << 16 if codec.name == "bfloat16" else bits).view(np.float32)
