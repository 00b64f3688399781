"""Random row programs that compute about the same on every device: numbers stay moderate, steps stay where they are."""
from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from metalstep.kernels import embedding, kv_write, layer_norm, params, rms_norm, rope
from metalstep.kernels.kv_codec import KVCodec
from metalstep.kernels.program import Program, Register

SIZES = [1, 2, 6, 32, 33, 63, 64, 96, 97, 128, 192, 600]
NUMPY = {params.MS_FLOAT32: np.float32, params.MS_FLOAT16: np.float16, params.MS_BFLOAT16: np.uint16, params.MS_INT32: np.int32}
CHOICES = [params.MS_OP_NEG, params.MS_OP_ABS, params.MS_OP_COPY]  # exact, of one operand
PAIRS = [params.MS_OP_MAX, params.MS_OP_MIN]  # exact, of two
JUMPS = [params.MS_OP_SIGN, params.MS_OP_FLOOR, params.MS_OP_CEIL, params.MS_OP_ROUND, params.MS_OP_TRUNC, params.MS_OP_NOT]
TESTS = [
    params.MS_OP_GT, params.MS_OP_GE, params.MS_OP_LT, params.MS_OP_LE, params.MS_OP_EQ, params.MS_OP_NE, params.MS_OP_AND, params.MS_OP_OR,
]  # fmt: skip
SMOOTH = [params.MS_OP_TANH, params.MS_OP_SIGMOID, params.MS_OP_ERF, params.MS_OP_SIN, params.MS_OP_COS]
ARITHMETIC = [params.MS_OP_ADD, params.MS_OP_SUB, params.MS_OP_MUL]


@dataclass(frozen=True)
class Held:
    """A register, the most that an element of it can be, and whether every device has the same bits in it."""

    register: Register
    most: float
    exact: bool


@dataclass
class Slot:
    """A buffer: what it holds before (dtype as ms_dtype), whether the program writes it, is a plane of keys or an embedding's table."""

    array: np.ndarray
    dtype: int
    written: bool = False
    keys: bool = False
    table: bool = False


@dataclass
class RandomProgram:
    """A program of `steps` steps for `rows` rows, and its buffers."""

    seed: int
    rows: int = 3
    steps: int = 12
    sizes: list[int] = field(default_factory=lambda: SIZES)

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)
        self.program = Program()
        self.slots: list[Slot] = []
        self._held: list[Held] = []
        self._shape = int(self.rng.choice(self.sizes)), int(self.rng.choice(self.sizes))
        for _ in range(2):
            self._load()
        actions = [
            self._load, self._choice, self._jump, self._smooth, self._arithmetic, self._arithmetic, self._select, self._gather,
            self._scatter, self._concatenate, self._norm, self._softmax, self._reduce, self._rope, self._embedding, self._store,
            self._kv_write, self._update, self._in_place,
        ]  # fmt: skip
        for _ in range(self.steps):
            actions[self.rng.integers(len(actions))]()
        for held in self._held[-3:]:
            self._write(held)

    # ---- buffers ----------------------------------------------------------------------------------------------------------
    def _slot(self, array: np.ndarray, dtype: int = params.MS_FLOAT32, **more: object) -> int:
        self.slots.append(Slot(array, dtype, **more))  # type: ignore[arg-type]
        return params.MS_SLOT_FIRST + len(self.slots) - 1

    @property
    def _full(self) -> bool:
        return len(self.slots) >= 18  # of the 31 bindings of a kernel, less the step's

    def _size(self) -> int:
        return int(self.rng.choice(self._shape))

    def _load(self) -> None:
        if self._full:
            return
        size, gap, offset = self._size(), int(self.rng.integers(3)), int(self.rng.integers(3))
        dtype, each = int(self.rng.choice([0, 0, 0, 1, 2, 3])), bool(self.rng.integers(3))
        values = self.rng.uniform(-3, 3, offset + self.rows * (size + gap)).astype(np.float32)
        stored = values.view(np.uint32) >> 16 if dtype == params.MS_BFLOAT16 else values
        slot = self._slot(stored.astype(NUMPY[dtype]), dtype)
        rows = params.MS_ROW_SELF if each else params.MS_ROW_SAME
        self._hold(self.program.load(slot, size, rows=rows, offset=offset, row_stride=size + gap, dtype=dtype), 3, True)

    def _write(self, held: Held) -> None:
        if self._full:
            return
        dtypes = [params.MS_FLOAT32, params.MS_FLOAT32, params.MS_FLOAT16, params.MS_BFLOAT16]
        dtype = int(self.rng.choice([*dtypes, params.MS_INT32] if held.exact else dtypes))
        size, gap = held.register.size, int(self.rng.integers(3))
        poison = np.full((self.rows + 1) * (size + gap), 0x7FC1 if dtype == params.MS_BFLOAT16 else 77).astype(NUMPY[dtype])
        slot = self._slot(poison, dtype, written=True)
        self.program.store(held.register, slot, row_stride=size + gap, dtype=dtype)

    def _store(self) -> None:
        self._write(self._any())

    # ---- registers ----------------------------------------------------------------------------------------------------------
    def _hold(self, register: Register | None, most: float, exact: bool) -> None:
        assert register is not None
        if most > 30:  # back to moderate numbers
            calm = self.program.register(register.size)
            self.program.emit(params.MS_OP_TANH, calm, register, n=register.size)
            register, most, exact = calm, 1, False
        self._held.append(Held(register, most, exact))

    def _any(self, exact: bool = False, size: int | None = None) -> Held:
        """One of the registers, now and then a part of one."""
        fit = [h for h in self._held if (h.exact or not exact) and size in (None, h.register.size)]
        held = fit[int(self.rng.integers(max(0, len(fit) - 6), len(fit)))]
        if size is None and held.register.size > 3 and self.rng.random() < 0.2:
            start = int(self.rng.integers(held.register.size - 1))
            return Held(held.register.part(start, int(self.rng.integers(1, held.register.size - start + 1))), held.most, held.exact)
        return held

    def _mate(self, held: Held, exact: bool = False) -> Held | float:
        """Another register of the size, or a scalar."""
        if self.rng.random() < 0.3:
            return float(np.float32(self.rng.uniform(-2, 2)))
        same = [h for h in self._held if h.register.size == held.register.size and (h.exact or not exact)]
        return same[int(self.rng.integers(len(same)))] if same else 0.5

    def _emit(self, op: int, *operands: Held | float, most: float, exact: bool) -> None:
        registers = [o.register if isinstance(o, Held) else o for o in operands]
        size = next(r.size for r in registers if isinstance(r, Register))
        self._hold(self.program.emit(op, self.program.register(size), *registers, n=size), most, exact)

    def _choice(self) -> None:
        a = self._any()
        if self.rng.random() < 0.5:
            self._emit(int(self.rng.choice(CHOICES)), a, most=a.most, exact=a.exact)
        else:
            b = self._mate(a)
            most, exact = (b.most, b.exact) if isinstance(b, Held) else (2.0, True)
            self._emit(int(self.rng.choice(PAIRS)), a, b, most=max(a.most, most), exact=a.exact and exact)

    def _jump(self) -> None:
        a = self._any(exact=True)
        if self.rng.random() < 0.5:
            self._emit(int(self.rng.choice(JUMPS)), a, most=a.most + 1, exact=True)
        else:
            self._emit(int(self.rng.choice(TESTS)), a, self._mate(a, exact=True), most=1, exact=True)

    def _smooth(self) -> None:
        self._emit(int(self.rng.choice(SMOOTH)), self._any(), most=1, exact=False)

    def _arithmetic(self) -> None:
        a = self._any()
        b = self._mate(a)
        most = b.most if isinstance(b, Held) else 2.0
        op = int(self.rng.choice(ARITHMETIC))
        self._emit(op, a, b, most=a.most * most if op == params.MS_OP_MUL else a.most + most, exact=False)

    def _select(self) -> None:
        condition = self._any(exact=True)
        a, b = (self._mate(condition) for _ in range(2))
        mates = [m for m in (a, b) if isinstance(m, Held)]
        most, exact = max((m.most for m in mates), default=2.0), all(m.exact for m in mates)
        self._emit(params.MS_OP_SELECT, condition, a, b, most=max(most, 2.0), exact=exact)

    def _in_place(self) -> None:
        """x = x * s + y, twice, where x was."""
        a = self._any()
        if a.exact and a not in self._held:
            return
        copy = self.program.register(a.register.size)
        self.program.emit(params.MS_OP_COPY, copy, a.register, n=copy.size)
        for _ in range(2):
            self.program.emit(params.MS_OP_MUL, copy, copy, 0.5, n=copy.size)
            self.program.emit(params.MS_OP_ADD, copy, copy, a.register, n=copy.size)
        self._hold(copy, a.most * 2, False)

    def _update(self) -> None:
        """A buffer that is read, and changed where it was read, while the old numbers are still used."""
        if self._full:
            return
        size = self._size()
        slot = self._slot(self.rng.uniform(-3, 3, (self.rows, size)).astype(np.float32), written=True)
        old = self.program.load(slot, size, rows=params.MS_ROW_SELF, row_stride=size)
        turned = self.program.register(size)
        self.program.strided(params.MS_OP_GATHER, turned, old, size - 1, [size], [-1], params.MS_ASSIGN)
        self.program.store(turned, slot, row_stride=size)
        self._hold(old, 3, True)
        if self.rng.random() < 0.5:
            self._hold(self.program.load(slot, size, rows=params.MS_ROW_SELF, row_stride=size), 3, True)

    # ---- across elements ------------------------------------------------------------------------------------------------------
    def _axes(self, count: int) -> list[int]:
        """Lengths whose product is `count`."""
        dims = []
        for factor in (2, 3, 5, 7):
            while count % factor == 0 and len(dims) < 3 and self.rng.random() < 0.7:
                dims.append(factor)
                count //= factor
        return [*dims, count]

    def _gather(self) -> None:
        a = self._any()
        size = a.register.size
        dims = self._axes(size)
        strides = [int(np.prod(dims[i + 1 :])) for i in range(len(dims))]
        order = self.rng.permutation(len(dims))
        out = self.program.register(size)
        signs = self.rng.choice([1, 1, -1, 0], len(dims))
        steps = [int(strides[i] * signs[i]) for i in order]
        offset = -sum(min(0, (dims[i] - 1) * s) for i, s in zip(order, steps, strict=True))
        self.program.strided(params.MS_OP_GATHER, out, a.register, offset, [dims[i] for i in order], steps, params.MS_ASSIGN)
        self._hold(out, a.most, a.exact)

    def _scatter(self) -> None:
        a = self._any()
        size = a.register.size
        spread, into = int(self.rng.choice([0, 1, 1, 2])), 0
        into = max(1, spread * size)
        base = self.program.register(into)
        self.program.emit(params.MS_OP_COPY, base, 0.25, n=into)
        combine = int(self.rng.choice([params.MS_ASSIGN, params.MS_SUM, params.MS_MAX, params.MS_MIN]))
        self.program.strided(params.MS_OP_SCATTER, base, a.register, 0, [size], [spread], combine)
        self._hold(base, a.most * (size if spread == 0 and combine == params.MS_SUM else 1) + 1, a.exact and combine != params.MS_SUM)

    def _concatenate(self) -> None:
        """Along the last of two axes, where the heads are as many."""
        parts = [self._any(), self._any()]
        heads = int(np.gcd(*(p.register.size for p in parts)))
        widths = [p.register.size // heads for p in parts]
        out, at = self.program.register(heads * sum(widths)), 0
        for part, width in zip(parts, widths, strict=True):
            self.program.strided(params.MS_OP_SCATTER, out, part.register, at, [heads, width], [sum(widths), 1], params.MS_ASSIGN)
            at += width
        self._hold(out, max(p.most for p in parts), all(p.exact for p in parts))

    def _spans(self, size: int) -> int:
        """A width that divides size."""
        widths = [w for w in range(1, size + 1) if size % w == 0]
        return int(self.rng.choice(widths[-4:]))

    def _norm(self) -> None:
        a = self._any()
        width = self._spans(a.register.size)
        weights = [self._any(size=h.register.size).register for h in self._held if h.register.size == width][:2]
        weight = weights[0] if weights and self.rng.random() < 0.7 else None
        if self.rng.random() < 0.5:
            out = rms_norm.emit(self.program, a.register, weight, 0.1, width)
        else:
            out = layer_norm.emit(self.program, a.register, weight, weights[-1] if weights else None, 0.1, width)
        self._hold(out, 1000, False)

    def _softmax(self) -> None:
        a = self._any()
        size = a.register.size
        out = self.program.register(size)
        self._hold(self.program.emit(params.MS_OP_SOFTMAX, out, a.register, n=size, inner=self._spans(size)), 1, False)

    def _reduce(self) -> None:
        a = self._any()
        width = self._spans(a.register.size)
        how = int(self.rng.choice([params.MS_SUM, params.MS_MAX, params.MS_MIN]))
        out = self.program.register(a.register.size // width)
        self.program.emit(params.MS_OP_REDUCE, out, a.register, n=out.size, inner=width, dims=[how, 0, 0, 0])
        self._hold(out, a.most * (width if how == params.MS_SUM else 1), a.exact and how != params.MS_SUM)

    def _rope(self) -> None:
        heads = [h for h in self._held if h.register.size % 2 == 0]
        if not heads:
            return
        x = heads[-1]
        width = int(self.rng.choice([w for w in range(2, x.register.size + 1, 2) if x.register.size % w == 0][-3:]))
        dims = int(self.rng.integers(1, width // 2 + 1)) * 2
        angles = rope.emit_angles(self.program, dims, 10_000.0, 0.5, None)
        self._hold(rope.emit(self.program, x.register, angles, width, bool(self.rng.integers(2))), x.most * 2, False)

    def _embedding(self) -> None:
        if len(self.slots) > 16:
            return
        size = self._size()
        own = self._slot(self.rng.uniform(-1, 1, (4, size)).astype(np.float32))
        table = self._slot(self.rng.uniform(-1, 1, (9, size)).astype(np.float32), table=True)
        self._hold(embedding.emit(self.program, table, size, 9, 32, 0, params.MS_FLOAT32, own), 1, True)

    def _kv_write(self) -> None:
        if len(self.slots) > 16:
            return
        keys, values = self._any(), self._any()
        heads, block_size = int(np.gcd(keys.register.size, values.register.size)), int(self.rng.choice([1, 4]))
        codec = KVCodec(str(self.rng.choice(["float32", "float16"])))
        dtype = codec.code
        planes = []
        for register, is_key in ((keys.register, True), (values.register, False)):
            width = register.size // heads
            plane = np.full((5, heads, block_size, width), 7, NUMPY[dtype])
            planes.append(self._slot(plane, dtype, written=True, keys=is_key))
        kv_write.emit(self.program, keys.register, values.register, *planes, heads, block_size, codec, codec)
