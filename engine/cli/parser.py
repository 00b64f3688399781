"""What the subcommands share: a parser whose errors are one line, and the options that choose how a model is loaded."""

from __future__ import annotations

import argparse
import json
import logging
import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from metalstep.choices import ARITHMETIC, DEVICES, KV_DTYPES, DeviceNames
from metalstep.cli.errors import CommandError, closest
from metalstep.memory_size import memory_size

if TYPE_CHECKING:
    from metalstep.model import Model

MODEL_HELP = "smollm2, a .gguf file, a directory or a Hugging Face id (owner/name, or owner/name:Q4_K_M of GGUF files)"
MISSING = "the following arguments are required: "  # what argparse says first, also where an option is only mistyped


class HelpFormatter(argparse.HelpFormatter):
    """Leaves a text with line breaks, such as examples, as it is."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if "\n" in text else super()._fill_text(text, width, indent)


class Parser(argparse.ArgumentParser):
    """An argument parser that raises CommandError where argparse prints its usage and exits.

    examples: calls of this command that work as they are, for the end of its help. The command line checks that they parse.
    """

    def __init__(self, prog: str, description: str, examples: Sequence[str] = ()):
        super().__init__(prog=prog, description=description, allow_abbrev=False, formatter_class=HelpFormatter)
        if examples:
            self.epilog = "examples:\n" + "\n".join(f"  {line}" for line in examples)
        self._given: list[str] = []

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self._given = list(args or [])
        return super().parse_known_args(args, namespace)

    def _print_message(self, message: str, file: Any = None) -> None:
        if message:  # argparse swallows the error of a reader that has left
            (file or sys.stdout).write(message)

    def error(self, message: str) -> NoReturn:
        known = self._option_string_actions
        for word in (text.partition("=")[0] for text in self._given if text.startswith("--")):
            if word not in known and word != "--" and message.startswith((MISSING, "unrecognized arguments: ")):
                meant = closest(word, [name for name in known if known[name].help != argparse.SUPPRESS])
                if message.startswith(MISSING) and meant:
                    message = f"unrecognized arguments: {word}"
                if meant and word in message:
                    raise CommandError(message, f"did you mean {meant}? `{self.prog} --help` lists the options")
        first = self._given[0] if self._given else "-"
        stray = (message.startswith(MISSING) and "--model" in message) or message == f"unrecognized arguments: {first}"
        if stray and "--model" in known and not first.startswith("-"):
            raise CommandError(message, f"name the model behind its option: {self.prog} --model {shlex.quote(first)}")
        raise CommandError(message, f"{self.prog} --help")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            if isinstance(action.choices, DeviceNames) and ":" in str(value):
                text = f"argument {'/'.join(action.option_strings)}: {str(value)!r} is no device, expected one of {action.choices.words}"
                raise CommandError(text, "only cuda takes a number, counted from 0: cuda:1 is the second NVIDIA GPU") from None
            if meant := closest(str(value), map(str, action.choices or ())):
                raise CommandError(str(error), f"did you mean {meant}? `{self.prog} --help` lists the options") from None
            raise


class Refused(argparse.Action):
    """An option of mlx-lm's without a native form: using it is an error that says why and what works instead."""

    def __init__(self, option_strings: Sequence[str], dest: str, reason: str = "", instead: str = "", **_: Any):
        super().__init__(option_strings, dest, nargs="*", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        self.reason = reason
        self.instead = instead

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> NoReturn:
        raise CommandError(f"{option_string}: {self.reason}", self.instead)


def refuse(parser: argparse.ArgumentParser, option: str, reason: str, instead: str) -> None:
    """Let `parser` answer `option` with an error and the hint `instead`."""
    parser.add_argument(option, action=Refused, reason=reason, instead=instead)


def boolean(text: str) -> bool:
    """`true` or `false`, as mlx_lm.generate spells a flag's value."""
    if text.lower() in ("true", "t", "1", "yes"):
        return True
    if text.lower() in ("false", "f", "0", "no"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


def positive(text: str) -> int:
    """An integer above 0."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer above 0")
    return value


def memory(text: str) -> str:
    """A size that load(kv_memory=...) takes, left as it is: a fraction of the free memory means what is free then."""
    try:
        memory_size("it", text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a size (2GB, 1.5GiB) nor a fraction of the free memory (0.5)") from None
    return text


def integers(text: str) -> list[int]:
    """Integers above 0 with commas between them."""
    return [positive(part) for part in text.split(",")]


def json_object(text: str) -> dict[str, Any]:
    """A JSON object."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object")
    return value


def counted(number: int, what: str) -> str:
    """`1 token`, `1,024 tokens`. what: in the singular."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def add_device_options(parser: argparse._ActionsContainer) -> None:
    """Where the model runs."""
    parser.add_argument(
        "--device",
        choices=DEVICES,
        help="metal: an Apple GPU (default on a Mac); cuda: an NVIDIA GPU, cuda:1 the second; host: the native step on the CPU (default "
        "elsewhere); metal-sim: on Linux, the GPU's shaders simulated on the CPU, for tests; eager: mlx-lm's own graph through MLX",
    )
    parser.add_argument(
        "--batch-invariant",
        action="store_true",
        help="a request's logits are the same bits in any batch; always so on the host device, slower on a GPU",
    )


def add_source_options(group: argparse._ActionsContainer) -> None:
    """Which weights are read of a model, and as what: `revision` and `quantize` of `open_checkpoint`."""
    group.add_argument("--revision", metavar="REV", help="branch, tag or commit of a Hugging Face id (default: main)")
    group.add_argument(
        "--quantize", metavar="KIND",
        help="quantise a floating-point model while it is loaded: 4bit, 8bit, 4bit:32, mxfp4, mixed_4_6, … (`metalstep convert` keeps it)",
    )  # fmt: skip


def add_load_options(parser: argparse.ArgumentParser) -> None:
    """The options that `load_model` reads."""
    group = parser.add_argument_group("how the model runs")
    add_source_options(group)
    add_device_options(group)
    group.add_argument(
        "--threads", type=positive, metavar="N", help="threads of the host device (default: all that it may use)"
    )
    group.add_argument(
        "--arithmetic",
        choices=ARITHMETIC,
        default="int16",
        help="of quantised weights: int16 is near-exact (default), int8 is faster with many rows and less exact",
    )
    group.add_argument(
        "--kv-dtype", choices=KV_DTYPES, default="float16", help="type of the KV cache (default: float16)"
    )
    add_scheme_options(group)
    group.add_argument(
        "--max-context",
        type=positive,
        metavar="TOKENS",
        help="tokens of the longest sequence (default: the model's limit, or what fits)",
    )
    group.add_argument(
        "--kv-memory",
        type=memory,
        metavar="SIZE",
        help="memory of the KV cache that all requests share: 2GB, 1.5GiB, or 0.5 of what is free (default: 0.5; on "
        "metal 0.25; on cuda 0.9 of what the weights leave of the GPU's)",
    )
    group.add_argument(
        "--strict", action="store_true", help="fail where a model cannot run natively instead of running it eagerly"
    )


def add_scheme_options(group: Any) -> None:
    """How the KV cache is encoded: the options that `scheme_options` reads."""
    group.add_argument(
        "--kv-scheme", metavar="NAME", default="none",
        help="compress the KV cache: affine8, turbo8v4, turbo4, turbo4v2, ... (`metalstep explain` shows bytes; default: none)",
    )  # fmt: skip
    group.add_argument("--kv-norm-dtype", choices=("f16", "f32"), help="of each vector's scale in a turbo scheme (default: f16)")
    group.add_argument(
        "--kv-scale", metavar="KIND",
        help="what a turbo vector's scale keeps: matched (its norm, default), raw or unbiased; of keys and values apart: matched,unbiased",
    )  # fmt: skip
    group.add_argument(
        "--kv-boundary", type=int, metavar="N",
        help="first and last N layers that are affine8 (default: 2 where keys have 2 to 4 bits or values 2; 0: none)",
    )  # fmt: skip
    group.add_argument(
        "--kv-key-center", choices=("auto", "off"), help="whether keys are centred by what `metalstep calibrate` found (default: auto)"
    )


def scheme_options(args: argparse.Namespace) -> dict[str, Any]:
    """`load`'s options of the KV cache's encoding, those that were given."""
    names = ("kv_scheme", "kv_norm_dtype", "kv_scale", "kv_boundary", "kv_key_center")
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def of_something_else(record: logging.LogRecord) -> bool:
    """Not of a prompt beyond the context: metalstep refuses that in its own words, where transformers speaks of indexing errors to come."""
    return "longer than the specified maximum" not in record.getMessage()


def load_model(args: argparse.Namespace, **others: Any) -> tuple[Model, Any]:
    """`metalstep.load` with the options of `add_load_options`; (model, tokenizer)."""
    from metalstep.cli.progress import load_progress
    from metalstep.model import load

    logging.getLogger("transformers.tokenization_utils_base").addFilter(of_something_else)
    if args.kv_memory is not None:
        others["kv_memory"] = args.kv_memory
    with load_progress(str(args.model)):
        return load(
            args.model,
            revision=args.revision,
            quantize=args.quantize,
            device=args.device,
            batch_invariant=args.batch_invariant,
            threads=args.threads,
            strict=args.strict,
            arithmetic=args.arithmetic,
            kv_dtype=args.kv_dtype,
            max_context=args.max_context,
            **scheme_options(args),
            **others,
        )
