"""The buffers of a step that every launch can read: counts, tokens, positions, cache places, which rows are sampled."""
from __future__ import annotations

from dataclasses import dataclass

from metalstep.kernels.launch import Buffer


@dataclass(frozen=True)
class StepBuffers:
    """Device buffers of the step, written by the host before a run and by step_advance between the steps of one. Rows are tokens.

    Shapes and dtypes: step MSStep; tokens, positions, seq_ids int32 [max_tokens]; per group of layers slot_mappings int32 [max_tokens]
    and block_tables int32 [max_seqs, max_blocks]; sequences MSSequence [max_seqs]; embeddings float32 [max_tokens, hidden_size];
    sampled_rows, limits int32 [max_sampled]; sampling MSSampling [max_sampled]; sampled MSSampled [max_steps, max_sampled];
    top MSTopLogprob [max_steps, max_sampled, max_top]; biases, masks, history and counts: see ms_sample_slot.
    """

    step: Buffer
    tokens: Buffer
    positions: Buffer
    seq_ids: Buffer
    slot_mappings: tuple[Buffer, ...]
    block_tables: tuple[Buffer, ...]
    sequences: Buffer
    embeddings: Buffer
    sampled_rows: Buffer
    limits: Buffer
    sampling: Buffer
    sampled: Buffer
    top: Buffer
    biases: Buffer
    masks: Buffer
    history: Buffer
    counts: Buffer

    def program_slots(self, group: int = 0) -> list[Buffer]:
        """The bindings every program has, in the order of ms_program_slot. group: of the layers whose cache it writes."""
        return [self.step, self.tokens, self.positions, self.slot_mappings[group], self.sampled_rows]
