"""`metalstep doctor`: what works here, what would be faster and how to get it; of a model too; and a report of it for a maintainer."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metalstep.cli.errors import CommandError
from metalstep.cli.parser import MODEL_HELP, Parser, add_device_options

if TYPE_CHECKING:
    from metalstep.finding import Finding

FAILED = 1  # exit status
WORKS, FASTER = "what works", "what could be faster"


def parser() -> Parser:
    p = Parser(
        "metalstep doctor",
        "Check Python, packages, the launcher, every device (a kernel runs and is compared, metal/ is compiled), tools and caches, and say "
        "what would make models run faster here. With MODEL: whether that model runs natively, why not, the memory that it takes, "
        "the context that fits and whether its tokenizer loads; no weight is read. Nothing is sent anywhere. Exit status 1 when "
        "something that models need does not work.",
        [
            "metalstep doctor",
            "metalstep doctor smollm2",
            "metalstep doctor smollm2 --device host --json",
            "metalstep doctor --report report.json",
        ],
    )
    p.add_argument("model", nargs="?", metavar="MODEL", help=f"examine this model instead of the installation: {MODEL_HELP}")
    p.add_argument("--json", action="store_true", help="the report instead of lines")
    p.add_argument(
        "--report",
        metavar="FILE",
        type=Path,
        help="write the report too: versions, devices, results and times as JSON, without the names of this machine and its user",
    )
    p.add_argument("--revision", metavar="REV", help="branch, tag or commit of a Hugging Face id")
    add_device_options(p.add_argument_group("where MODEL would run"))
    return p


def main(argv: list[str]) -> int:
    """check this installation or a model: what works, what could be faster and how"""
    args = parser().parse_args(argv)
    if args.report and not args.report.absolute().parent.is_dir():
        raise CommandError(f"--report: there is no folder {args.report.parent}", "name a file in one that exists")
    if args.model is None and (args.device or args.batch_invariant or args.revision):
        raise CommandError("--device, --batch-invariant and --revision are of a MODEL, and none is named", "metalstep doctor smollm2")
    from metalstep.doctor import report, summary, worst
    from metalstep.finding import FAIL

    findings, faster = of_model(args) if args.model else of_machine(args)
    result: dict[str, Any] = report(findings, faster)
    if args.model:
        result["model"] = args.model
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        print(summary(findings))
    if args.report:
        args.report.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        print(f"report written to {args.report}", file=sys.stderr)
    return FAILED if worst(findings) == FAIL else 0


def of_machine(args: argparse.Namespace) -> tuple[list[Finding], list[Finding]]:
    """The checks of this installation, each shown as it comes unless --json is given; (what works, what could be faster)."""
    from metalstep.doctor import examine
    from metalstep.doctor_speed import advice

    heading(args, WORKS)
    findings = examine((lambda _: None) if args.json else show)
    faster = advice()
    show_faster(args, faster)
    return findings, faster


def of_model(args: argparse.Namespace) -> tuple[list[Finding], list[Finding]]:
    """The same of MODEL. Raises: CheckpointError for one that cannot be opened."""
    from metalstep.doctor_model import examine_model

    findings, faster = examine_model(args.model, revision=args.revision, device=args.device, batch_invariant=args.batch_invariant)
    heading(args, WORKS)
    if not args.json:
        for finding in findings:
            show(finding)
    show_faster(args, faster)
    return findings, faster


def heading(args: argparse.Namespace, text: str) -> None:
    if not args.json:
        print(f"{text}:", flush=True)


def show_faster(args: argparse.Namespace, faster: list[Finding]) -> None:
    if args.json:
        return
    print(f"\n{FASTER}:" if faster else f"\n{FASTER}: nothing that these checks know of")
    for finding in faster:
        show(finding)
    print()


def show(finding: Finding) -> None:
    """A line, and perhaps its hint, as soon as they are known."""
    print(f"{finding.status:4}  {finding.name:18} {' '.join(finding.found.split())}", flush=True)
    if finding.hint:
        print(f"hint: {finding.hint}", flush=True)
