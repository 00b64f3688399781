"""Everything of vLLM's that metalstep does not do, and why: options at start-up, and what a request may ask for.

An option that changed nothing would be worse than an error, so each is refused by name, with what to do. The exceptions stand in
NO_EFFECT: they say how torch should compute, and are named in the log.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from metalstep.kv_scheme import VLLM_ALIASES
from metalstep.plugin.options import KV_DTYPES

BLOCK_SIZE = 16  # metalstep.kv_cache.BLOCK_SIZE
LOAD_FORMATS = ("auto", "hf", "safetensors", "mistral", "gguf")

ONE_DEVICE = ("an engine runs on one device", "run several engines with --data-parallel-size")
ONE_PROCESS = ("an engine is one process on this machine", "leave it out")
ALL_EXPERTS = ("an engine has all experts on its one device", "leave it out")
AS_STORED = ("weights are used as they are stored", "convert the model with `mlx_lm.convert` and serve the result")
OWN_CONFIG = ("the engine reads the model's own config.json", "change that file in a copy of the model's folder")
OWN_LOADER = ("metalstep reads weights itself, from .safetensors or .gguf files", "leave it out")
OWN_MODELS = ("models are mlx-lm's", "leave it out")
ONE_PLACE = ("weights stay where the device computes", "serve a model with fewer bits")
ONE_CALL = ("a step is one native call, the times of its parts are not taken", "use `metalstep bench launches`")
TEXT_ALONE = ("models generate text from text alone", "leave it out")
NOT_REPORTED = ("a step does not report it", "leave it out")


class Refusal(ValueError):
    """An option of vLLM's that metalstep does not do. The text says why, and behind its last semicolon what to do."""


Given = Callable[[Any], Any]


@dataclass(frozen=True)
class Option:
    """given: of a VllmConfig, what was asked for, or something false."""

    name: str
    given: Given
    why: str
    instead: str = "leave it out"

    def refusal(self, value: Any) -> Refusal:
        shown = "" if value is True else f" {value}"
        return Refusal(f"{self.name}{shown}: {self.why}; {self.instead}")


def field(path: str, *accepted: Any) -> Given:
    """The value at `path` of a VllmConfig; None if it is one of `accepted` or this release of vLLM has no such field."""

    def given(config: Any) -> Any:
        value = config
        for name in path.split("."):
            value = getattr(value, name, None)
        return None if value in accepted else value

    return given


def any_of(path: str) -> Given:
    """Whether there is something at `path`: a part that is None, or a list or dict that is empty, unless it was asked for."""
    value = field(path)
    return lambda config: bool(value(config))


def part(name: str) -> Given:
    """Whether a part of the configuration that is None by default was asked for."""
    value = field(name)
    return lambda config: value(config) is not None


def quantization(config: Any) -> Any:
    """--quantization, where config.json does not itself say how the weights are quantised."""
    stored = getattr(config.model_config.hf_config, "quantization_config", None)
    method = stored.get("quant_method") if isinstance(stored, dict) else getattr(stored, "quant_method", None)
    return None if method else config.model_config.quantization


def block_size(config: Any) -> Any:
    return config.cache_config.block_size if config.cache_config.block_size % BLOCK_SIZE else None


def skip_layers(config: Any) -> Any:
    """--kv-cache-dtype-skip-layers, beside the first and last layers that vLLM itself puts there for its turboquant dtypes."""
    layers = config.cache_config.kv_cache_dtype_skip_layers
    if not layers or config.cache_config.cache_dtype not in VLLM_ALIASES:
        return layers
    from vllm.model_executor.layers.quantization.turboquant.config import TurboQuantConfig

    return sorted(set(layers) - set(TurboQuantConfig.get_boundary_skip_layers(config.model_config)))


def scheduler(config: Any) -> Any:
    """A scheduler class that is not metalstep's own."""
    chosen = config.scheduler_config.scheduler_cls
    name = chosen if chosen is None or isinstance(chosen, str) else f"{chosen.__module__}.{chosen.__qualname__}"
    return None if name is None or name.startswith("metalstep.") else name


OPTIONS = (
    # One engine, one device, one process.
    Option("--tensor-parallel-size", field("parallel_config.tensor_parallel_size", 1), *ONE_DEVICE),
    Option("--pipeline-parallel-size", field("parallel_config.pipeline_parallel_size", 1), *ONE_DEVICE),
    Option("--prefill-context-parallel-size", field("parallel_config.prefill_context_parallel_size", 1), *ONE_DEVICE),
    Option("--decode-context-parallel-size", field("parallel_config.decode_context_parallel_size", 1), *ONE_DEVICE),
    Option("--nnodes", field("parallel_config.nnodes", 1), ONE_PROCESS[0], "join machines with --data-parallel-address"),
    Option("--distributed-executor-backend", field("parallel_config.distributed_executor_backend", "uni", "mp"), *ONE_PROCESS),
    Option("--data-parallel-backend", field("parallel_config.data_parallel_backend", "mp"), *ONE_PROCESS),
    Option("--enable-expert-parallel", field("parallel_config.enable_expert_parallel"), *ALL_EXPERTS),
    Option("--enable-eplb", field("parallel_config.enable_eplb"), *ALL_EXPERTS),
    Option("--enable-elastic-ep", field("parallel_config.enable_elastic_ep"), *ALL_EXPERTS),
    Option("--enable-dbo", field("parallel_config.enable_dbo"), "a step is one batch"),
    Option("--ubatch-size", field("parallel_config.ubatch_size"), "a step is one batch"),
    Option("--enable-fault-tolerance", field("parallel_config.enable_fault_tolerance"), "an engine that fails is not replaced"),
    # Another sort of model, or more than one.
    Option("--runner", field("model_config.runner_type", "generate"), "models generate text, they do not embed or classify it"),
    Option("--enable-lora", part("lora_config"), "adapters are not supported", "fuse it with `mlx_lm.fuse` and serve the result"),
    Option("--speculative-config", part("speculative_config"), "speculative decoding is not supported"),
    Option("--diffusion-config", part("diffusion_config"), "diffusion models are not supported"),
    Option("--watermark-config", part("watermark_config"), "the sampler leaves no watermark"),
    Option("--engram-config", part("engram_config"), *OWN_MODELS),
    Option("--enable-prompt-embeds", field("model_config.enable_prompt_embeds"), "prompts are tokens", "send text or token ids"),
    Option("an encoder-decoder model", field("model_config.is_encoder_decoder"), TEXT_ALONE[0], "serve another model"),
    # How weights are found and read: the engine does that, and vLLM only the config and the tokenizer.
    Option("--quantization", quantization, *AS_STORED),
    Option("--quantization-config", any_of("model_config.quantization_config"), *AS_STORED),
    Option("--load-format", field("load_config.load_format", *LOAD_FORMATS), *OWN_LOADER),
    Option("--model-loader-extra-config", any_of("load_config.model_loader_extra_config"), *OWN_LOADER),
    Option("--download-dir", field("load_config.download_dir"), "models are downloaded to the hub's own cache", "set HF_HOME"),
    Option(
        "--revision",
        field("model_config.revision", "main"),
        "the engine takes a model's main revision",
        "download it with `hf download MODEL --revision …` and pass the folder",
    ),
    Option("--hf-overrides", any_of("model_config.hf_overrides"), *OWN_CONFIG),
    Option("--hf-config-path", field("model_config.hf_config_path"), *OWN_CONFIG),
    Option("--model-class-overrides", any_of("model_config.model_class_overrides"), *OWN_MODELS),
    Option("--model-impl", field("model_config.model_impl", "auto", "vllm"), *OWN_MODELS),
    Option("--weight-transfer-config", part("weight_transfer_config"), "weights are read once, from files"),
    # Where memory is, and what is in it.
    Option("--cpu-offload-gb", field("offload_config.uva.cpu_offload_gb"), *ONE_PLACE),
    Option("--offload-group-size", field("offload_config.prefetch.offload_group_size"), *ONE_PLACE),
    Option("--kv-offloading-size", field("cache_config.kv_offloading_size"), "the KV cache is in one place", "set --kv-cache-memory-bytes"),
    Option("--kv-transfer-config", part("kv_transfer_config"), "KV caches are not moved between engines"),
    Option("--ec-transfer-config", part("ec_transfer_config"), *TEXT_ALONE),
    Option(
        "--kv-cache-dtype",
        field("cache_config.cache_dtype", *KV_DTYPES),
        "the KV cache is float16, bfloat16 or of a kv_scheme",
        """choose one of these, or a scheme with --additional-config '{"kv_scheme": "turbo8v4"}'""",
    ),
    Option("--kv-cache-dtype-skip-layers", skip_layers, "a scheme says itself what first and last layers are", "set kv_boundary"),
    Option("--kv-sharing-fast-prefill", field("cache_config.kv_sharing_fast_prefill"), "prefill computes every layer"),
    Option("--block-size", block_size, f"blocks have {BLOCK_SIZE} tokens or a multiple", "choose 16, 32 or 64"),
    Option(
        "--sleep-preserve-parameter-names",
        any_of("model_config.sleep_preserve_parameter_names"),
        "sleep gives back all weights, and waking up reads them from the file again",
    ),
    Option("--sleep-mode-backend", field("model_config.sleep_mode_backend", "cumem"), "metalstep gives memory back in one way"),
    # What a step does and reports.
    Option(
        "--logits-processors",
        field("model_config.logits_processors"),
        "the sampler runs on the device and calls no Python",
        "use logit_bias, allowed_token_ids, bad_words or structured outputs in requests",
    ),
    Option(
        "--logprobs-mode",
        field("model_config.logprobs_mode", "raw_logprobs"),
        "log probabilities are the model's own, before biases and filters",
        "use raw_logprobs",
    ),
    Option("--return-sampling-mask", field("model_config.return_sampling_mask"), *NOT_REPORTED),
    Option("--enable-return-routed-experts", any_of("aux_output_config.enabled"), *NOT_REPORTED),
    Option("--use-fp64-gumbel", field("model_config.use_fp64_gumbel"), "the sampler draws in float32"),
    Option("--enable-trace-replay", field("model_config.enable_trace_replay"), "the sampler draws every token itself"),
    Option("--scheduler-cls", scheduler, "metalstep has a scheduler class of its own"),
    Option("--profiler-config", field("profiler_config.profiler"), *ONE_CALL),
    Option("--collect-detailed-traces", any_of("observability_config.collect_detailed_traces"), *ONE_CALL),
    Option("--enable-layerwise-nvtx-tracing", field("observability_config.enable_layerwise_nvtx_tracing"), *ONE_CALL),
)

# What vLLM finds fault with itself before it asks the platform, in words that do not help here.
EARLY = (
    *("--tensor-parallel-size", "--pipeline-parallel-size", "--prefill-context-parallel-size", "--decode-context-parallel-size"),
    *("--enable-expert-parallel", "--enable-lora"),
)

NO_EFFECT: dict[str, Given] = {
    "--enforce-eager": field("model_config.enforce_eager"),
    "--compilation-config": any_of("compilation_config.cudagraph_capture_sizes"),
    "--optimization-level": lambda config: getattr(config.optimization_level, "value", config.optimization_level) != 2,
    "--attention-backend": field("attention_config.backend"),
    "--moe-backend": field("kernel_config.moe_backend", "auto"),
    "--linear-backend": field("kernel_config.linear_backend", "auto"),
    "--monokernel": field("kernel_config.monokernel"),
    "--max-parallel-loading-workers": field("parallel_config.max_parallel_loading_workers"),
    "--safetensors-load-strategy": field("load_config.safetensors_load_strategy"),
}


def check_arguments(args: Any) -> None:
    """Of parsed arguments, those of EARLY. Raises: Refusal."""
    for option in OPTIONS:
        value = getattr(args, option.name.removeprefix("--").replace("-", "_"), None)
        if option.name in EARLY and (value is True or (isinstance(value, int) and value > 1)):
            raise option.refusal(value)


def check_config(vllm_config: Any) -> None:
    """Raises: Refusal for the first option that metalstep does not do."""
    for option in OPTIONS if vllm_config.model_config is not None else ():
        if value := option.given(vllm_config):
            raise option.refusal(value)


def no_effect(vllm_config: Any) -> list[str]:
    """The options of NO_EFFECT that were given."""
    return [name for name, given in NO_EFFECT.items() if given(vllm_config)] if vllm_config.model_config is not None else []


def check_request(processed_inputs: Any, params: Any, vocab_size: int | None) -> None:
    """vocab_size: of the model, or None where it is not known. Raises: VLLMValidationError, which is HTTP 400."""
    from vllm.exceptions import VLLMValidationError

    from metalstep.plugin import sampling

    kind = processed_inputs.get("type") if isinstance(processed_inputs, dict) else None
    if kind not in (None, "token"):
        raise VLLMValidationError(f"metalstep generates text from text alone, and the prompt is of type {kind!r}; send text or token ids")
    if not hasattr(params, "temperature"):  # PoolingParams
        raise VLLMValidationError("metalstep generates text, it does not embed or classify it; use /v1/completions or /v1/chat/completions")
    if vocab_size is None:
        return
    try:
        sampling.check(params, vocab_size)
    except ValueError as error:
        raise VLLMValidationError(str(error)) from error
