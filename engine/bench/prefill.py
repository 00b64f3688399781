"""Speed of prompts: tokens per second of a fresh one to its first token, metalstep and llama.cpp in turns in one run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from metalstep.bench.machine import machine
from metalstep.bench.rounds import Case, Contender, Progress, Runs, alternate, contenders, variant_options, workers
from metalstep.bench.statistics import better, common_prefixes, ratio, summary
from metalstep.bench.subject import Subject

NOT_TIMED = "loading, making contexts, tokenizing"
UBATCH = 512  # llama.cpp's own: rows that it computes at once


def bench_prefill(
    subject: Subject,
    against: list[str],
    *,
    pairs: int,
    lengths: list[int],
    threads: int,
    also: Sequence[str] = (),
    seconds: float | None = None,
    options: dict[str, Any] | None = None,
    peers_path: str | None = None,
    progress: Progress = lambda _: None,
    said: Progress = lambda _: None,
) -> dict[str, Any]:
    """Measure metalstep and `against` in turns: `pairs` rounds, in each every length, in each every engine on the same fresh prompt.

    lengths: tokens of the prompt. llama.cpp runs with flash attention on and off, and where a prompt is longer than 512 tokens also
    with a ubatch that takes it whole; a ratio is against the better of them. also, seconds: see `contenders` and `alternate`. options: what
    metalstep loads with. said: told of each measurement. Returns machine, gpu, engines, cases (per length and engine: prompt tokens per
    second up to the first token), ratios, also (metalstep's variants over itself) and left_out (lengths for which there was no time).
    Raises: PeerError for a peer that cannot be started.
    """
    engines = ["metalstep", *against]
    cases = [Case(1, length, 0) for length in lengths]

    def field(case: Case) -> list[Contender]:
        return contenders(engines, ubatches=(UBATCH,) if case.prompt <= UBATCH else (UBATCH, case.prompt), also=also)

    def measured(case: Case, contender: Contender, run: dict[str, Any]) -> None:
        said(f"{contender.name}, {case.name}: {rates(case, [run])[0]:.0f} tok/s, TTFT {run['ttft_s'] * 1e3:.1f} ms")

    with workers(
        subject,
        engines,
        max_context=max(lengths) + 1,
        threads=threads,
        options=options or {},
        variants={name: variant_options(name) for name in also},
        peers_path=peers_path,
        progress=progress,
    ) as started:
        runs = alternate(started.measure, started.prompts, cases, field, pairs, progress, seconds=seconds, measured=measured)
        heads = started.heads
    done = [case for case in cases if (case, field(case)[0]) in runs]
    return {
        "machine": machine(),
        "gpu": heads[0]["gpu"],
        "model": subject.name,
        "engines": heads,
        "pairs": pairs,
        "not_timed": NOT_TIMED,
        "cases": [
            {
                "engine": contender.engine,
                "setting": contender.setting,
                "prompt_tokens": case.prompt,
                "prompt_tok_s": summary(rates(case, samples)),
            }
            for (case, contender), samples in runs.items()
        ],
        "ratios": [ratios(case, field(case), name, runs) for case in done for name in against],
        "also": [
            {"setting": other.setting, "prompt_tokens": case.prompt, "prefill": over(case, other, field(case)[0], runs)}
            for case in done for other in field(case)[1:] if other.engine == "metalstep"
        ],
        "left_out": [{"prompt_tokens": case.prompt, "reason": "no time was left"} for case in cases if case not in done],
    }  # fmt: skip


def over(case: Case, other: Contender, ours: Contender, runs: Runs) -> dict[str, float]:
    """A variant's speed over metalstep's own, above 1 it is faster."""
    return ratio(rates(case, runs[case, other]), rates(case, runs[case, ours]))


def rates(case: Case, runs: list[dict[str, Any]]) -> list[float]:
    """Prompt tokens per second, a sample per run."""
    return [case.prompt / run["ttft_s"] for run in runs]


def ratios(case: Case, field: list[Contender], against: str, runs: Runs) -> dict[str, Any]:
    """metalstep over a peer with the better of its settings. same_ids: whether the first tokens agree; see the decode benchmark's."""
    ours = field[0]
    peers = [contender for contender in field if contender.engine == against]
    fastest = better(peers, lambda contender: rates(case, runs[case, contender]))
    return {
        "against": against,
        "prompt_tokens": case.prompt,
        "prefill": {
            "setting": fastest.setting,
            **ratio(rates(case, runs[case, ours]), rates(case, runs[case, fastest])),
        },
        "same_ids": common_prefixes(
            [run["ids"][0] for run in runs[case, ours]], [run["ids"][0] for run in runs[case, fastest]]
        ),
    }
