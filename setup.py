"""Builds the launcher's dylib into the wheel. Everything else about the package is in pyproject.toml.

With Swift on PATH a wheel carries `metalstep/lib/libmetalstep.so` (or .dylib) and the tag of its platform. Without, it is a pure
wheel that runs through eager MLX. METALSTEP_SWIFT names another `swift`, or is `none` to build without. On a Mac the Command Line
Tools are enough: Metal's own compiler is part of macOS and works when the program runs.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
PACKAGE = ROOT / "swift_kernels"
MACOS_TARGET = "14_0"  # Package.swift's deployment target
# Homebrew builds inside a sandbox, in which SwiftPM cannot start one of its own. It also rewrites the library's install name, and pip's
# tools may, for which the header needs room.
MACOS_FLAGS = ["--disable-sandbox", "-Xlinker", "-headerpad_max_install_names"]


def find_swift() -> str | None:
    """The Swift compiler's driver, or None after saying why."""
    name = os.environ.get("METALSTEP_SWIFT", "swift")
    path = None if name == "none" or lacks_command_line_tools() else shutil.which(name)
    # OpenStack's client is called swift too.
    if path and "Swift version" in subprocess.run([path, "--version"], capture_output=True, text=True).stdout:
        return path
    reason = "METALSTEP_SWIFT is none" if name == "none" else f"no Swift compiler ({name!r}) on PATH"
    mac = sys.platform == "darwin"
    install = "run `xcode-select --install`" if mac else "install Swift 6.0 or later from https://swift.org/install"
    print(
        f"metalstep: {reason}: building without the launcher; models will run through eager MLX.\nhint: {install} and build again",
        file=sys.stderr,
    )
    return None


def lacks_command_line_tools() -> bool:
    """On a Mac without them /usr/bin/swift is there all the same, and opens a window that offers to install them."""
    return sys.platform == "darwin" and subprocess.run(["xcode-select", "-p"], capture_output=True).returncode != 0


def build_launcher(swift: str) -> Path:
    """Compile the launcher. Returns its dylib. Raises: SystemExit with what to do when it does not compile."""
    command = [swift, "build", "-c", "release", "--package-path", str(PACKAGE)]
    if sys.platform == "darwin":
        if platform.machine() != "arm64":  # an Intel Mac, or an Intel Python under Rosetta, whose Swift would build for either
            raise SystemExit(f"error: this Python is for {platform.machine()}, expected arm64\nhint: build with an arm64 Python")
        command += MACOS_FLAGS
    if subprocess.run(command, stdout=sys.stderr).returncode:
        raise SystemExit(
            f"error: {' '.join(command)} failed (its messages are above)\n"
            "hint: METALSTEP_SWIFT=none builds without the launcher; models then run through eager MLX"
        )
    folder = subprocess.run([*command, "--show-bin-path"], capture_output=True, text=True, check=True).stdout.strip()
    for suffix in (".so", ".dylib"):
        library = Path(folder) / f"libmetalstep{suffix}"
        if library.exists():
            return library
    raise SystemExit(f"error: {' '.join(command)} left no libmetalstep in {folder}")


def platform_tag(library: Path) -> str:
    """The wheel tag of `library`: its deployment target on macOS; on Linux the newest glibc symbol that it asks for."""
    machine = platform.machine()
    if sys.platform == "darwin":
        return f"macosx_{MACOS_TARGET}_{machine}"
    versions = [int(minor) for minor in re.findall(rb"GLIBC_2\.(\d+)", library.read_bytes())]
    # libstdc++'s GLIBCXX_3.4.29 comes with the distributions of glibc 2.34.
    return f"manylinux_2_{max([34, *versions])}_{machine}"


class BuildPy(build_py):
    """Python files, then the dylib (not for an editable install: that one finds the checkout's own build)."""

    library: Path | None = None

    def run(self) -> None:
        folder = Path(self.build_lib) / "metalstep"
        if not self.editable_mode:  # what an earlier build left would join the wheel: modules since removed, another machine's library
            shutil.rmtree(folder, ignore_errors=True)
        super().run()
        if self.editable_mode:
            return
        if swift := find_swift():
            BuildPy.library = build_launcher(swift)
            (folder / "lib").mkdir(parents=True)
            shutil.copy2(BuildPy.library, folder / "lib")


class BdistWheel(bdist_wheel):
    """py3-none-<platform> with the dylib, py3-none-any without."""

    def get_tag(self) -> tuple[str, str, str]:
        self.root_is_pure = BuildPy.library is None  # recorded in the WHEEL file, which is written after this call
        return ("py3", "none", "any" if BuildPy.library is None else platform_tag(BuildPy.library))


setup(cmdclass={"build_py": BuildPy, "bdist_wheel": BdistWheel})
