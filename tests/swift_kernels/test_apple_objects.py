"""The library's C compiles for Apple silicon: clang makes Mach-O objects of it, and what they call exists on macOS.

Headers of the C library are this system's, so what Apple's declare otherwise is not seen; Swift is not compiled.
"""
import os
import shutil
import struct
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

SOURCES = Path(__file__).resolve().parents[2] / "swift_kernels" / "Sources"
CLANG = shutil.which(os.environ.get("METALSTEP_CLANG", "clang").replace("clang++", "clang"))
TARGETS = ("CKernels", "CMetalStep", "CCuda", "CLibraryGemm")
FILES = [path for target in TARGETS for path in sorted((SOURCES / target).glob("*.c"))]
# As in Package.swift, but for -O3, which changes no message. __nonnull is Apple's own keyword, and a macro in glibc's headers, which also
# have an attribute that only Intel's processors take.
FLAGS = [
    "--target=arm64-apple-macos14", "-std=c11", "-ffp-contract=fast", "-fno-math-errno", "-fvisibility=hidden", "-Wall", "-Wextra",
    "-Werror", "-U__nonnull", "-D__regparm__(n)=", "-D_GNU_SOURCE", "-Wno-macro-redefined",
]  # fmt: skip
HEADERS = {  # Apple's own, and what glibc's do not know of this processor
    "pthread/qos.h": "enum { QOS_CLASS_USER_INTERACTIVE = 0x21 };\nint pthread_set_qos_class_self_np(unsigned, int);\n",
    "sys/sysctl.h": "#include <stddef.h>\nint sysctlbyname(const char *, void *, size_t *, void *, size_t);\n",
    "bits/wordsize.h": "#define __WORDSIZE 64\n#define __WORDSIZE_TIME64_COMPAT32 0\n",
    "gnu/stubs-32.h": "",
}
# Functions of macOS's libSystem that the objects may call, by clang's or our own wish.
SYSTEM = """
    bzero calloc free getenv malloc memchr memcmp memcpy memmove memset memset_pattern16 posix_memalign
    dlclose dlerror dlopen dlsym
    snprintf strcat strcmp strlen strtol sysctlbyname vsnprintf
    pthread_atfork pthread_cond_broadcast pthread_cond_init pthread_cond_wait pthread_create pthread_join pthread_mutex_init
    pthread_mutex_lock pthread_mutex_unlock pthread_once pthread_set_qos_class_self_np pthread_sigmask sigfillset
    atan2f cosf erff exp expf expm1f fmaf fmodf log log10f log1pf log2f logf powf sinf tanf tanhf __sincosf_stret
    __stack_chk_fail __stack_chk_guard _tlv_bootstrap
"""

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the compiler and headers are the system's own"),
    pytest.mark.skipif(CLANG is None, reason="no clang: put it on PATH or set METALSTEP_CLANG"),
]


@pytest.fixture(scope="module")
def include(tmp_path_factory):
    """Flags for the headers."""
    folder = tmp_path_factory.mktemp("include")
    for name, text in HEADERS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    system = ["/usr/include", f"/usr/include/{sysconfig.get_config_var('MULTIARCH')}"]
    own = [SOURCES / "CKernels", *(SOURCES / target / "include" for target in TARGETS)]
    return [f"-isystem{folder}", *(f"-idirafter{path}" for path in system), *(f"-I{path}" for path in own)]


def undefined(mach_o: bytes) -> set[str]:
    """Names that a Mach-O object of one architecture leaves to the linker."""
    magic, _, _, kind, commands = struct.unpack_from("<5I", mach_o)
    assert (magic, kind) == (0xFEEDFACF, 1), "no 64-bit object"
    at = 32
    for _ in range(commands):
        command, size = struct.unpack_from("<2I", mach_o, at)
        if command == 2:  # LC_SYMTAB
            symbols, count, strings, _ = struct.unpack_from("<4I", mach_o, at + 8)
        at += size
    names = set()
    for index in range(count):
        name, kind, section, _, _ = struct.unpack_from("<IBBHQ", mach_o, symbols + 16 * index)
        if kind & 0x0E == 0 and kind & 1 and section == 0:  # N_UNDF, external
            names.add(mach_o[strings + name : mach_o.index(b"\0", strings + name)].decode().removeprefix("_"))
    return names


@pytest.mark.parametrize("source", FILES, ids=lambda path: path.name)
def test_a_c_file_compiles_for_apple_silicon(source, include, tmp_path):
    made = tmp_path / "object.o"
    done = subprocess.run([str(CLANG), *FLAGS, *include, "-c", str(source), "-o", str(made)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    calls = undefined(made.read_bytes())
    assert {name for name in calls if not name.startswith("ms_")} <= set(SYSTEM.split())


def test_what_does_not_exist_on_macos_is_seen(include, tmp_path):
    """The check checks: glibc's headers declare this function, and macOS does not have it."""
    source, made = tmp_path / "linux.c", tmp_path / "linux.o"
    source.write_text("#include <sched.h>\nint here(void) { return sched_getcpu(); }\n")
    subprocess.run([str(CLANG), *FLAGS, *include, "-c", str(source), "-o", str(made)], check=True)
    assert undefined(made.read_bytes()) - set(SYSTEM.split()) == {"sched_getcpu"}
