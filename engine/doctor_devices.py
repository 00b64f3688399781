"""The part of `metalstep doctor` that opens devices, and compiles and runs a small kernel on each."""
from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from importlib import resources
from typing import Any

import mlx.core as mx
import numpy as np

from metalstep.doctor_cuda import has_gpu
from metalstep.finding import FAIL, OK, WARN, Finding
from metalstep.kernels import add_rms_norm
from metalstep.kernels.launch import Buffer, Launch
from metalstep.kernels.metal_source import metal_source
from metalstep.kernels.native import NativeDevice, NativeUnavailable

ROWS, HIDDEN, EPS = 3, 333, 1e-5  # of the kernel that is run: no power of two, more than one pass of its 256 threads
LAUNCHES = 32  # in the plan whose time per launch is told
SAMPLES = 5
RUN_SECONDS = 60  # after which a run counts as hung
WORDS = {"float32": mx.uint32, "float16": mx.uint16, "bfloat16": mx.uint16}
# A result is rounded to its dtype, and so is the sum that is normalised: two roundings. In float32 the order of the sum counts more.
TOLERANCE = {"float32": 1e-5, "float16": 2**-10, "bfloat16": 2**-7}
GIB = 1 << 30
DEVICE_ERRORS = (ValueError, RuntimeError, MemoryError, TimeoutError)


def device_names() -> list[str]:
    """The devices that this system should have, as `load` names them."""
    return ["host", "metal" if sys.platform == "darwin" else "metal-sim", *(["cuda"] if has_gpu() else [])]


def device_checks(names: list[str]) -> Iterator[tuple[str, Callable[[], Finding]]]:
    """Names and checks, in order."""
    for name in names:
        yield f"device {name}", partial(open_device, name)
        yield f"kernel {name}", partial(run_kernel, name)
        if name != "host":
            yield f"sources {name}", partial(compile_sources, name)


def needed(name: str) -> str:
    """The status of what does not work on a device: simulated Metal is for tests alone."""
    return WARN if name == "metal-sim" else FAIL


def hint(name: str) -> str:
    if name == "metal-sim":
        return "simulated Metal is for tests: nothing to do for models on the host device; else see docs/simulated-metal.md"
    return f"send the maintainers the file of `metalstep doctor --report FILE`; {alternative(name)} runs models meanwhile"


def alternative(name: str) -> str:
    return "`--device eager`" if name == "host" else "`--device host`"


def open_device(name: str) -> Finding:
    """Whether the device opens, what it calls itself and how much memory it gives."""
    title = f"device {name}"
    started = time.perf_counter()
    try:
        device = NativeDevice.open(name)
    except NativeUnavailable:
        return Finding(title, needed(name), "not tried: there is no launcher", "see the launcher above")
    except DEVICE_ERRORS as error:
        why, _, what = str(error).rpartition("; ")
        if name == "cuda" and why:  # its text says what to do
            return Finding(title, needed(name), why, what)
        return Finding(title, needed(name), str(error), hint(name))
    with device:
        info = device.info
        open_s = time.perf_counter() - started
    detail = ", ".join(filter(None, [info.isa, f"{info.threads} threads" if info.threads else ""]))
    memory = f"{info.memory_bytes / GIB:.1f} GiB" if info.memory_bytes else "memory unknown"
    facts = {
        "device": name, "name": info.name, "isa": info.isa, "threads": info.threads, "memory_bytes": info.memory_bytes, "open_s": open_s,
    }  # fmt: skip
    return Finding(title, OK, ", ".join(filter(None, [info.name, detail, memory])), facts=facts)


def opened(name: str) -> NativeDevice | None:
    """The device, or None where `open_device` has said why not."""
    try:
        return NativeDevice.open(name)
    except DEVICE_ERRORS:
        return None


def not_tried(title: str, name: str) -> Finding:
    return Finding(title, needed(name), "not tried: the device does not open", "see the device above")


def run_kernel(name: str) -> Finding:
    """add_rms_norm, compiled where the device compiles, in each dtype that it has there, against its reference."""
    title = f"kernel {name}"
    kind = "host" if name == "host" else "metal"
    device = opened(name)
    if device is None:
        return not_tried(title, name)
    try:
        with device:
            started = time.perf_counter()
            if kind == "metal":
                device.add_library(metal_source("add_rms_norm"))
            facts: dict[str, Any] = {"kernel": "add_rms_norm", "compile_s": time.perf_counter() - started, "dtypes": {}}
            for dtype in add_rms_norm.KERNELS[kind]:
                facts["dtypes"][dtype] = run_dtype(device, kind, dtype)
    except DEVICE_ERRORS as error:
        return Finding(title, needed(name), f"add_rms_norm: {error}", hint(name))
    wrong = {dtype: row for dtype, row in facts["dtypes"].items() if not row["agrees"]}
    if wrong:
        parts = [
            f"{dtype} has NaN" if row["worst"] is None else f"{dtype} differs by {row['worst']:.1e} (limit {row['tolerance']:.1e})"
            for dtype, row in wrong.items()
        ]
        return Finding(title, needed(name), f"add_rms_norm is wrong: {', '.join(parts)}", hint(name), facts)
    times = facts["dtypes"]["float32"]
    compiled = f"compiled in {facts['compile_s']:.2f} s, " if kind == "metal" else ""
    found = f"add_rms_norm agrees in {', '.join(facts['dtypes'])}: {compiled}{times['us_per_launch']:.1f} µs per launch"
    return Finding(title, OK, found, facts=facts)


def run_dtype(device: NativeDevice, kind: str, dtype: str) -> dict[str, Any]:
    """Error and times of the kernel in one dtype. The output starts as NaN, so that what is not written shows. worst: the largest error
    relative to the element or to 1; None where something is not a number."""
    random = np.random.default_rng(0)
    x, residual, weight = (
        mx.array(random.standard_normal(shape).astype(np.float32)).astype(getattr(mx, dtype))
        for shape in ((ROWS, HIDDEN), (ROWS, HIDDEN), (HIDDEN,))
    )
    with mx.stream(mx.cpu):
        expected = [to_float(array) for array in add_rms_norm.reference(x, residual, weight, EPS)]
        x_buffer, residual_buffer, weight_buffer, out = (
            put(device, array, dtype) for array in (x, residual, weight, mx.full(x.shape, float("nan"), x.dtype))
        )
    [launch] = add_rms_norm.launches(x_buffer, residual_buffer, weight_buffer, out, EPS, device=kind)
    [first_s] = run(device, [launch])
    got = [get(device, out), get(device, residual_buffer)]
    worst = max(relative_error(a, b) for a, b in zip(got, expected, strict=True))
    times = run(device, [replace(launch, barrier=index > 0) for index in range(LAUNCHES)], SAMPLES)
    return {
        "agrees": worst <= TOLERANCE[dtype],
        "worst": worst if math.isfinite(worst) else None,
        "tolerance": TOLERANCE[dtype],
        "first_run_us": first_s * 1e6,
        "us_per_launch": min(times) / LAUNCHES * 1e6,
    }


def run(device: NativeDevice, launches: list[Launch], times: int = 1) -> list[float]:
    """Seconds of each run, from the call to the end of the wait."""
    plan = device.create_plan(launches, ROWS, 1)
    seconds = []
    for _ in range(times):
        started = time.perf_counter()
        plan.wait(plan.run(), timeout=RUN_SECONDS)
        seconds.append(time.perf_counter() - started)
    plan.close()
    return seconds


def put(device: NativeDevice, array: mx.array, dtype: str) -> Buffer:
    """A device copy. numpy has no bfloat16: its elements go as the words they are."""
    values = np.array(array.view(WORDS[dtype]))
    owner = device.create_buffer(values.nbytes, shared=False)
    owner.write(values)
    return Buffer(owner.handle, 0, array.shape, dtype)


def get(device: NativeDevice, buffer: Buffer) -> np.ndarray:
    """What a buffer holds, in float32."""
    words = WORDS[buffer.dtype]
    values = mx.array(device.read(buffer, np.uint32 if words == mx.uint32 else np.uint16, buffer.shape))
    return to_float(values.view(getattr(mx, buffer.dtype)))


def to_float(array: mx.array) -> np.ndarray:
    with mx.stream(mx.cpu):
        return np.array(array.astype(mx.float32))


def relative_error(got: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, relative to the element or to 1, whichever is more; infinite where something is not a number."""
    error = np.abs(got - expected) / np.maximum(np.abs(expected), 1)
    return float(error.max()) if np.isfinite(error).all() else float("inf")


def compile_sources(name: str) -> Finding:
    """Each metal/*.metal compiled by itself: what a device's compiler says of our text, file by file."""
    title = f"sources {name}"
    families = sorted(
        path.name.removesuffix(".metal") for path in resources.files("metalstep.metal").iterdir() if path.name.endswith(".metal")
    )
    messages: dict[str, str] = {}
    seconds: dict[str, float] = {}
    device = opened(name)
    if device is None:
        return not_tried(title, name)
    with device:
        for family in families:
            started = time.perf_counter()
            try:
                device.add_library(metal_source(family))
            except RuntimeError as error:
                messages[family] = str(error)
            seconds[family] = time.perf_counter() - started
    facts = {"seconds": seconds, "messages": messages}
    if messages:
        found = f"{len(messages)} of {len(families)} files of metal/ do not compile: {', '.join(messages)}"
        return Finding(title, needed(name), found, hint(name), facts)
    return Finding(title, OK, f"{len(families)} files of metal/ compile, in {sum(seconds.values()):.1f} s", facts=facts)
