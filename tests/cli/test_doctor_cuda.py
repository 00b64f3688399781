"""What the doctor says of NVIDIA GPUs, on machines with and without one, and names of devices."""
from pathlib import Path

import pytest

from metalstep import doctor_cuda, doctor_devices, doctor_model
from metalstep.choices import DEVICES, DeviceNames, device_kind
from metalstep.cli import main as command
from metalstep.finding import FAIL, OK, SLOW, WARN
from metalstep.model import make_target


def driver(folder, names):
    (folder / "gpus").mkdir(parents=True)
    (folder / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Release Build\nGCC version: 12\n")
    for i, name in enumerate(names):
        (folder / "gpus" / f"0000:0{i}:00.0").mkdir()
        (folder / "gpus" / f"0000:0{i}:00.0" / "information").write_text(f"Model: \t\t {name}\nIRQ:   12\n")
    return folder


@pytest.fixture
def bare(monkeypatch, tmp_path):
    """Nothing of NVIDIA's is installed but what a test puts there, where a file in lib64 is a library; a GPU opens."""
    for name in ("METALSTEP_NVRTC", "METALSTEP_CUBLAS", "METALSTEP_CUDA_DRIVER", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "no-toolkit"))
    monkeypatch.setattr(doctor_cuda, "TOOLKIT", str(tmp_path / "no-toolkit"))
    monkeypatch.setattr(doctor_cuda, "fault", lambda path, symbol: None if "lib64" in path and Path(path).exists() else "no such file")
    monkeypatch.setattr(doctor_cuda, "refusal", lambda device: None)
    return tmp_path


def installed(folder, *names):
    folder.mkdir()
    for name in names:
        (folder / name).touch()
    return folder


def test_a_machine_without_a_gpu_needs_nothing(bare):
    finding = doctor_cuda.cuda(bare / "none", [])
    assert finding.status == OK and finding.hint is None and "no NVIDIA GPU" in finding.found


def test_a_gpu_without_a_compiler_gets_the_way_to_one(bare):
    finding = doctor_cuda.cuda(driver(bare / "nvidia", ["NVIDIA H100 80GB HBM3", "NVIDIA L4"]), [])
    assert finding.status == WARN and "pip install nvidia-cuda-nvrtc" in finding.hint
    assert "580.65.06" in finding.found and "NVIDIA H100 80GB HBM3, NVIDIA L4" in finding.found


@pytest.mark.parametrize("where", ["wheel", "named", "toolkit", "loader"])
def test_the_compiler_is_found_wherever_it_is(bare, monkeypatch, where):
    folder = installed(bare / "lib64", "libnvrtc.so.12", "libnvrtc.so.13")
    if where == "named":
        monkeypatch.setenv("METALSTEP_NVRTC", str(folder / "libnvrtc.so.13"))
    elif where == "toolkit":
        monkeypatch.setenv("CUDA_HOME", str(bare))
    elif where == "loader":
        monkeypatch.setattr(doctor_cuda, "fault", lambda path, symbol: None if path == "libnvrtc.so.13" else "no such file")
    finding = doctor_cuda.cuda(driver(bare / "nvidia", ["NVIDIA L4"]), [folder] if where == "wheel" else [])
    assert finding.status == OK and "metalstep runs on it" in finding.found
    assert finding.facts == {"driver": "580.65.06", "gpus": ["NVIDIA L4"], "nvrtc": "libnvrtc.so.13", "cublas": None}


def test_the_library_of_products_is_named_with_its_place_or_what_is_without_it(bare, monkeypatch):
    gpu, folder = driver(bare / "nvidia", ["NVIDIA L4"]), installed(bare / "lib64", "libnvrtc.so.13")
    monkeypatch.setattr(doctor_cuda, "has_gpu", lambda folder=None: True)
    without, faster = doctor_cuda.cuda(gpu, [folder]), doctor_cuda.without_products([folder])
    assert without.status == OK and "prompts run on metalstep's own kernels" in without.found
    assert faster.status == SLOW and "nvidia-cublas" in faster.hint
    (folder / "libcublasLt.so.13").touch()
    found = doctor_cuda.cuda(gpu, [folder])
    assert found.status == OK and f"cuBLAS {folder}/libcublasLt.so.13" in found.found and found.hint is None
    assert doctor_cuda.without_products([folder]) is None
    monkeypatch.setenv("METALSTEP_CUBLAS", str(bare / "gone.so"))
    wrong = doctor_cuda.cuda(gpu, [folder])
    assert wrong.status == WARN and "METALSTEP_CUBLAS is" in wrong.found and "own kernels" in wrong.found


def test_nothing_runs_on_a_device_that_does_not_open(bare, monkeypatch):
    folder = installed(bare / "lib64", "libnvrtc.so.13", "libcublasLt.so.13")
    monkeypatch.setenv("METALSTEP_CUDA_DRIVER", "libm.so.6")
    monkeypatch.setattr(doctor_cuda, "refusal", lambda device: "no CUDA driver: none")
    finding = doctor_cuda.cuda(bare / "none", [folder])
    assert finding.status == WARN and "does not open" in finding.found and "runs on it" not in finding.found
    assert finding.found.startswith("no driver of NVIDIA's is loaded, cuBLAS ")
    monkeypatch.setenv("METALSTEP_CUDA_DRIVER", str(bare / "gone.so"))
    device = doctor_devices.open_device("cuda")
    assert device.status == FAIL and device.hint and "maintainers" not in device.hint and "install" not in device.hint


def test_a_name_that_leads_nowhere_is_no_compiler(tmp_path, monkeypatch):
    text = tmp_path / "t.txt"
    text.write_text("no library")
    for path, why in [(tmp_path / "gone.so", "cannot open"), (text, "t.txt"), ("libm.so.6", "it has no nvrtcVersion")]:
        monkeypatch.setenv("METALSTEP_NVRTC", str(path))
        found, wrong = doctor_cuda.find_library("nvrtc", "METALSTEP_NVRTC", "nvrtcVersion", [])
        assert found is None and wrong.startswith(f" (METALSTEP_NVRTC is '{path}': ") and why in wrong


def test_its_checks_are_made_where_there_is_one(monkeypatch):
    for there in (True, False):
        monkeypatch.setattr(doctor_devices, "has_gpu", lambda there=there: there)
        assert ("cuda" in doctor_devices.device_names()) is there


@pytest.mark.parametrize("device", ["cuda", "metal"])
def test_a_model_for_a_device_that_does_not_open_fails_with_the_reason_and_no_promise(monkeypatch, device):
    monkeypatch.setattr(doctor_model, "refusal", lambda name: "no CUDA driver: none here; install one")
    findings, _ = doctor_model.examine_model("smollm2", device=device)
    [failed] = [finding for finding in findings if finding.status == FAIL]
    assert failed.found == f"{device} cannot be opened: no CUDA driver: none here" and failed.hint == "install one"
    assert not {"memory", "context"} & {finding.name for finding in findings}
    assert not any("runs on" in finding.found for finding in findings)


def test_a_number_names_a_gpu_and_nothing_else():
    for name, kind in [("cuda", "cuda"), ("cuda:0", "cuda"), ("cuda:12", "cuda"), *((name, name) for name in DEVICES)]:
        assert name in DEVICES and device_kind(name) == kind
    for name in ("cuda:", "cuda:x", "cuda:-1", "cuda:1:2", "metal:1", "host:0", "gpu", "", "cuda:²"):
        assert name not in DEVICES
        with pytest.raises(ValueError, match=r"device is .*expected one of host, metal, cuda"):
            make_target(name, threads=None, arithmetic="int16", batch_invariant=False)
    assert "cuda:1" not in DeviceNames(("host", "metal"))
    assert make_target("cuda:1", threads=None, arithmetic="int16", batch_invariant=True).kind == "nvidia"


@pytest.mark.parametrize("call", [["generate", "--prompt", "p"], ["bench", "kernels"], ["bench", "decode"], ["calibrate", "m"]])
@pytest.mark.parametrize("name", ["cuda:x", "cuda:-1", "cuda:", "metal:1"])
def test_the_command_line_says_what_takes_a_number(capsys, call, name):
    assert command.main([*call, "--device", name]) == 2
    error = capsys.readouterr().err
    assert f"argument --device: '{name}' is no device, expected one of " in error and "or cuda:N for the GPU of that number" in error
    assert "did you mean" not in error and "only cuda takes a number, counted from 0" in error
