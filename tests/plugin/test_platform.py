"""What metalstep makes of vLLM's configuration, without a model."""
from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
from llama_config import config_folder
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.models import ModelRegistry
from vllm.platforms import current_platform
from vllm.usage.usage_lib import UsageContext

from metalstep.kernels.linear import ARITHMETIC
from metalstep.kv_cache import BLOCK_SIZE
from metalstep.kv_scheme import PLAIN
from metalstep.model import DEFAULT_DEVICE, DEVICES
from metalstep.native_model import PREFILL_ROWS
from metalstep.plan.gpu_target import GpuTarget
from metalstep.plugin import compat, models, options, platform, refusals, serve
from metalstep.plugin.options import OptionError, PluginOptions, device_of_rank, parse_options, threads_of_rank


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return config_folder(tmp_path_factory.mktemp("model"))


def configure(folder, **arguments):
    """The configuration of a server."""
    return EngineArgs(model=folder, **arguments).create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)


def test_vllm_chooses_metalstep():
    assert type(current_platform) is platform.MetalstepPlatform
    assert current_platform.is_out_of_tree()


def test_a_server_gets_metalsteps_worker_in_the_engines_process_and_steps_ahead(folder):
    config = configure(folder)
    assert config.parallel_config.worker_cls == "metalstep.plugin.worker.MetalstepWorker"
    assert config.parallel_config.distributed_executor_backend == "uni"
    assert config.scheduler_config.async_scheduling
    assert config.cache_config.block_size == BLOCK_SIZE
    assert config.cache_config.enable_prefix_caching
    assert config.scheduler_config.enable_chunked_prefill
    assert current_platform.support_hybrid_kv_cache()


def test_as_many_sequences_run_at_once_as_vllm_says(folder):
    assert configure(folder).scheduler_config.max_num_seqs == 256
    assert configure(folder, max_num_seqs=3).scheduler_config.max_num_seqs == 3


def test_the_engines_process_checks_the_configuration_again_and_changes_nothing(folder):
    config = configure(folder, enforce_eager=True, data_parallel_size=2)
    before = repr(config)
    current_platform.check_and_update_config(config)
    assert repr(config) == before


def test_a_worker_of_ones_own_is_kept(folder):
    assert configure(folder, worker_cls="tests.Worker").parallel_config.worker_cls == "tests.Worker"


def test_sleep_mode_can_be_switched_on(folder):
    assert configure(folder, enable_sleep_mode=True).model_config.enable_sleep_mode


def test_data_parallel_engines_share_the_cores(folder, monkeypatch):
    monkeypatch.delenv("METALSTEP_THREADS", raising=False)
    monkeypatch.setattr(options, "available_cores", lambda: 8)
    assert "threads" not in configure(folder).additional_config
    arguments = {"data_parallel_size": 3, "additional_config": {"device": "host"}}
    assert configure(folder, **arguments).additional_config["threads"] == 2
    given = configure(folder, data_parallel_size=3, additional_config={"device": "host", "threads": 5})
    assert given.additional_config["threads"] == 5


@pytest.mark.parametrize(
    ("given", "ranks", "threads"),
    [
        ({"device": "host"}, 1, None),
        ({"device": "host"}, 4, 2),
        ({"device": "host"}, 100, 1),
        ({"device": "metal"}, 4, None),
        ({"device": "host", "threads": 3}, 4, 3),
    ],
)
def test_threads_of_a_rank(monkeypatch, given, ranks, threads):
    monkeypatch.delenv("METALSTEP_THREADS", raising=False)
    monkeypatch.setattr(options, "available_cores", lambda: 8)
    assert threads_of_rank(PluginOptions(**given), ranks) == threads


def test_the_environments_threads_hold_for_each_rank(monkeypatch):
    monkeypatch.setenv("METALSTEP_THREADS", "1")
    assert threads_of_rank(PluginOptions(device="host"), 2) is None


def test_engines_are_spawned_where_they_run_on_cuda(folder, monkeypatch):
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "fork")
    configure(folder)
    assert os.environ["VLLM_WORKER_MULTIPROC_METHOD"] == "fork"
    configure(folder, additional_config={"device": "cuda"})
    assert os.environ["VLLM_WORKER_MULTIPROC_METHOD"] == "spawn"


@pytest.mark.parametrize(
    ("given", "rank", "device"),
    [("cuda", None, "cuda"), ("cuda", 0, "cuda"), ("cuda", 2, "cuda:2"), ("cuda:1", 2, "cuda:1"), ("host", 1, "host"), (None, 1, None)],
)
def test_each_rank_has_a_gpu_of_its_own(given, rank, device):
    assert device_of_rank(PluginOptions(device=given), rank) == device


def test_engines_are_spawned_on_a_mac(folder, monkeypatch):
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "fork")
    monkeypatch.setattr(sys, "platform", "darwin")
    config = configure(folder)
    assert os.environ["VLLM_WORKER_MULTIPROC_METHOD"] == "spawn"
    assert parse_options(config.additional_config).resolved_device == "metal"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"frob": 1}, "no option 'frob', expected device, threads, arithmetic"),
        ({"device": "gpu"}, "device is 'gpu', expected one of host, metal, cuda, metal-sim, eager, or cuda:N"),
        ({"device": "cuda:x"}, "device is 'cuda:x', expected one of host"),
        ({"device": "cuda", "threads": 2}, "threads is 2, expected none on cuda"),
        ({"device": 3}, "device is 3, expected one of host"),
        ({"device": ["host"]}, r"device is \['host'\], expected one of host"),
        ({"threads": 0}, "threads is 0, expected an integer above 0"),
        ({"threads": True}, "threads is True, expected an integer above 0"),
        ({"threads": "2"}, "threads is '2', expected an integer above 0"),
        ({"arithmetic": "int4"}, "arithmetic is 'int4', expected one of int16, int8"),
        ({"strict": "yes"}, "strict is 'yes', expected true or false"),
        ({"model": 1}, "model is 1, expected a path or a name"),
        ({"kv_scheme": "int4"}, "kv_scheme is 'int4', expected one of none, affine8, turbo4"),
        ({"device": "metal-sim", "threads": 2}, "threads is 2, expected none on metal-sim"),
        ({"device": "eager", "arithmetic": "int8"}, "arithmetic is 'int8', expected none on eager"),
        ({"device": "eager", "strict": True}, "strict is True, expected none on eager"),
    ],
)
def test_wrong_options_of_metalsteps_own_are_refused(given, message):
    with pytest.raises(OptionError, match=message):
        parse_options(given)


def test_options_have_the_defaults_of_load():
    assert parse_options(None) == PluginOptions(None, None, "int16", False, False, None)
    assert parse_options(None).scheme() == PLAIN
    assert PluginOptions().resolved_device == DEFAULT_DEVICE


def test_vllms_own_switch_makes_results_batch_invariant(monkeypatch):
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    assert parse_options({}).batch_invariant
    assert not parse_options({"device": "eager"}).batch_invariant
    assert not parse_options({"batch_invariant": False}).batch_invariant


def test_what_is_written_down_twice_to_keep_mlx_out_is_the_same():
    assert options.DEVICES == DEVICES
    assert set(options.ARITHMETIC) == set(ARITHMETIC)
    assert serve.STEP_ROWS == PREFILL_ROWS
    assert GpuTarget("nvidia").max_rows == serve.CUDA_ROWS
    assert refusals.BLOCK_SIZE == BLOCK_SIZE


def test_the_servers_process_never_loads_mlx(folder):
    """It is forked, and MLX's threads are not; on a Mac it would open the GPU for nothing."""
    script = f"""
import sys
from vllm.engine.arg_utils import EngineArgs
import metalstep.cli.main, metalstep.plugin.serve
from metalstep.plugin.refusals import check_request
config = EngineArgs(model={folder!r}).create_engine_config()
from vllm import SamplingParams
from vllm.platforms import current_platform
current_platform.validate_request({{"type": "token", "prompt_token_ids": [1]}}, SamplingParams(min_p=0.1))
print(sorted(name for name in sys.modules if name.split(".")[0] in ("mlx", "mlx_lm")))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr


@pytest.mark.parametrize("model_type", models.ARCHITECTURES)
def test_every_architecture_is_of_a_model_that_mlx_lm_has(model_type):
    assert importlib.util.find_spec(f"mlx_lm.models.{model_type}") is not None


def test_vllm_takes_every_architecture_for_one_that_generates_text_from_text():
    for architecture in (name for names in models.ARCHITECTURES.values() for name in names):
        info = ModelRegistry._try_inspect_model_cls(architecture)
        assert info is not None and info.architecture == "MetalstepForCausalLM", architecture
        assert info.is_text_generation_model and not info.is_pooling_model
        assert not (info.supports_multimodal or info.is_hybrid or info.has_inner_state or info.is_attention_free)


def test_an_architecture_that_nobody_knows_can_be_tried_and_known_ones_keep_their_class(tmp_path):
    models.register_unknown(["BrandNewForCausalLM", "BertModel"])
    assert ModelRegistry._try_inspect_model_cls("BrandNewForCausalLM").is_text_generation_model
    assert getattr(ModelRegistry.models["BertModel"], "model_cls", None) is not models._text_model()
    configure(config_folder(tmp_path, architectures=["BrandNewForCausalLM"]))


@pytest.mark.parametrize(("found", "works"), [("0.32.0", True), ("0.33.1+cpu", True), ("0.31.9", False), ("0.34.0", False)])
def test_the_platform_is_active_with_the_releases_it_knows(monkeypatch, found, works):
    from metalstep import plugin

    monkeypatch.setattr(compat, "installed", lambda: found)
    assert (plugin.platform_class() is not None) == works
    if not works:
        assert f"vLLM is {found}, expected 0.32 or later and before 0.34" in compat.unsupported()
