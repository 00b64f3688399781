"""Vectors for tests of the KV cache's codecs: golden ones, and awkward ones of any size."""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st

from metalstep.kernels import turboquant

DIMS = (64, 80, 96, 128, 256)  # head dims of models
TURBO = ("turbo2", "turbo3", "turbo4")
SCALES = ("matched", "raw", "unbiased")
# Mean squared error of a quantised direction in so many dimensions, by bits: of the exact Beta density's own codebook.
BETA = {
    64: {2: 0.11452576, 3: 0.03339083, 4: 0.00913152},
    80: {2: 0.11511457, 3: 0.03362006, 4: 0.00920447},
    96: {2: 0.11550779, 3: 0.03377348, 4: 0.00925337},
    128: {2: 0.11600007, 3: 0.03396593, 4: 0.00931479},
    256: {2: 0.11674004, 3: 0.03425600, 4: 0.00940753},
}


@dataclass(frozen=True)
class Golden:
    """What a vector becomes with the keys' seed. No element is within 1e-4 of a boundary, no scale near a tie of float16."""

    dim: int
    bits: int
    offset: int  # of the vector's formula
    norm: float
    unit: tuple[float, ...]  # the first of the rotated unit vector
    gamma: dict[str, int]  # bits of the float16 scale, by ms_kv_scale
    distortion: float  # with matched scales
    words: str

    @property
    def x(self) -> np.ndarray:
        """float32 [dim], exact."""
        i = np.arange(self.dim, dtype=np.int64)
        return (((31 * i * i + 7 * i + self.offset) % 251 - 125) / 32).astype(np.float32)

    @property
    def codes(self) -> np.ndarray:
        return np.array([int(word, 16) for word in self.words.split()], np.uint32)


GOLDEN = [
    Golden(
        64, 2, 83, 16.7407857, (-0.0191337, -0.2543377, 0.0784013, 0.0438674),
        dict(raw=0x4c2f, matched=0x4c5e, unbiased=0x4c8d), 0.080640,
        "5265e1a1 89953678 6abd0de0 6e028696",
    ),
    Golden(
        64, 3, 83, 16.7407857, (-0.0191337, -0.2543377, 0.0784013, 0.0438674),
        dict(raw=0x4c2f, matched=0x4c24, unbiased=0x4c32), 0.025836,
        "1af0b943 c7e16cc7 a6289339 bb273d40 cadc765b 77424c85",
    ),
    Golden(
        64, 4, 83, 16.7407857, (-0.0191337, -0.2543377, 0.0784013, 0.0438674),
        dict(raw=0x4c2f, matched=0x4c24, unbiased=0x4c28), 0.007918,
        "e9369a17 66286966 3d687e83 a2959556 32d7da11 7b8aace6 94799768 7ac82339",
    ),
    Golden(
        128, 2, 223, 26.0918974, (-0.0849012, -0.0165144, 0.0542013, 0.0450971),
        dict(raw=0x4e86, matched=0x4f45, unbiased=0x4fd1), 0.139770,
        "6ca9dda5 15a38926 2da645d9 9156d691 00ec9aba 1862855a a45a2ddb 1b59b85a",
    ),
    Golden(
        128, 3, 223, 26.0918974, (-0.0849012, -0.0165144, 0.0542013, 0.0450971),
        dict(raw=0x4e86, matched=0x4ec7, unbiased=0x4ee6), 0.034718,
        "2acfab5a a11c570b 29390e82 1445bae3 caca1739 8934dced 718a49ac b4ec240d 2e850ca5 ad37baae 16e49586 2e66ab9a",
    ),
    Golden(
        128, 4, 223, 26.0918974, (-0.0849012, -0.0165144, 0.0542013, 0.0450971),
        dict(raw=0x4e86, matched=0x4e95, unbiased=0x4e9d), 0.009360,
        "d7e59a74 4bd0a9a5 91a41968 3546983b 5367b686 1ab79959 f768a625 85475768 86888db9 3211cad2 a36657a8 37a04939 "
        "4be6b4bb 9b6174aa 8c836798 369c65a7",
    ),
    Golden(
        256, 2, 139, 34.5877648, (0.0165453, 0.009882, 0.080242, -0.0533629),
        dict(raw=0x5053, matched=0x5079, unbiased=0x50b7), 0.103784,
        "8a15987a 1754c749 4bffd719 4ba98276 0486e53e e596bb36 594b6663 c933659e 5a9fbda5 88dea870 1749c707 6fe565a2 "
        "59955a05 a35819a7 7d145aa8 5b5216b6",
    ),
    Golden(
        256, 3, 139, 34.5877648, (0.0165453, 0.009882, 0.080242, -0.0533629),
        dict(raw=0x5053, matched=0x5064, unbiased=0x5075), 0.029113,
        "d3ae95a4 e62b8652 4964d2e5 b7ade2e2 c79d666f 46eb63a4 9cb123b4 e194258a d1aadcba 6f55d70e b8fd6e36 c6b3c675 "
        "f6bb295b a5896e48 aa1cf592 62e5725d bb4d0974 737f5255 9a4a425b 3b154a3a 90e4a12e d86e4b69 d9947f32 6a66cc29",
    ),
    Golden(
        256, 4, 139, 34.5877648, (0.0165453, 0.009882, 0.080242, -0.0533629),
        dict(raw=0x5053, matched=0x504a, unbiased=0x504f), 0.008981,
        "b6a24c89 93994657 d37c71b6 454c5654 b76d2786 738cecbe b3387c7a 53bcbb87 b9543dc8 33619478 adac0c48 d965a668 "
        "5b6b793d 679762be 6b7696fa c2b63e0c add58b66 769986dc 88b45d23 b482c6da e35d327b 245e5395 5b76aa3a 79ceeb55 "
        "55992276 5487b564 2797a84b 983d5583 7689a9b4 6ec63661 357b9d48 658c6639",
    ),
]  # fmt: skip


def awkward(kind: str, dim: int, rng: np.random.Generator) -> np.ndarray:
    """A vector, float32 [dim], that is not zero."""
    x = rng.standard_normal(dim)
    if kind == "offset":
        x += 3
    elif kind == "outliers":
        x[rng.integers(dim, size=max(1, dim // 16))] *= 30
    elif kind == "one-hot":
        x = np.eye(dim)[rng.integers(dim)] * (1 + abs(x[0]))
    elif kind == "constant":
        x = np.full(dim, 1 + abs(x[0]))
    elif kind == "worst":  # rotates to one-hot
        x = turboquant.rotate_back(np.eye(dim, dtype=np.float32)[rng.integers(dim)] * 7, turboquant.K_SEED)
    elif kind == "sparse":
        x[1:] *= rng.random(dim - 1) < 0.05
    elif kind == "signs":
        x = np.sign(x)
    return x.astype(np.float32)


KINDS = ("normal", "offset", "outliers", "one-hot", "constant", "worst", "sparse", "signs")


@st.composite
def vectors(draw: st.DrawFn, dims: tuple[int, ...] = DIMS, least: int = -6, most: int = 8) -> np.ndarray:
    """float32 [dim], not zero, times a power of ten from 10^(least / 2) to 10^(most / 2)."""
    dim = draw(st.sampled_from(dims))
    kind = draw(st.sampled_from([kind for kind in KINDS if kind != "worst" or turboquant.hadamard_base(dim) is not None]))
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    return awkward(kind, dim, rng) * np.float32(10 ** (draw(st.integers(least, most)) / 2))


def normal(count: int, dim: int, seed: int = 0) -> np.ndarray:
    """float32 [count, dim] of independent normal elements."""
    return np.random.default_rng(seed).standard_normal((count, dim), dtype=np.float32)


def relative(x: np.ndarray, close: np.ndarray) -> np.ndarray:
    """|x - close|^2 / |x|^2 by vectors, float64."""
    x, close = x.astype(np.float64), close.astype(np.float64)
    return np.asarray(((x - close) ** 2).sum(-1) / (x**2).sum(-1))
