"""Byte-level pre-tokenizers by llama.cpp's names: ids as tiktoken gives them, over words as OpenAI's or llama.cpp's own patterns split."""
import functools
import unicodedata
from pathlib import Path

import pytest
import regex
import tiktoken
from checkpoint_files import byte_tokens
from hypothesis import example, given
from hypothesis import strategies as st
from tiktoken._educational import bpe_train

from metalstep.checkpoint.gguf.pre_tokenizers import PRE_TOKENIZERS
from metalstep.checkpoint.gguf.tokenizer import Vocabulary, build_tokenizer

CORPUS = (
    "the other's SHELLS'LL  don't I'VE we're 1234567 12 3.14 x=y+1; foo_bar(a, b);\n\n\n  return 'self'\r\n\t\tif <b> $5 <= ~6 ^ `a|b`...\n"
    "HTTPServer2Go fooBar iPhone ABCdefGHI über ÄÖÜ naïve e\u0301te\u0301 Привет МИР 你好，世界。 ひらがなカタカナ 한국어 नमस्ते "
    "٣٤٥ １２３ ½ Ⅷ 👍🏽 ///path/to\n/x  !!??\n "
) * 3
# Patterns that are not those under test: another author's spelling. A list splits one after the other.
SINGLE = {
    # OpenAI, tiktoken_ext/openai_public.py: r50k_base, cl100k_base (white space at the end as the models' own files have it), o200k_base.
    "gpt-2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
    "llama-bpe": (
        CL100K := r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s*[\r\n]+|\s+(?!\S)|\s"
    ),
    "dbrx": CL100K,
    "gpt-4o": (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "tekken": (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "qwen2": CL100K.replace("{1,3}+", ""),
    "qwen35": CL100K.replace("{1,3}+", "").replace(r"\p{L}++", r"[\p{L}\p{M}]++").replace(r"[^\s\p{L}\p{N}]", r"[^\s\p{L}\p{M}\p{N}]"),
}
SEQUENCES = {
    "smollm": [r"\p{N}", SINGLE["gpt-2"]],
    "command-r": [r"\p{N}", SINGLE["gpt-2"]],
    "mpt": [SINGLE["gpt-2"]],
    "falcon": [r"[\p{P}$+<=>^~|`]+", SINGLE["gpt-2"], r"[0-9][0-9][0-9]"],
    "default": [r"[\p{P}$+<=>^~|]+", SINGLE["gpt-2"], r"\p{N}+", r"[0-9][0-9][0-9]"],
    "deepseek-llm": [
        *(r"[\r\n]", r"\s?(?:(?![\u0561-\u0587\U0001d400-\U0001d7cb])[\p{Lu}\p{Ll}\p{Lt}\u0295])+"),
        *(r"\s?[\x21-\x2f\x3a-\x7e\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+", r"\s+$"),
        *(r"[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+", r"\p{N}+"),
    ],
    "deepseek-coder": [r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+", r"\p{N}"],
    "deepseek-v3": [
        r"\p{N}{1,3}",
        r"[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
        r"[\x21-\x2f\x3a-\x40\x5b-\x60\x7b-\x7e][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
        r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ],
}  # fmt: skip
WHOLE_WORDS = {name for name, pre in PRE_TOKENIZERS.items() if pre.ignore_merges}
# Characters whose class is the same in all versions of Unicode, as the two libraries may know different ones.
STABLE = "".join(
    character
    for character in map(chr, range(0x30000))
    if unicodedata.ucd_3_2_0.category(character) == unicodedata.category(character) not in ("Cn", "Cs", "Co")
)
WORDS = [word for word in regex.split(r"(?<= )|(?=\n)|(?=')", CORPUS) if word]
WORDS += ["  ", "\n\n", " \n ", "12345", "'S", "\u00a0", "\u3000", "\x0b", "/"]
texts = st.lists(st.sampled_from(WORDS) | st.text(st.sampled_from(STABLE), max_size=6), max_size=10).map("".join)


@functools.cache
def ranks() -> dict[bytes, int]:
    """Merges across words of any pattern, so that each pattern shows in the ids."""
    return bpe_train(CORPUS, 500, r"(?s:.{1,10})", visualise=None)


def pair(encoding, token):
    """The two tokens that `token` was made of."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        rank, at = min((encoding.get(parts[i] + parts[i + 1], 1 << 30), i) for i in range(len(parts) - 1))
        assert rank < encoding[token]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


@pytest.fixture(scope="module", params=[*SINGLE, *SEQUENCES])
def case(request):
    name, vocabulary, names = request.param, ranks(), byte_tokens()
    tokens = ["".join(names[byte] for byte in token) for token in vocabulary]
    merges = [" ".join("".join(names[byte] for byte in part) for part in pair(vocabulary, token)) for token in vocabulary if len(token) > 1]
    metadata = {"model": "gpt2", "pre": name, "tokens": tokens, "merges": merges}
    built = Vocabulary(Path("model.gguf"), {f"tokenizer.ggml.{key}": item for key, item in metadata.items()})
    return name, build_tokenizer(built, {}), expected_ids(name)


def words_of(name, text):
    words = [text] if text else []
    for pattern in SEQUENCES.get(name) or [SINGLE[name]]:
        words = [part for word in words for part in regex.split(f"({pattern})", word) if part]
    return words


def expected_ids(name):
    pattern = SINGLE.get(name, r"(?s:.+)")
    encoding = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks(), special_tokens={})
    if name in SINGLE:
        return encoding.encode_ordinary
    return lambda text: [token for word in words_of(name, text) for token in encoding.encode_ordinary(word)]


@given(text=texts)
@example(text=CORPUS)
@example(text="//\n/ a/\n `a`=`b` $`^ नमस्ते हिन्दी e\u0301e\u0301 ÀÉ ǅa ΑΒΓабв 12٣٤٥６ １２ 你好ひらがなABC")
def test_words_are_those_of_the_pattern(case, text):
    name, wrapped, _ = case
    pieces = wrapped.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
    assert [text[start:end] for _, (start, end) in pieces] == words_of(name, text)


@given(text=texts)
@example(text=CORPUS)
@example(text="it's IT'S 'S 1234 12345678 a\n\n\n b   c\r\n\r\n  \t")
def test_ids_are_those_of_tiktoken(case, text):
    name, wrapped, expected = case
    if PRE_TOKENIZERS[name].nfc:
        text = unicodedata.normalize("NFC", text)
    assert wrapped.encode(text, add_special_tokens=False) == expected(text)
    assert wrapped.decode(wrapped.encode(text, add_special_tokens=False)) == text


def test_text_is_composed_where_the_model_composes_it(case):
    name, wrapped, _ = case
    composes = wrapped.encode("e\u0301") == wrapped.encode("\u00e9")
    assert composes is (name in ("qwen2", "qwen35", "command-r", "mpt"))


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_every_pre_tokenizer_takes_all_of_a_text(name):
    tokens = byte_tokens()
    metadata = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": name, "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.merges": []}
    wrapped = build_tokenizer(Vocabulary(Path("model.gguf"), metadata), {})
    text = unicodedata.normalize("NFC", CORPUS)
    assert wrapped.encode(text) == list(text.encode())
