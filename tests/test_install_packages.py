"""The sdist has every file that a build on another machine needs, the wheel every module, and setup.py builds on a Mac with the Command
Line Tools alone. Nothing is compiled here: `make dist` does."""

import importlib.util
import re
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import setuptools

ROOT = Path(__file__).resolve().parents[1]
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
FOLDERS = ("engine", "kernels", "metal", "plugin")  # of Python packages
NOT_BUILT_FROM = {".gitignore"}  # files of the repository that an sdist may lack


def package_folder(name):
    """The folder of a package, by pyproject.toml's package-dir."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        if folder := SETUPTOOLS["package-dir"].get(".".join(parts[:count])):
            return Path(folder, *parts[count:])
    raise KeyError(name)


def wheel_files():
    """What build_py takes, relative to the checkout."""
    files = set()
    for package in SETUPTOOLS["packages"]:
        folder = ROOT / package_folder(package)
        for pattern in ("*.py", *SETUPTOOLS["package-data"].get(package, [])):
            files |= {str(path.relative_to(ROOT)) for path in folder.glob(pattern)}
    return files


def sdist_files():
    """The wheel's files, setuptools' own, and what MANIFEST.in adds."""
    files = wheel_files() | {"setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"}
    for line in (ROOT / "MANIFEST.in").read_text().splitlines():
        command, *words = line.split()
        if command == "include":
            files |= {word for word in words if (ROOT / word).is_file()}
        elif command == "graft":
            files |= {str(path.relative_to(ROOT)) for path in (ROOT / words[0]).rglob("*") if path.is_file()}
        elif command == "prune":
            files = {name for name in files if not name.startswith(f"{words[0]}/")}
        elif command == "global-exclude":
            files = {name for name in files if not any(fnmatch(part, word) for part in Path(name).parts for word in words)}
        else:
            raise AssertionError(f"MANIFEST.in: this test does not know {command}")
    return files


def checkout_files():
    """What git has, and new files in its folders that it does not ignore."""

    def listed(*options):
        return subprocess.run(["git", "ls-files", *options], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()

    names = [*listed(), *(name for name in listed("--others", "--exclude-standard") if "/" in name)]
    return {name for name in names if (ROOT / name).exists()}


pytestmark = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="an unpacked sdist: its files are what is here")


def test_every_file_of_the_checkout_is_in_the_sdist():
    assert checkout_files() - sdist_files() - NOT_BUILT_FROM == set()


def test_the_sdist_has_nothing_that_was_built():
    assert {name for name in sdist_files() if Path(name).suffix in (".so", ".dylib", ".pyc", ".o") or ".build" in Path(name).parts} == set()


def test_every_module_and_every_metal_file_is_in_the_wheel():
    wanted = {name for name in checkout_files() if name.split("/")[0] in FOLDERS and Path(name).suffix in (".py", ".metal", ".h")}
    assert wanted - wheel_files() == set()


# ---- setup.py, with stand-ins for macOS and for Swift


@pytest.fixture
def script(monkeypatch):
    """setup.py as a module, its `setup()` left out."""
    stub = ModuleType("setuptools.command.bdist_wheel")  # new in setuptools 70
    stub.bdist_wheel = type("bdist_wheel", (setuptools.Command,), {})
    monkeypatch.setitem(sys.modules, "setuptools.command.bdist_wheel", stub)
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    spec = importlib.util.spec_from_file_location("metalstep_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Commands:
    """Stands for subprocess.run: keeps what is run, and answers from a table of words that a command has."""

    def __init__(self, **answers):
        self.answers = {"--version": (0, "Apple Swift version 6.1"), "-p": (0, "/Library/Developer/CommandLineTools"), **answers}
        self.run = []

    def __call__(self, command, **_):
        self.run.append(command)
        status, text = next((answer for word, answer in self.answers.items() if word in command), (0, ""))
        return SimpleNamespace(returncode=status, stdout=text, stderr="")


def on_a_mac(monkeypatch, script, commands, machine="arm64"):
    monkeypatch.setattr(script.sys, "platform", "darwin")
    monkeypatch.setattr(script.platform, "machine", lambda: machine)
    monkeypatch.setattr(script.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(script.subprocess, "run", commands)
    monkeypatch.delenv("METALSTEP_SWIFT", raising=False)


def test_on_a_mac_the_command_line_tools_build_the_library(monkeypatch, script, tmp_path):
    (tmp_path / "libmetalstep.dylib").write_bytes(b"")
    commands = Commands(**{"--show-bin-path": (0, f"{tmp_path}\n")})
    on_a_mac(monkeypatch, script, commands)
    swift = script.find_swift()
    assert script.build_launcher(swift) == tmp_path / "libmetalstep.dylib"
    build = commands.run[-2]
    assert build[:4] == ["/usr/bin/swift", "build", "-c", "release"]
    assert "--disable-sandbox" in build and "-headerpad_max_install_names" in build
    assert commands.run[-1] == [*build, "--show-bin-path"]
    assert script.platform_tag(tmp_path / "libmetalstep.dylib") == "macosx_14_0_arm64"


def test_without_the_command_line_tools_swift_is_not_started(monkeypatch, script, capsys):
    """There /usr/bin/swift opens a window that offers to install them."""
    commands = Commands(**{"-p": (2, "")})
    on_a_mac(monkeypatch, script, commands)
    assert script.find_swift() is None
    assert commands.run == [["xcode-select", "-p"]]
    assert "hint: run `xcode-select --install` and build again" in capsys.readouterr().err


def test_an_intel_python_is_refused(monkeypatch, script):
    on_a_mac(monkeypatch, script, Commands(), machine="x86_64")
    with pytest.raises(SystemExit, match=r"this Python is for x86_64, expected arm64\nhint: "):
        script.build_launcher("swift")


def test_linux_gets_no_flags_of_macos(monkeypatch, script, tmp_path):
    (tmp_path / "libmetalstep.so").write_bytes(b"GLIBC_2.17\0GLIBC_2.35\0GLIBC_2.4\0")
    commands = Commands(**{"--show-bin-path": (0, f"{tmp_path}\n")})
    monkeypatch.setattr(script.subprocess, "run", commands)
    monkeypatch.setattr(script.sys, "platform", "linux")
    library = script.build_launcher("swift")
    assert not set(script.MACOS_FLAGS) & set(commands.run[0])
    assert script.platform_tag(library).startswith("manylinux_2_35_")


def test_the_macos_of_the_tag_is_the_packages(script):
    manifest = (ROOT / "swift_kernels" / "Package.swift").read_text()
    assert f".macOS(.v{script.MACOS_TARGET.partition('_')[0]})" in manifest


def test_what_only_linux_linkers_take_is_for_linux_alone():
    """-s, version scripts and -z are unknown to Apple's linker, and there is no static Swift runtime on macOS."""
    manifest = (ROOT / "swift_kernels" / "Package.swift").read_text()
    settings = manifest.split("unsafeFlags(")[1:]
    for word in ("-static-stdlib", "--version-script", "--no-undefined", "nodelete"):
        assert all(".when(platforms: [.linux])" in setting for setting in settings if word in setting), word


def test_what_is_built_needs_no_xctest(script):
    """The Command Line Tools have none; `swift build` leaves test targets out."""
    sources = (ROOT / "swift_kernels" / "Sources").rglob("*.swift")
    assert not [path.name for path in sources if "import XCTest" in path.read_text() or "import Testing" in path.read_text()]
    assert "--build-tests" not in script.MACOS_FLAGS
    manifest = (ROOT / "swift_kernels" / "Package.swift").read_text()
    tests = set(re.findall(r"\.testTarget\(name: \"(\w+)\"", manifest))
    products = re.search(r"products: \[(.*?)\]\)?,\n", manifest, re.DOTALL)[1]
    assert not [name for name in tests if f'"{name}"' in products]
