"""One engine in a process of its own, told over stdin what to measure. Runs in a peer's virtual environment, so at import it needs
the standard library and numpy alone.

    python worker.py ENGINE MODEL THREADS MAX_CONTEXT

stdout carries one JSON object per line: first {"engine", "version", "load_s"}, then an answer per request line on stdin,
{"prompt": [ids], "tokens": N} -> {"ttft_s", "steps_s": [N times], "ids": [N + 1 ids]}; {"error"} when it fails. ttft_s is from
the prompt's ids to the first token, greedy; steps_s are the N tokens behind it. Tokenizing and detokenizing are not timed.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import sys
import time
from collections.abc import Callable, Generator
from typing import Any, Protocol

import numpy as np


class Engine(Protocol):
    """An engine under measurement. version: of the engine and what it runs on."""

    version: str

    def greedy(self, prompt: list[int]) -> Generator[int, None, None]:
        """The tokens behind `prompt` in a fresh sequence, one per `next`, without end."""
        ...


class MetalStep:
    """metalstep's native step; MODEL is anything that `metalstep.load` takes."""

    def __init__(self, model: str, threads: int, max_context: int):
        import metalstep

        loaded, _ = metalstep.load(model, threads=threads, strict=True, max_context=max_context)
        self.version = f"metalstep {metalstep.__version__}, {loaded.device_description}"
        if loaded.native is None:  # strict raises before
            raise RuntimeError(loaded.fallback_reason)
        self._native = loaded.native
        plan = loaded.explain()
        self.weight_bytes = plan["weight_bytes_per_token"]
        self.kv_bytes = plan["kv_bytes_per_token"]

    def greedy(self, prompt: list[int]) -> Generator[int, None, None]:
        from metalstep import SamplingParams

        run = self._native.start(SamplingParams(seed=0))
        try:
            token = run.prefill(np.asarray(prompt)).token
            while True:
                yield token
                token = run.decode(token).token
        finally:
            run.close()


class MlxLm:
    """mlx-lm's own generate_step; MODEL is an mlx-lm directory."""

    def __init__(self, model: str, threads: int, max_context: int):
        from importlib.metadata import version
        from pathlib import Path

        import mlx.core as mx
        from mlx_lm.utils import load_model

        self._model = load_model(Path(model))[0]
        self.version = f"mlx-lm {version('mlx-lm')}, mlx {version('mlx')}, {mx.default_device()}"

    def greedy(self, prompt: list[int]) -> Generator[int, None, None]:
        import mlx.core as mx
        from mlx_lm.generate import generate_step

        for token, _ in generate_step(mx.array(prompt), self._model, max_tokens=-1):
            yield int(token)


class LlamaCpp:
    """llama.cpp through llama-cpp-python's batch API; MODEL is a .gguf file."""

    def __init__(self, model: str, threads: int, max_context: int):
        import llama_cpp as llama

        self._llama = llama
        llama.llama_backend_init()
        self._quiet = llama.llama_log_callback(lambda *_: None)
        llama.llama_log_set(self._quiet, ctypes.c_void_p(0))
        options = llama.llama_model_default_params()
        self._model = llama.llama_model_load_from_file(model.encode(), options)
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {model}")
        self._vocab_size = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self._model))
        self._threads, self._max_context = threads, max_context
        self.version = f"llama-cpp-python {llama.__version__}"

    def greedy(self, prompt: list[int]) -> Generator[int, None, None]:
        llama = self._llama
        options = llama.llama_context_default_params()
        options.n_ctx = options.n_batch = self._max_context
        options.n_threads = options.n_threads_batch = self._threads
        context = llama.llama_init_from_model(self._model, options)
        batch = llama.llama_batch_init(self._max_context, 0, 1)
        try:
            at, tokens = 0, prompt
            while True:
                batch.n_tokens = len(tokens)
                for i, token in enumerate(tokens):
                    batch.token[i], batch.pos[i] = token, at + i
                    batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
                    batch.logits[i] = i == len(tokens) - 1
                if llama.llama_decode(context, batch):
                    raise RuntimeError("llama_decode failed")
                logits = np.ctypeslib.as_array(
                    llama.llama_get_logits_ith(context, len(tokens) - 1), (self._vocab_size,)
                )
                at, tokens = at + len(tokens), [int(logits.argmax())]
                yield tokens[0]
        finally:
            llama.llama_batch_free(batch)
            llama.llama_free(context)


ENGINES: dict[str, Callable[[str, int, int], Engine]] = {"metalstep": MetalStep, "mlx-lm": MlxLm, "llama.cpp": LlamaCpp}


def measure(engine: Engine, prompt: list[int], tokens: int) -> dict[str, Any]:
    """Times of one greedy run; see the module's docstring."""
    clock = time.perf_counter
    started = clock()
    with contextlib.closing(engine.greedy(prompt)) as stream:
        ids = [next(stream)]
        ttft, steps = clock() - started, []
        for _ in range(tokens):
            before = clock()
            ids.append(next(stream))
            steps.append(clock() - before)
    return {"ttft_s": ttft, "steps_s": steps, "ids": ids}


def main() -> None:
    # A library that prints must not disturb the answers: they keep the real stdout, everything else goes to stderr.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(line: dict[str, Any]) -> None:
        print(json.dumps(line), file=answers, flush=True)

    name, model, threads, max_context = sys.argv[1:5]
    try:
        started = time.perf_counter()
        engine = ENGINES[name](model, int(threads), int(max_context))
        head = {"engine": name, "version": engine.version, "load_s": time.perf_counter() - started}
        bytes_read = {key: getattr(engine, key) for key in ("weight_bytes", "kv_bytes") if hasattr(engine, key)}
        answer({**head, **bytes_read})
        for line in sys.stdin:
            request = json.loads(line)
            answer(measure(engine, request["prompt"], request["tokens"]))
    except Exception as error:  # becomes the parent's error
        answer({"error": f"{type(error).__name__}: {error}"})
        sys.exit(1)


if __name__ == "__main__":
    main()
