"""What is said of one of llama.cpp's architectures: mlx-lm's model for it, and how its tensors and metadata become that model's."""
from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from metalstep.checkpoint.gguf.file import TensorInfo
from metalstep.checkpoint.gguf.metadata import Metadata

# Names without `.weight` or `.bias`. Source: llama.cpp, gguf-py/gguf/constants.py.
TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
ATTENTION = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
QK_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
MLP = {
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@dataclass(frozen=True)
class Facts:
    """What a file says of its model, checked, and sizes that every architecture has.

    tensors: by GGUF's name. rope: values of the tensors that are factors of RoPE's frequencies. rope_dims: of a head, that are rotated.
    """

    metadata: Metadata
    tensors: Mapping[str, TensorInfo]
    rope: Mapping[str, np.ndarray]
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    rope_dims: int
    rope_theta: float

    @property
    def rms_norm_eps(self) -> float:
        return float(self.metadata.number("attention.layer_norm_rms_epsilon"))

    def require_head_dim(self) -> None:
        """For models of mlx-lm that divide hidden_size by the heads. Raises: CheckpointError."""
        if self.head_dim * self.heads != self.hidden_size:
            raise self.metadata.error(
                f"attention.key_length is {self.head_dim}, expected {self.hidden_size} / {self.heads} in a "
                f"{self.metadata.architecture} model"
            )

    def require_plain_rope(self) -> None:
        """For models of mlx-lm that do not scale RoPE. Raises: CheckpointError."""
        kind = self.metadata.text(f"{self.metadata.architecture}.rope.scaling.type", "none")
        if kind != "none" or self.rope:
            kind = kind if kind != "none" else f"that of {next(iter(self.rope))}"
            raise self.metadata.error(f"the RoPE scaling is {kind}, expected none in a {self.metadata.architecture} model")


@dataclass(frozen=True)
class Architecture:
    """model_type: mlx-lm's. name: transformers' class. layer, top: mlx-lm's names of the tensors. config: the keys of config.json that
    not every architecture has.

    permuted: q and k rows are stored for interleaved RoPE. norm_shift: what llama.cpp has added to norm weights. partial_rope: a part
    of a head may be rotated. matrices: parts that the file has as vectors and mlx-lm as matrices of one row.
    """

    model_type: str
    name: str
    layer: Mapping[str, str]
    config: Callable[[Facts], dict[str, Any]]
    top: Mapping[str, str] = field(default_factory=lambda: TOP)
    permuted: bool = False
    norm_shift: float = 0.0
    partial_rope: bool = False
    matrices: frozenset[str] = frozenset()

    def parameter(self, name: str) -> str | None:
        """mlx-lm's name of the tensor `name`; None where the architecture has no such tensor."""
        match name.split("."):
            case [part, leaf] if part in self.top:
                return f"{self.top[part]}.{leaf}"
            case ["blk", layer, part, leaf] if part in self.layer and layer.isascii() and layer.isdigit():
                return f"model.layers.{layer}.{self.layer[part]}.{leaf}"
        return None

    def shift(self, name: str) -> float:
        """What llama.cpp has added to the tensor `name`."""
        return self.norm_shift if name.endswith("norm.weight") else 0.0
