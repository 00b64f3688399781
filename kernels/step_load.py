"""A step's arrays from what the host has staged for it, with tokens that the step before has sampled and the host has not seen."""
from __future__ import annotations

import numpy as np

from metalstep.kernels import params
from metalstep.kernels.launch import Buffer, Launch

WORD = 4  # bytes


def launches(stage: Buffer, sampled: Buffer, region: Buffer, *, words: int, tokens_first: int, max_tokens: int) -> list[Launch]:
    """Copy the stage to the region; a token whose source is 0 or more is that result's, or 0 where the result is not OK.

    Sizes: stage int32 [words + max_tokens], the region's content and then the tokens' sources; sampled MSSampled [..], counted
    through the steps and rows of a run; region int32 [words]. All may be longer.
    Units: words, tokens_first and max_tokens in elements of four bytes; tokens_first is the region's first token.
    Raises: ValueError for a buffer that is too short, not aligned or part of another, or tokens outside of the region. Sources are
    data and not checked: each is below the number of results.
    """
    if words < 1 or tokens_first < 0 or max_tokens < 0 or tokens_first + max_tokens > words:
        raise ValueError(
            f"step_load: tokens {tokens_first} to {tokens_first + max_tokens} of {words} words, expected a part of at least 1 word;"
            " give tokens_first and max_tokens in words of the region"
        )
    for name, buffer, nbytes in (
        ("stage", stage, WORD * (words + max_tokens)),
        ("sampled", sampled, params.size("MSSampled")),
        ("region", region, WORD * words),
    ):
        if buffer.nbytes < nbytes or buffer.offset % WORD:
            raise ValueError(
                f"step_load: {name} is {buffer.nbytes} bytes at offset {buffer.offset}, expected {nbytes} or more at a multiple of {WORD}"
            )
    for name, other in (("stage", stage), ("sampled", sampled)):
        if _overlap(region, other):
            raise ValueError(f"step_load: the region overlaps {name}, expected a place of its own: other threads still read it")
    constants = params.pack("MSStepLoadParams", words=words, tokens_first=tokens_first, max_tokens=max_tokens)
    return [Launch("step_load", [stage, sampled, region], constants, grid=(1, 1, 1), threads=(1, 1, 1))]


def _overlap(one: Buffer, other: Buffer) -> bool:
    return one.handle == other.handle and one.offset < other.offset + other.nbytes and other.offset < one.offset + one.nbytes


def reference(stage: np.ndarray, sampled: np.ndarray, *, words: int, tokens_first: int, max_tokens: int) -> np.ndarray:
    """What the kernel leaves in the region, int32 [words]. stage: int32 [words + max_tokens]; sampled: MSSampled of any shape."""
    region, results = stage[:words].copy(), sampled.reshape(-1)
    for token, source in enumerate(stage[words : words + max_tokens], tokens_first):
        if source >= 0:
            region[token] = results["token"][source] if results["status"][source] == params.MS_SAMPLE_OK else 0
    return region
