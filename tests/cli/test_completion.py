"""Completion, asked in the shells themselves: what a command, an option or a value may be, against the parsers."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from metalstep.cli import main as command
from metalstep.cli.completion import SHELLS
from metalstep.cli.completion_words import TOP, WORDS, places
from metalstep.cli.parsers import all_parsers

HERE = [shell for shell in SHELLS if shutil.which(shell)]  # bash is always here


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    """The file of each shell's script."""
    folder = tmp_path_factory.mktemp("completion")
    found = {}
    for shell, written in SHELLS.items():
        found[shell] = folder / f"metalstep.{shell}"
        found[shell].write_text(written(places()))
    return found


@pytest.fixture
def ask(scripts, tmp_path):
    """ask(shell, lines): what each command line can end in, words in a set. The last word of a line is the one that is typed."""
    (tmp_path / "notes.txt").touch()
    (tmp_path / "model.gguf").touch()
    (tmp_path / "folder").mkdir()
    hub = tmp_path / "hf" / "hub"
    (hub / "models--owner--name-4bit").mkdir(parents=True)
    (hub / "datasets--owner--data").mkdir()

    def asked(shell, lines):
        asks = {
            "bash": [
                f'source "{scripts["bash"]}"',
                't() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=(); _metalstep; echo "${COMPREPLY[@]}"; }',
                *("t " + " ".join(f"'{word}'" for word in line) for line in lines),
            ],
            "zsh": [
                "compdef() { :; }; _files() { print -n -- 'FILES '; }",
                "compadd() { shift; print -n -- \"$@ \"; }",
                '_describe() { local row; for row in "${(@P)2}"; do print -n -- "${row%%:*} "; done; }',
                f'source "{scripts["zsh"]}"',
                *(f"words=({' '.join(repr(word) for word in line)}); CURRENT={len(line)}; _metalstep; print" for line in lines),
            ],
            "fish": [
                f'source "{scripts["fish"]}"',
                *(f"echo (complete -C \"{' '.join(line)}\" | string replace -r '\\t.*' '')" for line in lines),
            ],
        }
        environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        environment.pop("HF_HUB_CACHE", None)
        done = subprocess.run([shell, "-c", "\n".join(asks[shell])], capture_output=True, text=True, cwd=tmp_path, env=environment)
        assert done.stderr == "", done.stderr[:500]
        return [set(line.split()) for line in done.stdout.splitlines()]

    return asked


def line_of(place, *words):
    return ["metalstep", *([] if place == TOP else place.split("/")), *words]


@pytest.mark.parametrize("shell", HERE)
def test_the_script_is_the_shells_own_language(shell, scripts):
    assert subprocess.run([shell, "-n", str(scripts[shell])], capture_output=True).stderr == b""


@pytest.mark.parametrize("shell", HERE)
def test_every_command_and_subcommand_is_completed(ask, shell):
    found = places()
    inner = [name for name in found if found[name].commands]
    assert {TOP, "bench", "eval", "help"} <= set(inner)
    for name, got in zip(inner, ask(shell, [line_of(name, "") for name in inner]), strict=True):
        assert got >= set(found[name].commands), name
    assert set(found[TOP].commands) >= set(command.COMMANDS)


@pytest.mark.parametrize("shell", HERE)
def test_every_option_is_completed_where_it_belongs_and_nowhere_else(ask, shell):
    calls = {"/".join(filter(None, call)): parser for call, parser in all_parsers().items()}
    dashes = "--" if shell == "fish" else "-"  # fish shows short options for one dash
    for (name, parser), got in zip(calls.items(), ask(shell, [line_of(name, dashes) for name in calls]), strict=True):
        options = {o for action in parser._actions if action.help != "==SUPPRESS==" for o in action.option_strings if o.startswith(dashes)}
        assert got == options, name


@pytest.mark.parametrize("shell", HERE)
def test_values_are_those_that_the_parser_takes(ask, shell):
    cases = [
        (name, option, set(option.value.words))
        for name, place in places().items()
        for option in place.options
        if option.value is not None and option.value.kind == WORDS
    ]
    assert len(cases) > 30
    lines = [line_of(name, option.names[-1], "") for name, option, _ in cases]
    for (name, option, values), got in zip(cases, ask(shell, lines), strict=True):
        assert got == values, (name, option.names)


@pytest.mark.parametrize("shell", [shell for shell in HERE if shell != "zsh"])
def test_files_and_models(ask, shell):
    model, file, begun, packaged = ask(
        shell,
        [
            ["metalstep", "explain", ""],
            ["metalstep", "eval", "kv", "--text", "no"],
            ["metalstep", "generate", "--model", "owner"],
            ["metalstep", "chat", "--model", "smo"],
        ],
    )
    assert {"smollm2", "owner/name-4bit", "model.gguf"} <= model
    assert not any("data" in name for name in model)
    assert file == {"notes.txt"}
    assert begun == {"owner/name-4bit"}
    assert packaged == {"smollm2"}


def test_bash_completes_behind_an_equals_sign(ask):
    begun, empty = ask("bash", [["metalstep", "generate", "--device", "=", "metal"], ["metalstep", "generate", "--device", "="]])
    assert begun == {"metal", "metal-sim"}
    assert empty == {"host", "metal", "cuda", "metal-sim", "eager"}


def test_bash_knows_the_function_that_the_command_prints(scripts):
    printed = subprocess.run([sys.executable, "-m", "metalstep.cli.main", "completion", "bash"], capture_output=True, text=True)
    assert (printed.returncode, printed.stderr, printed.stdout) == (0, "", scripts["bash"].read_text())
    done = subprocess.run(["bash", "-c", f'source "{scripts["bash"]}"; complete -p metalstep'], capture_output=True, text=True)
    assert done.stdout == "complete -F _metalstep metalstep\n"
