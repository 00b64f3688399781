"""A slot's record, biases, masks, history and counts say what the request's SamplingParams say."""
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from metalstep.kernels import params
from metalstep.kernels.native import NativeDevice
from metalstep.plan.request_slots import RequestSlots
from metalstep.plan.step_arrays import StepArrays, StepSizes
from metalstep.sampling import MAX_TOKEN_ENTRIES, SamplingParams

VOCAB, SEQS, CONTEXT = 70, 3, 40  # a vocabulary that ends inside a mask's word
tokens = st.integers(0, VOCAB - 1)
sets = st.lists(tokens, max_size=9, unique=True)
chosen = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.floats(0, 3, width=32), "top_p": st.floats(0.125, 1, width=32), "min_p": st.floats(0, 1, width=32),
        "top_k": st.integers(0, 99), "min_tokens_to_keep": st.integers(1, 9), "seed": st.integers(0, 2**64 - 1),
        "xtc_probability": st.floats(0, 1, width=32), "xtc_threshold": st.floats(0, 0.5, width=32), "xtc_special_tokens": sets,
        "repetition_penalty": st.floats(0.5, 2, width=32), "repetition_context_size": st.integers(0, 99),
        "presence_penalty": st.floats(-2, 2, width=32), "presence_context_size": st.integers(0, 99),
        "frequency_penalty": st.floats(-2, 2, width=32), "frequency_context_size": st.integers(0, 99),
        "logit_bias": st.dictionaries(tokens, st.floats(-9, 9, width=32), max_size=9), "min_tokens": st.integers(0, 9),
        "allowed_token_ids": st.lists(tokens, min_size=40, max_size=70, unique=True), "banned_token_ids": sets,
        "logprobs": st.integers(0, 32), "processed_logprobs": st.booleans(), "temperature_first": st.booleans(),
    },
)  # fmt: skip
SAME = (
    "temperature", "top_p", "min_p", "top_k", "xtc_probability", "xtc_threshold", "repetition_penalty", "presence_penalty",
    "frequency_penalty", "min_tokens",
)  # fmt: skip


@pytest.fixture(scope="module")
def arrays():
    sizes = StepSizes(
        rows=4, results=4, seqs=SEQS, steps=2, top=32, groups=1, block_size=16, context=CONTEXT, vocab_size=VOCAB, hidden_size=8
    )
    with NativeDevice.open("host", 1) as device:
        yield StepArrays(device, sizes)


@given(
    fields=chosen,
    slot=st.integers(0, SEQS - 1),
    prompt=st.lists(st.integers(-1, VOCAB - 1), max_size=CONTEXT // 2),
    output=st.lists(tokens, max_size=CONTEXT // 2),
    stops=st.frozensets(tokens, max_size=3),
)
@example(fields={}, slot=0, prompt=[], output=[], stops=frozenset())
def test_a_filled_slot_is_what_the_parameters_say(arrays, fields, slot, prompt, output, stops):
    said, num_prompt = [*prompt, *output], len(prompt)
    for array in (arrays.biases, arrays.masks, arrays.history, arrays.counts):  # another request's
        arrays.edit(array).view(np.uint8).reshape(-1)[:] = 0xAB
    before = {name: getattr(arrays, name).copy() for name in ("biases", "masks", "history", "counts")}
    sampling = SamplingParams(**fields)
    (record,) = RequestSlots(arrays).fill(slot, sampling, said, num_prompt, stops)

    assert [record[name] for name in SAME] == [np.float32(getattr(sampling, name)) for name in SAME]
    assert record["min_keep"] == sampling.min_tokens_to_keep and record["top"] == sampling.logprobs
    for kind in ("repetition", "presence", "frequency"):
        assert record[f"{kind}_window"] == getattr(sampling, f"{kind}_context_size")
    assert int(record["seed_lo"]) | int(record["seed_hi"]) << 32 == sampling.seed
    assert (record["counted"], record["counter"], record["target"]) == (len(said), len(said) - num_prompt, -1)
    for bit, on in (
        (params.MS_SAMPLE_PROCESSED_LOGPROBS, sampling.processed_logprobs),
        (params.MS_SAMPLE_TEMPERATURE_FIRST, sampling.temperature_first),
        (params.MS_SAMPLE_COMMIT, sampling.has_penalty),
    ):
        assert bool(record["flags"] & bit) == on

    def entries(name):
        found = arrays.biases[record[f"{name}_first"] :][: record[f"{name}_count"]]
        assert slot * MAX_TOKEN_ENTRIES <= record[f"{name}_first"] <= (slot + 1) * MAX_TOKEN_ENTRIES - len(found)
        return dict(zip(found["token"].tolist(), found["bias"].tolist(), strict=True))

    assert entries("bias") == (sampling.logit_bias or {})
    assert set(entries("stop")) == (stops if sampling.min_tokens else set())
    assert set(entries("xtc")) == set(sampling.xtc_special_tokens)

    if sampling.allowed_token_ids is None and not sampling.banned_token_ids:
        assert record["mask"] == 0
    else:
        words = arrays.masks[record["mask"] - 1]
        bits = {32 * word + bit for word in range(len(words)) for bit in range(32) if words[word] >> np.uint32(bit) & 1}
        allowed = range(VOCAB) if sampling.allowed_token_ids is None else sampling.allowed_token_ids
        assert record["mask"] == slot + 1 and bits == set(allowed) - set(sampling.banned_token_ids)

    assert record["state"] == (slot if sampling.has_penalty else -1)
    if sampling.has_penalty:
        assert arrays.history[slot, : len(said)].tolist() == said
        for token in range(VOCAB):
            in_prompt = params.MS_COUNT_IN_PROMPT if token in prompt else 0
            assert arrays.counts[slot, token] == output.count(token) | in_prompt

    for other in set(range(SEQS)) - {slot}:
        of_other = slice(other * MAX_TOKEN_ENTRIES, (other + 1) * MAX_TOKEN_ENTRIES)
        assert arrays.biases[of_other].tobytes() == before["biases"][of_other].tobytes()
        for name in ("history", "counts", "masks"):
            np.testing.assert_array_equal(getattr(arrays, name)[other], before[name][other])
    np.testing.assert_array_equal(arrays.masks[SEQS:], before["masks"][SEQS:])  # the grammars'


def test_each_slot_has_a_grammar_row_of_its_own(arrays):
    rows = [RequestSlots(arrays).grammar_row(slot) for slot in range(SEQS)]
    assert rows == list(range(SEQS, 2 * SEQS)) and len(arrays.masks) == 2 * SEQS
