"""The parsers of every command, for what walks them: completion, the reference and the tests."""

from __future__ import annotations

import argparse
from importlib import import_module

from metalstep.cli.main import COMMANDS, plugins


def command_parsers(name: str) -> dict[str, argparse.ArgumentParser]:
    """The parsers of one command by subcommand; the command itself is `""`. Empty for one whose options are another program's."""
    module = COMMANDS[name].module if name in COMMANDS else None
    if module is None:
        entry = plugins().get(name)
        if entry is None:
            return {}
        module = entry.module
    loaded = import_module(module)
    if hasattr(loaded, "parsers"):
        found: dict[str, argparse.ArgumentParser] = loaded.parsers()
        return found
    return with_subparsers(loaded.parser()) if hasattr(loaded, "parser") else {}


def with_subparsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """`parser` and argparse's own subparsers of it."""
    found = {"": parser}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found |= action.choices
    return found


def all_parsers() -> dict[tuple[str, str], argparse.ArgumentParser]:
    """By command and subcommand, in the order of the help."""
    return {(name, sub): parser for name in COMMANDS for sub, parser in command_parsers(name).items()}


def examples(parser: argparse.ArgumentParser) -> list[str]:
    """The calls at the end of a parser's help."""
    lines = (parser.epilog or "").partition("examples:\n")[2].splitlines()
    return [line.strip() for line in lines if line.strip()]
