"""A plane of the KV cache as numpy sees it: what is written comes back, wherever the device keeps it, and bytes are what was said."""
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metalstep.kernels.kv_codec import NAMES, KVCodec
from metalstep.kernels.native import NativeDevice
from metalstep.kv_cache import BLOCK_SIZE, CacheGroup, LayerShape, PagedKVCache
from metalstep.kv_plane import Plane

BYTES = {  # of a vector with float16 norms, by head_dim: the format's table
    "turbo2": {64: 18, 80: 22, 96: 26, 128: 34, 192: 50, 256: 66},
    "turbo3": {64: 26, 80: 34, 96: 38, 128: 50, 192: 74, 256: 98},
    "turbo4": {64: 34, 80: 42, 96: 50, 128: 66, 192: 98, 256: 130},
    "affine8": {64: 68, 80: 100, 96: 108, 128: 136, 192: 204, 256: 272},
    "float16": {64: 128, 80: 160, 96: 192, 128: 256, 192: 384, 256: 512},
}


@pytest.fixture(scope="module")
def device():
    with NativeDevice.open("host", 1) as opened:
        yield opened


@pytest.mark.parametrize("name", BYTES)
def test_a_vector_takes_the_bytes_of_the_formats_table(name):
    for dim, nbytes in BYTES[name].items():
        assert KVCodec(name).vector_bytes(dim) == nbytes
        if name.startswith("turbo"):
            assert KVCodec(name, "float32").vector_bytes(dim) == nbytes + 2


@given(
    codec=st.builds(KVCodec, st.sampled_from(NAMES), st.sampled_from(["float16", "float32"])),
    dim=st.sampled_from([64, 80, 96, 128, 256]),
    heads=st.integers(1, 3),
    by_token=st.booleans(),
    seed=st.integers(0, 99),
)
def test_blocks_come_back_bit_for_bit_and_others_stay(device, codec, dim, heads, by_token, seed):
    plane = Plane(device, 5, heads, dim, codec, by_token=by_token)
    assert plane.buffer.nbytes == 5 * heads * BLOCK_SIZE * codec.vector_bytes(dim)
    rng = np.random.default_rng(seed)
    before = plane.read(list(range(5)))
    assert before.nbytes == plane.buffer.nbytes
    written = rng.integers(0, 256, (2, heads, BLOCK_SIZE, codec.vector_bytes(dim)), np.uint8)
    if codec.is_float:
        written = written.view(before.dtype)
    plane.write([3, 1], written)
    plane.copy(3, 0)
    after = plane.read([3, 1, 0, 2, 4])
    as_bytes = [np.ascontiguousarray(a).view(np.uint8) for a in (after, written, before)]
    np.testing.assert_array_equal(as_bytes[0][:2], as_bytes[1])
    np.testing.assert_array_equal(as_bytes[0][2], as_bytes[1][0])
    np.testing.assert_array_equal(as_bytes[0][3:], as_bytes[2][[2, 4]])


def test_layers_of_one_pool_share_planes_only_where_they_store_alike(device):
    few, many = (LayerShape(2, 64, 64, KVCodec(name), KVCodec(name)) for name in ("turbo4", "affine8"))
    groups = [CacheGroup(None, {0: many, 1: few}), CacheGroup(32, {2: few, 3: few})]
    cache = PagedKVCache(device, groups, [4, 4], one_pool=True)
    handles = {layer: planes.k.handle for layer, planes in cache.planes.items()}
    assert handles[1] == handles[2] and len({handles[0], handles[1], handles[3]}) == 3  # the first of those that store alike
    assert cache.nbytes == 4 * BLOCK_SIZE * (many.token_bytes + 2 * few.token_bytes)
