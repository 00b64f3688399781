"""Writes small checkpoints: GGUF files field by field, and directories of mlx-lm models with random weights."""
from __future__ import annotations

import importlib
import json
import struct
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

F32, F16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, BF16 = 0, 1, 2, 3, 6, 7, 8, 30
Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS, MXFP4 = 10, 11, 12, 13, 14, 20, 23, 39
U32, I32, FLOAT, BOOL, STRING, ARRAY, U64 = 4, 5, 6, 7, 8, 9, 10
BLOCK_BYTES = {Q4_0: 18, Q4_1: 20, Q8_0: 34}


def string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def value(item: Any) -> bytes:
    """Type and value of a metadata entry."""
    if isinstance(item, bytes):  # a type and value already encoded
        return item
    if isinstance(item, bool):
        return struct.pack("<I?", BOOL, item)
    if isinstance(item, int):
        return struct.pack("<II", U32, item)
    if isinstance(item, float):
        return struct.pack("<If", FLOAT, item)
    if isinstance(item, str):
        return struct.pack("<I", STRING) + string(item)
    if isinstance(item[0], str):
        return struct.pack("<IIQ", ARRAY, STRING, len(item)) + b"".join(map(string, item))
    return struct.pack("<IIQ", ARRAY, I32, len(item)) + np.asarray(item, np.int32).tobytes()


def gguf(
    metadata: dict[str, Any] | list[tuple[str, Any]],
    tensors: list[tuple[str, tuple[int, ...], int, bytes]],
    *,
    version: int = 3,
    magic: bytes = b"GGUF",
    offsets: dict[str, int] | None = None,
    alignment: int = 32,
) -> bytes:
    """A GGUF file. tensors: name, shape (outermost first), type, data. offsets: of tensors, where they should not be the right ones."""
    entries = list(metadata.items()) if isinstance(metadata, dict) else metadata
    head = magic + struct.pack("<IQQ", version, len(tensors), len(entries))
    head += b"".join(string(key) + value(item) for key, item in entries)
    data = b""
    for name, shape, kind, content in tensors:
        offset = (offsets or {}).get(name, len(data))
        head += string(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *shape[::-1])
        head += struct.pack("<IQ", kind, offset)
        data += content + bytes(-len(content) % alignment)
    return head + bytes(-len(head) % alignment) + data


def tensor(rng: np.random.Generator, name: str, shape: tuple[int, ...], kind: int) -> tuple[str, tuple[int, ...], int, bytes]:
    """A tensor of random values."""
    values = rng.standard_normal(shape).astype(np.float32) * 0.1
    if kind == F32:
        return name, shape, kind, values.tobytes()
    if kind == F16:
        return name, shape, kind, values.astype(np.float16).tobytes()
    if kind == BF16:
        return name, shape, kind, (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    blocks = rng.integers(0, 256, (*shape[:-1], shape[-1] // 32, BLOCK_BYTES[kind]), dtype=np.uint8)
    blocks[..., :2] = np.abs(values[..., ::32].astype(np.float16))[..., None].view(np.uint8)
    if kind == Q4_1:
        blocks[..., 2:4] = values[..., 1::32].astype(np.float16)[..., None].view(np.uint8)
    return name, shape, kind, blocks.tobytes()


def byte_tokens() -> list[str]:
    """The 256 characters that byte-level BPE writes bytes as, in the order of the bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (byte for byte in range(256) if byte not in printable)
    names = {**{byte: chr(byte) for byte in printable}, **{byte: chr(256 + index) for index, byte in enumerate(others)}}
    return [names[byte] for byte in range(256)]


TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *byte_tokens(), "Ġt", "he", "Ġthe"]
MERGES = ["Ġ t", "h e", "Ġt he"]
HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE, LAYERS = 64, 4, 2, 16, 96, 2


def llama_metadata(arch: str = "llama", **changes: Any) -> dict[str, Any]:
    """The metadata of `llama_gguf`. A change to None leaves the key out; `__` stands for a dot."""
    metadata: dict[str, Any] = {
        "general.architecture": arch,
        f"{arch}.block_count": LAYERS,
        f"{arch}.context_length": 128,
        f"{arch}.embedding_length": HIDDEN,
        f"{arch}.feed_forward_length": INTERMEDIATE,
        f"{arch}.attention.head_count": HEADS,
        f"{arch}.attention.head_count_kv": KV_HEADS,
        f"{arch}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{arch}.rope.freq_base": 10000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [3, 3, 3] + [1] * (len(TOKENS) - 3),
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    metadata.update({key.replace("__", "."): item for key, item in changes.items()})
    return {key: item for key, item in metadata.items() if item is not None}


def llama_tensors(kind: int = Q4_1, head: int = Q8_0, *, seed: int = 0, arch: str = "llama", tied: bool = True) -> list:
    """The tensors of a two-layer model: matrices of type `kind`, the embedding of type `head`."""
    rng = np.random.default_rng(seed)
    out = [tensor(rng, "token_embd.weight", (len(TOKENS), HIDDEN), head)]
    if not tied:
        out.append(tensor(rng, "output.weight", (len(TOKENS), HIDDEN), kind))
    for layer in range(LAYERS):
        shapes = {
            "attn_q": (HEADS * HEAD_DIM, HIDDEN),
            "attn_k": (KV_HEADS * HEAD_DIM, HIDDEN),
            "attn_v": (KV_HEADS * HEAD_DIM, HIDDEN),
            "attn_output": (HIDDEN, HEADS * HEAD_DIM),
            "ffn_gate": (INTERMEDIATE, HIDDEN),
            "ffn_up": (INTERMEDIATE, HIDDEN),
            "ffn_down": (HIDDEN, INTERMEDIATE),
        }
        out += [tensor(rng, f"blk.{layer}.{name}.weight", shape, kind) for name, shape in shapes.items()]
        norms = {"attn_norm": HIDDEN, "ffn_norm": HIDDEN}
        if arch == "qwen3":
            norms |= {"attn_q_norm": HEAD_DIM, "attn_k_norm": HEAD_DIM}
        out += [tensor(rng, f"blk.{layer}.{name}.weight", (size,), F32) for name, size in norms.items()]
        if arch == "qwen2":
            out += [tensor(rng, f"blk.{layer}.{name}.bias", (shapes[name][0],), F32) for name in ("attn_q", "attn_k", "attn_v")]
    return [*out, tensor(rng, "output_norm.weight", (HIDDEN,), F32)]


def llama_gguf(**metadata: Any) -> bytes:
    """A small valid llama file with Q4_1 matrices and a Q8_0 tied head."""
    return gguf(llama_metadata(**metadata), llama_tensors())


LLAMA_CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 300,
    "tie_word_embeddings": True,
    "max_position_embeddings": 128,
}


def make_model(config: dict[str, Any], dtype: mx.Dtype = mx.float32) -> nn.Module:
    """mlx-lm's own model of `config` with its random weights in `dtype`."""
    module = importlib.import_module(f"mlx_lm.models.{config['model_type']}")
    mx.random.seed(0)
    model = module.Model(module.ModelArgs.from_dict(config))
    model.set_dtype(dtype)
    return model


def save_model(path: Path, config: dict[str, Any], weights: dict[str, mx.array], shards: int = 1) -> Path:
    """config.json, the weights in `shards` files, and their index where there are several."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    names = sorted(weights)
    parts = [names[index::shards] for index in range(shards)]
    files = [f"model-{index + 1:05}-of-{shards:05}.safetensors" if shards > 1 else "model.safetensors" for index in range(shards)]
    for file, part in zip(files, parts, strict=True):
        mx.save_safetensors(str(path / file), {name: weights[name] for name in part}, {"format": "mlx"})
    if shards > 1:
        index = {"weight_map": {name: file for file, part in zip(files, parts, strict=True) for name in part}}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def parameters(model: nn.Module) -> dict[str, mx.array]:
    return dict(tree_flatten(model.parameters()))


def safetensors(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file with any header: bytes as they are, anything else as JSON."""
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(encoded) if length is None else length) + encoded + data
