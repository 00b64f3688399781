"""Block tables under everything that vLLM's scheduler does with them: each token is a hash of the whole context read back through them."""
from __future__ import annotations

import math
import random

import pytest
from hash_engine import VOCAB, Job, greedy, hash_engine
from hash_forward import LOWEST, PEAK, next_token

DIALECTS = pytest.mark.parametrize("v2", [False, True], ids=["v1", "v2"])
SCHEDULING = pytest.mark.parametrize("async_scheduling", [True, False], ids=["async", "sync"])
TOTAL = math.log(math.exp(PEAK) + VOCAB - 1)  # of the exponentials of all logits


def tokens(draw: random.Random, count: int) -> list[int]:
    return [draw.randrange(LOWEST, VOCAB) for _ in range(count)]


@DIALECTS
@pytest.mark.parametrize(
    ("async_scheduling", "windowed", "caching", "budget"),
    [(True, False, True, 32), (False, False, False, 512), (True, True, False, 512), (False, True, True, 64)],
)
def test_preempted_requests_go_on_where_they_were(tmp_path, monkeypatch, v2, async_scheduling, windowed, caching, budget):
    """Twelve requests that need more blocks than there are, whole or in chunks, with and without prefix hits when they come back."""
    draw = random.Random(budget)
    jobs = [Job(tokens(draw, 60 + i), greedy(70), arrives=draw.randrange(20)) for i in range(12)]
    with hash_engine(
        tmp_path,
        monkeypatch,
        v2=v2,
        windowed=windowed,
        async_scheduling=async_scheduling,
        enable_prefix_caching=caching,
        max_model_len=256,
        num_gpu_blocks_override=70 if windowed else 36,
        max_num_seqs=12,
        max_num_batched_tokens=budget,
    ) as engine:
        engine.check(jobs)
        assert engine.stats()["preemptions"] >= 3
        came_back = engine.worker.came_back
        assert came_back["new" if v2 else "resumed"] >= 3
        assert came_back["resumed" if v2 else "new"] == 0
        engine.check_idle()


@pytest.mark.parametrize(("block_size", "async_scheduling"), [(16, True), (32, True), (64, False)])
@pytest.mark.parametrize("windowed", [False, True], ids=["full", "windowed"])
def test_blocks_of_every_size_hold_chunks_of_every_size(tmp_path, monkeypatch, async_scheduling, block_size, windowed):
    """Long and short prompts, chunks that end within a block and at its end, decodes between them."""
    draw = random.Random(block_size)
    lengths = [1, 15, 16, 17, 31, 63, 64, 65, 128, 300, 500, 777]
    jobs = [Job(tokens(draw, n), greedy(draw.randint(1, 40)), arrives=draw.randrange(12)) for n in lengths]
    with hash_engine(
        tmp_path,
        monkeypatch,
        windowed=windowed,
        async_scheduling=async_scheduling,
        block_size=block_size,
        max_num_batched_tokens=draw.choice([48, 64, 100]),
    ) as engine:
        engine.check(jobs)
        engine.check_idle()


@SCHEDULING
def test_shared_prefixes_are_read_and_never_written(tmp_path, monkeypatch, async_scheduling):
    draw = random.Random(3)
    prefix = tokens(draw, 200)
    jobs = [Job(prefix + tokens(draw, 1 + 5 * i), greedy(30)) for i in range(6)]
    with hash_engine(tmp_path, monkeypatch, async_scheduling=async_scheduling, max_num_batched_tokens=128) as engine:
        assert engine.check(jobs[:1])[0].cached == 0
        assert [answer.cached for answer in engine.check(jobs)] == [192] * 6  # whole blocks
        assert all(answer.cached >= 192 for answer in engine.check([Job(prefix, greedy(5)) for _ in range(3)]))
        engine.check_idle()


@DIALECTS
@SCHEDULING
def test_requests_that_are_all_thrown_out_at_once_go_on(tmp_path, monkeypatch, v2, async_scheduling):
    """The token of the step under way is dropped, and is sampled once more; so are the logprobs of a prompt that came with it."""
    draw = random.Random(7)
    jobs = [Job(tokens(draw, 20 + 13 * i), greedy(30, prompt_logprobs=1), arrives=3 * i) for i in range(6)]
    with hash_engine(tmp_path, monkeypatch, v2=v2, async_scheduling=async_scheduling, max_num_batched_tokens=64) as engine:
        for first in range(4):
            answers = engine.check(jobs, resets=range(first, 40, 4))
            assert [len(answer.prompt_logprobs) for answer in answers] == [len(job.prompt) for job in jobs]
        engine.check_idle()


def test_samples_of_one_prompt_share_it(tmp_path, monkeypatch):
    draw = random.Random(4)
    jobs = [Job(tokens(draw, 70), greedy(25, n=n), arrives=n) for n in (1, 2, 5)]
    with hash_engine(tmp_path, monkeypatch) as engine:
        engine.check(jobs)
        engine.check_idle()


@pytest.mark.parametrize("chunked", [True, False])
def test_steps_with_more_rows_and_results_than_the_engine_takes_are_divided(tmp_path, monkeypatch, chunked):
    """100 requests at once give more results than a step of the engine's has, and a prompt of 1000 tokens more rows."""
    draw = random.Random(5)
    jobs = [Job(tokens(draw, 1 + draw.randrange(12)), greedy(12)) for _ in range(100)]
    jobs += [Job(tokens(draw, 1000), greedy(6), arrives=4), Job(tokens(draw, 900), greedy(6, prompt_logprobs=0), arrives=6)]
    jobs += [Job(tokens(draw, 800), greedy(6), arrives=6)]
    with hash_engine(
        tmp_path, monkeypatch, max_num_seqs=128, enable_chunked_prefill=chunked, max_num_batched_tokens=512 if chunked else 2048
    ) as engine:
        engine.check(jobs)
        engine.check_idle()


@pytest.mark.parametrize(("v2", "async_scheduling"), [(False, True), (True, True), (False, False)])
def test_logprobs_of_prompt_and_output_are_those_of_the_whole_context(tmp_path, monkeypatch, v2, async_scheduling):
    """Of prompts half of whose tokens are the ones that follow, under preemption and in chunks, next to requests that want none."""
    draw = random.Random(6)
    jobs = []
    for i in range(10):
        prompt = tokens(draw, 1)
        while len(prompt) < 30 + 9 * i:
            prompt.append(next_token(prompt, [None], VOCAB) if draw.random() < 0.5 else draw.randrange(LOWEST, VOCAB))
        wanted = draw.choice([{}, {"logprobs": 2}, {"prompt_logprobs": 1}, {"logprobs": 0, "prompt_logprobs": 3}, {"prompt_logprobs": 40}])
        jobs.append(Job(prompt, greedy(40, **wanted), arrives=draw.randrange(10)))
    with hash_engine(
        tmp_path,
        monkeypatch,
        v2=v2,
        async_scheduling=async_scheduling,
        max_model_len=256,
        num_gpu_blocks_override=30,
        max_num_batched_tokens=48,
        max_logprobs=-1,
    ) as engine:
        answers = engine.check(jobs)
        assert engine.stats()["preemptions"] >= 2
    for job, answer in zip(jobs, answers, strict=True):
        if job.params.prompt_logprobs is not None:
            assert len(answer.prompt_logprobs) == len(job.prompt)
            assert answer.prompt_logprobs[0] is None
            for i in range(1, len(job.prompt)):
                check_row(answer.prompt_logprobs[i], job.prompt[i], job.prompt[:i], job.params.prompt_logprobs)
        if job.params.logprobs is not None:
            text = job.prompt + answer.outputs[0]
            for i, row in enumerate(answer.logprobs[0], len(job.prompt)):
                check_row(row, text[i], text[:i], job.params.logprobs)


def check_row(row, token, context, count):
    """vLLM's dict of a position: the token's own logprob and those of the `count` most likely ones."""
    follows = next_token(context, [None], VOCAB)
    assert row[token].logprob == pytest.approx((PEAK if token == follows else 0) - TOTAL, abs=1e-4)
    assert (row[token].rank == 1) == (token == follows)
    assert len(row) in (count, count + 1) if count else len(row) == 1
    if count:
        assert row[follows].rank == 1
        assert row[follows].logprob == pytest.approx(PEAK - TOTAL, abs=1e-4)


@DIALECTS
@SCHEDULING
@pytest.mark.parametrize(("windowed", "seed"), [(False, 1), (True, 2)], ids=["full", "windowed"])
def test_any_mixture_gives_each_request_its_own_tokens(tmp_path, monkeypatch, v2, async_scheduling, windowed, seed):
    """60 requests that come and go at random: shared prefixes, several samples, aborts, logprobs, in too few blocks."""
    draw = random.Random(seed)
    prefixes = [tokens(draw, n) for n in (0, 0, 33, 80, 129)]
    jobs = []
    for _ in range(60):
        arrives = draw.randrange(120)
        fields = draw.choice([{}, {}, {}, {"n": 2}, {"n": 3}, {"logprobs": 1}, {"prompt_logprobs": 1}])
        jobs.append(
            Job(
                draw.choice(prefixes) + tokens(draw, draw.randint(1, 60)),
                greedy(draw.choice([1, 2, 16, 40]), **fields),
                arrives=arrives,
                aborts=arrives + draw.randrange(1, 40) if draw.random() < 0.25 else None,
            )
        )
    with hash_engine(
        tmp_path,
        monkeypatch,
        v2=v2,
        windowed=windowed,
        async_scheduling=async_scheduling,
        block_size=draw.choice([16, 32]),
        max_model_len=256,
        num_gpu_blocks_override=80 if windowed else 45,
        max_num_batched_tokens=draw.choice([40, 96, 512]),
    ) as engine:
        engine.check(jobs)
        engine.check_idle()
