"""Time to first token and decode speed of metalstep and its peers on one model, measured in turns in one run."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from metalstep.batch import DECODE_STEPS
from metalstep.bench.machine import machine
from metalstep.bench.rounds import (
    SAMPLED,
    Case,
    Contender,
    Progress,
    Runs,
    alternate,
    contenders,
    variant_options,
    workers,
)
from metalstep.bench.statistics import better, common_prefixes, ratio, summary
from metalstep.bench.subject import Subject
from metalstep.choices import DEFAULT_DEVICE, MAX_SEQS, PREFILL_ROWS
from metalstep.model import make_target

NO_TIME, NO_ROOM = "no time was left", "it does not fit the KV cache"
SHORT_TOKENS = 1 << 16  # of all prompts of a case together
NOT_TIMED = "loading, making contexts, tokenizing, detokenizing"


def bench_decode(
    subject: Subject,
    against: list[str],
    *,
    pairs: int,
    tokens: int,
    prompts: list[int],
    batches: list[int],
    threads: int,
    decode_steps: int = 1,
    call: str = "steps",
    also: Sequence[str] = (),
    seconds: float | None = None,
    options: dict[str, Any] | None = None,
    peers_path: str | None = None,
    progress: Progress = lambda _: None,
    said: Progress = lambda _: None,
) -> dict[str, Any]:
    """Measure metalstep and `against` in turns: `pairs` rounds, in each every batch size and prompt length, in each every engine.

    prompts: tokens of a prompt, and so of the context at which decoding starts. batches: sequences decoded together, each with a
    prompt of its own. tokens: decoded per sequence and measurement. decode_steps: tokens that metalstep may compute in one native
    call. call: how metalstep is called, "steps" of its engine or "batch_generate". also: see `contenders`. seconds: see `alternate`.
    options: what it loads with. said: told of each measurement. Each engine is a process that loads once and idles while another is
    measured; a round before the first is not counted. On a GPU a step is also timed on the device alone.
    Returns machine, gpu, engines, cases (per batch, prompt and engine: TTFT of the last sequence in ms, decode in tok/s of all sequences
    together, and for metalstep GB/s of weights and KV cache), ratios (metalstep over the peer with the better of its settings, above 1
    is faster), also (its variants over itself) and left_out (cases that do not fit its cache, or for which there was no time).
    Raises: PeerError for a peer that cannot be started.
    """
    engines = ["metalstep", *against]
    cases = [Case(batch, prompt, tokens) for batch in batches for prompt in prompts]
    field = contenders(engines, decode_steps=decode_steps, call=call, also=also)
    ours = field[0]
    rows = step_rows((options or {}).get("device"))

    def room(case: Case) -> int:
        """Tokens of one sequence at its end. While the last prompts are taken in, the first sequences decode a token a step."""
        return case.positions + 2 * max(decode_steps, DECODE_STEPS) + case.batch * case.prompt // (rows - MAX_SEQS)

    def measured(case: Case, contender: Contender, run: dict[str, Any]) -> None:
        said(f"{contender.name}, {case.name}: {rate(run):.1f} tok/s, TTFT {run['ttft_s'] * 1e3:.1f} ms")

    with workers(
        subject,
        engines,
        max_context=max(map(room, cases)),
        threads=threads,
        options=options or {},
        variants={name: variant_options(name) for name in also if name != SAMPLED},
        peers_path=peers_path,
        progress=progress,
    ) as started:
        heads = started.heads
        fitting = [case for case in cases if case.batch * room(case) <= heads[0]["kv_tokens"]]
        runs = alternate(
            started.measure, started.prompts, fitting, lambda _: field, pairs, progress, seconds=seconds, measured=measured
        )
        alone = {case: started.device_steps(case) for case in fitting if heads[0]["gpu"] and (case, ours) in runs and is_short(case)}
    return {
        "machine": machine(),
        "gpu": heads[0]["gpu"],
        "model": subject.name,
        "engines": heads,
        "pairs": pairs,
        "tokens": tokens,
        "decode_steps": decode_steps,
        "call": call,
        "not_timed": NOT_TIMED,
        "cases": [
            case_row(case, contender, samples, started.head_of(contender), alone.get(case) if contender == ours else None)
            for (case, contender), samples in runs.items()
        ],
        "ratios": [ratios(case, ours, field, name, runs) for case in cases if (case, ours) in runs for name in against],
        "also": [
            {"setting": other.setting, "batch": case.batch, "prompt_tokens": case.prompt, **over(case, other, ours, runs)}
            for case in cases if (case, ours) in runs for other in field if other.engine == ours.engine and other != ours
        ],
        "left_out": [
            {"batch": case.batch, "prompt_tokens": case.prompt, "reason": NO_TIME if case in fitting else NO_ROOM}
            for case in cases if (case, ours) not in runs
        ],
    }  # fmt: skip


def step_rows(device: str | None) -> int:
    """Rows of a step, at most. device: one of load's names."""
    target = make_target(device or DEFAULT_DEVICE, threads=None, arithmetic="int16", batch_invariant=False)
    return PREFILL_ROWS if target is None else target.max_rows


def is_short(case: Case) -> bool:
    """Whether its prompts are taken in once more for a time of the device alone."""
    return case.batch * case.prompt <= SHORT_TOKENS


def rate(run: dict[str, Any]) -> float:
    """Decoded tokens per second, of all sequences together."""
    return sum(run["step_tokens"]) / sum(run["steps_s"])


def over(case: Case, other: Contender, ours: Contender, runs: Runs) -> dict[str, Any]:
    """A variant's speed over metalstep's own, above 1 it is faster: decode rates, and 1 / TTFT."""
    pairs = [(runs[case, contender]) for contender in (other, ours)]
    return {
        "decode": ratio(*([rate(run) for run in found] for found in pairs)),
        "ttft": ratio(*([1 / run["ttft_s"] for run in found] for found in pairs)),
    }


def case_row(
    case: Case, contender: Contender, runs: list[dict[str, Any]], ours: dict[str, Any], alone: list[float] | None = None
) -> dict[str, Any]:
    """One row: an engine in one case. ours: metalstep's head, for the bytes it reads. alone: seconds of a step on the device alone."""
    steps = [step for run in runs for step in zip(run["step_tokens"], run["steps_s"], strict=True)]
    row: dict[str, Any] = {
        "engine": contender.engine,
        "setting": contender.setting,
        "batch": case.batch,
        "prompt_tokens": case.prompt,
        "ttft_ms": summary([run["ttft_s"] * 1e3 for run in runs], best="min"),
        "decode_tok_s": summary([rate(run) for run in runs]),
        "best_step_tok_s": max(count / seconds for count, seconds in steps),
    }
    if contender.engine == "metalstep":
        # A step reads the weights once and each sequence's cache, on average as it is at half way of the timed tokens.
        cached = case.prompt + 1 + case.tokens / 2
        read = ours["weight_bytes"] / case.batch + ours["kv_bytes"] * cached
        row["bytes_per_token"] = round(read)
        row["gb_s"] = summary([rate(run) * read / 1e9 for run in runs])
    if alone:
        row["device_step_us"] = summary([seconds * 1e6 for seconds in alone], best="min")
        row["busy"] = statistics.median(alone) * row["decode_tok_s"]["median"] / case.batch
    return row


def ratios(case: Case, ours: Contender, field: list[Contender], against: str, runs: Runs) -> dict[str, Any]:
    """metalstep over a peer: of decode rates, and of 1 / TTFT. Above 1 metalstep is faster.

    Each is against the peer's setting with the better median in just that. same_ids: tokens in which the greedy texts agree before
    they first differ, the median of all sequences and the fraction of them that agree to the end; a near tie between two tokens may
    end it.
    """
    peers = [contender for contender in field if contender.engine == against]

    def rates(contender: Contender) -> list[float]:
        return [rate(run) for run in runs[case, contender]]

    def speeds(contender: Contender) -> list[float]:
        return [1 / run["ttft_s"] for run in runs[case, contender]]

    fastest, first = better(peers, rates), better(peers, speeds)
    return {
        "against": against,
        "batch": case.batch,
        "prompt_tokens": case.prompt,
        "decode": {"setting": fastest.setting, **ratio(rates(ours), rates(fastest))},
        "ttft": {"setting": first.setting, **ratio(speeds(ours), speeds(first))},
        "same_ids": common_prefixes(
            [ids[: case.tokens + 1] for run in runs[case, ours] for ids in run["ids"]],
            [ids[: case.tokens + 1] for run in runs[case, fastest] for ids in run["ids"]],
        ),
    }
