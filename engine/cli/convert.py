"""`metalstep convert`: write a model as an mlx-lm directory, quantised or in another dtype."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import TYPE_CHECKING, Any

from metalstep.cli.bench_output import HelpFormatter, progress
from metalstep.cli.errors import CommandError
from metalstep.cli.parser import Parser, positive

if TYPE_CHECKING:
    from metalstep.checkpoint.quantized import Quantization

EXAMPLES = """examples:
  metalstep convert owner/name --quantize 4bit --output name-4bit
  metalstep convert ./my-fine-tune --quantize mixed_4_6 --output my-fine-tune-4bit
  metalstep convert model.gguf --output model-mlx
  metalstep convert ./name-4bit --dequantize --dtype float16 --output name-f16"""
OUTPUT = "mlx_model"


def parser() -> Parser:
    p = Parser(
        "metalstep convert",
        "Write MODEL as an mlx-lm directory, by mlx-lm's own converter: quantised, dequantised, in another dtype, or out of a GGUF file, "
        "whose blocks are kept bit for bit where MLX has them. The directory appears when it is complete.",
    )
    p.formatter_class, p.epilog = HelpFormatter, EXAMPLES
    p.add_argument("model", nargs="?", metavar="MODEL", help="a Hugging Face id, a directory, a .gguf file or smollm2")
    p.add_argument("--model", "--hf-path", dest="named", metavar="MODEL", help="the same, as mlx_lm.convert names it")
    p.add_argument("--revision", metavar="REV", help="branch, tag or commit of a Hugging Face id")
    p.add_argument("-o", "--output", "--mlx-path", default=OUTPUT, metavar="DIR", help=f"the directory to make (default: {OUTPUT})")
    p.add_argument(
        "-q", "--quantize", nargs="?", const="", metavar="KIND",
        help="quantise: 2bit to 8bit (4bit:32 has groups of 32), mxfp4, nvfp4, mxfp8, mixed_2_6, mixed_3_4, mixed_3_6 or mixed_4_6 (4bit, "
        "or what --q-bits and the like say)",
    )  # fmt: skip
    p.add_argument("--q-bits", type=positive, metavar="N", help="bits of a quantised weight (default: 4)")
    p.add_argument("--q-group-size", type=positive, metavar="N", help="weights that share a scale: 32, 64 or 128 (default: 64)")
    p.add_argument("--q-mode", choices=("affine", "mxfp4", "nvfp4", "mxfp8"), help="kind of quantisation (default: affine)")
    p.add_argument("--quant-predicate", metavar="RECIPE", help="mixed bits: the same as --quantize RECIPE")
    p.add_argument("-d", "--dequantize", action="store_true", help="turn quantised weights into floats")
    p.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), help="of what is not quantised (default: the model's own)")
    p.add_argument("--trust-remote-code", action="store_true", help="run the tokenizer's own Python code where it has some")
    p.add_argument("--json", action="store_true", help="what was written, as JSON")
    return p


def main(argv: list[str]) -> int:
    """write a model as an mlx-lm directory: quantised, in another dtype, from GGUF"""
    args = parser().parse_args(argv)
    if (args.model is None) == (args.named is None):
        raise CommandError("MODEL is missing" if args.model is None else "MODEL is given twice", "metalstep convert --help")
    from metalstep.convert import convert

    done = convert(
        args.model or args.named,
        args.output,
        revision=args.revision,
        quantization=quantization(args),
        dequantize=args.dequantize,
        dtype=args.dtype,
        tokenizer_config={"trust_remote_code": True} if args.trust_remote_code else None,
        progress=progress,
    )
    progress("")
    result: dict[str, Any] = {**dataclasses.asdict(done), "path": str(done.path)}
    if args.json:
        print(json.dumps(result, indent=2))
        return 0
    size = f"{done.weight_bytes / 1e9:.2f} GB, {done.bits:.2f} bits per weight"
    print(f"{done.path}: {size} ({done.model_type}, from {done.source_bytes / 1e9:.2f} GB)")
    print(f"run it: metalstep chat --model {done.path}")
    return 0


def quantization(args: argparse.Namespace) -> Quantization | None:
    """What the options ask for; None for no quantisation. Raises: CommandError for options that contradict each other."""
    from metalstep.checkpoint.quantized import FLOAT_MODES, parse_quantize

    details = {
        "--q-bits": args.q_bits,
        "--q-group-size": args.q_group_size,
        "--q-mode": args.q_mode,
        "--quant-predicate": args.quant_predicate,
    }
    given = [name for name, value in details.items() if value is not None]
    if args.quantize is None:
        if given:
            option = f"{given[0]} {details[given[0]]}"
            raise CommandError(f"{given[0]} is given without --quantize", f"add -q: metalstep convert MODEL -q {option}")
        return None
    if args.quantize:
        if given:
            either = f"--quantize {args.quantize} alone, or -q with {given[0]}"
            raise CommandError(f"--quantize {args.quantize} says what {given[0]} says too", either)
        return parse_quantize(args.quantize)
    if args.q_mode in FLOAT_MODES:
        group_size, bits = FLOAT_MODES[args.q_mode]
        if (args.q_bits or bits, args.q_group_size or group_size, args.quant_predicate) != (bits, group_size, None):
            what = f"--q-mode {args.q_mode} has {bits} bits in groups of {group_size}, and no other"
            raise CommandError(what, "leave the other options out")
        return parse_quantize(args.q_mode)
    if args.quant_predicate:
        if args.q_bits:
            raise CommandError("--q-bits is given with --quant-predicate, which chooses the bits itself", "leave one of them out")
        wanted = parse_quantize(args.quant_predicate)
        group = parse_quantize(f"4bit:{args.q_group_size or wanted.group_size}").group_size
        return dataclasses.replace(wanted, group_size=group)
    return parse_quantize(f"{args.q_bits or 4}bit:{args.q_group_size or 64}")
