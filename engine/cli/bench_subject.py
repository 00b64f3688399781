"""What a benchmark measures, as the command line says it: a model, or a public model's shape with random weights."""

from __future__ import annotations

import argparse
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from metalstep.cli.bench_output import progress
from metalstep.cli.errors import CommandError

if TYPE_CHECKING:
    from metalstep.bench.subject import Subject

MODEL = "smollm2"  # the default


def add_shape_options(p: argparse.ArgumentParser) -> None:
    """The options that `subject` reads besides --model."""
    p.add_argument(
        "--shape", metavar="NAME",
        help="instead of a model: random 4-bit weights of a public model's shape, e.g. qwen3-0.6b (see metalstep explain --shape)",
    )  # fmt: skip
    p.add_argument("--shape-folder", metavar="FOLDER", help="where the random weights are kept for the next time (default: nowhere)")


def subject(args: argparse.Namespace) -> AbstractContextManager[Subject]:
    """What `add_shape_options` and --model say is measured."""
    from metalstep.bench.subject import subject_of

    if args.shape and args.model != MODEL:
        raise CommandError("--shape and --model name two things to measure", "leave one of them out")
    if args.shape:
        progress("writing random weights")
    return subject_of(args.model, args.shape, args.shape_folder)


def named(args: argparse.Namespace) -> str:
    """What is measured, for the head of a result."""
    from metalstep.bench.subject import shape_name
    from metalstep.shapes import find_shape

    return shape_name(args.shape) if args.shape and find_shape(args.shape) else args.model
