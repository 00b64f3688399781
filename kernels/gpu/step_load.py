"""step_load on a GPU: a thread per word of the step's arrays."""
from __future__ import annotations

import functools
from dataclasses import replace

from metalstep.kernels import params, step_load
from metalstep.kernels.gpu.bench_case import BenchCase, BenchSizes, Inputs
from metalstep.kernels.launch import Buffer, KernelCode, Launch

THREADS = 256  # of a threadgroup: a step has tens of thousands of words at most, any size serves


def launches(stage: Buffer, sampled: Buffer, region: Buffer, *, words: int, tokens_first: int, max_tokens: int) -> list[Launch]:
    """As kernels/step_load.py."""
    [launch] = step_load.launches(stage, sampled, region, words=words, tokens_first=tokens_first, max_tokens=max_tokens)
    return [replace(launch, grid=(-(-words // THREADS), 1, 1), threads=(THREADS, 1, 1), code=KernelCode(("step_load",), ""))]


def bench_cases(sizes: BenchSizes) -> list[BenchCase]:
    """The arrays of so many decoding rows, with block tables for the longest context."""
    cases = []
    for rows in sizes.sampled_rows:
        words = _words(sizes, rows)
        nbytes = step_load.WORD * (2 * words + rows) + rows * params.size("MSSampled")
        cases.append(BenchCase("step_load", "decode", rows, 0, nbytes, words, functools.partial(_bench_launches, words, rows)))
    return cases


def _words(sizes: BenchSizes, rows: int) -> int:
    """Of MSStep, and per row: six columns, a record and a row of the block tables."""
    own = 6 + (params.size("MSSampling") + params.size("MSSequence")) // step_load.WORD + -(-max(sizes.contexts) // sizes.block_size)
    return params.size("MSStep") // step_load.WORD + rows * own


def _bench_launches(words: int, rows: int, inputs: Inputs) -> list[Launch]:
    """Sources are small integers, most of them 0 or more: normal numbers, rounded to zero, which 16 results hold."""
    stage = inputs.activation("stage", (words + rows,), "int32")
    sampled = inputs.activation("sampled", (16 * params.size("MSSampled"),), "uint8")
    region = inputs.activation("region", (words,), "int32")
    return launches(stage, sampled, region, words=words, tokens_first=params.size("MSStep") // step_load.WORD, max_tokens=rows)
