"""SentencePiece's BPE ("llama", "gemma4") from a GGUF file's vocabulary. Source: sentencepiece, src/bpe_model.cc."""
from __future__ import annotations

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from metalstep.checkpoint.errors import CheckpointError
from metalstep.checkpoint.gguf.vocabulary import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED, Vocabulary

SPACE = "▁"
# Phi-3's special tokens take the white space after them, all but these.
PHI3_KEEPS_SPACE = ("<unk>", "<s>", "<|endoftext|>")
# These are tokens in Mistral's second and later vocabularies. Text after a token has no prefix there; in all others it has.
MISTRAL_V2 = ("[INST]", "[/INST]", "[TOOL_CALLS]")


def adds_prefix(vocabulary: Vocabulary) -> bool:
    """A text begins with a space, whether or not it was written with one."""
    return vocabulary.flag("add_space_prefix", vocabulary.model == "llama")


def sentencepiece(vocabulary: Vocabulary) -> Tokenizer:
    """Raises: CheckpointError for options of SentencePiece that GGUF files of such models do not have, and for scores that do not fit."""
    for key in ("remove_extra_whitespaces", "precompiled_charsmap"):
        value = vocabulary.get(key, object, False)
        if value.any() if isinstance(value, np.ndarray) else value:
            raise CheckpointError(
                f"{vocabulary.path}: tokenizer.ggml.{key} is set in a {vocabulary.model!r} tokenizer, expected text that is taken as it "
                "is; use an mlx-lm directory of this model"
            )
    if not vocabulary.has("token_type"):
        raise vocabulary.error("tokenizer.ggml.token_type is missing, so bytes and special tokens cannot be told from text")
    merges = merges_of_scores(vocabulary) if _has_scores(vocabulary) else vocabulary.merges()
    unknown = vocabulary.token("unknown_token_id")
    special = vocabulary.of_type(CONTROL, UNKNOWN)
    has_bytes = np.count_nonzero(vocabulary.types == BYTE) == 256
    if unknown is None and not has_bytes:
        raise vocabulary.error("the vocabulary has no token for each byte and no unknown token, so it cannot write every text")
    try:
        bpe = models.BPE(vocab=vocabulary.ids, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=has_bytes)
    except Exception as error:  # the bindings raise bare Exception
        raise vocabulary.error(f"tokenizer.ggml.merges does not fit the tokens ({error})") from error
    tokenizer = Tokenizer(bpe)
    to_space = normalizers.Replace(" ", SPACE)
    decode = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if not adds_prefix(vocabulary):
        tokenizer.normalizer = to_space
    elif all(token in special for token in MISTRAL_V2):
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), to_space])
    if adds_prefix(vocabulary):
        decode.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(decode)
    phi3 = "phi-3" in vocabulary.name or "phi3" in vocabulary.name
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False, rstrip=phi3 and token not in PHI3_KEEPS_SPACE) for token in special]
    )
    # Such a token may be a run of spaces. Where text has no prefix it is looked for behind the normalizer, as SentencePiece does.
    normalized = not adds_prefix(vocabulary)
    defined = vocabulary.of_type(USER_DEFINED)
    tokenizer.add_tokens([AddedToken(token, normalized=normalized, rstrip=phi3) for token in defined])
    return tokenizer


def _has_scores(vocabulary: Vocabulary) -> bool:
    """Converters that start from tokenizer.json write one score for all, and the merges."""
    if vocabulary.model != "llama":
        return False
    normal = vocabulary.scores[vocabulary.types == NORMAL]
    return normal.size < 2 or bool((normal != normal[0]).any())


def merges_of_scores(vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """Every pair of pieces that makes a piece, the highest score first.

    SentencePiece joins the two neighbours whose piece has the highest score, which is what BPE does with these merges. Pieces of other
    types than NORMAL are never made of others: they are special, or found in the text before anything is joined.
    """
    normal = np.flatnonzero(vocabulary.types == NORMAL)
    order = normal[np.argsort(-vocabulary.scores[normal], kind="stable")]
    tokens = vocabulary.tokens
    pieces = [tokens[index] for index in order]
    known = set(pieces)
    merges = []
    for piece in pieces:
        for cut in range(len(piece) - 1, 0, -1):
            # Most beginnings are no pieces, so the end is not looked at for them.
            if (left := piece[:cut]) in known and (right := piece[cut:]) in known:
                merges.append((left, right))
    return merges

