"""What a benchmark measures, as the command line says it: a model, or a public model's shape with random weights."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from metalstep.choices import DEFAULT_DEVICE, device_kind
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


@contextmanager
def subject(args: argparse.Namespace) -> Iterator[Subject]:
    """What `add_shape_options` and --model say is measured.

    Raises: CommandError for options that do not go together or a folder that cannot be written; RuntimeError, before any weight is
    written, where --device is a GPU that does not open.
    """
    from metalstep.bench.subject import subject_of

    if args.shape and args.model != MODEL:
        raise CommandError("--shape and --model name two things to measure", "leave one of them out")
    if args.shape:
        try_device(args.device)
        progress("writing random weights")
    with ExitStack() as stack:
        try:
            measured = stack.enter_context(subject_of(args.model, args.shape, args.shape_folder))
        except OSError as error:
            if not args.shape_folder:
                raise
            text = f"--shape-folder: cannot write to {args.shape_folder}: {error.strerror or error}"
            raise CommandError(text, "name a folder that can be written and has room, or leave it out") from None
        yield measured


def try_device(name: str | None) -> None:
    """Open a GPU and close it again: one that is not there is heard of before work is done for it. Raises: as NativeDevice.open."""
    from metalstep.kernels.native import NativeDevice

    device = name or DEFAULT_DEVICE
    if device_kind(device) in ("cuda", "metal"):
        NativeDevice.open(device).close()


def named(args: argparse.Namespace) -> str:
    """What is measured, for the head of a result."""
    from metalstep.bench.subject import shape_name
    from metalstep.shapes import find_shape

    return shape_name(args.shape) if args.shape and find_shape(args.shape) else args.model
