"""Sampling inside the step: filters as mlx-lm's make_sampler applies them, then one counter-based draw per row.

Source of the generator: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC 2011), Philox 4x32-10.
"""
from __future__ import annotations

from metalstep.kernels import params
from metalstep.kernels.launch import Buffer, Launch
from metalstep.kernels.step import StepBuffers

THREADS = 256


def launches(logits: Buffer, step: StepBuffers, vocab_size: int, max_rows: int) -> list[Launch]:
    """One MSSampled per sampled row from logits [num_sampled, vocab_size] float32 and the row's MSSampling."""
    constants = params.pack("MSSampleParams", vocab_size=vocab_size)
    bindings = [step.step, logits, step.sampling, step.sampled]
    return [Launch("sample", bindings, constants, grid=(max_rows, 1, 1), threads=(THREADS, 1, 1))]
