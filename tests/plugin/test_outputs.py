"""What vLLM gets of a step: rows of logprobs as wide as the widest, and the same numbers however they were made."""
from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from metalstep.kernels import params
from metalstep.plugin.outputs import StepOutput, logprob_lists, logprob_row, logprob_row_of, prompt_logprob_tensors

LOGITS = arrays.arrays(np.float32, st.integers(1, 50), elements=st.floats(-50, 50, width=32))


@given(logits=LOGITS, token=st.integers(0), count=st.integers(-1, 60))
@example(logits=np.zeros(5, np.float32), token=3, count=2)  # equal ones: the lower id first
@example(logits=np.array([1e38, -1e38], np.float32), token=1, count=-1)
def test_a_row_from_logits_is_a_distribution_in_order(logits, token, count):
    token %= len(logits)
    ids, logprobs, rank = logprob_row_of(logits, token, 7, count)
    width = len(logits) if count < 0 else min(count, len(logits))
    assert (ids.shape, logprobs.shape, rank) == ((width + 1,), (width + 1,), 7)
    assert (ids[0], ids.dtype, logprobs.dtype) == (token, np.int32, np.float32)
    assert len(set(ids[1:])) == width
    assert (np.diff(logprobs[1:]) <= 0).all() and (logprobs <= 0).all()
    if width == len(logits):
        assert np.exp(logprobs[1:].astype(np.float64)).sum() == pytest.approx(1, abs=1e-5)
        assert logprobs[0] == logprobs[1:][ids[1:] == token]
    ties = logprobs[1:-1] == logprobs[2:]
    assert (ids[1:-1][ties] < ids[2:][ties]).all()


@given(logits=LOGITS, chosen=st.lists(st.integers(0, 10**6), max_size=9))
def test_chosen_tokens_come_in_the_order_asked_for(logits, chosen):
    chosen = [token % len(logits) for token in chosen]
    ids, logprobs, _ = logprob_row_of(logits, 0, 1, 3, chosen)
    _, every, _ = logprob_row_of(logits, 0, 1, -1, list(range(len(logits))))
    assert ids.tolist() == [0, *chosen]
    np.testing.assert_array_equal(logprobs, every[1:][ids])


@given(logits=arrays.arrays(np.float32, 40, elements=st.floats(-20, 20, width=32)), count=st.integers(0, 32))
def test_a_row_that_the_step_reports_is_that_from_its_logits(logits, count):
    ids, logprobs, _ = logprob_row_of(logits, 3, 5, 32)
    result = np.zeros((), params.record("MSSampled"))
    result["token"], result["logprob"], result["rank"] = 3, logprobs[0], 5
    top = np.zeros(32, params.record("MSTopLogprob"))
    top["token"], top["logprob"] = ids[1:], logprobs[1:]
    found, wanted = logprob_row(result, top, count), (ids[: count + 1], logprobs[: count + 1], 5)
    np.testing.assert_array_equal(found[0], wanted[0])
    np.testing.assert_array_equal(found[1], wanted[1])
    assert found[2] == wanted[2]


def test_a_vocabulary_smaller_than_the_count_leaves_places_that_nothing_is_at():
    top = np.zeros(32, params.record("MSTopLogprob"))
    top["token"], top["logprob"] = -1, np.nan
    top[0] = (4, -0.5)
    result = np.zeros((), params.record("MSSampled"))
    ids, logprobs, _ = logprob_row(result, top, 3)
    assert ids.tolist() == [0, 4, 0, 0]
    assert logprobs.tolist() == [0, -0.5, -np.inf, -np.inf]


@given(widths=st.lists(st.one_of(st.none(), st.integers(1, 40)), max_size=10))
def test_every_request_has_a_row_as_wide_as_the_widest(widths):
    rows = [None if width is None else (np.full(width, i, np.int32), np.full(width, -i, np.float32), i) for i, width in enumerate(widths)]
    lists = logprob_lists(rows)
    if not any(row is not None for row in rows):
        assert lists is None
        return
    assert lists.logprob_token_ids.shape == lists.logprobs.shape == (len(rows), max(width for width in widths if width))
    assert lists.sampled_token_ranks.shape == (len(rows),)
    for i, row in enumerate(rows):
        width = 0 if row is None else len(row[0])
        assert (lists.logprob_token_ids[i, :width] == i).all() and (lists.logprobs[i, :width] == -i).all()
        assert (lists.logprobs[i, width:] == -np.inf).all()
        assert lists.sampled_token_ranks[i] == (0 if row is None else i)


@given(count=st.integers(0, 6), width=st.integers(1, 5))
def test_prompt_rows_become_tensors_in_order(count, width):
    rows = [(np.arange(i, i + width, dtype=np.int32), np.full(width, -i, np.float32), i + 1) for i in range(count)]
    tensors = prompt_logprob_tensors(rows)
    assert tensors.logprob_token_ids.shape == tensors.logprobs.shape == (count, width if count else 1)
    assert tensors.selected_token_ranks.tolist() == [i + 1 for i in range(count)]
    assert tensors.logprob_token_ids[:, 0].tolist() == list(range(count))


def test_a_step_is_waited_for_when_vllm_asks():
    asked = []
    output = StepOutput(lambda: asked.append(1) or "output")
    assert not asked
    assert output.get_output() == "output" and asked == [1]
    assert output.get_kv_connector_output() is None
