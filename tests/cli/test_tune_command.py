"""metalstep tune from the command line: a table that can be used, and refusals."""
import json

import pytest
from gpu_device import DEVICE, KIND

from metalstep.cli import main as command
from metalstep.cli.tune import how_used
from metalstep.kernels.gpu.linear_tables import load, table

SHORT = ["--shape", "tiny", "--context", "20", "--time-budget", "1"]


def test_it_writes_a_table_that_can_be_used(tmp_path, capsys, monkeypatch):
    """Of the device's kind, with all entries that were there, in their order; and says what a step took before and after."""
    file = tmp_path / "table.json"
    assert command.main(["tune", "--device", DEVICE, *SHORT, "--rows", "2,8", "--json", "--out", str(file)]) == 0
    result = json.loads(capsys.readouterr().out)
    tuned = load(file.read_text())
    assert (result["file"], result["kind"], tuned.kind) == (str(file), KIND, KIND)
    assert [(point["shape"], point["rows"]) for point in result["points"]] == [("tiny", 2), ("tiny", 8)]
    assert all(point["wrong"] == 0 and point["before_us"] > 0 and point["ratio"] >= 1 for point in result["points"])
    kept = list(table(KIND).entries)
    assert [entry for entry in tuned.entries if entry in kept] == kept
    monkeypatch.setenv("METALSTEP_TUNING", str(file))
    assert table(KIND) == tuned


def test_without_out_the_table_is_the_devices_own(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("METALSTEP_CACHE", str(tmp_path))
    assert command.main(["tune", "--device", DEVICE, *SHORT, "--rows", "1"]) == 0
    printed = capsys.readouterr().out
    (file,) = (tmp_path / "tuning").iterdir()
    assert f"{file}: every later run on this device uses it; delete it to undo this" in printed
    assert "tiny                1 " in printed


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--device", "host"], "--device host is no GPU"),
        (["--device", "metel"], "device is 'metel', expected one of"),
        (["--rows", "1,65"], "--rows is 1,65, of which each must be 1 to 64"),
        (["--shape", "qwen3-0.6"], "shape is 'qwen3-0.6', expected one of"),
        (["--shape", ","], "--shape names no shape"),
        (["--shape", ""], "--shape names no shape"),
        (["--context", "9" * 20], "--context is 99999999999999999999, of which 2147483646 tokens are the most"),
        (["--bits", "7"], "bits is 7, expected one of"),
    ],
)
def test_what_it_cannot_tune_is_refused(options, error, capsys):
    assert command.main(["tune", "--device", DEVICE, *options]) == 2
    assert error in capsys.readouterr().err


def test_a_place_that_cannot_be_written_is_an_error_with_a_hint(tmp_path, capsys, monkeypatch):
    """One that is named before anything is measured, the device's own behind that."""
    (tmp_path / "file").touch()
    assert command.main(["tune", "--device", DEVICE, "--out", str(tmp_path / "file" / "table.json")]) == 2
    assert "there is no folder" in capsys.readouterr().err
    monkeypatch.setattr("metalstep.cli.tune.search", lambda *_: "GPU")
    monkeypatch.setenv("METALSTEP_CACHE", str(tmp_path / "file"))
    assert command.main(["tune", "--device", DEVICE]) == 2
    assert "hint: name a file with --out" in capsys.readouterr().err


def test_a_context_that_memory_does_not_hold_is_named(monkeypatch, capsys):
    def refuse(*args, **options):
        raise MemoryError("the KV cache takes 1 TB")

    monkeypatch.setattr("metalstep.tune_model.TuneModel", refuse)
    assert command.main(["tune", "--device", DEVICE, "--shape", "tiny", "--context", "10000000"]) == 2
    printed = capsys.readouterr().err
    assert "64 sequences of --context 10000000 tokens takes more memory than there is (the KV cache takes 1 TB)" in printed
    assert "hint: choose a smaller --context, or fewer --rows" in printed


def test_it_says_which_runs_use_the_table(tmp_path):
    """METALSTEP_TUNING wins over a device's own table."""
    file, other = tmp_path / "gpu.json", str(tmp_path / "other.json")
    assert how_used(file, False, None) == "every later run on this device uses it; delete it to undo this"
    assert how_used(file, False, other).startswith(f"METALSTEP_TUNING is set to {other} and wins; unset it")
    assert how_used(file, True, None) == f"set METALSTEP_TUNING={file} to use it"
    assert how_used(file, True, other) == f"set METALSTEP_TUNING={file} to use it (it is set to {other} now)"
    assert how_used(file, True, str(file)).startswith("METALSTEP_TUNING names it")


def test_a_variable_that_names_no_table_is_an_error_before_anything_is_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("METALSTEP_TUNING", str(tmp_path / "none.json"))
    assert command.main(["tune", "--device", DEVICE, *SHORT]) == 2
    assert "none.json: no tuning table can be read there (No such file or directory)" in capsys.readouterr().err
