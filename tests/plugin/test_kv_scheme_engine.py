"""Tiny models with an encoded cache in vLLM's offline engine: the tokens are those of metalstep's own engine, and NaN stays where it is."""
from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx
import numpy as np
import pytest
from families import VOCAB
from metal_models import build
from tiny import write_model
from vllm import LLM, SamplingParams

import metalstep
from metalstep import CaptureError, Request
from metalstep import SamplingParams as EngineParams
from metalstep.plugin.engine_errors import describe

ARCHITECTURES = {"llama": ["LlamaForCausalLM"], "gemma3_text": ["Gemma3ForCausalLM"], "qwen3_moe": ["Qwen3MoeForCausalLM"]}
TEXT = [(7 * i + i * i % 13 + 3) % (VOCAB - 3) + 3 for i in range(200)]
POISON = 90
GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, detokenize=False)


@contextmanager
def offline(model, scheme, **options) -> Iterator[LLM]:
    given = {"max_model_len": 128, "max_num_seqs": 16, "max_num_batched_tokens": 48, **options}
    config = {"device": "host", "strict": True, "kv_scheme": scheme}
    llm = LLM(model=str(model), skip_tokenizer_init=True, disable_log_stats=True, seed=0, additional_config=config, **given)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def tokens_of(llm, prompts, params=GREEDY):
    """(tokens, why each ended)."""
    found = [output.outputs[0] for output in llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)]
    return [list(one.token_ids) for one in found], [one.finish_reason for one in found]


def written(folder, family, **config):
    network, config, _ = build(family, num_hidden_layers=10, head_dim=64, **config)
    return write_model(folder, network, {**config, "architectures": ARCHITECTURES[family]}), network, config


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("scheme", ["turbo4v2", "turbo8v4"])
def test_tokens_are_those_of_metalsteps_own_engine_in_too_little_memory(tmp_path, family, scheme):
    """First and last layers of another size, groups with windows or none, preemption, prefix hits, chunks."""
    model, *_ = written(tmp_path / "model", family, **({"sliding_window": 24} if family == "gemma3_text" else {}))
    prompts = [TEXT[: 40 + 3 * i] for i in range(6)] + [TEXT[i : i + 30] for i in range(6)]
    with metalstep.load(model, strict=True, kv_scheme=scheme, max_context=128)[0] as own:
        wanted = [[o.token for o in own.engine.submit(Request(prompt, EngineParams(), 24))] for prompt in prompts]
    with offline(model, scheme, num_gpu_blocks_override=24 if family == "llama" else 60) as llm:
        for _ in range(2):
            found, reasons = tokens_of(llm, prompts)
            assert found == wanted and set(reasons) == {"length"}
        (stats,) = llm.collective_rpc("metalstep_stats")
        assert stats["preemptions"] > 0 and stats["kv_scheme"].startswith(scheme)


@pytest.mark.parametrize("scheme", ["turbo4v2", "turbo8v4", "affine8"])
def test_nan_in_one_sequence_ends_that_request_alone(tmp_path, scheme):
    """In the middle of a prompt, so that its keys and values are in the cache and a later token looks at them; twice: from there too."""
    _, network, config = written(tmp_path / "clean", "llama", tie_word_embeddings=False)
    weight = np.array(network.model.embed_tokens.weight)
    weight[POISON] = np.nan
    network.model.embed_tokens.weight = mx.array(weight)
    model = write_model(tmp_path / "poisoned", network, {**config, "architectures": ARCHITECTURES["llama"]})
    clean = [[token for token in TEXT[i : i + 40] if token != POISON] for i in (0, 3, 9)]
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, detokenize=False, logit_bias={POISON: -100.0})
    with offline(model, scheme) as llm:
        alone = [tokens_of(llm, [prompt], params)[0][0] for prompt in clean]
        for _ in range(2):
            found, reasons = tokens_of(llm, [clean[0], [5, POISON, *clean[0]], *clean[1:]], params)
            assert reasons == ["length", "error", "length", "length"]
            assert [found[0], *found[2:]] == alone


def test_a_model_that_would_run_eagerly_is_refused_in_one_line(tmp_path):
    model, *_ = written(tmp_path / "experts", "qwen3_moe")
    refusal = "an eager cache is not encoded: load it with kv_scheme='none', not 'turbo4'"
    with pytest.raises(CaptureError, match=refusal) as error, offline(model, "turbo4"):
        pass
    assert describe(error.value)["hint"] == refusal
    given = json.dumps({"device": "host", "kv_scheme": "turbo4"})
    run = [sys.executable, "-m", "metalstep.cli.main", "serve", str(model), "--max-model-len", "64", "--additional-config", given]
    done = subprocess.run(run, capture_output=True, text=True, timeout=300)
    errors = [line for line in done.stderr.splitlines() if line.startswith(("error:", "hint:"))]
    assert done.returncode == 2
    assert len(errors) == 2 and errors[0].startswith("error: the engine failed: qwen3_moe has no native step yet: ")
    assert errors[1] == f"hint: {refusal}"
