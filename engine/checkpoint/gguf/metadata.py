"""Checked access to the metadata of a GGUF file."""
from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from metalstep.checkpoint.errors import CheckpointError


class Metadata:
    """The metadata of a GGUF file, with checked types. Keys of the architecture are given without its name."""

    def __init__(self, path: Path, values: Mapping[str, Any]):
        self.path = path
        self.values = values
        self.architecture = self.text("general.architecture")

    def text(self, key: str, default: str | None = None) -> str:
        return str(self._get(key, str, "a string", default))

    def number(self, key: str, default: int | float | None = None) -> int | float:
        """A finite number. float32 values give the shortest decimal that means the same, so 1e-05 and not 9.99999974e-06."""
        value = self._get(self._full(key), (int, float), "a number", default)
        with np.errstate(over="ignore"):
            value = value if isinstance(value, int) else float(str(np.float32(value)))
        if not np.isfinite(value):
            raise self.error(f"{self._full(key)} is {value}, expected a finite number")
        return value

    def size(self, key: str, default: int | None = None) -> int:
        """A positive integer that fits into 31 bits."""
        value = self._get(self._full(key), int, "an integer (values per layer are not supported)", default)
        if not 0 < value < 1 << 31:
            raise self.error(f"{self._full(key)} is {value}, expected a positive 31-bit integer")
        return int(value)

    def has(self, key: str) -> bool:
        return self._full(key) in self.values

    def error(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {what}; convert the model again, or use its safetensors")

    def _full(self, key: str) -> str:
        return f"{self.architecture}.{key}"

    def _get(self, key: str, kind: Any, expected: str, default: Any) -> Any:
        value = self.values.get(key, default)
        if value is None:
            raise self.error(f"the metadata has no {key}")
        if not isinstance(value, kind) or isinstance(value, bool):
            raise self.error(f"{key} is a {type(value).__name__}, expected {expected}")
        return value
