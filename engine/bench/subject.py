"""What a benchmark measures: a model, or a public model's shape with random weights."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Subject:
    """model: as `metalstep.load` takes it. name: for the head of a result."""

    model: str
    name: str


@contextmanager
def subject_of(model: str, shape: str | None, folder: str | None = None) -> Iterator[Subject]:
    """`model`, or with `shape` (of metalstep.shapes) random 4-bit weights of that shape.

    folder: where these are written, and stay for the next time; None: into a temporary folder that goes with the context.
    Raises: ValueError for a shape that is not known; OSError for a folder that cannot be written.
    """
    if shape is None:
        yield Subject(model, model)
        return
    from metalstep.bench.shape_model import write_shape_model

    with ExitStack() as stack:
        place = Path(folder or stack.enter_context(tempfile.TemporaryDirectory(prefix="metalstep-shape-")))
        path = write_shape_model(place / shape.lower(), shape)
        yield Subject(str(path), shape_name(shape))


def shape_name(shape: str) -> str:
    """Of a shape's random weights, for the head of a result."""
    return f"{shape.lower()}, random 4-bit weights in groups of 64"
