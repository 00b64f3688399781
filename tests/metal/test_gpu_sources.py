"""What GPUs compile, compiled without a GPU: by clang with Metal's address spaces, and by NVIDIA's compiler to machine code."""
import sys
import warnings

import pytest
from address_spaces import CLANG, messages
from families import BASE, FAMILIES, build
from gpu_sources import covering, instances, texts
from nvrtc import compile_cuda
from tiny import write_model

import metalstep
from metalstep.kernels.gpu.cuda_source import translate
from metalstep.kernels.metal_source import metal_source

INSTANCES = instances()
DEFAULT = covering(list(INSTANCES))
CASES = [pytest.param(name, marks=() if name in DEFAULT else pytest.mark.all_instances) for name in INSTANCES]
needs_clang = pytest.mark.skipif(CLANG is None, reason="no clang++: put it on PATH or set METALSTEP_CLANG")
needs_nvrtc = pytest.mark.skipif(sys.platform == "darwin", reason="NVIDIA's compiler does not exist for this system")
STEPS = ((1, True, 1), (13, True, 9), (200, False, 9))  # rows, decode, context


@needs_clang
@pytest.mark.parametrize("name", CASES)
def test_an_instance_type_checks_with_address_spaces(name):
    for source in texts(INSTANCES[name]()):
        assert messages(source) == ""


@needs_nvrtc
@pytest.mark.parametrize("name", CASES)
def test_an_instance_compiles_for_nvidia(name):
    for source in texts(INSTANCES[name]()):
        cubin, log = compile_cuda(translate(source))
        assert cubin, log


@needs_nvrtc
@needs_clang
@pytest.mark.parametrize("name", ["gemma2", "starcoder2"])
def test_a_model_s_kernels_compile(name, tmp_path):
    """Row programs are made for a model: those of families with different norms, rotations and activations, in every sort of plan."""
    config = {"model_type": FAMILIES[name].model_type, **BASE, **FAMILIES[name].config}
    write_model(tmp_path / name, build(name, quantized=True), config, {"group_size": 32, "bits": 4})
    with warnings.catch_warnings(), metalstep.load(tmp_path / name, strict=True, device="metal-sim", kv_memory="16MB")[0] as model:
        warnings.simplefilter("ignore")
        native, seen = model.native, set()
        for rows, decode, context in STEPS:
            plan = native.plan(native.target.plan_shape(rows, decode=decode, context=context))
            launches = [entry.launch for entry in plan.launches if entry.launch.kernel not in seen]
            seen |= {launch.kernel for launch in launches}
            for source in texts(launches):
                assert messages(source) == ""
                cubin, log = compile_cuda(translate(source))
                assert cubin, log


MISTAKES = {  # a change to a kernel that one of the checks must refuse
    "address space": ("const ulong row =", "device float* lost = partial; const ulong row ="),
    "a name that is not there": ("simd_sum(sum)", "simd_sum(summ)"),
    "an attribute left out": ("uint sg    [[simdgroup_index_in_threadgroup]]", "uint sg"),
}


@needs_clang
@needs_nvrtc
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_planted_mistake_is_refused(mistake):
    good = metal_source("add_rms_norm")
    bad = good.replace(*MISTAKES[mistake])
    assert bad != good

    def refused(source):
        try:
            return bool(messages(source)) or not compile_cuda(translate(source))[0]
        except ValueError:
            return True

    assert refused(bad)
    assert not refused(good)
