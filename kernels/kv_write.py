"""KV write: a row's keys and values into the paged cache, at the place that slot_mapping gives (negative: not written)."""
from __future__ import annotations

from metalstep.kernels import params
from metalstep.kernels.program import Program, Register


def emit(
    program: Program,
    keys: Register,
    values: Register,
    k_slot: int,
    v_slot: int,
    num_kv_heads: int,
    block_size: int,
    dtype: int,
) -> None:
    """Write keys [num_kv_heads, key_dim] and values [num_kv_heads, value_dim] to the planes in `k_slot` and `v_slot`.

    Planes: values [block, kv_head, block_size, value_dim]; keys with the last two axes swapped on the host device, so
    that block_size keys are a vector of attention's first product. dtype: ms_dtype of the planes.
    """
    program.emit(
        params.MS_OP_KV_WRITE,
        None,
        keys,
        values,
        n=keys.size,
        slot=k_slot,
        slot2=v_slot,
        dtype=dtype,
        dims=[num_kv_heads, keys.size // num_kv_heads, values.size // num_kv_heads, block_size],
    )
