"""`metalstep bench report`: a page of results from their JSON."""

from __future__ import annotations

import sys
from pathlib import Path

from metalstep.cli.errors import CommandError
from metalstep.cli.parser import HelpFormatter, Parser

EXAMPLES = """examples:
  metalstep bench report docs/benchmarks.md
  metalstep bench report docs/benchmarks.md --check"""


def parser() -> Parser:
    p = Parser(
        "metalstep bench report",
        "Writes the results in a folder (files of --out) into a page, between its two marks, as tables, and a picture beside each. Page "
        "and pictures are made of the JSON alone.",
    )
    p.formatter_class = HelpFormatter
    p.epilog = EXAMPLES
    p.add_argument("page", metavar="PAGE", help="a Markdown file with the marks")
    p.add_argument("--results", metavar="FOLDER", help="where the JSON is (default: the page's name without .md)")
    p.add_argument("--check", action="store_true", help="change nothing; exit with 1 where page or pictures are not what the JSON says")
    return p


def report(argv: list[str]) -> int:
    from metalstep.bench.report import write_report

    args = parser().parse_args(argv)
    page = Path(args.page)
    folder = Path(args.results) if args.results else page.with_suffix("")
    if not page.is_file() or not folder.is_dir():
        missing = folder if page.is_file() else page
        raise CommandError(f"{missing}: there is no such {'folder' if page.is_file() else 'file'}", "metalstep bench report --help")
    changed = write_report(page, folder, check=args.check)
    for path in changed:
        print(f"{'differs' if args.check else 'written'}: {path}", file=sys.stderr)
    return 1 if args.check and changed else 0
