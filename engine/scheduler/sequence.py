"""One request as the scheduler sees it: its tokens, how many of them are computed, and what it holds."""
from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any

from metalstep.scheduler.block_tables import BlockTables


class State(enum.Enum):
    """WAITING: not run yet; RUNNING: has a slot; PREEMPTED: waits again; FINISHED: holds nothing."""

    WAITING = enum.auto()
    RUNNING = enum.auto()
    PREEMPTED = enum.auto()
    FINISHED = enum.auto()


@dataclass(slots=True, eq=False, kw_only=True)
class Sequence(BlockTables):
    """The engine fills the first part and appends to `tokens`; the scheduler owns the second.

    `tokens` is the truth: prompt and output, only ever appended to. A sequence decodes when all but its last token are computed.
    """

    tokens: list[int]
    prompt_len: int  # of tokens, what a prompt cache already holds included
    max_tokens_total: int  # prompt and output
    prefill_rows: int = 512  # rows of one chunk of its prompt, at most
    decode_steps: int | None = None  # decode steps of one run, at most; None: the scheduler's
    cacheable: bool = True  # its blocks are found by, and for, others with the same tokens
    salt: bytes = b""  # what else its keys and values depend on; sequences share blocks only under one salt
    prompt_logprobs: bool = False  # every row of the prompt gives a result, so none is taken from the prefix cache
    recomputable: bool = True  # False: its tokens do not give its blocks again; they are saved when it is preempted
    request: Any = None  # the engine's own

    state: State = State.WAITING
    arrival: int = -1  # place in the queue, given by `add`
    slot: int = -1  # 0..max_seqs-1 while running
    parked: bool = False  # its next token is being picked by the caller
    lost: bool = False  # not recomputable and its blocks were lost: end it, or fork its prompt cache into it again
    snapshot: Any = None  # what on_evict made of its blocks, until they are restored and the step behind is done
    snapshot_tokens: int = 0  # computed tokens that the snapshot holds
    num_preemptions: int = 0
    num_cached: int = 0  # tokens that the prefix cache gave when it was last admitted
    results: int = 0  # rows of the prompt whose results were handed out; counted with prompt_logprobs only
    digests: list[bytes] = field(default_factory=list)  # of the full blocks of `tokens`, as far as computed
    published: int = 0  # full blocks that publish has seen
    boundary: int = 0  # `computed` from which on a block is full that publish has not seen
