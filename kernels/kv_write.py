"""KV write: a row's keys and values, encoded, into the paged cache, at the place that slot_mapping gives (negative: not written)."""
from __future__ import annotations

from metalstep.kernels import params
from metalstep.kernels.kv_codec import KVCodec
from metalstep.kernels.program import Program, Register


def emit(
    program: Program,
    keys: Register,
    values: Register,
    k_slot: int,
    v_slot: int,
    num_kv_heads: int,
    block_size: int,
    k_codec: KVCodec,
    v_codec: KVCodec,
    k_scales: int = 0,
    v_scales: int = 0,
) -> None:
    """Write keys [num_kv_heads, key_dim] and values [num_kv_heads, value_dim] to the planes in `k_slot` and `v_slot`.

    Planes of floats: values [block, kv_head, block_size, value_dim]; keys with the last two axes swapped on the host device, so
    that block_size keys are a vector of attention's first product. Others: see ms_kv_codec; k_scales, v_scales: the planes' 4-byte words
    before their scales (KVCodec.scales_at). A vector that is not finite leaves a scale
    of NaN and codes of 0, so that who reads it knows.
    Raises: ValueError for heads that a codec does not take.
    """
    key_dim, value_dim = keys.size // num_kv_heads, values.size // num_kv_heads
    k_codec.check_dim(key_dim)
    v_codec.check_dim(value_dim)
    program.emit(
        params.MS_OP_KV_WRITE,
        None,
        keys,
        values,
        n=keys.size,
        slot=k_slot,
        slot2=v_slot,
        dtype=k_codec.code,
        inner=v_codec.code,
        offset=k_scales,
        row_stride=v_scales,
        imm=k_codec.scale_code + 4 * v_codec.scale_code,
        dims=[num_kv_heads, key_dim, value_dim, block_size],
    )
