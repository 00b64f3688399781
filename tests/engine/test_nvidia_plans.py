"""Plans as they are made for NVIDIA's GPUs, on the tests' GPU (simulated Metal as a rule): float16 rows before linears, planes that the
next norm adds up, against MLX in float32."""
from dataclasses import replace

import numpy as np
import pytest
from families import BASE, FAMILIES, VOCAB, build
from gpu_device import DEVICE
from steps import reference
from tiny import write_model

import metalstep
from metalstep import Request, SamplingParams
from metalstep.kernels.gpu.linear_tables import table
from metalstep.plan.gpu_target import GpuTarget

NAMES = ["llama", "llama_untied", "qwen3", "gemma2", "cohere2", "starcoder2"]
LENGTHS = (41, 19, 6)
TEXTS = [[(7 * i + 13 * j) % VOCAB for j in range(n)] for i, n in enumerate(LENGTHS)]
# Rows of the products, and what attention multiplies, are rounded to float16 (2^-11 of each element): of the logits' root mean square.
ERROR = 3e-3
NEW = 9  # tokens of a generation


def tables():
    """The table as it is; and one that never norms inside of linears and always leaves planes where that is possible."""
    packaged = table("nvidia")
    split = [replace(entry, planes=2) for entry in packaged.entries]
    return {"packaged": packaged, "planes": replace(packaged, entries=split, norm_rows=[(None, 0)])}


@pytest.fixture(scope="module", params=[(name, tuning) for tuning in ("packaged", "planes") for name in NAMES], ids="-".join)
def family(request, tmp_path_factory):
    """(model with plans for NVIDIA's GPUs, mlx-lm's model): 4-bit, cache in float32."""
    name, tuning = request.param
    model = build(name, quantized=True)
    config = {"model_type": FAMILIES[name].model_type, **BASE, **FAMILIES[name].config}
    directory = write_model(tmp_path_factory.mktemp(name), model, config, {"group_size": 32, "bits": 4})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("metalstep.tuning_files.tuning_of", lambda *_: tables()[tuning])
        patch.setattr(GpuTarget, "warm_shapes", lambda *_: [])
        patch.setattr("metalstep.model.make_target", lambda *_, **__: GpuTarget("nvidia", library=False))
        native, _ = metalstep.load(directory, strict=True, device=DEVICE, kv_dtype="float32", kv_memory="16MB", max_context=192)
        with native:
            yield native, model


def error(got, want):
    return np.sqrt(np.mean((got - want) ** 2) / np.mean((want - want.mean(-1, keepdims=True)) ** 2))


def test_logits_of_prompts_are_mlx_s_but_for_rounding(family):
    native, model = family
    for text in TEXTS:
        assert error(native.engine.logits(text), reference(model, text)) <= ERROR


def test_greedy_tokens_are_mlx_s_wherever_two_tokens_are_further_apart_than_rounding(family):
    native, model = family
    streams = [native.engine.submit(Request(text, SamplingParams(), NEW, decode_steps=4)) for text in TEXTS]
    for text, stream in zip(TEXTS, streams, strict=True):
        tokens = [output.token for output in stream]
        assert len(tokens) == NEW
        logits = reference(model, [*text, *tokens])[len(text) - 1 : -1]
        for token, row in zip(tokens, logits, strict=True):
            assert row.max() - row[token] <= 6 * ERROR * row.std()  # two logits, each up to three deviations of the error off
