"""What can stand where on the command line, read off the parsers."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from metalstep.cli.main import COMMANDS, plugins
from metalstep.cli.parsers import command_parsers

MODEL, FILE, FOLDER, WORDS, TEXT = "model", "file", "folder", "words", "text"  # kinds of values
KINDS = {"MODEL": MODEL, "FILE": FILE, "PATH": FILE, "DIR": FOLDER, "FOLDER": FOLDER}  # by metavar
TOP = "metalstep"  # the place of the command itself


@dataclass
class Value:
    """What an option or a position takes: words to choose from, or names of the file system or of models; TEXT is anything."""

    kind: str
    words: list[str] = field(default_factory=list)


@dataclass
class Option:
    """names: all spellings. value: None for a flag."""

    names: list[str]
    value: Value | None
    help: str


@dataclass
class Place:
    """A command or subcommand. commands: the words that lead from here to another place, and their help."""

    options: list[Option] = field(default_factory=list)
    commands: dict[str, str] = field(default_factory=dict)
    positions: list[Value] = field(default_factory=list)


def places() -> dict[str, Place]:
    """By name: `metalstep` itself, `bench`, `bench/decode`."""
    names = [*COMMANDS, *(plugins().keys() - COMMANDS.keys())]
    helps = {name: COMMANDS[name].help if name in COMMANDS else "" for name in names}
    options = [Option(["--help"], None, "commands and examples"), Option(["--version"], None, "versions")]
    top = Place(options, {**helps, "help": "describe a command"})
    found = {TOP: top, "help": Place(commands=dict(helps))}
    for name in names:
        parsers = command_parsers(name)
        here = found[name] = Place() if "" not in parsers else place(parsers[""])
        if not parsers:  # another program's options, behind a model
            here.positions = [Value(MODEL)]
        if not here.options:
            here.options = [Option(["--help"], None, "show the help")]
        for sub, parser in parsers.items():
            if sub:
                here.commands[sub] = first_sentence(parser.description or "")
                found[f"{name}/{sub}"] = place(parser)
    return found


def place(parser: argparse.ArgumentParser) -> Place:
    """What one parser takes."""
    here = Place()
    for action in parser._actions:
        if action.help is argparse.SUPPRESS or isinstance(action, argparse._SubParsersAction):
            continue
        taken = None if action.nargs == 0 else value(action)
        if action.option_strings:
            here.options.append(Option(list(action.option_strings), taken, first_sentence(action.help or "")))
        elif taken:
            here.positions.append(taken)
    return here


def value(action: argparse.Action) -> Value:
    """By choices, by what the option is called, or by its metavar."""
    if action.choices is not None:
        return Value(WORDS, [str(choice) for choice in action.choices])
    if action.dest in ("shape", "chip", "kv_scheme", "schemes"):
        return Value(WORDS, named(action.dest))
    return Value(KINDS.get(action.metavar, TEXT) if isinstance(action.metavar, str) else TEXT)


def named(what: str) -> list[str]:
    """Names that are looked up rather than listed as choices."""
    if what == "chip":
        from metalstep.chips import CHIPS

        return list(CHIPS)
    if what == "shape":
        from metalstep.shapes import SHAPES

        return list(SHAPES)
    from metalstep.kv_scheme import NAMES

    return list(NAMES)


def first_sentence(text: str) -> str:
    """Short enough for a list."""
    text = " ".join(text.replace("%%", "%").split())
    for end in (". ", "; ", " ("):
        text = text.partition(end)[0]
    return text.rstrip(".")


def model_names() -> list[str]:
    """The packaged models that are installed and what the hub's cache holds. Looks at names of folders alone, as a shell waits for it."""
    from metalstep.packaged_models import PACKAGED

    found = [name for name, row in PACKAGED.items() if find_spec(row[0])]
    home = Path(os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser()
    folders = cache.glob("models--*") if cache.is_dir() else []
    return found + sorted(folder.name.removeprefix("models--").replace("--", "/", 1) for folder in folders)
