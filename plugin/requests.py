"""What the runner remembers of each request: vLLM's scheduler sends changes only, and never the tokens that were sampled."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from metalstep.plugin.sampling import engine_params, has_long_bad_words, wants_logits
from metalstep.plugin.token_masks import BadWords, ThinkingBudget, TokenMask
from metalstep.sampling import SamplingParams
from metalstep.step_session import Place, StepSession

if TYPE_CHECKING:
    from vllm.config.reasoning import ReasoningConfig
    from vllm.sampling_params import SamplingParams as VllmParams
    from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput

Report = tuple[Any, Any, Any]  # on a prompt token: a row of MSSampled, of MSTopLogprob, and the logits or None
UNKNOWN = -1  # a token that the device has sampled, or will, and the host has not seen


@dataclass(slots=True, eq=False)
class RequestState:
    """tokens: prompt and output; the last may be UNKNOWN, which lies at `pending`. blocks: per group, as vLLM numbers them.

    computed: tokens with keys and values when the next step begins. slot: of the session, -1 while preempted. masks: of each next token;
    structured: the scheduler sends masks of its own. reports: on prompt tokens, as far as they are computed; None: none are wanted.
    """

    req_id: str
    params: VllmParams
    sampling: SamplingParams
    prompt_len: int
    tokens: list[int]
    blocks: list[list[int]]
    computed: int
    masks: list[TokenMask]
    structured: bool
    wants_logits: bool
    pending: Place | None = None
    slot: int = -1
    reports: list[Report] | None = None

    @property
    def masked(self) -> bool:
        """Whether the mask of its next token is made between a step's two halves."""
        return self.structured or bool(self.masks)


class RequestTable:
    """Applies a scheduler's changes. block_ratio: session blocks in one of vLLM's.

    vLLM has two dialects for a request that comes back after a preemption: among the cached ones with `resumed_req_ids`, or as a new one
    again. Either way its block tables are replaced and the scheduler's tokens are the truth.
    """

    def __init__(self, session: StepSession, *, block_ratio: int, reasoning: ReasoningConfig | None):
        self._session = session
        self._ratio = block_ratio
        self._reasoning = reasoning
        self._states: dict[str, RequestState] = {}

    def suspend(self) -> None:
        """The session is about to close. Requests that vLLM keeps come back in the next one, as after a preemption."""
        for state in self._states.values():
            self._leave(state)

    def resume(self, session: StepSession) -> None:
        self._session = session

    def __getitem__(self, req_id: str) -> RequestState:
        return self._states[req_id]

    def __len__(self) -> int:
        return len(self._states)

    def update(self, output: SchedulerOutput) -> None:
        """Take in what has changed since the last step; requests of this step have a slot then."""
        for req_id in output.finished_req_ids:
            if state := self._states.pop(req_id, None):
                self._leave(state)
        for req_id in output.preempted_req_ids or ():
            if state := self._states.get(req_id):
                self._leave(state)
        for new in output.scheduled_new_reqs:
            self._enter(self._begin(new))
        self._go_on(output.scheduled_cached_reqs)

    def _begin(self, new: NewRequestData) -> RequestState:
        tokens = list(new.prompt_token_ids if new.prefill_token_ids is None else new.prefill_token_ids)
        state = self._states.get(new.req_id)
        if state is None:
            params = new.sampling_params
            assert params is not None and new.prompt_token_ids is not None  # others are refused
            state = self._states[new.req_id] = RequestState(
                req_id=new.req_id,
                params=params,
                sampling=engine_params(params),
                prompt_len=len(new.prompt_token_ids),
                tokens=tokens,
                blocks=[],
                computed=0,
                masks=self._masks(params),
                structured=params.structured_outputs is not None,
                wants_logits=wants_logits(params),
            )
        self._leave(state)  # a request may come back in the step after the one that preempted it
        state.tokens, state.pending = tokens, None
        state.blocks = [list(blocks) for blocks in new.block_ids]
        state.computed = new.num_computed_tokens
        return state

    def _go_on(self, cached: CachedRequestData) -> None:
        for i, req_id in enumerate(cached.req_ids):
            state, blocks = self._states[req_id], cached.new_block_ids[i]
            state.computed = cached.num_computed_tokens[i]
            if req_id in cached.resumed_req_ids:
                self._leave(state)
                state.tokens, state.pending = list(cached.all_token_ids[req_id]), None
                state.blocks = [list(ids) for ids in blocks or ()]
                self._enter(state)
            elif blocks is not None:
                for group, more in enumerate(blocks):
                    self._session.set_blocks(state.slot, group, len(state.blocks[group]) * self._ratio, self._expanded(more))
                    state.blocks[group] += more

    def _enter(self, state: RequestState) -> None:
        session = self._session
        state.slot = session.acquire()
        # Tokens of a request that comes back are all known: its last step is long over. If none of its output is left, vLLM has dropped
        # the answer that had the logprobs of its prompt.
        wants_prompt = state.params.prompt_logprobs is not None and len(state.tokens) == state.prompt_len
        state.reports = [] if wants_prompt else None
        stops = frozenset(state.params.all_stop_token_ids)
        session.fill(state.slot, state.sampling, state.tokens, state.prompt_len, stops, masked=state.masked)
        for group, blocks in enumerate(state.blocks):
            session.set_blocks(state.slot, group, 0, self._expanded(blocks))

    def _leave(self, state: RequestState) -> None:
        if state.slot >= 0:
            self._session.release(state.slot)
            state.slot = -1

    def _expanded(self, blocks: Sequence[int]) -> Sequence[int]:
        if self._ratio == 1:
            return blocks
        return [block * self._ratio + part for block in blocks for part in range(self._ratio)]

    def _masks(self, params: VllmParams) -> list[TokenMask]:
        masks: list[TokenMask] = []
        if has_long_bad_words(params):
            masks.append(BadWords(params.bad_words_token_ids or ()))
        budget, reasoning = params.thinking_token_budget, self._reasoning
        if budget is not None and budget >= 0 and reasoning is not None:
            start, end = reasoning.reasoning_start_token_ids, reasoning.reasoning_end_token_ids
            if start and end:
                masks.append(ThinkingBudget(start, end, budget))
        return masks
