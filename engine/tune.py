"""Finds geometries of a GPU's linears: one op's after the other is changed inside of a decode step, and what makes the step faster is kept.

A kernel that is timed alone, or in a chain of its like, says little of a step: there it meets cold caches, the launches beside it, and
the end of the launch in front of it.
"""
from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from metalstep.kernels.gpu.linear_candidates import candidates
from metalstep.kernels.gpu.linear_tuning import Entry, Tuning
from metalstep.kernels.native import KernelError
from metalstep.tune_model import Linear, TuneModel, TuneStep

GAIN = 0.003  # of a step's time, that a change must gain to be kept: less is noise
SAMPLES = 3  # of a candidate, of which the best counts: what disturbs a call only makes it longer
ROUNDS = 9  # of the comparison with the table in use, at the end
COMPILERS = 8  # candidates that are compiled at once
REACH = 2  # numbers in which a candidate differs from the best so far at most
LOGITS_ERROR = 0.02  # of the range of a row's logits: float16 weights and sums in another order stay far below
IMPOSSIBLE = (NotImplementedError, ValueError, KernelError)  # what a geometry that some launch cannot have raises


@dataclass(frozen=True)
class Change:
    """Of a linear in a step of `rows` rows: the entry in use before, the one that is faster, and the step's times with them in µs."""

    shape: str
    rows: int
    linear: Linear
    before: Entry
    after: Entry
    before_us: float
    after_us: float


@dataclass(frozen=True)
class Point:
    """A step whose linears were tuned. before_us, after_us: medians with the table in use and with the new one, measured in turns;
    ratio: of them, above 1 the new one is faster. tried: geometries; wrong: those whose logits were not the step's."""

    shape: str
    rows: int
    before_us: float
    after_us: float
    ratio: float
    tried: int
    wrong: int
    changes: tuple[Change, ...]


class Tuner:
    """One sitting on one device. table: in use when it begins, and what it has become since. points: what was tuned."""

    def __init__(self, table: Tuning, *, steps: int = 32, samples: int = SAMPLES, progress: Callable[[str], None] = lambda _: None):
        """steps: of a timed call. progress: is told what is tried."""
        self.table, self.steps, self.samples, self._progress = table, steps, samples, progress
        self.points: list[Point] = []

    def tune(self, model: TuneModel, shape: str, rows: int, seconds: float) -> Point:
        """Tune the step of the plan for `rows` rows for about so many seconds; its entries join the table if they make it faster.

        Raises: CaptureError and what compiling raises for the table in use.
        """
        point = _Search(self, model, shape, model.plan_rows(rows), time.monotonic() + seconds).run()
        self.points.append(point)
        return point

    def tell(self, text: str) -> None:
        self._progress(text)


class _Search:
    """Of one step's entries, by coordinates: each linear's geometry changes in one number at a time, or two, for as long as that helps."""

    def __init__(self, tuner: Tuner, model: TuneModel, shape: str, rows: int, deadline: float):
        self.tuner, self.model, self.shape, self.rows, self.deadline = tuner, model, shape, rows, deadline
        self.table = tuner.table
        self.changes: list[Change] = []
        self.tried = self.wrong = 0

    def run(self) -> Point:
        reference = self.model.step(self.rows, self.table)
        try:
            self.logits = reference.logits()
            best = self._time(reference)
            linears = self.model.linears(self.rows, self.table)
            for linear in linears:  # an entry of its own, so that a change of one is no change of another
                self.table = with_entry(self.table, linear, self.rows, self._entry(linear))
            for number, linear in enumerate(linears):
                left = self.deadline - time.monotonic()
                best = self._climb(linear, best, time.monotonic() + left / (len(linears) - number))
            before, after, ratio = self._compare(reference)
        finally:
            reference.close()
        if ratio > 1 and self.changes:
            self.tuner.table = self.table
        else:
            self.changes, after, ratio = [], before, 1.0
        return Point(self.shape, self.rows, before, after, ratio, self.tried, self.wrong, tuple(self.changes))

    def _climb(self, linear: Linear, best: float, deadline: float) -> float:
        """Change one linear until no geometry near its own is faster. Returns the step's time."""
        usable = candidates(self.table.kind, linear.outputs, linear.k, self.rows)
        start = self._entry(linear)
        if not linear.has_planes:  # then the table's number of them says nothing
            start = replace(start, planes=1)
        tried = [entry for entry in usable if linear.has_planes or entry.planes == 1]
        begun, current, seen, reach = best, start, {start}, 1
        while reach <= REACH and time.monotonic() < deadline:
            near = [entry for entry in tried if entry not in seen and differences(entry, current) <= reach]
            seen.update(near)
            faster = self._fastest(linear, near, best, deadline)
            if faster is None:
                reach += 1
            else:
                reach, (current, best, self.table) = 1, faster
        if current != start:
            self.changes.append(Change(self.shape, self.rows, linear, start, current, begun * 1e6, best * 1e6))
        return best

    def _entry(self, linear: Linear) -> Entry:
        """The geometry that it has, without limits."""
        entry = self.table.entry(linear.outputs, linear.k, self.rows, linear.bits)
        return Entry(entry.shape, planes=entry.planes)

    def _fastest(self, linear: Linear, entries: Sequence[Entry], best: float, deadline: float) -> tuple[Entry, float, Tuning] | None:
        """The entry that makes the step the fastest, its time and its table; None where all are slower than `best`."""
        found: tuple[Entry, float, Tuning] | None = None
        for first in range(0, len(entries), COMPILERS):
            if time.monotonic() >= deadline:
                break
            tables = [(entry, with_entry(self.table, linear, self.rows, entry)) for entry in entries[first : first + COMPILERS]]
            steps = self._compiled([table for _, table in tables])
            for (entry, table), step in zip(tables, steps, strict=True):
                if step is None:
                    continue
                self.tried += 1
                self.tuner.tell(f"{self.shape}, {self.rows} rows: {linear.name} {describe(entry)}")
                try:
                    least = found[1] if found else best
                    taken = self._time(step, least)
                    if taken < least * (1 - GAIN) and self._is_right(step):
                        found = (entry, taken, table)
                finally:
                    step.close()
        return found

    def _compiled(self, tables: Sequence[Tuning]) -> list[TuneStep | None]:
        """The step with each of the tables; None where it cannot be."""
        steps: list[Future[TuneStep | None] | None] = []
        with ThreadPoolExecutor(COMPILERS) as pool:
            for table in tables:
                try:
                    steps.append(pool.submit(_compiled, self.model.step(self.rows, table)))
                except IMPOSSIBLE:
                    steps.append(None)
        return [None if step is None else step.result() for step in steps]

    def _time(self, step: TuneStep, enough: float = 0.0) -> float:
        """Seconds of a step, the best of some calls, as soon as that is clear: a first one far above `enough` is the last."""
        step.time(1)
        best = step.time(self.tuner.steps)
        if enough and best > enough * 1.03:
            return best
        return min([best, *(step.time(self.tuner.steps) for _ in range(self.tuner.samples - 1))])

    def _is_right(self, step: TuneStep) -> bool:
        """Whether its logits are those of the table in use, as nearly as another order of sums leaves them."""
        error = np.abs(step.logits() - self.logits).max(axis=-1)
        right = bool((error <= LOGITS_ERROR * np.ptp(self.logits, axis=-1)).all())
        self.wrong += not right
        return right

    def _compare(self, reference: TuneStep) -> tuple[float, float, float]:
        """Medians in µs of the step with the table in use and with the new one, measured in turns, and their ratio."""
        tuned = self.model.step(self.rows, self.table)
        try:
            tuned.time(1)
            pairs = [(reference.time(self.tuner.steps), tuned.time(self.tuner.steps)) for _ in range(ROUNDS)]
        finally:
            tuned.close()
        before, after = (statistics.median(times) for times in zip(*pairs, strict=True))
        return before * 1e6, after * 1e6, before / after


def with_entry(table: Tuning, linear: Linear, rows: int, entry: Entry) -> Tuning:
    """The table with an entry for one linear in steps of `rows` rows, in front of the one that has held for it, or in its place if that
    was for nothing else: entries for fewer rows, which stand before, keep what they hold for."""
    own = replace(entry, bits=linear.bits, rows=rows, outputs=linear.outputs, k=linear.k)
    entries = list(table.entries)
    at = next(i for i, e in enumerate(entries) if e.holds(linear.bits, rows, linear.outputs, linear.k))
    entries[at : at + (_limits(entries[at]) == _limits(own))] = [own]
    return replace(table, entries=entries)


def differences(a: Entry, b: Entry) -> int:
    """In how many numbers two geometries differ. Those of different types have none in common, and are as far apart as is tried at all."""
    if type(a.shape) is not type(b.shape):
        return REACH
    fields = [field.name for field in dataclasses.fields(a.shape)]
    return (a.planes != b.planes) + sum(getattr(a.shape, name) != getattr(b.shape, name) for name in fields)


def describe(entry: Entry) -> str:
    """A geometry in a few words."""
    numbers = " ".join(f"{name}={value}" for name, value in dataclasses.asdict(entry.shape).items())
    return f"{type(entry.shape).__name__} {numbers}" + (f" planes={entry.planes}" if entry.planes > 1 else "")


def report(points: Sequence[Point]) -> list[dict[str, Any]]:
    """The points as JSON has them."""
    return [
        {
            **{name: getattr(point, name) for name in ("shape", "rows", "before_us", "after_us", "ratio", "tried", "wrong")},
            "changes": [
                {
                    "linear": change.linear.name,
                    "outputs": change.linear.outputs,
                    "k": change.linear.k,
                    "before": describe(change.before),
                    "after": describe(change.after),
                    "before_us": change.before_us,
                    "after_us": change.after_us,
                }
                for change in point.changes
            ],
        }
        for point in points
    ]


def _compiled(step: TuneStep) -> TuneStep | None:
    try:
        step.compile()
        return step
    except IMPOSSIBLE:
        return None


def _limits(entry: Entry) -> tuple[Any, ...]:
    return (entry.rows, entry.bits, entry.outputs, entry.k)
