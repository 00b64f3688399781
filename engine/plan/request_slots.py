"""What a running request keeps on the device: token biases, masks, history and counts, and its sampling record."""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from metalstep.kernels import params
from metalstep.plan.step_arrays import MASK_ROWS, SAMPLING, Records, StepArrays
from metalstep.sampling import MAX_TOKEN_ENTRIES, SamplingParams


class RequestSlots:
    """Fills the rows of `arrays` that belong to a slot. No step may be in flight that uses the slot."""

    def __init__(self, arrays: StepArrays):
        self._arrays = arrays

    def fill(self, slot: int, sampling: SamplingParams, tokens: list[int], num_prompt: int, stop_ids: frozenset[int]) -> Records:
        """Put a request's state into `slot` and return its SAMPLING record, shape (1,).

        tokens: prompt and output so far; a negative one is unknown and counts nowhere. stop_ids: not sampled before min_tokens.
        """
        arrays = self._arrays
        record: Records = np.zeros(1, SAMPLING)
        seed = sampling.seed or 0
        flags = 0
        if sampling.processed_logprobs:
            flags |= params.MS_SAMPLE_PROCESSED_LOGPROBS
        if sampling.temperature_first:
            flags |= params.MS_SAMPLE_TEMPERATURE_FIRST
        if sampling.has_penalty:
            flags |= params.MS_SAMPLE_COMMIT
            self._count(slot, tokens, num_prompt)
        at = slot * MAX_TOKEN_ENTRIES
        ranges = {}
        for name, entries in (
            ("bias", dict(sampling.logit_bias or {})),
            ("stop", dict.fromkeys(sorted(stop_ids) if sampling.min_tokens else (), 0.0)),
            ("xtc", dict.fromkeys(sampling.xtc_special_tokens, 0.0)),
        ):
            ranges[f"{name}_first"], ranges[f"{name}_count"] = at, len(entries)
            if entries:
                biases = arrays.edit(arrays.biases[at : at + len(entries)])
                biases["token"], biases["bias"] = list(entries), list(entries.values())
            at += len(entries)
        fields = dict(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            min_keep=sampling.min_tokens_to_keep,
            top_k=sampling.top_k,
            xtc_probability=sampling.xtc_probability,
            xtc_threshold=sampling.xtc_threshold,
            repetition_penalty=sampling.repetition_penalty,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            repetition_window=sampling.repetition_context_size,
            presence_window=sampling.presence_context_size,
            frequency_window=sampling.frequency_context_size,
            state=slot if sampling.has_penalty else -1,
            counted=len(tokens),
            min_tokens=sampling.min_tokens,
            mask=self._mask(slot, sampling),
            target=-1,
            top=sampling.logprobs,
            flags=flags,
            seed_lo=seed & 0xFFFFFFFF,
            seed_hi=seed >> 32,
            counter=len(tokens) - num_prompt,
            **ranges,
        )
        for name, value in fields.items():
            record[name] = value
        return record

    def grammar_row(self, slot: int) -> int:
        """The row of `masks` for the grammar of the request in `slot`."""
        return self._arrays.sizes.seqs + slot

    @staticmethod
    def report(record: Records, targets: Sequence[int], top: int) -> Records:
        """Records of rows that sample nothing but report on a given next token each, under the model's own distribution.

        record: the request's, shape (1,). targets: token ids, one per row. top: most likely tokens wanted.
        """
        records: Records = np.repeat(record, len(targets))
        records["target"], records["top"], records["state"] = targets, top, -1
        for name in ("mask", "grammar", "flags", "bias_count", "stop_count", "presence_penalty", "frequency_penalty"):
            records[name] = 0
        records["repetition_penalty"] = 1
        return records

    def _count(self, slot: int, tokens: list[int], num_prompt: int) -> None:
        known = np.asarray(tokens, np.int32)
        arrays = self._arrays
        arrays.edit(arrays.history[slot, : len(known)])[:] = known
        counts = arrays.edit(arrays.counts[slot])
        counts[:] = 0
        output = known[num_prompt:]
        np.add.at(counts, output[output >= 0], 1)
        prompt = known[:num_prompt]
        counts[prompt[prompt >= 0]] |= params.MS_COUNT_IN_PROMPT

    def _mask(self, slot: int, sampling: SamplingParams) -> int:
        """Write the request's own mask; returns MSSampling.mask."""
        if sampling.allowed_token_ids is None and not sampling.banned_token_ids:
            return 0
        vocab_size = self._arrays.sizes.vocab_size
        allowed = np.zeros(self._arrays.sizes.mask_words * 32, np.uint8)
        if sampling.allowed_token_ids is None:
            allowed[:vocab_size] = 1
        else:
            allowed[list(sampling.allowed_token_ids)] = 1
        allowed[list(sampling.banned_token_ids)] = 0
        self._arrays.edit(self._arrays.masks[slot])[:] = np.packbits(allowed, bitorder="little").view(np.uint32)
        return slot + 1


assert MASK_ROWS == 2  # the request's own masks, then the grammars'
