"""metalstep's `batch_generate` in a process of its own, told over stdin what to run; between two requests it sleeps.

    python -m metalstep.bench.generate_worker MODEL OPTIONS

OPTIONS is a JSON object with arguments of `metalstep.load`. stdout carries one JSON object per line: first {"version", "gpu"}, then
{"seconds", "prompt_s", "tokens"} per request {"prompts": [[ids] ..], "tokens": N}; {"error"} when it fails. Every prompt gets N greedy
tokens, a token that ends a text is one like the others. seconds: of the call. prompt_s: of that until the last prompt has its first
token. tokens: generated in all.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

from metalstep.batch import batch_generate
from metalstep.bench.peers import is_gpu
from metalstep.bench.worker import described
from metalstep.model import Model, load


def measure(model: Model, tokenizer: Any, prompts: list[list[int]], tokens: int) -> dict[str, Any]:
    """One call; see the module's docstring."""
    started = time.perf_counter()
    response = batch_generate(model, tokenizer, prompts, max_tokens=tokens, return_token_ids=True)
    seconds = time.perf_counter() - started
    assert response.token_ids is not None
    lengths = [len(ids) for ids in response.token_ids]
    if lengths != [tokens] * len(prompts):
        raise RuntimeError(f"batch_generate gave {min(lengths)} to {max(lengths)} tokens, expected {tokens} for each prompt")
    return {"seconds": seconds, "prompt_s": response.stats.prompt_time, "tokens": sum(lengths)}


def main() -> None:
    # A library that prints must not disturb the answers: they keep the real stdout, everything else goes to stderr.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(line: dict[str, Any]) -> None:
        print(json.dumps(line), file=answers, flush=True)

    try:
        import metalstep

        options = json.loads(sys.argv[2])
        model, tokenizer = load(sys.argv[1], strict=True, **options)
        tokenizer.eos_token_ids = set()
        gpu = model.device_description if is_gpu(options.get("device")) else None
        answer({"version": f"metalstep {metalstep.__version__}, {model.device_description}", "gpu": gpu})
        for line in sys.stdin:
            answer(measure(model, tokenizer, **json.loads(line)))
    except Exception as error:  # becomes the parent's error
        answer({"error": described(error)})
        sys.exit(1)


if __name__ == "__main__":
    main()
