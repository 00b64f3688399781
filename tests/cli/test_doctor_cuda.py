"""What the doctor says of NVIDIA GPUs, on machines with and without one, and names of devices."""
import pytest

from metalstep import doctor_cuda, doctor_devices, doctor_model
from metalstep.choices import DEVICES, DeviceNames, device_kind
from metalstep.finding import FAIL, OK, WARN
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
    """Nothing of NVIDIA's is installed but what a test puts there."""
    for name in ("METALSTEP_NVRTC", "METALSTEP_CUDA_DRIVER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "no-toolkit"))
    monkeypatch.setattr(doctor_cuda.ctypes.util, "find_library", lambda name: None)
    return tmp_path


def test_a_machine_without_a_gpu_needs_nothing(bare):
    finding = doctor_cuda.cuda(bare / "none", [])
    assert finding.status == OK and finding.hint is None and "no NVIDIA GPU" in finding.found


def test_a_gpu_without_a_compiler_gets_the_way_to_one(bare):
    finding = doctor_cuda.cuda(driver(bare / "nvidia", ["NVIDIA H100 80GB HBM3", "NVIDIA L4"]), [])
    assert finding.status == WARN and "pip install nvidia-cuda-nvrtc" in finding.hint
    assert "580.65.06" in finding.found and "NVIDIA H100 80GB HBM3, NVIDIA L4" in finding.found


@pytest.mark.parametrize("where", ["wheel", "named", "toolkit", "loader"])
def test_the_compiler_is_found_wherever_it_is(bare, monkeypatch, where):
    library = bare / "lib64" / "libnvrtc.so.13"
    library.parent.mkdir()
    library.touch()
    if where == "named":
        monkeypatch.setenv("METALSTEP_NVRTC", str(library))
    elif where == "toolkit":
        monkeypatch.setenv("CUDA_HOME", str(bare))
    elif where == "loader":
        monkeypatch.setattr(doctor_cuda.ctypes.util, "find_library", lambda name: "libnvrtc.so.13")
    finding = doctor_cuda.cuda(driver(bare / "nvidia", ["NVIDIA L4"]), [library.parent] if where == "wheel" else [])
    assert finding.status == OK and finding.facts == {"driver": "580.65.06", "gpus": ["NVIDIA L4"], "nvrtc": "libnvrtc.so.13"}


def test_a_name_that_leads_nowhere_is_no_compiler(bare, monkeypatch):
    monkeypatch.setenv("METALSTEP_NVRTC", str(bare / "gone.so"))
    assert doctor_cuda.compiler_file([]) is None


def test_its_checks_are_made_where_there_is_one(monkeypatch):
    for there in (True, False):
        monkeypatch.setattr(doctor_devices, "has_gpu", lambda there=there: there)
        assert ("cuda" in doctor_devices.device_names()) is there


def test_a_model_for_a_gpu_that_is_not_there_fails(monkeypatch):
    monkeypatch.setattr(doctor_model, "has_gpu", lambda: False)
    findings, _ = doctor_model.examine_model("smollm2", device="cuda")
    assert any(finding.status == FAIL and "no NVIDIA GPU" in finding.found for finding in findings)


def test_a_number_names_a_gpu_and_nothing_else():
    for name, kind in [("cuda", "cuda"), ("cuda:0", "cuda"), ("cuda:12", "cuda"), *((name, name) for name in DEVICES)]:
        assert name in DEVICES and device_kind(name) == kind
    for name in ("cuda:", "cuda:x", "cuda:-1", "cuda:1:2", "metal:1", "host:0", "gpu", "", "cuda:²"):
        assert name not in DEVICES
        with pytest.raises(ValueError, match=r"device is .*expected one of host, metal, cuda"):
            make_target(name, threads=None, arithmetic="int16", batch_invariant=False)
    assert "cuda:1" not in DeviceNames(("host", "metal"))
    assert make_target("cuda:1", threads=None, arithmetic="int16", batch_invariant=True).kind == "nvidia"
