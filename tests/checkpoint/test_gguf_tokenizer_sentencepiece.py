"""SentencePiece vocabularies in GGUF: ids and text as the sentencepiece library gives them, from models trained here."""
import io
import json
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from checkpoint_files import gguf, llama_metadata, llama_tensors
from hypothesis import example, given
from hypothesis import strategies as st

from metalstep.checkpoint import CheckpointError, open_checkpoint
from metalstep.checkpoint.gguf.tokenizer import Vocabulary, build_tokenizer, special_ids

CORPUS = [
    *("the quick brown fox jumps over the lazy dog", "she sells sea shells; the shells she sells are sea shells"),
    *("def the(self, other):", "    return self.other + 1234567890", "\tif x == 10:\n\t\tpass", "über den Wolken, naïve café"),
    *("Привет, мир! привет мира", "你好世界，世界你好", "aaaa aaaaaaaa baaab", "[INST] the [/INST] <b>shells</b>", "a  b   c    d"),
] * 4
OPTIONS = {
    "llama": {"byte_fallback": True, "split_digits": True, "vocab_size": 420},
    "gemma": {
        **{"byte_fallback": True, "split_digits": True, "vocab_size": 440, "add_dummy_prefix": False},
        "user_defined_symbols": ["\n", "\n\n", "\n\n\n", "▁▁", "▁▁▁", "▁▁▁▁", "\t", "\t\t", "<b>", "</b>"],
    },
    "no bytes": {"vocab_size": 160, "character_coverage": 0.98, "split_digits": True},
    "white space": {"byte_fallback": True, "vocab_size": 420, "split_by_whitespace": False, "allow_whitespace_only_pieces": True},
}
LLAMA_SPECIALS = ["<unk>", "<s>", "</s>"]
PIECES = [
    *("the ", " the", "shells", "  ", "   ", "\n", "\n\n\n\n", "\t\t\t", "12", "<b>"),
    *( "</b", "</b>", "▁", "▁▁▁", "aaa", "aa", "\0", "世界", "é", "👍🏽"),
]
texts = st.lists(st.sampled_from(PIECES) | st.text(max_size=8), max_size=12).map("".join)


def train(**options) -> sentencepiece.SentencePieceProcessor:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=model, model_type="bpe", normalization_rule_name="identity",
        remove_extra_whitespaces=False, hard_vocab_limit=False, minloglevel=2, **options,
    )  # fmt: skip
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def converted(model: sentencepiece.SentencePieceProcessor, user_defined=(), **changes) -> dict:
    """The metadata that llama.cpp's converter writes for a SentencePiece model."""
    size = model.vocab_size()
    tokens = [model.id_to_piece(index) for index in range(size)]
    kinds = [
        2 if model.is_unknown(index)
        else 3 if model.is_control(index)
        else 6 if model.is_byte(index)
        else 4 if tokens[index] in user_defined
        else 1
        for index in range(size)
    ]  # fmt: skip
    metadata = {
        "model": "llama",
        "pre": "default",
        "tokens": [token.replace("▁", " ") if kind == 4 else token for token, kind in zip(tokens, kinds, strict=True)],
        "scores": np.array([model.get_score(index) for index in range(size)], np.float32),
        "token_type": np.array(kinds, np.int32),
        **changes,
    }
    return {f"tokenizer.ggml.{key}": item for key, item in metadata.items()}


def build(metadata, overrides=None):
    vocabulary = Vocabulary(Path("model.gguf"), metadata)
    return build_tokenizer(vocabulary, special_ids(vocabulary), overrides)


@pytest.fixture(scope="module", params=OPTIONS)
def pair(request):
    options = OPTIONS[request.param]
    model = train(**options)
    changes = {} if options.get("add_dummy_prefix", True) else {"add_space_prefix": False}
    return model, build(converted(model, options.get("user_defined_symbols", ()), **changes))


@pytest.fixture(scope="module")
def llama():
    return train(**OPTIONS["llama"])


def add_special(metadata, tokens, kind=3, **changes):
    """The metadata with tokens in place of the last ones, as added_tokens.json leaves them."""
    metadata = {**metadata, **changes}
    old, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"].copy()
    types[len(old) - len(tokens) :] = kind
    return {**metadata, "tokenizer.ggml.tokens": [*old[: -len(tokens)], *tokens], "tokenizer.ggml.token_type": types}


def merges_of(wrapped):
    return [" ".join(merge) for merge in json.loads(wrapped.backend_tokenizer.to_str())["model"]["merges"]]


@given(text=texts)
@example(text="")
@example(text=" ")
@example(text="    the      shells\n\n\n\n\n<b>\t\t\tthe</b> ▁▁ the")
@example(text="aaaaaaaaaaaaaaa aaaaaaa aaa")
@example(text="e\u0301\u200b\u00a0\u3000\r\n\ufeff\x7f")
def test_ids_and_text_are_those_of_sentencepiece(pair, text):
    model, wrapped = pair
    ids = model.encode(text)
    assert wrapped.encode(text, add_special_tokens=False) == ids
    if model.unk_id() not in ids:  # the library shows an unknown piece as " ⁇ "
        assert wrapped.decode(ids) == model.decode(ids)


@given(text=texts)
def test_streamed_tokens_are_the_decoded_text(pair, text):
    """mlx-lm trims every space that comes before anything else, where it trims the prefix."""
    _, wrapped = pair
    ids = wrapped.encode(text, add_special_tokens=False)
    detokenizer = wrapped.detokenizer
    for token in ids:
        detokenizer.add_token(token)
    detokenizer.finalize()
    decoded = wrapped.decode(ids)
    if decoded.startswith(" ") and detokenizer.trim_space:
        assert detokenizer.text.lstrip(" ") == decoded.lstrip(" ")
    else:
        assert detokenizer.text == decoded


def test_the_prefix_is_trimmed_only_where_it_is_added():
    plain, gemma = (build(converted(train(**OPTIONS[name]), **changes)) for name, changes in
                    (("llama", {}), ("gemma", {"add_space_prefix": False})))  # fmt: skip
    assert plain.detokenizer.trim_space and not gemma.detokenizer.trim_space
    assert plain.decode(plain.encode("the", add_special_tokens=False)) == "the"
    assert gemma.decode(gemma.encode(" the", add_special_tokens=False)) == " the"


@given(parts=st.lists(texts.filter(lambda text: not any(token in text for token in LLAMA_SPECIALS)), min_size=1, max_size=4))
def test_text_after_a_special_token_has_the_prefix_again(llama, parts):
    """As in tokenizer.json of these models, whose normalizer sees the text between two tokens as one of its own."""
    wrapped = build(converted(llama))
    expected = [2]
    for part in parts:
        expected += [*(llama.encode(part) if part else []), 2]
    assert wrapped.encode("</s>" + "".join(part + "</s>" for part in parts), add_special_tokens=False) == expected


def test_mistral_has_a_prefix_at_the_beginning_alone(llama):
    wrapped = build(add_special(converted(llama), ["[INST]", "[/INST]", "[TOOL_CALLS]"]))
    start, end = (wrapped.convert_tokens_to_ids(token) for token in ("[INST]", "[/INST]"))
    the, shells = llama.encode("the"), llama.encode("shells")
    assert wrapped.encode("the[INST] shells[/INST] the", add_special_tokens=False) == [*the, start, *shells, end, *the]
    bare = wrapped.encode("[INST]shells", add_special_tokens=False)
    assert bare[0] == start and bare[1:] != shells and wrapped.decode(bare[1:]) == "shells"


@pytest.mark.parametrize(("name", "stripped"), [("Phi-3 mini", True), ("phi3", True), ("Llama 2", False)])
def test_phi3_tokens_take_the_white_space_after_them(llama, name, stripped):
    metadata = add_special(converted(llama), ["<|user|>", "<|end|>"])
    wrapped = build({**metadata, "general.name": name})
    ids = wrapped.encode("<|user|>\n the<|end|>\n", add_special_tokens=False)
    size, the = llama.vocab_size(), llama.encode("the")
    rest = [size - 2, *the, size - 1]
    assert (ids == rest) is stripped
    assert wrapped.encode("<s> the", add_special_tokens=False)[1:] != the  # <s> keeps it


def test_begin_and_end_are_added_as_the_file_says(llama):
    the = llama.encode("the")
    assert build(converted(llama)).encode("the") == [1, *the]  # the default of these files
    assert build(converted(llama, add_bos_token=False)).encode("the") == the
    assert build(converted(llama, add_eos_token=True, bos_token_id=0)).encode("the") == [0, *the, 2]
    wrapped = build(converted(llama), {"chat_template": "{{ bos_token }}{{ messages[0]['content'] }}"})
    chat = [{"role": "user", "content": "the"}]
    assert wrapped.apply_chat_template(chat) == [1, *the]
    assert wrapped.encode(wrapped.apply_chat_template(chat, tokenize=False), add_special_tokens=False) == [1, *the]


def test_equal_scores_leave_the_order_to_the_merges(llama):
    """Converters that start from tokenizer.json write one score for all."""
    metadata = converted(llama)
    scored = build(metadata)
    flat = {**metadata, "tokenizer.ggml.scores": np.full(llama.vocab_size(), -1000, np.float32)}
    wrapped = build({**flat, "tokenizer.ggml.merges": merges_of(scored)})
    for text in CORPUS:
        assert wrapped.encode(text) == scored.encode(text)
    with pytest.raises(CheckpointError, match="merges is missing"):
        build(flat)


def test_gemma4_has_merges_and_no_prefix(llama):
    metadata = converted(llama)
    merges = merges_of(build(metadata))
    ids = {f"tokenizer.ggml.{key}_token_id": index for index, key in enumerate(("unknown", "bos", "eos"))}
    wrapped = build({**metadata, **ids, "tokenizer.ggml.model": "gemma4", "tokenizer.ggml.merges": merges})
    assert wrapped.encode(" the shells") == [1, *llama.encode("the shells")]


def test_a_file_answers_with_its_tokenizer(tmp_path):
    tokens = [*LLAMA_SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "▁a"]
    scores = np.array([0.0] * 259 + [-2, -3, -1], np.float32)
    encoded = b"\x09\x00\x00\x00\x06\x00\x00\x00" + len(tokens).to_bytes(8, "little") + scores.tobytes()
    path = tmp_path / "model.gguf"
    metadata = llama_metadata(
        tokenizer__ggml__model="llama", tokenizer__ggml__pre="default", tokenizer__ggml__tokens=tokens,
        tokenizer__ggml__scores=encoded, tokenizer__ggml__token_type=[2, 3, 3] + [6] * 256 + [1] * 3, tokenizer__ggml__merges=None,
    )  # fmt: skip
    path.write_bytes(gguf(metadata, llama_tensors()))
    with open_checkpoint(path) as checkpoint:
        wrapped = checkpoint.tokenizer()
        assert checkpoint.config["bos_token_id"] == 1 and checkpoint.config["eos_token_id"] == [2]
    assert wrapped.encode("a a\n") == [1, 261, 261, 3 + 10]
    assert wrapped.decode([1, 261, 261, 13], skip_special_tokens=True) == "a a\n"


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"scores": None}, "tokenizer.ggml.scores is missing, expected a ndarray"),
        ({"scores": np.zeros(3, np.float32)}, "tokenizer.ggml.scores has 3 entries, expected 4"),
        ({"scores": np.array([np.nan], np.float32)}, "tokenizer.ggml.scores has 1 entries"),
        ({"remove_extra_whitespaces": True}, "remove_extra_whitespaces is set in a 'llama' tokenizer, .*; use an mlx-lm directory"),
        ({"precompiled_charsmap": np.ones(8, np.uint8)}, "precompiled_charsmap is set in a 'llama' tokenizer"),
        ({"precompiled_charsmap": ["a"]}, "precompiled_charsmap is set"),
        ({"add_space_prefix": np.ones(2, np.uint8)}, "tokenizer.ggml.add_space_prefix is a ndarray, expected a bool"),
        ({"model": "t5"}, "tokenizer.ggml.model is 't5', expected one of gpt2, llama, gemma4"),
        ({"model": "gemma4"}, "tokenizer.ggml.merges is missing"),
        ({"token_type": None}, "token_type is missing, so bytes and special tokens cannot be told from text"),
        ({"model": "gemma4", "merges": [], "token_type": np.ones(420, np.int32)}, "no token for each byte and no unknown token"),
        ({"model": "gemma4", "merges": ["q z"]}, "merges does not fit the tokens"),
    ],
)
def test_what_cannot_be_rebuilt_is_refused(llama, changes, text):
    metadata = {**converted(llama), **{f"tokenizer.ggml.{key}": item for key, item in changes.items()}}
    metadata = {key: item for key, item in metadata.items() if item is not None}
    with pytest.raises(CheckpointError, match=text):
        build(metadata)
    broken = converted(llama)["tokenizer.ggml.scores"].copy()
    broken[-1] = np.inf
    with pytest.raises(CheckpointError, match="something else than finite numbers"):
        build(converted(llama, scores=broken))
    with pytest.raises(CheckpointError, match="something else than finite numbers"):
        build(converted(llama, scores=broken > 0))
