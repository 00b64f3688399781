"""The code blocks of the documentation, with what stands in the Markdown about them."""
from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted((ROOT / "docs").glob("*.md"))
FENCE = re.compile(r"^( *)```(\S*)[^\n]*\n(.*?)^ *```[ \t]*$", re.DOTALL | re.MULTILINE)
MARK = re.compile(r"<!-- (not run|from): ([^\n]*?) -->\n\s*\Z")
LIST = re.compile(r" *([-*]|\d+\.) ")
# Why a block is not run. Its command lines are parsed by the commands themselves all the same, here or in tests/plugin.
REASONS = {
    "needs a Mac",
    "needs an NVIDIA GPU",
    "needs the network",
    "needs vLLM",  # tests/plugin
    "takes minutes",
    "a diagram",
    "a formula",
    "a log",
}


@dataclass(frozen=True)
class Block:
    """line: of the fence, from 1. reason: of `<!-- not run: … -->` before it, file: of `<!-- from: … -->`; empty where there is none."""

    page: str
    line: int
    language: str
    text: str
    reason: str = ""
    file: str = ""

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """Fenced blocks in order, without the indentation of the list that they stand in; of README and CONTRIBUTING the indented ones too."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        mark = MARK.search(text[: match.start()])
        body = "".join(line.removeprefix(match[1]) for line in match[3].splitlines(keepends=True))
        said = {"reason" if mark[1] == "not run" else "file": mark[2]} if mark else {}
        found.append(Block(page.name, text.count("\n", 0, match.start()) + 1, match[2], body, **said))
    return found


def indented(page: Path) -> list[Block]:
    """Blocks that are marked by four spaces; what belongs to an item of a list is none."""
    text = FENCE.sub(lambda match: "\n" * match[0].count("\n"), page.read_text(encoding="utf-8"))
    found: list[Block] = []
    in_list, inside, before = False, False, ""
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("    ") and not in_list and (inside or not before.strip()):
            if not inside:
                found.append(Block(page.name, number, "indented", ""))
            found[-1] = replace(found[-1], text=f"{found[-1].text}{line[4:]}\n")
            inside = True
        elif line.strip():
            inside = False
            in_list = bool(LIST.match(line)) or (in_list and line.startswith(" "))
        before = line
    return found


def sessions(block: Block) -> list[tuple[str, str]]:
    """Of a console block, each command behind `$ ` with its continued lines, and the output below it."""
    found: list[tuple[str, str]] = []
    continued = False
    for line in block.text.splitlines():
        if line.startswith("$ "):
            found.append((line[2:], ""))
        elif continued:
            found[-1] = (f"{found[-1][0]}\n{line}", "")
        elif found:
            found[-1] = (found[-1][0], f"{found[-1][1]}{line}\n")
        else:
            raise AssertionError(f"{block}: output before the first command")
        continued = line.endswith("\\") and (line.startswith("$ ") or continued)
    return found
