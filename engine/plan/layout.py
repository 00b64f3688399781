"""Where a value's rows are: views and row selections of a stored value, taken down to offsets and strides inside one row."""
from __future__ import annotations

import math
from dataclasses import dataclass

from metalstep.capture.errors import CaptureError
from metalstep.capture.graph import Value
from metalstep.capture.passes.kinds import contiguous, is_contiguous, row_shape, row_size


@dataclass(frozen=True)
class RowView:
    """One row of `root` as a value sees it. Units: elements.

    root is a stored value (a launch's output, an input, a weight or a constant). dims and strides describe the row (the axes behind
    the row axis). sampled: a sampled row that reads the row of its token. row_stride is 0 for a weight or constant.
    """

    root: Value
    offset: int
    dims: tuple[int, ...]
    strides: tuple[int, ...]
    row_stride: int
    sampled: bool

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def contiguous(self) -> bool:
        """Whether the row's elements lie one after the other."""
        return is_contiguous(self.dims, self.strides)


def row_view(value: Value) -> RowView:
    """The row of `value` in terms of the stored value it looks into.

    Raises: CaptureError for a view of a view whose inner rows are not contiguous: no capture pass makes one.
    """
    node = value.node
    if node is not None and node.op == "take_rows":
        inner = row_view(node.inputs[0])
        return RowView(inner.root, inner.offset, inner.dims, inner.strides, inner.row_stride, True)
    if node is None or node.op != "view":
        dims = row_shape(value)
        return RowView(value, 0, dims, tuple(contiguous(dims)), row_size(value) if value.rows else 0, False)
    inner = row_view(node.inputs[0])
    offset, strides = node.attrs["offset"], tuple(node.attrs["strides"])
    dims = tuple(value.shape)
    if value.rows:
        if dims[0] != 1 and inner.root.rows and strides[0] != row_size(node.inputs[0]):
            raise CaptureError(f"a view whose rows are {strides[0]} elements apart in rows of {row_size(node.inputs[0])}: {value}")
        dims, strides = dims[1:], strides[1:]
    elif inner.root.rows:
        raise CaptureError(f"a view across the rows of {inner.root}: {value}")
    if not inner.contiguous:
        raise CaptureError(f"a view of a row that is not contiguous: {value}")
    return RowView(inner.root, inner.offset + offset, dims, strides, inner.row_stride, inner.sampled)
