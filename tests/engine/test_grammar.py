"""Grammars: a choice allows its sequences and nothing else; adapters translate to and from matchers of other packages."""
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from metalstep.grammar import ChoiceGrammar, Grammar, LLGuidanceMatcher, XGrammarMatcher

VOCABULARY = 70
EOS = (68, 69)
choices = st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=5), min_size=1, max_size=6)


def allowed(grammar, vocab_size=VOCABULARY):
    """Tokens of the bitmask, which starts as rubbish."""
    row = np.full((vocab_size + 31) // 32, 0xDEADBEEF, np.uint32)
    grammar.fill_bitmask(row)
    bits = np.unpackbits(row.view(np.uint8), bitorder="little")
    return set(np.flatnonzero(bits).tolist())


def texts(make, eos):
    """Every output that a grammar allows, by walking all of them."""
    found, open_ends = set(), [()]
    while open_ends:
        prefix = open_ends.pop()
        grammar = make()
        for token in prefix:
            grammar.accept(token)
        if grammar.is_terminated:
            found.add(prefix)
            assert allowed(grammar) == set()
        else:
            assert allowed(grammar), prefix
            open_ends += [(*prefix, token) for token in allowed(grammar)]
    return found


@given(choices=choices)
@example(choices=[[1], [1, 2], [1, 2, 3]])
@example(choices=[[1, 2], [1, 2]])
def test_the_outputs_are_the_choices_and_a_stop_token(choices):
    expected = {(*choice, eos) for choice in map(tuple, choices) for eos in EOS}
    assert texts(lambda: ChoiceGrammar(choices, EOS), EOS) == expected
    assert texts(lambda: ChoiceGrammar(choices, EOS[0]), EOS) == {text for text in expected if text[-1] == EOS[0]}


@given(choices=choices)
def test_without_a_stop_token_choices_end_by_themselves(choices):
    distinct = set(map(tuple, choices))
    begins = [(a, b) for a in distinct for b in distinct if a != b and b[: len(a)] == a]
    if begins:
        with pytest.raises(ValueError, match="expected choices that tell their end; pass eos"):
            ChoiceGrammar(choices)
    else:
        assert texts(lambda: ChoiceGrammar(choices), ()) == distinct


@given(choices=choices, token=st.integers(0, VOCABULARY - 1))
def test_a_token_that_is_not_allowed_is_refused_and_changes_nothing(choices, token):
    grammar = ChoiceGrammar(choices, EOS)
    before = allowed(grammar)
    if token in before:
        return
    with pytest.raises(ValueError, match=f"token {token} is not allowed after \\[\\], expected one of"):
        grammar.accept(token)
    assert allowed(grammar) == before


@pytest.mark.parametrize("choices", [[], [[]], [[1], []]])
def test_choices_that_are_none_are_refused(choices):
    with pytest.raises(ValueError, match="expected sequences of at least one token id"):
        ChoiceGrammar(choices, EOS)


@pytest.mark.parametrize("token", [-1, 96, 10**6])
def test_a_choice_outside_the_vocabulary_is_refused(token):
    with pytest.raises(ValueError, match="expected ids below 96; pass ids of this model's tokenizer"):
        allowed(ChoiceGrammar([[1], [token]], EOS))


class OtherMatcher:
    """The part of xgrammar 0.2's GrammarMatcher and llguidance 1.9's LLMatcher that the adapters call: allows 3, then 40, then ends."""

    def __init__(self):
        self.left = [3, 40]

    def _words(self, size):
        words = np.zeros(size, np.int32)
        words[self.left[0] // 32] = 1 << self.left[0] % 32
        return words

    def _take(self, token):
        taken = bool(self.left) and token == self.left[0]
        self.left = self.left[1:] if taken else self.left
        return taken

    def fill_next_token_bitmask(self, bitmask, index):
        assert bitmask.dtype == np.int32 and bitmask.ndim == 2 and index == 0
        bitmask[0] = self._words(bitmask.shape[1])

    def compute_bitmask(self):
        return self._words(2).tobytes()

    def is_error(self):
        return False

    def accept_token(self, token):
        return self._take(token)

    def consume_token(self, token):
        return self._take(token)

    def is_terminated(self):
        return not self.left

    def is_stopped(self):
        return not self.left


@pytest.mark.parametrize("adapter", [XGrammarMatcher, LLGuidanceMatcher])
@pytest.mark.parametrize("vocab_size", [64, VOCABULARY])
def test_matchers_of_other_packages_are_grammars(adapter, vocab_size):
    grammar = adapter(OtherMatcher())
    assert isinstance(grammar, Grammar)
    assert allowed(grammar, vocab_size) == {3}
    with pytest.raises(ValueError, match="the grammar does not accept token 4"):
        grammar.accept(4)
    grammar.accept(3)
    assert allowed(grammar, vocab_size) == {40}
    assert not grammar.is_terminated
    grammar.accept(40)
    assert grammar.is_terminated


def test_what_llguidance_says_is_passed_on():
    class Broken(OtherMatcher):
        def is_error(self):
            return True

        def get_error(self):
            return "no such rule"

    with pytest.raises(RuntimeError, match="llguidance: no such rule"):
        allowed(LLGuidanceMatcher(Broken()))
