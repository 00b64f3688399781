"""The buffers of a step that every launch can read: counts, tokens, positions, cache places, which rows are sampled."""
from __future__ import annotations

from dataclasses import dataclass

from metalstep.kernels.launch import Buffer


@dataclass(frozen=True)
class StepBuffers:
    """Device buffers of one plan's step, written by the host before each run. Rows are tokens.

    Shapes and dtypes: step MSStep; tokens, positions, seq_ids, slot_mapping int32 [max_tokens]; block_tables int32
    [max_seqs, max_blocks]; sampled_rows int32, sampling MSSampling, sampled MSSampled [max_sampled].
    """

    step: Buffer
    tokens: Buffer
    positions: Buffer
    seq_ids: Buffer
    slot_mapping: Buffer
    block_tables: Buffer
    sampled_rows: Buffer
    sampling: Buffer
    sampled: Buffer

    def program_slots(self) -> list[Buffer]:
        """The bindings every program has, in the order of ms_program_slot."""
        return [self.step, self.tokens, self.positions, self.slot_mapping, self.sampled_rows]
