"""`metalstep doctor`: whether this installation works, and a report of it for a maintainer."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from metalstep.cli.errors import CommandError
from metalstep.cli.parser import Parser
from metalstep.doctor import examine, report, summary, worst
from metalstep.finding import FAIL, Finding

FAILED = 1  # exit status


def parser() -> Parser:
    p = Parser(
        "metalstep doctor",
        "Check Python, packages, the launcher, every device (a small kernel is run and compared, metal/ is compiled), tools and caches. No "
        "model is loaded and nothing is sent anywhere. Exit status 1 when something that models need does not work.",
    )
    p.add_argument("--json", action="store_true", help="the report instead of lines")
    p.add_argument(
        "--report",
        metavar="FILE",
        type=Path,
        help="write the report too: versions, devices, results and times as JSON, without the names of this machine and its user",
    )
    return p


def main(argv: list[str]) -> int:
    """check this installation: packages, launcher, devices, tools; `--report FILE` for a maintainer"""
    args = parser().parse_args(argv)
    if args.report and not args.report.absolute().parent.is_dir():
        raise CommandError(f"--report: there is no folder {args.report.parent}", "name a file in one that exists")
    findings = examine((lambda _: None) if args.json else show)
    result = report(findings)
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        print(summary(findings))
    if args.report:
        args.report.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        print(f"report written to {args.report}", file=sys.stderr)
    return FAILED if worst(findings) == FAIL else 0


def show(finding: Finding) -> None:
    """A line, and perhaps its hint, as soon as they are known."""
    print(f"{finding.status:4}  {finding.name:18} {' '.join(finding.found.split())}", flush=True)
    if finding.hint:
        print(f"hint: {finding.hint}", flush=True)
