"""Quantising on load and `metalstep convert`: the same bits by both ways, and those of mlx-lm's own converter."""
import json

import mlx.core as mx
import numpy as np
import pytest
from checkpoint_files import F16, gguf
from mlx.utils import tree_flatten, tree_map
from mlx_lm import convert as mlx_lm_convert
from mlx_lm.models import llama
from tiny import write_model

import metalstep
from metalstep.checkpoint import CheckpointError, build_model, open_checkpoint
from metalstep.checkpoint.quantized import Quantization, parse_quantize
from metalstep.convert import convert

CONFIG = dict(
    model_type="llama", hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    head_dim=32, vocab_size=320, rms_norm_eps=1e-5, tie_word_embeddings=False,
)  # fmt: skip
IDS = mx.array([[1, 5, 9, 200, 17, 3]])


@pytest.fixture(scope="module")
def floats(tmp_path_factory):
    """Directories of one random model by the dtype of its weights; the config says bfloat16 of all."""
    made = {}
    for dtype in ("bfloat16", "float32"):
        mx.random.seed(3)
        model = llama.Model(llama.ModelArgs.from_dict(CONFIG))
        model.update(tree_map(lambda a: (mx.random.normal(a.shape) * 0.1).astype(getattr(mx, dtype)), model.parameters()))  # noqa: B023
        made[dtype] = write_model(tmp_path_factory.mktemp("floats") / dtype, model, {**CONFIG, "torch_dtype": "bfloat16"})
    return made


def logits(source, **options):
    with metalstep.load(source, **options)[0] as model:
        return np.array(model(IDS))


def parameters(source, quantize=None):
    with open_checkpoint(source, quantize=quantize) as checkpoint:
        build_model(checkpoint)
        return {name: (tensor.dtype, tensor.numpy()) for name, tensor in checkpoint.tensors.items()}


@pytest.mark.parametrize("stored", ["bfloat16", "float32"])
@pytest.mark.parametrize("kind", ["4bit", "8bit:32", "2bit:128", "mixed_3_6", "mxfp4", "nvfp4", "mxfp8"])
def test_a_load_has_the_bits_of_mlx_lms_converter(floats, tmp_path, kind, stored):
    wanted = parse_quantize(kind)
    mlx_lm_convert(
        str(floats[stored]), str(tmp_path / "theirs"), quantize=True, q_group_size=wanted.group_size, q_mode=wanted.mode,
        q_bits=None if wanted.recipe else wanted.bits, quant_predicate=wanted.recipe,
    )  # fmt: skip
    ours, theirs = parameters(floats[stored], kind), parameters(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    for name, (dtype, values) in theirs.items():
        assert ours[name][0] == dtype, name
        np.testing.assert_array_equal(ours[name][1], values, err_msg=name)
    assert any(values.dtype == np.uint32 for _, values in ours.values())


@pytest.mark.parametrize("device", ["host", "eager"])
@pytest.mark.parametrize("kind", ["4bit", "mixed_4_6", "6bit:32"])
def test_a_load_computes_what_the_converted_model_does(floats, tmp_path, kind, device):
    done = convert(floats["bfloat16"], tmp_path / "converted", quantization=parse_quantize(kind))
    assert done.quantization["bits"] == parse_quantize(kind).bits
    expected = logits(done.path, device=device)
    np.testing.assert_array_equal(logits(floats["bfloat16"], device=device, quantize=kind), expected)
    assert np.abs(expected - logits(floats["bfloat16"], device=device)).max() > 1e-3, "nothing was quantised"


def test_a_file_of_floats_is_quantised_too(tmp_path, gguf_of):
    expected = logits(convert(gguf_of, tmp_path / "mlx", quantization=parse_quantize("8bit:32")).path)
    np.testing.assert_array_equal(logits(gguf_of, quantize="8bit:32"), expected)


def test_a_gguf_file_becomes_a_directory(tmp_path, gguf_of):
    done = convert(gguf_of, tmp_path / "mlx")
    np.testing.assert_array_equal(logits(done.path, device="eager"), logits(gguf_of, device="eager"))
    assert sorted(file.name for file in done.path.iterdir() if file.suffix == ".py") == []
    assert (done.path / "tokenizer.json").is_file() and done.quantization is None
    again = convert(done.path, tmp_path / "again", dtype="float32")
    assert {tensor[0] for tensor in parameters(again.path).values()} == {"float32"}


@pytest.fixture(scope="module")
def gguf_of(tmp_path_factory):
    """A llama of float16 matrices as a GGUF file, with Python code beside it that is not the model's."""
    rng = np.random.default_rng(5)
    h, m, v = CONFIG["hidden_size"], CONFIG["intermediate_size"], 320
    kv = CONFIG["num_key_value_heads"] * CONFIG["head_dim"]
    shapes = {"token_embd": (v, h), "output": (v, h)}
    for i in range(2):
        own = {"attn_q": (h, h), "attn_k": (kv, h), "attn_v": (kv, h), "attn_output": (h, h)}
        own |= {"ffn_gate": (m, h), "ffn_up": (m, h), "ffn_down": (h, m)}
        shapes |= {f"blk.{i}.{name}": shape for name, shape in own.items()}
    tensors = [
        (f"{name}.weight", shape, F16, (rng.standard_normal(shape) * 0.1).astype(np.float16).tobytes()) for name, shape in shapes.items()
    ]
    norms = ["output_norm", *(f"blk.{i}.{part}" for i in range(2) for part in ("attn_norm", "ffn_norm"))]
    tensors += [(f"{name}.weight", (h,), F16, np.ones(h, np.float16).tobytes()) for name in norms]
    metadata = {
        "general.architecture": "llama", "llama.block_count": 2, "llama.embedding_length": h, "llama.feed_forward_length": m,
        "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2, "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.context_length": 128, "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [chr(256 + i) for i in range(v)], "tokenizer.ggml.merges": [f"{chr(256)} {chr(257)}"],
        "tokenizer.ggml.eos_token_id": 0,
    }  # fmt: skip
    metadata["tokenizer.ggml.tokens"][319] = chr(256) + chr(257)
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    path.write_bytes(gguf(metadata, tensors))
    (path.parent / "setup.py").write_text("")
    return path


def test_dequantising_gives_the_values_of_the_quantised_weights(floats, tmp_path):
    small = convert(floats["bfloat16"], tmp_path / "small", quantization=parse_quantize("4bit"))
    back = convert(small.path, tmp_path / "back", dequantize=True, dtype="float32")
    assert back.quantization is None and "quantization" not in json.loads((back.path / "config.json").read_text())
    given = parameters(small.path)
    name = "model.layers.1.mlp.up_proj"
    parts = [mx.array(given[f"{name}.{part}"][1]) for part in ("weight", "scales", "biases")]
    np.testing.assert_array_equal(parameters(back.path)[f"{name}.weight"][1], np.array(mx.dequantize(*parts, group_size=64, bits=4)))


def test_memory_stays_at_one_weight(floats):
    """What was made of a weight goes when it is dropped, and comes back when it is asked for again."""
    with open_checkpoint(floats["bfloat16"], quantize="4bit") as checkpoint:
        build_model(checkpoint)
        tensors = [checkpoint.tensors[f"lm_head.{part}"] for part in ("weight", "scales", "biases")]
        values = [tensor.numpy() for tensor in tensors]
        for tensor in tensors:
            tensor.address()
            tensor.drop_pages()
        assert not tensors[0]._made.parts
        for tensor, value in zip(tensors, values, strict=True):
            np.testing.assert_array_equal(tensor.numpy(), value)


@pytest.mark.parametrize("kind", ["4", "7bit", "4bit:48", "4bit:", "q4_0", "", "mixed_5_6", 4, "4bit\n", ["4bit"], "4bit:" + "9" * 5000])
def test_unknown_kinds_are_refused_with_the_list(kind, tmp_path):
    with pytest.raises(ValueError, match=r"quantize is .*expected one of 2bit, .*mxfp4, .*mixed_4_6"):
        metalstep.load(tmp_path / "nothing", quantize=kind)


def test_what_is_quantised_is_not_quantised_again(floats, tmp_path):
    small = convert(floats["bfloat16"], tmp_path / "small", quantization=parse_quantize("8bit"))
    with pytest.raises(CheckpointError, match="quantised already to 8 bits"):
        metalstep.load(small.path, quantize="4bit")
    with pytest.raises(ValueError, match="quantised already"):
        convert(small.path, tmp_path / "smaller", quantization=Quantization("affine", 4, 64))
    with pytest.raises(ValueError, match="is not quantised"):
        convert(floats["bfloat16"], tmp_path / "other", dequantize=True)
    with pytest.raises(ValueError, match="exists already"):
        convert(floats["bfloat16"], small.path)


def test_nothing_is_left_of_a_conversion_that_fails(floats, tmp_path, monkeypatch):
    def full(*_, **__):
        raise RuntimeError("[write] Unable to write 512 bytes to file.")

    monkeypatch.setattr(mx, "save_safetensors", full)
    with pytest.raises(OSError, match=r"cannot be written .*GB free"):
        convert(floats["bfloat16"], tmp_path / "out", quantization=parse_quantize("4bit"))
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(OSError, match="make room"):
        convert(floats["bfloat16"], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_for_another_kind_of_model_is_refused(tmp_path):
    from mlx_lm.models import gpt2

    config = dict(model_type="gpt2", n_ctx=64, n_embd=64, n_head=2, n_layer=2, n_positions=64, layer_norm_epsilon=1e-5, vocab_size=128)
    model = gpt2.Model(gpt2.ModelArgs.from_dict(config))
    assert tree_flatten(model.parameters())
    source = write_model(tmp_path / "gpt2", model, config)
    with pytest.raises(CheckpointError, match=r"cannot be quantised .*expected keys"):
        metalstep.load(source, quantize="mixed_4_6", device="eager")
