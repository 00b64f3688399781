"""A vLLM small enough for tests: its source archive, with a file of every sort."""

import io
import tarfile

PKG_INFO = """Metadata-Version: 2.4
Name: vllm
Version: 0.33.0
License-Expression: Apache-2.0
Requires-Python: <3.15,>=3.11
License-File: LICENSE
Requires-Dist: regex
Requires-Dist: protobuf==7.36.1; platform_machine == "s390x"
Requires-Dist: mistral_common[image]>=1.11.6
Requires-Dist: xgrammar==0.2.8; platform_machine == "x86_64" or platform_machine == "arm64" or platform_machine == "aarch64"
Requires-Dist: numba==0.65.0
Requires-Dist: torch==2.14.0
Requires-Dist: torchvision==0.29.0
Requires-Dist: PyNvVideoCodec==2.0.4
Requires-Dist: flashinfer-python==0.7.2.post1
Requires-Dist: nvidia-cutlass-dsl[cu13]==4.8.0
Requires-Dist: quack_kernels==0.6.5
Provides-Extra: bench
Requires-Dist: pandas; extra == "bench"
Provides-Extra: fastsafetensors
Requires-Dist: fastsafetensors>=0.3.3; extra == "fastsafetensors"
Dynamic: requires-dist

Requires-Dist: a line of the description, which stays
"""
KEPT = {
    "vllm/__init__.py": b"__version__ = '0.33.0'\n",
    "vllm/py.typed": b"",
    "vllm/configs/E=8,N=14336.json": b"{}",
    "vllm/entrypoints/static/swagger.css": b"body {}",
    "vllm/third_party/LICENSE": b"MIT",
}
DROPPED = {
    "vllm/_C.abi3.so": b"\x7fELF",
    "vllm/vllm-rs": b"\x7fELF",
    "vllm/kernels/topk.cu": b"__global__",
    "vllm/include/quant.cuh": b"",
    "vllm/native/io.cpp": b"",
    "csrc/cache.h": b"",
    "rust/src/lib.rs": b"",
    "tests/test_version.py": b"",
    "setup.py": b"raise SystemExit('the build must not run')",
}
OTHERS = {
    "PKG-INFO": PKG_INFO.encode(),
    "LICENSE": b"Apache License",
    "vllm.egg-info/entry_points.txt": b"[console_scripts]\nvllm = vllm.entrypoints.cli.main:main\n",
}


def write_sdist(path, files):
    with tarfile.open(path, "w:gz") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(f"vllm-0.33.0/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path
