"""GPUs: kernels compiled from metal/, fusions by the number of rows, plans by rows and context."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx

from metalstep.capture.passes import Fusion
from metalstep.checkpoint import Tensor
from metalstep.kernels.gpu import attention, linear, row_program, sample, step_advance, step_load
from metalstep.kernels.launch import Buffer, Launch
from metalstep.kernels.linear import Input, Segment
from metalstep.kernels.native import NativeDevice
from metalstep.kernels.program import Program
from metalstep.kernels.step import StepBuffers
from metalstep.plan.gpu_weights import GpuWeightStore
from metalstep.plan.target import PlanShape, Scratch
from metalstep.plan.weights import WeightStore

DECODE_ROWS = (1, 2, 4, 8, 16, 32, 64)
MIXED_ROWS = (8, 64, 128, 512)
RESULTS = 64  # sampled rows of a mixed step
NORM_ROWS = 16  # up to here a norm costs less inside of the linears that read it; beyond, each row would be normed too often
SPLIT_LEN = attention.SPLIT_LEN


class GpuTarget:
    """See Target. batch_invariant: a row's result is the same bits in any batch; without it, other kernels are used for more rows."""

    kv_memory = 0.25  # a GPU's memory is taken at once
    norm_inputs = True
    keys_by_token = True

    def __init__(self, *, batch_invariant: bool = False):
        self.batch_invariant = batch_invariant

    def facts(self) -> dict[str, Any]:
        return {"batch_invariant": self.batch_invariant}

    def plan_shape(self, rows: int, *, decode: bool, context: int) -> PlanShape:
        splits = 1
        while splits * SPLIT_LEN < context:  # powers of two, so that a growing context needs few plans
            splits *= 2
        if decode:
            size = next(size for size in DECODE_ROWS if rows <= size)
            return PlanShape(size, size, True, splits)
        size = next(size for size in MIXED_ROWS if rows <= size)
        return PlanShape(size, min(size, RESULTS), False, splits if self.batch_invariant else 1)

    def warm_shapes(self, rows: int, context: int) -> list[PlanShape]:
        contexts = (1, SPLIT_LEN + 1) if context > SPLIT_LEN else (1,)  # two pieces have the kernels of all other numbers
        sizes = [size for size in DECODE_ROWS if size == 1 or size < 2 * rows]
        shapes = [self.plan_shape(size, decode=True, context=length) for size in sizes for length in contexts]
        shapes += [self.plan_shape(size, decode=False, context=length) for size in MIXED_ROWS for length in contexts]
        return list(dict.fromkeys(shapes))

    def fusion(self, shape: PlanShape) -> Fusion:
        norms = ("rms_norm",) if shape.tokens <= NORM_ROWS or self.batch_invariant else ()
        return Fusion(norms, attention=shape.decode and not self.batch_invariant)

    def weights(self, device: NativeDevice, tensors: Mapping[str, Tensor], prepared: Mapping[str, mx.array]) -> WeightStore:
        return GpuWeightStore(device, tensors, prepared)

    def row_program(
        self, program: Program, step: StepBuffers, buffers: list[Buffer], rows: int, max_rows: int, group: int, scratch: Scratch
    ) -> list[Launch]:
        nbytes = row_program.scratch_bytes(program, max_rows)
        return row_program.launches(program, step, buffers, rows, max_rows, group, scratch=scratch(nbytes) if nbytes else None)

    def linear(
        self, x: Input, segments: list[Segment], step: StepBuffers, buffers: list[Buffer], rows: int, max_rows: int
    ) -> list[Launch]:
        return linear.launches(x, segments, step, buffers, rows, max_rows, invariant=self.batch_invariant)

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
            split_len=SPLIT_LEN,
            inside=inside,
            workspace=workspace,
            max_rows=shape.tokens,
            **options,
        )

    def sample(self, logits: Buffer, step: StepBuffers, max_sampled: int, scratch: Scratch, **options: int) -> list[Launch]:
        workspace = scratch(sample.workspace_bytes(options["vocab_size"], max_sampled))
        return sample.launches(logits, step, workspace=workspace, rows=max_sampled, **options)

    def step_advance(self, step: StepBuffers, **options: int) -> list[Launch]:
        return step_advance.launches(step, **options)

    def step_load(self, stage: Buffer, sampled: Buffer, region: Buffer, **sizes: int) -> list[Launch]:
        return step_load.launches(stage, sampled, region, **sizes)
