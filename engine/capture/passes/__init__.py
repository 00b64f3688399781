"""Passes: Graph -> Graph, one per file. A graph computes the same before and after each (tests/capture)."""
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from metalstep.capture.graph import Graph
from metalstep.capture.passes.attention_insides import attention_insides
from metalstep.capture.passes.constants import constants
from metalstep.capture.passes.embedding import embedding
from metalstep.capture.passes.epilogues import epilogues
from metalstep.capture.passes.linears import linears
from metalstep.capture.passes.matmuls import matmuls
from metalstep.capture.passes.norm_prologues import NORMS, norm_prologues
from metalstep.capture.passes.planes import planes
from metalstep.capture.passes.prepare import prepare
from metalstep.capture.passes.row_indices import row_indices
from metalstep.capture.passes.row_programs import row_programs
from metalstep.capture.passes.sampled_rows import sampled_rows
from metalstep.capture.passes.views import views


class Linears(Protocol):
    """What depends on a linear's sizes. Equal ones answer alike: graphs are kept by them."""

    def norm_fits(self, size: int) -> bool:
        """Whether linears norm rows of so many elements."""

    def planes(self, outputs: int, k: int, bits: int) -> int:
        """In how many planes a linear leaves its products for the row program behind it."""


@dataclass(frozen=True)
class Fusion:
    """What a device does inside of its launches. norms: those that linears do to their input. linears: None: they norm rows of any size and
    leave one plane. attention: whether attention norms, rotates and writes its own row (each row of a step is then of another sequence)."""

    norms: tuple[str, ...] = NORMS
    linears: Linears | None = None
    attention: bool = False


def passes(fusion: Fusion) -> list[Callable[[Graph], Graph]]:
    """The passes in order."""
    split = [] if fusion.linears is None else [partial(planes, planes_of=fusion.linears.planes)]
    fits = None if fusion.linears is None else fusion.linears.norm_fits
    last = [attention_insides] if fusion.attention else []
    return [
        constants,
        embedding,
        matmuls,
        views,
        prepare,
        sampled_rows,
        linears,
        *split,
        epilogues,
        row_programs,
        partial(norm_prologues, norms=fusion.norms, fits=fits),
        *last,
        row_indices,
    ]


__all__ = ["Fusion", "Linears", "passes"]
