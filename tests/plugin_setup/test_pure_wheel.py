"""vLLM's source archive becomes a wheel without compiled code."""

import base64
import csv
import hashlib
import importlib.metadata
import io
import subprocess
import sys
import zipfile

import pytest
from packaging.requirements import Requirement
from small_sdist import DROPPED, KEPT, OTHERS, write_sdist

from metalstep.cli.errors import CommandError
from metalstep.plugin import pure_wheel
from metalstep.plugin.wheel import requirements

INFO = f"vllm-{pure_wheel.VERSION}.dist-info/"


@pytest.fixture
def wheel(sdist, tmp_path):
    return pure_wheel.build(sdist, tmp_path)


def test_it_has_all_of_vllm_but_compiled_code_and_its_sources(wheel):
    with zipfile.ZipFile(wheel) as archive:
        found = {name: archive.read(name) for name in archive.namelist() if not name.startswith(INFO)}
    assert found == KEPT


def test_its_record_has_every_file_with_its_digest(wheel):
    with zipfile.ZipFile(wheel) as archive:
        rows = {name: (digest, size) for name, digest, size in csv.reader(io.StringIO(archive.read(INFO + "RECORD").decode()))}
        assert set(rows) == set(archive.namelist())
        for name, (digest, size) in rows.items():
            if name != INFO + "RECORD":
                data = archive.read(name)
                assert digest == "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
                assert int(size) == len(data)


def test_it_requires_what_a_mac_can_install(wheel):
    assert [str(item) for item in requirements(wheel)] == [
        "regex",
        'protobuf==7.36.1; platform_machine == "s390x"',
        "mistral_common[image]>=1.11.6",
        'xgrammar==0.2.8; platform_machine == "x86_64" or platform_machine == "arm64" or platform_machine == "aarch64"',
        str(pure_wheel.TORCH),
    ]


def test_an_extra_stays_but_for_what_only_cuda_has(wheel):
    with zipfile.ZipFile(wheel) as archive:
        text = archive.read(INFO + "METADATA").decode()
    assert 'Requires-Dist: pandas; extra == "bench"\n' in text
    assert "Requires-Dist: fastsafetensors" not in text
    assert "Dynamic" not in text
    assert text.endswith("\n\nRequires-Dist: a line of the description, which stays\n")


@pytest.mark.parametrize("name", ["nvidia-cudnn-frontend", "NVIDIA_cutlass_dsl", "PyNvVideoCodec", "Humming.Kernels", "torchaudio"])
def test_a_name_is_left_out_however_it_is_spelt(name):
    assert pure_wheel.is_left_out(name)


@pytest.mark.parametrize("name", ["torch", "xgrammar", "tilelang-not", "numpy", "certifi"])
def test_other_names_stay(name):
    assert not pure_wheel.is_left_out(name)


def test_pip_installs_it(wheel, tmp_path):
    target = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", str(target), str(wheel)]
    subprocess.run(pip, check=True, capture_output=True)
    (found,) = importlib.metadata.distributions(path=[str(target)])
    assert (found.name, found.version) == ("vllm", pure_wheel.VERSION)
    assert [(entry.name, entry.value) for entry in found.entry_points] == [("vllm", "vllm.entrypoints.cli.main:main")]
    assert (target / "vllm" / "py.typed").is_file()
    assert not list(target.rglob("*.so"))


def test_its_version_satisfies_a_request_for_the_release(wheel):
    assert Requirement("vllm==0.33.0").specifier.contains(pure_wheel.VERSION)
    assert wheel.name == pure_wheel.WHEEL


def test_one_archive_gives_one_wheel(sdist, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    assert pure_wheel.build(sdist, first).read_bytes() == pure_wheel.build(sdist, second).read_bytes()


@pytest.mark.parametrize("missing", ["PKG-INFO", "vllm/__init__.py", "LICENSE", "vllm.egg-info/entry_points.txt"])
def test_an_archive_that_lacks_something_leaves_no_wheel(missing, tmp_path):
    files = {name: data for name, data in (KEPT | DROPPED | OTHERS).items() if name != missing}
    sdist = write_sdist(tmp_path / pure_wheel.SDIST, files)
    with pytest.raises(CommandError, match=f"has no {missing}"):
        pure_wheel.build(sdist, tmp_path)
    assert list(tmp_path.iterdir()) == [sdist]
