"""The reference of the command line as Markdown, from the parsers: `python -m metalstep.cli.reference`."""

from __future__ import annotations

import argparse

from metalstep.cli.main import COMMANDS
from metalstep.cli.parsers import command_parsers, examples


def reference() -> str:
    """A page: every command, its usage, options and examples."""
    parts = [
        "# Commands and options",
        "Made from the parsers by `python -m metalstep.cli.reference`. [cli.md](cli.md) says how the commands behave and what their "
        "`--json` has. Every command also takes `--help` and, anywhere, `--debug`, which shows the traceback of an error.",
    ]
    for name, command in COMMANDS.items():
        parts += [f"## {name}", sentence(command.help)]
        found = command_parsers(name)
        if not found:
            parts.append(f"Its options are another program's: `metalstep {name} --help` lists them.")
        for sub, parser in found.items():
            if sub:
                parts.append(f"### {name} {sub}")
            parts += section(parser)
    return "\n\n".join(parts) + "\n"


def section(parser: argparse.ArgumentParser) -> list[str]:
    """One parser: what it does, its arguments by group, its examples."""
    parts = [parser.description] if parser.description else []
    for group in parser._action_groups:
        rows = [row(parser, action) for action in group._group_actions if shown(action)]
        if rows:
            title = {"positional arguments": "argument", "options": "option"}.get(group.title or "", group.title or "option")
            parts.append("\n".join([f"| {title} | |", "|---|---|", *rows]))
    if calls := examples(parser):
        parts.append("```console\n" + "\n".join(f"$ {call}" for call in calls) + "\n```")
    return parts


def shown(action: argparse.Action) -> bool:
    return action.help is not argparse.SUPPRESS and not isinstance(action, argparse._HelpAction)


def row(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    """A line of the table. Names are those that `--help` shows."""
    value = "" if action.nargs == 0 else parser._get_formatter()._format_args(action, metavar(action))
    names = ", ".join(action.option_strings)
    text = " ".join((action.help or "").replace("%%", "%").split())
    return f"| `{cell(f'{names} {value}'.strip())}` | {cell(text)} |"


def metavar(action: argparse.Action) -> str:
    """What stands for the value, where no metavar does."""
    if action.choices is not None:
        return "{" + ",".join(map(str, action.choices)) + "}"
    return action.dest.upper()


def cell(text: str) -> str:
    return text.replace("|", "\\|")


def sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "."


if __name__ == "__main__":
    print(reference(), end="")
