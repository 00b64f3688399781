"""Shapes of public models: what their config.json says, and no weights, for `metalstep explain --shape`."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm import utils as mlx_lm_utils

from metalstep.checkpoint import Checkpoint, CheckpointError, Tensor
from metalstep.checkpoint.tensors import ITEM_SIZES

DTYPE = "bfloat16"  # of scales, norms and dense weights, as these models are published
GROUP_SIZES = (32, 64, 128)
BITS = (2, 3, 4, 5, 6, 8)
LLAMA3_ROPE = dict(rope_type="llama3", low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)


@dataclass(frozen=True)
class Shape:
    """A public model without its weights. source: the Hugging Face id whose config.json has these values; parameters: of the weights, a
    check on them."""

    source: str
    parameters: int
    config: dict[str, Any]


def _config(
    model_type: str, hidden: int, layers: int, intermediate: int, heads: int, kv_heads: int, vocab: int, context: int, **others: Any
) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": context,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        **others,
    }


def _qwen3(hidden: int, layers: int, intermediate: int, heads: int, **others: Any) -> dict[str, Any]:
    own = dict(head_dim=128, rope_theta=1e6, **others)
    return _config("qwen3", hidden, layers, intermediate, heads, 8, 151936, 40960, **own)


def _llama3(hidden: int, layers: int, intermediate: int, heads: int, factor: float, **others: Any) -> dict[str, Any]:
    own = dict(rms_norm_eps=1e-5, rope_theta=5e5, rope_scaling={**LLAMA3_ROPE, "factor": factor}, **others)
    return _config("llama", hidden, layers, intermediate, heads, 8, 128256, 131072, **own)


def _smollm2(hidden: int, layers: int, intermediate: int, heads: int, kv_heads: int, **others: Any) -> dict[str, Any]:
    own = {"rms_norm_eps": 1e-5, "rope_theta": 1e5, **others}
    return _config("llama", hidden, layers, intermediate, heads, kv_heads, 49152, 8192, **own)


SHAPES = {
    "qwen2.5-0.5b": Shape(
        "Qwen/Qwen2.5-0.5B-Instruct", 494_032_768, _config("qwen2", 896, 24, 4864, 14, 2, 151936, 32768, rope_theta=1e6)
    ),
    "qwen2.5-1.5b": Shape(
        "Qwen/Qwen2.5-1.5B-Instruct", 1_543_714_304, _config("qwen2", 1536, 28, 8960, 12, 2, 151936, 32768, rope_theta=1e6)
    ),
    "qwen2.5-7b": Shape(
        "Qwen/Qwen2.5-7B-Instruct",
        7_615_616_512,
        _config("qwen2", 3584, 28, 18944, 28, 4, 152064, 32768, rope_theta=1e6, tie_word_embeddings=False),
    ),
    "qwen3-0.6b": Shape("Qwen/Qwen3-0.6B", 596_049_920, _qwen3(1024, 28, 3072, 16)),
    "qwen3-1.7b": Shape("Qwen/Qwen3-1.7B", 1_720_574_976, _qwen3(2048, 28, 6144, 16)),
    "qwen3-4b": Shape("Qwen/Qwen3-4B", 4_022_468_096, _qwen3(2560, 36, 9728, 32)),
    "qwen3-8b": Shape("Qwen/Qwen3-8B", 8_190_735_360, _qwen3(4096, 36, 12288, 32, tie_word_embeddings=False)),
    "qwen3-14b": Shape("Qwen/Qwen3-14B", 14_768_307_200, _qwen3(5120, 40, 17408, 40, tie_word_embeddings=False)),
    "qwen3-32b": Shape("Qwen/Qwen3-32B", 32_762_123_264, _qwen3(5120, 64, 25600, 64, tie_word_embeddings=False)),
    "llama-3.2-1b": Shape("meta-llama/Llama-3.2-1B-Instruct", 1_235_814_400, _llama3(2048, 16, 8192, 32, 32.0, head_dim=64)),
    "llama-3.2-3b": Shape("meta-llama/Llama-3.2-3B-Instruct", 3_212_749_824, _llama3(3072, 28, 8192, 24, 32.0, head_dim=128)),
    "llama-3.1-8b": Shape(
        "meta-llama/Llama-3.1-8B-Instruct", 8_030_261_248, _llama3(4096, 32, 14336, 32, 8.0, tie_word_embeddings=False)
    ),
    "smollm2-135m": Shape("HuggingFaceTB/SmolLM2-135M-Instruct", 134_515_008, _smollm2(576, 30, 1536, 9, 3)),
    "smollm2-360m": Shape("HuggingFaceTB/SmolLM2-360M-Instruct", 361_821_120, _smollm2(960, 32, 2560, 15, 5)),
    "smollm2-1.7b": Shape("HuggingFaceTB/SmolLM2-1.7B-Instruct", 1_711_376_384, _smollm2(2048, 24, 8192, 32, 32, rope_theta=1.3e5)),
    "smollm3-3b": Shape(
        "HuggingFaceTB/SmolLM3-3B", 3_075_098_624, _config("smollm3", 2048, 36, 11008, 16, 4, 128256, 65536, rope_theta=5e6)
    ),
    "mistral-7b": Shape(
        "mistralai/Mistral-7B-Instruct-v0.3",
        7_248_023_552,
        _config("mistral", 4096, 32, 14336, 32, 8, 32768, 32768, rms_norm_eps=1e-5, rope_theta=1e6, tie_word_embeddings=False),
    ),
    "gemma-3-1b": Shape(
        "google/gemma-3-1b-it",
        999_885_952,
        _config(
            "gemma3_text", 1152, 26, 6912, 4, 1, 262144, 32768,
            head_dim=256, query_pre_attn_scalar=256, sliding_window=512, sliding_window_pattern=6,
        ),
    ),
    "gemma-3-4b": Shape(  # its language model alone: 4,300,079,472 with the 419,816,304 of its vision tower and projector
        "google/gemma-3-4b-it",
        3_880_263_168,
        _config(
            "gemma3_text", 2560, 34, 10240, 8, 4, 262208, 131072,
            head_dim=256, query_pre_attn_scalar=256, sliding_window=1024, sliding_window_pattern=6,
            rope_scaling=dict(rope_type="linear", factor=8.0),
        ),
    ),
    "phi-4-mini": Shape(  # its 48 longrope factors are ones here: values, on which no shape depends
        "microsoft/Phi-4-mini-instruct",
        3_836_021_760,
        _config(
            "phi3", 3072, 32, 8192, 24, 8, 200064, 131072,
            rms_norm_eps=1e-5, rope_theta=1e4, partial_rotary_factor=0.75, original_max_position_embeddings=4096,
            rope_scaling=dict(type="longrope", short_factor=[1.0] * 48, long_factor=[1.0] * 48),
        ),
    ),
}  # fmt: skip


def find_shape(name: str) -> Shape:
    """The shape of this name. Raises: ValueError listing those that are known."""
    if name.lower() not in SHAPES:
        raise ValueError(f"shape is {name!r}, expected one of {', '.join(SHAPES)}; any other model is planned from its files")
    return SHAPES[name.lower()]


class ShapeTensor(Tensor):
    """A weight that has a shape and no values: numpy() gives ones."""

    def numpy(self) -> np.ndarray:
        return np.ones(self.shape, np.uint32 if self.dtype == "uint32" else np.float32)

    def address(self) -> int:
        raise CheckpointError(f"{self.name} is of a shape alone and has no bytes; pass a model to read its weights")


class ShapeCheckpoint(Checkpoint):
    """A shape in the place of a checkpoint: what an mlx-lm conversion of the model would hold, and no bytes.

    bits, group_size: of affine quantisation; bits 16: dense bfloat16. Layers whose inputs are no multiple of group_size stay dense, as
    mlx-lm leaves them.
    Raises: ValueError for bits or a group size that MLX has not.
    """

    def __init__(self, name: str, *, bits: int = 4, group_size: int = 64):
        super().__init__()
        if bits not in (*BITS, 16):
            raise ValueError(f"bits is {bits}, expected one of {', '.join(map(str, BITS))}; 16 is for dense weights")
        if group_size not in GROUP_SIZES:
            raise ValueError(f"group_size is {group_size}, expected one of {', '.join(map(str, GROUP_SIZES))}; MLX has no other")
        self.shape = find_shape(name)
        self.path = Path(name)
        self.config = {**self.shape.config}
        self.bits, self.group_size = bits, group_size
        self.file_bytes = 0

    def build(self) -> nn.Module:
        model_class, args_class = mlx_lm_utils._get_classes(self.config)
        model = model_class(args_class.from_dict(self.config))
        if self.config["tie_word_embeddings"] and hasattr(model, "sanitize"):
            model.sanitize({})  # gemma3 learns from a checkpoint without lm_head that it has none
        if self.bits < 16:
            nn.quantize(model, self.group_size, self.bits, class_predicate=self._quantised)
        model.eval()
        parameters: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
        zeros = [(name, mx.zeros(array.shape, array.dtype)) for name, array in parameters.items()]
        model.update(tree_unflatten(zeros))  # float32, as a .gguf file's: activations are float32 whatever the weights are
        self._tensors = {name: ShapeTensor(name, tuple(a.shape), _stored(a.dtype)) for name, a in zeros}
        self.file_bytes = sum(nbytes(tensor) for tensor in self._tensors.values())
        return model

    def _quantised(self, _: str, module: nn.Module) -> bool:
        return hasattr(module, "to_quantized") and module.weight.shape[-1] % self.group_size == 0

    def arrays(self, dtype: mx.Dtype | None) -> dict[str, mx.array]:
        raise CheckpointError(f"{self.path} is a shape without weights; pass a model to run it")

    def tokenizer(self, overrides: dict[str, Any] | None = None) -> Any:
        raise CheckpointError(f"{self.path} is a shape without a tokenizer; pass a model to run it")

    def close(self) -> None:
        pass


def nbytes(tensor: Tensor) -> int:
    """Bytes of a tensor as stored."""
    return int(np.prod(tensor.shape, dtype=np.int64)) * ITEM_SIZES[tensor.dtype]


def parameter_count(tensors: Mapping[str, Tensor]) -> int:
    """Elements of dense tensors."""
    return sum(int(np.prod(tensor.shape, dtype=np.int64)) for tensor in tensors.values())


def _stored(dtype: mx.Dtype) -> str:
    return DTYPE if mx.issubdtype(dtype, mx.floating) else str(dtype).removeprefix("mlx.core.")
