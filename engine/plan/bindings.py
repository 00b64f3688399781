"""Where the values of a plan live on the device, and the buffers that one launch binds."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from metalstep.capture.errors import CaptureError
from metalstep.capture.graph import Value
from metalstep.kernels import params
from metalstep.kernels.kv_codec import KVCodec
from metalstep.kernels.launch import Buffer
from metalstep.kernels.program import Program, Register
from metalstep.plan.layout import RowView
from metalstep.plan.weights import WeightStore

DTYPES = {"float32": params.MS_FLOAT32, "float16": params.MS_FLOAT16}


def dtype_of(buffer: Buffer) -> int:
    """The ms_dtype of a stored value's elements."""
    return int(DTYPES[buffer.dtype])


@dataclass(frozen=True)
class KVPlanes:
    """One layer's cache. k and v: as MSAttentionParams has them, of `heads` kv heads; block_size in tokens; group: of the layers that
    share its block tables; key_mean: float32 [heads, key_dim], taken off the keys before they are encoded; rounding:
    what vectors of so many elements go through then, of a codec that is only compared with (metalstep.eval)."""

    k: Buffer
    v: Buffer
    heads: int
    block_size: int
    k_codec: KVCodec
    v_codec: KVCodec
    group: int = 0
    key_mean: np.ndarray | None = None
    rounding: Callable[[Program, Register, int], Register] | None = None


@dataclass
class Placement:
    """Device buffers by stored value. `values` holds what launches write; weights and constants are placed on first use.

    embeddings: the step's own, for tokens that come with one.
    """

    weights: WeightStore
    planes: dict[object, KVPlanes]
    embeddings: Buffer
    values: dict[Value, Buffer] = field(default_factory=dict)
    _constants: dict[Value, Buffer] = field(default_factory=dict)

    def scalar(self, view: RowView) -> float | None:
        """The number that every element of `view` is, when it looks at one element of a weight or constant."""
        root = view.root
        if root.kind not in ("const", "weight") or any(s for d, s in zip(view.dims, view.strides, strict=True) if d != 1):
            return None
        if view.row_stride:
            return None
        data = _numbers(root) if root.kind == "const" else self.weights.array(root.name)
        return float(data.reshape(-1)[view.offset])

    def buffer(self, root: Value) -> Buffer:
        """The buffer of a stored value: [rows, row_size], or [planes, rows, row_size] as a linear may leave it; float32, or float16 where
        linears alone read it."""
        if root.kind == "weight":
            return self.weights.vector(root.name)
        if root.kind == "const" and root.rows:
            raise CaptureError(f"a constant {list(root.shape)} that differs from row to row")
        if root.kind == "const":
            if root not in self._constants:
                self._constants[root] = self.weights.constant(_numbers(root))
            return self._constants[root]
        return self.values[root]


def _numbers(constant: Value) -> np.ndarray:
    """As float32: numpy has no bfloat16, in which the constants of such a model are."""
    assert constant.data is not None
    return np.array(constant.data.astype(mx.float32))


@dataclass
class Slots:
    """Bindings of one launch behind the fixed ones: a slot per buffer, in order of first use."""

    first: int
    buffers: list[Buffer] = field(default_factory=list)
    reads: list[Buffer] = field(default_factory=list)
    writes: list[Buffer] = field(default_factory=list)

    def read(self, buffer: Buffer) -> int:
        self.reads.append(buffer)
        return self._slot(buffer)

    def write(self, buffer: Buffer) -> int:
        self.writes.append(buffer)
        return self._slot(buffer)

    def _slot(self, buffer: Buffer) -> int:
        if buffer not in self.buffers:
            self.buffers.append(buffer)
        return self.first + self.buffers.index(buffer)
