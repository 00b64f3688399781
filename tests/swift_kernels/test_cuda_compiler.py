"""Kernels of a CUDA device are compiled once for all processes, side by side, by a compiler that is not there (fake_cuda.c)."""
from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from cuda_fake import COMPILER, SOURCE, floats, launch, opened, read

from metalstep.kernels import native
from metalstep.kernels.launch import KernelCode
from metalstep.kernels.native import KernelError, NativeDevice

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="NVIDIA's GPUs are for Linux"),
    pytest.mark.skipif(COMPILER is None, reason="no C compiler: put clang or cc on PATH"),
]


def test_a_source_is_compiled_for_the_gpu_without_headers_once_for_all_processes(fake):
    for _ in range(2):
        with opened():
            pass
    assert fake.log("compile") == ["compile -arch=sm_90 -std=c++17 -default-device -w"]
    assert len(fake.log("load")) == 2


@pytest.mark.parametrize("damage", ["text", "architecture", "compiler", "cut", "flipped", "length", "empty"])
def test_what_was_kept_is_used_only_for_the_same_text_gpu_and_compiler(fake, tmp_path, damage):
    with opened():
        pass
    (kept,) = (tmp_path / "cache" / "cubins").iterdir()
    content = bytearray(kept.read_bytes())
    if damage == "architecture":
        fake.options(capability=86)
    if damage == "compiler":
        fake.options(nvrtc=126)
    if damage == "cut":
        kept.write_bytes(content[:-1])
    if damage == "flipped":
        content[-10] ^= 1
        kept.write_bytes(content)
    if damage == "length":
        kept.write_bytes(content[:16] + b"\xff" * 8 + content[24:])
    if damage == "empty":
        kept.write_bytes(b"")
    with NativeDevice.open("cuda") as device:
        device.add_library(SOURCE + (" " if damage == "text" else ""))
    assert len(fake.log("compile")) == 2
    assert not list((tmp_path / "cache" / "cubins").glob("*.cubin.*")), "unfinished files"


def test_without_a_folder_for_it_nothing_is_kept(fake, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("METALSTEP_CACHE", str(tmp_path / "file"))
    for _ in range(2):
        with opened() as device:
            assert device.kernel("add") == device.kernel("add")
    assert len(fake.log("compile")) == 2


def test_a_source_that_does_not_compile_is_refused_in_the_compilers_words(cuda):
    with pytest.raises(KernelError, match="error: #error directive: as planned"):
        cuda.add_library("#error as planned\n")
    with pytest.raises(ValueError, match='none of the 1 libraries of this device has "mine"'):
        cuda.kernel("mine")


def test_a_driver_older_than_the_compiler_says_what_to_install(fake, cuda):
    fake.options(binary=209)
    with pytest.raises(KernelError, match=r"the driver, for CUDA 12\.8, does not take what NVIDIA's compiler 12\.4 has made.*-cu12"):
        cuda.add_library("// fake: other 8\n")


def with_code(y, *names):
    """A launch of each kernel, which comes with it."""
    parameters = "device float* y [[buffer(0)]], constant float& by [[buffer(1)]]"
    launches = [launch(name, y, by=1) for name in names]
    for entry in launches:
        entry.code = KernelCode((), f"// fake: {entry.kernel} 8 4\nkernel void {entry.kernel}({parameters}) {{}}\n")
    return launches


def test_each_kernel_of_a_plan_is_compiled_by_itself_and_once(fake, cuda):
    before, y = len(fake.log("compile")), floats(cuda)
    for _ in range(2):
        plan = cuda.create_plan(with_code(y, "add_a", "add_b", "add_a", "add_c"), 1, 1)
        plan.wait(plan.run(1))
    assert len(fake.log("compile")) - before == 3
    np.testing.assert_array_equal(read(cuda, y), 8)


def test_no_more_compile_at_once_than_there_are_processors_for_this_process(cuda, monkeypatch):
    """A container on a large machine has few, and a compiler takes memory."""
    made = []
    monkeypatch.setattr(native, "ThreadPoolExecutor", lambda threads: made.append(threads) or ThreadPoolExecutor(threads))
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {3, 5})
    monkeypatch.setattr("os.cpu_count", lambda: 128)
    cuda.create_plan(with_code(floats(cuda), "add_a", "add_b", "add_c"), 1, 1)
    assert made == [2]
