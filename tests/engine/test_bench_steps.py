"""The parts of benchmarks that drive the engine; nothing here looks at a time but to see that it is one."""

import contextlib
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import metalstep
from metalstep import Request, SamplingParams
from metalstep.bench.engine_steps import decode_steps, engine_steps
from metalstep.bench.host_time import bench_host_time
from metalstep.bench.launches import bench_launches
from metalstep.bench.prompts import Prompts
from metalstep.bench.sampling import EVERYTHING, GREEDY, bench_sampling

GREEDY_PARAMS = SamplingParams(seed=0)


@settings(max_examples=5)
@given(counts=st.lists(st.integers(1, 6), min_size=1, max_size=5), per_call=st.integers(1, 4))
def test_steps_give_every_token_of_every_request_in_order(smollm2, counts, per_call):
    model, _ = smollm2
    prompts = Prompts(range(100, 400)).take(len(counts), 7)
    requests = [
        Request(prompt, GREEDY_PARAMS, max_tokens=count, decode_steps=per_call)
        for prompt, count in zip(prompts, counts, strict=True)
    ]
    ids: list[list[int]] = [[] for _ in requests]
    for new in engine_steps(model.engine, requests):
        assert len(new) == len(requests)
        for known, outputs in zip(ids, new, strict=True):
            known += [output.token for output in outputs]
    alone = [[output.token for output in model.engine.submit(request)] for request in requests]
    assert ids == alone


def test_closing_the_steps_gives_the_blocks_back(smollm2):
    model, _ = smollm2
    model.engine.exclusively(lambda: None)
    before = model.engine.stats()
    requests = [Request(prompt, GREEDY_PARAMS) for prompt in Prompts(range(400, 700)).take(3, 20)]
    with contextlib.closing(decode_steps(model.engine, requests)) as steps:
        for _ in itertools.islice(steps, 4):
            pass
    model.engine.exclusively(lambda: None)
    after = model.engine.stats()
    assert (after.running, after.waiting, after.free_blocks) == (before.running, before.waiting, before.free_blocks)
    assert after.generated_tokens == before.generated_tokens + 3 * 4


@pytest.fixture(scope="module")
def prompts(smollm2):
    """Prompts that this file has not used."""
    return Prompts.of(smollm2[1])


@pytest.mark.parametrize(("options", "rows"), [({"batch": 3}, 3), ({"prefill": 40}, 40)])
def test_a_profile_covers_each_launch_of_its_plan(smollm2, prompts, options, rows):
    model, _ = smollm2
    result = bench_launches(model, prompts, context=20, steps=2, **options)
    assert sum(row["count"] for row in result["rows"]) == len(model.native.plan_for(rows).launches)
    assert result["total_us"] == pytest.approx(sum(row["us"] for row in result["rows"]))
    assert any(row["kernel"] == "attention" and row["us"] > 0 for row in result["rows"])


def test_a_profile_counts_what_each_row_is_multiplied_by(smollm2, prompts):
    """In proportion to the rows, but that of a prompt only the last row goes on behind the last layer's attention."""
    model, _ = smollm2
    one, three, prompt = (
        sum(row["macs"] for row in bench_launches(model, prompts, context=20, steps=1, **options)["rows"])
        for options in ({"batch": 1}, {"batch": 3}, {"prefill": 40})
    )
    c = model.args
    head_dim = c.hidden_size // c.num_attention_heads
    qkv = c.hidden_size * (c.num_attention_heads + 2 * c.num_key_value_heads) * head_dim
    behind = c.hidden_size * (c.hidden_size + 3 * c.intermediate_size)
    end = behind + c.vocab_size * c.hidden_size
    before = c.num_hidden_layers * qkv + (c.num_hidden_layers - 1) * behind
    assert (one, three, prompt) == (before + end, 3 * (before + end), 40 * before + end)


@pytest.mark.parametrize("batch", [1, 3])
def test_host_time_is_a_part_of_the_step(smollm2, prompts, batch):
    model, tokenizer = smollm2
    result = bench_host_time(model, tokenizer, prompts, tokens=3, batch=batch)
    assert result["batch"] == batch
    assert 0 < result["host_share"] < 1
    assert 0 < result["host_us"] < result["step_us"]
    assert not any("run" in vars(native) for native in model.native.plan_for(batch)._native)


def test_each_set_of_sampling_parameters_is_measured(smollm2):
    model, tokenizer = smollm2
    result = bench_sampling(model, tokenizer, batch=2, context=20, steps=2, pairs=1)
    names = [row["name"] for row in result["rows"]]
    assert (names[0], names[-1]) == (GREEDY, EVERYTHING)
    assert all(row["step_us"]["n"] == 1 and row["step_us"]["median"] > 0 for row in result["rows"])


def test_a_prompt_that_was_seen_before_is_no_prefill(smollm2):
    model, tokenizer = smollm2
    for seen in (False, True):
        fresh = Prompts(tokenizer.encode("Forty words about anything that this file has not used elsewhere: " * 3))
        with pytest.raises(RuntimeError, match="take prompts that are fresh") if seen else contextlib.nullcontext():
            bench_launches(model, fresh, context=1, steps=1, prefill=40)


def test_an_eager_model_has_no_launches(prompts):
    model, _ = metalstep.load("smollm2", device="eager")
    with model, pytest.raises(ValueError, match="the model runs eagerly"):
        bench_launches(model, prompts, context=1, steps=1)
