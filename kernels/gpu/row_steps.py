"""The text of a row program's steps: what each op does with one element."""
from __future__ import annotations

import math
from typing import Any

from metalstep.kernels import params, turboquant
from metalstep.kernels.gpu.expressions import expression, literal
from metalstep.kernels.gpu.row_homes import Homes
from metalstep.kernels.gpu.row_nests import Pass, scatter_places
from metalstep.kernels.gpu.row_text import TYPES, RowText
from metalstep.kernels.gpu.row_values import ELEMENTWISE, Op, Read, embedding_slots
from metalstep.kernels.linear import FLOATS

TOTALS = {params.MS_SUM: "ms_sum", params.MS_PROD: "ms_product", params.MS_MAX: "ms_largest", params.MS_MIN: "ms_smallest"}
NAN = literal(math.nan)


class RowSteps(RowText):
    """Writes steps, for the nest at hand."""

    def __init__(self, homes: Homes, vector: int, aligned: frozenset[int], saturates: bool):
        """vector: elements of each simdgroup's memory for vectors that are encoded. aligned: see RowText. saturates: a STORE of float16
        does, as far as numbers are finite."""
        super().__init__(homes, aligned)
        self._vector = vector
        self._saturates = saturates
        self._scales: list[int] = []  # words before the scales of the planes that are encoded into

    @staticmethod
    def _operation(op: Op, stage: int) -> str:
        if op.kind == "reduce":
            return TOTALS[op.instr.dims[0]]
        return "ms_most" if op.kind == "softmax" and stage == 0 else "ms_sum"

    @staticmethod
    def _accumulator(op: Op, stage: int) -> str:
        names = {"reduce": ("total",), "rms_norm": ("squares",), "layer_norm": ("sum", "squares"), "softmax": ("most", "sum")}
        return f"{names[op.kind][stage]}{op.number}"

    # ---- steps: one element each --------------------------------------------------------------------------------------
    def _steps(self, each: Pass) -> None:
        for op, stage in each.steps:
            self._line(f"// {op.number}: {op.kind}")
            handler = getattr(self, f"_{op.kind}", None) if op.instr.op not in ELEMENTWISE or op.kind == "join" else None
            if handler is None:
                self._produce(op.result, expression(op.instr.op, [self._element(r) for r in op.operands if r is not None]))
            else:
                handler(op, stage)

    def _load(self, op: Op, stage: int) -> None:
        instr = op.instr
        self._produce(op.result, self._loaded(instr, "i"))
        self._touch(instr.slot, instr.offset, instr.offset + instr.n, False, (self._nest.domain, *self._address(instr)))

    def _store(self, op: Op, stage: int) -> None:
        instr = op.instr
        value = self._element(op.operands[0])
        saturates = self._saturates and instr.dtype == params.MS_FLOAT16
        value = f"ms_to_half({value})" if saturates else self._converted(value, instr.dtype)
        pointer = self._pointer(instr, True)
        if self._is_wide_access(instr, 0):
            kind, name = f"{TYPES[instr.dtype]}{self._run}", f"s{op.number}"
            self._wide_stores += [f"{kind} {name};", f"*(device {kind}*)({pointer} + start) = {name};"]
            self._line(f"{name}[e] = {value};")
        else:
            self._line(f"{pointer}[i] = {value};")
        self._touch(instr.slot, instr.offset, instr.offset + instr.n, True, (self._nest.domain, *self._address(instr)))

    @staticmethod
    def _converted(value: str, dtype: int) -> str:
        if dtype == params.MS_FLOAT32:
            return value
        return f"{'ms_to_int' if dtype == params.MS_INT32 else TYPES[dtype]}({value})"

    def _gather(self, op: Op, stage: int) -> None:
        instr, read = op.instr, op.operands[0]
        least = instr.offset + sum(min((d - 1) * s, 0) for d, s in zip(instr.dims, instr.strides, strict=True))
        self._produce(op.result, self._at(read, self._strided(instr, instr.offset - least)))

    def _scatter(self, op: Op, stage: int) -> None:
        instr, value = op.instr, op.result
        assert value is not None
        place = self._new("place")
        x = self._element(op.operands[0])
        self._line(f"const uint {place} = {self._strided(instr, instr.offset + op.shift)};")
        target = self._memory(value, place, 0, value.size, write=True, places=scatter_places(op))
        combined = {
            params.MS_ASSIGN: "{1}",
            params.MS_SUM: "{0} + {1}",
            params.MS_PROD: "{0} * {1}",
            params.MS_MAX: "ms_max({0}, {1})",
            params.MS_MIN: "ms_min({0}, {1})",
        }[instr.inner]
        self._line(f"{target} = {combined.format(target, x)};")

    @staticmethod
    def _strided(instr: Any, offset: int) -> str:
        """The element that index i of a strided copy names."""
        terms, below = [], 1
        axes = list(zip(instr.dims, instr.strides, strict=True))
        for at, (length, stride) in reversed(list(enumerate(axes))):
            outer = math.prod(n for n, _ in axes[:at])
            if length > 1 and stride:
                index = f"i / {below}" if below > 1 else "i"
                if outer > 1:
                    index = f"({index}) % {length}" if below > 1 else f"i % {length}"
                terms.append(f"int({index}) * {stride}" if stride != 1 else f"int({index})")
            below *= length
        text = " + ".join([*([str(offset)] if offset or not terms else []), *reversed(terms)])
        return f"uint({text})"

    def _join(self, op: Op, stage: int) -> None:
        name = self._new("piece")
        self._line(f"float {name} = {NAN};")
        for start, size, read in op.pieces:
            if read is not None:
                inside = f"i < {start + size}" if start == 0 else f"i >= {start} && i < {start + size}"
                self._line(f"if ({inside}) {name} = {self._at(read, f'i - {start}' if start else 'i')};")
        self._produce(op.result, name)

    def _embedding(self, op: Op, stage: int) -> None:
        instr = op.instr
        bits, group, dtype, vocab = instr.dims
        self._slot(params.MS_SLOT_TOKENS, "int", False)
        token = self._once("token", "const int token = tokens[row];")
        own = self._base(instr.slot2, "float", f"ulong(-(long({token}) + 1)) * {instr.n}", f"own{op.number}")
        at = f"ulong(max({token}, 0))"
        if bits >= 16:
            table = self._base(instr.slot, TYPES[dtype], f"{at} * {instr.n}", f"table{op.number}")
            value = f"float({table}[i])"
        elif (bits, group, dtype) in FLOATS.values():
            table = self._base(instr.slot, "uint", f"{at} * {instr.n * bits // 32}", f"table{op.number}")
            scales = self._base(instr.strides[0], "uchar", f"{at} * {instr.n // group}", f"scales{op.number}")
            value = f"ms_floats_element<{bits}, {group}>({table}, {scales}, i)"
        else:
            kind, groups = TYPES[dtype], instr.n // group
            table = self._base(instr.slot, "uint", f"{at} * {instr.n * bits // 32}", f"table{op.number}")
            scales = self._base(instr.strides[0], kind, f"{at} * {groups}", f"scales{op.number}")
            biases = self._base(instr.strides[1], kind, f"{at} * {groups}", f"biases{op.number}")
            value = f"ms_affine_element<{bits}, {group}>({table}, {scales}, {biases}, i)"
        for slot in embedding_slots(instr):
            self._touch(slot, 0, 1, False, None)
        name = self._new("embedded")
        # What is no token. A NaN of bits that the compiler does not know: fast maths takes others for something else.
        self._line(f"float {name} = as_type<float>(0x7fc00000u | (uint({token}) & 1));")
        self._line(f"if ({token} < 0) {name} = {own}[i];")
        self._line(f"else if ({token} < {vocab}) {name} = {value};")
        self._produce(op.result, name)

    def _rope_angles(self, op: Op, stage: int) -> None:
        instr = op.instr
        n = instr.n
        self._slot(params.MS_SLOT_POSITIONS, "int", False)
        angle = self._new("angle")
        pair = f"i % {n}" if n > 1 else "0"
        scaled = f"float(positions[row]) * {literal(instr.imm1)}"
        if op.operands[1] is not None:
            self._line(f"const float {angle} = {scaled} * (1.0f / {self._at(op.operands[1], pair)});")
        else:
            # An angle of 100,000 positions has its frequency's error 100,000-fold: frequencies are of float64.
            step = math.log(instr.imm0) / n
            table = f"frequencies_{op.number}_@"
            numbers = ", ".join(literal(math.exp(-i * step)) for i in range(n))
            self._tables.append(f"constant float {table}[{n}] = {{{numbers}}};")
            self._line(f"const float {angle} = {scaled} * {table}[{pair}];")
        self._produce(op.result, f"i < {n} ? precise::cos({angle}) : precise::sin({angle})")

    def _rope(self, op: Op, stage: int) -> None:
        instr, d = op.instr, self._nest.domain
        half, head, (x, angles) = instr.dims[0], instr.inner, op.operands[:2]
        assert d is not None and x is not None and angles is not None
        place, pair, second = self._new("place"), self._new("pair"), self._new("second")
        result = self._new("turned")
        whole = instr.n == head
        self._line(f"const uint {place} = {'j' if d.width == head and d.spans > 1 else 'i' if whole else f'i % {head}'};")
        self._line(f"float {result} = {self._at(x, 'i')};")
        if 2 * half < head:
            self._line(f"if ({place} < {2 * half}) {{")
            self._depth += 1
        if instr.dims[1]:  # neighbours
            self._line(f"const uint {pair} = {place} / 2;")
            self._line(f"const bool {second} = {place} % 2 == 1;")
            other = self._at(x, f"({second} ? i - 1 : i + 1)")
        else:
            self._line(f"const bool {second} = {place} >= {half};")
            self._line(f"const uint {pair} = {second} ? {place} - {half} : {place};")
            other = self._at(x, f"({second} ? i - {half} : i + {half})")
        cos, sin = self._at(angles, pair), self._at(angles, f"{half} + {pair}")
        turned = self._new("sine")
        self._line(f"const float {turned} = {other} * {sin};")
        self._line(f"{result} = fma({result}, {cos}, {second} ? {turned} : -{turned});")
        if 2 * half < head:
            self._depth -= 1
            self._line("}")
        self._produce(op.result, result)

    def _rms_norm(self, op: Op, stage: int) -> None:
        x = self._element(op.operands[0])
        if stage == 0:
            self._line(f"squares{op.number} = fma({x}, {x}, squares{op.number});")
        else:
            self._produce(op.result, f"{x} * scale{op.number}" + self._weight(op.operands[1], " * "))

    def _layer_norm(self, op: Op, stage: int) -> None:
        x = self._element(op.operands[0])
        if stage == 0:
            self._line(f"sum{op.number} += {x};")
            return
        centred = self._new("centred")
        self._line(f"const float {centred} = {x} - mean{op.number};")
        if stage == 1:
            self._line(f"squares{op.number} = fma({centred}, {centred}, squares{op.number});")
        else:
            normed = f"{centred} * scale{op.number}" + self._weight(op.operands[1], " * ")
            self._produce(op.result, normed + self._weight(op.operands[2], " + "))

    def _weight(self, read: Read | None, sign: str) -> str:
        d = self._nest.domain
        assert d is not None
        return "" if read is None else sign + (self._at(read, "j") if d.spans > 1 else self._element(read))

    def _softmax(self, op: Op, stage: int) -> None:
        if stage == 0:
            self._line(f"most{op.number} = ms_most::combine(most{op.number}, {self._element(op.operands[0])});")
        elif stage == 1:
            self._produce(op.temporary, f"precise::exp({self._element(op.operands[0])} - most{op.number})")
            assert op.temporary is not None
            self._line(f"sum{op.number} += v{op.temporary.number};")
        else:
            assert op.temporary is not None
            self._produce(op.result, f"{self._element(Read(op.temporary))} * scale{op.number}")

    def _reduce(self, op: Op, stage: int) -> None:
        name, operation = f"total{op.number}", self._operation(op, stage)
        self._line(f"{name} = {operation}::combine({name}, {operation}::of({self._element(op.operands[0])}));")

    def _write_keys(self, op: Op, stage: int) -> None:
        self._write_cache(op, op.instr.slot, op.instr.dims[1], op.instr.dtype)

    def _write_values(self, op: Op, stage: int) -> None:
        self._write_cache(op, op.instr.slot2, op.instr.dims[2], op.instr.inner)

    def _write_cache(self, op: Op, slot: int, width: int, dtype: int) -> None:
        """A plane of floats is [block, kv_head, block_size, width]."""
        instr, d = op.instr, self._nest.domain
        heads, block_size = instr.dims[0], instr.dims[3]
        assert d is not None
        place, block, in_block = self._cache_place(block_size)
        row = f"(ulong({block}) * {heads * block_size} + {in_block}) * {width}"
        plane = self._base(slot, TYPES[dtype], row, f"plane{slot}_{op.number}", written=True)
        if heads == 1:
            at = "i"
        elif d.width == width and d.spans > 1:
            at = f"span * {block_size * width} + j"
        else:
            at = f"i / {width} * {block_size * width} + i % {width}"
        value = self._converted(self._element(op.operands[0]), dtype)
        self._line(f"if ({place} >= 0) {plane}[{at}] = {value};")
        self._touch(slot, 0, 1, True, None)

    def _cache_place(self, block_size: int) -> tuple[str, str, str]:
        """This row's place in the cache, its block and its place in that."""
        self._slot(params.MS_SLOT_SLOT_MAPPING, "int", False)
        place = self._once("cache_place", "const int cache_place = slot_mapping[row];  // block * block_size + place in it")
        return place, f"uint({place}) / {block_size}", f"uint({place}) % {block_size}" if block_size > 1 else "0"

    def _encode_keys(self, op: Op, stage: int) -> None:
        d = self._nest.domain
        assert d is not None
        self._line(f"vectors[sg * {self._vector} + {'j' if d.spans > 1 else 'i'}] = {self._element(op.operands[0])};")

    _encode_values = _encode_keys

    def _encode(self, op: Op) -> None:
        """Encodes the span, a head's vector, that `_encode_keys` or `_encode_values` left in the simdgroup's memory."""
        instr = op.instr
        heads, block_size = instr.dims[0], instr.dims[3]
        if op.kind == "encode_keys":
            slot, codec, scale, scales, seed = instr.slot, instr.dtype, instr.imm & 3, instr.offset, turboquant.K_SEED
        else:
            slot, codec, scale, scales, seed = instr.slot2, instr.inner, instr.imm >> 2, instr.row_stride, turboquant.V_SEED
        place, block, in_block = self._cache_place(block_size)
        head = f"ulong({block})" + (f" * {heads} + span" if heads > 1 else "")
        at = len(self._scales)
        self._scales.append(scales)
        self._line(f"if ({place} >= 0)")
        self._line(
            f"  ms_encode<{codec}, {scale}, {op.width}, false>(vectors + sg * {self._vector}, {seed}, {self._slot(slot, 'uint', True)}, "
            f"cache_scales[{at}], {head}, {block_size}, {in_block}, lane);"
        )
        self._touch(slot, 0, 1, True, None)
