"""What an engine's steps and requests look like in a trace: the same names for an engine of its own and for vLLM's steps."""
from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from metalstep import trace as trace_file
from metalstep.engine_stats import StepTimes

if TYPE_CHECKING:
    from metalstep.engine import Engine
    from metalstep.running_request import RunningRequest
    from metalstep.scheduler import Schedule

SPEED_NS = 250_000_000  # between two points of the speed's counter

Events = list[dict[str, Any]]
now = trace_file.now


@dataclass(slots=True)
class RequestTimes:
    """ns; 0: not yet. queued: it came; begun: its first step; first: its first token."""

    queued: int
    begun: int = 0
    first: int = 0


def request_events(trace: trace_file.Trace, number: int, times: RequestTimes, ended: int, **arguments: Any) -> Events:
    """A request that ended, in its parts. They are written together, so that each that begins also ends."""
    parts = [("queued", times.queued, times.begun or ended)]
    if times.begun:
        parts.append(("prefill", times.begun, times.first or ended))
    if times.first:
        parts.append(("decode", times.first, ended))
    events = [trace.part("b", "request", number, times.queued, **arguments)]
    for name, began, end in parts:
        events += [trace.part("b", name, number, began), trace.part("e", name, number, end)]
    if times.first:
        events.insert(-2, trace.part("n", "first token", number, times.first))
    return [*events, trace.part("e", "request", number, ended)]


class StepTrace:
    """Of one engine. All but `queued` is called in a turn; what an interrupt cuts short is missing from the trace, no more."""

    def __init__(self, engine: Engine, trace: trace_file.Trace) -> None:
        self._engine, self._trace = engine, trace
        self._said: dict[str, dict[str, float]] = {}  # the counters' latest values
        self._speeds_at = 0
        if trace.launches and engine.native.device.kind != "host":
            kind = engine.native.device.kind
            raise ValueError(f"{trace_file.LAUNCHES} is set on {kind}, where launches are not timed in a step; leave it out")

    @property
    def launches(self) -> bool:
        return self._trace.launches

    def queued(self, running: RunningRequest) -> None:
        running.times = RequestTimes(now())

    def took(self, schedule: Schedule, began: int, at: int) -> None:
        """Behind a step and before its requests end. began: the step; at: its results were handed out."""
        for entry in schedule.entries:
            running = entry.sequence.request
            times = None if running is None else running.times
            if times is not None:
                times.begun = times.begun or began
                if not times.first and (len(running.outputs) or running.handed is not None):
                    times.first = at

    def step(
        self, schedule: Schedule, times: StepTimes, plan: list[tuple[str, str, int]], preempted: list[tuple[int, int]]
    ) -> None:
        """A step came to its end. plan: kernel, ops and ns of its launches, where they were timed. preempted: numbers of requests, and the
        tokens that each has to compute again."""
        engine, trace = self._engine, self._trace
        trace.enter()
        span = trace.span
        began, scheduled, prepared, submitted, done, ended = times
        batch = len(schedule.entries)
        events = [
            span("step", began, ended, batch=batch, rows=schedule.rows, decode_steps=schedule.steps, number=engine.steps),
            span("schedule", began, scheduled),
            span("prepare arrays", scheduled, prepared),
            span("native call", prepared, done),
            span("submit", prepared, submitted),
        ]
        if plan:
            at, scale = float(submitted), min(1.0, (done - submitted) / max(1, sum(ns for _, _, ns in plan)))
            for kernel, ops, ns in plan:
                events.append(span(kernel, int(at), int(at + ns * scale), ops=ops, ns=ns))
                at += ns * scale
        else:
            events.append(span("wait", submitted, done))
        events.append(span("take results", done, ended))
        events += [trace.part("n", "preempted", number, scheduled, tokens=tokens) for number, tokens in preempted]
        self._count(events, "batch", began, requests=batch, rows=schedule.rows)
        if not engine.busy:
            self._quiet(events, ended)
        else:
            self._count_engine(events, ended)
            if ended - self._speeds_at > SPEED_NS:
                self._speeds_at = ended
                speeds = engine.meter.speeds(ended)
                self._count(events, "tok/s", ended, decode=round(speeds.decode_tok_s, 1), prompt=round(speeds.prompt_tok_s, 1))
        trace.write(events)

    def idle(self) -> None:
        """Between steps, and nobody wants anything: the latest requests were cancelled, or their callers picked their last tokens."""
        events: Events = []
        self._quiet(events, now())
        if events:
            self._trace.enter()
            self._trace.write(events)

    def _quiet(self, events: Events, at: int) -> None:
        self._count_engine(events, at)
        self._count(events, "batch", at, requests=0, rows=0)
        self._count(events, "tok/s", at, decode=0, prompt=0)

    def _count_engine(self, events: Events, at: int) -> None:
        engine = self._engine
        self._count(events, "requests", at, running=engine.num_running, waiting=engine.num_waiting)
        self._count(events, "KV blocks", at, **{f"group {i}": used for i, used in enumerate(engine.used_blocks())})

    def _count(self, events: Events, name: str, at: int, **values: float) -> None:
        if self._said.get(name) != values:
            self._said[name] = values
            events.append(self._trace.counter(name, at, **values))

    def ended(self, running: RunningRequest, how: str) -> None:
        """Once: the times are taken off the request."""
        times, running.times = running.times, None
        if times is not None:
            sequence = running.sequence
            self._trace.enter()
            tokens = {"prompt_tokens": sequence.prompt_len, "generated_tokens": len(sequence.tokens) - sequence.prompt_len}
            found = {"cached_tokens": running.found_tokens, "preemptions": sequence.num_preemptions}
            self._trace.write(request_events(self._trace, running.number, times, now(), how=how, **tokens, **found))

    def finish(self) -> None:
        """The engine is closed."""
        self._trace.finish()
