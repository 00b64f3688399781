"""Nothing of vLLM's is silently ignored: what metalstep does not do is refused by name."""
from __future__ import annotations

from types import SimpleNamespace

import pytest
from llama_config import config_folder
from packaging.version import Version
from vllm import PoolingParams, SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.platforms import current_platform
from vllm.utils.argparse_utils import FlexibleArgumentParser

from metalstep.plugin import compat, refusals
from metalstep.plugin.serve import message_of

SINCE_0_33 = Version(compat.installed() or "0") >= Version("0.33")
TOKENS = {"type": "token", "prompt_token_ids": [1, 2, 3]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return config_folder(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tensor_parallel_size": 2}, "--tensor-parallel-size 2: an engine runs on one device"),
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 3}}, "--speculative-config: speculative decoding"),
        ({"runner": "pooling"}, "--runner pooling: models generate text"),
        ({"enable_prompt_embeds": True}, "--enable-prompt-embeds: prompts are tokens"),
        ({"quantization": "fp8"}, "--quantization fp8: weights are used as they are stored"),
        ({"load_format": "dummy"}, "--load-format dummy: metalstep reads weights itself"),
        ({"download_dir": "/models"}, "--download-dir /models: models are downloaded to the hub's own cache"),
        ({"revision": "v2"}, "--revision v2: the engine takes a model's main revision"),
        ({"hf_overrides": {"rope_theta": 1.0}}, "--hf-overrides: the engine reads the model's own config.json"),
        ({"model_impl": "transformers"}, "--model-impl transformers: models are mlx-lm's"),
        ({"cpu_offload_gb": 1}, "--cpu-offload-gb 1.0: weights stay where the device computes"),
        ({"kv_offloading_size": 1.0}, "--kv-offloading-size 1.0: the KV cache is in one place"),
        ({"kv_cache_dtype": "fp8"}, "--kv-cache-dtype fp8: the KV cache is float16, bfloat16 or of a kv_scheme"),
        ({"kv_sharing_fast_prefill": True}, "--kv-sharing-fast-prefill: prefill computes every layer"),
        ({"block_size": 24}, "--block-size 24: blocks have 16 tokens or a multiple"),
        ({"logits_processors": ["a:B"]}, r"--logits-processors \['a:B'\]: the sampler runs on the device"),
        ({"logprobs_mode": "processed_logits"}, "--logprobs-mode processed_logits: log probabilities are the model's own"),
        ({"scheduler_cls": "a.Scheduler"}, "--scheduler-cls a.Scheduler: metalstep has a scheduler class of its own"),
        ({"profiler_config": {"profiler": "torch", "torch_profiler_dir": "/tmp"}}, "--profiler-config torch: a step is one native call"),
        ({"weight_transfer_config": {"backend": "nccl"}}, "--weight-transfer-config: weights are read once"),
        ({"additional_config": {"frob": 1}}, "--additional-config: no option 'frob'"),
        *([({"sleep_mode_backend": "criu"}, "--sleep-mode-backend criu: metalstep gives memory back in one way")] if SINCE_0_33 else []),
    ],
)
def test_an_option_is_refused_at_start_up_by_name(folder, arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        EngineArgs(model=folder, **arguments).create_engine_config()
    text, hint = message_of(error.value)
    assert not text.startswith("1 validation error"), "pydantic's wrapping is for programmers"
    assert hint, "an error says what to do"


@pytest.mark.parametrize(
    "arguments",
    [
        {"kv_cache_dtype": "bfloat16", "dtype": "bfloat16"},
        {"kv_cache_dtype": "float16"},
        {"dtype": "float32"},
        {"block_size": 64},
        {"data_parallel_size": 2},
        {"distributed_executor_backend": "mp"},
        {"load_format": "safetensors"},
        {"async_scheduling": False},
        {"enable_prefix_caching": False},
        {"scheduling_policy": "priority"},
        {"max_logprobs": -1},
        {"max_model_len": 128},
        {"gpu_memory_utilization": 0.3},
        {"kv_cache_memory_bytes": 1 << 26},
        {"num_gpu_blocks_override": 9},
        {"seed": 3},
        {"enable_sleep_mode": True},
        {"structured_outputs_config": {"backend": "xgrammar"}},
        {"skip_tokenizer_init": True},
    ],
)
def test_what_metalstep_does_is_not_refused(folder, arguments):
    EngineArgs(model=folder, **arguments).create_engine_config()


def test_a_quantised_mlx_model_is_no_explicit_quantization(tmp_path):
    quantised = {"group_size": 64, "bits": 4, "mode": "affine"}
    EngineArgs(model=config_folder(tmp_path, quantization=quantised, quantization_config=quantised)).create_engine_config()


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({}, []),
        ({"enforce_eager": True}, ["--enforce-eager"]),
        ({"optimization_level": 0}, ["--optimization-level"]),
        ({"compilation_config": {"cudagraph_capture_sizes": [1, 2]}}, ["--compilation-config"]),
        ({"moe_backend": "triton"}, ["--moe-backend"]),
        *([({"monokernel": True}, ["--monokernel"])] if SINCE_0_33 else []),
    ],
)
def test_options_that_only_say_how_torch_computes_are_named_in_the_log(folder, arguments, names, monkeypatch):
    logged = []
    monkeypatch.setattr("metalstep.plugin.platform.logger.info", lambda text, *values: logged.append(text % values))
    EngineArgs(model=folder, **arguments).create_engine_config()
    lines = [line for line in logged if line.startswith("Without effect")]
    assert [line.rpartition(": ")[2] for line in lines] == ([", ".join(names)] if names else [])


def test_every_name_is_an_option_of_vllms():
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    known = {option for action in parser._actions for option in action.option_strings}
    names = [*(option.name for option in refusals.OPTIONS), *refusals.NO_EFFECT]
    assert {name for name in names if name.startswith("--")} - known == (set() if SINCE_0_33 else {"--monokernel", "--sleep-mode-backend"})
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("tensor_parallel_size", 2, "--tensor-parallel-size 2: an engine runs on one device; run several engines"),
        ("pipeline_parallel_size", 2, "--pipeline-parallel-size 2: an engine runs on one device; run several engines"),
        ("enable_expert_parallel", True, "--enable-expert-parallel: an engine has all experts on its one device"),
        ("enable_lora", True, "--enable-lora: adapters are not supported; fuse it with `mlx_lm.fuse`"),
    ],
)
def test_arguments_that_vllm_would_explain_in_its_own_words_are_refused_before(name, value, message):
    with pytest.raises(refusals.Refusal, match=message):
        refusals.check_arguments(SimpleNamespace(**{name: value}))
    refusals.check_arguments(SimpleNamespace(tensor_parallel_size=1, pipeline_parallel_size=1, enable_lora=False))


@pytest.mark.parametrize(
    ("inputs", "params", "message"),
    [
        ({"type": "embeds"}, SamplingParams(), "the prompt is of type 'embeds'; send text or token ids"),
        ({"type": "multimodal"}, SamplingParams(), "text from text alone"),
        ({"type": "enc_dec"}, SamplingParams(), "text from text alone"),
        (TOKENS, PoolingParams(), "does not embed or classify"),
        (TOKENS, SamplingParams(logit_bias={400: 1.0}), "token id 400, expected ids from 0 to 319"),
        (TOKENS, SamplingParams(allowed_token_ids=[999]), "token id 999, expected ids from 0 to 319"),
    ],
)
def test_a_request_that_cannot_be_run_is_the_clients_error(folder, inputs, params, message):
    EngineArgs(model=folder).create_engine_config()
    with pytest.raises(VLLMValidationError, match=message):
        current_platform.validate_request(inputs, params)


def test_an_ordinary_request_is_taken(folder):
    EngineArgs(model=folder).create_engine_config()
    params = SamplingParams(temperature=0.7, top_k=5, top_p=0.9, min_p=0.1, seed=1, logprobs=5, presence_penalty=1.0, logit_bias={3: 2.0})
    current_platform.validate_request(TOKENS, params)
