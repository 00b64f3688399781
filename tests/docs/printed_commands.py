"""Checks of a command line as a page prints it: that the program is there and takes these arguments. Nothing runs."""
from __future__ import annotations

import json
import re
import shlex
import subprocess
import tomllib
from pathlib import Path

from metalstep.cli import main as command
from metalstep.cli.parser import Parser

ROOT = Path(__file__).resolve().parents[2]
SHELL = {"cd", "curl", "export", "printf", "source", "echo", "tar"}
ELSEWHERE = ("serve",)  # vLLM's parser reads it: tests/plugin/test_printed_serve_commands.py


class Parsed(Exception):
    """The command line was taken; nothing has run."""


def parts_of(line: str) -> list[list[str]]:
    """The simple commands of a line, without variables before them and without redirections."""
    lexer = shlex.shlex(line.replace("\\\n", " "), posix=True, punctuation_chars="|&;<>")
    lexer.whitespace_split = True
    lexer.commenters = "#"
    found: list[list[str]] = [[]]
    tokens = iter(lexer)
    for token in tokens:
        if set(token) <= set("|&;"):
            found.append([])
        elif set(token) <= set("<>&"):
            if found[-1] and found[-1][-1] in ("1", "2"):
                found[-1].pop()
            next(tokens, None)
        else:
            found[-1].append(token)
    commands = []
    for parts in found:
        while parts and re.fullmatch(r"[A-Za-z_]\w*=.*", parts[0], re.DOTALL):
            parts.pop(0)
        if parts:
            commands.append(parts)
    return commands


def check(line: str, monkeypatch, tmp_path) -> None:
    """Raises: AssertionError, or what the command says of its arguments."""
    for parts in parts_of(line):
        check_command(parts, monkeypatch, tmp_path)


def check_command(parts: list[str], monkeypatch, tmp_path) -> None:
    program, arguments = parts[0].removeprefix(".venv/bin/").removeprefix(".venv-vllm/bin/"), parts[1:]
    if program == "metalstep":
        if arguments and arguments[0] not in ELSEWHERE:
            check_metalstep(arguments, monkeypatch)
    elif program == "make":
        targets = [target for target in arguments if "=" not in target]
        makefile = (ROOT / "Makefile").read_text()
        assert targets and all(re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE) for target in targets), parts
    elif program == "scripts/install.sh":
        dry = subprocess.run(["sh", str(ROOT / program), "--dry-run", *arguments], env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)})
        assert dry.returncode == 0
    elif program == "pip" or arguments[:2] == ["-m", "pip"]:
        check_pip(arguments[arguments.index("pip") + 1 :] if program != "pip" else arguments)
    elif arguments[:2] == ["-m", "pytest"]:
        check_pytest(arguments[2:])
    elif program.endswith(".ci/run"):
        assert (ROOT / ".ci" / "run").exists()
    elif program == "curl":
        if "-d" in arguments:
            json.loads(arguments[arguments.index("-d") + 1])
    else:
        assert program in SHELL, f"no check knows {program!r}"


def check_metalstep(arguments: list[str], monkeypatch) -> None:
    parse = Parser.parse_args

    def parse_and_stop(self, *args, **kwargs):
        parse(self, *args, **kwargs)
        raise Parsed

    if arguments in (["--help"], ["--version"]):
        return
    with monkeypatch.context() as patch:
        patch.setattr(Parser, "parse_args", parse_and_stop)
        try:
            command.run(arguments)
        except Parsed:
            return
    raise AssertionError(f"metalstep {' '.join(arguments)} does not come to a parser")


def check_pip(arguments: list[str]) -> None:
    assert arguments[0] in ("install", "uninstall"), arguments
    for name in arguments[1:]:
        if name.startswith("."):
            extras = re.fullmatch(r"\.(?:\[([\w,]+)\])?", name)[1] or ""
            known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            assert all(extra in known for extra in extras.split(",") if extra), name
        elif "==" in name:
            assert name in (ROOT / "engine" / "packaged_models.py").read_text()


def check_pytest(arguments: list[str]) -> None:
    paths = [ROOT / name for name in arguments if name.startswith("tests")]
    assert paths and all(path.exists() for path in paths), arguments
    if "-k" in arguments and paths[0].is_dir():
        word = arguments[arguments.index("-k") + 1].split()[0]
        assert list(paths[0].glob(f"test_*{word}*.py")), word
