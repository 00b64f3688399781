"""One-kernel sources and one-launch plans for tests of simulated Metal."""
from __future__ import annotations

import os
import shutil
import sys

import numpy as np
import pytest

from metalstep.kernels.launch import Buffer, Launch
from metalstep.kernels.native import NativeDevice

NEEDS = [
    pytest.mark.skipif(sys.platform == "darwin", reason="this machine's Metal is not simulated"),
    pytest.mark.skipif(
        shutil.which(os.environ.get("METALSTEP_CLANG", "clang++")) is None,
        reason="simulated Metal needs clang++: put it on PATH or set METALSTEP_CLANG",
    ),
]
HEAD = "#include <metal_stdlib>\nusing namespace metal;\n"
SEEDS = range(6)
COUNT = 128  # elements of out


def kernel(body: str, name: str = "k", parameters: str = "") -> str:
    return f"""{HEAD}kernel void {name}(device float* o [[buffer(0)]], {parameters} uint i [[thread_index_in_threadgroup]],
      uint lane [[thread_index_in_simdgroup]]) {{
      {body}
    }}"""


def out(device: NativeDevice, count: int = COUNT) -> Buffer:
    owner = device.create_buffer(count * 4)
    owner.numpy(np.float32, (count,))[:] = np.nan
    return Buffer(owner.handle, 0, (count,), "float32")


def launch(name: str, *bindings: Buffer, constants: bytes = b"", threads: int = COUNT, barrier: bool = False) -> Launch:
    return Launch(name, list(bindings), constants, (1, 1, 1), (threads, 1, 1), barrier)


def run(device: NativeDevice, *launches: Launch, steps: int = 1) -> None:
    plan = device.create_plan(list(launches), 1, 1)
    try:
        plan.wait(plan.run(steps))
    finally:
        plan.close()


def result_of(device: NativeDevice, source: str, **options) -> np.ndarray:
    device.add_library(source)
    buffer = out(device)
    run(device, launch("k", buffer, **options))
    return device.numpy(buffer, np.float32, buffer.shape).copy()
