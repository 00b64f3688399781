"""Decode steps of a model of a public shape on a GPU, with random weights, few layers and any tuning table."""
from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace

import mlx.nn as nn
import numpy as np

from metalstep.bench.kernels import TINY, TINY_CONFIG
from metalstep.capture import capture
from metalstep.capture.passes import Linears
from metalstep.kernels.gpu.linear_tuning import Tuning
from metalstep.kernels.native import NativeDevice, NativePlan
from metalstep.kv_plane import BLOCK_SIZE
from metalstep.native_model import ANY_ROWS, NativeModel
from metalstep.plan.gpu_target import GpuTarget
from metalstep.plan.linear_compiler import MATMULS
from metalstep.plan.lower import Lowered, lower
from metalstep.plan.step_arrays import SAMPLING, StepBatch
from metalstep.plan.step_memory import StepMemory
from metalstep.plan.target import PlanShape
from metalstep.shapes import ShapeCheckpoint, ShapeTensor

LAYER_BYTES = 128 << 20  # of all layers' weights: twice what an H100's second-level cache holds; more would only make a search longer
MIN_LAYERS = 2
TILE = 1 << 18  # random numbers that are drawn; a larger tensor repeats them
STEPS = 32  # of a timed call


class RandomTensor(ShapeTensor):
    """A weight of random values: what is stored is made when it is asked for, and given up behind that."""

    def __init__(self, tensor: ShapeTensor, bits: int, group_size: int):
        super().__init__(tensor.name, tensor.shape, tensor.dtype)
        self._bits, self._group_size = bits, group_size
        self._stored: np.ndarray | None = None

    def address(self) -> int:
        if self._stored is None:
            self._stored = np.resize(self._tile(), math.prod(self.shape))
        return self._stored.ctypes.data

    def drop_pages(self) -> None:
        self._stored = None

    def _tile(self) -> np.ndarray:
        """Such that a product is about as large as its input."""
        rng, kind = np.random.default_rng(list(self.name.encode())), self.name.rpartition(".")[2]
        if self.dtype == "uint32":
            return rng.integers(0, 2**32, TILE, np.uint32)
        if kind in ("scales", "biases"):
            levels = 2**self._bits - 1
            usual = math.sqrt(12 / (levels * (levels + 2)) / (self.shape[-1] * self._group_size))
            return _bfloat16(np.full(TILE, usual if kind == "scales" else -levels / 2 * usual, np.float32))
        return _bfloat16(rng.standard_normal(TILE, np.float32) / math.sqrt(self.shape[-1]))


class RandomCheckpoint(ShapeCheckpoint):
    """A public shape (or "tiny") in the place of a checkpoint, with random weights and as few layers as LAYER_BYTES need."""

    def __init__(self, name: str, *, bits: int = 4, group_size: int = 64):
        """Raises: ValueError as ShapeCheckpoint."""
        super().__init__("qwen3-0.6b" if name == TINY else name, bits=bits, group_size=group_size)
        if name == TINY:
            self.config |= TINY_CONFIG
        layers = self.config["num_hidden_layers"]
        self.config["num_hidden_layers"] = MIN_LAYERS
        super().build()
        nbytes = sum(tensor.nbytes for key, tensor in self.tensors.items() if ".layers.0." in key)
        needed = MIN_LAYERS if name == TINY else -(-LAYER_BYTES // nbytes)
        self.config["num_hidden_layers"] = max(MIN_LAYERS, min(layers, needed))

    def build(self) -> nn.Module:
        model = super().build()
        self._tensors = {
            name: RandomTensor(tensor, self.bits, self.group_size)
            for name, tensor in self.tensors.items()
            if isinstance(tensor, ShapeTensor)
        }
        return model


@dataclass(frozen=True)
class Linear:
    """A linear of a step, as tuning tables know it. weight_elements: of all launches like it. name: what it makes, for people.
    has_planes: whether what reads it can add planes up."""

    name: str
    outputs: int
    k: int
    bits: int
    weight_elements: int
    has_planes: bool


class TuneModel:
    """A model on a device of its own, for decode steps of up to `rows` sequences of `context` tokens."""

    def __init__(self, device: NativeDevice, kind: str, checkpoint: ShapeCheckpoint, *, rows: int, context: int):
        """Raises: MemoryError; CaptureError for a shape that no device runs."""
        model = checkpoint.build()
        self.device, self.context = device, context
        self.layers: int = checkpoint.config["num_hidden_layers"]
        self._captured = capture(model, checkpoint.config["model_type"])
        self._target = GpuTarget(kind)
        self._native = NativeModel(self._captured, checkpoint, device, self._target)
        blocks = -(-(context + 1) // BLOCK_SIZE)
        self._native.allocate([blocks * rows for _ in self._native.groups], max_context=context + 1, max_seqs=rows)
        self._memory = StepMemory(device)
        arrays = self._native.arrays
        tables = np.random.default_rng(0).permutation(rows * blocks).reshape(rows, blocks)
        for table in arrays.block_tables:
            for row in range(rows):
                arrays.edit(table[row, :blocks])[...] = tables[row]

    def plan_rows(self, rows: int) -> int:
        """Of the plan that runs steps of `rows` rows."""
        return self._shape(rows).tokens

    def linears(self, rows: int, tuning: Tuning) -> list[Linear]:
        """The different linears of a step of `rows` rows with a tuning table, the largest first."""
        target = GpuTarget(self._target.kind, tuning=tuning)
        fusion = target.fusion(self._shape(rows))
        found: dict[tuple[int, int, int, bool], list[int]] = {}
        names: dict[tuple[int, int, int, bool], str] = {}
        assert fusion.linears is not None
        divided = replace(fusion, linears=_Two(fusion.linears))
        for node in self._captured.graph(*ANY_ROWS, divided).nodes:
            if node.op != "linear":
                continue
            products = [part for part in node.attrs["body"] if part.op in MATMULS]
            sizes = [part.out.shape[-1] for part in products]
            k, bits = products[0].inputs[0].shape[-1], max(part.attrs.get("bits", 16) for part in products)
            key = (sum(sizes), k, bits, node.attrs.get("planes", 1) > 1)
            found.setdefault(key, []).append(sum(sizes) * k)
            names.setdefault(key, " + ".join(_weight_name(part.inputs[1].name) for part in products))
        linears = [Linear(names[key], *key[:3], sum(elements), key[3]) for key, elements in found.items()]
        return sorted(linears, key=lambda linear: -linear.weight_elements)

    def step(self, rows: int, tuning: Tuning) -> TuneStep:
        """A step of `rows` rows with a tuning table, not compiled yet. Raises: CaptureError, NotImplementedError or ValueError for a
        table with a geometry that a linear cannot have."""
        target, shape = GpuTarget(self._target.kind, tuning=tuning), self._shape(rows)
        native, graph = self._native, self._captured.graph(*ANY_ROWS, target.fusion(shape))
        lowered = lower(graph, self._memory, native.weights, native.cache.planes, native.arrays, shape, target)
        return TuneStep(self.device, native, lowered, rows, self.context)

    def close(self) -> None:
        """Give the device's memory back, and the device itself."""
        self._native.close()

    def _shape(self, rows: int) -> PlanShape:
        return self._target.plan_shape(rows, decode=True, context=self.context)


@dataclass(frozen=True)
class _Two:
    """Two planes for every linear that may have any."""

    linears: Linears

    def norm_fits(self, size: int) -> bool:
        return self.linears.norm_fits(size)

    def planes(self, outputs: int, k: int, bits: int) -> int:
        return 1 if self.norm_fits(outputs) else 2


class TuneStep:
    """A lowered step, which runs again and again on the same rows."""

    def __init__(self, device: NativeDevice, native: NativeModel, lowered: Lowered, rows: int, context: int):
        self.rows, self._device, self._lowered, self._arrays = rows, device, lowered, native.arrays
        self._shape = (lowered.logits.shape[0], lowered.logits.shape[1])
        self._context = context
        self._plan: NativePlan | None = None

    def compile(self) -> None:
        """Make what runs; other threads may do so with other steps. Raises: KernelError, MemoryError, ValueError."""
        rows = self._shape[0]
        self._plan = self._device.create_plan([entry.launch for entry in self._lowered.launches], rows, rows)

    def time(self, steps: int = STEPS) -> float:
        """Seconds of a step, by the host's clock over a call of `steps`."""
        began = time.perf_counter()
        self._run(steps)
        return (time.perf_counter() - began) / steps

    def logits(self) -> np.ndarray:
        """The first and the last row's logits of one step, float32 [2, vocab]."""
        self._run(1)
        logits, vocab = self._lowered.logits, self._shape[1]
        ends = [replace(logits, offset=logits.offset + row * vocab * 4, shape=(vocab,)) for row in (0, self.rows - 1)]
        return np.stack([self._device.read(end, np.float32, (vocab,)) for end in ends])

    def close(self) -> None:
        if self._plan is not None:
            self._plan.close()

    def _run(self, steps: int) -> None:
        if self._plan is None:
            self.compile()
        assert self._plan is not None
        self._arrays.write(_batch(self.rows, self._context, self._shape[1]))
        self._arrays.rewind()
        self._arrays.send()
        self._plan.wait(self._plan.run(steps))


def _batch(rows: int, context: int, vocab: int) -> StepBatch:
    """Of each sequence the newest token, greedy; the steps of a run are the same step."""
    records = np.zeros(rows, SAMPLING)
    records["target"] = -1
    every = np.arange(rows, dtype=np.int32)
    return StepBatch(
        tokens=np.random.default_rng(1).integers(1, vocab, rows, np.int32),
        positions=np.full(rows, context - 1, np.int32),
        seq_ids=every,
        sampled_rows=every,
        sampling=records,
        limits=np.full(rows, context + 1, np.int32),
    )


def _weight_name(name: str | None) -> str:
    """`q_proj` of `model.layers.0.self_attn.q_proj.weight`."""
    return (name or "?").removesuffix(".weight").rpartition(".")[2]


def _bfloat16(values: np.ndarray) -> np.ndarray:
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
