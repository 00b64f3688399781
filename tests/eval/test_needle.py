"""Needles: where they are put, how long prompts get, and what is scored."""
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metalstep.bench.quality import log_softmax
from metalstep.eval.needle import ANSWER, DEPTHS, NEEDLE, QUESTION, ask, needle_cases, summary


@pytest.fixture(scope="module")
def filler(smollm2, prose):
    return smollm2[1].encode(prose.read_text(), add_special_tokens=False)


def place(tokenizer, case):
    """The fraction of the text between the prompt's beginning and the question that comes before the needle."""
    text = tokenizer.decode(case.prompt)
    assert text.count(NEEDLE.format(number=case.number)) == 1
    return text.index(NEEDLE.format(number=case.number)) / text.index(QUESTION)


def test_prompts_have_their_length_and_needles_their_depth(smollm2, filler):
    tokenizer = smollm2[1]
    cases = needle_cases(tokenizer, filler, [256, 700])
    assert [(case.length, case.depth) for case in cases] == [(length, depth) for length in (256, 700) for depth in DEPTHS]
    assert len({case.number for case in cases}) == len(cases)
    for case in cases:
        assert case.length - 12 <= len(case.prompt) <= case.length
        assert tokenizer.decode(case.prompt).endswith(ANSWER)
        assert tokenizer.decode([*case.prompt, *case.answer]).endswith(f"{ANSWER} {case.number}")
    for length in (256, 700):
        depths = [place(tokenizer, case) for case in cases if case.length == length]
        assert depths == sorted(depths)
        assert depths[0] < 0.35 and depths[-1] > 0.8


@given(length=st.integers(120, 500), depth=st.integers(0, 100))
@settings(max_examples=8)
def test_no_prompt_is_longer_than_asked_for(smollm2, filler, length, depth):
    (case,) = needle_cases(smollm2[1], filler, [length], [depth])
    assert len(case.prompt) <= length


@pytest.mark.parametrize(("length", "have", "message"), [
    (20, 4000, "a needle context of 20 tokens is too short, expected more than .*: the question takes as many"),
    (900, 300, r"the text has 300 tokens and a needle context of 900 needs \d+; pass a longer text"),
])  # fmt: skip
def test_lengths_that_cannot_be_are_refused(smollm2, filler, length, have, message):
    with pytest.raises(ValueError, match=message):
        needle_cases(smollm2[1], filler[:have], [length])


def test_the_score_is_the_models_own(smollm2, filler):
    """Log-probabilities are those of one run over prompt and number, and the answer is what the model generates."""
    model, tokenizer = smollm2
    (case,) = needle_cases(tokenizer, filler, [160], [50])
    got = ask(model, tokenizer, case)
    logits = model.engine.logits([*case.prompt, *case.answer])
    rows = log_softmax(logits[len(case.prompt) - 1 : -1])
    given = rows[np.arange(len(rows)), case.answer]
    assert got["logprob"] == pytest.approx(given.sum(), abs=1e-9)
    assert got["rank"] == 1 + max(int((row > value).sum()) for row, value in zip(rows, given, strict=True))
    assert got["found"] == (case.number in got["answer"])
    greedy, ids = [], list(case.prompt)
    for _ in range(4):
        greedy.append(int(model.engine.logits(ids)[-1].argmax()))
        ids.append(greedy[-1])
    assert got["answer"].startswith(tokenizer.decode(greedy))
    assert ask(model, tokenizer, case) == got  # caches of the first one are no part of the second


def test_the_summary_counts_and_compares():
    ours = [dict(found=True, rank=1, logprob=-1.0), dict(found=False, rank=9, logprob=-6.0)]
    theirs = [dict(found=True, rank=1, logprob=-1.0), dict(found=True, rank=2, logprob=-2.0)]
    assert summary(ours, theirs) == {
        "cases": 2, "found": 1, "first": 1, "logprob": -3.5, "logprob_difference": -2.0, "logprob_difference_stderr": 2.0,
    }  # fmt: skip
    assert summary(theirs, theirs)["logprob_difference"] == 0.0
