"""The text of matvec kernels, from what metal/linear_matvec.metal has."""
from __future__ import annotations

from typing import Any

from metalstep.kernels import params
from metalstep.kernels.gpu.linear_text import Kernel, Path, boolean
from metalstep.kernels.gpu.linear_tuning import SIMD_WIDTH, Matvec

MATVEC_ROWS = 4  # rows of x that a matvec multiplies at a time


class MatvecKernel(Kernel):
    """Simdgroups that each have some rows of the weights and up to MATVEC_ROWS rows of x."""

    family = "linear_matvec"

    def __init__(self, shape: Matvec, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.shape = shape
        self.tile_rows = min(self.max_rows, MATVEC_ROWS)
        self.threads = SIMD_WIDTH * shape.simdgroups

    def part_rows(self, path: Path) -> int:
        return max(1, self.shape.rows // len(path.formats))

    def tile_columns(self, path: Path) -> int:
        return self.shape.simdgroups // self.shape.splits * self.part_rows(path)

    def shared_bytes(self) -> int:
        return 4 * self.shape.simdgroups * self._slot()

    def _slot(self) -> int:
        """float32 elements of a simdgroup's sums: of products, then of squares."""
        return self.tile_rows * (1 + max(len(p.formats) * self.part_rows(p) for p in self.paths))

    def _body(self) -> list[str]:
        return [f"  threadgroup float shared[{self.shared_bytes() // 4}];", *self._rows(), *self._input(), *self._by_path()]

    def _input(self) -> list[str]:
        x = self._x()
        row = f"uint({self._sampled()}[row])" if self.x.rows == params.MS_ROW_SAMPLED else "row"
        norm = self._norm_weight()
        return [
            f"  ms_matvec_x<{self.tile_rows}, {self._x_type()}> x;",
            f"  MS_UNROLL for (int b = 0; b < {self.tile_rows}; b++) {{",
            "    const uint row = min(row0 + uint(b), rows - 1);",
            f"    x.row[b] = {x} + p->x_offset + ulong({row}) * p->x_row_stride;",
            "  }",
            *([f"  x.norm = {norm};"] if norm else []),
        ]

    def _path(self, path: Path, first: int) -> list[str]:
        batch, splits, r, slot = self.tile_rows, self.shape.splits, self.part_rows(path), self._slot()
        has_weight = self.x.norm is not None and self.x.norm.weight is not None
        lines = [
            *self._accesses(path),
            f"    const uint column0 = tile * {self.tile_columns(path)} + sg / {splits} * {r};",
            f"    const uint column = column0 + lane / {batch};",
            f"    const uint row = row0 + lane % {batch};",
            f"    const bool stores = sg % {splits} == 0 && lane < {r * batch} && column < n && row < rows;",
            f"    threadgroup float* mine = shared + sg * {slot};",
        ]
        for access in path.epilogue.early:  # on their way while the products are computed
            lines += [f"    float {access.register} = 0.0f;", f"    if (stores) {self._statement(path, first, access)}"]
        places: dict[int, int] = {}
        for number, (fmt, parts) in enumerate(path.groups()):
            squares = self.x.norm is not None and number == 0
            begin = len(places)
            places |= {part: begin + i for i, part in enumerate(parts)}
            arguments = f"{fmt.values}, {self.x_align}, {boolean(fmt.whole)}, {boolean(squares)}, {boolean(has_weight)}"
            lines += [
                "    {",
                *self._weights(path, first, fmt, parts),
                f"      ms_matvec_sums<{len(parts)}, {r}, {batch}> sums;",
                f"      ms_matvec<{arguments}>(",
                f"          sums, x, w, column0, n, p->k, (sg % {splits} * 32 + lane) * {fmt.values}, {splits * 32 * fmt.values});",
                f"      ms_share<{boolean(squares)}>(mine + {begin * r * batch}, mine + {slot - batch}, sums, lane);",
                "    }",
            ]
        lines += [
            f"    {'threadgroup' if splits > 1 else 'simdgroup'}_barrier(mem_flags::mem_threadgroup);",
            "    if (stores) {",
        ]
        scale = ""
        if self.x.norm is not None:
            squares_sum = f"ms_collect<{splits}>(mine + {slot - batch} + lane % {batch}, {slot})"
            lines.append(f"      const float scale = precise::rsqrt({squares_sum} / float(p->k) + p->eps);")
            scale = " * scale"
        for part in range(len(path.formats)):
            lines.append(f"      float r{part} = ms_collect<{splits}>(mine + {places[part] * r * batch} + lane, {slot}){scale};")
        return [*lines, *(f"      {self._statement(path, first, step)}" for step in path.epilogue.steps), "    }"]
