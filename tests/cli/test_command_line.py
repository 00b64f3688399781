"""The command line without a model: help, versions, and errors that are one line and a hint."""

import errno
import importlib
import os
import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest

from metalstep.cli import chat, generate
from metalstep.cli import main as command
from metalstep.cli.errors import CommandError, report
from metalstep.cli.parser import Parser


def run(capsys, *argv):
    """Exit status, stdout and stderr of `metalstep ARGV`."""
    status = command.main(list(argv))
    out, err = capsys.readouterr()
    return status, out, err


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"], ["help"]])
def test_help_names_every_command(capsys, argv):
    status, out, err = run(capsys, *argv)
    assert status == 0
    assert all(name in out for name in command.COMMANDS)
    assert err == ""


def test_version_prints_what_results_depend_on(capsys):
    status, out, _ = run(capsys, "--version")
    assert status == 0
    names = [line.split()[0] for line in out.splitlines()]
    assert names[:5] == ["metalstep", "mlx", "mlx-lm", "python", "abi"]
    assert names[5:] in (["isa"], ["native"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["frobnicate"], "no command 'frobnicate', expected one of generate, chat, serve, setup"),
        (["--frobnicate"], "unknown option '--frobnicate', expected one of --help, --version, --debug"),
        (["generate"], "the following arguments are required: --model"),
        (["generate", "--model", "m", "--prompt", "p", "--frobnicate"], "unrecognized arguments: --frobnicate"),
        (["generate", "--model", "m", "--prompt", "p", "--temp", "hot"], "argument --temp: invalid float value: 'hot'"),
        (
            ["generate", "--model", "m", "--prompt", "p", "--temp", "nan"],
            "temperature is nan, expected a finite number",
        ),
        (["generate", "--model", "m", "--prompt", "p", "--top-p", "1.5"], "top_p is 1.5"),
        (["generate", "--model", "m", "--prompt", "p", "--seed", "-1"], "seed is -1"),
        (["generate", "--model", "m", "--prompt", "p", "--max-tokens", "0"], "max_tokens is 0, expected an integer above 0"),
        (["generate", "--model", "m", "--prompt", "p", "--max-tokens", "-2"], "max_tokens is -2"),
        (["generate", "--model", "m", "--prompt", ""], "the prompt is empty"),
        (
            ["generate", "--model", "m", "--prompt", "p", "--device", "abacus"],
            "argument --device: invalid choice: 'abacus'",
        ),
        (
            ["generate", "--model", "m", "--prompt", "p", "--threads", "0"],
            "argument --threads: '0' is not an integer above 0",
        ),
        (["generate", "--model", "m", "--prompt", "p", "--chat-template-config", "[1]"], "'[1]' is not a JSON object"),
        (["generate", "--model", "m", "--prompt", "p", "--verbose", "maybe"], "'maybe' is neither true nor false"),
        (["generate", "--model", "m", "--prompt", "p", "--min-tokens-to-keep", "0"], "min_tokens_to_keep is 0"),
        (["generate", "--model", "m", "--prompt", "p", "--xtc-probability", "2"], "xtc_probability is 2.0"),
        (["generate", "--model", "m", "--prompt", "p", "--repetition-penalty", "-1"], "repetition_penalty is -1.0"),
        (["generate", "--model", "m", "--prompt", "p", "--presence-penalty", "inf"], "presence_penalty is inf"),
        (["generate", "--model", "m", "--prompt", "p", "--logit-bias", '{"x": 1}'], "is not a JSON object from token ids"),
        (["generate", "--model", "m", "--prompt", "p", "--logit-bias", '{"1": "x"}'], "is not a JSON object from token ids"),
        (["generate", "--model", "m", "--prompt", "p", "--logit-bias", '{"1": NaN}'], "the logit_bias of token 1 is nan"),
        (["generate", "--model", "m", "--prompt", "p", "--max-kv-size", "0"], "argument --max-kv-size: '0' is not an integer"),
        (["generate", "--model", "m", "--prompt", "p", "--kv-memory", "0"], "argument --kv-memory: '0' is neither a size"),
        (["generate", "--draft-model", "d"], "--draft-model: speculative decoding is not supported"),
        (["generate", "--use-default-chat-template"], "--use-default-chat-template: tokenizers have no default chat template"),
        (["generate", "-qa"], "-qa: it has another name here"),
        (["generate", "--adapter-path", "a"], "--adapter-path: adapters are not supported"),
        (["generate", "--kv-bits", "4"], "--kv-bits: the KV cache is quantised as a scheme says"),
        (["generate", "--image", "a.png", "b.png"], "--image: images are not supported"),
        (["chat"], "the following arguments are required: --model"),
        (["explain"], "the following arguments are required: MODEL"),
        (["bench", "frobnicate"], "no benchmark 'frobnicate', expected one of decode, prefill, launches, sampling, kv, quality"),
        (["bench", "decode", "--against", "vllm"], "--against: no peer 'vllm', expected mlx-lm or llama.cpp"),
        (["bench", "decode", "--context", "64,x"], "argument --context: 'x' is not an integer above 0"),
        (["bench", "quality", "--device", "eager"], "--device eager compares MLX with itself"),
    ],
)
def test_a_wrong_call_is_one_line_and_status_2(capsys, argv, message):
    status, out, err = run(capsys, *argv)
    assert status == 2
    assert out == ""
    first, *rest = err.splitlines()
    assert first.startswith("error: ")
    assert message in first
    assert len(rest) <= 1
    assert all(line.startswith("hint: ") for line in rest)


@pytest.mark.parametrize(("ours", "module"), [(generate, "mlx_lm.generate"), (chat, "mlx_lm.chat")])
def test_every_option_of_mlx_lms_command_is_taken_or_refused_by_name(ours, module):
    theirs = importlib.import_module(module).setup_arg_parser()
    options, known = ({o for action in p._actions for o in action.option_strings} for p in (theirs, ours.parser()))
    assert options - known == set()


@pytest.mark.parametrize("call", [["generate", "a b.gguf", "--prompt", "p"], ["chat", "a b.gguf"], ["bench", "decode", "a b.gguf"]])
def test_a_model_without_its_option_is_told_the_option(capsys, call):
    status, _, err = run(capsys, *call)
    words = " ".join(call[: call.index("a b.gguf")])
    assert status == 2 and f"hint: name the model behind its option: metalstep {words} --model 'a b.gguf'" in err


def test_a_missing_model_file_is_one_line(capsys, tmp_path):
    status, out, err = run(capsys, "explain", str(tmp_path / "absent.gguf"))
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert "absent.gguf" in err
    assert "Traceback" not in err


def test_a_terminal_shows_a_name_and_does_not_obey_it(capsys):
    status, _, err = run(capsys, "explain", "red\x1b[31m\x9b2J")
    assert status == 2 and not {"\x1b", "\x9b"} & set(err)
    report(ValueError("named \x1b[2J here; do \x1b[31m that"))
    assert capsys.readouterr().err == "error: named \N{REPLACEMENT CHARACTER}[2J here\nhint: do \N{REPLACEMENT CHARACTER}[31m that\n"


def test_what_to_do_becomes_the_hint(capsys):
    report(ValueError("weight has shape (32,), expected (64,); pass this layer's own weight"))
    assert (
        capsys.readouterr().err == "error: weight has shape (32,), expected (64,)\nhint: pass this layer's own weight\n"
    )


def test_a_warning_is_one_line_and_a_hint(capsys):
    command.show_warning("no launcher: looked for x; run make build\nRunning eagerly.", RuntimeWarning, "f.py", 1)
    assert capsys.readouterr().err == "warning: no launcher: looked for x. Running eagerly.\nhint: run make build\n"


def test_a_message_of_the_system_is_not_split(capsys):
    report(FileNotFoundError(2, "No such file; really", "a; b"))
    assert capsys.readouterr().err == "error: a; b: No such file; really\n"
    report(OSError(errno.ENOSPC, "No space left on device"))
    assert capsys.readouterr().err == "error: No space left on device\nhint: free some space, or write to another disk\n"
    report(OSError("the disk is full; make room"))
    assert capsys.readouterr().err == "error: the disk is full\nhint: make room\n"


def test_the_parser_raises_instead_of_exiting():
    with pytest.raises(CommandError, match="unrecognized arguments: --x") as error:
        Parser("metalstep test", "").parse_args(["--x"])
    assert error.value.hint == "metalstep test --help"


def test_another_packages_command_is_found_and_gets_its_arguments(capsys, monkeypatch):
    def serve(argv):
        """serve a model"""
        print("serving", *argv)
        return 7

    entry = EntryPoint("serve", "nowhere:serve", command.GROUP)
    monkeypatch.setattr(EntryPoint, "load", lambda self: serve)
    monkeypatch.setattr(command, "plugins", lambda: {"serve": entry})
    assert run(capsys, "serve", "--port", "1") == (7, "serving --port 1\n", "")
    assert "serve a model" in run(capsys, "--help")[1]


def test_an_interrupt_is_status_130_without_a_traceback(capsys, monkeypatch):
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "run", interrupted)
    assert run(capsys, "generate") == (130, "", "\n")


def test_a_closed_pipe_ends_quietly():
    reader, writer = os.pipe()
    os.close(reader)
    run = subprocess.run([sys.executable, "-m", "metalstep.cli.main", "--help"], stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (run.returncode, run.stderr) == (141, b"")
