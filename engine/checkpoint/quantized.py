"""A floating-point checkpoint quantised while it is loaded: the same bits as those that `metalstep convert` writes."""
from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.convert import QUANT_RECIPES, mixed_quant_predicate_builder
from mlx_lm.utils import quantize_model

from metalstep.checkpoint.checkpoint import Checkpoint
from metalstep.checkpoint.errors import CheckpointError
from metalstep.checkpoint.skeleton import clear_parameters
from metalstep.checkpoint.tensors import ComputedTensor, Tensor

AFFINE_BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
FLOAT_MODES = {"mxfp4": (32, 4), "nvfp4": (16, 4), "mxfp8": (32, 8)}  # group size and bits, which the format fixes
FLOATS = ("float16", "bfloat16", "float32")
PARTS = ("weight", "scales", "biases")
BITS = re.compile(r"([0-9])bit(?::([0-9]{1,4}))?")
EXPECTED = (
    f"{', '.join([*(f'{bits}bit' for bits in AFFINE_BITS), *FLOAT_MODES, *QUANT_RECIPES])}; 4bit:32 and 4bit:128 have other groups than "
    "of 64 weights"
)


@dataclass(frozen=True)
class Quantization:
    """As mlx-lm's quantize_model takes it. recipe: of mixed bits, by layer; None: the same for all."""

    mode: str
    bits: int
    group_size: int
    recipe: str | None = None


def parse_quantize(kind: str) -> Quantization:
    """What `quantize` names: "4bit", "4bit:32", "mxfp4", "mixed_4_6", ... Raises: ValueError for another name."""
    if kind in tuple(FLOAT_MODES):
        group_size, bits = FLOAT_MODES[kind]
        return Quantization(kind, bits, group_size)
    if kind in tuple(QUANT_RECIPES):
        return Quantization("affine", int(kind.split("_")[1]), 64, kind)
    match = BITS.fullmatch(kind) if isinstance(kind, str) else None
    if match and int(match[1]) in AFFINE_BITS and int(match[2] or 64) in GROUP_SIZES:
        return Quantization("affine", int(match[1]), int(match[2] or 64))
    raise ValueError(f"quantize is {kind!r:.80}, expected one of {EXPECTED}")


def config_dtype(config: Mapping[str, Any]) -> Any:
    """The dtype that mlx-lm's converter gives what is not quantised; not one of FLOATS: it stays as it is."""
    text = config.get("text_config")
    return config.get("torch_dtype") or (text.get("dtype") if isinstance(text, dict) else None)


def quantize_skeleton(model: nn.Module, config: dict[str, Any], wanted: Quantization) -> dict[str, Any]:
    """Quantise the layers of `model`, lazily, by mlx-lm's own rules. Returns `config` with the quantisation added."""
    predicate: Any = None
    if wanted.recipe is not None:
        predicate = mixed_quant_predicate_builder(wanted.recipe, model, wanted.group_size)
    with contextlib.redirect_stdout(io.StringIO()):  # mlx-lm's own words, in the middle of a user's data
        _, changed = quantize_model(
            model, config, wanted.group_size, wanted.bits, mode=wanted.mode, quant_predicate=predicate
        )
    changed["quantization_config"] = changed["quantization"]
    return dict(changed)


class QuantizedCheckpoint(Checkpoint):
    """`checkpoint`, which it takes over and closes, with its layers quantised as `kind` names it. Nothing is quantised before it is read.

    Raises: CheckpointError for a checkpoint that is quantised already; ValueError for a kind that does not exist.
    """

    def __init__(self, checkpoint: Checkpoint, kind: str):
        super().__init__()
        self._floats = checkpoint
        self._wanted = parse_quantize(kind)
        self.path, self.config, self.file_bytes = checkpoint.path, checkpoint.config, checkpoint.file_bytes
        if found := checkpoint.config.get("quantization") or checkpoint.config.get("quantization_config"):
            bits = f" to {found['bits']} bits" if isinstance(found, dict) and "bits" in found else ""
            raise CheckpointError(
                f"{self.path}: quantised already{bits}, so quantize={kind!r} would lose more than it says; load it without quantize, or "
                "quantise the original model"
            )

    def build(self) -> nn.Module:
        model = self._floats.build()
        dtypes = {name: self._dtype(model, name, array.dtype) for name, array in dict(tree_flatten(model.parameters())).items()}
        clear_parameters(model, dtypes)  # of the file's own dtypes until here
        try:
            self.config.update(quantize_skeleton(model, self.config, self._wanted))
        except ValueError as error:  # a recipe for another kind of model
            raise CheckpointError(f"{self.path}: cannot be quantised ({error}); choose another kind of quantisation") from error
        parameters = dict(tree_flatten(model.parameters()))
        tensors: dict[str, Tensor] = {}
        for name, tensor in self._floats.tensors.items():
            layer = name.removesuffix(".weight")
            if name != layer and f"{layer}.scales" in parameters:
                made = _Quantised(tensor, dtypes[name], self._options(layer))
                parts = (f"{layer}.{part}" for part in PARTS)
                tensors.update((part, QuantizedTensor(part, parameters[part], made)) for part in parts if part in parameters)
            elif dtypes[name] == getattr(mx, tensor.dtype):
                tensors[name] = tensor
            else:
                tensors[name] = ComputedTensor(name, mx.array(tensor.numpy()).astype(dtypes[name]))
        self._tensors = tensors
        clear_parameters(model, {name: array.dtype for name, array in parameters.items()})
        return model

    def _dtype(self, model: nn.Module, name: str, own: mx.Dtype) -> mx.Dtype:
        """What mlx-lm's converter makes of a parameter's dtype."""
        wanted = config_dtype(self.config)
        keeps = not getattr(model, "cast_predicate", lambda _: True)(name)
        if keeps or wanted not in FLOATS or not mx.issubdtype(own, mx.floating):
            return own
        return getattr(mx, wanted)

    def _options(self, layer: str) -> dict[str, Any]:
        """What mx.quantize takes for `layer`: its own entry of the config, or that of all."""
        common = self.config["quantization"]
        own = common.get(layer)
        return {key: (own if isinstance(own, dict) else common)[key] for key in ("group_size", "bits", "mode")}

    def arrays(self, dtype: mx.Dtype | None) -> dict[str, mx.array]:
        arrays = {}
        for name, tensor in self.tensors.items():
            array = tensor.array() if isinstance(tensor, QuantizedTensor) else mx.array(tensor.numpy()).astype(getattr(mx, tensor.dtype))
            if dtype is not None and mx.issubdtype(array.dtype, mx.floating):
                array = array.astype(dtype)
            mx.eval(array)  # one by one: what it was made from goes at once
            arrays[name] = array
            tensor.drop_pages()
        return arrays

    def tokenizer(self, overrides: dict[str, Any] | None = None) -> Any:
        return self._floats.tokenizer(overrides)

    def close(self) -> None:
        self._floats.close()


class _Quantised:
    """The parts of a quantised weight, made when the first is asked for; each is given back when it is dropped.

    tensor: the weight in floats. dtype: that it is quantised from. options: of mx.quantize.
    """

    def __init__(self, tensor: Tensor, dtype: mx.Dtype, options: dict[str, Any]):
        self.tensor = tensor
        self.dtype = dtype
        self.options = options
        self.parts: dict[str, mx.array] = {}

    def part(self, name: str) -> mx.array:
        if name not in self.parts:
            made = mx.quantize(mx.array(self.tensor.numpy()).astype(self.dtype), **self.options)
            mx.eval(*made)
            self.parts = dict(zip(PARTS, made, strict=False))  # formats of floats have no biases
            self.tensor.drop_pages()
        return self.parts[name]


class QuantizedTensor(Tensor):
    """One part, `name`'s last word, of a weight that is quantised when it is read. like: an array of its shape and dtype."""

    def __init__(self, name: str, like: mx.array, made: _Quantised):
        super().__init__(name, tuple(like.shape), str(like.dtype).removeprefix("mlx.core."))
        self._made = made
        self._part = name.rpartition(".")[2]
        self._bytes: np.ndarray | None = None

    def array(self) -> mx.array:
        return self._made.part(self._part)

    def address(self) -> int:
        if self._bytes is None:
            self._bytes = np.array(mx.contiguous(self.array()).view(mx.uint8), copy=False)
        return int(self._bytes.ctypes.data)

    def numpy(self) -> np.ndarray:
        array = self.array()
        return np.array(array.astype(mx.float32) if mx.issubdtype(array.dtype, mx.floating) else array)

    def drop_pages(self) -> None:
        self._bytes = None
        self._made.parts.pop(self._part, None)
