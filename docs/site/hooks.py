"""What the site has beyond the Markdown files of docs/: README, CONTRIBUTING, CHANGELOG, and pages made of docstrings and parsers."""
from __future__ import annotations

import posixpath
import re
from collections.abc import Callable
from pathlib import Path

from api_page import api_page
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from metalstep.cli.reference import reference

SITE = Path(__file__).resolve().parent
ROOT = SITE.parents[1]
FROM_ROOT = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
LINK = re.compile(r"\]\(([^)\s#]*)(#[^)\s]*)?\)")
FOR_TESTS = re.compile(r"^ *<!-- (?:not run|from): .*? -->\n", re.MULTILINE)  # see tests/docs/markdown_blocks.py
IN_CODE = re.compile(r"`[^`\n]*`")  # in a table GitHub wants `\|`, and Python's Markdown `|`
MARKER = re.compile(r"^<!-- generated: (\w+) -->$", re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """README is the first page; the others of the repository's top are pages too."""
    for name in FROM_ROOT:
        files.append(File.generated(config, name, content=(ROOT / name).read_text(encoding="utf-8")))
    files.append(File.generated(config, "assets/iframe-worker.js", abs_src_path=str(SITE / "iframe-worker.js")))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links between docs/ and the top of the repository, as both stand in one folder of the site; generated parts."""
    from_root = page.file.src_uri in FROM_ROOT
    markdown = FOR_TESTS.sub("", markdown)
    markdown = outside_code(markdown, lambda text: LINK.sub(lambda link: moved(link, from_root), text))
    markdown = MARKER.sub(lambda marker: generated(marker[1]), markdown)
    return outside_code(markdown, lambda text: IN_CODE.sub(lambda code: code[0].replace("\\|", "|"), text))


def moved(link: re.Match[str], from_root: bool) -> str:
    path, anchor = link[1], link[2] or ""
    if path and "://" not in path:
        path = posixpath.normpath(posixpath.join("" if from_root else "docs", path))  # from the repository's top
        path = path.removeprefix("docs/")
    return f"]({path}{anchor})"


def outside_code(markdown: str, change: Callable[[str], str]) -> str:
    """`change` for what stands between fenced blocks."""
    parts = re.split(r"(^ *```.*?^ *```$)", markdown, flags=re.DOTALL | re.MULTILINE)
    return "".join(part if index % 2 else change(part) for index, part in enumerate(parts))


def generated(name: str) -> str:
    if name == "api":
        return api_page()
    _, first, commands = reference().partition("\n## ")  # the page has a head of its own
    return first + commands
