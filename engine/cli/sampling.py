"""The options of a request that `generate` and `chat` share: how tokens are picked, how much of the cache it takes."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

from metalstep.cli.parser import positive, refuse


def token_biases(text: str) -> dict[int, float]:
    """A JSON object from token ids to numbers, e.g. `{"42": -5, "7": 1.5}`."""
    try:
        value = json.loads(text)
        if not isinstance(value, dict):
            raise TypeError
        return {int(token): float(bias) for token, bias in value.items()}
    except (ValueError, TypeError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object from token ids to numbers") from None


SAMPLING: dict[str, tuple[Callable[[str], Any], str]] = {  # stream_generate's keyword: how its text is read, its help
    "temp": (float, "temperature; 0 takes the most likely token (default: 0)"),
    "top_p": (float, "keep the smallest set with this probability (default: 1, off)"),
    "min_p": (float, "drop tokens below this times the most likely (default: 0, off)"),
    "min_tokens_to_keep": (int, "most likely tokens that --min-p keeps in any case (default: 1)"),
    "top_k": (int, "keep this many tokens (default: 0, off)"),
    "xtc_probability": (float, "how often XTC drops the most likely tokens (default: 0, off)"),
    "xtc_threshold": (float, "XTC drops tokens above this probability but the least likely of them (default: 0.1)"),
    "repetition_penalty": (float, "divides positive logits of tokens seen, multiplies negative ones (default: 1, off)"),
    "repetition_context_size": (int, "last tokens that the repetition penalty sees (default: 0, prompt and answer)"),
    "presence_penalty": (float, "subtracted once from the logits of tokens seen (default: 0, off)"),
    "presence_context_size": (int, "last tokens that the presence penalty sees (default: 0, the answer)"),
    "frequency_penalty": (float, "subtracted per occurrence from the logits of tokens seen (default: 0, off)"),
    "frequency_context_size": (int, "last tokens that the frequency penalty sees (default: 0, the answer)"),
    "logit_bias": (token_biases, 'added to logits: a JSON object from token ids to numbers, e.g. {"42": -5}'),
    "seed": (int, "the same seed gives the same text (default: a new one each time)"),
}


def add_request_options(parser: argparse.ArgumentParser) -> None:
    """The options that `request_options` reads, and mlx-lm's that are refused by name."""
    sampling = parser.add_argument_group("sampling")
    for name, (read, text) in SAMPLING.items():
        metavar = "JSON" if read is token_biases else "N" if read is int else "X"
        sampling.add_argument(option(name), type=read, metavar=metavar, help=text)
    cache = parser.add_argument_group("the KV cache of the request")
    cache.add_argument(
        "--max-kv-size",
        type=positive,
        metavar="TOKENS",
        help="bound its cache to this many tokens: the first 4 and the most recent ones (default: no bound but the context)",
    )
    cache.add_argument("--prefill-step-size", type=positive, metavar="N", help="prompt tokens per step (default: 512)")
    several = "leave it out; in Python, decode_steps of metalstep.batch_generate makes several tokens in one native call"
    for name in ("--draft-model", "--num-draft-tokens"):
        refuse(parser, name, "speculative decoding is not supported", several)
    refuse(parser, "--adapter-path", "adapters are not supported", "fuse it with `mlx_lm.fuse` and pass the result as --model")
    for name in ("--kv-bits", "--kv-group-size", "--quantized-kv-start"):
        refuse(parser, name, "the KV cache is quantised as a scheme says", "use --kv-scheme, as in --kv-scheme affine8")


def option(name: str) -> str:
    """The command line's spelling of a keyword."""
    return "--" + name.replace("_", "-")


def request_options(args: argparse.Namespace) -> dict[str, Any]:
    """What the call gives of `add_request_options` and --max-tokens, as stream_generate's keywords.

    Raises: ValueError for a value outside its range.
    """
    names = (*SAMPLING, "max_tokens", "max_kv_size", "prefill_step_size")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    check_sampling(given)
    return given


def check_sampling(options: dict[str, Any]) -> None:
    """Raises: ValueError for a sampling option or max_tokens outside its range. Loading takes minutes: a wrong value is known before."""
    from metalstep.generate_options import max_tokens_from
    from metalstep.sampling import SamplingParams

    fields = {name: value for name, value in options.items() if name in SAMPLING}
    SamplingParams(**{"temperature" if name == "temp" else name: value for name, value in fields.items()})
    if "max_tokens" in options:
        max_tokens_from(options["max_tokens"])


def with_special_tokens(options: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """The options with what XTC must not drop, where it is on: line breaks and ends, as mlx_lm.generate chooses them."""
    if not options.get("xtc_probability"):
        return options
    line_break = tokenizer.encode("\n", add_special_tokens=False)
    return {**options, "xtc_special_tokens": [*line_break, *tokenizer.eos_token_ids]}
