"""What a step's results look like to vLLM."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from vllm.v1.outputs import AsyncModelRunnerOutput, LogprobsLists, LogprobsTensors, ModelRunnerOutput

Row = tuple[np.ndarray, np.ndarray, int]  # token ids [k + 1], logprobs [k + 1], rank (1: the most likely); the row's own token first


@dataclass
class StepResult(ModelRunnerOutput):
    """failed: why requests cannot go on, by id; scheduler.py ends them."""

    failed: dict[str, str] = field(default_factory=dict)


class StepOutput(AsyncModelRunnerOutput):
    """A step under way. vLLM asks for what it gave when it has begun the next one."""

    def __init__(self, finish: Callable[[], ModelRunnerOutput]):
        self._finish = finish

    def get_output(self) -> ModelRunnerOutput:
        """Waits for the device."""
        return self._finish()

    def get_kv_connector_output(self) -> None:
        """There is no KV connector."""
        return None


def logprob_row(result: Any, top: np.ndarray, count: int) -> Row:
    """A row of what the step reports. result: MSSampled; top: MSTopLogprob [32]; count: tokens wanted besides the row's own."""
    ids, logprobs = np.empty(count + 1, np.int32), np.empty(count + 1, np.float32)
    ids[0], logprobs[0] = result["token"], result["logprob"]
    ids[1:], logprobs[1:] = top["token"][:count], top["logprob"][:count]
    unused = ids < 0  # a vocabulary smaller than the count
    ids[unused], logprobs[unused] = 0, -np.inf
    return ids, logprobs, int(result["rank"])


def logprob_row_of(logits: np.ndarray, token: int, rank: int, count: int, chosen: Sequence[int] | None = None) -> Row:
    """A row from the logits, float32 [vocab]: of the `chosen` tokens, else of the `count` most likely ones; -1: of all."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max()
    logprobs = (shifted - np.log(np.exp(shifted).sum())).astype(np.float32)
    if chosen is not None:
        ids = np.asarray(chosen, np.int32)
    else:
        count = len(logits) if count < 0 else min(count, len(logits))
        ids = np.argsort(-logprobs, kind="stable")[:count].astype(np.int32)
    ids = np.concatenate([np.array([token], np.int32), ids])
    return ids, logprobs[ids], rank


def logprob_lists(rows: Sequence[Row | None]) -> LogprobsLists | None:
    """One row per request of the step, as wide as the widest; None where no request wants any."""
    width = max((len(row[0]) for row in rows if row is not None), default=0)
    if not width:
        return None
    ids, logprobs = np.zeros((len(rows), width), np.int32), np.full((len(rows), width), -np.inf, np.float32)
    ranks = np.zeros(len(rows), np.int32)
    for i, row in enumerate(rows):
        if row is not None:
            ids[i, : len(row[0])], logprobs[i, : len(row[0])], ranks[i] = row
    return LogprobsLists(ids, logprobs, ranks)


def prompt_logprob_tensors(rows: Sequence[Row]) -> LogprobsTensors:
    """One row per prompt token but the first."""
    width = len(rows[0][0]) if rows else 1
    ids = torch.from_numpy(np.array([row[0] for row in rows], np.int32).reshape(len(rows), width))
    logprobs = torch.from_numpy(np.array([row[1] for row in rows], np.float32).reshape(len(rows), width))
    return LogprobsTensors(ids, logprobs, torch.tensor([row[2] for row in rows], dtype=torch.int32))
