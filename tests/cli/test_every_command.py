"""What holds for every command and subcommand: help with examples that parse, refusals in one line, no traceback, no MLX for help."""

import shlex
import subprocess
import sys

import pytest

from metalstep import choices
from metalstep.cli import main as command
from metalstep.cli.errors import DEBUG
from metalstep.cli.parsers import all_parsers, command_parsers, examples
from metalstep.kernels import kv_codec, linear

COMMANDS = list(command.COMMANDS)
PARSERS = all_parsers()
CALLS = list(PARSERS)
LOADING = [  # calls that load a model once their arguments are read
    ["generate", "--model", "smollm2", "--prompt", "x"],
    ["chat", "--model", "smollm2"],
    ["explain", "smollm2"],
    ["bench", "launches"],
    ["bench", "sampling"],
]


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """--debug sets a variable: it is gone again after a test."""
    monkeypatch.setenv(DEBUG, "0")


def run(capsys, *argv):
    status = command.main(list(argv))
    out, err = capsys.readouterr()
    return status, out, err


def words(call):
    return [word for word in call if word]


def own_words(line):
    """The words of the `metalstep` call in an example, without the shell's pipes, redirections and comments."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|<>")
    lexer.whitespace_split, lexer.commenters = True, "#"
    tokens = list(lexer)
    tokens = tokens[tokens.index("metalstep") + 1 :]
    return tokens[: next((at for at, token in enumerate(tokens) if token in ("|", "<", ">")), len(tokens))]


@pytest.mark.parametrize("name", COMMANDS)
def test_the_table_says_what_the_command_says_of_itself(name):
    assert command.first_line(command.find(name).__doc__) == command.COMMANDS[name].help


def test_help_shows_every_command_in_its_group_and_runs_as_printed(capsys):
    out = run(capsys, "--help")[1]
    at = [out.index(f"\n  {name} ") for name in COMMANDS]
    assert at == sorted(at)
    groups = list(dict.fromkeys(row.group for row in command.COMMANDS.values()))
    assert [out.index(f"\n{group}:") for group in groups] == sorted(out.index(f"\n{group}:") for group in groups)
    for line in command.EXAMPLES:
        assert f"\n  {line}\n" in out
        name, *argv = own_words(line)
        command_parsers(name)[""].parse_args(argv)


@pytest.mark.parametrize("call", [*[(name, "") for name in COMMANDS], *(call for call in CALLS if call[1])], ids=" ".join)
def test_help_is_stdout_and_status_0(capsys, call):
    status, out, err = run(capsys, *words(call), "--help")
    assert (status, err) == (0, "")
    assert f"usage: metalstep {' '.join(words(call))}" in out
    assert "\nexamples:\n" in out
    assert run(capsys, "help", *words(call)) == (0, out, "")


@pytest.mark.parametrize("call", CALLS, ids=" ".join)
def test_examples_of_help_parse(call):
    lines = examples(PARSERS[call])
    assert 2 <= len(lines) <= 5, lines
    for line in lines:
        argv = own_words(line)
        key = max((key for key in PARSERS if words(key) == argv[: len(words(key))]), key=lambda key: len(words(key)))
        argv = argv[: argv.index("--")] if "--" in argv else argv
        PARSERS[key].parse_args(argv[len(words(key)) :])


def test_what_a_program_reads_has_json():
    read_by_people = {("chat", ""), ("completion", ""), ("models", "rm"), ("bench", "report")}
    without = {call for call, parser in PARSERS.items() if "--json" not in parser._option_string_actions}
    assert without == read_by_people


def test_the_choices_of_options_are_what_computes():
    assert tuple(linear.ARITHMETIC) == choices.ARITHMETIC
    assert set(choices.KV_DTYPES) == set(kv_codec.FLOAT_BYTES)


@pytest.mark.parametrize("call", CALLS, ids=" ".join)
def test_an_unknown_option_is_an_error_with_a_hint_and_nothing_on_stdout(capsys, call):
    status, out, err = run(capsys, *words(call), "--frobnicate")
    assert (status, out) == (2, "")
    error, hint = err.splitlines()
    assert error.startswith("error: ")
    assert hint.startswith("hint: ")


@pytest.mark.parametrize("call", CALLS, ids=" ".join)
def test_a_mistyped_option_is_recognised(capsys, call):
    known = [name for action in PARSERS[call]._actions for name in action.option_strings if name.startswith("--") and len(name) > 5]
    for name in [option for option in known if PARSERS[call]._option_string_actions[option].help != "==SUPPRESS=="][:3]:
        status, out, err = run(capsys, *words(call), name[:3] + name[4:])
        assert (status, out) == (2, "")
        assert f"hint: did you mean {name}? " in err, err


@pytest.mark.parametrize("name", COMMANDS)
def test_a_mistyped_command_is_recognised(capsys, name):
    status, out, err = run(capsys, name[:1] + name[2:])
    assert (status, out) == (2, "")
    assert f"did you mean {name}?" in err


def test_a_mistyped_choice_is_recognised(capsys):
    assert "did you mean host?" in run(capsys, "explain", "m", "--device", "hots")[2]
    assert "did you mean zsh?" in run(capsys, "completion", "zhs")[2]
    assert "did you mean decode?" in run(capsys, "bench", "decoed")[2]


@pytest.mark.parametrize("argv", LOADING, ids=lambda argv: " ".join(argv[:2]))
@pytest.mark.parametrize(
    ("error", "status"),
    [(KeyboardInterrupt(), 130), (KeyError("layer"), 1), (ValueError("wrong; do this"), 2), (OSError(28, "No space left on device"), 2)],
    ids=["Ctrl-C", "a bug", "a mistake", "the system"],
)
def test_debug_alone_shows_a_traceback(capsys, monkeypatch, argv, error, status):
    def fails(*_, **__):
        raise error

    monkeypatch.setattr("metalstep.model.load", fails)
    quiet = run(capsys, *argv)
    assert quiet[:2] == (status, "") or argv[0] == "bench"
    assert quiet[0] == status
    assert "Traceback" not in quiet[2]
    assert ("This is a bug in metalstep" in quiet[2]) == (status == 1)
    for loud in (["--debug", *argv], [*argv, "--debug"]):
        monkeypatch.setenv(DEBUG, "0")
        got = run(capsys, *loud)
        assert got[0] == status
        assert "Traceback" in got[2]


def test_the_variable_shows_tracebacks_too(capsys, monkeypatch):
    monkeypatch.setenv(DEBUG, "1")
    assert "Traceback" in run(capsys, "frobnicate")[2]


def test_help_of_every_command_imports_no_mlx():
    code = (
        "import sys\nfrom metalstep.cli.main import main\n"
        f"for call in {[words(call) for call in [('', ''), *CALLS]]!r}:\n    assert main([*call, '--help']) == 0\n"
        "found = {'mlx.core', 'mlx_lm', 'transformers', 'torch'} & set(sys.modules)\nassert not found, found"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("argv", [["completion", "bash"], ["explain", "--help"]], ids=" ".join)
def test_a_reader_that_leaves_ends_it_quietly(argv):
    reader = subprocess.Popen(["true"], stdin=subprocess.PIPE)
    reader.wait()
    done = subprocess.run([sys.executable, "-m", "metalstep.cli.main", *argv], stdout=reader.stdin, stderr=subprocess.PIPE)
    reader.stdin.close()
    assert (done.returncode, done.stderr) == (141, b"")
