"""What every benchmark prints and writes: machine and versions first, the JSON in a file, warnings on a busy machine."""

import argparse
import json
import time

import pytest

from metalstep.bench import machine as machine_module
from metalstep.bench.machine import Watch, busy, machine
from metalstep.cli import bench_output
from metalstep.cli.bench_output import Output, add_output_options, check_out, command_of
from metalstep.cli.errors import CommandError
from metalstep.cli.version import git_commit


def run(tmp_path, monkeypatch, argv, load=0.0, elsewhere=0.0):
    """A benchmark that measures nothing."""
    monkeypatch.setattr(bench_output, "machine", lambda: {**machine(), "load": load})
    monkeypatch.setattr(Watch, "result", lambda _: {"seconds": 1.0, "elsewhere": elsewhere, "stolen": 0.1})
    p = argparse.ArgumentParser()
    add_output_options(p, plot=True)
    output = Output(p.parse_args(argv), "quality", argv, "a model", "a method")
    output.finish({"device": "host", "machine": "replaced", "rows": [1]}, lambda result: [f"rows {result['rows']}"])


def test_machine_and_versions_come_first_in_text_and_in_json(tmp_path, monkeypatch, capsys):
    run(tmp_path, monkeypatch, [])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["machine", "versions", "model", "method", "rows"]
    assert all(word in lines[0] for word in (machine()["cpu"], "GiB", "load 0.00", "UTC"))
    assert all(word in lines[1] for word in ("metalstep ", "mlx ", "mlx-lm ", "python "))
    run(tmp_path, monkeypatch, ["--json"])
    result = json.loads(capsys.readouterr().out)
    assert list(result) == ["benchmark", "command", "machine", "versions", "device", "rows", "others", "warnings"]
    assert result["machine"]["cpus"] >= 1 and result["command"] == "metalstep bench quality"
    assert result["versions"].get("commit") == git_commit()


def test_out_has_the_json_while_the_text_is_shown(tmp_path, monkeypatch, capsys):
    out = tmp_path / "x.json"
    run(tmp_path, monkeypatch, ["--out", str(out)])
    assert "rows [1]" in capsys.readouterr().out
    assert json.loads(out.read_text())["rows"] == [1]


def test_an_out_that_cannot_be_written_is_told_before_anything_is_measured(tmp_path):
    check_out(str(tmp_path / "new.json"))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "old.json").write_text("kept")
    check_out(str(tmp_path / "old.json"))
    assert (tmp_path / "old.json").read_text() == "kept"
    for out, text in ((tmp_path, "it cannot be written"), (tmp_path / "none" / "x.json", "there is no folder")):
        with pytest.raises(CommandError, match=text):
            check_out(str(out))


def test_a_busy_machine_is_told_before_and_behind(tmp_path, monkeypatch, capsys):
    run(tmp_path, monkeypatch, [], load=3.0, elsewhere=1.5)
    printed = capsys.readouterr()
    assert "warning: the load average is 3.0 before anything is measured" in printed.err
    assert printed.out.splitlines()[-1].startswith("warning: other programs took 1.5 cores, 0.1 of them other machines")
    run(tmp_path, monkeypatch, [])
    printed = capsys.readouterr()
    assert "warning" not in printed.err + printed.out
    assert busy(None, {"seconds": 1.0, "elsewhere": None, "stolen": None}) is None


def test_what_this_process_computes_is_not_elsewhere(monkeypatch):
    """The clocks are the system's; the machine's is held so that nobody else's work counts."""
    start = [time.process_time() + 100.0]
    monkeypatch.setattr(machine_module, "machine_cpu_seconds", lambda: time.process_time() + start[0])
    watch = Watch()
    until = time.process_time() + 0.2
    while time.process_time() < until:
        pass
    mine = watch.result()
    assert mine["elsewhere"] < 0.5
    start[0] += 10.0 * max(mine["seconds"], 0.1)
    assert watch.result()["elsewhere"] > 2.0


@pytest.mark.parametrize(
    ("argv", "command"),
    [
        (["--json", "--batch", "1,8"], "metalstep bench decode --batch 1,8"),
        (["--out", "a/x.json", "--plot=a/y.svg", "--pairs", "2", "--peers-python", "a/python"], "metalstep bench decode --pairs 2"),
        (["--case", "a b*"], "metalstep bench decode --case 'a b*'"),
    ],
)
def test_a_command_is_what_makes_the_result_again_without_names_of_files(argv, command):
    assert command_of("decode", argv) == command
