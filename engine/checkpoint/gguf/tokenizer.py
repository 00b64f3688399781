"""The tokenizer of a GGUF file, rebuilt from its metadata and wrapped as mlx-lm wraps it."""
from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from mlx_lm.tokenizer_utils import BPEStreamingDetokenizer, SPMStreamingDetokenizer, TokenizerWrapper
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from metalstep.checkpoint.gguf.byte_level import byte_level
from metalstep.checkpoint.gguf.sentencepiece import adds_prefix, sentencepiece
from metalstep.checkpoint.gguf.vocabulary import Vocabulary, special_ids

__all__ = ["Vocabulary", "build_tokenizer", "special_ids"]


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
        "add_eos_token": vocabulary.add_eos,
        "clean_up_tokenization_spaces": False,
        "model_max_length": config.get("max_position_embeddings"),
        "chat_template": vocabulary.chat_template,
        **(overrides or {}),
    }
    eos = config.get("eos_token_id")
    stops = [eos] if isinstance(eos, int) else eos
    backend, detokenizer = _backend(vocabulary)
    try:
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=_Uncopied(backend), **options)
        # The wrapper looks for markers in the vocabulary twice, and each copy of 49,000 tokens takes 25 ms.
        tokenizer.get_vocab = lambda: vocabulary.ids  # type: ignore[method-assign]
        wrapper = TokenizerWrapper(tokenizer, detokenizer, eos_token_ids=stops)
        del tokenizer.get_vocab
        return wrapper
    except Exception as error:  # a special token or an override that transformers does not take
        raise vocabulary.error(f"transformers cannot make the tokenizer ({type(error).__name__}: {error})") from error


def _backend(vocabulary: Vocabulary) -> tuple[Tokenizer, Any]:
    """The tokenizer, and the class that mlx-lm streams its text with."""
    if vocabulary.pre is not None:
        return byte_level(vocabulary, vocabulary.pre), BPEStreamingDetokenizer
    return sentencepiece(vocabulary), partial(SPMStreamingDetokenizer, trim_space=adds_prefix(vocabulary))


class _Uncopied:
    """Hands a tokenizer over to transformers, which would copy it through JSON (0.1 s for 49,000 tokens)."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer

    def __deepcopy__(self, memo: Any) -> Tokenizer:
        return self._tokenizer
