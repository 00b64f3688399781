"""vLLM without compiled code: a wheel made from its source archive, for systems that vLLM publishes no wheel for.

metalstep's worker replaces vLLM's model runner, so the compiled extensions and CUDA's packages are never called; what is left is the
scheduler, the server and the parsers, all of them Python.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from metalstep.cli.errors import CommandError
from metalstep.plugin.wheel import wheel_name, write_wheel

RELEASE = "0.33.0"
VERSION = f"{RELEASE}+pure"  # a local version (PEP 440): it satisfies ==0.33.0, and tells it from vLLM's own wheel
BUILD = 1  # of the wheel's name; one more whenever the rules of this file change, which a cached wheel was made by
SDIST = f"vllm-{RELEASE}.tar.gz"
SDIST_SHA256 = "f4c33c2503d52bb411146afa9618a4f48bed68912f617e6803ac8d76e4c74112"
WHEEL = wheel_name("vllm", VERSION, BUILD)

TORCH = Requirement("torch<2.15,>=2.13.0")  # vLLM asks for 2.14.0 alone, which its compiled extensions need
# What only CUDA kernels, video, audio and n-gram drafts import. apache-tvm-ffi comes with xgrammar, in the version that it needs.
LEFT_OUT = {
    "apache-tvm-ffi", "fastsafetensors", "flashinfer-python", "humming-kernels", "instanttensor", "numba", "nvtx", "pynvvideocodec",
    "quack-kernels", "tilelang", "tokenspeed-mla", "torchaudio", "torchcodec", "torchvision",
}  # fmt: skip
COMPILED = {".so", ".dylib", ".pyd", ".a", ".o"}
SOURCES = {".c", ".cc", ".cpp", ".cu", ".cuh", ".h", ".hpp", ".hip", ".rs", ".metal", ".m", ".mm"}
BINARIES = {"vllm/vllm-rs"}


def build(sdist: Path, folder: Path) -> Path:
    """Make the wheel in `folder` from the source archive and return its path. Raises: CommandError for an archive without vLLM in it."""
    root = f"vllm-{RELEASE}"
    with tarfile.open(sdist) as archive:
        members = {member.name: member for member in archive if member.isfile()}

        def read(name: str) -> bytes:
            try:
                file = archive.extractfile(members[f"{root}/{name}"])
            except KeyError:
                raise CommandError(f"{sdist.name} has no {name}", "download it again") from None
            assert file is not None  # of a regular file
            return file.read()

        def files() -> Iterator[tuple[str, bytes]]:
            for name in sorted(members):
                inside = name.removeprefix(f"{root}/")
                if belongs(inside):
                    yield inside, read(inside)

        read("vllm/__init__.py")
        info = {"entry_points.txt": read("vllm.egg-info/entry_points.txt"), "licenses/LICENSE": read("LICENSE")}
        return write_wheel(folder / WHEEL, "vllm", VERSION, metadata(read("PKG-INFO").decode()), files(), info)


def belongs(name: str) -> bool:
    """Whether a file of the archive goes into the wheel: all of the package vllm but compiled code and its sources."""
    path = PurePosixPath(name)
    return path.parts[0] == "vllm" and ".." not in path.parts and path.suffix not in COMPILED | SOURCES and name not in BINARIES


def metadata(pkg_info: str) -> str:
    """METADATA of the wheel: the archive's, with our version and what a Mac can install."""
    head, _, body = pkg_info.partition("\n\n")
    lines = []
    for line in head.splitlines():
        field, _, value = line.partition(": ")
        if field == "Version":
            lines.append(f"Version: {VERSION}")
        elif field == "Requires-Dist" and Requirement(value).name == "torch":
            lines.append(f"Requires-Dist: {TORCH}")
        elif field == "Dynamic" or (field == "Requires-Dist" and is_left_out(Requirement(value).name)):
            continue  # Dynamic is an sdist's field
        else:
            lines.append(line)
    return "\n".join(lines) + "\n\n" + body


def is_left_out(name: str) -> bool:
    """Whether a requirement of this name serves CUDA or what metalstep does not do. Names of NVIDIA's packages start alike."""
    name = canonicalize_name(name)
    return name in LEFT_OUT or name.startswith("nvidia-")
