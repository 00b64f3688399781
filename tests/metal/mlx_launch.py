"""Runs MLX's Metal kernels on simulated Metal with numpy arrays in and out, and compares with MLX on the CPU."""
from __future__ import annotations

import functools
from collections.abc import Sequence

import mlx.core as mx
import mlx_headers
import numpy as np

from metalstep.kernels.launch import Buffer, Launch
from metalstep.kernels.native import NativeDevice


class MlxKernels:
    """The kernels of one source text."""

    def __init__(self, source: str):
        self.device = NativeDevice.open("metal-sim")
        self.device.add_library(source)

    def run(self, kernel: str, arguments: Sequence[np.ndarray | None], grid: tuple[int, int, int], threads: tuple[int, int, int]) -> None:
        """One launch of `kernel`; the i-th argument is its [[buffer(i)]] and holds afterwards what the kernel left there.

        An argument that no function constant asks for is None: the kernel must not look at the few bytes that it gets.
        """
        arrays = [np.zeros(4, np.uint8) if argument is None else argument for argument in arguments]
        owners = [self.device.create_buffer(array.nbytes) for array in arrays]
        for owner, array in zip(owners, arrays, strict=True):
            owner.numpy(array.dtype, array.shape)[...] = array
        bindings = [Buffer(owner.handle, 0, (array.nbytes,), "uint8") for owner, array in zip(owners, arrays, strict=True)]
        plan = self.device.create_plan([Launch(kernel, bindings, b"", grid, threads)], 1, 1)
        try:
            plan.wait(plan.run(1))
            for owner, array in zip(owners, arrays, strict=True):
                if array.flags.writeable:
                    array[...] = owner.numpy(array.dtype, array.shape)
        finally:
            plan.close()
            for owner in owners:
                owner.close()


@functools.cache
def kernels(headers: tuple[str, ...], instances: str, constants: tuple[tuple[int, object], ...] = ()) -> MlxKernels:
    """Instances of templates of MLX's headers, compiled for one set of values of function constants."""
    return MlxKernels(mlx_headers.source(headers, instances, dict(constants)))


def int32(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def int64(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def float32(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def bfloat_bits(values: np.ndarray) -> np.ndarray:
    """float32 rounded to bfloat16, as uint16."""
    return bits(mx.array(np.asarray(values, np.float32)).astype(mx.bfloat16))


def of_bfloat(stored: np.ndarray) -> np.ndarray:
    return (stored.astype(np.uint32) << 16).view(np.float32)


def bits(array: mx.array) -> np.ndarray:
    """A 16-bit MLX array as numpy's uint16, which has all of them; others as they are."""
    return np.array(array.view(mx.uint16) if array.dtype in (mx.float16, mx.bfloat16) else array)


def wide(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32))


def unwritten(shape: Sequence[int], dtype: type = np.float16) -> np.ndarray:
    """NaN, or all bits set."""
    return np.full(shape, 0xFFFF, np.uint16) if dtype == np.uint16 else np.full(shape, np.nan, dtype)


def relative_error(got: np.ndarray, expected: np.ndarray) -> float:
    """|got - expected| / |expected| over all elements; infinite where something is not finite."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64).reshape(np.shape(got))
    if not np.isfinite(got).all():
        return float("inf")
    return float(np.linalg.norm(got - expected) / max(np.linalg.norm(expected), 1e-30))


def normal(rng: np.random.Generator, *shape: int, dtype: type = np.float16, scale: float = 1.0) -> np.ndarray:
    return (rng.standard_normal(shape) * scale).astype(dtype)


def ceil(a: int, b: int) -> int:
    return -(-a // b)
