"""Weights on the device: linears packed into panels, everything else as float32 vectors, all in one buffer."""
from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import numpy as np

from metalstep import loading
from metalstep.capture.errors import CaptureError
from metalstep.checkpoint import Tensor, blocks
from metalstep.checkpoint.tensors import FileTensor
from metalstep.kernels import params
from metalstep.kernels.launch import Buffer
from metalstep.kernels.linear import FLOATS, PackedWeight
from metalstep.kernels.native import DeviceBuffer, NativeDevice
from metalstep.plan.memory import ALIGN

DTYPES = {"float32": params.MS_FLOAT32, "float16": params.MS_FLOAT16, "bfloat16": params.MS_BFLOAT16}
BITS = (1, 2, 3, 4, 5, 6, 8)  # of quantised weights
BLOCKS = {  # GGUF block formats, as MSWeightSource names them
    "q4_0": params.MS_WEIGHT_GGUF_Q4_0,
    "q4_1": params.MS_WEIGHT_GGUF_Q4_1,
    "q8_0": params.MS_WEIGHT_GGUF_Q8_0,
}


CHUNK = 32 << 20  # bytes of a buffer that is made when the arena is full


class WeightStore:
    """Puts a checkpoint's tensors on `device` as launches ask for them, each once per use (panels or vector, and range of rows).
    Linears are in panels, the host device's layout.

    tensors: by mlx-lm parameter name. prepared: weights computed once from others, by name.
    """

    def __init__(self, device: NativeDevice, tensors: Mapping[str, Tensor], prepared: Mapping[str, mx.array]):
        self._device = device
        self._tensors = tensors
        self._prepared = prepared
        self._packed: dict[tuple[str, int, int], PackedWeight] = {}
        self._vectors: dict[str, Buffer] = {}
        self._free = 0
        self._arena = device.create_buffer(self._arena_bytes(), shared=False)

    def packed(self, name: str, n: int, k: int, bits: int, group_size: int, first: int = 0) -> PackedWeight:
        """Rows [first, first + n) of the linear weight `name` in the device's layout. bits 16 or more: dense.

        Raises: CaptureError for an unknown name; ValueError from the device for a combination it cannot pack.
        """
        key = (name, first, n)
        if key not in self._packed:
            self._packed[key] = self._pack(name, n, k, bits, group_size, first)
        return self._packed[key]

    def vector(self, name: str) -> Buffer:
        """The weight `name`, all elements, as float32."""
        if name not in self._vectors:
            self._vectors[name] = self.constant(self.array(name))
        return self._vectors[name]

    def array(self, name: str) -> np.ndarray:
        """The weight `name` as float32 (uint32 for packed words) in host memory."""
        if name in self._prepared:
            return np.array(self._prepared[name].astype(mx.float32))
        if name not in self._tensors:
            raise CaptureError(f"the model uses a weight {name!r} that the checkpoint does not have")
        return self._tensors[name].numpy()

    def constant(self, values: np.ndarray) -> Buffer:
        """`values` as float32 on the device."""
        values = np.ascontiguousarray(values, np.float32)
        owner, offset = self._reserve(values.nbytes)
        owner.write(values, offset)
        return Buffer(owner.handle, offset, values.shape, "float32")

    def _reserve(self, nbytes: int) -> tuple[DeviceBuffer, int]:
        if self._free + nbytes > self._arena.nbytes:
            self._arena, self._free = self._device.create_buffer(max(nbytes, CHUNK), shared=False), 0
        at = self._free
        self._free += -(-nbytes // ALIGN) * ALIGN
        return self._arena, at

    def _arena_bytes(self) -> int:
        """Memory is committed when it is written, so the upper bound costs nothing."""
        return max(ALIGN, sum(self._bound(name) for name in self._tensors))

    def _bound(self, name: str) -> int:
        """Bytes that `name` takes at most, as panels or as float32."""
        tensor = self._tensors[name]
        rows, width = math.prod(tensor.shape[:-1]), tensor.shape[-1] if tensor.shape else 1
        padded = (rows + 64) * width
        if tensor.format in BLOCKS:
            return padded * 36 // 32 + ALIGN
        if tensor.format is not None:  # float32 scales and biases take 2 bits of an element
            return padded * (blocks.FORMATS[tensor.format].bits + 2) // 8 + ALIGN
        if tensor.dtype == "uint32" or name.endswith((".scales", ".biases")):
            return padded * 4 + ALIGN
        return padded * (4 if len(tensor.shape) < 2 or tensor.dtype == "float32" else 2) + ALIGN

    def _pack(self, name: str, n: int, k: int, bits: int, group_size: int, first: int) -> PackedWeight:
        source, keep = self._source(name, n, k, bits, group_size, first)
        nbytes = self._device.weight_bytes(n, k, source["bits"], source["group_size"], source["dtype"])
        owner, offset = self._reserve(nbytes)
        self._device.pack_weight(owner, offset, **source)
        loading.advance(nbytes)
        for tensor in keep:
            if isinstance(tensor, Tensor):
                tensor.drop_pages()
        region = Buffer(owner.handle, offset, (nbytes,), "uint8")
        return PackedWeight(region, n, k, source["bits"], source["group_size"], source["dtype"])

    def _source(self, name: str, n: int, k: int, bits: int, group_size: int, first: int) -> tuple[dict[str, Any], list[Any]]:
        """Fields of MSWeightSource, and the objects that own its memory."""
        if name in self._prepared:
            values = np.ascontiguousarray(self.array(name)[first : first + n])
            return self._dense(n, k, params.MS_FLOAT32, values.ctypes.data, None), [values]
        if name not in self._tensors:
            raise CaptureError(f"the model uses a weight {name!r} that the checkpoint does not have")
        tensor = self._tensors[name]
        order = tensor.row_order
        if first or n != math.prod(tensor.shape[:-1]):
            rows = np.arange(first, first + n, dtype=np.int32)
            order = rows if order is None else np.ascontiguousarray(order[first : first + n])
        row_order = None if order is None else np.ascontiguousarray(order, np.int32)
        pointer = None if row_order is None else row_order.ctypes.data
        if tensor.format in BLOCKS:
            fields = self._dense(n, k, params.MS_FLOAT16, tensor.address(), pointer)
            own = {"bits": blocks.FORMATS[tensor.format].bits, "group_size": blocks.GROUP_SIZE}
            return {**fields, "format": BLOCKS[tensor.format], **own}, [tensor, row_order]
        if tensor.format is not None:
            return self._converted(tensor, n, k, first)
        if tensor.dtype != "uint32":
            return self._dense(n, k, DTYPES[tensor.dtype], tensor.address(), pointer), [tensor, row_order]
        dtype, planes = quantised_planes(self._tensors, name, bits, group_size)
        fmt = params.MS_WEIGHT_AFFINE if "biases" in planes else params.MS_WEIGHT_FLOATS
        fields = self._dense(n, k, dtype, tensor.address(), pointer)
        quantised = {"format": fmt, "bits": bits, "group_size": group_size}
        pointers = {plane: values.address() for plane, values in planes.items()}
        return {**fields, **quantised, **pointers}, [tensor, *planes.values(), row_order]

    def _converted(self, tensor: Tensor, n: int, k: int, first: int) -> tuple[dict[str, Any], list[Any]]:
        """`_source` of GGUF blocks that the packer does not read: their affine triplet, for as long as it takes to pack it."""
        assert isinstance(tensor, FileTensor) and tensor.format is not None
        parts = tensor.affine(first, n)
        fields = self._dense(n, k, DTYPES[str(parts.scales.dtype)], parts.words.ctypes.data, None)
        affine = {"format": params.MS_WEIGHT_AFFINE, "bits": blocks.FORMATS[tensor.format].bits, "group_size": blocks.GROUP_SIZE}
        pointers = {"scales": parts.scales.ctypes.data, "biases": parts.biases.ctypes.data}
        return {**fields, **affine, **pointers}, [tensor, parts]

    def _dense(self, n: int, k: int, dtype: int, data: int, row_order: int | None) -> dict[str, Any]:
        return {
            "format": params.MS_WEIGHT_DENSE,
            "n": n,
            "k": k,
            "bits": 32 if dtype == params.MS_FLOAT32 else 16,
            "group_size": 0,
            "dtype": dtype,
            "data": data,
            "row_order": row_order,
        }


def quantised_planes(tensors: Mapping[str, Tensor], name: str, bits: int, group_size: int) -> tuple[int, dict[str, Tensor]]:
    """The ms_dtype of the scales of the packed weight `name`, and its scales and biases. Floats (scales of a byte) have no biases.

    Raises: CaptureError for tensors that are missing or do not belong together.
    """
    if bits not in BITS:
        raise CaptureError(f"{name} has {bits} bits; kernels read {', '.join(map(str, BITS))}")
    base = name.removesuffix("weight")
    planes = {plane: tensors[base + plane] for plane in ("scales", "biases") if base + plane in tensors}
    if "scales" not in planes:
        raise CaptureError(f"the checkpoint has no {base}scales for the packed weight {name!r}")
    dtype = planes["scales"].dtype
    if dtype == "uint8":
        code = next((scales for b, group, scales in FLOATS.values() if (b, group) == (bits, group_size)), None)
        if code is None or "biases" in planes:
            what = f"{bits} bits in groups of {group_size} with scales of a byte" + (" and biases" if "biases" in planes else "")
            raise CaptureError(f"{name} has {what}; expected one of {', '.join(FLOATS)}")
        return code, planes
    if "biases" not in planes:
        raise CaptureError(f"the checkpoint has no {base}biases for the packed weight {name!r}, whose scales are {dtype}")
    if dtype != planes["biases"].dtype:
        raise CaptureError(f"{base}scales is {dtype} and its biases are {planes['biases'].dtype}; one dtype is expected")
    if dtype not in DTYPES:
        raise CaptureError(f"{base}scales is {dtype}; scales are float32, float16, bfloat16, or uint8 for {', '.join(FLOATS)}")
    return DTYPES[dtype], planes
