"""The tokenizer of a GGUF file, rebuilt from its metadata. Source: llama.cpp, src/llama-vocab.cpp."""
from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from mlx_lm.tokenizer_utils import BPEStreamingDetokenizer, TokenizerWrapper
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from metalstep.checkpoint.errors import CheckpointError

CONTROL, USER_DEFINED = 3, 4  # token types
# Tokens that end a turn whatever the metadata says, as in llama.cpp.
END_OF_GENERATION = (
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>"),
    *("<EOT>", "_<EOT>", "<|end_of_text|>", "<end_of_utterance>"),
)
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")


def _byte_level(use_regex: bool = True) -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def _split(pattern: str) -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), _byte_level(use_regex=False)])


@dataclass(frozen=True)
class PreTokenizer:
    """add_bos: the default where the metadata does not say. ignore_merges: a whole word in the vocabulary is one token."""

    make: Callable[[], Any]
    add_bos: bool = False
    ignore_merges: bool = False
    normalizer: Callable[[], Any] | None = None


PRE_TOKENIZERS = {
    "gpt-2": PreTokenizer(_byte_level),
    "smollm": PreTokenizer(
        lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _byte_level()])
    ),
    "llama-bpe": PreTokenizer(lambda: _split(LLAMA3_SPLIT), add_bos=True, ignore_merges=True),
    # llama.cpp does not normalise, but the model was trained on NFC.
    "qwen2": PreTokenizer(lambda: _split(QWEN2_SPLIT), normalizer=normalizers.NFC),
}


class Vocabulary:
    """The tokenizer metadata of a file, checked.

    Raises: CheckpointError for a kind of tokenizer that is not supported and for metadata that contradicts itself.
    """

    def __init__(self, path: Path, metadata: Mapping[str, Any]):
        self.path = path
        self._metadata = metadata
        model, pre = self.get("model", str), self.get("pre", str, "gpt-2")
        if model != "gpt2" or pre not in PRE_TOKENIZERS:
            raise CheckpointError(
                f"{path}: the tokenizer is {model!r} with pre-tokenizer {pre!r}, expected 'gpt2' with one of "
                f"{', '.join(PRE_TOKENIZERS)}; use an mlx-lm directory of this model"
            )
        self.pre = PRE_TOKENIZERS[pre]
        self.tokens: list[str] = self.get("tokens", list)
        if not self.tokens or not isinstance(self.tokens[0], str):
            raise self.error("tokenizer.ggml.tokens holds no strings")
        self.types = self.get("token_type", np.ndarray, np.ones(len(self.tokens), np.int32))
        if self.types.shape != (len(self.tokens),):
            raise self.error(f"tokenizer.ggml.token_type has {self.types.size} entries, expected {len(self.tokens)}")
        wants_bos = bool(metadata.get("tokenizer.ggml.add_bos_token", self.pre.add_bos))
        self.add_bos = wants_bos and self.token_id("bos_token_id") is not None
        template = metadata.get("tokenizer.chat_template")
        self.chat_template = template if isinstance(template, str) else None
        self.ids = {token: index for index, token in enumerate(self.tokens)}
        if len(self.ids) != len(self.tokens):
            twice = next(token for index, token in enumerate(self.tokens) if self.ids[token] != index)
            raise self.error(f"the token {twice!r} appears twice")

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        value = self._metadata.get(f"tokenizer.ggml.{key}", default)
        if not isinstance(value, kind):
            found = "missing" if value is None else f"a {type(value).__name__}"
            raise self.error(f"tokenizer.ggml.{key} is {found}, expected a {kind.__name__}")
        return value

    def merges(self) -> list[tuple[str, str]]:
        """Pairs in order of rank."""
        lines = self.get("merges", list)
        # In byte-level BPE a space is only ever the separator, so one split does for all.
        parts = " ".join(lines).split(" ") if lines and isinstance(lines[0], str) else []
        if len(parts) != 2 * len(lines):
            raise self.error("tokenizer.ggml.merges holds something else than pairs of tokens")
        return list(zip(parts[0::2], parts[1::2], strict=True))

    def token_id(self, key: str) -> int | None:
        """The id under `key`, or None."""
        if f"tokenizer.ggml.{key}" not in self._metadata:
            return None
        index = self.get(key, int)
        if not 0 <= index < len(self.tokens):
            raise self.error(f"tokenizer.ggml.{key} is {index}, expected a token id below {len(self.tokens)}")
        return int(index)

    def token(self, key: str) -> str | None:
        index = self.token_id(key)
        return None if index is None else self.tokens[index]

    def error(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {what}; convert the model again")


def special_ids(vocabulary: Vocabulary) -> dict[str, Any]:
    """bos_token_id, eos_token_id (a list: every token that ends a generation) and pad_token_id for the config."""
    stops = [vocabulary.token_id(key) for key in ("eos_token_id", "eot_token_id", "eom_token_id")]
    stops += [vocabulary.ids.get(token) for token in END_OF_GENERATION]
    ids: dict[str, Any] = {}
    for key, word in (("bos_token_id", "bos"), ("pad_token_id", "padding")):
        if (index := vocabulary.token_id(f"{word}_token_id")) is not None:
            ids[key] = index
    if found := list(dict.fromkeys(stop for stop in stops if stop is not None)):
        ids["eos_token_id"] = found
    return ids


def build_tokenizer(
    vocabulary: Vocabulary, config: Mapping[str, Any], overrides: Mapping[str, Any] | None = None
) -> TokenizerWrapper:
    """mlx-lm's TokenizerWrapper around a tokenizer with the file's vocabulary, merges, special tokens and chat template.

    overrides: keyword arguments of transformers' tokenizer. Raises: CheckpointError.
    """
    options: dict[str, Any] = {
        "bos_token": vocabulary.token("bos_token_id"),
        "eos_token": vocabulary.token("eos_token_id"),
        "unk_token": vocabulary.token("unknown_token_id"),
        "pad_token": vocabulary.token("padding_token_id"),
        "add_bos_token": vocabulary.add_bos,
        "clean_up_tokenization_spaces": False,
        "model_max_length": config.get("max_position_embeddings"),
        "chat_template": vocabulary.chat_template,
        **(overrides or {}),
    }
    eos = config.get("eos_token_id")
    stops = [eos] if isinstance(eos, int) else eos
    backend = _backend(vocabulary)
    try:
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=_Uncopied(backend), **options)
        # The wrapper looks for markers in the vocabulary twice, and each copy of 49,000 tokens takes 25 ms.
        tokenizer.get_vocab = lambda: vocabulary.ids  # type: ignore[method-assign]
        wrapper = TokenizerWrapper(tokenizer, BPEStreamingDetokenizer, eos_token_ids=stops)
        del tokenizer.get_vocab
        return wrapper
    except Exception as error:  # a special token or an override that transformers does not take
        raise vocabulary.error(f"transformers cannot make the tokenizer ({type(error).__name__}: {error})") from error


def _backend(vocabulary: Vocabulary) -> Tokenizer:
    merges = vocabulary.merges()
    try:
        bpe = models.BPE(vocab=vocabulary.ids, merges=merges, ignore_merges=vocabulary.pre.ignore_merges)
    except Exception as error:  # the bindings raise bare Exception
        raise vocabulary.error(f"tokenizer.ggml.merges does not fit the tokens ({error})") from error
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = vocabulary.pre.make()
    tokenizer.decoder = decoders.ByteLevel()
    if vocabulary.pre.normalizer is not None:
        tokenizer.normalizer = vocabulary.pre.normalizer()
    special = [vocabulary.tokens[index] for index in np.flatnonzero(vocabulary.types == CONTROL)]
    defined = [vocabulary.tokens[index] for index in np.flatnonzero(vocabulary.types == USER_DEFINED)]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in defined])
    return tokenizer


class _Uncopied:
    """Hands a tokenizer over to transformers, which would copy it through JSON (0.1 s for 49,000 tokens)."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer

    def __deepcopy__(self, memo: Any) -> Tokenizer:
        return self._tokenizer
