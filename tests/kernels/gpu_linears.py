"""Weights of every format and products with them, for the tests of the GPU's linear."""
from __future__ import annotations

import mlx.core as mx
import numpy as np

from metalstep.kernels import linear, params
from metalstep.kernels.gpu import linear as gpu_linear
from metalstep.kernels.launch import Buffer
from metalstep.kernels.linear import Input, PackedWeight, Segment
from metalstep.kernels.program import Program

F32 = mx.float32
BITS = (1, 2, 3, 4, 5, 6, 8)
DTYPES = {"float": mx.float32, "half": mx.float16, "bfloat": mx.bfloat16}
CODES = {"float": params.MS_FLOAT32, "half": params.MS_FLOAT16, "bfloat": params.MS_BFLOAT16}
# max_rows of each variant: matvec of one, three and four rows, small tiles, and larger ones
VARIANTS = {"matvec 1": 1, "matvec 3": 3, "matvec 4": 4, "tiles 8": 8, "tiles 16": 16, "tiles 32": 32, "tiles 64": 64, "tiles 130": 130}
KEPT = -77.0  # what poisoned places hold besides NaN: a store there would show
# Relative to the sum of all magnitudes: a lane adds some thirty products of float32 in a row, each rounded to 6e-8.
TOLERANCE = 2e-6
HALF = 2.0**-11  # float16 rounds to


class Weight:
    """A weight on the device, its values in float64, and the magnitudes of what is added up to make them."""

    def __init__(self, h, rng, n, k, bits, group=0, dtype="half", shift=0):
        """bits 16: dense, 32 as well (float); or a mode of linear.FLOATS. shift: elements by which each buffer's region starts late."""
        self.n, self.k = n, k
        if bits in linear.FLOATS:
            self._floats(h, rng, bits, shift)
            return
        values = mx.array(rng.standard_normal((n, k)).astype(np.float32)).astype(DTYPES[dtype])
        view = mx.uint32 if dtype == "float" else mx.uint16
        fields = dict(bits=bits, group_size=group, dtype=CODES[dtype], n=n, k=k)
        if group:
            words, scales, biases = mx.quantize(values, group_size=group, bits=bits)
            wide = [np.array(a.astype(F32)).astype(np.float64).repeat(group, 1) for a in (scales, biases)]
            self.exact = np.array(mx.dequantize(words, *(a.astype(F32) for a in (scales, biases)), group_size=group, bits=bits))
            self.exact = self.exact.astype(np.float64)
            self.magnitude = np.abs(self.exact - wide[1]) + np.abs(wide[1])
            planes = [shifted(h, np.array(a), shift) for a in (words, scales.view(view), biases.view(view))]
            self.packed = PackedWeight(planes[0], *self._fields(fields), scales=planes[1], biases=planes[2])
        else:
            self.exact = np.array(values.astype(F32)).astype(np.float64)
            self.magnitude = np.abs(self.exact)
            self.packed = PackedWeight(shifted(h, np.array(values.view(view)), shift), *self._fields(fields))

    def _floats(self, h, rng, mode, shift):
        words, scales = mx.quantize(mx.array(rng.standard_normal((self.n, self.k)).astype(np.float32)), mode=mode)
        self.exact = np.array(mx.dequantize(words, scales, mode=mode, dtype=F32)).astype(np.float64)
        self.magnitude = np.abs(self.exact)
        planes = [shifted(h, np.array(a), shift) for a in (words, scales)]
        self.packed = PackedWeight(planes[0], self.n, self.k, *linear.FLOATS[mode], scales=planes[1])

    @staticmethod
    def _fields(fields):
        return (fields[name] for name in ("n", "k", "bits", "group_size", "dtype"))


def dense_bits(dtype):
    return 32 if dtype == "float" else 16


def shifted(h, array, shift):
    """`array` on the device, `shift` elements behind the start of its buffer."""
    whole = h.put(np.concatenate([np.zeros(shift, array.dtype), array.reshape(-1)]))
    return Buffer(whole.handle, shift * array.itemsize, array.shape, whole.dtype)


def half_bound(x, weight, magnitude=None):
    """What a product of half tiles may be off: x and the weight are rounded, and what the weight is made from. magnitude: of the x that
    is rounded, if not x (a norm's may be rounded where it is applied)."""
    m = np.abs(x.astype(np.float64)) if magnitude is None else magnitude
    return HALF * (m @ (2 * np.abs(weight.exact) + weight.magnitude).T) + bound(m, weight) + 2.0**-24 * np.abs(weight.exact).sum(1)


def bound(x, weight):
    return TOLERANCE * np.abs(x.astype(np.float64)) @ weight.magnitude.T + 1e-30


def plain(weight, slot, offset=0, row_stride=None):
    """The epilogue that stores its one product."""
    program = Program(epilogue=True)
    program.store(program.register(weight.n), slot, offset=offset, row_stride=row_stride or weight.n)
    return program


def products(h, x, weights, max_rows=None, *, norm=None, sampled=None, planes=1, **options):
    """x times each weight, all in one launch of a segment each, into one poisoned matrix whose margins must stay as they were."""
    rows = len(x) if sampled is None else len(sampled)
    max_rows = max_rows or rows
    starts = np.cumsum([1, *(w.n + 1 for w in weights)])
    width = int(starts[-1])
    out = h.put(np.full((planes * max_rows + 1, width), KEPT, np.float32))
    slot = linear.first_buffer_slot([[w.packed] for w in weights])
    segments = [Segment([w.packed], plain(w, slot, int(at), width)) for w, at in zip(weights, starts, strict=False)]
    source = Input(
        h.put(x), 0, x.shape[1], params.MS_ROW_SELF if sampled is None else params.MS_ROW_SAMPLED, norm=norm
    )
    which = params.MS_ROWS_TOKENS if sampled is None else params.MS_ROWS_SAMPLED
    launches = gpu_linear.launches(source, segments, h.step(len(x), sampled=sampled), [out], which, max_rows, planes=planes, **options)
    assert len(launches) == 1
    h.run(launches, max(max_rows, len(x)))
    got = h.get(out)
    parts = got[:-1].reshape(planes, max_rows, width)[:, :rows]
    kept = np.ones_like(got, bool)
    inside = kept[:-1].reshape(planes, max_rows, width)[:, :rows]
    for w, at in zip(weights, starts, strict=False):
        inside[:, :, at : at + w.n] = False
    assert (got[kept] == KEPT).all()
    return [parts[:, :, at : at + w.n].sum(0) for w, at in zip(weights, starts, strict=False)]


def check(h, x, weights, max_rows=None, **more):
    for got, w in zip(products(h, x, weights, max_rows, **more), weights, strict=True):
        assert (np.abs(got - x.astype(np.float64) @ w.exact.T) <= bound(x, w)).all()
