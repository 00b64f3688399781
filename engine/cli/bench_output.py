"""What the benchmarks share: the head of a result, the result itself, and a line of progress."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from metalstep.bench.machine import SIMULATED, Watch, busy, machine
from metalstep.cli.errors import CommandError
from metalstep.cli.parser import HelpFormatter as HelpFormatter
from metalstep.plot.file import check_plot


def note(device: str | None) -> str | None:
    """What to know of any time that is measured on `device`, one of load's names; None where there is nothing."""
    return SIMULATED if device == "metal-sim" else None


def print_head(model: str, method: str, device: str | None = None) -> None:
    """The machine and the versions, before anything is measured. device: one of load's names, for a note on its times."""
    from metalstep.cli.version import versions

    print("\n".join(head_lines(machine(), versions(), model, method, device)), flush=True)


def head_lines(here: dict[str, Any], known: dict[str, str], model: str, method: str, device: str | None) -> list[str]:
    cores = f" on {here['cores']} cores" if here["cores"] else ""
    lines = [
        f"machine    {here['cpu']}, {here['cpus']} CPUs{cores}, {here['memory_gib']:g} GiB, {here['system']}, {here['os']}; "
        f"load {here['load']:.2f}; {here['date']}",
        "versions   " + ", ".join(f"{name} {value}" for name, value in known.items()),
        f"model      {model}",
        f"method     {method}",
    ]
    return lines + ([f"note       {text}"] if (text := note(device)) else [])


def add_output_options(p: argparse.ArgumentParser, *, plot: bool = False) -> None:
    """The options that Output reads. plot: whether there is a picture of the result."""
    p.add_argument("--json", action="store_true", help="the result as JSON, with every sample, instead of text")
    p.add_argument("--out", metavar="FILE", help="also write the JSON to this file")
    if plot:
        p.add_argument("--plot", metavar="FILE", help="also draw it: .svg, or .png with matplotlib")


class Output:
    """What a benchmark prints and writes: the head when it is made, before anything is measured, and the result at its end.

    args: of a parser with add_output_options. argv: as given, for the JSON; names of files are left out of it.
    Raises: as check_plot; CommandError for an --out whose folder is not there.
    """

    def __init__(self, args: argparse.Namespace, benchmark: str, argv: Sequence[str], model: str, method: str, device: str | None = None):
        from metalstep.cli.version import git_commit, versions

        self._args, self._benchmark, self._command = args, benchmark, command_of(benchmark, argv)
        self._plot: str | None = getattr(args, "plot", None)
        if self._plot:
            check_plot(self._plot)
        if args.out:
            check_out(args.out)
        self._machine = machine()
        self._versions = {**versions(), **({"commit": commit} if (commit := git_commit()) else {})}
        if not args.json:
            print("\n".join(head_lines(self._machine, self._versions, model, method, device)), flush=True)
        if text := busy(self._machine["load"]):
            print(f"warning: {text}; numbers are not of this machine alone", file=sys.stderr)
        self._watch = Watch()

    def finish(self, result: dict[str, Any], describe: Callable[[dict[str, Any]], list[str]]) -> None:
        """Print the result, and write what --out and --plot name."""
        watched = self._watch.result()
        text = busy(None, watched)
        warnings = [f"{text}; numbers are not of this machine alone"] if text else []
        head = {"benchmark": self._benchmark, "command": self._command, "machine": self._machine, "versions": self._versions}
        whole = {**head, **{key: value for key, value in result.items() if key not in head}, "others": watched, "warnings": warnings}
        progress("")
        print(json.dumps(whole, indent=2) if self._args.json else "\n".join([*describe(whole), *(f"warning: {line}" for line in warnings)]))
        if self._args.out:
            Path(self._args.out).write_text(json.dumps(whole, indent=1) + "\n", "utf-8")
            print(f"JSON: {self._args.out}", file=sys.stderr)
        if self._plot:
            from metalstep.bench.charts import chart
            from metalstep.plot.bars import write_bars

            write_bars(self._plot, chart(whole))
            print(f"plot: {self._plot}", file=sys.stderr)


def check_out(out: str) -> None:
    """Raises: CommandError for a file that cannot be written, before minutes are spent on what it is for."""
    path = Path(out)
    if not path.absolute().parent.is_dir():
        raise CommandError(f"--out {out}: there is no folder {path.parent}", "make it first, or name another file")
    there = path.exists()
    try:
        path.open("ab").close()
    except OSError as error:
        raise CommandError(f"--out {out}: it cannot be written ({error.strerror})", "name another file") from None
    if not there:
        path.unlink()


def command_of(benchmark: str, argv: Sequence[str]) -> str:
    """The call that makes a result again; where its output went is left out."""
    kept: list[str] = []
    words = iter(argv)
    for word in words:
        name, equals, _ = word.partition("=")
        if name in ("--out", "--plot", "--peers-python", "--shape-folder"):
            if not equals:
                next(words, None)
        elif word not in ("--json", "--live"):
            kept.append(word)
    return shlex.join(["metalstep", "bench", benchmark, *kept])


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
