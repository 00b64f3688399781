"""Tiny models of every family as directories that `load` takes: mlx-lm's config, weights and a one-word-per-token tokenizer."""
from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def write_tokenizer(directory: Path, vocab_size: int) -> None:
    """Token i is the word `i`; 0 ends a text."""
    tokenizer = Tokenizer(models.WordLevel({str(i): i for i in range(vocab_size)}, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="0", unk_token="0").save_pretrained(directory)


def write_model(directory: Path, model: object, config: dict, quantization: dict | None = None) -> Path:
    """Save an mlx-lm model. quantization: group_size and bits, when its linears are quantised."""
    directory.mkdir(parents=True, exist_ok=True)
    if quantization:
        config = {**config, "quantization": quantization}
    (directory / "config.json").write_text(json.dumps(config))
    weights = dict(tree_flatten(model.parameters()))  # type: ignore[attr-defined]
    mx.save_safetensors(str(directory / "model.safetensors"), weights, metadata={"format": "mlx"})
    write_tokenizer(directory, config["vocab_size"])
    return directory
