"""The `metalstep` command: finds the subcommand, runs it, and turns errors into one line each.

A subcommand is a module with `main(argv: list[str]) -> int`, whose docstring's first line is its help, and a `parser()` (or `parsers()`,
by subcommand) that completion and the reference read. COMMANDS repeats the help, so that `metalstep --help` imports no command. Other
packages add theirs through the entry-point group `metalstep.commands`.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, NamedTuple, TextIO

from metalstep.cli.errors import DEBUG, CommandError, debugging, printable, report, report_bug, unknown

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

GROUP = "metalstep.commands"
RUN, SERVE, GET, MEASURE, HERE, OTHER = "run a model", "serve it", "get models", "measure and explain", "this machine", "of other packages"


class Command(NamedTuple):
    """module: that has `main`, or None for a command that comes through an entry point. help: of its docstring the first line."""

    module: str | None
    group: str
    help: str


COMMANDS = {  # in the order of the help
    "generate": Command("metalstep.cli.generate", RUN, "generate text from a prompt"),
    "chat": Command("metalstep.cli.chat", RUN, "talk with a model"),
    "serve": Command(None, SERVE, "serve a model over HTTP with vLLM's OpenAI-compatible server (needs `metalstep setup vllm`)"),
    "setup": Command(None, SERVE, "install vLLM beside metalstep (`metalstep setup vllm`), for `metalstep serve`"),
    "top": Command("metalstep.cli.top", SERVE, "watch a running server: tokens per second, KV cache, requests, latencies"),
    "download": Command("metalstep.cli.download", GET, "download a model of the Hugging Face Hub, or the rest of one"),
    "models": Command("metalstep.cli.models", GET, "list the models on this machine, or remove one (`metalstep models rm NAME`)"),
    "convert": Command("metalstep.cli.convert", GET, "write a model as an mlx-lm directory: quantised, in another dtype, from GGUF"),
    "bench": Command("metalstep.cli.bench", MEASURE, "measure: decode and prompt speed against peers, time per launch, quality"),
    "eval": Command("metalstep.cli.eval", MEASURE, "measure what KV schemes cost in quality on a text: divergence, perplexity, needles"),
    "explain": Command("metalstep.cli.explain", MEASURE, "show what one token costs: launches and what each fused, bytes; also on paper"),
    "calibrate": Command("metalstep.cli.calibrate", MEASURE, "measure the mean of a model's keys, which KV schemes with few bits take off"),
    "tune": Command("metalstep.cli.tune", HERE, "find the fastest geometry of this GPU's kernels, for all later runs"),
    "completion": Command("metalstep.cli.completion", HERE, "print the script that completes metalstep's commands and options in a shell"),
    "doctor": Command("metalstep.cli.doctor", HERE, "check this installation or a model: what works, what could be faster and how"),
}
USAGE = "usage: metalstep COMMAND [options]\n       metalstep help COMMAND | --version"
EXAMPLES = (
    'metalstep generate --model smollm2 --prompt "What is the capital of France?"',
    "metalstep chat --model smollm2",
    "metalstep doctor smollm2",
)
NEXT = """MODEL is smollm2 (the packaged SmolLM2-135M-Instruct), a .gguf file, a directory or a Hugging Face id, as in owner/name or, of
GGUF files, owner/name:Q4_K_M.
`metalstep COMMAND --help` describes a command and has examples. `metalstep doctor` says what works on this machine and what
could be faster. --debug shows the traceback of an error."""
# Exit statuses; the last two as a shell counts signals. A command that ran and whose answer is no (`doctor`) returns 1 too.
BUG, WRONG_CALL, INTERRUPTED, BROKEN_PIPE = 1, 2, 130, 141
MISTAKES = (CommandError, ValueError, NotImplementedError, RuntimeError, OSError, MemoryError)  # of the call, its input or the machine


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0; 2 with `error: …` and perhaps `hint: …` on stderr; see above for others."""
    arguments = without_debug(list(sys.argv[1:] if argv is None else argv))
    warnings.showwarning = show_warning
    if sys.stdout is None:  # closed by the caller (`>&-`): Python then has no stream at all
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if sys.stderr is None:  # messages would otherwise go to stdout
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    try:
        try:
            status = run(arguments)
        except SystemExit as stop:  # argparse's --help
            status = stop.code if isinstance(stop.code, int) else WRONG_CALL if stop.code else 0
        sys.stdout.flush()
        return status
    except KeyboardInterrupt as error:
        if debugging():
            report(error)
        else:
            print(file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Python flushes stdout once more at exit: give it somewhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return BROKEN_PIPE
    except MISTAKES as error:
        report(error)
        return WRONG_CALL
    except Exception as error:
        report_bug(error)
        return BUG


def without_debug(arguments: list[str]) -> list[str]:
    """The arguments less --debug, which may stand anywhere but behind `--`, whose flags are another program's."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    kept = [argument for argument in arguments[:end] if argument != "--debug"]
    if len(kept) < end:
        os.environ[DEBUG] = "1"
    return kept + arguments[end:]


def run(arguments: list[str]) -> int:
    """Run one subcommand. Raises: CommandError for one that does not exist."""
    if arguments and arguments[0] == "help":
        arguments = [*arguments[1:], "--help"]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0
    name = arguments[0]
    if name in ("-V", "--version"):
        from metalstep.cli.version import versions

        print("\n".join(f"{name:10} {value}" for name, value in versions().items()))
        return 0
    return find(name)(arguments[1:])


def find(name: str) -> Callable[[list[str]], int]:
    """A subcommand's `main`. Raises: CommandError for one that does not exist."""
    command = COMMANDS.get(name)
    if command and command.module:
        main: Callable[[list[str]], int] = import_module(command.module).main
        return main
    entries = plugins()
    if name in entries:
        loaded: Callable[[list[str]], int] = entries[name].load()
        return loaded
    known = [*COMMANDS, *(entries.keys() - COMMANDS.keys())]
    if name.startswith("-"):
        raise unknown("unknown option", name, ["--help", "--version", "--debug"], "metalstep --help")
    raise unknown("no command", name, known, "metalstep --help")


def plugins() -> dict[str, EntryPoint]:
    """The commands of installed packages, by name."""
    from importlib.metadata import entry_points

    return {entry.name: entry for entry in entry_points(group=GROUP)}


def usage() -> str:
    """The text of `metalstep --help`."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for name, command in COMMANDS.items():
        groups.setdefault(command.group, []).append((name, command.help))
    for name, entry in plugins().items():
        if name not in COMMANDS:
            groups.setdefault(OTHER, []).append((name, plugin_help(entry)))
    blocks = [f"{group}:\n" + "\n".join(f"  {name:10}  {text}" for name, text in rows) for group, rows in groups.items()]
    examples = "examples:\n" + "\n".join(f"  {line}" for line in EXAMPLES)
    head = "Language models from Python: the decode step captured once and replayed as one native call."
    return "\n\n".join([USAGE, head, *blocks, examples, NEXT])


def plugin_help(entry: EntryPoint) -> str:
    """The first line of another package's command. Its trouble must not take the help away."""
    try:
        return first_line(entry.load().__doc__)
    except Exception as error:
        return f"(not available: {error})"


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
    first, *others = map(printable, str(message).split("\n"))
    text, semicolon, hint = first.rpartition("; ")
    print("warning: " + ". ".join([text if semicolon else first, *others]), file=file or sys.stderr)
    if semicolon:
        print(f"hint: {hint}", file=file or sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
