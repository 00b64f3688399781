"""The parsers for tool calls and thoughts follow from marks in chat templates. The fragments below are of published models."""
from __future__ import annotations

import argparse
import json

import pytest
from vllm.reasoning import ReasoningParserManager
from vllm.tool_parsers import ToolParserManager

from metalstep.plugin import parsers
from metalstep.plugin.parsers import (
    REASONING_RULES,
    TOOL_RULES,
    chat_template,
    choose_parsers,
    reasoning_parser,
    tool_parser,
)

TOOLS = ToolParserManager.list_registered()
THOUGHTS = ReasoningParserManager.list_registered()

SMOLLM2 = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}"""
QWEN2_5 = r"""{%- if tools %}
    {{- "\n\nFor each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:\n<tool_call>\n{\"name\": <function-name>, \"arguments\": <args-json-object>}\n</tool_call><|im_end|>\n" }}"""  # noqa: E501
QWEN3 = QWEN2_5 + r"""{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}"""
QWEN3_THINKING = QWEN2_5 + r"""{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n<think>\n' }}"""
QWEN3_CODER = r"""{%- if tools %}{{- "If you choose to call a function ONLY reply in the following format with NO suffix:\n\n<tool_call>\n<function=example_function_name>\n<parameter=example_parameter_1>\nvalue_1\n</parameter>" }}"""  # noqa: E501
LLAMA3 = r"""{%- if tools is not none and not tools_in_user_message %}
{{- '<|start_header_id|>system<|end_header_id|>' }}
{{- 'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.' }}"""
MISTRAL = r"""{%- for tool in tools %}[AVAILABLE_TOOLS]{% endfor %}{{- "[TOOL_CALLS] [" }}"""
GPT_OSS = r"""{%- macro render_tool_namespace(namespace_name, tools) -%}
{{- "<|start|>assistant to=functions." + tool_call.name + "<|channel|>commentary json<|message|>" }}
{{- "<|start|>assistant<|channel|>analysis<|message|>" + message.thinking + "<|end|>" }}"""
GLM4_5 = """{%- if tools -%}<|system|>
For each function call, output the function name and arguments within the following XML format:
<tool_call>{function-name}
<arg_key>{arg-key-1}</arg_key>
<arg_value>{arg-value-1}</arg_value>{{ '\\n<think></think>' }}"""
LFM2 = r"""{%- if tools -%}{{ "List of tools: <|tool_list_start|>[" }}"""
DEEPSEEK_R1 = r"""{% for tool in message['tool_calls'] %}
{{'<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>' + tool['type'] + '\n' + '```json' }}
{% if tools %}{% endif %}{{'<｜Assistant｜><think>\n'}}"""
GEMMA4 = r"""{%- if tools -%}<|tool>{{ '<|tool_call>call:' }}<tool_call|>{% if enable_thinking %}<|channel>thought"""


@pytest.mark.parametrize(
    ("template", "model_type", "tool", "thought"),
    [
        (SMOLLM2, "llama", None, None),
        (QWEN2_5, "qwen2", "hermes", None),
        (QWEN3, "qwen3", "hermes", "qwen3"),
        (QWEN3_THINKING, "qwen3", "hermes", "qwen3"),
        (QWEN3_CODER, "qwen3_moe", "qwen3_coder", None),
        (LLAMA3, "llama", "llama3_json", None),
        (MISTRAL, "mistral", "mistral", None),
        (GPT_OSS, "gpt_oss", "openai", "openai_gptoss"),
        (GLM4_5, "glm4_moe", "glm45", "glm45"),
        (LFM2, "lfm2", "lfm2", None),
        (DEEPSEEK_R1, "qwen2", "deepseek_v3", "deepseek_r1"),
        (GEMMA4, "gemma4_text", "gemma4", "gemma4"),
        ("", "", None, None),
    ],
)
def test_a_template_shows_which_parsers_its_model_needs(template, model_type, tool, thought):
    assert tool_parser(template, model_type, TOOLS) == tool
    assert reasoning_parser(template, model_type, THOUGHTS) == thought


def test_a_template_that_is_given_no_tools_gets_no_tool_parser():
    assert tool_parser("<tool_call></tool_call> toolset", "qwen2", TOOLS) is None


def test_only_parsers_that_vllm_has_are_chosen():
    assert tool_parser(QWEN2_5, "qwen2", ["mistral"]) is None
    assert reasoning_parser(QWEN3, "qwen3", []) is None


def test_every_parser_of_the_tables_is_vllms():
    assert {rule.parser for rule in TOOL_RULES} <= set(TOOLS)
    assert {rule.parser for rule in REASONING_RULES} <= set(THOUGHTS)


def test_templates_are_found_where_models_have_them(tmp_path):
    model = str(tmp_path)
    assert chat_template(None, model) is None
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "of the tokenizer"}))
    assert chat_template(None, model) == "of the tokenizer"
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "with tools"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert chat_template(None, model) == "with tools"
    (tmp_path / "chat_template.jinja").write_text("a file of its own")
    assert chat_template(None, model) == "a file of its own"
    assert chat_template("{{ text }}", model) == "{{ text }}"
    assert chat_template(str(tmp_path / "chat_template.jinja"), model) == "a file of its own"
    assert chat_template("x" * 5000, model) == "x" * 5000


def arguments(model, **given):
    """vLLM's arguments, as far as parsers are concerned."""
    none = dict(chat_template=None, enable_auto_tool_choice=False, tool_call_parser=None, tool_parser_plugin="")
    none |= dict(reasoning_parser="", reasoning_parser_plugin="", structured_outputs_config=argparse.Namespace(reasoning_parser=""))
    return argparse.Namespace(model=str(model), **{**none, **given})


@pytest.fixture
def qwen3(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    (tmp_path / "chat_template.jinja").write_text(QWEN3)
    logged = []
    monkeypatch.setattr(parsers.logger, "info", lambda text, *values: logged.append(text % values))
    return tmp_path, logged


def test_what_was_chosen_is_set_and_said(qwen3):
    model, logged = qwen3
    args = arguments(model)
    choose_parsers(args)
    assert (args.enable_auto_tool_choice, args.tool_call_parser, args.reasoning_parser) == (True, "hermes", "qwen3")
    assert any("--tool-call-parser hermes" in line for line in logged)
    assert any("--reasoning-parser qwen3" in line for line in logged)


@pytest.mark.parametrize(
    "given",
    [
        {"tool_call_parser": "xlam", "enable_auto_tool_choice": True, "reasoning_parser": "granite"},
        {"tool_parser_plugin": "mine.py", "reasoning_parser_plugin": "mine.py"},
        {"enable_auto_tool_choice": True, "structured_outputs_config": argparse.Namespace(reasoning_parser="granite")},
    ],
)
def test_what_the_user_says_stays(qwen3, given):
    model, logged = qwen3
    args = arguments(model, **given)
    before = vars(args).copy()
    choose_parsers(args)
    assert vars(args) == before
    assert logged == []
