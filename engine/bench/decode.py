"""Time to first token and decode speed of metalstep and its peers on one model, measured in turns in one run."""

from __future__ import annotations

from typing import Any

from metalstep.bench.machine import machine
from metalstep.bench.rounds import Case, Contender, Progress, Runs, alternate, contenders, workers
from metalstep.bench.statistics import better, common_prefixes, ratio, summary
from metalstep.native_model import MAX_SEQS, PREFILL_ROWS

NOT_TIMED = "loading, making contexts, tokenizing, detokenizing"


def bench_decode(
    model: str,
    against: list[str],
    *,
    pairs: int,
    tokens: int,
    prompts: list[int],
    batches: list[int],
    threads: int,
    decode_steps: int = 1,
    options: dict[str, Any] | None = None,
    peers_path: str | None = None,
    progress: Progress = lambda _: None,
) -> dict[str, Any]:
    """Measure metalstep and `against` in turns: `pairs` rounds, in each every batch size and prompt length, in each every engine.

    prompts: tokens of a prompt, and so of the context at which decoding starts. batches: sequences decoded together, each with a
    prompt of its own. tokens: decoded per sequence and measurement. decode_steps: tokens that metalstep may compute in one native
    call. options: what it loads with. Each engine is a process that loads once and idles while another is measured; a round before
    the first is not counted. Returns machine, engines, cases (per batch, prompt and engine: TTFT of the last sequence in ms, decode
    in tok/s of all sequences together, and for metalstep GB/s of weights and KV cache) and ratios (metalstep over the peer with the
    better of its settings, above 1 is faster).
    Raises: PeerError for a peer that cannot be started.
    """
    engines = ["metalstep", *against]
    cases = [Case(batch, prompt, tokens) for batch in batches for prompt in prompts]
    field = contenders(engines, decode_steps=decode_steps)
    # While the last prompts are taken in, some hundred rows a step, the first sequences decode a token a step.
    ahead = 2 * decode_steps + max(case.batch * case.prompt for case in cases) // (PREFILL_ROWS - MAX_SEQS)
    with workers(
        model,
        engines,
        max_context=max(case.positions for case in cases) + ahead,
        threads=threads,
        options=options or {},
        peers_path=peers_path,
        progress=progress,
    ) as started:
        runs = alternate(started.measure, started.prompts, cases, lambda _: field, pairs, progress)
        heads = started.heads
    return {
        "machine": machine(),
        "model": model,
        "engines": heads,
        "pairs": pairs,
        "tokens": tokens,
        "decode_steps": decode_steps,
        "not_timed": NOT_TIMED,
        "cases": [case_row(case, contender, samples, heads[0]) for (case, contender), samples in runs.items()],
        "ratios": [ratios(case, field[0], field, name, runs) for case in cases for name in against],
    }


def rate(run: dict[str, Any]) -> float:
    """Decoded tokens per second, of all sequences together."""
    return sum(run["step_tokens"]) / sum(run["steps_s"])


def case_row(case: Case, contender: Contender, runs: list[dict[str, Any]], ours: dict[str, Any]) -> dict[str, Any]:
    """One row: an engine in one case. ours: metalstep's head, for the bytes it reads."""
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
