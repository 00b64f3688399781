"""`metalstep serve`: vLLM's own server in this process, with metalstep as its platform and errors in one line each.

Nothing here imports MLX: the engine's process is a fork of this one on Linux, and MLX's threads would not survive that.
"""
from __future__ import annotations

import argparse
import asyncio
import atexit
import gc
import logging
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NoReturn

from metalstep.cli.errors import CommandError, report, split_hint
from metalstep.plugin import engine_errors
from metalstep.plugin.compat import unsupported
from metalstep.plugin.models import register_unknown
from metalstep.plugin.parsers import choose_parsers, model_file, read_json
from metalstep.plugin.refusals import check_arguments
from metalstep.plugin.serve_model import ServeModel, find_model

EXPLAINED = (ValueError, TypeError, KeyError, AssertionError, NotImplementedError, RuntimeError)  # what vLLM raises for wrong options
STEP_ROWS = 512  # metalstep.native_model.PREFILL_ROWS: a longer chunk of a prompt gains nothing, and everybody else would wait for it
CUDA_ROWS = 2048  # likewise, of NVIDIA's GPUs
ENGINE_DIED, WRONG_CALL, INTERRUPTED = 1, 2, 130  # exit statuses
HELP = """usage: metalstep serve MODEL [any option of `vllm serve`]

MODEL is smollm2 (the packaged SmolLM2-135M-Instruct), a .gguf file, a directory or a Hugging Face id of an mlx-lm model. metalstep's own
options are JSON in --additional-config: {"device": "host|metal|cuda|metal-sim|eager", "threads": N, "arithmetic": "int16|int8",
"batch_invariant": true, "strict": true, "kv_scheme": "turbo8v4", ...}; docs/vllm.md has all of them, and the schemes of the KV cache.
Tool and reasoning parsers are chosen by the chat template where no option says otherwise. What follows is vLLM's own help.

examples:
  metalstep serve smollm2
  metalstep serve smollm2 --port 8001 --max-model-len 4096
  metalstep serve smollm2 --additional-config '{"kv_scheme": "turbo8v4"}'
"""


def main(argv: list[str]) -> int:
    """serve a model over HTTP with vLLM's OpenAI-compatible server (needs `metalstep setup vllm`)"""
    if reason := unsupported():
        if argv and argv[0] in ("-h", "--help"):
            text, hint = split_hint(reason)
            print(HELP)
            print(f"{text}, so that its help is not shown. {hint or ''}".rstrip())
            return 0
        raise CommandError(*split_hint(reason))
    model = find_model(argv[0]) if argv and not argv[0].startswith("-") else None  # a wrong name needs no vLLM to be found
    prepare_environment()
    try:
        status = serve(argv, model)
    except CommandError as error:
        report(error)
        status = WRONG_CALL
    except KeyboardInterrupt:
        print(file=sys.stderr)
        status = INTERRUPTED
    return leave(status)


def serve(argv: list[str], model: ServeModel | None) -> int:
    """Start vLLM's server and wait for its end. model: what argv's first word stands for; None: it begins with an option.

    Returns: the exit status. Raises: CommandError; KeyboardInterrupt.
    """
    if any(argument in ("-h", "--help") or argument.startswith("--help=") for argument in argv):
        print(HELP)
    with tempfile.NamedTemporaryFile(prefix="metalstep-engine-", suffix=".json") as errors:
        os.environ[engine_errors.VARIABLE] = errors.name
        with one_line_errors(errors.name):
            args, command = parse(argv)
            if args.model_tag is None and not any(argument.startswith(("--model", "--config")) for argument in argv):
                raise CommandError("no MODEL", "metalstep serve smollm2")
            check_arguments(args)
            apply_model(args, model or find_model(args.model_tag or args.model))
            gc.freeze()  # an engine that is forked would else copy the whole heap when it collects garbage for the first time
            return run(args, command, errors.name)


def leave(status: int) -> NoReturn:
    """End the process as Python would, short of tearing down its modules: that takes a second, and libraries of torch's print what they
    leaked behind the last message."""
    atexit._run_exitfuncs()  # among them vLLM's, which end its processes
    if errors := os.environ.get(engine_errors.VARIABLE):
        Path(errors).unlink(missing_ok=True)  # a signal's handler comes here from inside of `serve`
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(status)


def prepare_environment() -> None:
    """What vLLM reads from the environment when it is imported. Raises: CommandError for a setting that keeps metalstep out."""
    if os.environ.get("VLLM_TARGET_DEVICE") == "cpu":
        raise CommandError("VLLM_TARGET_DEVICE is cpu, which makes vLLM use its own CPU platform", "unset it")
    chosen = os.environ.get("VLLM_PLUGINS")
    if chosen is not None and "metalstep" not in chosen.split(","):
        raise CommandError(f"VLLM_PLUGINS is {chosen!r} and leaves metalstep out", "add metalstep to it, or unset it")
    if chosen is None and (names := other_plugins()) is not None:
        os.environ["VLLM_PLUGINS"] = ",".join(["metalstep", *names])
    # A forked engine has everything imported already. A forked process cannot use Metal.
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn" if sys.platform == "darwin" else "fork")


def other_plugins() -> list[str] | None:
    """The plugins to load beside metalstep where another platform is installed, of which vLLM allows one; None where there is none."""
    platforms = {entry.name for entry in entry_points(group="vllm.platform_plugins")} - {"metalstep"}
    if not platforms:
        return None
    groups = ("vllm.general_plugins", "vllm.io_processor_plugins", "vllm.stat_logger_plugins")
    return sorted({entry.name for group in groups for entry in entry_points(group=group)} - platforms - {"metalstep"})


def parse(argv: list[str]) -> tuple[argparse.Namespace, Any]:
    """The arguments and vLLM's serve command, from vLLM's own parser. Raises: CommandError."""
    sys.argv[1:] = ["serve", *argv]  # vLLM looks there too
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class ServeParser(FlexibleArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise CommandError(message, "metalstep serve --help=all")

    parser = ServeParser(prog="metalstep")
    command = ServeSubcommand()
    command.subparser_init(parser.add_subparsers(dest="subparser"))
    return parser.parse_args(["serve", *argv]), command


def apply_model(args: argparse.Namespace, model: ServeModel) -> None:
    """Put what vLLM and the engine load in place of what the user called MODEL, and defaults that fit the engine in place of vLLM's."""
    args.model = args.model_tag = model.path
    if model.weights is not None:
        config = args.additional_config = dict(args.additional_config or {})
        config.setdefault("model", model.weights)
    if model.name is not None and not args.served_model_name:
        args.served_model_name = [model.name]
    if args.max_num_batched_tokens is None and args.enable_chunked_prefill is not False:
        device = str((args.additional_config or {}).get("device"))
        args.max_num_batched_tokens = max(CUDA_ROWS if device.startswith("cuda") else STEP_ROWS, args.max_num_seqs or 0)
    if args.dtype == "auto" and args.kv_cache_dtype in ("float16", "bfloat16"):
        args.dtype = args.kv_cache_dtype  # vLLM 0.33 wants the two to be alike; the engine's activations are float32 in any case


def run(args: argparse.Namespace, command: Any, errors: str) -> int:
    """Serve until a signal or the end of the engine. errors: the file of engine_errors. Returns: the exit status."""
    from vllm.logger import configure_logging_from_args

    configure_logging_from_args(args)
    engine_errors.install()
    register_unknown(read_json(model_file(args.model, "config.json")).get("architectures") or ())
    if not args.headless:
        choose_parsers(args)
    command.validate(args)
    if not alone(args):
        return serve_several(args, command)
    args.api_server_count = None
    received = serve_alone(args)
    if received is None:
        text, hint = engine_errors.read(errors) or ("its process is gone, perhaps for want of memory", None)
        report(CommandError(f"the engine died: {text}", hint))
        return ENGINE_DIED
    return status_of(received)


def status_of(received: int) -> int:
    """The exit status after a signal: one that asks a server to end is no failure."""
    return INTERRUPTED if received == signal.SIGINT else 0


def serve_several(args: argparse.Namespace, command: Any) -> int:
    """vLLM's own supervisor of several processes, until a signal. Returns: the exit status. Raises: what it raises when one dies."""
    reader, writer = socket.socketpair()
    writer.setblocking(False)  # as set_wakeup_fd asks
    reader.setblocking(False)
    signal.set_wakeup_fd(writer.fileno())  # gets the numbers of signals, of which vLLM's handlers tell nothing
    try:
        with suppress(SystemExit):  # which vLLM's handlers raise
            command.cmd(args)
    finally:
        signal.set_wakeup_fd(-1)
    with suppress(BlockingIOError):
        received = [number for number in reader.recv(64) if number in (signal.SIGINT, signal.SIGTERM)]
        return status_of(received[0]) if received else 0
    return 0


def alone(args: argparse.Namespace) -> bool:
    """Whether this process is the only API server, and not vLLM's supervisor of several processes."""
    import vllm.envs as envs

    several = (args.grpc, args.headless, (args.api_server_count or 1) > 1, args.data_parallel_size > 1, envs.VLLM_USE_RUST_FRONTEND)
    external = (args.data_parallel_external_lb, args.data_parallel_hybrid_lb, args.data_parallel_multi_port_external_lb)
    ranks = (args.data_parallel_rank, args.data_parallel_start_rank)
    return not any(several) and not any(external) and all(rank is None for rank in ranks)


def serve_alone(args: argparse.Namespace) -> int | None:
    """vLLM's server until it ends. Returns: the signal that ended it, or None: the engine died."""
    import uvloop
    from vllm.entrypoints.launchers.api_server.entry import run_server_worker, setup_server
    from vllm.utils.system_utils import decorate_logs

    received: list[int] = []

    class Loop(uvloop.Loop):
        """Remembers which signal vLLM's handlers were called for: to vLLM all ends are alike."""

        def add_signal_handler(self, sig: int, callback: Callable[..., Any], *arguments: Any) -> None:
            def noted() -> None:
                received.append(sig)
                callback(*arguments)

            super().add_signal_handler(sig, noted)

    def stop(number: int, frame: object) -> NoReturn:
        if number == signal.SIGINT:
            print(file=sys.stderr)
        leave(status_of(number))

    for name in ("vllm.v1.engine.async_llm", "vllm.entrypoints.launchers.launcher"):
        # They take the engine's end, which they themselves bring about on a signal, for a failure.
        logging.getLogger(name).addFilter(lambda record: not (received and record.levelno >= logging.WARNING))
    # While the engine starts, and not by an exception: the wait for the engine drops those of signal handlers (pyzmq 27).
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    decorate_logs("APIServer", skip_if_decorated=True)
    try:
        address, listener = setup_server(args, reuse_port=False)
    except OSError as error:
        where = args.uds or f"{args.host or ''}:{args.port}"
        raise CommandError(f"{where}: {error.strerror or error}", "choose another --host or --port") from error
    loop = Loop()
    asyncio.set_event_loop(loop)
    try:
        loop.run_until_complete(run_server_worker(address, listener, args))
    except BaseException:
        if not received:  # else what was under way when the engine was stopped
            raise
    return received[0] if received else None


@contextmanager
def one_line_errors(errors: str) -> Iterator[None]:
    """What vLLM raises for a wrong option as CommandError: one line, without the wrapping of pydantic's."""
    try:
        yield
    except (CommandError, KeyboardInterrupt, SystemExit):
        raise
    except OSError as error:
        raise CommandError(" ".join(str(error).split())) from error
    except Exception as error:
        if (found := engine_errors.read(errors)) is not None:
            text, hint = found
            raise CommandError(f"the engine failed: {text}", hint) from error
        if (codes := str(error).partition("Failed core proc(s): ")[2]) not in ("", "{}"):
            raise CommandError(f"the engine's process ended while it started: {codes}") from error
        if not isinstance(error, EXPLAINED) and not type(error).__module__.startswith("vllm."):
            raise
        text, hint = message_of(error)
        raise CommandError(text, hint) from error


def message_of(error: BaseException) -> tuple[str, str | None]:
    """The message and, of metalstep's own, what to do."""
    details = getattr(error, "errors", None)  # pydantic's ValidationError
    if callable(details) and (found := details()):
        inner = found[0].get("ctx", {}).get("error")
        if isinstance(inner, BaseException):
            return message_of(inner)
        place = ".".join(map(str, found[0].get("loc", ())))
        return f"{place}: {found[0]['msg']}" if place else str(found[0]["msg"]), None
    if isinstance(error, KeyError) and error.args:
        return str(error.args[0]), None
    described = engine_errors.describe(error)
    text = described["error"] or ""
    return text.removeprefix(f"{type(error).__name__}: ") if isinstance(error, ValueError) else text, described["hint"]
