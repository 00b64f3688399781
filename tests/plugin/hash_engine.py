"""vLLM's offline engine in this process, over the hash model: requests with arrivals and aborts at given steps, and what came of them."""
from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hash_worker
import pytest
from hash_forward import continuation
from llama_config import config_folder
from vllm import LLM, SamplingParams
from vllm.config import VllmConfig

VOCAB = 997


@dataclass
class Job:
    """A request. arrives: before which of the engine's steps. aborts: before which it is aborted; None: never."""

    prompt: list[int]
    params: SamplingParams
    arrives: int = 0
    aborts: int | None = None


@dataclass
class Answer:
    """outputs: tokens of each of the `n` samples, by number. cached: prompt tokens that were. logprobs, prompt_logprobs: vLLM's."""

    outputs: dict[int, list[int]] = field(default_factory=dict)
    logprobs: dict[int, Any] = field(default_factory=dict)
    cached: int = 0
    prompt_logprobs: Any = None


def greedy(max_tokens: int, **fields: Any) -> SamplingParams:
    """The token that follows, always; several samples (n) are drawn at a temperature that leaves no other choice."""
    temperature = 0.01 if fields.get("n", 1) > 1 else 0.0
    return SamplingParams(max_tokens=max_tokens, temperature=temperature, ignore_eos=True, detokenize=False, **fields)


class HashEngine:
    """windows: of the groups that vLLM has made of the model's layers."""

    def __init__(self, llm: LLM):
        self.llm = llm
        self.windows = self.worker.runner._session.forward.windows
        self._count = 0

    def expected(self, job: Job) -> list[int]:
        assert job.params.max_tokens is not None
        return continuation(job.prompt, job.params.max_tokens, self.windows, VOCAB)

    def run(self, jobs: Sequence[Job], resets: Sequence[int] = ()) -> list[Answer]:
        """All jobs to their ends. An aborted one's answer has the tokens that had come. resets: before these of the engine's steps all
        that run are preempted, and what they had under way is dropped."""
        engine = self.llm.llm_engine
        ids = {f"job-{self._count + i}": i for i in range(len(jobs))}
        self._count += len(jobs)
        answers = [Answer() for _ in jobs]
        waiting = dict(ids)
        step = 0
        while waiting or engine.has_unfinished_requests():
            for req_id, i in list(waiting.items()):
                if jobs[i].arrives <= step:
                    engine.add_request(req_id, {"prompt_token_ids": jobs[i].prompt}, jobs[i].params)
                    del waiting[req_id]
            gone = [req_id for req_id, i in ids.items() if jobs[i].aborts == step]
            if gone:
                engine.abort_request(gone)
            if step in resets:
                assert engine.reset_prefix_cache(reset_running_requests=True)
            for output in engine.step():
                self._take(answers[ids[output.request_id]], output)
            step += 1
        return answers

    def _take(self, answer: Answer, output: Any) -> None:
        for part in output.outputs:  # of several samples only those that have new tokens
            answer.outputs[part.index] = list(part.token_ids)
            answer.logprobs[part.index] = part.logprobs
        answer.cached = output.num_cached_tokens or 0
        answer.prompt_logprobs = output.prompt_logprobs

    def check(self, jobs: Sequence[Job], resets: Sequence[int] = ()) -> list[Answer]:
        """`run`, and every token is that of the reference, in full where nothing was aborted."""
        answers = self.run(jobs, resets)
        for job, answer in zip(jobs, answers, strict=True):
            wanted = self.expected(job)
            for tokens in answer.outputs.values():
                assert tokens == (wanted if job.aborts is None else wanted[: len(tokens)])
            if job.aborts is None:
                assert len(answer.outputs) == job.params.n
        return answers

    @property
    def worker(self) -> hash_worker.HashWorker:
        return self.llm.llm_engine.model_executor.driver_worker.worker

    def stats(self) -> dict[str, Any]:
        return self.llm.collective_rpc("metalstep_stats")[0]

    def check_idle(self) -> None:
        """Nothing is left of any request, in vLLM's pool nor in the session. Each engine's last finished requests are told with the
        next step, so a short request goes first."""
        self.run([Job([11], greedy(1))])
        scheduler = self.llm.llm_engine.engine_core.engine_core.scheduler
        pool = scheduler.kv_cache_manager.block_pool
        assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1  # block 0 is nobody's
        assert self.stats()["requests"] <= 1
        session = self.worker.runner._session
        held = session.arrays.sizes.seqs - len(session._free)
        assert held == self.stats()["requests"]
        assert len(set(session._free)) == len(session._free)


@contextmanager
def hash_engine(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    windowed: bool = False,
    worker: type[hash_worker.HashWorker] | None = None,
    v2: bool = False,
    **options: Any,
) -> Iterator[HashEngine]:
    """worker: None: that of a model as `windowed` says. v2: the scheduler's newer way to say that a request comes back. options: vLLM's."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    # vLLM asks for Triton where it is to speak so; what it needs it for is its own model runner.
    monkeypatch.setattr(VllmConfig, "use_v2_model_runner", v2)
    monkeypatch.setattr(VllmConfig, "_validate_v2_model_runner", lambda self: None)
    worker = worker or (hash_worker.WindowedHashWorker if windowed else hash_worker.HashWorker)
    given: Mapping[str, Any] = {"max_model_len": 1024, "max_num_seqs": 16, **options}
    llm = LLM(
        model=config_folder(folder, vocab_size=VOCAB),
        skip_tokenizer_init=True,
        worker_cls=f"{worker.__module__}.{worker.__name__}",
        disable_log_stats=True,
        seed=0,
        **given,
    )
    engine = HashEngine(llm)
    try:
        yield engine
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm, engine
        gc.collect()
