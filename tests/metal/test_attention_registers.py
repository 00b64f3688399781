"""Decode attention of models that are common, as NVIDIA's compiler divides its registers."""
import sys

import pytest
from gpu_sources import attention_launches
from nvrtc import spilled

from metalstep.kernels.gpu import attention, library
from metalstep.kernels.kv_codec import KVCodec

pytestmark = pytest.mark.skipif(sys.platform == "darwin", reason="NVIDIA's compiler does not exist for this system")
CACHES = [("float16", "float16"), ("turbo4", "turbo2"), ("affine8", "affine8")]
FEW = 32  # bytes: what is seldom used
ALLOWED = {("turbo4", "turbo2"): FEW, ("affine8", "affine8"): FEW}


@pytest.mark.parametrize("heads, rows, context", [(2, 1, 64), (2, 64, 64), (4, 8, 8192), (4, 32, 64), (4, 64, 8192)])
@pytest.mark.parametrize("k_name, v_name", CACHES)
def test_decode_attention_keeps_what_it_works_with_in_registers(k_name, v_name, heads, rows, context):
    """A lane's share of sums and of what is read next fits; without it every tile would go through memory again."""
    pieces = attention.pieces("nvidia", rows, context, kv_heads=8)
    launches = attention_launches(heads, 128, (KVCodec(k_name), KVCodec(v_name)), "inside", "nvidia", rows, pieces)
    texts = library.cuda_sources(launches, ())
    assert max(spilled(text) for text in texts.values()) <= ALLOWED.get((k_name, v_name), 0)
