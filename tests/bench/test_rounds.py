"""Who is measured in which order, with which settings."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metalstep.bench.prompts import Prompts
from metalstep.bench.rounds import Case, Contender, alternate, contenders, turns

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
