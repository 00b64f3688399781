"""A model of a step's time on an Apple GPU, launch by launch. What comes out is a prediction: docs/launch-model.md has its errors."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from metalstep.chips import Chip
from metalstep.kernels.launch import Buffer
from metalstep.plan.lower import LoweredLaunch
from metalstep.plan.paper import PaperPlan

LABEL = "prediction, not measured: see docs/launch-model.md"
FLOAT = 4  # bytes of an activation


@dataclass(frozen=True)
class Constants:
    """What published figures say of Apple's GPUs; docs/launch-model.md has the source of each.

    launch_us: of a launch behind a barrier. overlapped_us: of one that runs beside the one before it. step_us: of a command buffer.
    bandwidth, arithmetic: fractions of the chip's peaks that kernels attain.
    """

    launch_us: float
    overlapped_us: float
    step_us: float
    bandwidth: float
    arithmetic: float


EXPECTED = Constants(launch_us=2.4, overlapped_us=0.5, step_us=20.0, bandwidth=0.80, arithmetic=0.50)
FAST = Constants(launch_us=1.2, overlapped_us=0.5, step_us=5.0, bandwidth=0.88, arithmetic=0.70)
SLOW = Constants(launch_us=2.7, overlapped_us=1.2, step_us=20.0, bandwidth=0.60, arithmetic=0.30)


@dataclass(frozen=True)
class Cost:
    """What one launch moves and computes. weight_bytes, kv_bytes, other_bytes: each region once, whatever caches save or lose;
    other_bytes: of activations and of weights that are no linear's. flops: of matrix products and attention, two per multiply-add."""

    weight_bytes: int
    kv_bytes: int
    other_bytes: int
    flops: int

    @property
    def nbytes(self) -> int:
        return self.weight_bytes + self.kv_bytes + self.other_bytes


def launch_costs(plan: PaperPlan, rows: int, context: int) -> list[Cost]:
    """Of each launch of `plan` in a step of `rows` sequences that have `context` tokens each, the new one included."""
    costs: list[Cost] = []
    before: LoweredLaunch | None = None
    for entry in plan.launches:
        first = before is None or entry.access.reads is not before.access.reads  # of its op's launches
        costs.append(_cost(plan, entry, rows, context, first))
        before = entry
    return costs


def _cost(plan: PaperPlan, entry: LoweredLaunch, rows: int, context: int, first: bool) -> Cost:
    seen = min(context, entry.window or context)
    read, written = set(entry.access.reads), set(entry.access.writes)
    activations = [region for region in read | written if region.handle == plan.arena]
    widest = max((_row_bytes(region) for region in activations), default=0)
    kv_bytes, other_bytes = 0, rows * sum(_row_bytes(region) for region in activations)
    for region in (read | written) if first else ():
        if region.handle in plan.planes:
            positions = (seen if region in read else 0) + (1 if region in written else 0)
            kv_bytes += rows * positions * plan.planes[region.handle]
        elif region.handle in plan.weights:  # of a table of embeddings, a row
            other_bytes += min(region.nbytes, rows * widest)
    macs = rows * (entry.weight_elements + seen * entry.position_macs)
    return Cost(entry.weight_bytes, kv_bytes, other_bytes, 2 * macs)


def _row_bytes(region: Buffer) -> int:
    """Of one row of a value in the arena."""
    return region.shape[1] * FLOAT


@dataclass(frozen=True)
class Prediction:
    """Microseconds of a step: of each launch in order (they add up to all but step_us), and what the whole would take if launches,
    memory or arithmetic were all there is."""

    launches_us: list[float]
    step_us: float
    dispatch_us: float
    memory_us: float
    arithmetic_us: float

    @property
    def total_us(self) -> float:
        return sum(self.launches_us) + self.step_us


def predict(costs: Sequence[Cost], barriers: Sequence[bool], chip: Chip, constants: Constants = EXPECTED) -> Prediction:
    """Launches between two barriers overlap: together they take what their bytes or their arithmetic take, whichever is more, and each
    its launch. barriers: whether a launch waits for those before it. A launch's time is what it adds to those it overlaps with."""
    per_byte = 1 / (chip.bandwidth * constants.bandwidth * 1e3)  # µs
    per_flop = 1 / (chip.tflops * constants.arithmetic * 1e6)
    times: list[float] = []
    dispatch = moved = computed = before = 0.0
    for i, (cost, barrier) in enumerate(zip(costs, barriers, strict=True)):
        alone = barrier or i == 0
        if alone:
            moved = computed = before = 0.0
        moved += cost.nbytes * per_byte
        computed += cost.flops * per_flop
        launch = constants.launch_us if alone else constants.overlapped_us
        dispatch += launch
        times.append(launch + max(moved, computed) - before)
        before = max(moved, computed)
    nbytes, flops = sum(cost.nbytes for cost in costs), sum(cost.flops for cost in costs)
    return Prediction(times, constants.step_us, dispatch + constants.step_us, nbytes * per_byte, flops * per_flop)
