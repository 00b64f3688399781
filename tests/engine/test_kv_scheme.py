"""Scheme names and options: what each means, and that nothing is guessed."""
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metalstep.kernels.kv_codec import KVCodec
from metalstep.kv_scheme import BOUNDARY, K_QUANT, NAMES, V_QUANT, VLLM_ALIASES, alias, parse

TURBO = [name for name in NAMES if name.startswith("turbo")]


@given(name=st.sampled_from(NAMES))
def test_a_name_says_the_bits_of_keys_and_values(name):
    scheme = parse(name)
    digits = [int(digit) for digit in re.findall(r"\d", name)] or [16]
    bits = {"none": (16, 16), "affine8": (8, 8)}.get(name, (digits[0] or 16, digits[-1]))
    assert (scheme.k.bits, scheme.v.bits) == bits
    assert scheme.compressed == (name != "none")
    assert parse(name, kv_bits=digits[0]) == scheme


@given(name=st.sampled_from(TURBO), layers=st.integers(1, 60), boundary=st.none() | st.integers(0, 6))
def test_boundary_layers_are_affine8_where_bits_are_few_and_layers_many(name, layers, boundary):
    k, v = parse(name, kv_boundary=0).k, parse(name, kv_boundary=0).v
    fragile = k.is_turbo or v.bits == 2
    if boundary and not fragile:
        with pytest.raises(ValueError, match="has bits enough"):
            parse(name, kv_boundary=boundary)
        return
    count = (BOUNDARY if fragile else 0) if boundary is None else boundary
    codecs = parse(name, kv_boundary=boundary).layer_codecs(layers)
    edges = count if layers >= 4 * count else 0
    assert len(codecs) == layers
    for i, pair in enumerate(codecs):
        affine = i < edges or i >= layers - edges
        assert pair == ((KVCodec("affine8"),) * 2 if affine else (k, v))


@given(text=st.text(max_size=12) | st.sampled_from(["turbo", "turbo5", "turbo4v8", "turbo1v2", "turbo4v", "TURBO4", "q8_0", "turbo4v2 "]))
def test_an_unknown_name_lists_the_known_ones(text):
    if text in NAMES or text in VLLM_ALIASES:
        return
    with pytest.raises(ValueError, match=r"expected one of none, affine8, turbo4.*turbo8v4.*turboquant_k8v4"):
        parse(text)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (dict(name=4), "kv_scheme is 4, expected one of"),
        (dict(name="turbo4v2", kv_bits=2), "kv_bits is 2, and keys of 'turbo4v2' have 4"),
        (dict(name="none", kv_bits=4), "kv_bits is 4, and keys of 'none' have 16"),
        (dict(name="turbo4", kv_bits=True), "kv_bits is True"),
        (dict(name="none", kv_scale="raw"), "kv_scale is an option of turbo schemes, and kv_scheme is 'none'"),
        (dict(name="affine8", kv_norm_dtype="f32"), "kv_norm_dtype is an option of turbo schemes"),
        (dict(name="affine8", kv_boundary=2), "kv_boundary is an option of turbo schemes"),
        (dict(name="none", kv_key_center="auto"), "kv_key_center is an option of turbo schemes"),
        (dict(name="turbo4", kv_norm_dtype="bf16"), "kv_norm_dtype is 'bf16', expected f16 or f32"),
        (dict(name="turbo4", kv_scale="best"), "kv_scale is 'best', expected matched, raw, unbiased"),
        (dict(name="turbo4", kv_scale="raw,raw,raw"), "kv_scale is 'raw,raw,raw'"),
        (dict(name="turbo4", kv_scale={"q": "raw"}), "kv_scale has 'q', expected k and v"),
        (dict(name="turbo8v4", kv_scale=["raw", "matched"]), "kv_scale is 'raw' for keys, and those of 'turbo8v4' have no such scale"),
        (dict(name="turbo4", kv_boundary=-1), "kv_boundary is -1"),
        (dict(name="turbo4", kv_boundary=True), "kv_boundary is True"),
        (dict(name="turbo4", kv_key_center="on"), "kv_key_center is 'on', expected one of auto, off"),
        (dict(name="turbo4", kv_start=64), "kv_start is 64, expected 0"),
        (dict(name="none", kv_dtype="int8"), "kv_dtype is 'int8', expected one of bfloat16, float16, float32"),
        (dict(name="none", kv_dtype=["float16"]), "kv_dtype is \\['float16'\\]"),
    ],
)
def test_what_contradicts_is_refused(options, text):
    with pytest.raises(ValueError, match=text):
        parse(**options)


def test_options_reach_the_codecs():
    scheme = parse("turbo4v2", kv_norm_dtype="f32", kv_scale={"v": "unbiased"}, kv_boundary=0, kv_key_center="off", kv_start=0)
    assert (scheme.k, scheme.v) == (KVCodec("turbo4", "float32"), KVCodec("turbo2", "float32", "unbiased"))
    assert parse("turbo3", kv_scale="raw") == parse("turbo3", kv_scale="raw,raw") == parse("turbo3", kv_scale=["raw", "raw"])
    assert parse("turbo0v4", kv_dtype="bfloat16").k == KVCodec("bfloat16")
    assert not scheme.centers and parse("turbo4v2").centers and not parse("turbo0v4").centers
    assert scheme.describe(30) == "turbo4v2, values unbiased, float32 norms"
    assert parse("turbo4v2").describe(8) == "turbo4v2, 2+2 layers affine8"
    assert parse("turbo4v2").describe(7) == "turbo4v2"  # too few layers for any to be stored otherwise
    assert parse("turbo0v4", kv_dtype="bfloat16").describe(7) == "turbo0v4, bfloat16 keys"


def test_others_names_mean_our_schemes():
    for theirs, ours in VLLM_ALIASES.items():
        assert parse(theirs) == parse(ours)
    for k, k_bits in K_QUANT.items():
        for v, v_bits in V_QUANT.items():
            assert alias(True, k, v) == f"turbo{k_bits}v{v_bits}"
    assert alias(True) == "turbo8v3"
    refused = [
        ((False,), "turboquant is False"),
        ((True, "q5_0"), "k_quant is 'q5_0', expected one of q8_0"),
        ((True, None, 3), "v_quant is 3"),
    ]
    for wrong, text in refused:
        with pytest.raises(ValueError, match=text):
            alias(*wrong)
