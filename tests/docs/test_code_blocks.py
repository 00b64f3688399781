"""Every code block of README, CONTRIBUTING and docs/: Python and commands run as they are printed, data parses, kernels compile."""
import ast
import contextlib
import inspect
import io
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from markdown_blocks import PAGES, REASONS, ROOT, blocks, indented, sessions
from printed_commands import check

import metalstep
from metalstep.cli import main as command

SERVED = ("serving.md",)  # needs a server: tests/plugin/test_serving_page.py runs it
WITH_INPUT = re.compile(r"printf '([^']*)' \| (metalstep .*)")
OF_A_SHELL = re.compile(r"[|<>&;$`*\n]|^\w+=")
ALL = [block for page in PAGES for block in blocks(page)]
KNOWN = {"python", "console", "sh", "json", "toml", "yaml", "metal", "c", "swift", "text"}
METAL_HEAD = "#include <metal_stdlib>\nusing namespace metal;\n"


def of(*languages, run=True):
    return [block for block in ALL if block.language in languages and bool(block.reason) is not run and not block.file]


@pytest.mark.parametrize("page", sorted({block.page for block in of("python")} - set(SERVED)))
def test_python_runs(page, tmp_path, monkeypatch, capsys):
    """In order and in one namespace, as a reader would type it, in an empty directory."""
    monkeypatch.chdir(tmp_path)
    names: dict = {"__name__": "__main__"}
    for block in of("python"):
        if block.page == page:
            exec(compile(block.text, str(block), "exec"), names)
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("page", sorted({block.page for block in of("console")}))
def test_commands_run_and_print_what_is_shown(page, tmp_path, monkeypatch):
    """A page's commands in order, in one directory that is empty at first."""
    monkeypatch.chdir(tmp_path)
    for block in of("console"):
        if block.page != page:
            continue
        for line, shown in sessions(block):
            status, printed = run(line, tmp_path)
            assert status == (2 if shown.startswith("error: ") else 0), f"{block}: {line}\n{printed}"
            assert matches(shown, printed), f"{block}: {line}\n{printed}"


def run(line, home):
    """Exit status and all output: in this process where it is one call of `metalstep`, else by a shell."""
    piped = WITH_INPUT.fullmatch(line)
    text, call = (piped[1].replace("\\n", "\n"), piped[2]) if piped else ("", line)
    if call.startswith("metalstep ") and not OF_A_SHELL.search(call):
        out = io.StringIO()
        with patched_stdin(io.StringIO(text)), contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            status = command.main(shlex.split(call, comments=True)[1:])
        return status, out.getvalue()
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1", "HOME": str(home)}
    shell = ["bash", "-o", "pipefail", "-c", line]
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    done = subprocess.run(shell, **streams, text=True, env=environment, timeout=300)
    return done.returncode, done.stdout


@contextlib.contextmanager
def patched_stdin(stream):
    kept, sys.stdin = sys.stdin, stream
    try:
        yield
    finally:
        sys.stdin = kept


def matches(shown, printed):
    """Whether the output is as shown. `…` stands for any text within a line; alone in a line, for any lines. Nothing shown: any output."""
    if not shown.strip():
        return True
    pattern = ""
    for line in shown.rstrip("\n").split("\n"):
        pattern += r"(?:.*\n)*?" if line.strip() == "…" else ".*".join(map(re.escape, line.rstrip().split("…"))) + r"[ \t]*\n"
    return re.fullmatch(pattern, printed.rstrip("\n") + "\n") is not None


@pytest.mark.parametrize("block", of("python", run=False), ids=str)
def test_python_that_cannot_run_here_calls_what_is_there(block):
    """The names of metalstep that it uses exist, and the calls have arguments of these functions."""
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("metalstep."):
            function = getattr(metalstep, ast.unparse(node.func).removeprefix("metalstep."))
            inspect.signature(function).bind(*node.args, **{word.arg: word.value for word in node.keywords})


@pytest.mark.parametrize("block", of("console", "sh", run=False), ids=str)
def test_a_command_that_cannot_run_here_is_parsed(block, monkeypatch, tmp_path):
    if block.language == "sh":
        assert subprocess.run(["bash", "-n"], input=block.text, text=True).returncode == 0
        return
    for line, _ in sessions(block):
        check(line, monkeypatch, tmp_path)


@pytest.mark.parametrize("block", [block for page in PAGES for block in indented(page)], ids=str)
def test_an_indented_command_is_parsed(block, monkeypatch, tmp_path):
    assert block.page in ("README.md", "CONTRIBUTING.md"), "docs/ has fenced blocks, which say what they are"
    for line in block.text.replace("\\\n", " ").splitlines():
        check(re.sub(r" {2,}# .*| {3,}[^-'\"]*$", "", line), monkeypatch, tmp_path)


@pytest.mark.parametrize("block", of("json", "toml", "yaml"), ids=str)
def test_data_parses(block):
    {"json": json.loads, "toml": tomllib.loads, "yaml": yaml.safe_load}[block.language](block.text)


@pytest.mark.parametrize("block", of("metal"), ids=str)
def test_a_kernel_compiles(block):
    from metalstep.kernels.native import NativeDevice

    with NativeDevice.open("metal" if sys.platform == "darwin" else "metal-sim") as device:
        device.add_library(METAL_HEAD + block.text)


@pytest.mark.parametrize("block", [block for block in ALL if block.file], ids=str)
def test_what_is_cut_from_a_file_stands_there(block):
    """The block's lines, in order; `…` stands for lines that are left out."""
    text = (ROOT / block.file).read_text(encoding="utf-8")
    parts = [part.strip("\n") for part in re.split(r"^[^\w\n]*…[^\n]*\n", block.text, flags=re.MULTILINE)]
    place = 0
    for part in parts:
        place = text.find(part, place)
        assert place >= 0, f"{block.file} has no such lines:\n{part}"


@pytest.mark.parametrize("block", ALL, ids=str)
def test_no_block_is_left_out(block):
    """Its language is one that a test runs, and where none does, the page says why."""
    assert block.language in KNOWN, f"{block} is in no language; {sorted(KNOWN)}"
    assert not block.reason or block.reason in REASONS, f"{block}: {block.reason!r} is no reason; {sorted(REASONS)}"
    if block.language in ("c", "swift"):
        assert block.file, f"{block}: C and Swift are cut from a file; <!-- from: FILE --> before it names it"
    if block.language in ("text", "sh"):
        assert block.reason or block.file, f"{block}: <!-- not run: REASON --> before it says why"
    if block.language in ("json", "toml", "yaml", "metal") or (block.language == "python" and block.reason != "needs the network"):
        assert not block.reason, f"{block}: can run here"
