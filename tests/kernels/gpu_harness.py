"""Runs a GPU op's launches on the tests' GPU, simulated Metal as a rule, with numpy arrays in and out."""
from __future__ import annotations

import numpy as np
from gpu_device import DEVICE, KIND
from harness import Harness

from metalstep.kernels import params
from metalstep.kernels.gpu import sample, step_advance, step_load
from metalstep.kernels.launch import Buffer, Launch
from metalstep.kernels.linear import PackedWeight
from metalstep.kernels.step import StepBuffers


class GpuHarness(Harness):
    """As Harness, on a GPU; weights stay in MLX's layout."""

    kind = KIND

    def __init__(self) -> None:
        super().__init__(device=DEVICE)

    def sample_launches(self, logits: Buffer, step: StepBuffers, **sizes: int) -> list[Launch]:
        """The workspace is full of NaN before."""
        workspace = self.empty((sample.workspace_bytes(sizes["vocab_size"], sizes["max_rows"], self.kind) // 4,))
        return sample.launches(logits, step, **sizes, workspace=workspace, kind=self.kind)

    def step_advance_launches(self, step: StepBuffers, **sizes: int) -> list[Launch]:
        return step_advance.launches(step, **sizes)

    def step_load_launches(self, stage: Buffer, sampled: Buffer, region: Buffer, **sizes: int) -> list[Launch]:
        return step_load.launches(stage, sampled, region, **sizes)

    def pack(self, weight: np.ndarray, *, bits: int, group_size: int, dtype: int, n: int, k: int, **pointers: np.ndarray) -> PackedWeight:
        """`weight` (uint32 words, or dense elements as stored) with its scales and biases, each a buffer."""
        planes = {name: self.put(array) for name, array in pointers.items()}
        return PackedWeight(self.put(weight), n, k, bits, group_size, dtype, **planes)

    def element_bytes(self, dtype: int) -> int:
        return 4 if dtype == params.MS_FLOAT32 else 2
