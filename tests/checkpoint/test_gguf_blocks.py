"""GGUF's block formats as affine groups of 32: the exact ones against gguf-py bit for bit, the converted ones by how far off they are."""
import gguf as gguf_py
import mlx.core as mx
import numpy as np
import pytest
from checkpoint_files import Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, gguf, llama_metadata
from hypothesis import given, settings
from hypothesis import strategies as st

import metalstep
from metalstep.checkpoint import blocks, open_checkpoint

EXACT = [name for name, spec in blocks.FORMATS.items() if spec.exact]
CONVERTED = [name for name, spec in blocks.FORMATS.items() if not spec.exact]
HALVES = {  # where a block has float16 numbers
    **{"q4_0": [0], "q4_1": [0, 2], "q5_0": [0], "q5_1": [0, 2], "q8_0": [0], "iq4_nl": [0], "mxfp4": []},
    **{"q2_k": [80, 82], "q3_k": [108], "q4_k": [0, 2], "q5_k": [0, 2], "q6_k": [208], "iq4_xs": [0]},
}
QUANTS = {"q2_k": slice(16, 80), "q3_k": slice(0, 96), "q6_k": slice(0, 192)}  # bytes of a block that are quants alone
FINITE = np.flatnonzero(np.isfinite(np.arange(1 << 16, dtype=np.uint16).view(np.float16))).astype(np.uint16)


def random_blocks(rng, format, rows, width, halves=FINITE):
    """uint8 [rows, blocks, nbytes]: every byte random, float16 numbers out of `halves`."""
    spec = blocks.FORMATS[format]
    raw = rng.integers(0, 256, (rows, width // spec.size, spec.nbytes), dtype=np.uint8)
    for at in HALVES[format]:
        raw[..., at : at + 2] = rng.choice(halves, raw.shape[:2])[..., None].view(np.uint8)
    if format == "mxfp4":
        raw[..., 0] = rng.integers(0, 252, raw.shape[:2])  # 12 * 2^(e - 128) overflows float32 from 252 on
    return raw


def values(parts, bits):
    """What MLX's triplet means in float32: the words read bit by bit."""
    rows = len(parts.words)
    stream = np.unpackbits(parts.words.view(np.uint8).reshape(rows, -1), axis=1, bitorder="little")
    quants = (stream.reshape(rows, -1, bits) << np.arange(bits)).sum(-1).astype(np.float32).reshape(rows, -1, 32)
    scales, biases = (plane.astype(np.float32)[..., None] for plane in (parts.scales, parts.biases))
    return (scales * quants + biases).reshape(rows, -1)


def gguf_values(raw, format):
    return gguf_py.dequantize(raw.reshape(len(raw), -1), gguf_py.GGMLQuantizationType[format.upper()])


@pytest.mark.parametrize("format", EXACT)
@settings(max_examples=12)
@given(seed=st.integers(0, 1 << 32), rows=st.integers(1, 40), width=st.sampled_from([256, 768, 2048]))
def test_exact_formats_keep_every_value_of_every_block(format, seed, rows, width):
    raw = random_blocks(np.random.default_rng(seed), format, rows, width)
    np.testing.assert_array_equal(values(blocks.affine(raw, format), blocks.FORMATS[format].bits), gguf_values(raw, format))


@pytest.mark.parametrize("format", EXACT)
def test_exact_formats_keep_values_of_every_scale(format):
    """All finite float16 scales (all of mxfp4's exponents), each with random quants; many chunks of rows."""
    rng = np.random.default_rng(0)
    raw = random_blocks(rng, format, 4096, 256 if blocks.FORMATS[format].size == 256 else 512)
    flat = raw.reshape(-1, raw.shape[-1])
    for at in HALVES[format]:
        flat[:, at : at + 2] = rng.permutation(np.resize(FINITE, len(flat)))[:, None].view(np.uint8)
    if format == "mxfp4":
        flat[:, 0] = np.resize(np.arange(252), len(flat))
    np.testing.assert_array_equal(values(blocks.affine(raw, format), blocks.FORMATS[format].bits), gguf_values(raw, format))


@pytest.mark.parametrize("format", CONVERTED)
@settings(max_examples=12)
@given(seed=st.integers(0, 1 << 32), rows=st.integers(1, 40), halves=st.sampled_from([(1, 8), (1, 0x800), (0x400, 0x800), (0x2000, 0x800)]))
def test_converted_values_are_off_by_a_rounding_to_a_fine_grid(format, seed, rows, halves):
    """By half a step at most, a row by an eighth more where scales become float16, which tiny ones do not; a step is at most
    √2 / (levels - 1) of the range."""
    rng = np.random.default_rng(seed)
    raw = random_blocks(rng, format, rows, 768, np.arange(halves[0], sum(halves), dtype=np.uint16))
    exact, spec = gguf_values(raw, format), blocks.FORMATS[format]
    parts = blocks.affine(raw, format)
    step = parts.scales.astype(np.float32)
    groups = exact.reshape(rows, -1, 32)
    error = np.abs(values(parts, spec.bits).reshape(groups.shape) - groups).max(-1)
    rounding = np.abs(groups).max(-1) * 2**-20
    if parts.scales.dtype == np.float32:
        assert (error <= step / 2 + rounding).all()
    assert (np.sqrt((error**2).mean(-1)) <= (1 / 2 + 1 / 8) * np.sqrt((step**2).mean(-1)) + rounding.max(-1)).all()
    span = np.ptp(groups, axis=-1)
    assert (step <= np.sqrt(2) * span / ((1 << spec.bits) - 2) * (1 + 2**-10) + rounding).all()


@pytest.mark.parametrize("format", CONVERTED)
def test_conversion_adds_little_to_the_formats_own_error(format):
    """Of the squared error of rounding to the format's own steps, with scales that differ as random bytes do, it adds under 7 %."""
    rng = np.random.default_rng(0)
    raw = random_blocks(rng, format, 256, 2048, np.full(1, 0x2800, np.uint16))
    ends = []
    for byte in (0, 255):
        raw_ends = raw.copy()
        raw_ends[..., QUANTS[format]] = byte
        ends.append(gguf_values(raw_ends, format))
    own_step = (ends[1] - ends[0]) / {"q2_k": 3, "q3_k": 7, "q6_k": 63}[format]
    error = values(blocks.affine(raw, format), blocks.FORMATS[format].bits) - gguf_values(raw, format)
    assert np.mean(error**2) < 0.07 * np.mean(own_step**2 / 12)


@pytest.mark.parametrize("format", CONVERTED)
def test_equal_scales_convert_without_a_loss(format):
    """Both halves on one grid: what regrouping costs is what the halves' scales differ by."""
    raw = random_blocks(np.random.default_rng(1), format, 8, 768, np.full(1, 0x3C00, np.uint16))
    scales = {"q2_k": slice(0, 16), "q3_k": slice(96, 108), "q6_k": slice(192, 208)}[format]
    raw[..., scales] = 0x55 if format != "q6_k" else 20
    read = values(blocks.affine(raw, format), blocks.FORMATS[format].bits)
    np.testing.assert_allclose(read, gguf_values(raw, format), rtol=0, atol=0.05)  # of multiples of 5 and more: scales are float16


@pytest.mark.parametrize("format", blocks.FORMATS)
def test_rows_are_independent_and_can_be_chosen(format):
    rng = np.random.default_rng(2)
    raw = random_blocks(rng, format, 300, 512 if blocks.FORMATS[format].size == 256 else 96, np.arange(0x2000, 0x2400, dtype=np.uint16))
    order = rng.permutation(300)[:77].astype(np.int32)
    chosen, alone = blocks.affine(raw, format, order), blocks.affine(raw[order], format)
    np.testing.assert_array_equal(chosen.words, alone.words)
    np.testing.assert_array_equal(chosen.scales, alone.scales)
    np.testing.assert_array_equal(chosen.words, blocks.affine(raw, format).words[order])
    triplet = [mx.array(a) for a in (alone.words, alone.scales.astype(np.float32), alone.biases.astype(np.float32))]
    through_mlx = np.array(mx.dequantize(*triplet, group_size=32, bits=blocks.FORMATS[format].bits))
    np.testing.assert_allclose(through_mlx, values(alone, blocks.FORMATS[format].bits), rtol=1e-5, atol=1e-5)


HIDDEN, HEADS, VOCAB = 256, 4, 262
MIXED = {  # as llama-quantize mixes them in Q4_K_M, with the rarer types beside
    **{"token_embd": Q6_K, "blk.0.attn_q": Q4_K, "blk.0.attn_k": Q5_K, "blk.0.attn_v": Q6_K, "blk.0.attn_output": Q3_K},
    **{"blk.0.ffn_gate": Q4_K, "blk.0.ffn_up": Q2_K, "blk.0.ffn_down": Q5_K, "blk.1.attn_q": 23, "blk.1.attn_k": 20},
    **{"blk.1.attn_v": 39, "blk.1.attn_output": 6, "blk.1.ffn_gate": 7, "blk.1.ffn_up": 8, "blk.1.ffn_down": 2},
}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A file with a type per tensor, and its dequantised matrices by GGUF's name."""
    rng, dense, tensors = np.random.default_rng(3), {}, []
    for name, kind in MIXED.items():
        format = gguf_py.GGMLQuantizationType(kind).name.lower()
        rows = VOCAB if name == "token_embd" else HIDDEN
        raw = random_blocks(rng, format, rows, HIDDEN, np.arange(0x1000, 0x1400, dtype=np.uint16))
        if format == "mxfp4":
            raw[..., 0] = 122
        if format.startswith("q") and not format.endswith("_k"):
            raw[..., HALVES[format][0] : 2] = np.uint16(0x1C00 if format != "q8_0" else 0x0C00).reshape(1).view(np.uint8)
        tensors.append((f"{name}.weight", (rows, HIDDEN), kind, raw.tobytes()))
        dense[name] = gguf_values(raw, format)
    norms = ["output_norm", *(f"blk.{layer}.{part}" for layer in (0, 1) for part in ("attn_norm", "ffn_norm"))]
    tensors += [(f"{name}.weight", (HIDDEN,), 0, rng.uniform(0.5, 1.5, HIDDEN).astype(np.float32).tobytes()) for name in norms]
    sizes = {"embedding_length": HIDDEN, "feed_forward_length": HIDDEN, "attention__head_count": HEADS, "attention__head_count_kv": HEADS}
    path = tmp_path_factory.mktemp("mixed") / "model.gguf"
    path.write_bytes(gguf(llama_metadata(**{f"llama__{key}": value for key, value in sizes.items()}), tensors))
    return path, dense


def test_every_tensor_of_a_mixed_file_has_its_own_bits(mixed):
    path, _ = mixed
    with open_checkpoint(path) as checkpoint:
        quantization = checkpoint.config["quantization"]
        bits = lambda layer: quantization.get(layer, quantization)["bits"]  # noqa: E731
        assert (quantization["group_size"], quantization["mode"]) == (32, "affine")
        assert bits("model.embed_tokens") == 8
        assert [bits(f"model.layers.0.self_attn.{part}_proj") for part in "qkvo"] == [4, 5, 8, 5]
        assert [bits(f"model.layers.0.mlp.{part}_proj") for part in ("gate", "up", "down")] == [4, 5, 5]
        assert [bits(f"model.layers.1.self_attn.{part}_proj") for part in "qkvo"] == [8, 8, 5, 5]
        assert [bits(f"model.layers.1.mlp.{part}_proj") for part in ("gate", "up", "down")] == [5, 8, 4]
        assert checkpoint.config["torch_dtype"] == "float16"
        assert checkpoint.file_bytes == path.stat().st_size


def test_a_mixed_file_runs_natively_and_eagerly_alike(mixed):
    """Eager and native hold the same values. Their distance from the file's own is that of its q2_k, q3_k and q6_k tensors."""
    path, _ = mixed
    ids = mx.array([[3, 60, 100, 7, 250, 11, 12]])
    logits = {}
    for device in ("host", "eager"):
        model, _ = metalstep.load(path, device=device, strict=device == "host", **({"kv_dtype": "float32"} if device == "host" else {}))
        with model:
            logits[device] = np.array(model(ids), np.float32)[0]
    spread = np.ptp(logits["eager"], axis=-1).min()
    assert np.abs(logits["host"] - logits["eager"]).max() <= 2e-4 * spread


def test_weights_of_a_mixed_file_are_gguf_pys(mixed):
    path, dense = mixed
    with open_checkpoint(path) as checkpoint:
        for name, parameter in (("blk.0.ffn_gate", "model.layers.0.mlp.gate_proj"), ("blk.0.ffn_down", "model.layers.0.mlp.down_proj"),
                                ("blk.1.attn_v", "model.layers.1.self_attn.v_proj")):  # fmt: skip
            parts = [checkpoint.tensors[f"{parameter}.{part}"].numpy() for part in ("weight", "scales", "biases")]
            bits = parts[0].shape[1] * 32 // HIDDEN
            np.testing.assert_array_equal(values(blocks.Affine(*parts), bits), dense[name])
