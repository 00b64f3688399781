"""Byte-level BPE ("gpt2") from a GGUF file's vocabulary."""
from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from metalstep.checkpoint.gguf.pre_tokenizers import PreTokenizer
from metalstep.checkpoint.gguf.vocabulary import CONTROL, UNKNOWN, USER_DEFINED, Vocabulary


def byte_level(vocabulary: Vocabulary, pre: PreTokenizer) -> Tokenizer:
    """Raises: CheckpointError for merges that do not fit the tokens."""
    merges = vocabulary.merges()
    try:
        bpe = models.BPE(vocab=vocabulary.ids, merges=merges, ignore_merges=pre.ignore_merges)
    except Exception as error:  # the bindings raise bare Exception
        raise vocabulary.error(f"tokenizer.ggml.merges does not fit the tokens ({error})") from error
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = _steps(pre)
    tokenizer.decoder = decoders.ByteLevel()
    if pre.nfc:
        tokenizer.normalizer = normalizers.NFC()
    special, defined = vocabulary.of_type(CONTROL, UNKNOWN), vocabulary.of_type(USER_DEFINED)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in defined])
    return tokenizer


def _steps(pre: PreTokenizer) -> Any:
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if pre.single_digits else []
    steps += [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre.splits]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre.gpt2))
    return steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)
