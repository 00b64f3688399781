"""Tokenizers rebuilt from GGUF metadata: ids, special tokens and the bytes that come back."""
import pytest
from checkpoint_files import MERGES, TOKENS, byte_tokens, gguf, llama_metadata, llama_tensors
from hypothesis import example, given
from hypothesis import strategies as st
from transformers.models.gpt2.tokenization_gpt2 import GPT2Tokenizer

from metalstep.checkpoint import CheckpointError, open_checkpoint

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"


def tokenizer(tmp_path, overrides=None, **metadata):
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf(llama_metadata(**metadata), llama_tensors()))
    with open_checkpoint(path) as checkpoint:
        return checkpoint.tokenizer(overrides)


@pytest.fixture(scope="module", params=["gpt-2", "smollm", "llama-bpe", "qwen2"])
def any_tokenizer(request, tmp_path_factory):
    return tokenizer(tmp_path_factory.mktemp(request.param), tokenizer__ggml__pre=request.param, tokenizer__ggml__add_bos_token=False)


@given(text=st.text())
@example(text="")
@example(text=" the  the\n\n12 345\tthe's ")
@example(text="\U0001f44d\U0001f3fd \u00e9 e\u0301 \u00a0\u200b\r\n\x00")
def test_text_comes_back_from_its_bytes(any_tokenizer, text):
    """Every byte is a token, so decoding undoes encoding; qwen2 composes characters first."""
    import unicodedata

    expected = unicodedata.normalize("NFC", text) if any_tokenizer.backend_tokenizer.normalizer else text
    assert any_tokenizer.decode(any_tokenizer.encode(text)) == expected


@given(text=st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])))
def test_streamed_tokens_are_the_decoded_text(any_tokenizer, text):
    """mlx-lm trims a leading space, and shows the byte 0 as its token."""
    ids = any_tokenizer.encode(text)
    detokenizer = any_tokenizer.detokenizer
    detokenizer.reset()
    for token in ids:
        detokenizer.add_token(token)
    detokenizer.finalize()
    decoded = any_tokenizer.decode(ids)
    assert detokenizer.text in (decoded, decoded.removeprefix(" "))


def test_merges_apply_in_order(tmp_path):
    wrapped = tokenizer(tmp_path)
    the = [TOKENS.index("Ġthe")]
    assert wrapped.encode(" the") == the
    assert wrapped.encode(" the the") == the * 2
    assert wrapped.encode("the") == [TOKENS.index("t"), TOKENS.index("he")]


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["12345"]),
        ("smollm", ["1", "2", "3", "4", "5"]),
        ("llama-bpe", ["123", "45"]),
        ("qwen2", ["1", "2", "3", "4", "5"]),
    ],
)
def test_digits_are_split_as_the_pre_tokenizer_says(tmp_path, pre, pieces):
    wrapped = tokenizer(tmp_path, tokenizer__ggml__pre=pre)
    assert [piece for piece, _ in wrapped.backend_tokenizer.pre_tokenizer.pre_tokenize_str("12345")] == pieces


@pytest.mark.parametrize("text", ["Hello, world! it's 3 o'clock", "  two  spaces\n\nand lines\t", "ŷéß 日本 \U0001f600", "a" * 50])
def test_gpt2_ids_are_those_of_transformers(tmp_path, text):
    wrapped = tokenizer(tmp_path, tokenizer__ggml__pre="gpt-2")
    vocabulary = {token: index for index, token in enumerate(TOKENS)}
    theirs = GPT2Tokenizer(vocab=vocabulary, merges=[tuple(merge.split()) for merge in MERGES])
    assert wrapped.encode(text) == theirs.encode(text)


def test_control_tokens_are_one_id_and_are_skipped(tmp_path):
    wrapped = tokenizer(tmp_path, tokenizer__chat_template=TEMPLATE)
    ids = wrapped.apply_chat_template([{"role": "user", "content": "the"}])
    assert ids == [1, *wrapped.encode("the"), 2]
    assert wrapped.decode(ids) == "<|im_start|>the<|im_end|>"
    assert wrapped.decode(ids, skip_special_tokens=True) == "the"
    assert wrapped.has_chat_template


def test_user_defined_tokens_are_never_split(tmp_path):
    tokens = [*TOKENS[:3], "<tool>", *TOKENS[4:]]  # in place of the byte 0
    wrapped = tokenizer(tmp_path, tokenizer__ggml__tokens=tokens, tokenizer__ggml__token_type=[3, 3, 3, 4] + [1] * (len(tokens) - 4))
    ids = wrapped.encode("a<tool>a")
    assert ids[1] == 3 and len(ids) == 3
    assert wrapped.decode(ids, skip_special_tokens=True) == "a<tool>a"


@pytest.mark.parametrize(
    ("pre", "flag", "expected"),
    [("smollm", None, False), ("smollm", True, True), ("llama-bpe", None, True), ("llama-bpe", False, False)],
)
def test_bos_is_added_as_llama_cpp_does(tmp_path, pre, flag, expected):
    wrapped = tokenizer(tmp_path, tokenizer__ggml__pre=pre, tokenizer__ggml__add_bos_token=flag)
    assert (wrapped.encode("a")[0] == 1) is expected
    assert wrapped.encode("a", add_special_tokens=False)[0] != 1


def test_every_end_of_turn_token_stops_generation(tmp_path):
    """eos from the metadata first, then the names that llama.cpp knows."""
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf(llama_metadata(tokenizer__ggml__eot_token_id=5), llama_tensors()))
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.config["eos_token_id"] == [2, 5, 0]
        assert checkpoint.config["bos_token_id"] == 1
        assert checkpoint.tokenizer().eos_token_ids == {0, 2, 5}


def test_a_tokenizer_with_an_end_adds_it_and_a_chat_does_not_double_the_beginning(tmp_path):
    wrapped = tokenizer(tmp_path, {"chat_template": "{{ bos_token }}" + TEMPLATE}, tokenizer__ggml__add_bos_token=True)
    ids = wrapped.apply_chat_template([{"role": "user", "content": "the"}])
    text = wrapped.apply_chat_template([{"role": "user", "content": "the"}], tokenize=False)
    assert ids == wrapped.encode(text, add_special_tokens=False) == [1, 1, *wrapped.encode("the", add_special_tokens=False), 2]
    assert tokenizer(tmp_path, tokenizer__ggml__add_eos_token=True).encode("the")[-1] == 2


def test_a_token_that_ends_a_turn_is_special_whatever_its_type(tmp_path):
    wrapped = tokenizer(tmp_path, tokenizer__ggml__token_type=[1, 3, 4] + [1] * (len(TOKENS) - 3))
    assert wrapped.encode("<|endoftext|>the<|im_end|>") == [0, *wrapped.encode("the"), 2]
    assert wrapped.decode([0, 2], skip_special_tokens=True) == ""


def test_whole_words_ignore_merges_in_llama_bpe(tmp_path):
    tokens = [*TOKENS[:-1], "zzz"]
    words = {"tokenizer__ggml__tokens": tokens, "tokenizer__ggml__merges": MERGES[:2], "tokenizer__ggml__add_bos_token": False}
    assert tokenizer(tmp_path, tokenizer__ggml__pre="llama-bpe", **words).encode("zzz") == [len(tokens) - 1]
    assert len(tokenizer(tmp_path, tokenizer__ggml__pre="gpt-2", **words).encode("zzz")) == 3


def test_thinking_markers_are_found_in_the_vocabulary(tmp_path):
    tokens = [*TOKENS[:-2], "<think>", "</think>"]
    wrapped = tokenizer(tmp_path, tokenizer__ggml__tokens=tokens, tokenizer__ggml__merges=MERGES[:1])
    assert (wrapped.think_start, wrapped.think_end) == ("<think>", "</think>")
    assert wrapped.get_vocab() == {token: index for index, token in enumerate(tokens)}


def test_a_special_token_that_transformers_cannot_take_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="transformers cannot make the tokenizer"):
        tokenizer(tmp_path, {"eos_token": 3})


def test_overrides_replace_the_files_own(tmp_path):
    wrapped = tokenizer(tmp_path, {"chat_template": TEMPLATE, "eos_token": "<|endoftext|>"})
    assert wrapped.chat_template == TEMPLATE
    assert wrapped.eos_token_id == 0


@pytest.mark.parametrize(
    ("metadata", "text"),
    [
        ({"model": "bert"}, "tokenizer.ggml.model is 'bert', expected one of gpt2, llama, gemma4; use an mlx-lm directory"),
        ({"pre": "jina-v2-de"}, "pre-tokenizer .* is 'jina-v2-de', expected one of default, gpt-2, .*; use an mlx-lm directory"),
        ({"model": None}, "tokenizer.ggml.model is missing, expected a str"),
        ({"tokens": None}, "tokenizer.ggml.tokens is missing, expected a list"),
        ({"tokens": [1, 2]}, "tokenizer.ggml.tokens is a ndarray"),
        ({"merges": None}, "tokenizer.ggml.merges is missing"),
        ({"merges": ["a b c"]}, "something else than pairs"),
        ({"merges": ["qq zz"]}, "merges does not fit the tokens"),
        ({"token_type": [1]}, "token_type has 1 entries, expected 262"),
        ({"tokens": ["a", "b", "a", *byte_tokens()], "token_type": [1] * 259}, "the token 'a' appears twice"),
        ({"tokens": [*TOKENS, "more"], "token_type": [1] * (len(TOKENS) + 1)}, "263 tokens, but token_embd.weight has 262 rows"),
        ({"eos_token_id": 262}, "eos_token_id is 262, expected a token id below 262"),
        ({"bos_token_id": "x"}, "bos_token_id is a str"),
    ],
)
def test_tokenizers_that_cannot_be_rebuilt_are_refused(tmp_path, metadata, text):
    with pytest.raises(CheckpointError, match=text):
        tokenizer(tmp_path, **{f"tokenizer__ggml__{key}": item for key, item in metadata.items()})
