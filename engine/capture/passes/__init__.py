"""Passes: Graph -> Graph, one per file. A graph computes the same before and after each (tests/capture)."""
from metalstep.capture.passes.constants import constants
from metalstep.capture.passes.embedding import embedding
from metalstep.capture.passes.epilogues import epilogues
from metalstep.capture.passes.linears import linears
from metalstep.capture.passes.matmuls import matmuls
from metalstep.capture.passes.norm_prologues import norm_prologues
from metalstep.capture.passes.prepare import prepare
from metalstep.capture.passes.row_indices import row_indices
from metalstep.capture.passes.row_programs import row_programs
from metalstep.capture.passes.sampled_rows import sampled_rows
from metalstep.capture.passes.views import views

PASSES = (
    constants,
    embedding,
    matmuls,
    views,
    prepare,
    sampled_rows,
    linears,
    epilogues,
    row_programs,
    norm_prologues,
    row_indices,
)

__all__ = ["PASSES"]
