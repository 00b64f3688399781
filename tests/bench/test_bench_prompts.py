"""Prompts of benchmarks: of the right length, and none begins as another does."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metalstep.bench.prompts import TEXT, Prompts


@given(
    size=st.integers(1, 200), counts=st.lists(st.integers(0, 20), max_size=8), lengths=st.lists(st.integers(1, 50), min_size=8)
)
def test_prompts_have_their_length_and_tokens_of_the_text(size, counts, lengths):
    prompts = Prompts(range(1000, 1000 + size))
    for count, length in zip(counts, lengths, strict=False):
        taken = prompts.take(count, length)
        assert len(taken) == count
        assert all(len(prompt) == length and set(prompt) <= set(range(1000, 1000 + size)) for prompt in taken)


@given(size=st.integers(33, 120), laps=st.integers(1, 8))
def test_no_two_prompts_begin_alike(size, laps):
    """The first 16 tokens, a block of the prefix cache, tell them apart; of a text that does not repeat itself."""
    beginnings = [tuple(prompt) for prompt in Prompts(range(size)).take(laps * size, 16)]
    assert len(set(beginnings)) == laps * size


def test_a_tokenizer_that_knows_no_english_gives_its_own_tokens():
    class Numbers:
        """One word is a token; 0 is any other."""

        def encode(self, text):
            return [0] * len(text.split())

        def get_vocab(self):
            return {str(i): i for i in range(500)}

    prompt = Prompts.of(Numbers()).take(1, 400)[0]
    assert len(set(prompt)) == 400 and 0 not in prompt and prompt != sorted(prompt)


def test_an_empty_text_is_refused():
    with pytest.raises(ValueError, match="the text of the prompts has no token, expected at least one"):
        Prompts([])


def test_the_text_is_long_enough_for_800_tokens():
    assert len(TEXT) > 4000
