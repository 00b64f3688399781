"""The Python environment that metalstep runs in: what is installed in it, whether it can be added to, and its pip."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import shlex
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path

from metalstep.cli.errors import CommandError

PIP = (sys.executable, "-m", "pip")
# What pip's errors say about a cause, in lower case: what is wrong, what to do.
CAUSES = {
    ("no space left",): ("the disk is full", "free some: vLLM and what it needs take about 3 GB"),
    ("permission denied", "read-only file system"): ("this environment is not writable", "use a virtual environment of your own"),
    ("externally-managed-environment",): ("this Python belongs to the system", "make a virtual environment: python3 -m venv FOLDER"),
    ("connection", "max retries", "timed out", "name resolution"): (
        "its package index cannot be reached",
        "check the network, and pip's settings for a proxy or another index (`pip config list`)",
    ),
}
SHOWN = ("downloading ", "installing ", "building ", "attempting uninstall", "error", "warning")  # of pip's lines, in lower case


def installed(name: str) -> str | None:
    """The version of a package, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_writable() -> None:
    """Raises: CommandError where packages cannot be added to this environment."""
    folder = Path(sysconfig.get_path("purelib"))
    venv = sys.prefix != sys.base_prefix
    if not venv and Path(sysconfig.get_path("stdlib"), "EXTERNALLY-MANAGED").exists():
        raise CommandError("this Python belongs to the system", "make a virtual environment: python3 -m venv FOLDER")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise CommandError(f"packages cannot be added to {folder}: it is not writable", "use a virtual environment of your own")


def check_pip() -> None:
    """Raises: CommandError where this Python has no pip."""
    if subprocess.run([*PIP, "--version"], capture_output=True).returncode != 0:
        raise CommandError(f"{sys.executable} has no pip", f"{shlex.quote(sys.executable)} -m ensurepip --upgrade")


def pip(*arguments: str) -> None:
    """Run pip, with the lines that tell of progress on stderr. Raises: CommandError with the cause that pip gives."""
    with subprocess.Popen([*PIP, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace") as process:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            text = line.strip()
            lines.append(text)
            if text.lower().startswith(SHOWN) and ".metadata (" not in text:
                print(f"  {text[:200]}", file=sys.stderr, flush=True)
    if process.returncode != 0:
        message, hint = cause(lines)
        raise CommandError(f"pip {arguments[0]}: {message}", hint)


def pip_default_index() -> list[str]:
    """The index that pip asks when its settings name none; nothing where this pip does not tell."""
    program = "from pip._internal.models.index import PyPI; print(PyPI.simple_url)"
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    return told.stdout.split() if told.returncode == 0 else []


def pip_offers(requirement: str) -> bool:
    """Whether pip would find this requirement, which is one package without its own requirements."""
    return subprocess.run([*PIP, "install", "--quiet", "--dry-run", "--no-deps", requirement], capture_output=True).returncode == 0


def cause(lines: Iterable[str]) -> tuple[str, str]:
    """What was wrong and what to do, from the lines of a pip that failed."""
    lines = list(lines)
    errors = [line for line in lines if line.lower().startswith("error")] or lines[-1:] or ["no message"]
    text = "\n".join(errors).lower()
    if "no matching distribution" in text:  # also pip's last word where it had no answer; then it has warned of that
        text += "\n".join(line for line in lines if line.startswith("WARNING: Retrying")).lower()
    for texts, answer in CAUSES.items():
        if any(part in text for part in texts):
            return answer
    return errors[-1].removeprefix("ERROR: "), "the lines above are pip's own; the same command goes on where it stopped"


def pip_settings() -> dict[str, list[str]]:
    """pip's options by name, each a list of words, from its files and the environment."""
    done = subprocess.run([*PIP, "config", "list"], capture_output=True, text=True)
    return parse_settings(done.stdout)


def parse_settings(text: str) -> dict[str, list[str]]:
    """`pip config list`: lines such as `global.index-url='…'`. `:env:` goes before a command's section, that before `global`."""
    found: dict[str, tuple[int, list[str]]] = {}
    order = ["global", "download", "install", ":env:"]
    for line in text.splitlines():
        key, equals, value = line.partition("=")
        section, _, name = key.rpartition(".")
        if not equals or section not in order:
            continue
        try:
            words = str(ast.literal_eval(value)).split()
        except (SyntaxError, ValueError):
            continue
        rank = order.index(section)
        if rank >= found.get(name, (-1, []))[0]:
            found[name] = rank, words
    return {name: words for name, (_, words) in found.items()}
