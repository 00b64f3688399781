"""What the benchmarks share: the head of a result, the result itself, and a line of progress."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any

from metalstep.bench.machine import SIMULATED, machine
from metalstep.cli.version import versions


class HelpFormatter(argparse.HelpFormatter):
    """Leaves a text with line breaks, such as examples, as it is."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if "\n" in text else super()._fill_text(text, width, indent)


def note(device: str | None) -> str | None:
    """What to know of any time that is measured on `device`, one of load's names; None where there is nothing."""
    return SIMULATED if device == "metal-sim" else None


def print_head(model: str, method: str, device: str | None = None) -> None:
    """The machine and the versions, before anything is measured. device: one of load's names, for a note on its times."""
    here = machine()
    print(f"machine    {here['cpu']}, {here['cpus']} CPUs, {here['system']}")
    print("versions   " + ", ".join(f"{name} {value}" for name, value in versions().items()))
    print(f"model      {model}")
    print(f"method     {method}", flush=True)
    if text := note(device):
        print(f"note       {text}", flush=True)


def emit(result: dict[str, Any], as_json: bool, describe: Callable[[dict[str, Any]], list[str]]) -> None:
    """A result on stdout: JSON, or lines."""
    progress("")
    print(json.dumps(result, indent=2) if as_json else "\n".join(describe(result)))


def progress(text: str) -> None:
    """One line on stderr that the next replaces; nothing where stderr is no terminal."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def joined(values: list[int]) -> str:
    """Numbers as a list option takes them."""
    return ",".join(str(value) for value in values)
