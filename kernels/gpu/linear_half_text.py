"""The text of kernels on tiles in half precision, from what metal/linear_half.metal has."""
from __future__ import annotations

from dataclasses import replace
from typing import Any

from metalstep.kernels import params
from metalstep.kernels.gpu.linear_text import Format, Kernel, Path, boolean
from metalstep.kernels.gpu.linear_tuning import SIMD_WIDTH, THREADGROUP_BYTES, HalfTiles

UNIT = 8  # elements of x, 16 bytes as half
PREFETCHED = 2  # results of a thread at most whose residuals and the like are read before the product


class HalfKernel(Kernel):
    """Simdgroups that each have some strips of 8 rows of the weights and all rows of x of their threadgroup, whose tiles are half.

    x comes straight from device memory where it is half, aligned and not normed, else through threadgroup memory: all of it, or by
    steps where that would not fit (or the shape says so).
    """

    family = "linear_half"

    def __init__(self, shape: HalfTiles, k: int, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.k = k
        self.sampled = self.x.rows == params.MS_ROW_SAMPLED
        self.direct = self._x_type() == "half" and self.x.norm is None and self.x_align == UNIT and k % UNIT == 0 and not shape.staged
        self.staged = shape.staged
        self.shape = shape
        if not self.direct and not shape.staged and self.shared_bytes() > THREADGROUP_BYTES:
            self.staged = True
        # Rows may become fewer: their sums' order stays.
        while self.shape.rows > 8 * shape.bands and self.shared_bytes() > THREADGROUP_BYTES:
            self.shape = replace(self.shape, rows=self.shape.rows // (16 * shape.bands) * 8 * shape.bands)
        self.tile_rows = self.shape.rows
        self.threads = SIMD_WIDTH * shape.simdgroups

    def part_rows(self, path: Path) -> int:
        return max(1, self.shape.strips // len(path.formats))

    def tile_columns(self, path: Path) -> int:
        return self.shape.columns * self.part_rows(path) * 8

    def shared_bytes(self) -> int:
        x = max((self._row_units(fmt) * 2 * UNIT * self._held_rows() for path in self.paths for fmt, _ in path.groups()), default=0)
        sums = max(4 * self._kept(path) * self._stride(path) for path in self.paths) if self.shape.splits > 1 else 16
        return max(0 if self.direct else x, sums) + (4 * self.shape.rows if self.staged and self.x.norm else 0)

    def _held_rows(self) -> int:
        """Rows of x in threadgroup memory."""
        return self.shape.rows if self.staged else min(self.shape.rows, self.max_rows)

    def _row_units(self, fmt: Format) -> int:
        """Units from one row of x in threadgroup memory to the next: pairs of rows begin 16 banks apart."""
        block = 4 * fmt.values
        count = self.shape.splits * block if self.staged else -(-self._part(fmt) // block) * block
        return count // UNIT + (4 if count // UNIT % 8 == 0 else 0)

    def _part(self, fmt: Format) -> int:
        """Elements of k of a plane: whole blocks."""
        block = 4 * fmt.values
        return -(-self.k // (self.planes * block)) * block

    def _stride(self, path: Path) -> int:
        """float32 elements of a split's sums in threadgroup memory."""
        return len(path.formats) * self.shape.rows * self.tile_columns(path)

    def _kept(self, path: Path) -> int:
        """Splits whose sums threadgroup memory holds side by side."""
        kept = self.shape.splits
        while kept > 1 and 4 * kept * self._stride(path) > THREADGROUP_BYTES:
            kept //= 2
        return kept

    def _body(self) -> list[str]:
        scales = 4 * self.shape.rows if self.staged and self.x.norm else 0
        return [
            f"  threadgroup uint4 shared[{-(-(self.shared_bytes() - scales) // 16)}];",
            *([f"  threadgroup float scales[{self.shape.rows}];"] if scales else []),
            "  threadgroup float* sums = (threadgroup float*)shared;",
            *self._by_path(),
        ]

    def text(self) -> str:
        """As of all kernels; only now is known what must be waited for."""
        return super().text().replace("    WAIT\n", "".join(line + "\n" for line in self.bindings.wait()))

    def _count(self) -> list[str]:
        """Declares `rows`. Whatever writes the step's counts is two launches in front: embeddings lie between."""
        step = self.bindings.name(self.step.step, "MSStep", weight=True)
        return [f"    const uint rows = {step}->{'num_sampled' if self.rows == params.MS_ROWS_SAMPLED else 'num_tokens'};"]

    def _input(self) -> list[str]:
        norm = self._norm_weight()
        return [
            f"    ms_half_x<{self._x_type()}> x;",
            f"    x.x = {self._x()} + p->x_offset;",
            *([f"    x.sampled = {self._sampled()};"] if self.sampled else []),
            *([f"    x.norm = {norm};"] if norm else []),
            "    x.stride = p->x_row_stride;",
            "    x.first = row0;",
            "    x.last = rows - 1;",
        ]

    def _path(self, path: Path, first: int) -> list[str]:
        shape, strips, columns = self.shape, self.part_rows(path), self.tile_columns(path)
        tiles = shape.rows // 8 // shape.bands
        lines = [
            *self._accesses(path),
            f"    const uint column0 = tile * {columns};",
            f"    const uint own = sg % {shape.columns} * {strips * 8};",
            f"    const uint band = sg / {shape.columns} % {shape.bands} * {tiles * 8};",
            f"    const uint split = sg / {shape.columns * shape.bands};",
        ]
        shares: list[str] = []
        places: dict[int, int] = {}
        for number, (fmt, parts) in enumerate(path.groups()):
            begin = len(places)
            places |= {part: begin + i for i, part in enumerate(parts)}
            whole = boolean(self.k % (4 * fmt.values) == 0)
            lines += [
                *self._weights(path, first, fmt, parts, f"w{number}"),
                *self._range(number, fmt),
                f"    ms_half_weights<{fmt.text}, {fmt.values}, {len(parts)}, {strips}, {shape.ahead}> ahead{number};",
                f"    ms_begin<{whole}, {shape.splits}>(ahead{number}, w{number}, column0 + own, n, p->k,"
                f" from{number}, end{number}, split, lane);",
            ]
            if number == 0:
                lines += [*self._count(), "    WAIT", "    if (row0 >= rows) return;", *self._input(), *self._early(path, first)]
            lines += [
                f"    ms_sums<{len(parts) * strips}, {tiles}> sums{number};",
                f"    ms_clear(sums{number});",
                *self._product(number, fmt, whole),
            ]
            at = f"sums + {begin * shape.rows * columns}"
            shares.append(
                f"    ms_share<{shape.splits}, {self._kept(path)}, {shape.rows}, {columns}, {len(parts)}, {strips}, {tiles}>("
                f"{at}, {self._stride(path)}, band, own, sums{number}, split, lane);"
            )
        if shape.splits == 1:
            return [*lines, *self._own_epilogue(path, first)]
        return [*lines, *shares, *self._epilogue(path, first, places)]

    def _range(self, number: int, fmt: Format) -> list[str]:
        """Declares the elements of k that the threadgroup's plane is of."""
        if self.planes == 1:
            return [f"    const uint from{number} = 0;", f"    const uint end{number} = p->k;"]
        block = 4 * fmt.values
        return [
            f"    const uint part{number} = (p->k + {self.planes * block - 1}) / {self.planes * block} * {block};",
            f"    const uint from{number} = min(tg.z * part{number}, p->k);",
            f"    const uint end{number} = min(from{number} + part{number}, p->k);",
        ]

    def _product(self, number: int, fmt: Format, whole: str) -> list[str]:
        """Adds the product of group `number` to its sums."""
        shape, tiles = self.shape, self.shape.rows // 8 // self.shape.bands
        weight = self.x.norm is not None and self.x.norm.weight is not None
        norm = f"{boolean(self.x.norm is not None)}, {boolean(weight)}"
        span = f"from{number}, end{number}"
        eights = boolean(self.k % UNIT == 0 and self.x_align > 1)
        barrier = "    threadgroup_barrier(mem_flags::mem_threadgroup);"
        simdgroups = shape.simdgroups
        if self.direct:
            return [
                f"    const ms_half_rows<{tiles}> rows{number} = ms_rows_in_memory<{boolean(self.sampled)}, {tiles}>(x, band, lane);",
                f"    ms_half_matmul<false, {whole}, {shape.splits}>(",
                f"        sums{number}, ahead{number}, (device const vec<uint, 4>*)(x.x + from{number}), rows{number},"
                f" {span}, split, lane);",
            ]
        if self.staged:
            access = f"{self._row_units(fmt)}, {shape.rows}, {self.threads}, {self.x_align}, {eights}, {boolean(self.sampled)}, {norm}"
            scales: list[str] = []
            if self.x.norm and number == 0:
                place = f"{shape.rows}, {simdgroups}, {self.x_align}, {eights}, {boolean(self.sampled)}"
                scales = [f"    ms_row_scales<{place}>(scales, x, p->k, p->eps, sg, lane);", barrier]
            return [
                *scales,
                f"    ms_half_matmul_staged<{whole}, {shape.splits}, {access}>(",
                f"        sums{number}, ahead{number}, shared, {'scales' if self.x.norm else 'sums'}, x, band, {span}, split, tid, lane);",
            ]
        held, ld = self._held_rows(), self._row_units(fmt)
        split = f"ms_is_split<{fmt.text}>::value"
        one = boolean(self.planes == 1 and self.k <= 1024)
        access = f"{held}, {fmt.values // UNIT}, {simdgroups}, {one}, {self.x_align}, {eights}, {boolean(self.sampled)}, {norm}, {split}"
        return [
            *([barrier] if number else []),
            f"    const uint held{number} = min(rows - row0, {held}u);",
            f"    ms_stage_rows<{access}>(shared, {ld}, x, held{number}, p->k, {span}, p->eps, sg, lane);",
            barrier,
            f"    const ms_half_rows<{tiles}> rows{number} = ms_rows_at<{tiles}>({ld}, band, held{number} - 1, lane);",
            f"    ms_half_matmul<true, {whole}, {shape.splits}>(",
            f"        sums{number}, ahead{number}, (const threadgroup uint4*)shared, rows{number}, {span}, split, lane);",
        ]

    def _results(self, path: Path) -> int:
        """Of a thread at most."""
        return -(-self.shape.rows * self.tile_columns(path) // self.threads)

    def _result(self, path: Path, number: int) -> list[str]:
        """Declares which result is the thread's `number`th."""
        columns = self.tile_columns(path)
        return [
            f"const uint i = tid + {number * self.threads};",
            f"const uint column = column0 + i % {columns};",
            f"const uint row = row0 + i / {columns};",
        ]

    def _early(self, path: Path, first: int) -> list[str]:
        """Loads of the epilogue that are on their way while the product is computed."""
        lines: list[str] = []
        if self._results(path) > PREFETCHED or not path.epilogue.early or self.shape.splits == 1:
            return lines
        for number in range(self._results(path)):
            lines += [f"    float {a.register}_{number} = 0.0f;" for a in path.epilogue.early]
            lines += [
                "    {",
                *(f"      {line}" for line in self._result(path, number)),
                "      if (column < n && row < rows) {",
                *(
                    f"        {self._statement(path, first, replace(a, register=f'{a.register}_{number}'))}"
                    for a in path.epilogue.early
                ),
                "      }",
                "    }",
            ]
        return lines

    def _own_epilogue(self, path: Path, first: int) -> list[str]:
        """Of sums that no other simdgroup has a share in, from where they are."""
        strips, tiles = self.part_rows(path), self.shape.rows // 8 // self.shape.bands
        products = [
            f"float r{part} = sums{number}.tile[({place * strips} + i) * {tiles} + j].thread_elements()[e];"
            for number, (_, parts) in enumerate(path.groups())
            for place, part in enumerate(parts)
        ]
        early = [f"float {self._statement(path, first, a)}" for a in path.epilogue.early]
        steps = [self._statement(path, first, step) for step in path.epilogue.steps]
        return [
            "    const ushort2 place = ms_frag_coord(ushort(lane));",
            f"    MS_UNROLL for (int j = 0; j < {tiles}; j++)",
            "      MS_UNROLL for (int e = 0; e < 2; e++)",
            f"        MS_UNROLL for (int i = 0; i < {strips}; i++) {{",
            "          const uint row = row0 + band + j * 8 + place.y + e;",
            "          const uint column = column0 + own + i * 8 + place.x;",
            "          if (column < n && row < rows) {",
            *(f"            {line}" for line in [*products, *early, *steps]),
            "          }",
            "        }",
        ]

    def _epilogue(self, path: Path, first: int, places: dict[int, int]) -> list[str]:
        shape, columns, stride = self.shape, self.tile_columns(path), self._stride(path)
        tile = shape.rows * columns
        results = [
            f"const threadgroup float* from = sums + i / {columns} * {columns} + ms_rotated<{columns}>(i / {columns}, i % {columns});",
            *(f"float r{p} = ms_collect<{self._kept(path)}>(from + {place * tile}, {stride});" for p, place in sorted(places.items())),
        ]
        steps = [self._statement(path, first, step) for step in path.epilogue.steps]
        if path.epilogue.early and self._results(path) <= PREFETCHED:
            lines: list[str] = []
            for number in range(self._results(path)):
                early = [f"float {a.register} = {a.register}_{number};" for a in path.epilogue.early]
                lines += ["    {", *(f"      {line}" for line in self._result(path, number))]
                lines.append(f"      if (i < {tile} && column < n && row < rows) {{")
                lines += [*(f"        {line}" for line in [*results, *early, *steps]), "      }", "    }"]
            return lines
        early = [f"float {self._statement(path, first, a)}" for a in path.epilogue.early]
        return [
            f"    for (uint i = tid; i < min(rows - row0, {shape.rows}u) * {columns}; i += {self.threads}) {{",
            f"      const uint column = column0 + i % {columns};",
            f"      const uint row = row0 + i / {columns};",
            "      if (column >= n) continue;",
            *(f"      {line}" for line in [*results, *early, *steps]),
            "    }",
        ]
