"""`metalstep chat`: a conversation in the terminal, or line by line over a pipe."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any

from metalstep.cli.conversation import Conversation
from metalstep.cli.errors import CommandError, report
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
from metalstep.cli.sampling import SAMPLING, add_request_options, check_sampling, request_options, with_special_tokens
from metalstep.cli.status_line import StatusLine
from metalstep.cli.terminal import Interrupts, Lines

if TYPE_CHECKING:
    from metalstep.generate import GenerationResponse
    from metalstep.model import Model

# What ends an answer and not the chat.
FAILURES = (CommandError, ValueError, NotImplementedError, RuntimeError, OSError, MemoryError)
MAX_TOKENS = 256  # of an answer, unless told otherwise
FULL = "/reset begins a new conversation, /undo drops the last exchange"


def parser() -> Parser:
    """mlx_lm.chat's options, as far as they are supported, and those of `metalstep generate`."""
    p = Parser(
        "metalstep chat",
        "Talk with a model. Answers stream to stdout; speeds and messages go to stderr. Input that is no terminal is read line by line, "
        "one message each. /help lists the commands; Ctrl-C stops an answer, Ctrl-D ends.",
        [
            "metalstep chat --model smollm2",
            'metalstep chat --model smollm2 --system-prompt "You are brief." --temp 0.7',
            "printf 'Hi, I am Ada.\\nWhat is my name?\\n' | metalstep chat --model smollm2 --verbose false",
        ],
    )
    p.add_argument("--model", required=True, metavar="MODEL", help=MODEL_HELP)
    p.add_argument("--system-prompt", metavar="TEXT", help="the system message")
    p.add_argument(
        "-m", "--max-tokens", type=int, default=MAX_TOKENS, metavar="N", help="tokens of an answer, -1 for no limit (default: 256)"
    )
    p.add_argument("--chat-template-config", type=json_object, metavar="JSON", help="arguments for the chat template")
    p.add_argument("--trust-remote-code", action="store_true", help="let the tokenizer run code that comes with the model")
    p.add_argument(
        "--verbose",
        type=boolean,
        nargs="?",
        const=True,
        metavar="true|false",
        help="print speeds after each answer (default: true); --verbose alone also shows them while an answer comes, on a terminal",
    )
    refuse(p, "--pipeline", "a model runs on one machine", "leave it out")
    add_request_options(p)
    add_load_options(p)
    return p


def main(argv: list[str]) -> int:
    """talk with a model"""
    args = parser().parse_args(argv)
    from metalstep.token_ids import check_text

    options = request_options(args)
    check_text("--system-prompt", args.system_prompt or "")
    tokenizer_config = {"trust_remote_code": True} if args.trust_remote_code else None
    model, tokenizer = load_model(args, tokenizer_config=tokenizer_config)
    with model:
        if not tokenizer.has_chat_template:
            raise CommandError(f"{args.model} has no chat template", "it continues text with `metalstep generate --prompt TEXT`")
        chat = Chat(model, tokenizer, options, args.chat_template_config or {}, args.verbose)
        chat.conversation.set_system(args.system_prompt)
        if chat.lines.terminal:
            say(f"{args.model} on {model.device_description}. /help lists commands, Ctrl-C stops an answer, Ctrl-D ends.")
        return chat.run()


class Chat:
    """A conversation with a model: reads messages and commands, writes answers."""

    def __init__(
        self, model: Model, tokenizer: Any, options: dict[str, Any], template: dict[str, Any], verbose: bool | None = None
    ):
        """options: stream_generate's keywords. template: arguments of the chat template. verbose: speeds behind each answer, unless False;
        True: also while it comes."""
        self.model = model
        self.tokenizer = tokenizer
        self.options = options
        self.template = template
        self.verbose = verbose is not False
        self.live = verbose is True
        self.conversation = Conversation()
        self.lines = Lines()
        self.interrupted = False  # by Ctrl-C since the last message was read
        self.answers = 0  # asked for so far
        self.generated = 0  # tokens
        self.context_used = 0  # tokens of the conversation at the last answer
        self.max_context: int | None = model.explain().get("max_context")

    def run(self) -> int:
        """Until /exit or the end of input; the exit status, 2 where a line from a pipe failed.

        Raises: KeyboardInterrupt for a second Ctrl-C without a message between the two.
        """
        failed = False
        while True:
            try:
                text = self.lines.message()
                self.interrupted = False
                if not self.handle(text):
                    break
            except EOFError:
                if self.lines.terminal:
                    say("")
                break
            except KeyboardInterrupt:
                if self.interrupted or not self.lines.terminal:
                    raise
                self.interrupted = True
                say("\nCtrl-C again or Ctrl-D ends the chat.")
            except FAILURES as error:
                if isinstance(error, BrokenPipeError):  # nobody reads the answers any more
                    raise
                report(error)
                failed = True
        return 2 if failed and not self.lines.terminal else 0

    def handle(self, text: str) -> bool:
        """Answer a message or follow a command; False to end."""
        stripped = text.strip()
        if not stripped:
            return True
        if not stripped.startswith("/"):
            self.ask(text)
            return True
        if stripped.startswith("//"):  # a message that begins with a slash
            self.ask(stripped[1:])
            return True
        name, _, argument = stripped.partition(" ")
        if name in ("/exit", "/quit"):
            return False
        if name not in COMMANDS:
            raise CommandError(f"no command {name}", "/help lists them; // begins a message with one slash")
        COMMANDS[name][0](self, argument.strip())
        return True

    # ---- answers ------------------------------------------------------------------------------------------------------------
    def ask(self, text: str) -> None:
        """Add a message and answer it. One that cannot be answered is taken back: the conversation stays usable."""
        from metalstep.token_ids import check_text

        check_text("the message", text)
        self.conversation.add("user", text)
        try:
            self.answer()
        except FAILURES:
            self.conversation.undo()
            raise

    def answer(self) -> None:
        """Generate the answer to what stands in the conversation and add it as far as it came; nothing before its first token."""
        parts: list[str] = []
        last: GenerationResponse | None = None
        with Interrupts() as interrupts:
            prompt = self.prompt()
            began = first = latest = time.perf_counter()
            stream = self.stream(prompt, interrupts)
            status = StatusLine(self.model, self.live)
            try:
                for response in stream:
                    latest = time.perf_counter()
                    if last is None:
                        first = latest
                    last = response
                    parts.append(response.text)
                    status.write(response.text)
                    if interrupts.asked:
                        break
            except Stopped:
                pass
            except FAILURES as error:
                if not parts or isinstance(error, BrokenPipeError):
                    raise
                print(flush=True)
                report(error)
            finally:
                self.interrupted = interrupts.asked
                status.end()
                stream.close()
        print(flush=True)
        if parts:
            self.conversation.add("assistant", "".join(parts))
        count = last.generation_tokens if last else 0
        self.generated += count
        self.context_used = len(prompt) + count
        if self.verbose and last is not None:
            say(speeds(last, first - began, latest - first))
        if self.interrupted and not parts:
            say("stopped before the answer began; /retry answers the message, /undo drops it. Ctrl-C again ends the chat.")
        elif self.interrupted:
            say("stopped; what came of the answer stays in the conversation (/undo, /retry). Ctrl-C again ends the chat.")
        elif last is not None and last.finish_reason == "length":
            self.cut(count)

    def stream(self, prompt: list[int], interrupts: Interrupts) -> Generator[GenerationResponse, None, None]:
        """stream_generate with the settings; raises Stopped after Ctrl-C while the prompt is processed."""
        if self.max_context is not None and len(prompt) > self.max_context:
            raise CommandError(f"the conversation has {len(prompt):,} tokens, and the context holds {self.max_context:,}", FULL)
        options = with_special_tokens(self.options, self.tokenizer)
        if "seed" in options:  # another one for each answer, so that /retry gives another
            options = {**options, "seed": (options["seed"] + self.answers) % 2**64}
        self.answers += 1
        progress = PromptProgress(lines=False)

        def reported(done: int, total: int) -> None:
            progress(done, total)
            if interrupts.asked:
                raise Stopped

        from metalstep.generate import stream_generate

        return stream_generate(self.model, self.tokenizer, prompt, prompt_progress_callback=reported, **options)

    def prompt(self) -> list[int]:
        """Token ids of the conversation so far, through the chat template. Raises: CommandError with the template's own words."""
        try:
            text = self.tokenizer.apply_chat_template(
                self.conversation.messages, tokenize=False, add_generation_prompt=True, **self.template
            )
        except Exception as error:  # a template is the model's own program: it raises whatever it likes
            hint = "/system alone removes the system message, /undo drops the last exchange"
            raise CommandError(f"the model's chat template refuses this conversation: {error}", hint) from None
        return self.tokenizer.encode(text, add_special_tokens=False)

    def cut(self, count: int) -> None:
        """Say why an answer ended before its end."""
        limit = self.options["max_tokens"]
        if count == limit:
            say(f"cut off at max_tokens, {limit}; /set max_tokens N allows more, -1 any number")
        else:
            say(f"the context is full: {self.context_used:,} tokens\nhint: {FULL}")

    # ---- commands -----------------------------------------------------------------------------------------------------------
    def help(self, argument: str) -> None:
        """list the commands"""
        rows = [f"  {f'{name} {operands}':20} {(command.__doc__ or '').strip()}" for name, (command, operands) in COMMANDS.items()]
        say(
            "\n".join([*rows, f"  {'/exit':20} end, like Ctrl-D"])
            + "\nA backslash at the end of a line goes on with the next; // begins a message with a slash."
        )

    def reset(self, argument: str) -> None:
        """forget the conversation but for the system message"""
        self.conversation.reset()
        self.context_used = 0
        say("a new conversation")

    def system(self, argument: str) -> None:
        """set the system message; without TEXT remove it"""
        from metalstep.token_ids import check_text

        check_text("the system message", argument)
        self.conversation.set_system(argument)
        say("system message set" if argument else "no system message")

    def save(self, argument: str) -> None:
        """write the messages to a JSON file"""
        self.conversation.save(required("/save", argument))
        say(f"{len(self.conversation.messages)} messages in {argument}")

    def load(self, argument: str) -> None:
        """go on with the messages of a file that /save wrote"""
        self.conversation.load(required("/load", argument))
        messages = self.conversation.messages
        say(f"{len(messages)} messages from {argument}")
        if messages and messages[-1]["role"] == "user":
            say("the last one has no answer yet; /retry answers it")

    def undo(self, argument: str) -> None:
        """drop the last message and its answer"""
        text = self.conversation.undo()
        if text is None:
            raise CommandError("there is no message to drop")
        say(f"dropped: {text if len(text) <= 60 else text[:60] + '…'}")

    def retry(self, argument: str) -> None:
        """answer the last message anew"""
        dropped = self.conversation.take_answer_back()
        if dropped is None:
            raise CommandError("there is no message to answer")
        if not self.options.get("temp"):
            say("temp is 0, which gives the same answer; /set temp 0.7 gives others")
        try:
            self.answer()
        except FAILURES:
            self.conversation.messages += dropped
            raise
        if self.conversation.messages[-1]["role"] == "user":  # stopped before the new answer began
            self.conversation.messages += dropped

    def set(self, argument: str) -> None:
        """change how tokens are picked, e.g. /set temp 0.7; `default` as value puts it back, without NAME show all"""
        name, _, value = argument.partition(" ")
        name, value = name.lstrip("-").replace("-", "_"), value.strip()
        if not name:
            say("\n".join(f"  {name:24} {self.options.get(name, 'default')}" for name in (*SAMPLING, "max_tokens")))
            return
        if name not in (*SAMPLING, "max_tokens"):
            raise CommandError(f"no setting {name!r}, expected one of {', '.join([*SAMPLING, 'max_tokens'])}")
        options = {key: given for key, given in self.options.items() if key != name}
        if value != "default":
            options[name] = read(int if name == "max_tokens" else SAMPLING[name][0], name, value)
            check_sampling(options)
        elif name == "max_tokens":
            options[name] = MAX_TOKENS
        self.options = options
        say(f"{name} is {options.get(name, 'at its default')}")

    def stats(self, argument: str) -> None:
        """show what the conversation has used"""
        holds = f" of {self.max_context:,}" if self.max_context is not None else ""
        say(
            f"  messages             {len(self.conversation.messages)}\n"
            f"  tokens in context    {self.context_used:,}{holds}\n"
            f"  tokens generated     {self.generated:,}"
        )
        if self.model.native is not None:
            stats = self.model.engine.stats()
            say(f"  prompt tokens        {stats.prompt_tokens:,} computed, {stats.cached_tokens:,} from the cache")

    def multi(self, argument: str) -> None:
        """a message of several lines, up to a line /end"""
        text = self.lines.until("/end")
        if text.strip():
            self.ask(text)


class Stopped(Exception):
    """Ctrl-C while the prompt is processed."""


COMMANDS: dict[str, tuple[Callable[[Chat, str], None], str]] = {
    "/help": (Chat.help, ""),
    "/reset": (Chat.reset, ""),
    "/system": (Chat.system, "[TEXT]"),
    "/save": (Chat.save, "FILE"),
    "/load": (Chat.load, "FILE"),
    "/undo": (Chat.undo, ""),
    "/retry": (Chat.retry, ""),
    "/set": (Chat.set, "[NAME VALUE]"),
    "/stats": (Chat.stats, ""),
    "/multi": (Chat.multi, ""),
}


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def speeds(last: GenerationResponse, ttft: float, decoding: float) -> str:
    """One line on an answer. ttft and decoding: seconds to the first token and from it to the last."""
    decoded = last.generation_tokens - 1  # the first token comes with the prompt
    rate = f", {decoded / decoding:.1f} tok/s" if decoded > 0 and decoding > 0 else ""
    cached = getattr(last, "cached_tokens", None)  # mlx-lm's own responses have none
    cached_text = "" if cached is None else f" ({cached} cached)"
    said, prompt = counted(last.generation_tokens, "token"), counted(last.prompt_tokens, "token")
    return f"[{said}{rate}; prompt {prompt}{cached_text}, TTFT {ttft * 1e3:.0f} ms]"


def required(command: str, argument: str) -> str:
    if not argument:
        raise CommandError(f"{command} needs a file's name", f"{command} chat.json")
    return argument


def read(kind: Callable[[str], Any], name: str, text: str) -> Any:
    """A setting's value from its text. Raises: CommandError."""
    try:
        return kind(text)
    except (ValueError, argparse.ArgumentTypeError):
        expected = "an integer" if kind is int else "a number" if kind is float else "a JSON object from token ids to numbers"
        raise CommandError(f"{name} is {text!r}, expected {expected}", f"/set {name} VALUE") from None
