"""Which of vLLM's parsers a model's answers need: a chat template shows how its model writes tool calls and thoughts.

vLLM has a parser for each way to write them and asks the user for its name. Templates name the marks, so the name follows from them.
"""
from __future__ import annotations

import argparse
import json
import logging
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

logger = logging.getLogger("vllm.metalstep")
FILES = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")  # that hold a template, in the order that counts


@dataclass(frozen=True)
class Rule:
    """parser: vLLM's name. marks: that the template has, all of them. model_types: of config.json; empty: any."""

    parser: str
    marks: tuple[str, ...]
    model_types: tuple[str, ...] = ()

    def fits(self, template: str, model_type: str) -> bool:
        return all(mark in template for mark in self.marks) and (not self.model_types or model_type in self.model_types)


# The first that fits counts: marks that several templates share come last.
TOOL_RULES = (
    Rule("openai", ("<|channel|>", "to=functions")),
    Rule("minimax_m2", ("<minimax:tool_call>",)),
    Rule("gemma4", ("<|tool_call>", "<tool_call|>")),
    Rule("functiongemma", ("<start_function_call>",)),
    Rule("longcat", ("<longcat_tool_call>",)),
    Rule("seed_oss", ("<seed:tool_call>",)),
    Rule("glm45", ("<tool_call>{function-name}\n<arg_key>",)),
    Rule("glm47", ("<tool_call>{function-name}<arg_key>",)),
    Rule("glm45", ("<arg_key>",), ("glm4_moe",)),
    Rule("glm47", ("<arg_key>",)),
    Rule("lfm2", ("<|tool_call_start|>",)),
    Rule("lfm2", ("<|tool_list_start|>",)),
    Rule("step3p5", ("<tool_call>", "<function="), ("step3p5",)),
    Rule("qwen3_coder", ("<tool_call>", "<function=", "<parameter=")),
    Rule("kimi_k2", ("<|tool_calls_section_begin|>",)),
    Rule("deepseek_v3", ("<｜tool▁calls▁begin｜>", "```json")),
    Rule("deepseek_v31", ("<｜tool▁calls▁begin｜>",)),
    Rule("minicpm5", ('<function name="', '<param name="')),
    Rule("mistral", ("[TOOL_CALLS]",)),
    Rule("cohere_command3", ("<|START_ACTION|>",)),
    Rule("apertus", ("<|tools_prefix|>",)),
    Rule("internlm", ("<|action_start|>", "<|plugin|>")),
    Rule("olmo3", ("<function_calls>",)),
    Rule("jamba", ("<tool_calls>",), ("jamba",)),
    Rule("hunyuan_a13b", ("<tool_calls>",), ("hunyuan", "hunyuan_v1_moe", "hunyuan_v1_dense")),
    Rule("llama4_pythonic", ("<|header_start|>", "<|python_start|>")),
    Rule("llama3_json", ("<|start_header_id|>", '{"name": function name, "parameters"')),
    Rule("granite", ("<|start_of_role|>", "<|tool_call|>")),
    Rule("granite4", ("<|start_of_role|>", "<tool_call>")),
    Rule("ernie45", ("<tool_call>",), ("ernie4_5", "ernie4_5_moe")),
    Rule("hermes", ("<tool_call>", "</tool_call>")),
)
REASONING_RULES = (
    Rule("openai_gptoss", ("<|channel|>", "analysis")),
    Rule("gemma4", ("<|channel>", "enable_thinking")),
    Rule("minimax_m2", ("<minimax:tool_call>", "<think>")),
    Rule("seed_oss", ("<seed:think>",)),
    Rule("mistral", ("[THINK]",)),
    Rule("glm45", ("<think>", "<tool_call>{function-name}\n<arg_key>")),
    Rule("glm45", ("<think>", "<arg_key>"), ("glm4_moe",)),
    Rule("glm47", ("<think>", "<arg_key>")),
    Rule("kimi_k2", ("<think>", "<|tool_calls_section_begin|>")),
    Rule("granite", ("Here is my thought process",)),
    Rule("olmo3", ("<think>",), ("olmo3", "olmo_hybrid")),
    Rule("nemotron_v3", ("<think>", "enable_thinking"), ("nemotron_h",)),
    Rule("step3p5", ("<think>",), ("step3p5",)),
    Rule("ernie45", ("<think>",), ("ernie4_5_moe",)),
    Rule("hunyuan_a13b", ("<think>", "enable_thinking"), ("hunyuan", "hunyuan_v1_moe", "hunyuan_v1_dense")),
    Rule("deepseek_v3", ("<think>", "<｜Assistant｜>", "thinking is defined")),
    Rule("deepseek_r1", ("<think>", "<｜Assistant｜>")),
    Rule("qwen3", ("<think>", "enable_thinking")),
    Rule("qwen3", ("<|im_start|>assistant\n<think>\n",)),
)


def choose_parsers(args: argparse.Namespace) -> None:
    """Set the tool and reasoning parsers that `args` (vLLM's) leave open, and say so in the log."""
    from vllm.reasoning import ReasoningParserManager
    from vllm.tool_parsers import ToolParserManager

    open_tool = not (args.tool_call_parser or args.enable_auto_tool_choice or args.tool_parser_plugin)
    open_reasoning = not (args.reasoning_parser or args.structured_outputs_config.reasoning_parser or args.reasoning_parser_plugin)
    if not (open_tool or open_reasoning):
        return
    template = chat_template(args.chat_template, args.model)
    if template is None:
        return
    model_type = str(read_json(model_file(args.model, "config.json")).get("model_type", ""))
    if open_tool and (name := tool_parser(template, model_type, ToolParserManager.list_registered())):
        args.tool_call_parser, args.enable_auto_tool_choice = name, True
        logger.info("The chat template has tools: --enable-auto-tool-choice --tool-call-parser %s", name)
    if open_reasoning and (name := reasoning_parser(template, model_type, ReasoningParserManager.list_registered())):
        args.reasoning_parser = name
        logger.info("The chat template has thoughts: --reasoning-parser %s", name)


def tool_parser(template: str, model_type: str, registered: Collection[str]) -> str | None:
    """The tool parser for a template, if vLLM has it; None for a template that is not given tools."""
    return _first(TOOL_RULES, template, model_type, registered) if re.search(r"\btools\b", template) else None


def reasoning_parser(template: str, model_type: str, registered: Collection[str]) -> str | None:
    """The reasoning parser for a template, if vLLM has it; None for a model that does not think, or always."""
    return _first(REASONING_RULES, template, model_type, registered)


def _first(rules: Iterable[Rule], template: str, model_type: str, registered: Collection[str]) -> str | None:
    # A template writes a line break inside of a Jinja string as \n.
    text = template.replace("\\n", "\n")
    name = next((rule.parser for rule in rules if rule.fits(text, model_type)), None)
    return name if name in registered else None


def chat_template(chosen: str | None, model: str) -> str | None:
    """The template that vLLM will use. chosen: --chat-template, a file or the text itself. model: a folder or a Hugging Face id."""
    if chosen is not None:
        path = Path(chosen)
        try:
            return path.read_text("utf-8") if path.is_file() else chosen
        except OSError:  # a text too long for a file name
            return chosen
    for name in FILES:
        file = model_file(model, name)
        if file is None:
            continue
        if name.endswith(".jinja"):
            return file.read_text("utf-8")
        template = read_json(file).get("chat_template")
        if isinstance(template, list):  # several by name
            named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
            template = named.get("tool_use") or named.get("default")
        if isinstance(template, str):
            return template
    return None


def model_file(model: str, name: str) -> Path | None:
    """A small file of a model, downloaded where the model is a Hugging Face id; None if there is none or it cannot be had."""
    folder = Path(model)
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    cached = try_to_load_from_cache(model, name)
    if cached is not None:
        return Path(cached) if isinstance(cached, str) else None  # else: known not to exist
    try:
        return Path(hf_hub_download(model, name))
    except Exception:  # offline, gated, no such file: vLLM reports what it needs itself
        return None


def read_json(file: Path | None) -> dict[str, Any]:
    """An object, empty where the file is none."""
    try:
        value = json.loads(file.read_text("utf-8")) if file is not None else {}
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
