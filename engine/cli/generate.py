"""`metalstep generate`: a prompt in, text out."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

from metalstep.cli.errors import CommandError
from metalstep.cli.parser import (
    MODEL_HELP,
    Parser,
    add_load_options,
    boolean,
    counted,
    json_object,
    load_model,
    refuse,
)
from metalstep.cli.progress import PromptProgress
from metalstep.cli.sampling import add_request_options, request_options, with_special_tokens
from metalstep.cli.status_line import StatusLine

if TYPE_CHECKING:
    from metalstep.generate import GenerationResponse
    from metalstep.model import Model

MARK = "<the prompt>"  # stands for the user's message to find where it begins


def parser() -> Parser:
    """mlx_lm.generate's options, as far as they are supported, and metalstep's own."""
    p = Parser(
        "metalstep generate",
        "Generate text. The text streams to stdout; speeds and the device go to stderr. Options have mlx_lm.generate's names.",
        [
            'metalstep generate --model smollm2 --prompt "What is the capital of France?"',
            'metalstep generate --model smollm2 --prompt "Write a poem about rain." --temp 0.8 --top-p 0.95 --max-tokens 400',
            "metalstep generate --model smollm2 --prompt - --system-prompt 'Summarise in one sentence.' < notes.txt",
            'metalstep generate --model smollm2 --prompt "Name a colour." --json',
        ],
    )
    p.add_argument(
        "--model", required=True, metavar="MODEL", help=MODEL_HELP
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
        nargs="?",
        const=True,
        metavar="true|false",
        help="print speeds and the device to stderr (default: true); --verbose alone also shows the speed while the text comes, on a "
        "terminal, what the KV cache held, and the progress of a long prompt where stderr is no terminal",
    )
    p.add_argument(
        "--json", action="store_true", help="one JSON object at the end instead of text: text, tokens, finish_reason, speeds, device"
    )
    p.add_argument(
        "--prompt-cache-file",
        metavar="FILE",
        help="go on behind the prompt whose cache is saved there; --prompt is what follows it",
    )
    refuse(p, "--image", "images are not supported", "pass text alone")
    for name in ("--quantize-activations", "-qa"):
        refuse(p, name, "it has another name here", "--arithmetic int8 quantises activations to 8 bits")
    own = "leave it out: the model's own template is used where it has one; --ignore-chat-template uses none"
    refuse(p, "--use-default-chat-template", "tokenizers have no default chat template", own)
    add_request_options(p)
    add_load_options(p)
    return p


def main(argv: list[str]) -> int:
    """generate text from a prompt"""
    args = parser().parse_args(argv)
    verbose = args.verbose is not False
    options = request_options(args)
    text = sys.stdin.read() if args.prompt == "-" else args.prompt.replace("\\n", "\n").replace("\\t", "\t")
    from metalstep.generate import stream_generate
    from metalstep.token_ids import check_text

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
        if args.prompt_cache_file is not None:
            options["prompt_cache"] = saved_cache(model, args.prompt_cache_file)
        ids = encode(tokenizer, text, args)
        if verbose:
            options["prompt_progress_callback"] = PromptProgress(lines=args.verbose is True)
        options = with_special_tokens(options, tokenizer)
        last, texts, tokens = None, [], []
        status = StatusLine(model, args.verbose is True)
        for last in stream_generate(model, tokenizer, ids, **options):
            texts.append(last.text)
            tokens.append(last.token)
            if not args.json:
                status.write(last.text)
        status.end()
        if args.json:
            print(json.dumps(answer(args.model, model, texts, tokens, last), indent=2))
        print(end="" if args.json else "\n", flush=True)
        if verbose and last is not None:
            print("\n".join(statistics(model, last)), file=sys.stderr)
        if args.verbose is True and model.native is not None:
            print(kv_peak(model), file=sys.stderr)
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
    if args.system_prompt is not None and args.prompt_cache_file is not None:
        raise CommandError("--system-prompt stands before the message, where --prompt-cache-file has the cached prompt", "leave one out")
    messages = [{"role": "user", "content": text}]
    if args.system_prompt is not None:
        messages.insert(0, {"role": "system", "content": args.system_prompt})
    if args.prefill_response is not None:
        messages.append({"role": "assistant", "content": args.prefill_response})
    prompt = rendered(tokenizer, messages, args)
    if args.prompt_cache_file is not None:  # the cache holds what the template puts before the message
        messages[-1 if args.prefill_response is None else -2]["content"] = MARK
        before, found, _ = rendered(tokenizer, messages, args).partition(MARK)
        if not found:
            raise CommandError("the chat template changes the prompt's text, so that where it begins is unknown", "--ignore-chat-template")
        prompt = prompt[len(before) :]
    return tokenizer.encode(prompt, add_special_tokens=False)


def saved_cache(model: Model, path: str) -> Any:
    """A prompt cache that save_prompt_cache wrote. Raises: ValueError for another file, OSError."""
    if model.native is None:
        from mlx_lm.models.cache import load_prompt_cache as load_eager_cache

        return load_eager_cache(path)
    from metalstep.models.cache import load_prompt_cache

    return load_prompt_cache(path)


def rendered(tokenizer: Any, messages: list[dict[str, str]], args: Any) -> str:
    """The chat template's text."""
    return tokenizer.apply_chat_template(
        messages,
        tokenize=False,
        add_generation_prompt=args.prefill_response is None,
        continue_final_message=args.prefill_response is not None,
        **(args.chat_template_config or {}),
    )


def answer(name: str, model: Model, texts: list[str], tokens: list[int], last: GenerationResponse | None) -> dict[str, Any]:
    """What --json prints. Speeds in tokens per second, memory in GB; null where nothing was generated."""
    counts = ("prompt_tokens", "cached_tokens", "generation_tokens", "finish_reason", "prompt_tps", "generation_tps", "peak_memory")
    about = {"model": name, "device": model.device_description, "text": "".join(texts), "tokens": [int(token) for token in tokens]}
    return {**about, **{count: getattr(last, count, None) for count in counts}}


def statistics(model: Model, last: GenerationResponse) -> list[str]:
    """Lines on what ran and how fast."""
    device = model.device_description
    if model.native is not None:
        plan = model.explain()
        device += f", {plan['launches_per_token']} launches per token"
    known = getattr(last, "cached_tokens", 0)  # mlx-lm's own responses have none
    cached = f" ({known} cached)" if known else ""
    return [
        f"prompt: {counted(last.prompt_tokens, 'token')}{cached}, {last.prompt_tps:.1f} tok/s",
        decode_rate(last),
        f"device: {device}",
        f"peak memory: {last.peak_memory:.3f} GB",
    ]


def kv_peak(model: Model) -> str:
    """A line on what the KV cache has held at most."""
    stats = model.engine.stats()
    return f"KV cache: {stats.kv_peak_bytes / 1e6:.1f} of {stats.kv_total_bytes / 1e6:,.0f} MB"


def decode_rate(last: GenerationResponse) -> str:
    """The first token comes with the prompt, so it is not a decoded one."""
    decoded = last.generation_tokens - 1
    if decoded < 1:
        return "decode: 1 token, which came with the prompt"
    seconds = last.generation_tokens / last.generation_tps  # since the first token
    return f"decode: {counted(decoded, 'token')} after the first, {decoded / seconds:.1f} tok/s"
