"""GPUs: kernels compiled from metal/, fusions by the number of rows, plans by rows and context. kind: "apple" or "nvidia"."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from metalstep.capture.passes import Fusion
from metalstep.checkpoint import Tensor
from metalstep.kernels.gpu import (
    attention,
    linear,
    linear_library,
    row_program,
    sample,
    step_advance,
    step_load,
)
from metalstep.kernels.gpu.linear_tables import table
from metalstep.kernels.gpu.linear_tuning import Tuning
from metalstep.kernels.launch import Buffer, Launch
from metalstep.kernels.linear import Input, Segment
from metalstep.kernels.native import NativeDevice
from metalstep.kernels.program import Program
from metalstep.kernels.step import StepBuffers
from metalstep.plan.gpu_weights import GpuWeightStore
from metalstep.plan.target import PlanShape, Scratch
from metalstep.plan.weights import WeightStore

NORM_ROWS = 16  # of Apple's plans for benchmarks
DECODE_ROWS = (1, 2, 4, 8, 16, 32, 64)
RESULTS = 64  # sampled rows of a mixed step
SPLIT_LEN = attention.SPLIT_LEN


@dataclass(frozen=True)
class Kind:
    """What differs between GPUs and is no kernel's tuning. mixed_rows: of plans for prompts; warm_rows: of those that are made before
    they are needed. kv_memory, halves: see Target."""

    mixed_rows: tuple[int, ...]
    warm_rows: tuple[int, ...]
    kv_memory: float
    halves: bool


KINDS = {
    # Apple's memory is the whole machine's.
    "apple": Kind(mixed_rows=(8, 64, 128, 512), warm_rows=(8, 64, 128, 512), kv_memory=0.25, halves=False),
    "nvidia": Kind(mixed_rows=(8, 64, 256, 512, 1024, 2048), warm_rows=(8, 64, 512, 2048), kv_memory=0.9, halves=True),
}


@dataclass(frozen=True)
class LinearFusion:
    """What linears of plans for so many rows take in, as a tuning table has it. given: all of the table that decides it."""

    tuning: Tuning = field(compare=False)
    rows: int
    invariant: bool
    given: tuple[Any, ...]

    def norm_fits(self, size: int) -> bool:
        return self.rows <= self.tuning.most_normed(size, invariant=self.invariant)

    def planes(self, outputs: int, k: int, bits: int) -> int:
        if self.norm_fits(outputs):  # the norm behind it is no row program then
            return 1
        return self.tuning.planes(outputs, k, self.rows, bits, invariant=self.invariant)


class GpuTarget:
    """See Target. batch_invariant: a row's result is the same bits in any batch; without it, other kernels are used for more rows.
    library: linears of many rows are NVIDIA's library's. tuning: of linears; of plans made from then on, it may be set to a device's own.

    Raises: ValueError for a kind that there is not.
    """

    norm_inputs = True
    keys_by_token = True

    def __init__(self, kind: str = "apple", *, batch_invariant: bool = False, library: bool | None = None, tuning: Tuning | None = None):
        if kind not in KINDS:
            raise ValueError(f"a GPU of kind {kind!r}; expected one of {', '.join(KINDS)}")
        self.kind = kind
        self.tuning = tuning or table(kind)
        self.batch_invariant = batch_invariant
        self.library = kind == "nvidia" if library is None else library
        self.kv_memory = KINDS[kind].kv_memory
        self.halves = KINDS[kind].halves
        self.max_rows = KINDS[kind].mixed_rows[-1]

    def facts(self) -> dict[str, Any]:
        return {"batch_invariant": self.batch_invariant}

    def plan_shape(self, rows: int, *, decode: bool, context: int) -> PlanShape:
        size = next(size for size in (DECODE_ROWS if decode else KINDS[self.kind].mixed_rows) if rows <= size)
        sampled = size if decode else min(size, RESULTS)
        if not decode and not self.batch_invariant:  # rows of prompts are enough to keep a GPU busy
            return PlanShape(size, sampled, False, 1, SPLIT_LEN)
        splits, split_len = attention.pieces(self.kind, size, context, invariant=self.batch_invariant)
        return PlanShape(size, sampled, decode, splits, split_len)

    def warm_shapes(self, rows: int, context: int) -> list[PlanShape]:
        shapes = []
        decodes = [(size, True) for size in DECODE_ROWS if size == 1 or size < 2 * rows]
        for size, decode in [*decodes, *((size, False) for size in KINDS[self.kind].warm_rows)]:
            one = self.plan_shape(size, decode=decode, context=1)
            # Two pieces have the kernels of all other numbers.
            shapes += [one, self.plan_shape(size, decode=decode, context=one.split_len + 1)] if context > one.split_len else [one]
        return list(dict.fromkeys(shapes))

    def fusion(self, shape: PlanShape) -> Fusion:
        tuning = self.tuning
        entries = tuning.invariant if self.batch_invariant else tuning.entries
        given = (*tuning.norm_rows, *((e.bits, e.rows, e.outputs, e.k, e.planes) for e in entries))
        linears = LinearFusion(tuning, shape.tokens, self.batch_invariant, given)
        return Fusion(("rms_norm",), linears, attention=shape.decode and not self.batch_invariant)

    def weights(self, device: NativeDevice, tensors: Mapping[str, Tensor], prepared: Mapping[str, mx.array]) -> WeightStore:
        return GpuWeightStore(device, tensors, prepared)

    def row_program(
        self, program: Program, step: StepBuffers, buffers: list[Buffer], rows: int, max_rows: int, group: int, scratch: Scratch
    ) -> list[Launch]:
        nbytes = row_program.scratch_bytes(program, max_rows, kind=self.kind)
        given = scratch(nbytes) if nbytes else None
        return row_program.launches(program, step, buffers, rows, max_rows, group, scratch=given, kind=self.kind)

    def linear(
        self,
        x: Input,
        segments: list[Segment],
        step: StepBuffers,
        buffers: list[Buffer],
        rows: int,
        max_rows: int,
        planes: int,
        scratch: Scratch,
    ) -> list[Launch]:
        if planes == 1 and self._is_for_library(max_rows) and linear_library.takes(x, segments, rows):
            return linear_library.launches(x, segments, step, buffers, max_rows, scratch)
        return linear.launches(
            x, segments, step, buffers, rows, max_rows, invariant=self.batch_invariant, tuning=self.tuning, planes=planes
        )

    def _is_for_library(self, rows: int) -> bool:
        least = self.tuning.library_rows
        return self.library and not self.batch_invariant and least is not None and rows >= least

    def attention(self, shape: PlanShape, inside: attention.Inside | None, scratch: Scratch, *args: Any, **options: Any) -> list[Launch]:
        one_by_one = shape.decode or self.batch_invariant
        workspace = None
        if one_by_one and shape.splits > 1:
            heads, value_dim = options["num_q_heads"], options["value_dim"]
            workspace = scratch(attention.workspace_bytes(heads, value_dim, shape.tokens, shape.splits))
        return attention.launches(
            *args,
            variant="decode" if one_by_one else "mixed",
            splits=shape.splits if one_by_one else 1,
            split_len=shape.split_len,
            inside=inside,
            workspace=workspace,
            max_rows=shape.tokens,
            kind=self.kind,
            invariant=self.batch_invariant,
            **options,
        )

    def sample(self, logits: Buffer, step: StepBuffers, max_sampled: int, scratch: Scratch, **options: int) -> list[Launch]:
        workspace = scratch(sample.workspace_bytes(options["vocab_size"], max_sampled, kind=self.kind))
        return sample.launches(logits, step, workspace=workspace, rows=max_sampled, kind=self.kind, **options)

    def step_advance(self, step: StepBuffers, **options: int) -> list[Launch]:
        return step_advance.launches(step, **options)

    def step_load(self, stage: Buffer, sampled: Buffer, region: Buffer, **sizes: int) -> list[Launch]:
        return step_load.launches(stage, sampled, region, **sizes)
