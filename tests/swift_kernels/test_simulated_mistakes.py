"""Mistakes planted in kernels, and what tells of each: the simulator itself, or a sanitizer that kernels are compiled with."""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from simulated_kernels import COUNT, HEAD, NEEDS, kernel, launch, out, result_of, run

from metalstep.kernels import params
from metalstep.kernels.metal_source import metal_source
from metalstep.kernels.native import NativeDevice

pytestmark = NEEDS
PARAMETER = "device const float* x [[buffer(1)]],"
CLANG = os.environ.get("METALSTEP_CLANG", "clang++")


@pytest.fixture
def metal():
    with NativeDevice.open("metal-sim") as device:
        yield device


def runs(device: NativeDevice, body: str, elements: int, name: str = "k") -> np.ndarray:
    """What `body` leaves in o, with x of `elements` ones."""
    device.add_library(kernel(body, name, PARAMETER))
    result, x = out(device), out(device, elements)
    device.numpy(x, np.float32, x.shape)[:] = 1
    run(device, launch(name, result, x))
    return device.numpy(result, np.float32, result.shape).copy()


# ---- by the simulator itself


@pytest.mark.parametrize(
    "body, elements, text",
    [
        ("o[i] = x[i];", 124, r"outside every buffer is read or written: byte 496 of \[\[buffer\(1\)\]\]"),
        ("o[i + 1] = x[i];", COUNT, r"outside every buffer is read or written: byte 512 of \[\[buffer\(0\)\]\]"),
        ("o[i] = *(x - (1l << 44) + i);", COUNT, "is read or written"),  # far from all that a process maps
        ("o[i] = float(i / uint(x[i] - 1.0f));", COUNT, "an integer is divided by zero"),
        ("volatile float t[65536];\n t[i] = 1; o[i] = t[i];", COUNT, "needs more than 131072 bytes of stack"),
    ],
)
def test_a_fault_is_an_error_of_the_run(metal, body, elements, text):
    with pytest.raises(RuntimeError, match=f"k: .*{text}"):
        runs(metal, body, elements)
    assert (runs(metal, "o[i] = x[i];", COUNT, "after") == 1).all()  # the device still works


def test_one_threadgroup_of_many_fails_its_launch(metal):
    """They run on two threads of the operating system; the first that fails is told."""
    metal.add_library(kernel("if (group == 777 && i == 5) return;\n o[i] = simd_sum(1.0f);", parameters=PARAMETER.replace(
        "device const float* x [[buffer(1)]]", "uint group [[threadgroup_position_in_grid]]")))  # fmt: skip
    for _ in range(3):
        entry = launch("k", out(metal))
        entry.grid = (1000, 1, 1)
        with pytest.raises(RuntimeError, match="k: simd_sum"):
            run(metal, entry)


def test_bindings_in_another_order_are_seen(metal):
    """The weight of add_rms_norm is one row, its inputs are several."""
    metal.add_library(metal_source("add_rms_norm"))
    x, residual, result = (out(metal, 3 * 64) for _ in range(3))
    weight = out(metal, 64)
    constants = params.pack("AddRMSNormParams", hidden_size=64, eps=0.0)
    entry = launch("add_rms_norm_float", weight, residual, x, result, constants=constants)
    entry.grid = (3, 1, 1)
    with pytest.raises(RuntimeError, match=r"byte (256|512) of \[\[buffer\(0\)\]\]"):  # of row 1 or 2, which run side by side
        run(metal, entry)


# ---- by sanitizers


# Runs every body in a process of its own, or all in this one, and says on both streams where each begins.
PROGRAM = """
import json, os, sys
mode, folder, cases = json.loads(sys.argv[1])
sys.path.insert(0, folder)
from test_simulated_mistakes import NativeDevice, runs
for name, body, elements, seed in cases:
    for stream in (sys.stdout, sys.stderr):
        print("==" + name, file=stream, flush=True)
    process = os.fork() if mode != "thread" else 0
    if process == 0:
        os.environ["METALSTEP_SIM_SANITIZE"], os.environ["METALSTEP_SIM_SEED"] = mode, str(seed)
        with NativeDevice.open("metal-sim") as device:
            print(runs(device, body, elements, name)[0], flush=True)
        if mode != "thread":
            os._exit(0)
    else:
        os.waitpid(process, 0)
"""


def sanitized(mode: str, cases: list[tuple[str, str, int, int]], preload: str = "") -> dict[str, tuple[str, str]]:
    """What each case (name, body, elements of x, seed) prints and what the sanitizer says of it, by name."""
    environment = os.environ | {"LD_PRELOAD": preload, "TSAN_OPTIONS": "ignore_noninstrumented_modules=1:report_bugs=1"}
    command = [sys.executable, "-c", PROGRAM, json.dumps([mode, str(Path(__file__).parent), cases])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    parts = [dict(re.findall(r"==(\w+)\n((?:(?!==\w+\n).*\n?)*)", text)) for text in (done.stdout, done.stderr)]
    return {name: (parts[0].get(name, ""), parts[1].get(name, "")) for name, *_ in cases}


OUTSIDE = {
    "after": ("o[i] =\n x[i];", COUNT - 1),  # four bytes behind a buffer's end
    "before": ("o[i] =\n x[int(i) - 1];", COUNT - 4),
    "threadgroup": ("threadgroup float t[127];\n t[i] = 1; o[i] = t[0];", COUNT),
}
WHOLE = "threadgroup float t[128];\n t[i] = x[i]; threadgroup_barrier(mem_flags::mem_threadgroup); o[i] = simd_sum(t[127 - i]);"


@pytest.fixture(scope="module")
def address_reports():
    cases = [(f"k_{name}", *case, 0) for name, case in OUTSIDE.items()]
    return sanitized("address", [*cases, ("k_whole", WHOLE, COUNT, 0)])


@pytest.mark.parametrize("name", OUTSIDE)
def test_address_sanitizer_sees_the_first_byte_outside(address_reports, name):
    printed, report = address_reports[f"k_{name}"]
    assert printed == ""
    assert "AddressSanitizer: use-after-poison" in report
    assert "program_source:6:" in report


def test_address_sanitizer_says_nothing_of_a_whole_kernel(address_reports):
    assert address_reports["k_whole"] == ("32.0\n", "")


def thread_sanitizer() -> str:
    """What to preload. Swift's clang brings a ThreadSanitizer that wants Swift's libdispatch."""
    name = f"libclang_rt.tsan-{os.uname().machine}.so"
    path = subprocess.run([CLANG, f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
    if path == name:
        pytest.skip(f"{CLANG} has no ThreadSanitizer as a shared library")
    dispatch = Path(path).parents[4] / "swift" / "linux" / "libdispatch.so"
    return f"{path} {dispatch}" if dispatch.exists() else path


# A lane writes in line 6 what its neighbour reads in line 8.
BETWEEN = {
    "nothing": "",
    "execution": "simdgroup_barrier(mem_flags::mem_none);",
    "shuffle": "float y = simd_shuffle_xor(x[i], ushort(1)); o[i] = y;",  # orders nothing in memory
    "simdgroup": "simdgroup_barrier(mem_flags::mem_threadgroup);",
    "threadgroup": "threadgroup_barrier(mem_flags::mem_threadgroup);",
}
RACES = ["nothing", "execution", "shuffle"]


@pytest.fixture(scope="module")
def thread_reports():
    shared = "threadgroup float t[128];\n t[i] = x[i];\n {}\n o[i] = t[i ^ 1];"
    own = "volatile float own[8];\n own[i % 8] = x[i]; o[i] = own[i % 8];"
    bodies = {"own": own} | {name: shared.format(text) for name, text in BETWEEN.items()}
    cases = [(f"k_{name}_{seed}", body, COUNT, seed) for name, body in bodies.items() for seed in range(3)]
    return sanitized("thread", cases, thread_sanitizer())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", BETWEEN)
def test_thread_sanitizer_names_both_lines_of_a_race_within_a_simdgroup(thread_reports, name, seed):
    printed, report = thread_reports[f"k_{name}_{seed}"]
    assert ("data race" in report) == (name in RACES), report
    if name in RACES:
        assert {"6", "8"} <= set(re.findall(r"#0 k_.*program_source:(\d+)", report))
    else:
        assert printed == "1.0\n"


@pytest.mark.parametrize("seed", range(3))
def test_a_threads_own_variables_are_no_race(thread_reports, seed):
    """Though threads that end one after the other have their variables at one address."""
    assert thread_reports[f"k_own_{seed}"] == ("1.0\n", "")


def test_fast_maths_takes_tests_of_nan_away(metal, monkeypatch):
    """And what is compiled in one mode is not taken for another."""
    body = "o[i] = isnan(x[i] - 1.0f + NAN) ? 1.0f : 2.0f;"
    assert (runs(metal, body, COUNT) == 1).all()
    monkeypatch.setenv("METALSTEP_SIM_SANITIZE", "fast-math")
    with NativeDevice.open("metal-sim") as device:
        assert (runs(device, body, COUNT) == 2).all()


def test_a_mode_that_does_not_exist_is_refused(metal, monkeypatch):
    monkeypatch.setenv("METALSTEP_SIM_SANITIZE", "memory")
    with pytest.raises(RuntimeError, match="METALSTEP_SIM_SANITIZE is memory, expected one of address, thread, fast-math"):
        result_of(metal, HEAD + "kernel void k(device float* o [[buffer(0)]]) { o[0] = 1; }")
