"""The recording of vLLM's scheduler, replayed without vLLM: the runner gives every request all of its tokens."""

import json
import subprocess
import sys
from pathlib import Path

from metalstep import shapes
from metalstep.bench.shape_model import write_shape_model

FOLDER = Path(__file__).resolve().parents[1] / "plugin"


def test_the_recording_runs_where_vllm_is_not_installed(tmp_path, monkeypatch):
    small = shapes.Shape("nobody/small", 0, {**shapes.SHAPES["smollm2-135m"].config, "num_hidden_layers": 1, "vocab_size": 1024})
    monkeypatch.setitem(shapes.SHAPES, "small", small)
    model = write_shape_model(tmp_path / "small", "small")
    out = tmp_path / "out.json"
    command = [sys.executable, str(FOLDER / "replay.py"), "run", str(FOLDER / "scheduler_outputs.json.gz"), "--model", str(model)]
    done = subprocess.run([*command, "--rounds", "1", "--out", str(out)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert [row["streams"] for row in result["rows"]] == [32, 64]  # replay.py counts the tokens
    assert "64 streams: the runner " in done.stdout
