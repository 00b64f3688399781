"""Random buffers for the host device's cases of `metalstep bench kernels`: weights in panels, caches in any codec."""

from __future__ import annotations

import numpy as np

from metalstep.bench.kernel_inputs import CaseInputs
from metalstep.kernels import params
from metalstep.kernels.gpu.bench_case import BenchSizes
from metalstep.kernels.kv_codec import KVCodec
from metalstep.kernels.launch import Buffer
from metalstep.kernels.linear import PackedWeight
from metalstep.kernels.native import DeviceBuffer, NativeDevice


class HostInputs(CaseInputs):
    """As CaseInputs, where a case may have a thousand copies: numbers are drawn once, weights packed once. `packed` and `planes` give
    memory of its own to each copy."""

    def __init__(self, device: NativeDevice, sizes: BenchSizes, repeats: int):
        super().__init__(device, sizes, repeats)
        self._tiles: dict[str, np.ndarray] = {}
        self._panels: dict[tuple[int, int], np.ndarray] = {}

    def _random(self, dtype: str) -> np.ndarray:
        if dtype not in self._tiles:
            self._tiles[dtype] = super()._random(dtype)
        return self._tiles[dtype]

    def packed(self, n: int, k: int) -> PackedWeight:
        """A weight in the format of the sizes; dense where groups do not divide k, as mlx-lm leaves it."""
        sizes = self._sizes
        quantised = sizes.bits < 16 and k % sizes.group_size == 0
        bits, group_size = (sizes.bits, sizes.group_size) if quantised else (16, 0)
        nbytes = self._device.weight_bytes(n, k, bits, group_size, params.MS_BFLOAT16)
        owner = self._device.create_buffer(nbytes)
        self._handles.append(owner.handle)
        self.weight_bytes += nbytes
        panels = owner.numpy(np.uint8, (nbytes,))
        if (n, k) in self._panels:
            panels[:] = self._panels[n, k]
        else:
            self._pack(owner, n, k, bits, group_size)
            self._panels[n, k] = panels
        return PackedWeight(Buffer(owner.handle, 0, (nbytes,), "uint8"), n, k, bits, group_size, params.MS_BFLOAT16)

    def _pack(self, owner: DeviceBuffer, n: int, k: int, bits: int, group_size: int) -> None:
        fields = dict(n=n, k=k, bits=bits, group_size=group_size, dtype=params.MS_BFLOAT16)
        if not group_size:
            values = np.resize(self._random("bfloat16"), n * k)
            self._device.pack_weight(owner, 0, format=params.MS_WEIGHT_DENSE, data=values.ctypes.data, **fields)
            return
        words = np.resize(self._random("uint32"), n * k * bits // 32)
        scales, biases = (np.resize(self._random("bfloat16"), n * k // group_size) for _ in range(2))
        addresses = dict(data=words.ctypes.data, scales=scales.ctypes.data, biases=biases.ctypes.data)
        self._device.pack_weight(owner, 0, format=params.MS_WEIGHT_AFFINE, **addresses, **fields)

    def close(self) -> None:
        self._panels.clear()  # its views keep memory
        super().close()

    def planes(self, codec: KVCodec, sequences: int, context: int) -> tuple[Buffer, Buffer]:
        """A layer's keys and values of so many sequences; codes are random bits, scales normal numbers."""
        sizes = self._sizes
        vectors = sequences * -(-context // sizes.block_size) * sizes.block_size * sizes.num_kv_heads
        planes = []
        for _ in range(2):
            if codec.is_float:
                planes.append(self.weight((vectors, sizes.head_dim), codec.name))
                continue
            plane = self.weight((vectors * codec.vector_bytes(sizes.head_dim),), "uint8")
            at = 4 * codec.scales_at(plane.nbytes, sizes.head_dim)
            scales = self._device.view(plane.handle, np.float16, ((plane.nbytes - at) // 2,), at)
            scales[:] = np.resize(self._random("float16"), scales.size)
            planes.append(plane)
        return planes[0], planes[1]
