"""Stands in for vLLM's model classes: vLLM reads from a class what a model can do, and would import torch code in a process of its own
to find that out (10 s). The engine's own model is mlx-lm's.
"""
from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

# mlx-lm's model types and the architecture names that their config.json files bear.
ARCHITECTURES: dict[str, tuple[str, ...]] = {
    "Klear": ("KlearMoeForCausalLM",),
    "afm7": ("AFM7ForCausalLM",),
    "afmoe": ("AfmoeForCausalLM",),
    "apertus": ("ApertusForCausalLM",),
    "baichuan_m1": ("BaichuanM1ForCausalLM",),
    "bailing_hybrid": ("BailingHybridForCausalLM",),
    "bailing_moe": ("BailingMoeForCausalLM", "BailingMoeV2ForCausalLM"),
    "bailing_moe_linear": ("BailingMoeLinearForCausalLM", "BailingMoeLinearV2ForCausalLM", "BailingMoeV2_5ForCausalLM"),
    "bailing_moe_v3": ("BailingMoeV3ForCausalLM",),
    "bitnet": ("BitNetForCausalLM", "BitnetForCausalLM"),
    "cohere": ("CohereForCausalLM",),
    "cohere2": ("Cohere2ForCausalLM",),
    "dbrx": ("DbrxForCausalLM",),
    "deepseek": ("DeepseekForCausalLM",),
    "deepseek_v2": ("DeepseekV2ForCausalLM",),
    "deepseek_v3": ("DeepseekV3ForCausalLM",),
    "deepseek_v32": ("DeepseekV32ForCausalLM",),
    "dots1": ("Dots1ForCausalLM",),
    "ernie4_5": ("Ernie4_5ForCausalLM", "Ernie4_5_ForCausalLM"),
    "ernie4_5_moe": ("Ernie4_5_MoeForCausalLM", "Ernie4_5_MoEForCausalLM"),
    "exaone": ("ExaoneForCausalLM",),
    "exaone4": ("Exaone4ForCausalLM",),
    "exaone_moe": ("ExaoneMoeForCausalLM", "ExaoneMoEForCausalLM"),
    "falcon_h1": ("FalconH1ForCausalLM",),
    "gemma": ("GemmaForCausalLM",),
    "gemma2": ("Gemma2ForCausalLM",),
    "gemma3": ("Gemma3ForConditionalGeneration",),
    "gemma3_text": ("Gemma3ForCausalLM",),
    "gemma3n": ("Gemma3nForConditionalGeneration", "Gemma3nForCausalLM"),
    "gemma4": ("Gemma4ForConditionalGeneration", "Gemma4UnifiedForConditionalGeneration"),
    "gemma4_text": ("Gemma4ForCausalLM",),
    "glm": ("GlmForCausalLM",),
    "glm4": ("Glm4ForCausalLM",),
    "glm4_moe": ("Glm4MoeForCausalLM",),
    "glm4_moe_lite": ("Glm4MoeLiteForCausalLM",),
    "glm_moe_dsa": ("GlmMoeDsaForCausalLM",),
    "gpt2": ("GPT2LMHeadModel",),
    "gpt_bigcode": ("GPTBigCodeForCausalLM",),
    "gpt_neox": ("GPTNeoXForCausalLM",),
    "gpt_oss": ("GptOssForCausalLM",),
    "gptj": ("GPTJForCausalLM",),
    "granite": ("GraniteForCausalLM",),
    "granitemoe": ("GraniteMoeForCausalLM",),
    "granitemoehybrid": ("GraniteMoeHybridForCausalLM",),
    "helium": ("HeliumForCausalLM",),
    "hunyuan": ("HunYuanForCausalLM", "HunYuanMoEV1ForCausalLM"),
    "hunyuan_v1_dense": ("HunYuanDenseV1ForCausalLM",),
    "internlm2": ("InternLM2ForCausalLM",),
    "internlm3": ("InternLM3ForCausalLM",),
    "iquestloopcoder": ("IQuestLoopCoderForCausalLM",),
    "jamba": ("JambaForCausalLM",),
    "kimi_k25": ("KimiK25ForConditionalGeneration",),
    "kimi_linear": ("KimiLinearForCausalLM",),
    "kimi_vl": ("KimiVLForConditionalGeneration",),
    "laguna": ("LagunaForCausalLM",),
    "lfm2": ("Lfm2ForCausalLM",),
    "lfm2-vl": ("Lfm2VlForConditionalGeneration",),
    "lfm2_moe": ("Lfm2MoeForCausalLM",),
    "lille-130m": ("LilleForCausalLM",),
    "llama": ("LlamaForCausalLM", "LLaMAForCausalLM", "MistralForCausalLM", "IQuestCoderForCausalLM", "XverseForCausalLM"),
    "llama4": ("Llama4ForConditionalGeneration",),
    "llama4_text": ("Llama4ForCausalLM",),
    "longcat_flash": ("LongcatFlashForCausalLM",),
    "longcat_flash_ngram": ("LongcatFlashNgramForCausalLM",),
    "mamba": ("MambaForCausalLM", "FalconMambaForCausalLM"),
    "mamba2": ("Mamba2ForCausalLM",),
    "mellum": ("MellumForCausalLM",),
    "mimo": ("MiMoForCausalLM",),
    "mimo_v2_flash": ("MiMoV2FlashForCausalLM",),
    "minicpm": ("MiniCPMForCausalLM",),
    "minicpm3": ("MiniCPM3ForCausalLM",),
    "minimax": ("MiniMaxM2ForCausalLM",),
    "ministral3": ("Ministral3ForCausalLM",),
    "mistral3": ("Mistral3ForConditionalGeneration", "LlavaForConditionalGeneration"),
    "mixtral": ("MixtralForCausalLM",),
    "nanochat": ("NanoChatForCausalLM",),
    "nemotron": ("NemotronForCausalLM",),
    "nemotron-nas": ("DeciLMForCausalLM",),
    "nemotron_h": ("NemotronHForCausalLM",),
    "olmo": ("OlmoForCausalLM", "OLMoForCausalLM"),
    "olmo2": ("Olmo2ForCausalLM",),
    "olmo3": ("Olmo3ForCausalLM",),
    "olmo_hybrid": ("OlmoHybridForCausalLM",),
    "olmoe": ("OlmoeForCausalLM",),
    "openelm": ("OpenELMForCausalLM",),
    "phi": ("PhiForCausalLM",),
    "phi3": ("Phi3ForCausalLM",),
    "phi3small": ("Phi3SmallForCausalLM",),
    "phimoe": ("PhiMoEForCausalLM", "PhimoeForCausalLM"),
    "plamo": ("PlamoForCausalLM",),
    "plamo2": ("Plamo2ForCausalLM",),
    "plamo3": ("Plamo3ForCausalLM",),
    "qwen": ("QWenLMHeadModel",),
    "qwen2": ("Qwen2ForCausalLM",),
    "qwen2_moe": ("Qwen2MoeForCausalLM",),
    "qwen2_vl": ("Qwen2VLForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration"),
    "qwen3": ("Qwen3ForCausalLM",),
    "qwen3_5": ("Qwen3_5ForConditionalGeneration", "Qwen3_5ForCausalLM"),
    "qwen3_5_moe": ("Qwen3_5MoeForConditionalGeneration", "Qwen3_5MoeForCausalLM"),
    "qwen3_moe": ("Qwen3MoeForCausalLM",),
    "qwen3_next": ("Qwen3NextForCausalLM",),
    "qwen3_vl": ("Qwen3VLForConditionalGeneration",),
    "qwen3_vl_moe": ("Qwen3VLMoeForConditionalGeneration",),
    "recurrent_gemma": ("RecurrentGemmaForCausalLM",),
    "rwkv7": ("RWKV7ForCausalLM",),
    "seed_oss": ("SeedOssForCausalLM",),
    "smollm3": ("SmolLM3ForCausalLM",),
    "solar_open": ("SolarOpenForCausalLM",),
    "stablelm": ("StableLmForCausalLM", "StableLMEpochForCausalLM"),
    "starcoder2": ("Starcoder2ForCausalLM",),
    "step3p5": ("Step3p5ForCausalLM",),
    "telechat3": ("TeleChat3ForCausalLM",),
    "youtu_llm": ("YoutuForCausalLM", "YoutuLLMForCausalLM"),
}


def register() -> None:
    """Tell vLLM that every architecture above generates text. Safe to call again."""
    for architecture in sorted({name for names in ARCHITECTURES.values() for name in names}):
        register_architecture(architecture)


def register_architecture(architecture: str) -> None:
    """Tell vLLM that the models of `architecture` generate text, from text alone: no images, no state that vLLM would keep."""
    from vllm.model_executor.models import ModelRegistry

    ModelRegistry.register_model(architecture, _text_model())


def register_unknown(architectures: Iterable[str]) -> None:
    """Likewise for those of a config.json that vLLM does not know either: whether mlx-lm has the model turns out when it is loaded."""
    from vllm.model_executor.models import ModelRegistry

    for architecture in set(architectures) - ModelRegistry.get_supported_archs():
        register_architecture(architecture)


@cache
def _text_model() -> type[Any]:
    """The class, made on first use: torch is imported only where vLLM has imported it."""
    from torch import nn

    class MetalstepForCausalLM(nn.Module):
        """What vLLM looks for in a model that generates text. Never instantiated."""

        def __init__(self, *, vllm_config: Any, prefix: str = ""):
            raise NotImplementedError("metalstep runs mlx-lm's model; vLLM's own model runner cannot be used with it")

        def embed_input_ids(self, input_ids: Any) -> Any:
            raise NotImplementedError

        def forward(self, input_ids: Any, positions: Any) -> Any:
            raise NotImplementedError

        def compute_logits(self, hidden_states: Any) -> Any:
            raise NotImplementedError

    return MetalstepForCausalLM
