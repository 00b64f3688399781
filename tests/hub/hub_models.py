"""The models that the stub hub serves in tests."""
from __future__ import annotations

import json
import random
from pathlib import Path

from checkpoint_files import llama_gguf, safetensors

SHARDS = {"model-00001-of-00002.safetensors": 300_000, "model-00002-of-00002.safetensors": 200_000}
SMALL = {"config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
IGNORED = {
    "README.md": b"a card",
    "pytorch_model.bin": bytes(5000),
    "pytorch_model.bin.index.json": b"{}",
    "original/consolidated.00.pth": bytes(4000),
    "original/params.json": b"{}",
    "onnx/model.onnx": bytes(3000),
    "consolidated.safetensors": bytes(6000),
    "tiny-Q4_K_M.gguf": bytes(2000),
}
GGUFS = ("tiny-F16.gguf", "tiny-Q8_0.gguf", "tiny-Q4_1.gguf", "mmproj-tiny-F16.gguf", "parts-Q2_K-00001-of-00002.gguf")


def weights(nbytes: int, seed: int) -> bytes:
    """A .safetensors file with one tensor of random bytes."""
    header = {"a": {"dtype": "U8", "shape": [nbytes], "data_offsets": [0, nbytes]}}
    return safetensors(header, random.Random(seed).randbytes(nbytes))


def write(folder: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def write_models(folder: Path) -> Path:
    """own/sharded, own/single, own/ggufs, own/torch, own/adapter and own/empty."""
    config = json.dumps({"model_type": "llama", "max_position_embeddings": 128, "quantization": {"bits": 4, "group_size": 64}}).encode()
    small = {name: f"of {name}".encode() for name in SMALL} | {"config.json": config}
    index = {"weight_map": {str(i): name for i, name in enumerate(SHARDS)}}
    shards = {name: weights(nbytes, nbytes) for name, nbytes in SHARDS.items()}
    write(folder / "own/sharded", {**small, **shards, **IGNORED, "model.safetensors.index.json": json.dumps(index).encode()})
    write(folder / "own/single", {**small, "model.safetensors": weights(100_000, 1)})
    write(folder / "own/ggufs", {name: llama_gguf() + bytes(32 * i) for i, name in enumerate(GGUFS)})
    write(folder / "own/torch", {"config.json": b"{}", "pytorch_model.bin": bytes(5000)})
    write(folder / "own/adapter", {"adapter_config.json": b"{}", "adapter_model.safetensors": bytes(5000)})
    write(folder / "own/empty", {"README.md": b"nothing"})
    return folder
