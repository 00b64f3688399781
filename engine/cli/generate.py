"""`metalstep generate`: a prompt in, text out."""

from __future__ import annotations

import sys
from typing import Any

from metalstep.cli.parser import CommandError, Parser, add_load_options, boolean, json_object, load_model
from metalstep.generate import GenerationResponse, stream_generate
from metalstep.model import Model
from metalstep.sampling import SamplingParams
from metalstep.token_ids import check_text


def parser() -> Parser:
    """mlx_lm.generate's options, as far as they are supported, and metalstep's own."""
    p = Parser(
        "metalstep generate",
        "Generate text. The text streams to stdout; speeds and the device go to stderr. Options have mlx_lm.generate's names.",
    )
    p.add_argument(
        "--model", required=True, metavar="MODEL", help="smollm2, a .gguf file, a directory or a Hugging Face id"
    )
    p.add_argument(
        "-p", "--prompt", required=True, help="the prompt; \\n and \\t are read as line break and tab; - reads stdin"
    )
    p.add_argument("--system-prompt", metavar="TEXT", help="the system message of the chat template")
    p.add_argument("--prefill-response", metavar="TEXT", help="text that the answer begins with")
    p.add_argument(
        "-m",
        "--max-tokens",
        type=int,
        default=256,
        metavar="N",
        help="tokens to generate, -1 for no limit (default: 256)",
    )
    p.add_argument(
        "--ignore-chat-template",
        action="store_true",
        help="give the prompt to the model as it is, without the chat template",
    )
    p.add_argument("--chat-template-config", type=json_object, metavar="JSON", help="arguments for the chat template")
    p.add_argument(
        "--extra-eos-token",
        nargs="+",
        default=[],
        metavar="TOKEN",
        help="tokens that end the answer besides the model's own",
    )
    p.add_argument(
        "--trust-remote-code", action="store_true", help="let the tokenizer run code that comes with the model"
    )
    p.add_argument(
        "--verbose",
        type=boolean,
        default=True,
        metavar="true|false",
        help="print speeds and the device to stderr (default: true)",
    )
    sampling = p.add_argument_group("sampling")
    sampling.add_argument(
        "--temp", type=float, default=0.0, help="temperature; 0 takes the most likely token (default: 0)"
    )
    sampling.add_argument(
        "--top-p", type=float, default=1.0, help="keep the smallest set with this probability (default: 1, off)"
    )
    sampling.add_argument(
        "--min-p", type=float, default=0.0, help="drop tokens below this times the most likely (default: 0, off)"
    )
    sampling.add_argument("--top-k", type=int, default=0, help="keep this many tokens (default: 0, off)")
    sampling.add_argument("--seed", type=int, help="the same seed gives the same text (default: a new one each time)")
    add_load_options(p)
    return p


def main(argv: list[str]) -> int:
    """generate text from a prompt"""
    args = parser().parse_args(argv)
    # Before minutes of loading: a wrong value is known now.
    SamplingParams(args.temp, args.top_p, args.min_p, args.top_k, args.seed)
    if args.max_tokens == 0 or args.max_tokens < -1:
        raise CommandError(f"--max-tokens is {args.max_tokens}, expected a number above 0, or -1 for no limit")
    text = sys.stdin.read() if args.prompt == "-" else args.prompt.replace("\\n", "\n").replace("\\t", "\t")
    for name, given in (("the prompt", text), ("--system-prompt", args.system_prompt), ("--prefill-response", args.prefill_response)):
        check_text(name, given or "")
    if not text:
        raise CommandError("the prompt is empty", "pass --prompt TEXT, or --prompt - and text on stdin")
    tokenizer_config = {"trust_remote_code": True} if args.trust_remote_code else None
    model, tokenizer = load_model(args, tokenizer_config=tokenizer_config)
    with model:
        for token in args.extra_eos_token:
            if token not in tokenizer.get_vocab():
                raise CommandError(f"--extra-eos-token {token!r} is no token of this model")
            tokenizer.add_eos_token(token)
        ids = encode(tokenizer, text, args)
        last = None
        for last in stream_generate(
            model,
            tokenizer,
            ids,
            args.max_tokens,
            temp=args.temp,
            top_p=args.top_p,
            min_p=args.min_p,
            top_k=args.top_k,
            seed=args.seed,
        ):
            print(last.text, end="", flush=True)
        print(flush=True)
        if args.verbose and last is not None:
            print("\n".join(statistics(model, last)), file=sys.stderr)
    return 0


def encode(tokenizer: Any, text: str, args: Any) -> list[int]:
    """The prompt's token ids, through the model's chat template where it has one and it is wanted."""
    if args.ignore_chat_template or not tokenizer.has_chat_template:
        if args.system_prompt or args.prefill_response:
            option = "--system-prompt" if args.system_prompt else "--prefill-response"
            raise CommandError(
                f"{option} needs a chat template, and none is used", "leave it out, or write it into the prompt"
            )
        return tokenizer.encode(text)
    messages = [{"role": "user", "content": text}]
    if args.system_prompt is not None:
        messages.insert(0, {"role": "system", "content": args.system_prompt})
    if args.prefill_response is not None:
        messages.append({"role": "assistant", "content": args.prefill_response})
    prompt = tokenizer.apply_chat_template(
        messages,
        tokenize=False,
        add_generation_prompt=args.prefill_response is None,
        continue_final_message=args.prefill_response is not None,
        **(args.chat_template_config or {}),
    )
    return tokenizer.encode(prompt, add_special_tokens=False)


def statistics(model: Model, last: GenerationResponse) -> list[str]:
    """Lines on what ran and how fast."""
    device = model.device_description
    if model.native is not None:
        plan = model.explain()
        device += f", {plan['launches_per_token']} launches per token"
    return [
        f"prompt: {last.prompt_tokens} tokens, {last.prompt_tps:.1f} tok/s",
        decode_rate(last),
        f"device: {device}",
        f"peak memory: {last.peak_memory:.3f} GB",
    ]


def decode_rate(last: GenerationResponse) -> str:
    """The first token comes with the prompt, so it is not a decoded one."""
    decoded = last.generation_tokens - 1
    if decoded < 1:
        return "decode: 1 token, which came with the prompt"
    seconds = last.generation_tokens / last.generation_tps  # since the first token
    return f"decode: {decoded} tokens after the first, {decoded / seconds:.1f} tok/s"
