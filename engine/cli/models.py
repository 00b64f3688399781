"""`metalstep models`: what is on this machine, and removing it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metalstep.cli.errors import CommandError, printable
from metalstep.cli.parser import Parser

if TYPE_CHECKING:
    from metalstep.hub.inventory import LocalModel

EXAMPLES = ("metalstep models", "metalstep models --json", "metalstep models ~/models", "metalstep models rm owner/name")
REMOVE_EXAMPLES = ("metalstep models rm mlx-community/Qwen3-0.6B-4bit", "metalstep models rm owner/name --yes")
COLUMNS = ("NAME", "ARCHITECTURE", "WEIGHTS", "CONTEXT", "SIZE", "COMMIT", "STATE")


def parser() -> Parser:
    p = Parser(
        "metalstep models",
        "List the models on this machine that MODEL may name: packaged ones and those in the cache of the Hugging Face Hub, or those in a "
        "folder. Only headers are read. `metalstep models rm` removes one from the cache.",
        EXAMPLES,
    )
    p.add_argument("folder", nargs="?", type=Path, metavar="DIR", help="a folder with models of your own, searched with those below it")
    p.add_argument("--json", action="store_true", help="the same as JSON")
    return p


def remove_parser() -> Parser:
    p = Parser(
        "metalstep models rm",
        "Remove a model from the cache of the Hugging Face Hub, with all its commits and files, also for other tools that use the cache.",
        REMOVE_EXAMPLES,
    )
    p.add_argument("model", metavar="NAME", help="owner/name, as `metalstep models` shows it")
    p.add_argument("--yes", action="store_true", help="do not ask")
    return p


def parsers() -> dict[str, Parser]:
    """By subcommand."""
    return {"": parser(), "rm": remove_parser()}


def main(argv: list[str]) -> int:
    """list the models on this machine, or remove one (`metalstep models rm NAME`)"""
    if argv[:1] == ["rm"]:
        return remove(argv[1:])
    args = parser().parse_args(argv[1:] if argv[:1] == ["list"] else argv)
    from metalstep.hub.client import Hub
    from metalstep.hub.inventory import cached, in_folder, packaged

    cache = Hub().cache
    if args.folder is not None and not args.folder.expanduser().is_dir():
        raise CommandError(f"{args.folder} is no folder", "name a folder with models, or `metalstep models` for the hub's cache")
    found = [*packaged(), *cached(cache)] if args.folder is None else list(in_folder(args.folder.expanduser()))
    if args.json:
        print(json.dumps([row(model) for model in found], indent=2))
        return 0
    if not found:
        print(f"no models in {args.folder or cache}\nhint: metalstep download owner/name", file=sys.stderr)
        return 0
    print("\n".join(table([COLUMNS, *map(cells, found)])))
    if args.folder is None:
        print(f"the hub's cache is {cache}", file=sys.stderr)
    return 0


def remove(argv: list[str]) -> int:
    args = remove_parser().parse_args(argv)
    from metalstep.hub.client import Hub
    from metalstep.hub.progress import size
    from metalstep.hub.remove import removal

    planned = removal(Hub().cache, args.model)
    if not args.yes:
        if sys.stdin is None or not sys.stdin.isatty():
            raise CommandError(f"{planned.repo} would be removed, {size(planned.freed)}, and nobody can be asked", "--yes removes it")
        print(f"remove {planned.repo}, {size(planned.freed)}? [y/N] ", end="", file=sys.stderr, flush=True)
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            print("nothing was removed", file=sys.stderr)
            return 1
    planned.execute()
    print(f"removed {planned.repo}: {size(planned.freed)} are free", file=sys.stderr)
    return 0


def row(model: LocalModel) -> dict[str, Any]:
    """A model as JSON."""
    about = model.about
    return {
        "name": model.name,
        "where": model.where,
        "path": str(model.path),
        "commit": model.commit,
        "revisions": list(model.refs),
        **about.facts(),
        "complete": about.problem is None,
        "problem": about.problem,
        "partial_bytes": model.partial,
    }


def cells(model: LocalModel) -> tuple[str, ...]:
    from metalstep.hub.progress import size

    about = model.about
    commit = "-" if model.commit is None else f"{model.commit[:7]} {','.join(model.refs)}".rstrip()
    state = "complete" if about.problem is None else f"incomplete: {about.problem}"
    if model.partial:
        state += f" ({size(model.partial)} of an interrupted download kept)"
    context = f"{about.context_length:,}" if about.context_length else "-"
    shown = (model.name, about.architecture or "-", about.quantization or "-", context, size(about.size), commit, state)
    return tuple(map(printable, shown))


def table(rows: list[tuple[str, ...]]) -> list[str]:
    """Columns as wide as their widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
