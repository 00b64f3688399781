"""Steps and requests in a trace where vLLM schedules them: what metalstep.step_trace has, under the same names.

A step is begun and sampled in one thread and collected later, perhaps in another, when the next one is under way: its time on the device
is therefore no part of a thread, but a track of its own.
"""
from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import TYPE_CHECKING

from metalstep import trace as trace_file
from metalstep.engine_stats import StepMeter, StepTimes
from metalstep.step_trace import SPEED_NS, Events, RequestTimes, now, request_events

if TYPE_CHECKING:
    from metalstep.step_session import SessionStep, Span

IDLE_NS = 1_000_000_000  # without a step: the counters fall to 0


class SessionTrace:
    """Of one session. `took` may be called by another thread than the rest."""

    def __init__(self, trace: trace_file.Trace) -> None:
        self._trace = trace
        self._meter = StepMeter(0)
        self._prompt = self._generated = 0  # tokens
        self._speeds_at = self._latest = self._done = 0
        self._said: dict[str, dict[str, float]] = {}
        if trace.launches:
            raise ValueError(f"{trace_file.LAUNCHES} is set, and launches are not timed in a server's steps; leave it out")

    def began(self, step: SessionStep, spans: Iterable[Span], at: int) -> None:
        """`begin` was called at `at` and is about to return."""
        batch, rows, sampled = 0, 0, 0
        for span in spans:
            batch, rows, sampled = batch + 1, rows + len(span.tokens), sampled + (span.known > 0)
        step.times = [at, now()]
        step.sizes = (batch, rows, sampled)

    def sampled(self, step: SessionStep, at: int, number: int) -> None:
        """`sample` was called at `at` and is about to return. number: the step's."""
        if step.times is None:
            return
        trace, ended, (began, prepared) = self._trace, now(), step.times
        batch, rows, _ = step.sizes
        trace.enter()
        events: Events = []
        if self._latest and began - self._latest > IDLE_NS:
            self._count(events, "batch", self._latest, requests=0, rows=0)
            self._count(events, "tok/s", self._latest, decode=0, prompt=0)
        self._count(events, "batch", began, requests=batch, rows=rows)
        step.times = [began, prepared, at, number]
        trace.write([
            *events,
            trace.span("step", began, ended, batch=batch, rows=rows, decode_steps=1, number=number),
            trace.span("prepare arrays", began, prepared),
            trace.span("submit", at, ended),
        ])  # fmt: skip

    def took(self, step: SessionStep, waiting: int, done: int) -> None:
        """`waiting`: somebody began to wait for the step's end, `done`: it came; now its results are taken."""
        if step.times is None or len(step.times) < 4:
            return
        trace, ended, (began, prepared, submitted, number) = self._trace, now(), step.times
        batch, rows, sampled = step.sizes
        trace.enter()
        started, self._done = max(submitted, self._done), done  # the device takes one step after the other
        self._prompt, self._generated = self._prompt + rows - sampled, self._generated + sampled
        self._meter.step(StepTimes(began, began, prepared, submitted, done, ended), batch, rows, self._prompt, self._generated)
        self._latest = ended
        events = [
            trace.span("wait", waiting, done),
            trace.span("take results", done, ended),
            trace.part("b", "native call", number, started, of="step"),
            trace.part("e", "native call", number, done, of="step"),
        ]
        if ended - self._speeds_at > SPEED_NS:
            self._speeds_at = ended
            speeds = self._meter.speeds(ended)
            self._count(events, "tok/s", ended, decode=round(speeds.decode_tok_s, 1), prompt=round(speeds.prompt_tok_s, 1))
        trace.write(events)

    def _count(self, events: Events, name: str, at: int, **values: float) -> None:
        if self._said.get(name) != values:
            self._said[name] = values
            events.append(self._trace.counter(name, at, **values))

    def finish(self) -> None:
        """The session is closed."""
        self._trace.finish()


class ServedRequests:
    """Requests by vLLM's ids. The worker hears of one when its first step is scheduled: how long it was queued, vLLM's metrics say."""

    def __init__(self, trace: trace_file.Trace) -> None:
        self._trace = trace
        self._times: dict[str, tuple[int, RequestTimes]] = {}
        self._numbers = itertools.count(1)

    def changed(self, *, new: Iterable[str], preempted: Iterable[str], finished: Iterable[str]) -> None:
        """What vLLM's scheduler says before a step."""
        at, trace, events = now(), self._trace, []
        trace.enter()
        for name in finished:
            if found := self._times.pop(name, None):
                events += request_events(trace, *found, at, id=name)
        for name in preempted:
            if found := self._times.get(name):
                events.append(trace.part("n", "preempted", found[0], at))
        for name in new:
            self._times.setdefault(name, (next(self._numbers), RequestTimes(at, at)))
        trace.write(events)

    def token(self, name: str) -> None:
        """It has got one."""
        found = self._times.get(name)
        if found and not found[1].first:
            found[1].first = now()
