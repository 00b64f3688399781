"""The host device: C kernels with row programs as prologues, one plan for few rows and one for many."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx

from metalstep.capture.passes import Fusion
from metalstep.checkpoint import Tensor
from metalstep.kernels import attention, linear, row_program, sample, step_advance, step_load
from metalstep.kernels.launch import Buffer, Launch
from metalstep.kernels.linear import Input, Segment
from metalstep.kernels.native import NativeDevice
from metalstep.kernels.program import Program
from metalstep.kernels.step import StepBuffers
from metalstep.plan.target import PlanShape, Scratch
from metalstep.plan.weights import WeightStore

SHAPES = (PlanShape(1, 1), PlanShape(64, 64), PlanShape(512, 64))  # in the order of their rows


class HostTarget:
    """See Target. arithmetic: of quantised linears, see kernels/linear.py. A row's result never depends on its batch."""

    kv_memory = 0.5  # memory is taken when it is first written
    max_rows = SHAPES[-1].tokens
    halves = False
    norm_inputs = False
    keys_by_token = False

    def __init__(self, arithmetic: str):
        self.arithmetic = arithmetic

    def facts(self) -> dict[str, str]:
        return {"arithmetic": self.arithmetic}

    def plan_shape(self, rows: int, *, decode: bool, context: int) -> PlanShape:
        return next(shape for shape in SHAPES if rows <= shape.tokens)

    def warm_shapes(self, rows: int, context: int) -> list[PlanShape]:
        return list(SHAPES)

    def fusion(self, shape: PlanShape) -> Fusion:
        return Fusion()

    def weights(self, device: NativeDevice, tensors: Mapping[str, Tensor], prepared: Mapping[str, mx.array]) -> WeightStore:
        return WeightStore(device, tensors, prepared)

    def row_program(
        self, program: Program, step: StepBuffers, buffers: list[Buffer], rows: int, max_rows: int, group: int, scratch: Scratch
    ) -> list[Launch]:
        return row_program.launches(program, step, buffers, rows, max_rows, group)

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
        assert planes == 1  # see fusion
        return linear.launches(x, segments, step, buffers, rows, max_rows, self.arithmetic)

    def attention(self, shape: PlanShape, inside: Any, scratch: Scratch, *args: Any, **options: Any) -> list[Launch]:
        assert inside is None  # see fusion
        return attention.launches(*args, max_rows=shape.tokens, **options)

    def sample(self, logits: Buffer, step: StepBuffers, max_sampled: int, scratch: Scratch, **options: int) -> list[Launch]:
        return sample.launches(logits, step, **options)

    def step_advance(self, step: StepBuffers, **options: int) -> list[Launch]:
        return step_advance.launches(step, **options)

    def step_load(self, stage: Buffer, sampled: Buffer, region: Buffer, **sizes: int) -> list[Launch]:
        return step_load.launches(stage, sampled, region, **sizes)
