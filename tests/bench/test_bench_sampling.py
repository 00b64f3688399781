"""The sets of parameters whose cost is measured, and the rows made of the measurements."""

import dataclasses

import pytest

from metalstep.bench.sampling import EVERYTHING, GREEDY, parameter_sets, row
from metalstep.sampling import SamplingParams

SETS = parameter_sets(list(range(32)), 60)
# Other ways to say what is on, or what has no effect on the cost.
LEFT_OUT = {
    "seed", "min_tokens_to_keep", "xtc_special_tokens", "presence_context_size", "frequency_context_size", "allowed_token_ids",
    "prompt_logprobs", "processed_logprobs", "temperature_first",
}  # fmt: skip


def test_greedy_has_nothing_on_and_everything_the_rest():
    assert SETS[GREEDY] == {}
    fields = {field.name for field in dataclasses.fields(SamplingParams)}
    assert set(SETS[EVERYTHING]) == fields - LEFT_OUT


@pytest.mark.parametrize("name", SETS)
def test_each_set_is_valid_and_away_from_the_defaults(name):
    params, default = SamplingParams(**SETS[name], seed=1).check_vocab(1000), SamplingParams(seed=1)
    assert all(getattr(params, field) != getattr(default, field) for field in SETS[name])
    assert (params.temperature == 0) == ("temperature" not in SETS[name])


def test_a_row_compares_with_greedy():
    result = row("filters", {"top_k": 5}, {GREEDY: [100.0, 200.0, 100.0], "filters": [150.0, 240.0, 130.0]})
    assert result["on"] == ["top_k"]
    assert result["ratio"] == {"of_medians": 1.5, "median_of_pairs": 1.3}
    assert result["extra_us"] == 50.0
