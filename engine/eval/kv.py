"""KV schemes against the float16 cache on one text: perplexity, divergence, agreement, needle retrieval."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from metalstep.bench.machine import machine
from metalstep.eval.divergence import Divergence
from metalstep.eval.needle import ANSWER_TOKENS, DEPTHS, NeedleCase, ask, needle_cases, summary
from metalstep.eval.schemes import EvalScheme, kv_bytes_per_token, load_scheme
from metalstep.model import Model
from metalstep.models.cache import make_prompt_cache
from metalstep.request import Request

CHUNK = 256  # positions whose logits of both models are held at a time
MIN_TOKENS = 32  # of a text
REFERENCE = EvalScheme("float16", "none")
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Window:
    """A sequence of its own. tokens: ids; following: the text's tokens behind each of them, one fewer at the text's end."""

    tokens: list[int]
    following: list[int]


def text_ids(tokenizer: Any, text: str) -> tuple[list[int], list[int]]:
    """What a sequence begins with (a bos token, where the tokenizer adds one), and the text's own ids."""
    ids = list(tokenizer.encode(text, add_special_tokens=False, verbose=False))  # it warns of texts beyond the context
    bos = getattr(tokenizer, "bos_token_id", None)
    begin = [] if bos is None or list(tokenizer.encode("a"))[:1] != [bos] else [bos]
    return begin, ids


def check_length(ids: Sequence[int], tokens: int | None) -> None:
    """Raises: ValueError for a text of fewer than `tokens` tokens, or of too few for any number to mean something."""
    needed = tokens or MIN_TOKENS
    if len(ids) < needed:
        hint = "pass a longer text or fewer tokens" if tokens else "pass a longer text"
        raise ValueError(f"the text has {len(ids)} tokens, expected at least {needed}; {hint}")


def windows(begin: list[int], ids: Sequence[int], context: int) -> list[Window]:
    """The text cut into sequences of up to `context` tokens, each with `begin` before it."""
    size = context - len(begin)
    cut = []
    for at in range(0, len(ids), size):
        tokens = [*begin, *ids[at : at + size]]
        cut.append(Window(tokens, [*tokens[1:], *ids[at + size : at + size + 1]]))
    return cut


def evaluate_kv(
    model: str | os.PathLike[str],
    schemes: Sequence[EvalScheme],
    text: str,
    *,
    tokens: int | None = None,
    context: int = 2048,
    needle_lengths: Sequence[int] = (),
    progress: Progress = lambda _: None,
    **options: Any,
) -> dict[str, Any]:
    """Run the text through each scheme, side by side with a float16 cache; see Divergence.result and needle.summary for the numbers.

    tokens: of the text that are used; None: all. context: tokens of a window; each begins anew. needle_lengths: tokens of the contexts in
    which a needle is hidden, at each of DEPTHS. options: of metalstep.load. Two models are in memory at a time.
    Raises: ValueError for a text that is too short; whatever load raises with strict.
    """
    longest = max([context, *(length + ANSWER_TOKENS for length in needle_lengths)])
    progress("loading the model")
    reference, tokenizer = load_scheme(model, REFERENCE, max_context=longest, **options)
    with reference:
        begin, ids = text_ids(tokenizer, text)
        check_length(ids, tokens)
        cases = needle_cases(tokenizer, ids, needle_lengths)
        used = ids[:tokens]
        cut = windows(begin, used, context)
        asked = _asked(reference, tokenizer, cases, partial(_report, progress, REFERENCE.label))
        rows = []
        for scheme in schemes:
            progress(f"{scheme.label}: loading the model")
            other, _ = load_scheme(model, scheme, max_context=longest, **options)
            with other:
                report = partial(_report, progress, scheme.label)
                row = {
                    "scheme": scheme.label,
                    "kv_bytes_per_token": kv_bytes_per_token(other),
                    **compare(reference, other, cut, report),
                }
                if cases:
                    results = _asked(other, tokenizer, cases, report)
                    row["needle"] = {**summary(results, asked), "results": results}
                rows.append(row)
        bytes_per_token = kv_bytes_per_token(reference)
        for row in rows:
            row["ratio"] = bytes_per_token / row["kv_bytes_per_token"]
        return {
            "machine": machine(),
            "model": os.fspath(model),
            "device": reference.device_description,
            "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
            "tokens": len(used),
            "context": context,
            "windows": len(cut),
            "reference": {
                "scheme": REFERENCE.label,
                "kv_bytes_per_token": bytes_per_token,
                "perplexity": rows[0]["perplexity_reference"],
                "perplexity_stderr": rows[0]["perplexity_reference_stderr"],
                **({"needle": {**summary(asked, asked), "results": asked}} if cases else {}),
            },
            "needle_lengths": list(needle_lengths),
            "needle_depths": list(DEPTHS) if cases else [],
            "rows": rows,
        }


def compare(reference: Model, other: Model, cut: Sequence[Window], progress: Progress = lambda _: None) -> dict[str, Any]:
    """Divergence.result of `other` over the windows. Memory: logits of CHUNK positions of both."""
    divergence = Divergence()
    done, total = 0, sum(len(window.tokens) for window in cut)
    for window in cut:
        caches = make_prompt_cache(reference), make_prompt_cache(other)
        for at in range(0, len(window.tokens), CHUNK):
            chunk = window.tokens[at : at + CHUNK]
            expected, got = (
                np.stack(model.engine.collect(Request(chunk, max_tokens=0, prompt_cache=cache)))
                for model, cache in zip((reference, other), caches, strict=True)
            )
            divergence.add(expected, got, np.array(window.following[at : at + CHUNK], np.int64))
            done += len(chunk)
            progress(f"{done:,} of {total:,} tokens")
    return divergence.result()


def _asked(model: Model, tokenizer: Any, cases: Sequence[NeedleCase], progress: Progress) -> list[dict[str, Any]]:
    results = []
    for i, case in enumerate(cases):
        progress(f"needle {i + 1} of {len(cases)}")
        results.append(ask(model, tokenizer, case))
    return results


def _report(progress: Progress, label: str, text: str) -> None:
    progress(f"{label}: {text}")
