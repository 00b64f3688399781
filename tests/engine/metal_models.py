"""Tiny models in any format for the Metal device (simulated off Apple), and how far their logits may be from MLX's."""
from __future__ import annotations

import importlib
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from families import BASE, FAMILIES, VOCAB
from gpu_device import DEVICE, LOGITS
from mlx.utils import tree_flatten, tree_unflatten

import metalstep

CONTEXT = 1536
RANGE = LOGITS
ALL = tuple((7 * i + i * i % 13) % VOCAB for i in range(CONTEXT))  # a text that does not repeat soon


def build(family, dtype=mx.float32, bits=None, **config):
    """mlx-lm's model of a family, its config and its quantisation. bits: of a layer's path, (bits, group_size), None: dense."""
    config = {"model_type": FAMILIES[family].model_type, **BASE, **FAMILIES[family].config, **config}
    mx.random.seed(0)
    module = importlib.import_module(f"mlx_lm.models.{config['model_type']}")
    model = module.Model(module.ModelArgs.from_dict(config))
    weights = tree_flatten(model.parameters())
    model.update(tree_unflatten([(k, w + 0.3 * mx.random.normal(w.shape) if w.ndim == 1 else w) for k, w in weights]))
    model.set_dtype(dtype)
    quantization = {}
    if bits is not None:
        usual = bits("")
        quantization = {"bits": usual[0], "group_size": usual[1]}

        def quantised(path, layer):
            own = bits(path) if hasattr(layer, "to_quantized") else None
            if own is not None and own != usual:
                quantization[path] = {"bits": own[0], "group_size": own[1]}
            elif own is None and hasattr(layer, "to_quantized"):
                quantization[path] = False
            return own is not None and {"bits": own[0], "group_size": own[1]}

        nn.quantize(model, class_predicate=quantised)
    return model, config, quantization


def load(directory: Path, device: str = DEVICE, **options):
    options = {"kv_dtype": "float32", "kv_memory": "16MB", "max_context": 128, "strict": True, **options}
    return metalstep.load(directory, device=device, **options)[0]


def within(got, want):
    return (np.abs(got - want) / np.ptp(want, axis=-1, keepdims=True)).max()
