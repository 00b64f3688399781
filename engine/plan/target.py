"""What differs between kinds of devices when a graph is lowered: fusions, plan sizes, layouts, and the launches of each op."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx

from metalstep.capture.passes import Fusion
from metalstep.checkpoint import Tensor
from metalstep.kernels.launch import Buffer, Launch
from metalstep.kernels.linear import Input, Segment
from metalstep.kernels.native import NativeDevice
from metalstep.kernels.program import Program
from metalstep.kernels.step import StepBuffers
from metalstep.plan.weights import WeightStore


@dataclass(frozen=True)
class PlanShape:
    """Which steps a plan is for: up to `tokens` rows, `sampled` of them sampled.

    decode: every row is the newest token of a sequence of its own. splits: pieces that attention may divide a context into, of split_len
    positions each (0: the device does not).
    """

    tokens: int
    sampled: int
    decode: bool = False
    splits: int = 1
    split_len: int = 0

    def rows(self, kind: str | None) -> int:
        """The most rows of this kind, "sampled" or "tokens"."""
        return self.sampled if kind == "sampled" else self.tokens


class Scratch(Protocol):
    """Gives memory that a launch uses while it runs; other launches of the plan may get the same."""

    def __call__(self, nbytes: int) -> Buffer: ...


class Target(Protocol):
    """A kind of device. The methods named after ops return launches; see the op's file in kernels/ for the meaning."""

    kv_memory: float  # of the free memory, what a KV cache takes when nobody says
    max_rows: int  # of a step
    halves: bool  # rows that linears alone read, as they are, are float16
    norm_inputs: bool  # linears norm their input themselves (Input.norm) and take no other prologue
    keys_by_token: bool  # K planes are [block, kv_head, block_size, head_dim], else [block, kv_head, head_dim, block_size]

    def facts(self) -> dict[str, str]:
        """Options that `explain` reports, by name."""

    def plan_shape(self, rows: int, *, decode: bool, context: int) -> PlanShape:
        """Of the plan for a step of `rows` rows whose longest sequence has `context` tokens."""

    def warm_shapes(self, rows: int, context: int) -> list[PlanShape]:
        """Of the plans that up to `rows` requests at once need, of up to `context` tokens: whatever else they need takes no compiler."""

    def fusion(self, shape: PlanShape) -> Fusion:
        """What launches of a plan take in."""

    def weights(self, device: NativeDevice, tensors: Mapping[str, Tensor], prepared: Mapping[str, mx.array]) -> WeightStore:
        """A store of weights in the device's layout."""

    def row_program(
        self, program: Program, step: StepBuffers, buffers: list[Buffer], rows: int, max_rows: int, group: int, scratch: Scratch
    ) -> list[Launch]: ...

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
        """planes: more than 1 only as Fusion.linears asks for it; the segments then store their products, float32 [planes, max_rows, n]."""

    def attention(self, shape: PlanShape, inside: Any, scratch: Scratch, *args: Any, **options: Any) -> list[Launch]: ...

    def sample(self, logits: Buffer, step: StepBuffers, max_sampled: int, scratch: Scratch, **options: int) -> list[Launch]: ...

    def step_advance(self, step: StepBuffers, **options: int) -> list[Launch]: ...

    def step_load(self, stage: Buffer, sampled: Buffer, region: Buffer, **sizes: int) -> list[Launch]: ...
