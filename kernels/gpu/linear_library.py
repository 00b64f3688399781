"""Linear for many rows on NVIDIA's GPUs: weights as float16 matrices, their product with x by NVIDIA's library, the epilogue behind it.

A weight is written out in each step: from some hundred rows on that costs less than the library gains over tiles that take weights
apart themselves. The library reads all rows of a plan, whatever a step has: those behind its last row hold anything, and so do their
results, which nobody reads.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from metalstep.kernels import params
from metalstep.kernels.gpu import linear_dequantise, linear_finish
from metalstep.kernels.gpu.linear_finish import Products
from metalstep.kernels.launch import DTYPE_BYTES, Buffer, KernelCode, Launch
from metalstep.kernels.linear import Input, PackedWeight, Segment, first_buffer_slot
from metalstep.kernels.step import StepBuffers

KERNEL = "library_gemm"  # not compiled on CUDA, where a launch of this name is the library's product
WORKSPACE = 32 << 20  # bytes: what NVIDIA recommends for Hopper, whose fastest ways to split k need them
PIECE = 32 << 20  # bytes at most of weights, and of products, whose epilogue is to come: as much as stays in an H100's cache with both
MATRICES = 256 << 20  # bytes at most of weights that are written out at a time, where the product is all there is
PIECE_COLUMNS = 256  # of which pieces have a multiple: the library's largest tile
ALIGN = 16  # bytes: of places, and of rows
TILE = 16  # threads along each axis of a threadgroup, where the product is a kernel
HALF, FLOAT = 2, 4  # bytes


def takes(x: Input, segments: Sequence[Segment], rows: int) -> bool:
    """Whether `launches` can do this linear: x is float16 rows as they are, and all of it lies as the library reads it. rows: ms_rows."""
    if x.buffer is None or x.norm is not None or x.buffer.dtype != "float16":
        return False
    if x.rows != params.MS_ROW_SELF or rows != params.MS_ROWS_TOKENS:
        return False
    if (x.buffer.offset + x.offset * HALF) % ALIGN or x.row_stride * HALF % ALIGN:
        return False
    weights = [weight for segment in segments for weight in segment.weights]
    return all(w.k * HALF % ALIGN == 0 and w.n * FLOAT % ALIGN == 0 for w in weights) and all(map(linear_finish.takes, segments))


def launches(
    x: Input,
    segments: Sequence[Segment],
    step: StepBuffers,
    buffers: Sequence[Buffer],
    max_rows: int,
    scratch: Callable[[int], Buffer],
) -> list[Launch]:
    """As linear.launches, for a linear that this file `takes`: launches that follow one another, each behind a barrier but the first.

    scratch: gives memory of so many bytes, of which nothing is read before it is written.
    """
    slot = first_buffer_slot([segment.weights for segment in segments])
    batches = _batches([piece for segment in segments for piece in _pieces(segment, slot, max_rows)])
    written = max(sum(piece.written_bytes for piece in batch) for batch in batches)
    products = max(piece.product_bytes(max_rows) for batch in batches for piece in batch)
    memory = scratch(WORKSPACE + written + products)
    gemm = _Gemm(x, max_rows, _region(memory, 0, (WORKSPACE,), "uint8"))

    def buffer_of(place: int) -> Buffer:
        return step.program_slots()[place] if place < params.MS_SLOT_FIRST else buffers[place - slot]

    result: list[Launch] = []
    for batch in batches:
        matrices = [piece.matrices(memory, at) for piece, at in zip(batch, _offsets(batch), strict=True)]
        result += linear_dequantise.launches([pair for own in matrices for pair in own if not _is_matrix(pair[0])])
        for piece, own in zip(batch, matrices, strict=True):
            if piece.direct is not None:
                result += [gemm.direct(own[0][1], piece, piece.direct, buffer_of)]
                continue
            out = _region(memory, WORKSPACE + written, (max_rows, len(own) * piece.n), "float32")
            result += gemm.products([place for _, place in own], out)
            result.append(linear_finish.launch(piece.segment, Products(out, piece.first, piece.n), step, buffer_of, max_rows))
    return [result[0], *(replace(launch, barrier=True) for launch in result[1:])]


@dataclass(frozen=True)
class Direct:
    """An epilogue that the product itself does: it is stored, or added to what `added` loads and stored; both are instructions."""

    stored: dict[str, int]
    added: dict[str, int] | None


@dataclass(frozen=True)
class Piece:
    """Columns [first, first + n) of a segment."""

    segment: Segment
    first: int
    n: int
    direct: Direct | None

    @property
    def limit(self) -> int:
        """Bytes of matrices that are written out with its own at most."""
        return MATRICES if self.direct else PIECE

    @property
    def written_bytes(self) -> int:
        """Of its weights' rows as matrices."""
        return sum(self.n * weight.k * HALF for weight in self.segment.weights if not _is_matrix(weight))

    def product_bytes(self, rows: int) -> int:
        """Of memory for its products."""
        return 0 if self.direct else rows * self.n * len(self.segment.weights) * FLOAT

    def matrices(self, memory: Buffer, offset: int) -> list[tuple[PackedWeight, Buffer]]:
        """Its rows of each weight, and the place where they are a matrix: from `offset` of memory on, or their own."""
        pairs = []
        for weight in self.segment.weights:
            rows = _rows(weight, self.first, self.n)
            own = replace(rows.buffer, shape=(self.n, weight.k), dtype="float16")
            pairs.append((rows, own if _is_matrix(weight) else _region(memory, offset, (self.n, weight.k), "float16")))
            offset += 0 if _is_matrix(weight) else self.n * weight.k * HALF
        return pairs


def _pieces(segment: Segment, first_slot: int, rows: int) -> list[Piece]:
    """A segment in as few pieces as memory allows."""
    whole = Piece(segment, 0, segment.weights[0].n, _direct(segment))
    n = whole.n
    count = max(1, -(-whole.written_bytes // whole.limit), -(-whole.product_bytes(rows) // whole.limit))
    columns = -(-n // (count * PIECE_COLUMNS)) * PIECE_COLUMNS
    return [replace(whole, first=first, n=min(columns, n - first)) for first in range(0, n, columns)]


def _batches(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """Pieces in order, as many at a time as are written out together."""
    batches: list[list[Piece]] = [[]]
    for piece in pieces:
        together = [*batches[-1], piece]
        if batches[-1] and sum(other.written_bytes for other in together) > min(other.limit for other in together):
            batches.append([])
        batches[-1].append(piece)
    return batches


def _offsets(batch: Sequence[Piece]) -> list[int]:
    """Of each piece's matrices in the memory."""
    offsets = [WORKSPACE]
    for piece in batch[:-1]:
        offsets.append(offsets[-1] + piece.written_bytes)
    return offsets


def _direct(segment: Segment) -> Direct | None:
    """What the product itself can do of a segment's epilogue, if it is all of it."""
    *before, last = segment.epilogue.instructions
    if len(segment.weights) > 1 or last["op"] != params.MS_OP_STORE or not _is_direct(last):
        return None
    if not before:
        return Direct(last, None) if last["a"] == 0 else None
    if [i["op"] for i in before] != [params.MS_OP_LOAD, params.MS_OP_ADD]:
        return None
    load, add = before
    sums = {add["a"], add["b"]} == {0, load["dst"]} and load["dst"] and not add.get("imm") and last["a"] == add["dst"]
    return Direct(last, load) if sums and _is_direct(load) else None


def _is_direct(access: dict[str, int]) -> bool:
    """Whether the library reads or writes rows as an epilogue's LOAD or STORE does."""
    places = access.get("offset", 0) * FLOAT % ALIGN == 0 and access.get("row_stride", 0) * FLOAT % ALIGN == 0
    return access.get("dtype", 0) == params.MS_FLOAT32 and access.get("rows") == params.MS_ROW_SELF and places


class _Gemm:
    """Products of one x."""

    def __init__(self, x: Input, max_rows: int, workspace: Buffer):
        assert x.buffer is not None
        self.x = replace(x.buffer, offset=x.buffer.offset + x.offset * HALF)
        self.x_row_stride, self.rows, self.workspace = x.row_stride, max_rows, workspace

    def direct(self, matrix: Buffer, piece: Piece, direct: Direct, buffer_of: Callable[[int], Buffer]) -> Launch:
        """The product with one weight where the epilogue wants it."""
        out, added = (
            None if i is None else _shifted(buffer_of(i["slot"]), i.get("offset", 0) + piece.first) for i in (direct.stored, direct.added)
        )
        assert out is not None
        return self._launch(matrix, out, direct.stored["row_stride"], added, direct.added["row_stride"] if direct.added else 0)

    def products(self, matrices: Sequence[Buffer], out: Buffer) -> list[Launch]:
        """Products with weights of one n, side by side in the columns of `out`."""
        first, stride = matrices[0], out.shape[1]
        n, k = first.shape
        behind = [(first.handle, first.offset + i * first.nbytes) for i in range(len(matrices))]
        if [(matrix.handle, matrix.offset) for matrix in matrices] == behind:
            return [self._launch(replace(first, shape=(n * len(matrices), k)), out, stride)]
        return [self._launch(matrix, _shifted(out, i * n), stride) for i, matrix in enumerate(matrices)]

    def _launch(self, matrix: Buffer, out: Buffer, out_stride: int, added: Buffer | None = None, added_stride: int = 0) -> Launch:
        n, k = matrix.shape
        constants = params.pack(
            "MSGpuLibraryGemmParams",
            rows=self.rows,
            n=n,
            k=k,
            x_row_stride=self.x_row_stride,
            c_row_stride=added_stride,
            d_row_stride=out_stride,
            add=added is not None,
            workspace_bytes=self.workspace.nbytes,
        )
        bindings = [self.x, matrix, added or out, out, self.workspace]
        grid = (-(-n // TILE), -(-self.rows // TILE), 1)
        return Launch(KERNEL, bindings, constants, grid=grid, threads=(TILE, TILE, 1), code=KernelCode((KERNEL,), ""))


def _rows(weight: PackedWeight, first: int, n: int) -> PackedWeight:
    """Rows [first, first + n) of a weight."""

    def part(buffer: Buffer | None) -> Buffer | None:
        return buffer and replace(buffer, offset=buffer.offset + buffer.nbytes // weight.n * first)

    if n == weight.n:
        return weight
    words = part(weight.buffer)
    assert words is not None
    return replace(weight, buffer=words, n=n, scales=part(weight.scales), biases=part(weight.biases))


def _is_matrix(weight: PackedWeight) -> bool:
    """Whether the library reads it as it is."""
    return weight.bits == 16 and weight.dtype == params.MS_FLOAT16 and weight.buffer.offset % ALIGN == 0


def _region(memory: Buffer, offset: int, shape: tuple[int, ...], dtype: str) -> Buffer:
    assert offset % ALIGN == 0
    return Buffer(memory.handle, memory.offset + offset, shape, dtype)


def _shifted(buffer: Buffer, elements: int) -> Buffer:
    """The buffer from an element on; only its place is of use."""
    return replace(buffer, offset=buffer.offset + elements * DTYPE_BYTES[buffer.dtype])
