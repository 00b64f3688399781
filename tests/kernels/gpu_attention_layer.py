"""A layer on a GPU whose newest keys and values are not in the cache yet: what attention with all of that inside should come to."""
from __future__ import annotations

import numpy as np
from gpu_attention import Cache, loaded

from metalstep.kernels.gpu.attention import Inside, Rows
from metalstep.kernels.launch import Buffer
from metalstep.kernels.linear import Norm

# The order of sums in norms and softmax, and of the reference's, all float32; queries are normed to elements of about 1.
TOLERANCE = 1e-5
# Of a key in the cache, whose pairs reach 16: four roundings of such elements, and where it lies next to a rounding boundary of the
# cache's dtype it falls to the other side.
KEY_ERROR = 4 * 16 * 2**-24
KEY_ROUNDING = {"float32": 0, "float16": 2**-10, "bfloat16": 2**-7}


class Layer:
    """Sequences whose newest token is not in the cache yet, and the rows of q, k and v that a linear left of them, side by side."""

    def __init__(
        self, h, seed, lengths, group, *, dims=None, traditional=False, q_norm="weight", k_norm="weight", v_offset=4, cache=Cache, **options
    ):
        rng = np.random.default_rng(seed)
        self.h, self.cache = h, cache(h, rng, lengths, **options)
        self.head_dim, self.value_dim = self.cache.dims
        self.heads, self.kv_heads = group * self.cache.heads, self.cache.heads
        self.dims, self.traditional = self.head_dim if dims is None else dims, traditional
        self.rows = [(s, n - 1) for s, n in enumerate(lengths)]
        self.slots = [self.cache.slot(s, p) for s, p in self.rows]
        self.forget()
        count = len(lengths)
        self.q = rng.standard_normal((count, self.heads, self.head_dim)).astype(np.float32)
        self.k = rng.standard_normal((count, self.kv_heads, self.head_dim)).astype(np.float32) * 3
        self.v = np.stack([values[:, -1] for values in self.cache.drawn[1]])
        gap = np.full((count, v_offset), np.nan, np.float32)
        parts = [self.q.reshape(count, -1), self.k.reshape(count, -1), gap, self.v.reshape(count, -1)]
        self.row = np.concatenate(parts, axis=1)
        self.row = np.pad(self.row, ((0, 0), (0, -self.row.shape[1] % 4)), constant_values=np.nan)
        self.k_offset, self.v_offset = parts[0].shape[1], sum(part.shape[1] for part in parts[:3])
        self.weights = rng.uniform(0.5, 1.5, (2, self.head_dim)).astype(np.float32)
        self.norms = (q_norm, k_norm)
        freqs = 10000.0 ** (np.arange(self.dims // 2) / max(self.dims // 2, 1))
        angle = (np.array([[p] for _, p in self.rows], np.float32) / freqs.astype(np.float32)).astype(np.float32)
        self.angles = np.concatenate([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)

    def forget(self):
        """The newest positions hold NaN."""
        for s, p in self.rows:
            for plane in (self.cache.k_plane, self.cache.v_plane):
                self.cache.view(plane)[self.cache.tables[s, p // self.cache.block], :, p % self.cache.block] = self.nan
        self.before = self.planes()

    @property
    def nan(self):
        return 0xFFFF if self.cache.dtype == "bfloat16" else np.nan

    def planes(self):
        return [self.cache.view(plane).copy() for plane in (self.cache.k_plane, self.cache.v_plane)]

    def inside(self, row: Buffer, rows) -> Inside:
        stride = self.row.shape[1]
        eps = (1e-6, 1e-2)
        norms = [
            None if kind is None else Norm(self.h.put(weight) if kind == "weight" else None, e)
            for kind, weight, e in zip(self.norms, self.weights, eps, strict=True)
        ]
        angles = self.h.put(self.angles[rows]) if self.dims else None
        return Inside(Rows(row, self.k_offset, stride), Rows(row, self.v_offset, stride), *norms, angles, self.dims, self.traditional)

    def attend(self, rows=None, slots=None, **options):
        """[rows, heads, value_dim] of the step that has only the sequences `rows`."""
        rows = list(range(len(self.rows))) if rows is None else rows
        row = self.h.put(self.row[rows])
        slots = self.slots if slots is None else slots
        return self.cache.attend(
            row, [self.rows[i] for i in rows], num_q_heads=self.heads, q_row_stride=self.row.shape[1], inside=self.inside(row, rows),
            slots=[slots[i] for i in rows], **options,
        )  # fmt: skip

    def prepared(self, x, which):
        """x [rows, heads, head_dim], queries (0) or keys (1), normed and rotated in float64 by the angles' table."""
        kind, x, half = self.norms[which], x.astype(np.float64), self.dims // 2
        if kind is not None:
            x = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + (1e-6, 1e-2)[which])
        if kind == "weight":
            x = x * self.weights[which]
        cos, sin = self.angles[:, None, :half], self.angles[:, None, half:]
        pairs = (slice(0, self.dims, 2), slice(1, self.dims, 2)) if self.traditional else (slice(half), slice(half, self.dims))
        first, second = pairs
        turned = x.copy()
        turned[..., first] = x[..., first] * cos - x[..., second] * sin
        turned[..., second] = x[..., first] * sin + x[..., second] * cos
        return turned.astype(np.float32)

    def adopt(self):
        """The new keys and values as the planes have them become the cache's own; returns both, [rows, kv_heads, dim]."""
        planes = [loaded(plane, self.cache.dtype) for plane in self.planes()]
        found = []
        for plane, arrays in zip(planes, (self.cache.keys, self.cache.values), strict=True):
            new = [plane[slot // self.cache.block, :, slot % self.cache.block] for slot in self.slots]
            for array, rows in zip(arrays, new, strict=True):
                array[:, -1] = rows
            found.append(np.stack(new))
        return found

    def check(self, allowed=None, **options):
        """A step agrees with the references, and changes the new positions alone. allowed: errors, of (q, rows, options)."""
        got = self.attend(**options)
        keys, values = self.adopt()
        dtype = self.cache.dtype
        np.testing.assert_allclose(keys, self.prepared(self.k, 1), rtol=KEY_ROUNDING[dtype], atol=KEY_ERROR)
        np.testing.assert_array_equal(values, self.v)  # which the cache's dtype has exactly
        self.check_others()
        known = {name: options[name] for name in ("window", "softcap", "sinks", "windows") if name in options}
        self.check_results(got, known, allowed, TOLERANCE)
        return got

    def check_results(self, got, known, allowed, tolerance):
        """Rows of a step are what the reference makes of what the cache has now."""
        q = self.prepared(self.q, 0)
        error = np.abs(got - self.cache.expected(q, self.rows, **known))
        assert (error <= (tolerance if allowed is None else allowed(q, self.rows, **known))).all(), error.max()

    def check_others(self):
        """All but the new positions is as it was, to the bit."""
        for now, before in zip(self.planes(), self.before, strict=True):
            for slot in self.slots:
                now[slot // self.cache.block, :, slot % self.cache.block] = self.nan
            np.testing.assert_array_equal(now.view(np.uint8), before.view(np.uint8))
