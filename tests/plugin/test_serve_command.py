"""`metalstep serve` up to where the server would run: what it tells vLLM, and errors in one line each."""
from __future__ import annotations

import argparse
import io
import logging
import os
import re
import signal
import socket
import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest
from llama_config import config_folder
from vllm.engine.arg_utils import EngineArgs

from metalstep.cli import main as command
from metalstep.cli.errors import CommandError
from metalstep.native_model import PREFILL_ROWS
from metalstep.plugin import compat, engine_errors, serve
from metalstep.plugin.refusals import Refusal
from metalstep.plugin.serve_model import ServeModel


@pytest.fixture
def folder(tmp_path):
    return config_folder(tmp_path / "model")


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in ("VLLM_PLUGINS", "VLLM_TARGET_DEVICE", "VLLM_WORKER_MULTIPROC_METHOD", engine_errors.VARIABLE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "argv", ["metalstep"])


def parse(*argv):
    return serve.parse(list(argv))[0]


def cli(*argv, **environment):
    """Exit status, stdout and stderr of the command in a process of its own."""
    run = [sys.executable, "-m", "metalstep.cli.main", "serve", *argv]
    done = subprocess.run(run, capture_output=True, text=True, env={**os.environ, **environment})
    return done.returncode, done.stdout, done.stderr


def test_the_command_is_listed_with_its_help(capsys):
    assert command.main(["--help"]) == 0
    assert re.search(r"^  serve +serve a model over HTTP", capsys.readouterr().out, re.MULTILINE)


def test_without_vllm_the_error_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setattr(compat, "installed", lambda: None)
    assert command.main(["serve", "smollm2"]) == 2
    assert capsys.readouterr().err == "error: vLLM is not installed\nhint: run `metalstep setup vllm`\n"


def test_a_release_of_vllm_that_is_not_known_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr(compat, "installed", lambda: "0.40.0")
    assert command.main(["serve", "smollm2"]) == 2
    assert "error: vLLM is 0.40.0, expected 0.32 or later and before 0.34\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("VLLM_TARGET_DEVICE", "cpu", "VLLM_TARGET_DEVICE is cpu, which makes vLLM use its own CPU platform"),
        ("VLLM_PLUGINS", "other", "VLLM_PLUGINS is 'other' and leaves metalstep out"),
        ("VLLM_PLUGINS", "", "VLLM_PLUGINS is '' and leaves metalstep out"),
    ],
)
def test_a_setting_that_keeps_metalstep_out_is_an_error(monkeypatch, name, value, message):
    monkeypatch.setenv(name, value)
    with pytest.raises(CommandError, match=message):
        serve.prepare_environment()


@pytest.mark.parametrize(("system", "method"), [("linux", "fork"), ("darwin", "spawn")])
def test_engines_are_forked_except_on_a_mac(monkeypatch, system, method):
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "")  # so that it is taken back afterwards
    monkeypatch.delenv("VLLM_WORKER_MULTIPROC_METHOD")
    monkeypatch.setattr(sys, "platform", system)
    serve.prepare_environment()
    assert os.environ["VLLM_WORKER_MULTIPROC_METHOD"] == method


def test_another_platform_plugin_is_left_out_and_other_plugins_stay(monkeypatch):
    installed = {
        "vllm.platform_plugins": ["metal", "metalstep"],
        "vllm.general_plugins": ["metal", "metalstep", "my_models"],
        "vllm.stat_logger_plugins": ["my_stats"],
    }
    monkeypatch.setattr(serve, "entry_points", lambda group: [EntryPoint(name, "a:b", group) for name in installed.get(group, [])])
    monkeypatch.setenv("VLLM_PLUGINS", "")
    monkeypatch.delenv("VLLM_PLUGINS")
    serve.prepare_environment()
    assert os.environ["VLLM_PLUGINS"] == "metalstep,my_models,my_stats"


def test_alone_metalstep_sets_no_list_of_plugins():
    serve.prepare_environment()
    assert "VLLM_PLUGINS" not in os.environ


def test_options_are_vllms_and_unknown_ones_are_an_error():
    args = parse("model", "--port", "9", "--api-key", "k", "--root-path", "/r", "--uds", "/s", "--headless", "--ssl-keyfile", "f")
    assert (args.model_tag, args.port, args.api_key, args.root_path, args.uds) == ("model", 9, ["k"], "/r", "/s")
    assert args.headless and args.ssl_keyfile == "f"
    with pytest.raises(CommandError, match="unrecognized arguments: --frob") as error:
        parse("model", "--frob")
    assert error.value.hint == "metalstep serve --help=all"


def test_a_config_file_may_name_the_model(tmp_path):
    (tmp_path / "serve.yaml").write_text("model: some/model\nport: 8123\n")
    args = parse("--config", str(tmp_path / "serve.yaml"))
    assert (args.model_tag or args.model, args.port) == ("some/model", 8123)


def test_without_a_model_there_is_nothing_to_serve(tmp_path):
    with pytest.raises(CommandError, match="no MODEL") as error:
        serve.serve(["--port", "9"], None)
    assert error.value.hint == "metalstep serve smollm2"


def test_the_weights_of_a_file_go_to_the_engine_beside_the_users_own_options():
    args = parse("smollm2", "--additional-config", '{"threads": 2}')
    serve.apply_model(args, ServeModel("/cache/folder", "/models/a.gguf", "smollm2"))
    assert args.model == args.model_tag == "/cache/folder"
    assert args.additional_config == {"threads": 2, "model": "/models/a.gguf"}
    assert args.served_model_name == ["smollm2"]


def test_dotted_options_reach_the_engine_too():
    args = parse("smollm2", "--additional-config.device", "host")
    serve.apply_model(args, ServeModel("/cache/folder", "/models/a.gguf", "smollm2"))
    assert args.additional_config == {"device": "host", "model": "/models/a.gguf"}


def test_a_name_that_the_user_gives_is_kept():
    args = parse("smollm2", "--served-model-name", "mine", "too")
    serve.apply_model(args, ServeModel("/cache/folder", "/models/a.gguf", "smollm2"))
    assert args.served_model_name == ["mine", "too"]


def test_a_model_that_vllm_reads_itself_is_passed_on():
    args = parse("some/model")
    serve.apply_model(args, ServeModel("some/model"))
    assert args.model == "some/model"
    assert args.served_model_name is None
    assert args.additional_config == {}


@pytest.mark.parametrize(
    ("argv", "dtype"),
    [([], "auto"), (["--kv-cache-dtype", "bfloat16"], "bfloat16"), (["--kv-cache-dtype", "bfloat16", "--dtype", "half"], "half")],
)
def test_a_dtype_of_the_kv_cache_alone_is_enough(argv, dtype):
    """vLLM 0.33 wants activations of the same type, and what it says of those has no effect here."""
    args = parse("model", *argv)
    serve.apply_model(args, ServeModel("model"))
    assert args.dtype == dtype


@pytest.mark.parametrize(
    ("argv", "alone"),
    [
        ([], True),
        (["--api-server-count", "1"], True),
        (["--api-server-count", "2"], False),
        (["--data-parallel-size", "2"], False),
        (["--headless"], False),
        (["--data-parallel-rank", "0"], False),
        (["--data-parallel-hybrid-lb"], False),
    ],
)
def test_vllms_supervisor_runs_where_there_are_several_processes(argv, alone):
    assert serve.alone(parse("model", *argv)) == alone


def test_errors_are_without_pydantics_wrapping(folder):
    with pytest.raises(ValueError) as error:
        EngineArgs(model=folder, enable_prompt_embeds=True).create_engine_config()
    text, hint = serve.message_of(error.value)
    assert (text, hint) == ("--enable-prompt-embeds: prompts are tokens", "send text or token ids")
    with pytest.raises(ValueError) as error:
        EngineArgs(model=folder, max_model_len=10**9).create_engine_config()
    assert serve.message_of(error.value)[0].startswith("User-specified max_model_len (1000000000) is greater than")


@pytest.mark.parametrize(
    ("error", "text", "hint"),
    [
        (KeyError("invalid tool call parser: x"), "invalid tool call parser: x", None),
        (ValueError("a; b"), "a; b", None),
        (Refusal("--x: no; leave it out"), "--x: no", "leave it out"),
        (TypeError("Error: --a requires --b"), "TypeError: Error: --a requires --b", None),
    ],
)
def test_messages_of_errors(error, text, hint):
    assert serve.message_of(error) == (text, hint)


def test_what_ended_the_engine_reaches_the_servers_process(tmp_path, monkeypatch):
    path = tmp_path / "errors.json"
    monkeypatch.setenv(engine_errors.VARIABLE, str(path))
    logger = logging.getLogger(engine_errors.LOGGER)
    before = list(logger.handlers)
    try:
        engine_errors.install()
        engine_errors.install()
        assert len(logger.handlers) == len(before) + 1
        try:
            raise Refusal("the weights do not fit\nthe device; use fewer bits")
        except Refusal:
            logger.exception("EngineCore failed to start.")
    finally:
        logger.handlers[:] = before
    assert engine_errors.read(str(path)) == ("the weights do not fit the device", "use fewer bits")
    with pytest.raises(CommandError, match="the engine failed: the weights do not fit the device"), serve.one_line_errors(str(path)):
        raise RuntimeError("Engine core initialization failed. See root cause above.")


def test_without_an_error_of_the_engines_there_is_none_to_read(tmp_path):
    assert engine_errors.read(str(tmp_path / "none")) is None
    (tmp_path / "empty").touch()
    assert engine_errors.read(str(tmp_path / "empty")) is None


def test_an_error_that_nobody_foresaw_keeps_its_traceback(tmp_path):
    with pytest.raises(ZeroDivisionError), serve.one_line_errors(str(tmp_path / "none")):
        raise ZeroDivisionError


def test_an_engine_that_is_gone_without_a_word_is_named(tmp_path):
    gone = "Engine core initialization failed. See root cause above. Failed core proc(s): {'EngineCore': -9}"
    message = r"the engine's process ended while it started: {'EngineCore': -9}"
    with pytest.raises(CommandError, match=message), serve.one_line_errors(str(tmp_path / "none")):
        raise RuntimeError(gone)


@pytest.mark.parametrize(("received", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_the_exit_status_tells_an_interrupt_from_an_orderly_end(received, status):
    class Stopped:
        def cmd(self, args):
            def stop(*_):
                raise SystemExit

            before = signal.signal(received, stop)
            try:
                os.kill(os.getpid(), received)
                signal.pause()
            finally:
                signal.signal(received, before)

    assert serve.serve_several(argparse.Namespace(), Stopped()) == status


def test_an_engine_that_died_is_the_last_line_and_a_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(serve, "serve_alone", lambda args: None)
    monkeypatch.setattr("vllm.logger.configure_logging_from_args", lambda args: None)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    args, commands = serve.parse([config_folder(tmp_path)])
    args.model = args.model_tag
    assert serve.run(args, commands, str(tmp_path / "none")) == 1
    assert sys.stderr.getvalue().splitlines()[-1] == "error: the engine died: its process is gone, perhaps for want of memory"


def test_a_port_in_use_is_named(tmp_path):
    args, _ = serve.parse([config_folder(tmp_path), "--host", "127.0.0.1", "--port", "0"])
    args.model = args.model_tag
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        args.port = taken.getsockname()[1]
        try:
            with pytest.raises(CommandError, match=f"127.0.0.1:{args.port}: Address already in use") as error:
                serve.serve_alone(args)
        finally:
            signal.signal(signal.SIGINT, handlers[0])
            signal.signal(signal.SIGTERM, handlers[1])
    assert error.value.hint == "choose another --host or --port"


def test_a_refused_option_is_one_line_and_a_hint_on_stderr(folder):
    status, _, err = cli(folder, "--enable-prompt-embeds", "--port", "0", VLLM_LOGGING_LEVEL="ERROR")
    assert status == 2
    assert err.endswith("error: --enable-prompt-embeds: prompts are tokens\nhint: send text or token ids\n")
    assert "Traceback" not in err


def test_help_is_vllms_with_a_word_of_metalsteps(capsys):
    with pytest.raises(SystemExit) as stop:
        serve.serve(["--help=root-path"], None)
    assert not stop.value.code
    out = capsys.readouterr().out
    assert out.startswith("usage: metalstep serve MODEL")
    assert "--root-path ROOT_PATH" in out


@pytest.mark.parametrize(
    ("arguments", "tokens"),
    [
        ([], PREFILL_ROWS),
        (["--max-num-batched-tokens", "4096"], 4096),  # the user's word: the worker computes such a step in parts
        (["--additional-config", '{"device": "cuda"}'], serve.CUDA_ROWS),
        (["--max-num-seqs", "1024"], 1024),  # a step has a row for each sequence at least
        (["--no-enable-chunked-prefill"], None),  # whole prompts were asked for
    ],
)
def test_a_long_prompt_does_not_make_steps_longer_than_the_engine_computes_at_once(arguments, tokens):
    args = parse("model", *arguments)
    serve.apply_model(args, ServeModel("model"))
    assert args.max_num_batched_tokens == tokens
