"""The next decode step's inputs from this step's samples, on the device: a run of several steps needs no host between them."""
from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from metalstep.kernels import params
from metalstep.kernels.launch import Launch
from metalstep.kernels.step import StepBuffers


def launches(step: StepBuffers, *, block_size: int, max_rows: int) -> list[Launch]:
    """Move each sampled row on by a token, where MSStep.advance is set; count MSStep.index in any case.

    Changes in place: step.step, tokens, positions, every group's slot_mappings, and counter and counted of sampling.
    Units: block_size in tokens; max_rows: rows from one step's results to the next's, as sample has it.
    Raises: ValueError for block tables and slot mappings of different groups, or a size below 1.
    """
    if len(step.slot_mappings) != len(step.block_tables):
        raise ValueError(
            f"step_advance: there are {len(step.slot_mappings)} slot mappings and {len(step.block_tables)} block tables; give each"
            " group of layers one of both"
        )
    if block_size < 1 or max_rows < 1:
        raise ValueError(f"step_advance: block_size is {block_size} and max_rows {max_rows}, expected 1 or more; pass the plan's own")
    constants = params.pack("MSStepAdvanceParams", block_size=block_size, groups=len(step.block_tables), max_rows=max_rows)
    bindings = [
        step.step, step.tokens, step.positions, step.seq_ids, step.sampled_rows, step.sampling, step.sampled, step.limits,
    ]  # fmt: skip
    for tables, slots in zip(step.block_tables, step.slot_mappings, strict=True):
        bindings += [tables, slots]
    return [Launch("step_advance", bindings, constants, grid=(1, 1, 1), threads=(1, 1, 1))]


def reference(step: np.void, arrays: Mapping[str, np.ndarray], block_size: int) -> dict[str, np.ndarray]:
    """What the kernel leaves of a step's arrays, written to be read: one row after another.

    arrays: tokens, positions and seq_ids [num_tokens]; sampled_rows, limits and sampling (MSSampling) [num_sampled]; sampled
    (MSSampled) [steps, max_rows]; tables [groups, num_seqs, max_blocks] and slots [groups, num_tokens].
    Changes in place: MSStep.index of `step`; the arrays are copied.
    """
    a = {name: array.copy() for name, array in arrays.items()}
    results = a["sampled"][step["index"]]
    step["index"] += 1
    for i, row in enumerate(a["sampled_rows"] if step["advance"] else []):
        if row >= step["num_tokens"]:
            continue
        ok = results["status"][i] == params.MS_SAMPLE_OK
        if ok:
            a["tokens"][row] = results["token"][i]
            a["sampling"]["counter"][i] += 1
            a["sampling"]["counted"][i] += bool(a["sampling"]["flags"][i] & params.MS_SAMPLE_COMMIT)
        moves = ok and a["positions"][row] + 1 < a["limits"][i]
        a["positions"][row] += moves
        for g in range(len(a["tables"])):
            block, place = divmod(int(a["positions"][row]), block_size)
            known = moves and 0 <= a["seq_ids"][row] < step["num_seqs"] and block < step["max_blocks"]
            number = a["tables"][g, a["seq_ids"][row], block] if known else -1
            a["slots"][g, row] = number * block_size + place if number >= 0 else -1
    return a
