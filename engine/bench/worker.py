"""One engine in a process of its own, told over stdin what to measure. Runs in a peer's virtual environment, so at import it needs
the standard library and numpy alone.

    python worker.py ENGINE MODEL THREADS MAX_CONTEXT OPTIONS

OPTIONS is a JSON object of the engine's own. stdout carries one JSON object per line: first {"engine", "version", "load_s"}, then an
answer per request line on stdin, {"prompts": [[ids] ..], "tokens": N, ..} with further keys that are settings of the engine, ->
{"ttft_s", "steps_s": [..], "step_tokens": [..], "ids": [[at least N + 1 ids] ..]}; {"error"} when it fails. The prompts are decoded
together, greedy. ttft_s is from their ids to the time when every sequence has its first token. The steps behind it bring N tokens
per sequence or a few more: steps_s are their times and step_tokens what they brought to all sequences. What makes up a step is said
at each engine. Tokenizing and detokenizing are not timed. With {"device_step": true} besides, metalstep answers {"device_step_s"}.
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

Steps = Generator[list[list[int]], None, None]
SAMPLED: dict[str, Any] = {"temperature": 0.8, "top_p": 0.95, "logprobs": 5}  # what "sampled" asks of metalstep, instead of greedy


class Engine(Protocol):
    """An engine under measurement. version: of the engine and what it runs on."""

    version: str

    @property
    def greedy(self) -> Callable[..., Steps]:
        """greedy(prompts, tokens, **settings): decode fresh sequences together.

        Each `next` is a step and gives the new tokens of each sequence; the first only prepares. tokens: that will be taken of each
        sequence behind its first; there may be more. settings: the engine's own.
        """
        ...


class MetalStep:
    """metalstep's engine, by the calls that any program makes; MODEL is anything that `metalstep.load` takes.

    A step is one native call and what Python does around it; with decode_steps it may bring several tokens. Where the call is
    batch_generate, it is the one step.
    """

    def __init__(self, model: str, threads: int, max_context: int, **options: Any):
        import metalstep
        from metalstep.bench.peers import is_gpu
        from metalstep.kv_plane import BLOCK_SIZE
        from metalstep.model import DEFAULT_DEVICE

        own_threads = threads if (options.get("device") or DEFAULT_DEVICE) == "host" else None
        loaded, self._tokenizer = metalstep.load(model, threads=own_threads, strict=True, max_context=max_context, **options)
        self.version = f"metalstep {metalstep.__version__}, {loaded.device_description}"
        if loaded.native is None:  # strict raises before
            raise RuntimeError(loaded.fallback_reason)
        self._tokenizer.eos_token_ids = set()  # a token that ends a text is one like the others
        self._model, self._engine = loaded, loaded.engine
        self._rows = loaded.native.target.max_rows
        plan = loaded.explain()
        self.weight_bytes = plan["weight_bytes_per_token"]
        self.kv_bytes = plan["kv_bytes_per_token"]
        self.kv_tokens = self._engine.stats().total_blocks * BLOCK_SIZE
        self.gpu = loaded.native.device.info.name if is_gpu(options.get("device")) else None

    def greedy(self, prompts: list[list[int]], tokens: int, decode_steps: int = 1, sampled: bool = False) -> Steps:
        """sampled: draw as SAMPLED says instead."""
        from metalstep import Request, SamplingParams
        from metalstep.bench.engine_steps import engine_steps

        fields = SAMPLED if sampled else {}
        requests = [
            Request(prompt, SamplingParams(seed=seed, **fields), decode_steps=decode_steps) for seed, prompt in enumerate(prompts)
        ]
        known = self._engine.stats().cached_tokens
        yield [[] for _ in prompts]
        for outputs in engine_steps(self._engine, requests):
            self._check_fresh(known)
            yield [[output.token for output in new] for new in outputs]

    def batch_generate(self, prompts: list[list[int]], tokens: int, sampled: bool = False) -> dict[str, Any]:
        """As `measure`, of one call of metalstep.batch_generate.

        Prompts of more rows than one step takes are driven step by step, several tokens to a native call: the first ones decode while
        the last ones are taken in, and how many tokens that brought a call of batch_generate does not say.
        """
        from metalstep.batch import DECODE_STEPS, batch_generate

        if sum(map(len, prompts)) > self._rows:
            return measure(self, prompts, tokens, decode_steps=DECODE_STEPS, sampled=sampled)
        known = self._engine.stats().cached_tokens
        fields = {**SAMPLED, "seed": 0} if sampled else {}
        found = batch_generate(self._model, self._tokenizer, prompts, max_tokens=tokens + 1, return_token_ids=True, **fields)
        self._check_fresh(known)
        steps, counts = ([found.stats.generation_time], [tokens * len(prompts)]) if tokens else ([], [])
        return {"ttft_s": found.stats.prompt_time, "steps_s": steps, "step_tokens": counts, "ids": found.token_ids}

    def device_steps(self, prompts: list[list[int]], tokens: int) -> list[float]:
        from metalstep.bench.device_step import device_step_seconds

        return device_step_seconds(self._model, prompts, tokens // 2)

    def _check_fresh(self, known: int) -> None:
        if self._engine.stats().cached_tokens != known:
            raise RuntimeError("a prompt was found in the prefix cache, so its prefill cannot be measured")


class MlxLm:
    """mlx-lm; MODEL is an mlx-lm directory. A step is one of generate_step, or of BatchGenerator for several sequences."""

    def __init__(self, model: str, threads: int, max_context: int):
        from importlib.metadata import version
        from pathlib import Path

        import mlx.core as mx
        from mlx_lm.utils import load_model

        self._model = load_model(Path(model))[0]
        self.version = f"mlx-lm {version('mlx-lm')}, mlx {version('mlx')}, {mx.default_device()}"

    def greedy(self, prompts: list[list[int]], tokens: int) -> Steps:
        import mlx.core as mx
        from mlx_lm.generate import BatchGenerator, generate_step

        yield [[] for _ in prompts]
        if len(prompts) == 1:
            for token, _ in generate_step(mx.array(prompts[0]), self._model, max_tokens=-1):
                yield [[int(token)]]
            return
        size = len(prompts)
        generator = BatchGenerator(
            self._model, max_tokens=tokens + 2, completion_batch_size=size, prefill_batch_size=size
        )
        try:
            places = {uid: i for i, uid in enumerate(generator.insert(prompts))}
            while True:
                new: list[list[int]] = [[] for _ in prompts]
                for response in generator.next()[1]:
                    new[places[response.uid]].append(int(response.token))
                yield new
        finally:
            generator.close()


class LlamaCpp:
    """llama.cpp through llama-cpp-python's batch API; MODEL is a .gguf file.

    A step is one llama_decode of a row per sequence and one numpy argmax over the rows of logits, which takes less time than
    llama.cpp's own greedy sampler. A context is made before the clock starts, kept, and emptied for each measurement; it has just
    the room that the sequences need. flash_attention: None leaves it to llama.cpp. ubatch: rows that it computes at once.
    """

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
        self._threads = threads
        self._contexts: dict[tuple[Any, ...], tuple[Any, LlamaRows]] = {}
        self.version = f"llama-cpp-python {llama.__version__}"

    def greedy(
        self, prompts: list[list[int]], tokens: int, flash_attention: bool | None = None, ubatch: int = 512
    ) -> Steps:
        size, length = len(prompts), len(prompts[0])
        context, rows = self._context(size, length, length + tokens + 1, flash_attention, ubatch)
        llama, sequences = self._llama, np.arange(size)
        llama.llama_memory_clear(llama.llama_get_memory(context), False)
        yield [[] for _ in prompts]
        inputs, at = np.asarray(prompts, np.int32), 0
        while True:
            width = inputs.shape[1]
            rows.fill(inputs, at, sequences)
            if llama.llama_decode(context, rows.batch):
                raise RuntimeError("llama_decode failed")
            logits = np.ctypeslib.as_array(llama.llama_get_logits(context), (size, self._vocab_size))
            picked = logits.argmax(-1)
            at += width
            inputs = picked[:, None]
            yield inputs.tolist()

    def _context(
        self, size: int, length: int, positions: int, flash_attention: bool | None, ubatch: int
    ) -> tuple[Any, LlamaRows]:
        """A context for `size` sequences of up to `positions` tokens whose prompts have `length`, and the rows to fill."""
        key = (size, length, positions, flash_attention, ubatch)
        if key not in self._contexts:
            llama = self._llama
            options = llama.llama_context_default_params()
            options.n_seq_max, options.n_ctx = size, size * -(-positions // 256) * 256  # llama.cpp rounds up to 256 itself
            options.n_batch, options.n_ubatch = size * length, min(ubatch, size * length)
            options.n_threads = options.n_threads_batch = self._threads
            if flash_attention is not None:
                options.flash_attn_type = int(flash_attention)
            context = llama.llama_init_from_model(self._model, options)
            if not context:
                raise RuntimeError(f"llama.cpp makes no context for {size} sequences of {positions} tokens")
            self._contexts[key] = context, LlamaRows(llama, size * length)
        return self._contexts[key]


class LlamaRows:
    """A llama_batch, filled through numpy views of its arrays."""

    def __init__(self, llama: Any, size: int):
        self.batch = llama.llama_batch_init(size, 0, 1)
        names = ("token", "pos", "n_seq_id", "logits")
        self._token, self._pos, counts, self._logits = (
            np.ctypeslib.as_array(getattr(self.batch, name), (size,)) for name in names
        )
        counts[:] = 1
        self._seq_ids = [self.batch.seq_id[i] for i in range(size)]  # each a pointer to one id
        self._filled = 0

    def fill(self, tokens: np.ndarray, at: int, sequences: np.ndarray) -> None:
        """tokens int [sequences, width]: the next ones of each, from position `at` on; logits of the last of each are wanted."""
        size, width = tokens.shape
        count = size * width
        self._token[:count] = tokens.reshape(-1)
        self._pos[:count] = np.tile(np.arange(at, at + width), size)
        self._logits[:count] = np.tile(np.arange(width) == width - 1, size)
        if count != self._filled:  # the same from one decode step to the next
            for i, sequence in enumerate(np.repeat(sequences, width).tolist()):
                self._seq_ids[i][0] = sequence
            self._filled = count
        self.batch.n_tokens = count


OWN_ERRORS = (ValueError, RuntimeError, MemoryError)  # whose texts are written for users


def described(error: Exception) -> str:
    """An error in words, behind the name of its class where the text alone may not say what it is."""
    text, kind = str(error).strip(), type(error)
    own = kind in OWN_ERRORS or (issubclass(kind, OWN_ERRORS) and kind.__module__.startswith("metalstep."))
    return text if own and text else f"{kind.__name__}: {text}".removesuffix(": ")


ENGINES: dict[str, Callable[..., Engine]] = {"metalstep": MetalStep, "mlx-lm": MlxLm, "llama.cpp": LlamaCpp}


def measure(engine: Engine, prompts: list[list[int]], tokens: int, call: str = "steps", **settings: Any) -> dict[str, Any]:
    """Times of one greedy run; see the module's docstring. call: "batch_generate" is metalstep's own function."""
    if call == "batch_generate":
        assert isinstance(engine, MetalStep)
        return engine.batch_generate(prompts, tokens, **settings)
    clock = time.perf_counter
    with contextlib.closing(engine.greedy(prompts, tokens, **settings)) as stream:
        ids: list[list[int]] = [[] for _ in prompts]

        def take() -> int:
            new = next(stream)
            for known, more in zip(ids, new, strict=True):
                known.extend(more)
            return sum(map(len, new))

        take()
        started = clock()
        while not all(ids):
            take()
        ttft = clock() - started
        steps: list[float] = []
        counts: list[int] = []
        while sum(counts) < tokens * len(prompts):
            before = clock()
            counts.append(take())
            steps.append(clock() - before)
    return {"ttft_s": ttft, "steps_s": steps, "step_tokens": counts, "ids": ids}


def main() -> None:
    # A library that prints must not disturb the answers: they keep the real stdout, everything else goes to stderr.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(line: dict[str, Any]) -> None:
        print(json.dumps(line), file=answers, flush=True)

    name, model, threads, max_context, options = sys.argv[1:6]
    try:
        started = time.perf_counter()
        engine = ENGINES[name](model, int(threads), int(max_context), **json.loads(options))
        head = {"engine": name, "version": engine.version, "load_s": time.perf_counter() - started}
        about = {key: getattr(engine, key) for key in ("weight_bytes", "kv_bytes", "kv_tokens", "gpu") if hasattr(engine, key)}
        answer({**head, **about})
        for line in sys.stdin:
            request = json.loads(line)
            if request.pop("device_step", False) and isinstance(engine, MetalStep):
                answer({"device_step_s": engine.device_steps(**request)})
            else:
                answer(measure(engine, **request))
    except Exception as error:  # becomes the parent's error
        answer({"error": described(error)})
        sys.exit(1)


if __name__ == "__main__":
    main()
