"""How one request picks its tokens."""
from __future__ import annotations

import math
import numbers
import secrets
from dataclasses import dataclass


@dataclass(frozen=True)
class SamplingParams:
    """Sampling of one request; checked when it is made.

    temperature: divides the logits; 0 takes the most likely token. top_p: in (0, 1], smallest set of tokens with at least this
    probability; 1 (or mlx-lm's 0) is off. min_p: in [0, 1), probability relative to the most likely token's; 0 is off. top_k: tokens
    kept; 0 is off. seed: 64 bits; None draws one. Filters apply in mlx-lm's order: top_p, min_p, top_k, then the temperature.
    Raises: ValueError for a value outside its range, NaN included.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    min_p: float = 0.0
    top_k: int = 0
    seed: int | None = None

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p", "min_p"):
            value = getattr(self, name)
            self._range(name, value, isinstance(value, numbers.Real) and not isinstance(value, bool), "a number")
        if self.top_p == 0:  # mlx-lm's way to say off
            object.__setattr__(self, "top_p", 1.0)
        self._range("temperature", self.temperature, 0.0 <= self.temperature < math.inf, "a finite number from 0")
        self._range("top_p", self.top_p, 0.0 < self.top_p <= 1.0, "a number above 0 and up to 1")
        self._range("min_p", self.min_p, 0.0 <= self.min_p < 1.0, "a number from 0 and below 1")
        self._range("top_k", self.top_k, isinstance(self.top_k, numbers.Integral) and 0 <= self.top_k < 2**31, "an integer from 0")
        if self.seed is None:
            object.__setattr__(self, "seed", secrets.randbits(64))
        seed = self.seed
        self._range("seed", seed, isinstance(seed, numbers.Integral) and 0 <= seed < 2**64, "an integer from 0 to 2**64 - 1")

    def _range(self, name: str, value: object, ok: bool, expected: str) -> None:
        if not ok:
            raise ValueError(f"{name} is {value!r}, expected {expected}")
