"""What a server's options say of the KV cache's scheme: in metalstep's names, vLLM's and vllm-metal's, and never in two that differ."""
from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from llama_config import config_folder
from vllm.engine.arg_utils import EngineArgs

from metalstep.kv_scheme import K_QUANT, NAMES, V_QUANT, VLLM_ALIASES, parse
from metalstep.plugin.options import KV_FLOATS, OptionError, parse_options
from metalstep.plugin.serve import message_of

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(NAMES),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
KEYS = ("kv_scheme", "kv_bits", "kv_norm_dtype", "kv_scale", "kv_boundary", "kv_key_center", "kv_start", "turboquant", "k_quant", "v_quant")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return config_folder(tmp_path_factory.mktemp("model"))


def on_host(**given):
    return {"device": "host", **given}


@given(name=st.sampled_from(NAMES), dtype=st.sampled_from(sorted(KV_FLOATS)))
def test_every_name_gives_its_scheme(name, dtype):
    assert parse_options(on_host(kv_scheme=name), dtype).scheme(dtype) == parse(name, kv_dtype=KV_FLOATS[dtype])


@given(
    k=st.sampled_from([2, 3, 4]),
    norm=st.sampled_from(["f16", "f32"]),
    scale=st.sampled_from(["matched", "raw", "unbiased", "raw,matched"]),
    boundary=st.integers(0, 5),
    center=st.sampled_from(["auto", "off"]),
)
def test_options_of_a_scheme_arrive(k, norm, scale, boundary, center):
    given = dict(kv_norm_dtype=norm, kv_scale=scale, kv_boundary=boundary, kv_key_center=center, kv_bits=k, kv_start=0)
    assert parse_options(on_host(kv_scheme=f"turbo{k}v2", **given)).scheme() == parse(f"turbo{k}v2", **given)
    if k in (3, 4):  # beside vLLM's own name of a scheme too
        dtype = {4: "turboquant_4bit_nc", 3: "turboquant_k3v4_nc"}[k]
        assert parse_options(on_host(**given), dtype).scheme(dtype) == parse(VLLM_ALIASES[dtype], **given)


@given(key=st.sampled_from(KEYS), value=anything, scheme=st.sampled_from([None, *NAMES]))
def test_whatever_is_given_is_a_scheme_or_one_clear_error(key, value, scheme):
    given = on_host(**{**({} if scheme is None else {"kv_scheme": scheme}), key: value})
    try:
        parse_options(given).scheme()
    except OptionError as error:
        text = str(error)
        assert text.startswith("--additional-config") and "\n" not in text
        assert key in text or "kv_scheme" in text or "turboquant" in text


@given(name=st.text(max_size=12).filter(lambda name: name not in (*NAMES, *VLLM_ALIASES)))
def test_an_unknown_name_is_refused_with_the_known_ones(name):
    with pytest.raises(OptionError) as error:
        parse_options(on_host(kv_scheme=name))
    assert all(known in str(error.value) for known in NAMES)


@given(k=st.sampled_from([None, *K_QUANT]), v=st.sampled_from([None, *V_QUANT]))
def test_vllm_metals_names_give_the_same_bits_and_say_that_only_the_name_is_shared(k, v):
    given = {name: value for name, value in (("k_quant", k), ("v_quant", v)) if value is not None}
    options = parse_options(on_host(turboquant=True, **given))
    bits = K_QUANT[k or "q8_0"]
    assert options.scheme() == parse(f"turbo{bits}v{V_QUANT[v or 'q3_0']}")
    notes = options.scheme_notes()
    assert "only the name is shared" in notes[0]
    assert (len(notes) == 2 and "2 bits of each key" in notes[1]) == (bits == 2)


@given(dtype=st.sampled_from(sorted(VLLM_ALIASES)), name=st.sampled_from([*NAMES, *VLLM_ALIASES]))
def test_two_ways_to_name_a_scheme_agree_or_are_refused(dtype, name):
    meant = VLLM_ALIASES.get(name, name)
    if meant == VLLM_ALIASES[dtype]:
        assert parse_options(on_host(kv_scheme=name), dtype).scheme(dtype) == parse(meant)
        return
    with pytest.raises(OptionError, match="two schemes of one KV cache; leave all but one out") as error:
        parse_options(on_host(kv_scheme=name), dtype)
    assert repr(name) in str(error.value) and dtype in str(error.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kv_scheme": "turbo5"}, "kv_scheme is 'turbo5', expected one of none, affine8, turbo4"),
        ({"kv_scheme": "turbo4", "turboquant": True}, r"kv_scheme 'turbo4' and turboquant with k_quant and v_quant \(turbo8v3\) are two"),
        ({"turboquant": False}, "turboquant is False, expected true"),
        ({"k_quant": "q8_0"}, "turboquant is None, expected true"),
        ({"turboquant": True, "k_quant": "q5_0"}, "k_quant is 'q5_0', expected one of q8_0"),
        ({"kv_scheme": "turbo4v2", "kv_bits": 8}, "kv_bits is 8, and keys of 'turbo4v2' have 4"),
        ({"kv_bits": 4}, "kv_bits is 4, and keys of 'none' have 16"),
        ({"kv_scheme": "affine8", "kv_scale": "raw"}, "kv_scale is an option of turbo schemes"),
        ({"kv_scheme": "turbo8v4", "kv_boundary": 2}, "kv_boundary is 2, and 'turbo8v4' has bits enough"),
        ({"kv_scheme": "turbo4", "kv_start": 5000}, "kv_start is 5000, expected 0"),
        ({"kv_scheme": "turbo4", "kv_norm": "f16"}, "no option 'kv_norm', expected device, .*kv_norm_dtype"),
        ({"kv_scheme": "turbo4", "device": "eager"}, "kv_scheme 'turbo4' on eager, whose cache is mlx-lm's own"),
    ],
)
def test_a_server_refuses_a_wrong_scheme_before_its_engine_starts(folder, given, message):
    with pytest.raises(ValueError, match=message) as error:
        EngineArgs(model=folder, additional_config=given).create_engine_config()
    text, _ = message_of(error.value)
    assert text.startswith("--additional-config") and "validation error" not in text


@pytest.mark.parametrize("dtype", VLLM_ALIASES)
def test_vllms_own_names_pass_its_checks_and_mean_a_scheme(folder, dtype, monkeypatch):
    logged = []
    monkeypatch.setattr("metalstep.plugin.platform.logger.warning", lambda text, *values: logged.append(text % values))
    config = EngineArgs(model=folder, kv_cache_dtype=dtype).create_engine_config()
    options = parse_options(config.additional_config, config.cache_config.cache_dtype)
    assert options.scheme(config.cache_config.cache_dtype) == parse(VLLM_ALIASES[dtype])
    assert [line for line in logged if VLLM_ALIASES[dtype] in line and "only the name is shared" in line]
    with pytest.raises(ValueError, match="two schemes of one KV cache"):
        EngineArgs(model=folder, kv_cache_dtype=dtype, additional_config={"kv_scheme": "affine8"}).create_engine_config()


def test_layers_that_vllm_would_leave_out_are_refused(folder, tmp_path):
    deep = config_folder(tmp_path, num_hidden_layers=12)
    for model, dtype, layers in ((folder, "auto", ["0"]), (deep, "turboquant_4bit_nc", ["5"])):
        with pytest.raises(ValueError, match="--kv-cache-dtype-skip-layers") as error:
            EngineArgs(model=model, kv_cache_dtype=dtype, kv_cache_dtype_skip_layers=layers).create_engine_config()
        assert message_of(error.value)[1] == "set kv_boundary"


@pytest.mark.parametrize("dtype", ["fp8", "int8_per_token_head", "ultraquant_4bit"])
def test_vllms_other_compressed_caches_are_refused_with_what_there_is(folder, dtype):
    with pytest.raises(ValueError, match=f"--kv-cache-dtype {dtype}: the KV cache is float16, bfloat16 or of a kv_scheme") as error:
        EngineArgs(model=folder, kv_cache_dtype=dtype).create_engine_config()
    assert "turbo8v4" in (message_of(error.value)[1] or "")


def test_moving_encoded_caches_to_other_engines_is_refused(folder):
    connector = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}
    with pytest.raises(ValueError, match="--kv-transfer-config: KV caches are not moved between engines"):
        EngineArgs(model=folder, kv_transfer_config=connector).create_engine_config()


def test_the_command_prints_one_line():
    given = json.dumps({"kv_scheme": "turbo9"})
    run = [sys.executable, "-m", "metalstep.cli.main", "serve", "smollm2", "--additional-config", given]
    done = subprocess.run(run, capture_output=True, text=True, env={**os.environ})
    errors = [line for line in done.stderr.splitlines() if line.startswith(("error:", "hint:"))]
    assert done.returncode == 2
    assert len(errors) == 1 and errors[0].startswith("error: --additional-config kv_scheme is 'turbo9', expected one of none, affine8")
