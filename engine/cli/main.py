"""The `metalstep` command: finds the subcommand, runs it, and turns errors into one line each.

A subcommand is a callable `main(argv: list[str]) -> int` whose docstring's first line is its help. Other packages add theirs
through the entry-point group `metalstep.commands`.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import TextIO

from metalstep.cli.errors import CommandError, report

Command = Callable[[list[str]], int]

GROUP = "metalstep.commands"
COMMANDS = {  # in the order of the help
    "generate": "metalstep.cli.generate",
    "chat": "metalstep.cli.chat",
    "explain": "metalstep.cli.explain",
    "bench": "metalstep.cli.bench",
    "eval": "metalstep.cli.eval",
    "calibrate": "metalstep.cli.calibrate",
    "doctor": "metalstep.cli.doctor",
}
USAGE = "usage: metalstep COMMAND [options]\n       metalstep --version | --help"
WRONG_CALL, INTERRUPTED, BROKEN_PIPE = 2, 130, 141  # exit statuses; the last two as a shell counts signals


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0; 2 with `error: …` and perhaps `hint: …` on stderr; 130 or 141."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    warnings.showwarning = show_warning
    if sys.stdout is None:  # closed by the caller (`>&-`): Python then has no stream at all
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if sys.stderr is None:  # messages would otherwise go to stdout
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    try:
        status = run(arguments)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Python flushes stdout once more at exit: give it somewhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return BROKEN_PIPE
    except SystemExit as stop:  # argparse's --help
        return stop.code if isinstance(stop.code, int) else WRONG_CALL if stop.code else 0
    except (CommandError, ValueError, NotImplementedError, RuntimeError, OSError, MemoryError) as error:
        report(error)
        return WRONG_CALL


def run(arguments: list[str]) -> int:
    """Run one subcommand. Raises: CommandError for one that does not exist."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if arguments[0] in ("-V", "--version"):
        from metalstep.cli.version import versions

        print("\n".join(f"{name:10} {value}" for name, value in versions().items()))
        return 0
    name = arguments[0]
    if name in COMMANDS:
        return import_module(COMMANDS[name]).main(arguments[1:])
    if plugin := plugins().get(name):
        command: Command = plugin.load()
        return command(arguments[1:])
    known = ", ".join([*COMMANDS, *plugins()])
    what = f"unknown option {name}" if name.startswith("-") else f"no command {name!r}"
    raise CommandError(f"{what}, expected one of {known}", "metalstep --help")


def plugins() -> dict[str, EntryPoint]:
    """The commands of installed packages, by name."""
    return {entry.name: entry for entry in entry_points(group=GROUP)}


def usage() -> str:
    """The text of `metalstep --help`."""
    rows = {name: first_line(import_module(module).main.__doc__) for name, module in COMMANDS.items()}
    for name, entry in plugins().items():
        try:
            rows[name] = first_line(entry.load().__doc__)
        except Exception as error:  # another package's trouble must not take the help away
            rows[name] = f"(not available: {error})"
    lines = "\n".join(f"  {name:10} {text}" for name, text in rows.items())
    return (
        f"{USAGE}\n\nLanguage models from Python: the decode step captured once and replayed as one native call.\n\n"
        f"commands:\n{lines}\n\n`metalstep COMMAND --help` describes a command. MODEL is smollm2 (the packaged SmolLM2-135M-Instruct), "
        "a .gguf file,\na directory or a Hugging Face id of an mlx-lm model."
    )


def first_line(docstring: str | None) -> str:
    return (docstring or "").strip().partition("\n")[0]


def show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """A warning without the source line that caused it; what to do (behind its first line's last semicolon) as a hint."""
    first, *others = str(message).split("\n")
    text, semicolon, hint = first.rpartition("; ")
    print("warning: " + ". ".join([text if semicolon else first, *others]), file=file or sys.stderr)
    if semicolon:
        print(f"hint: {hint}", file=file or sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
