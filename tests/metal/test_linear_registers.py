"""Linears on half tiles, as NVIDIA's compiler divides its registers."""
import sys

import pytest
from gpu_sources import linear_launches
from nvrtc import spilled

from metalstep.kernels import params
from metalstep.kernels.gpu import library
from metalstep.kernels.linear import FLOATS

pytestmark = pytest.mark.skipif(sys.platform == "darwin", reason="NVIDIA's compiler does not exist for this system")
FEW = 64  # bytes: what is seldom used


@pytest.mark.parametrize("rows", [1, 8, 32, 64, 65])
@pytest.mark.parametrize(("bits", "group", "dtype"), [(4, 64, "f16"), (4, 64, "bf16"), (8, 64, "bf16"), (3, 32, "f32"), (16, 0, "bf16")])
def test_half_tiles_keep_what_they_work_with_in_registers(bits, group, dtype, rows):
    """Sums, and the words on their way, fit for gate and up: without it every step would go through memory again."""
    [text] = library.cuda_sources(linear_launches(bits, group, dtype, rows, kind="nvidia"), ()).values()
    assert spilled(text) <= FEW


@pytest.mark.parametrize("mode", FLOATS)
def test_so_do_floats(mode):
    bits, group, code = FLOATS[mode]
    assert code in (params.MS_E8M0, params.MS_E4M3)
    [text] = library.cuda_sources(linear_launches(bits, group, "", 32, code, "nvidia"), ()).values()
    assert spilled(text) <= FEW
