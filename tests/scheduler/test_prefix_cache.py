"""Chained digests: equal exactly where all tokens up to the block's end are."""
from hypothesis import given
from hypothesis import strategies as st

from metalstep.scheduler import Sequence
from metalstep.scheduler.prefix_cache import chain_digests

SIZE = 4
TOKENS = st.lists(st.integers(0, 1), max_size=24)


def sequence(tokens, **options):
    return Sequence(tokens=list(tokens), prompt_len=len(tokens), max_tokens_total=100, **options)


@given(TOKENS, TOKENS, st.integers(0, 6))
def test_digests_are_equal_exactly_where_the_prefixes_are(a, b, common):
    b = a[: common * SIZE] + b
    digests = [chain_digests(sequence(tokens), len(tokens) // SIZE, SIZE) for tokens in (a, b)]
    for i, (x, y) in enumerate(zip(*digests)):  # noqa: B905
        assert (x == y) == (a[: (i + 1) * SIZE] == b[: (i + 1) * SIZE])


@given(TOKENS, st.lists(st.integers(0, 6), max_size=5))
def test_digests_do_not_depend_on_when_they_are_made(tokens, counts):
    whole = chain_digests(sequence(tokens), len(tokens) // SIZE, SIZE)
    growing = sequence([])
    for count in sorted(counts):
        growing.tokens += tokens[len(growing.tokens) : count * SIZE]
        full = len(growing.tokens) // SIZE
        assert chain_digests(growing, full, SIZE) == whole[:full]


def test_what_else_keys_and_values_depend_on_is_in_the_digest():
    tokens = [1, 2, 3, 4]
    variants = [{}, {"salt": b"a"}, {"salt": b"b"}, {"window": 8}, {"window": 8, "keep": 2}, {"window": 9}]
    assert len({chain_digests(sequence(tokens, **options), 1, SIZE)[0] for options in variants}) == len(variants)


def test_negative_tokens_have_digests_too():
    assert chain_digests(sequence([-1, -2, -3, -4]), 1, SIZE) != chain_digests(sequence([1, 2, 3, 4]), 1, SIZE)
