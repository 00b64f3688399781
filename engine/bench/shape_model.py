"""A model of a public shape with random weights: a directory that metalstep, mlx-lm and vLLM load, and nothing is downloaded."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from metalstep.checkpoint import Tensor
from metalstep.shapes import DTYPE, ShapeCheckpoint

ALIGNMENT = 64  # bytes, of the first tensor's place in the file
CHUNK = 1 << 24  # random words that are drawn at once
SPREAD = 0.25  # of a group's scale around the usual one
LOGITS = 6.0  # their standard deviation: of 150,000 tokens that leaves an entropy of 2.2 nats, a perplexity of 9, as a text has
ARCHITECTURES = {
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
}  # fmt: skip  # names in config.json, which vLLM asks for


def write_shape_model(folder: Path, shape: str, *, bits: int = 4, group_size: int = 64, seed: int = 0) -> Path:
    """Write config.json, model.safetensors and a tokenizer of `shape` (metalstep.shapes) into `folder`; one that is there already stays.

    Weights are what mlx-lm's 4-bit conversions have: uint32 words, bfloat16 scales and biases per group, bfloat16 norms. The words are
    random bits; scales are such that every linear keeps its input's size, so that no activation leaves float16 and logits are spread as a
    real model's. Token i is the word `i`. seed: of everything random. Takes about a second per GB.
    Returns: the folder. Raises: ValueError as ShapeCheckpoint; OSError for a folder that cannot be written.
    """
    checkpoint = ShapeCheckpoint(shape, bits=bits, group_size=group_size)
    tensors = checkpoint.tensors
    folder.mkdir(parents=True, exist_ok=True)
    # With a version transformers does not take the tokenizer for an old one of Mistral's.
    config = dict(checkpoint.config, torch_dtype=DTYPE, eos_token_id=0, bos_token_id=0, transformers_version="5.0.0")
    if architecture := ARCHITECTURES.get(config["model_type"]):
        config["architectures"] = [architecture]
    if bits < 16:
        config["quantization"] = {"group_size": group_size, "bits": bits}
    about = json.dumps({"shape": shape, "bits": bits, "group_size": group_size, "seed": seed, "logits": LOGITS, "spread": SPREAD})
    done = folder / "random_weights.json"
    if done.exists() and done.read_text() == about:
        return folder
    done.unlink(missing_ok=True)
    _write_tensors(folder / "model.safetensors", tensors, bits, group_size, seed)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    _write_tokenizer(folder, config["vocab_size"])
    done.write_text(about)
    return folder


def _write_tensors(path: Path, tensors: Mapping[str, Tensor], bits: int, group_size: int, seed: int) -> None:
    names = {"uint32": "U32", DTYPE: "BF16"}
    header: dict[str, object] = {"__metadata__": {"format": "mlx"}}
    at = 0
    for name, tensor in tensors.items():
        nbytes = math.prod(tensor.shape) * (4 if tensor.dtype == "uint32" else 2)
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, at + nbytes]}
        at += nbytes
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    rng = np.random.default_rng(seed)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in tensors:
            for part in _values(name, tensors, bits, group_size, rng):
                file.write(part.data)


def _values(name: str, tensors: Mapping[str, Tensor], bits: int, group_size: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """A tensor's values in its stored type, in pieces."""
    tensor, (layer, _, kind) = tensors[name], name.rpartition(".")
    count = math.prod(tensor.shape)
    if tensor.dtype == "uint32":
        for start in range(0, count, CHUNK):
            yield rng.integers(0, 2**32, min(CHUNK, count - start), np.uint32)
    elif kind in ("scales", "biases"):
        inputs = tensor.shape[-1] * group_size
        levels = 2**bits
        usual = math.sqrt(12 / (levels**2 - 1)) / math.sqrt(inputs)  # of uniform levels: a product as large as its input
        # The same draw for both, by the layer's name, whichever of them comes first.
        own = np.random.default_rng(list(layer.encode()))
        scales = usual * (1 + SPREAD * own.uniform(-1, 1, count).astype(np.float32))
        yield _bfloat16(scales if kind == "scales" else -(levels - 1) / 2 * scales)
    elif len(tensor.shape) == 1:  # a norm, or a bias of a linear
        size = 0.0 if kind == "bias" else LOGITS if layer == "model.norm" else 1.0
        yield _bfloat16(np.full(count, size, np.float32))
    else:
        yield _bfloat16(rng.standard_normal(count, np.float32) / math.sqrt(tensor.shape[-1]))


def _bfloat16(values: np.ndarray) -> np.ndarray:
    """The upper halves of float32, rounded to the nearest."""
    words = values.astype(np.float32).view(np.uint32)
    return ((words + 0x7FFF + ((words >> 16) & 1)) >> 16).astype(np.uint16)


def _write_tokenizer(folder: Path, vocab_size: int) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({str(i): i for i in range(vocab_size)}, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="0", unk_token="0").save_pretrained(folder)
