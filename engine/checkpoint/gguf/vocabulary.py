"""The tokenizer metadata of a GGUF file, checked: tokens, their types, special ids. Source: llama.cpp, src/llama-vocab.cpp."""
from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from metalstep.checkpoint.errors import CheckpointError
from metalstep.checkpoint.gguf.pre_tokenizers import pre_tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # token types
# tokenizer.ggml.model: how text becomes tokens, and the ids that such a file means when it does not say.
MODELS: dict[str, dict[str, int]] = {
    "gpt2": {},
    "llama": {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0},
    "gemma4": {},
}
# Tokens that end a turn whatever the metadata says, as in llama.cpp.
END_OF_GENERATION = (
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>"),
    *("<EOT>", "_<EOT>", "<|end_of_text|>", "<end_of_utterance>", "[EOT]", "<turn|>", "<｜end▁of▁sentence｜>"),
)


class Vocabulary:
    """The tokenizer metadata of a file, checked.

    Raises: CheckpointError for a kind of tokenizer that is not supported and for metadata that contradicts itself.
    """

    def __init__(self, path: Path, metadata: Mapping[str, Any]):
        self.path = path
        self._metadata = metadata
        self.model: str = self.get("model", str)
        if self.model not in MODELS:
            raise CheckpointError(
                f"{path}: tokenizer.ggml.model is {self.model!r}, expected one of {', '.join(MODELS)}; "
                "use an mlx-lm directory of this model"
            )
        # Only byte-level BPE has pre-tokenizers; "default" is what llama.cpp does for a file that names none.
        self.pre = pre_tokenizer(path, self.get("pre", str, "default")) if self.model == "gpt2" else None
        self.tokens: list[str] = self.get("tokens", list)
        if not self.tokens or not isinstance(self.tokens[0], str):
            raise self.error("tokenizer.ggml.tokens holds no strings")
        if "" in self.tokens:
            self.tokens = [token or f"[EMPTY_{index}]" for index, token in enumerate(self.tokens)]
        self.types: np.ndarray = self.get("token_type", np.ndarray, np.full(len(self.tokens), NORMAL, np.int32))
        if self.types.shape != (len(self.tokens),):
            raise self.error(f"tokenizer.ggml.token_type has {self.types.size} entries, expected {len(self.tokens)}")
        template = metadata.get("tokenizer.chat_template")
        self.chat_template = template if isinstance(template, str) else None
        self.ids = {token: index for index, token in enumerate(self.tokens)}
        if len(self.ids) != len(self.tokens):
            twice = next(token for index, token in enumerate(self.tokens) if self.ids[token] != index)
            raise self.error(f"the token {twice!r} appears twice")
        stops = [index for index in _stops(self) if self.types[index] != CONTROL]
        if stops:  # "control-looking" tokens that the converter took for text
            self.types = self.types.copy()
            self.types[stops] = CONTROL
        wants_bos = self.flag("add_bos_token", self.pre.add_bos if self.pre else True)
        self.add_bos = wants_bos and self.token_id("bos_token_id") is not None
        self.add_eos = self.flag("add_eos_token", False) and self.token_id("eos_token_id") is not None

    @property
    def name(self) -> str:
        """The model's name as the file gives it, in lower case."""
        return str(self._metadata.get("general.name", "")).lower()

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        value = self._metadata.get(f"tokenizer.ggml.{key}", default)
        if not isinstance(value, kind):
            found = "missing" if value is None else f"a {type(value).__name__}"
            raise self.error(f"tokenizer.ggml.{key} is {found}, expected a {kind.__name__}")
        return value

    def flag(self, key: str, default: bool) -> bool:
        return bool(self.get(key, bool, default))

    def has(self, key: str) -> bool:
        return f"tokenizer.ggml.{key}" in self._metadata

    def merges(self) -> list[tuple[str, str]]:
        """Pairs in order of rank."""
        lines = self.get("merges", list)
        # The converter writes a space inside a token as another character, so a space is only ever the separator: one split does for all.
        parts = " ".join(lines).split(" ") if lines and isinstance(lines[0], str) else []
        if len(parts) != 2 * len(lines):
            raise self.error("tokenizer.ggml.merges holds something else than pairs of tokens")
        return list(zip(parts[0::2], parts[1::2], strict=True))

    @cached_property
    def scores(self) -> np.ndarray:
        """Of every token, the higher the earlier it is merged."""
        scores: np.ndarray = self.get("scores", np.ndarray)
        if scores.shape != (len(self.tokens),):
            raise self.error(f"tokenizer.ggml.scores has {scores.size} entries, expected {len(self.tokens)}")
        if scores.dtype.kind not in "fi" or not np.isfinite(scores).all():
            raise self.error("tokenizer.ggml.scores holds something else than finite numbers")
        return scores

    def of_type(self, *types: int) -> list[str]:
        """Tokens of these types, by id."""
        return [self.tokens[index] for index in np.flatnonzero(np.isin(self.types, types))]

    def token_id(self, key: str) -> int | None:
        """The id under `key`, or None."""
        default = MODELS[self.model].get(key)
        if not self.has(key):
            return default if default is not None and default < len(self.tokens) else None
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
    ids: dict[str, Any] = {}
    for key, word in (("bos_token_id", "bos"), ("pad_token_id", "padding")):
        if (index := vocabulary.token_id(f"{word}_token_id")) is not None:
            ids[key] = index
    if stops := _stops(vocabulary):
        ids["eos_token_id"] = stops
    return ids


def _stops(vocabulary: Vocabulary) -> list[int]:
    """Tokens that end a generation: eos from the metadata first, then by name."""
    stops = [vocabulary.token_id(key) for key in ("eos_token_id", "eot_token_id", "eom_token_id")]
    stops += [vocabulary.ids.get(token) for token in END_OF_GENERATION]
    return list(dict.fromkeys(stop for stop in stops if stop is not None))
