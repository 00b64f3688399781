"""Checkpoints of every format on the Metal device (simulated off Apple), compared with MLX in float32."""
import checkpoint_files
import mlx.core as mx
import numpy as np
import pytest
from metal_models import ALL, DEVICE, RANGE, build, load, within
from steps import reference
from tiny import write_model, write_tokenizer

import metalstep
from metalstep import CaptureError, Request
from metalstep.kernels.native import NativeDevice
from metalstep.plan.gpu_weights import GpuWeightStore


def mixed(path):
    """As mlx-lm's mixed recipes, and harsher: another width beside each other in one launch, and a dense layer."""
    widths = {"": (4, 32), "v_proj": (6, 32), "down_proj": (8, 64), "up_proj": (3, 32), "embed_tokens": (8, 128), "lm_head": (6, 64)}
    return None if "o_proj" in path else widths.get(path.rsplit(".", 1)[-1], widths[""])


FORMATS = {
    "2 bits": ("llama", mx.float32, lambda _: (2, 32), {}),
    "3 bits": ("qwen3", mx.bfloat16, lambda _: (3, 64), {}),
    "4 bits": ("llama_untied", mx.float16, lambda _: (4, 128), dict(head_dim=32)),
    "5 bits": ("qwen2", mx.bfloat16, lambda _: (5, 32), {}),
    "6 bits": ("llama", mx.float16, lambda _: (6, 64), {}),
    "8 bits": ("qwen3", mx.float32, lambda _: (8, 128), dict(head_dim=32)),
    "mixed": ("qwen3", mx.bfloat16, mixed, {}),
    "mixed, untied": ("llama_untied", mx.float16, mixed, {}),
    "dense": ("qwen3", mx.bfloat16, None, {}),
    "dense of odd sizes": (
        "llama_untied",
        mx.float16,
        None,
        dict(hidden_size=39, intermediate_size=51, num_attention_heads=3, num_key_value_heads=3, head_dim=24, vocab_size=97),
    ),
    "seven heads to one": ("qwen2", mx.float32, None, dict(hidden_size=112, num_attention_heads=7, num_key_value_heads=1, head_dim=40)),
}


@pytest.mark.parametrize("name", FORMATS)
def test_checkpoints_of_every_format_give_mlx_s_logits(tmp_path, name):
    family, dtype, bits, config = FORMATS[name]
    config = {"num_hidden_layers": 1, "hidden_size": 128, "intermediate_size": 256, **config}
    model, config, quantization = build(family, dtype, bits, **config)
    text = [token % config["vocab_size"] for token in ALL[:23]]
    with load(write_model(tmp_path, model, config, quantization)) as native:
        model.set_dtype(mx.float32)
        assert within(native.engine.logits(text), reference(model, text)) < RANGE
        (stream,) = [native.engine.submit(Request(text, max_tokens=4, decode_steps=2))]
        tokens = [output.token for output in stream]
        for token, row in zip(tokens, reference(model, text + tokens)[len(text) - 1 :], strict=False):
            assert row.max() - row[token] < RANGE * np.ptp(row)


GGUF = {
    "q4_0": ("llama", checkpoint_files.Q4_0, checkpoint_files.F16, False),
    "q4_1": ("llama", checkpoint_files.Q4_1, checkpoint_files.Q8_0, True),
    "q8_0": ("qwen3", checkpoint_files.Q8_0, checkpoint_files.Q4_0, False),
    "f16": ("qwen2", checkpoint_files.F16, checkpoint_files.Q8_0, True),
}


@pytest.mark.parametrize("name", GGUF)
def test_gguf_files_give_mlx_s_logits(tmp_path, name):
    arch, kind, head, tied = GGUF[name]
    tensors = checkpoint_files.llama_tensors(kind, head, arch=arch, tied=tied)
    (tmp_path / "m.gguf").write_bytes(checkpoint_files.gguf(checkpoint_files.llama_metadata(arch), tensors))
    eager, _ = metalstep.load(tmp_path / "m.gguf", device="eager")
    text = [3 + token for token in ALL[:23]]
    with load(tmp_path / "m.gguf") as native:
        # Weights are random blocks, some hundred times as large as a model's: rounding grows with them.
        assert within(native.engine.logits(text), reference(eager.eager, text)) < 5 * RANGE


def test_a_model_whose_sizes_no_kernel_takes_runs_eagerly(tmp_path):
    model, config, _ = build("llama", hidden_size=40, num_attention_heads=2, num_key_value_heads=1, head_dim=20, num_hidden_layers=1)
    directory = write_model(tmp_path, model, config)
    for device in (DEVICE, "host"):
        with pytest.raises(CaptureError, match=r"head_dim.*load it without strict=True"):
            load(directory, device)
        with pytest.warns(RuntimeWarning, match="llama has no native step yet: .*head_dim"):
            eager = load(directory, device, strict=False)
        np.testing.assert_array_equal(np.array(eager(mx.array([ALL[:5]]))), np.array(model(mx.array([ALL[:5]]))))


def test_weights_take_little_more_memory_than_the_file(tmp_path):
    """Most files are not aligned, so weights are copied; they are packed close."""
    model, config, _ = build("llama", mx.float16, hidden_size=1024, intermediate_size=9216, num_hidden_layers=1)
    directory = write_model(tmp_path, model, config)
    made, create = [], NativeDevice.create_buffer

    class Counting(GpuWeightStore):
        def _pack(self, *args):
            with pytest.MonkeyPatch.context() as patch:
                made_in = lambda device, nbytes, **how: made.append(nbytes) or create(device, nbytes, **how)  # noqa: E731
                patch.setattr(NativeDevice, "create_buffer", made_in)
                return super()._pack(*args)

        def _mapped(self, *args):
            return None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("metalstep.plan.gpu_target.GpuWeightStore", Counting)
        load(directory).close()
    assert sum(made) < 1.02 * (directory / "model.safetensors").stat().st_size


def test_weights_in_several_files_are_one_model(tmp_path):
    model, config, quantization = build("qwen3", mx.bfloat16, lambda _: (4, 32))
    config["quantization"] = quantization
    checkpoint_files.save_model(tmp_path, config, checkpoint_files.parameters(model), shards=3)
    write_tokenizer(tmp_path, config["vocab_size"])
    with load(tmp_path) as native:
        model.set_dtype(mx.float32)
        assert within(native.engine.logits(ALL[:23]), reference(model, ALL[:23])) < RANGE
