"""Who is measured in which order, with which settings."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metalstep.bench import rounds
from metalstep.bench.prompts import Prompts
from metalstep.bench.rounds import Case, Contender, alternate, contenders, turns, variant_options

ENGINES = st.lists(st.sampled_from(["metalstep", "mlx-lm", "llama.cpp"]), min_size=1, unique=True)


@given(engines=ENGINES, pairs=st.integers(1, 6), batches=st.lists(st.integers(1, 4), min_size=1, max_size=3, unique=True))
def test_every_round_measures_every_contender_once_on_the_same_fresh_prompts(engines, pairs, batches):
    field = contenders(engines)
    seen = []

    def measure(contender, prompts, case):
        seen.append((contender, tuple(map(tuple, prompts)), case))
        return {"number": len(seen)}

    cases = [Case(batch, 16, 5) for batch in batches]
    runs = alternate(measure, Prompts(range(500)), cases, lambda _: field, pairs, lambda _: None)
    assert all(len(runs[case, contender]) == pairs for case in cases for contender in field)
    uses = Counter(prompts for _, prompts, _ in seen)
    assert set(uses.values()) == {len(field)}
    assert len(uses) == (pairs + 1) * len(cases)
    firsts = len(cases) * len(field)
    counted = {run["number"] for samples in runs.values() for run in samples}
    assert counted == set(range(firsts + 1, len(seen) + 1))  # the first round is not counted


def test_one_process_never_sees_a_prompt_twice():
    """Its prefix cache would have it; another process gets the same prompts."""
    seen = {}

    def measure(contender, prompts, case):
        for prompt in map(tuple, prompts):
            assert (contender.process, prompt) not in seen
            seen[contender.process, prompt] = contender
        return {}

    field = contenders(["metalstep", "mlx-lm"], call="batch_generate", also=["sampled", "invariant"])
    assert [c.name for c in field] == ["metalstep", "metalstep, sampled", "metalstep, invariant", "mlx-lm"]
    assert [c.process for c in field] == ["metalstep", "metalstep", "metalstep, invariant", "mlx-lm"]
    assert [dict(c.settings) for c in field[:2]] == [{"call": "batch_generate"}, {"call": "batch_generate", "sampled": True}]
    alternate(measure, Prompts(range(5000)), [Case(2, 16, 5)], lambda _: field, 4, lambda _: None)
    prompts = [{prompt for process, prompt in seen if process == name} for name in ("metalstep", "metalstep, invariant", "mlx-lm")]
    assert len(prompts[0]) == 2 * len(prompts[2]) and prompts[1] == prompts[2] < prompts[0]


@pytest.mark.parametrize(("seconds", "samples"), [(None, [4, 4]), (100, [4, 4]), (14, [4, 2]), (12, [2, 2]), (2, [1, 1])])
def test_no_round_is_begun_that_would_end_too_late(monkeypatch, seconds, samples):
    """Two cases of one and five seconds: a round takes six. The first that counts is always run."""
    clock = [0.0]
    monkeypatch.setattr(rounds.time, "monotonic", lambda: clock[0])
    cases, field = [Case(1, 16, 5), Case(5, 16, 5)], [Contender("a")]

    def measure(contender, prompts, case):
        clock[0] += case.batch
        return {}

    told = []
    runs = alternate(
        measure, Prompts(range(5000)), cases, lambda _: field, 4, lambda _: None, seconds=seconds, measured=lambda *run: told.append(run)
    )
    assert [len(runs.get((case, field[0]), [])) for case in cases] == samples
    assert len(told) == sum(samples)


def test_variants_are_load_options():
    assert variant_options("invariant") == {"batch_invariant": True}
    assert variant_options("bfloat16") == {"kv_dtype": "bfloat16"}
    assert variant_options("turbo4v2") == {"kv_scheme": "turbo4v2"}
    with pytest.raises(ValueError, match="kv_scheme is 'int4'"):
        variant_options("int4")


def test_every_other_round_runs_backwards():
    order = [Contender("a"), Contender("b")]
    assert turns(order, 1) == order
    assert turns(order, 2) == order[::-1]


def test_llama_cpp_runs_with_each_of_its_settings():
    settings = [dict(c.settings) for c in contenders(["metalstep", "llama.cpp"], ubatches=(512, 2048))]
    assert settings[0] == {}
    assert settings[1:] == [
        {"flash_attention": flash, "ubatch": ubatch} for flash in (True, False) for ubatch in (512, 2048)
    ]
    names = [contender.name for contender in contenders(["metalstep", "mlx-lm", "llama.cpp"])]
    assert names == ["metalstep", "mlx-lm", "llama.cpp, flash on", "llama.cpp, flash off"]


def test_decode_steps_are_metalsteps_alone():
    ours, theirs = contenders(["metalstep", "mlx-lm"], decode_steps=8)
    assert dict(ours.settings) == {"decode_steps": 8}
    assert theirs.settings == ()


@pytest.mark.parametrize(("prompt", "tokens"), [(1, 0), (18, 50)])
def test_a_case_has_the_prompt_the_first_token_and_those_behind_it(prompt, tokens):
    assert Case(8, prompt, tokens).positions == prompt + tokens + 1
