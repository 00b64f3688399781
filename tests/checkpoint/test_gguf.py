"""GGUF checkpoints: every type against MLX's own reader, the architectures against mlx-lm, and what is refused."""
import mlx.core as mx
import numpy as np
import pytest
from checkpoint_files import (
    BF16,
    BLOCK_BYTES,
    F16,
    F32,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    KV_HEADS,
    Q4_0,
    Q4_1,
    Q4_K,
    Q6_K,
    Q8_0,
    gguf,
    llama_gguf,
    llama_metadata,
    llama_tensors,
    parameters,
    tensor,
)

from metalstep.checkpoint import CheckpointError, build_model, load_weights_eager, open_checkpoint
from metalstep.checkpoint.gguf.rope import llama3_factors

KINDS = {F32: "float32", F16: "float16", BF16: "bfloat16", Q4_0: "q4_0", Q4_1: "q4_1", Q8_0: "q8_0"}


def write(tmp_path, data, name="model.gguf"):
    path = tmp_path / name
    path.write_bytes(data)
    return path


def unpermuted(array, heads):
    """Rows of q or k as Hugging Face orders them, written as llama.cpp's own reader does it."""
    halves = np.asarray(array).reshape(heads, array.shape[0] // heads // 2, 2, *array.shape[1:])
    return halves.swapaxes(1, 2).reshape(array.shape)


@pytest.mark.parametrize("kind", KINDS, ids=KINDS.values())
def test_values_are_those_of_mlx_reader(tmp_path, kind):
    """mx.load gives blocks as affine triplets: words and scales agree bit for bit, biases up to its float16."""
    path = write(tmp_path, gguf(llama_metadata(), llama_tensors(kind, kind)))
    with open_checkpoint(path) as checkpoint:
        if kind == BF16:  # which mx.load reads as float16
            ours = checkpoint.tensors["model.embed_tokens.weight"].numpy()
            stored = np.frombuffer(llama_tensors(kind, kind)[0][3], np.uint16).astype(np.uint32) << 16
            np.testing.assert_array_equal(ours, stored.view(np.float32).reshape(ours.shape))
            return
        loaded = mx.load(str(path))
        for part in ("weight", "scales", "biases") if kind in BLOCK_BYTES else ("weight",):
            for name, parameter, heads in (
                ("token_embd", "model.embed_tokens", None),
                ("blk.1.ffn_down", "model.layers.1.mlp.down_proj", None),
                ("blk.0.attn_q", "model.layers.0.self_attn.q_proj", HEADS),
                ("blk.1.attn_k", "model.layers.1.self_attn.k_proj", KV_HEADS),
            ):
                theirs = np.array(loaded[f"{name}.{part}"])
                theirs = theirs if heads is None else unpermuted(theirs, heads)
                ours = checkpoint.tensors[f"{parameter}.{part}"].numpy()
                assert ours.dtype == (np.uint32 if theirs.dtype == np.uint32 else np.float32)
                np.testing.assert_array_equal(ours.astype(theirs.dtype), theirs)


@pytest.mark.parametrize("format", ["q4_0", "q4_1", "q8_0"])
def test_blocks_mean_what_ggml_says(tmp_path, format):
    """Dequantised through MLX's triplet, a weight is d * (q - zero) or d * q + m, elements i and i + 16 sharing a byte."""
    kind = {name: kind for kind, name in KINDS.items()}[format]
    tensors = llama_tensors(kind, kind)
    raw = np.frombuffer(tensors[0][3], np.uint8).reshape(-1, BLOCK_BYTES[kind])
    d = raw[:, :2].copy().view(np.float16).astype(np.float32)
    if format == "q8_0":
        expected = d * raw[:, 2:].view(np.int8)
    else:
        quants = raw[:, 4 if format == "q4_1" else 2 :]
        quants = np.concatenate([quants & 15, quants >> 4], axis=1).astype(np.float32)
        expected = d * quants + raw[:, 2:4].copy().view(np.float16).astype(np.float32) if format == "q4_1" else d * (quants - 8)
    with open_checkpoint(write(tmp_path, gguf(llama_metadata(), tensors))) as checkpoint:
        parts = [mx.array(checkpoint.tensors[f"model.embed_tokens.{part}"].numpy()) for part in ("weight", "scales", "biases")]
        bits = 8 if format == "q8_0" else 4
        ours = np.array(mx.dequantize(*parts, group_size=32, bits=bits))
        # mx.dequantize multiplies and adds with one rounding more or less than numpy does.
        np.testing.assert_allclose(ours.reshape(expected.shape), expected, rtol=1e-6, atol=1e-6)
        tensor = checkpoint.tensors["model.embed_tokens.weight"]
        assert (tensor.format, tensor.shape, tensor.dtype) == (format, (tensors[0][1]), "float16")
        assert tensor.parameter_shape == (tensors[0][1][0], HIDDEN * bits // 32)


def test_row_order_says_where_a_row_is_stored(tmp_path):
    with open_checkpoint(write(tmp_path, gguf(llama_metadata(), llama_tensors(F32)))) as checkpoint:
        for name, heads in (("q_proj", HEADS), ("k_proj", KV_HEADS)):
            weight = checkpoint.tensors[f"model.layers.0.self_attn.{name}.weight"]
            assert weight.row_order.dtype == np.int32
            np.testing.assert_array_equal(weight.row_order, unpermuted(np.arange(heads * HEAD_DIM), heads))
            stored = np.ctypeslib.as_array((np.ctypeslib.ctypes.c_float * (heads * HEAD_DIM * HIDDEN)).from_address(weight.address()))
            np.testing.assert_array_equal(stored.reshape(-1, HIDDEN)[weight.row_order], weight.numpy())
        assert checkpoint.tensors["model.layers.0.self_attn.v_proj.weight"].row_order is None


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_architectures_make_a_model_that_runs(tmp_path, arch, tied):
    metadata = llama_metadata(arch, **({"qwen3__attention__key_length": HEAD_DIM} if arch == "qwen3" else {}))
    path = write(tmp_path, gguf(metadata, llama_tensors(arch=arch, tied=tied)))
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.config["model_type"] == arch
        assert checkpoint.config["tie_word_embeddings"] is tied
        assert checkpoint.file_bytes == path.stat().st_size
        model = build_model(checkpoint)
        assert type(model.layers[0].mlp.up_proj).__name__ == "QuantizedLinear"
        assert model.model.embed_tokens.bits == 8 and model.layers[0].mlp.up_proj.bits == 4
        assert parameters(model).keys() == checkpoint.tensors.keys()
        load_weights_eager(model, checkpoint, mx.float32)
        for name, array in parameters(model).items():
            np.testing.assert_array_equal(np.array(array), checkpoint.tensors[name].numpy())
        assert np.isfinite(np.array(model(mx.array([[1, 5, 9]])))).all()
        load_weights_eager(model, checkpoint)
        assert model.model.norm.weight.dtype == mx.float16


def test_interleaved_rows_give_the_attention_of_traditional_rope(tmp_path):
    """llama.cpp's rows under interleaved RoPE are our rows under split RoPE, so logits agree up to the order of summation."""
    tensors = llama_tensors(F32, F32)
    with open_checkpoint(write(tmp_path, gguf(llama_metadata(), tensors))) as checkpoint:
        model = build_model(checkpoint)
        load_weights_eager(model, checkpoint)
        ids = mx.array([[3, 60, 100, 7, 250]])
        ours = np.array(model(ids))
        checkpoint.config["rope_traditional"] = True
        traditional = build_model(checkpoint)
        load_weights_eager(traditional, checkpoint)
        stored = {name: (shape, data) for name, shape, _, data in tensors}
        for layer, block in enumerate(traditional.layers):
            for part in ("q", "k"):
                shape, data = stored[f"blk.{layer}.attn_{part}.weight"]
                block.self_attn[f"{part}_proj"].weight = mx.array(np.frombuffer(data, np.float32).reshape(shape))
        np.testing.assert_allclose(np.array(traditional(ids)), ours, rtol=1e-4, atol=1e-5)


def test_llama3_factors_become_rope_scaling(tmp_path):
    factors = llama3_factors(10000.0, HEAD_DIM, 32.0)
    rope = [("rope_freqs.weight", factors.shape, F32, factors.tobytes())]
    with open_checkpoint(write(tmp_path, gguf(llama_metadata(), llama_tensors() + rope))) as checkpoint:
        assert checkpoint.config["rope_scaling"]["rope_type"] == "llama3"
        assert checkpoint.config["rope_scaling"]["factor"] == 32.0
        model = build_model(checkpoint)
        expected = 10000.0 ** (np.arange(0, HEAD_DIM, 2) / HEAD_DIM) * factors
        np.testing.assert_allclose(np.array(model.layers[0].self_attn.rope._freqs), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("linear", {"rope_type": "linear", "factor": 4.0}),
        ("yarn", {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}),
        ("none", None),
    ],
)
def test_rope_scaling_of_the_metadata_is_kept(tmp_path, kind, expected):
    scaling = {"type": kind, "factor": 4.0, "original_context_length": 32}
    metadata = llama_metadata(**{f"llama__rope__scaling__{key}": item for key, item in scaling.items()})
    with open_checkpoint(write(tmp_path, gguf(metadata, llama_tensors()))) as checkpoint:
        assert checkpoint.config["rope_scaling"] == expected
        build_model(checkpoint)


def test_misaligned_tensors_are_read(tmp_path):
    tensors = llama_tensors()
    shifted = {name: sum(len(data) for *_, data in tensors[:index]) + 1 for index, (name, *_) in enumerate(tensors)}
    packed = b"\0" + b"".join(data for *_, data in tensors)
    head = gguf(llama_metadata(), [(name, shape, kind, b"") for name, shape, kind, _ in tensors], offsets=shifted)
    with open_checkpoint(write(tmp_path, head + packed)) as odd, open_checkpoint(write(tmp_path, llama_gguf(), "b.gguf")) as even:
        assert odd.tensors["model.norm.weight"].address() % 4
        for name, weight in even.tensors.items():
            np.testing.assert_array_equal(odd.tensors[name].numpy(), weight.numpy())
            odd.tensors[name].drop_pages()


def test_scales_inside_blocks_have_no_address(tmp_path):
    with open_checkpoint(write(tmp_path, llama_gguf())) as checkpoint:
        scales = checkpoint.tensors["model.embed_tokens.scales"]
        assert scales.shape == scales.numpy().shape == (checkpoint.config["vocab_size"], HIDDEN // 32)
        with pytest.raises(CheckpointError, match=r"inside the blocks of model\.embed_tokens\.weight .*use that tensor's, or numpy"):
            scales.address()


def test_a_closed_checkpoint_refuses_to_be_read(tmp_path):
    checkpoint = open_checkpoint(write(tmp_path, llama_gguf()))
    weight = checkpoint.tensors["model.norm.weight"]
    checkpoint.close()
    checkpoint.close()
    for read in (weight.address, weight.numpy, weight.drop_pages):
        with pytest.raises(CheckpointError, match="closed; open it again"):
            read()


def without(name):
    return [entry for entry in llama_tensors() if entry[0] != name]


def reshaped(name, shape):
    rng = np.random.default_rng(0)
    return [tensor(rng, name, shape, entry[2]) if entry[0] == name else entry for entry in llama_tensors()]


@pytest.mark.parametrize(
    ("metadata", "tensors", "text"),
    [
        (llama_metadata("bert"), llama_tensors(), "architecture 'bert' is not supported from GGUF, expected one of llama"),
        (llama_metadata(general__architecture=None), llama_tensors(), "no general.architecture"),
        (llama_metadata(general__architecture=3), llama_tensors(), "general.architecture is a int, expected a string"),
        (llama_metadata(llama__block_count=None), llama_tensors(), "no llama.block_count"),
        (llama_metadata(llama__block_count=1 << 30), llama_tensors(), "block_count is 1073741824, but the file has"),
        (llama_metadata(llama__block_count=3), llama_tensors(), "the model needs model.layers.2.* and [0-9]+ more, missing"),
        (llama_metadata(llama__block_count=1), llama_tensors(), "the model has no place for model.layers.1.* and [0-9]+ more"),
        (llama_metadata(llama__attention__head_count=[4, 4]), llama_tensors(), "values per layer are not supported"),
        (llama_metadata(llama__attention__head_count=0), llama_tensors(), "expected a positive"),
        (llama_metadata(llama__attention__head_count=8), llama_tensors(), "attn_q|attn_k.* rows, expected"),
        (llama_metadata(llama__attention__head_count=3), llama_tensors(), "does not divide into 3 heads"),
        (llama_metadata(llama__rope__dimension_count=8), llama_tensors(), "rope.dimension_count is 8, expected the head size 16"),
        (llama_metadata(llama__rope__scaling__type="longrope"), llama_tensors(), "'longrope', expected none, linear or yarn"),
        (llama_metadata(llama__rope__freq_base=float("nan")), llama_tensors(), "freq_base is nan, expected a finite number"),
        (llama_metadata(llama__feed_forward_length=128), llama_tensors(), "has shape .*, expected .* from the config"),
        (llama_metadata(llama__expert_count=8), llama_tensors(), "no llama.expert_used_count"),
        (llama_metadata(split__count=2), llama_tensors(), "llama-gguf-split --merge"),
        (llama_metadata(split__count=[1, 1]), llama_tensors(), "split.count is a ndarray, expected an integer"),
        (llama_metadata(), without("token_embd.weight"), "token_embd.weight is missing"),
        (llama_metadata(), without("blk.1.ffn_up.weight"), "the model needs model.layers.1.mlp.up_proj.weight, missing"),
        (llama_metadata(), reshaped("blk.0.ffn_up.weight", (96, 32)), "up_proj.weight has shape"),
        (llama_metadata(), [*llama_tensors(), ("blk.0.x.weight", (1,), F32, bytes(4))], "a llama model has no place for blk.0.x.weight"),
        (llama_metadata(), [*llama_tensors(), ("rope_freqs.weight", (8,), F32, bytes(32))], "other factors than Llama 3's"),
        (llama_metadata(), [("a", (64, 256), 19, bytes(9216)), *llama_tensors()], "'a' has type IQ1_S, expected .*llama-quantize"),
        (llama_metadata(), [("a", (64, 256), 34, bytes(9216)), *llama_tensors()], "'a' has type TQ1_0, expected one of F32"),
        (llama_metadata(), [("a", (64, 256), 40, bytes(9216)), *llama_tensors()], "'a' has type NVFP4, expected one of F32"),
        (llama_metadata(), [("a", (64, 256), 99, bytes(9216)), *llama_tensors()], "'a' has type 99, expected one of F32"),
        (llama_metadata(), [("a", (2, 33), Q8_0, bytes(70)), *llama_tensors()], "rows of a multiple of 32"),
        (llama_metadata(), [("a", (2, 128), Q4_K, bytes(144)), *llama_tensors()], "is Q4_K with .* rows of a multiple of 256"),
        (llama_metadata(), [("a", (2, 288), Q6_K, bytes(480)), *llama_tensors()], "is Q6_K with .* rows of a multiple of 256"),
        (llama_metadata(), [*llama_tensors(), ("z", (2, 256), Q4_K, bytes(256))], "tensor 'z' ends at byte"),
        (llama_metadata(), [("a", (0, 32), Q8_0, b""), *llama_tensors()], "expected positive 31-bit sizes"),
        (llama_metadata(), [("a", (1 << 40, 1 << 40), F32, b""), *llama_tensors()], "expected positive 31-bit sizes"),
        (llama_metadata(), [("a", (1,) * 5, F32, bytes(4)), *llama_tensors()], "has 5 dimensions, expected at most 4"),
        (llama_metadata(), [*llama_tensors(), llama_tensors()[0]], "tensor 'token_embd.weight' appears twice"),
        ([*llama_metadata().items(), ("general.architecture", "llama")], llama_tensors(), "'general.architecture' appears twice"),
    ],
)
def test_models_that_do_not_fit_are_refused(tmp_path, metadata, tensors, text):
    with pytest.raises(CheckpointError, match=text), open_checkpoint(write(tmp_path, gguf(metadata, tensors))) as checkpoint:
        build_model(checkpoint)
