"""Masks that depend on the tokens before: bad words of several tokens, and the end of a thought that is too long."""
from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from metalstep.plugin.token_masks import BadWords, ThinkingBudget

VOCAB = 70  # three words, the last of them not whole
ALL = np.uint32(0xFFFFFFFF)
TOKENS = st.lists(st.integers(0, 3), max_size=12)  # few, so that words come up
WORDS = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4), max_size=4)
MARK = st.lists(st.integers(2, 3), min_size=1, max_size=3)  # a thought's end, repeats in it included
START = st.lists(st.integers(0, 1), min_size=1, max_size=3)  # has nothing of the end: what closes one thought would begin another


def applied(mask, prompt, output, bits=None):
    words = np.full(-(-VOCAB // 32), ALL) if bits is None else bits.copy()
    mask.apply(words, prompt, output)
    return words


def allowed(words: np.ndarray) -> set[int]:
    return {token for token in range(VOCAB) if words[token // 32] >> np.uint32(token % 32) & 1}


@given(words=WORDS, prompt=TOKENS, output=TOKENS)
@example(words=[[1, 2]], prompt=[1], output=[])  # the word's beginning in the prompt does not count
@example(words=[[2]], prompt=[], output=[])
@example(words=[[1, 1, 1]], prompt=[], output=[1])  # an output shorter than the word
def test_a_token_is_banned_exactly_when_it_ends_a_bad_word(words, prompt, output):
    banned = {token for token in range(VOCAB) for word in words if [*output, token][-len(word) :] == word}
    assert allowed(applied(BadWords(words), prompt, output)) == set(range(VOCAB)) - banned


@given(words=WORDS, output=TOKENS, bits=st.lists(st.integers(0, 2**32 - 1), min_size=3, max_size=3))
def test_bad_words_never_allow_what_was_not_allowed(words, output, bits):
    before = np.array(bits, np.uint32)
    after = applied(BadWords(words), [], output, before)
    assert (after & ~before == 0).all()
    assert (applied(BadWords(words), [], output, after) == after).all()


@pytest.mark.parametrize("token", [0, 31, 32, 63, 69])
def test_every_bit_is_its_own_token(token):
    assert allowed(applied(BadWords([[token]]), [], [])) == set(range(VOCAB)) - {token}
    assert allowed(applied(ThinkingBudget([1], [token], 0), [1], [])) == {token}


@given(start=START, end=MARK, budget=st.integers(0, 5), prompt=TOKENS, output=TOKENS)
@example(start=[1], end=[2, 3], budget=0, prompt=[1], output=[2])  # half of the end is written
@example(start=[1], end=[2, 2, 3], budget=2, prompt=[1], output=[2, 2])
def test_a_thought_never_outlives_its_budget_by_more_than_its_end(start, end, budget, prompt, output):
    """Whatever was written, following the mask closes the thought: the end comes whole, and then all tokens are free again."""
    mask, tokens = ThinkingBudget(start, end, budget), list(output)
    forced = []
    while len(free := allowed(applied(mask, prompt, tokens))) == 1:
        forced += free
        tokens += free
        assert len(forced) <= len(end)
    assert free == set(range(VOCAB))
    if forced:
        assert tokens[-len(end) :] == end


@given(end=MARK, budget=st.integers(1, 5), thought=st.lists(st.integers(4, 9), max_size=8))
def test_a_thought_within_its_budget_is_free(end, budget, thought):
    """No mark's tokens are in the thought: what is forced begins with the end's first token, once the budget is used up."""
    free = allowed(applied(ThinkingBudget([0], end, budget), [0], thought))
    assert free == ({end[0]} if len(thought) >= budget else set(range(VOCAB)))


@given(start=START, end=MARK, output=st.lists(st.integers(4, 9), max_size=8))
def test_without_a_thought_nothing_is_forced(start, end, output):
    assert len(allowed(applied(ThinkingBudget(start, end, 0), [], output))) == VOCAB
