"""The text of kernels on float tiles, from what metal/linear_matmul.metal has."""
from __future__ import annotations

from typing import Any

from metalstep.kernels import params
from metalstep.kernels.gpu.linear_text import Kernel, Path, boolean
from metalstep.kernels.gpu.linear_tuning import SIMD_WIDTH, Tiles


class TilesKernel(Kernel):
    """Simdgroups that each have some strips of 8 rows of the weights and all rows of x of their threadgroup."""

    family = "linear_matmul"

    def __init__(self, shape: Tiles, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.shape = shape
        self.tile_rows = shape.rows
        self.threads = SIMD_WIDTH * shape.columns * shape.splits

    def part_rows(self, path: Path) -> int:
        return max(1, self.shape.strips // len(path.formats))

    def tile_columns(self, path: Path) -> int:
        return self.shape.columns * self.part_rows(path) * 8

    def shared_bytes(self) -> int:
        return 4 * (self._shared_floats() + (self.shape.rows if self.x.norm else 0))

    def _shared_floats(self) -> int:
        """float32 elements that all paths share, by turns."""
        shape = self.shape
        staged = shape.rows * (32 * shape.splits + 4)
        return max(staged, *(shape.splits * len(p.formats) * self.tile_columns(p) * (shape.rows + 1) for p in self.paths))

    def _body(self) -> list[str]:
        return [
            f"  threadgroup float shared[{self._shared_floats()}];",
            *([f"  threadgroup float scales[{self.tile_rows}];"] if self.x.norm else []),
            *self._rows(),
            *self._input(),
            *self._by_path(),
        ]

    def _input(self) -> list[str]:
        sampled = self.x.rows == params.MS_ROW_SAMPLED
        norm = self._norm_weight()
        lines = [
            f"  ms_matmul_x<{self._x_type()}> x;",
            f"  x.x = {self._x()} + p->x_offset;",
            *([f"  x.sampled = {self._sampled()};"] if sampled else []),
            *([f"  x.norm = {norm};"] if norm else []),
            "  x.stride = p->x_row_stride;",
            "  x.first = row0;",
            "  x.last = rows - 1;",
        ]
        if self.x.norm is not None:
            arguments = f"{self.tile_rows}, {self.threads // SIMD_WIDTH}, {self.x_align}, {boolean(sampled)}"
            lines.append(f"  ms_row_scales<{arguments}>(scales, x, p->k, p->eps, sg, lane);")
        return lines

    def _path(self, path: Path, first: int) -> list[str]:
        shape, strips, columns = self.shape, self.part_rows(path), self.tile_columns(path)
        tiles, ld = shape.rows // 8, shape.rows + 1
        sampled, has_weight = self.x.rows == params.MS_ROW_SAMPLED, self.x.norm is not None and self.x.norm.weight is not None
        lines = [*self._accesses(path), f"    const uint column0 = tile * {columns};"]
        shares: list[str] = []
        places: dict[int, int] = {}
        for number, (fmt, parts) in enumerate(path.groups()):
            begin = len(places)
            places |= {part: begin + i for i, part in enumerate(parts)}
            arguments = (
                f"{fmt.values}, {shape.splits}, {self.threads}, {self.x_align}, {boolean(sampled)}, {boolean(has_weight)},"
                f" {len(parts)}, {strips}, {tiles}"
            )
            lines += [
                f"    ms_sums<{len(parts) * strips}, {tiles}> sums{number};",
                f"    ms_clear(sums{number});",
                "    {",
                *self._weights(path, first, fmt, parts),
                f"      ms_matmul<{arguments}>(",
                f"          sums{number}, shared, x, w, column0 + sg % {shape.columns} * {strips * 8}, n, p->k,"
                f" sg / {shape.columns}, tid, lane);",
                "    }",
            ]
            at = f"(sg / {shape.columns} * {len(path.formats)} + {begin}) * {columns * ld} + sg % {shape.columns} * {strips * 8 * ld}"
            shares.append(f"    ms_share<{len(parts)}, {strips}, {tiles}>(shared + {at}, {columns * ld}, sums{number}, lane);")
        barrier = "    threadgroup_barrier(mem_flags::mem_threadgroup);"
        lines += [
            barrier,
            *shares,
            barrier,
            f"    for (uint i = tid; i < {shape.rows * columns}; i += {self.threads}) {{",
            f"      const uint column = column0 + i % {columns};",
            f"      const uint row = row0 + i / {columns};",
            "      if (column >= n || row >= rows) continue;",
            f"      const threadgroup float* from = shared + i % {columns} * {ld} + i / {columns};",
        ]
        scale = f" * scales[i / {columns}]" if self.x.norm is not None else ""
        for part in range(len(path.formats)):
            stride = len(path.formats) * columns * ld
            lines.append(f"      float r{part} = ms_collect<{shape.splits}>(from + {places[part] * columns * ld}, {stride}){scale};")
        for access in path.epilogue.early:
            lines.append(f"      float {self._statement(path, first, access)}")
        return [*lines, *(f"      {self._statement(path, first, step)}" for step in path.epilogue.steps), "    }"]
