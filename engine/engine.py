"""The engine: one per model. It batches whatever requests there are, step by step, driven by the threads that wait for tokens.

No thread of its own: of the callers that wait, one runs a step for all, the others sleep. What callers ask for meanwhile (a new request,
a cancellation, a picked token) is queued and taken in before the next step.
"""
from __future__ import annotations

import contextlib
import copy
import logging
import os
import time
import weakref
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Items
from functools import partial
from typing import Any

import numpy as np

from metalstep import trace
from metalstep.admission import admit
from metalstep.cache_keeper import CacheKeeper
from metalstep.engine_stats import Ends, EngineStats, KVUse, StepMeter, StepTimes
from metalstep.kv_plane import BLOCK_SIZE
from metalstep.native_model import MAX_RESULTS, MAX_SEQS, NativeModel
from metalstep.request import Request
from metalstep.running_request import RunningRequest
from metalstep.scheduler import GroupSpec, KVBlocks, Schedule, Scheduler, State
from metalstep.step_runner import StepRunner
from metalstep.step_trace import StepTrace
from metalstep.stream import Picker, Stream
from metalstep.turn import Turn
from metalstep.watch import Watch

# What a device says, and what a mistake in here would be. Anything else, as a TimeoutError of the caller's signal handler, is the calling
# thread's alone, as Ctrl-C is.
EVERYBODYS = (RuntimeError, MemoryError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, AssertionError)
IDLE_SECONDS = 0.05  # between two looks of a thread that waits for what another thread has to do first
_ENGINES: weakref.WeakSet[Engine] = weakref.WeakSet()


__all__ = ["Engine", "EngineStats"]
logger = logging.getLogger("metalstep")


class Engine:
    """Use a model's own: `model.engine`. Threads may call everything at once; after a fork only the parent's is usable.

    A thread that is interrupted (Ctrl-C) while it runs a step for all loses its own request; the others go on and give what they would
    have given.
    """

    def __init__(self, native: NativeModel):
        self.native = native
        specs = [GroupSpec(group.window, count) for group, count in zip(native.cache.groups, native.num_blocks, strict=True)]
        self.blocks = KVBlocks(specs, BLOCK_SIZE, native.max_rows)
        self.caches = CacheKeeper(self, native.cache, self.blocks, native.encoding)
        self._scheduler = Scheduler(
            self.blocks,
            max_seqs=MAX_SEQS,
            max_rows=native.max_rows,
            max_results=MAX_RESULTS,
            on_evict=self.caches.save,
            goes_ahead=not native.device.unified,
        )
        self._runner = StepRunner(native)
        self._turn = Turn()
        self._inbox: deque[Callable[[], None]] = deque()  # what callers ask for
        self._dropped: deque[Watch] = deque()  # of streams and prompt caches that nobody has any more
        self._active: dict[int, RunningRequest] = {}
        self._parked: list[RunningRequest] = []  # of them, those that wait for their callers
        self._dirty = False  # a turn was begun and has not come to its end
        self._preemptions = 0
        self._ends = Ends()
        self.meter = StepMeter(len(specs))
        opened = trace.current()
        self._trace = None if opened is None else StepTrace(self, opened)
        self._runner.time_launches = self._trace is not None and self._trace.launches
        self._closed: str | None = None
        logger.info(
            "%s, %d launches per token, KV cache of %s blocks of %d tokens",
            native.device.info.name, len(native.decode_plan.launches), "+".join(map(str, native.num_blocks)), BLOCK_SIZE,
        )  # fmt: skip
        _ENGINES.add(self)

    # ---- callers ------------------------------------------------------------------------------------------------------------
    def submit(
        self, request: Request, pick: Picker | None = None, progress: Callable[[int, int], None] | None = None
    ) -> Stream:
        """Queue a request. It moves while any thread waits for a token of this engine.

        pick and progress: see Stream. With a prompt cache it waits for the step in progress.
        Raises: ValueError for what cannot be run: token ids, lengths, parameters.
        """
        if request.hand_out_logits is not (pick is not None):
            raise ValueError(
                f"hand_out_logits is {request.hand_out_logits!r:.80} and pick {pick!r:.80}; expected True and a callable, or False and None"
            )
        for name, function in (("pick", pick), ("progress", progress)):
            if function is not None and not callable(function):
                raise ValueError(f"{name} is {function!r:.80}, expected a callable; see Stream")
        return self._start(request, pick, progress)

    def logits(self, tokens: Items[int]) -> np.ndarray:
        """Logits of every position of a fresh sequence, float32 [len(tokens), vocab]. Raises: ValueError as `submit`."""
        return np.stack(self.collect(Request(list(tokens), max_tokens=0)))

    def collect(self, request: Request) -> list[np.ndarray]:
        """Run a request's prompt and return the logits of each of its positions, float32 [vocab]."""
        with contextlib.closing(self._start(request, collect=True)) as stream:
            for _ in stream:
                pass
            return stream.running.logits  # type: ignore[return-value]  # all are there

    def _start(
        self, request: Request, pick: Picker | None = None, progress: Callable[[int, int], None] | None = None, *, collect: bool = False
    ) -> Stream:
        self._check_open()
        enqueue = partial(self._enqueue, request, pick, progress, collect)
        # Of two threads with one prompt cache, one is refused.
        return enqueue() if request.prompt_cache is None else self.exclusively(enqueue)

    def _enqueue(
        self, request: Request, pick: Picker | None, progress: Callable[[int, int], None] | None, collect: bool
    ) -> Stream:
        request, sequence = admit(self.native, request, collect=collect)
        cache = request.prompt_cache
        if cache is not None:
            cache.bind(self)
        running = RunningRequest(request, sequence, collect=collect)
        if self._trace is not None:
            self._trace.queued(running)
        stream = Stream(self, running, pick, progress)
        running.owner = self.watch(stream, partial(self._give_up, running))
        try:
            if cache is not None:
                cache.in_use = True
            self._inbox.append(partial(self._add, running))
        except BaseException:
            stream.close()
            raise
        return stream

    def cancel(self, stream: Stream) -> None:
        """End a request; what it generated so far can still be taken."""
        if not stream.running.done:
            self._inbox.append(partial(self._end, stream.running, "cancelled"))

    def give_up(self, running: RunningRequest) -> None:
        """End a request that nobody takes anything more of: what was generated but not taken is no part of its prompt cache."""
        if not running.done or not running.released:
            self._inbox.append(partial(self._give_up, running))

    def release_cache(self, running: RunningRequest) -> None:
        """The caller has all of a request that ended: its prompt cache is free for the next one."""
        if not running.released:
            self._inbox.append(partial(self._release_cache, running))

    def watch(self, watched: object, message: Callable[[], None]) -> Watch:
        """Once nobody has `watched`, run `message` before the next step; twice if it is interrupted. Only as long as the watch is kept."""
        return Watch(watched, message, self._dropped.append)

    def settle(self) -> None:
        """Take in what callers have asked for; waits for the step in progress. From inside of a turn, everything is."""
        if not self._turn.mine:
            self.exclusively(lambda: None)

    def stats(self, *, wait: bool = True) -> EngineStats:
        """Counts and speeds as of now; waits for the step in progress.

        wait: False takes them as they are, from any thread and in the middle of a step too, for a view that must not disturb.
        """
        return self.exclusively(self._stats) if wait else self._stats()

    def _stats(self) -> EngineStats:
        scheduler, runner, pool = self._scheduler, self._runner, self.blocks.pools[0]
        batch, rows, step_ns, device_ns = self.meter.latest
        return EngineStats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            free_blocks=pool.free_count,
            total_blocks=pool.num_blocks,
            steps=runner.steps,
            prompt_tokens=runner.prompt_tokens,
            cached_tokens=runner.cached_tokens,
            generated_tokens=runner.generated_tokens,
            preemptions=self._preemptions,
            **self._ends.counts(),
            batch=batch,
            rows=rows,
            kv=tuple(map(self._kv_use, range(len(self.blocks.pools)))),
            **self.meter.speeds()._asdict(),
            last_step_ms=step_ns / 1e6,
            last_device_ms=device_ns / 1e6,
            uptime_s=(time.perf_counter_ns() - self.meter.started) / 1e9,
        )

    def _kv_use(self, index: int) -> KVUse:
        pool, group = self.blocks.pools[index], self.native.cache.groups[index]
        used = pool.num_blocks - pool.free_count
        peak = max(used, self.meter.peaks[index])
        return KVUse(group.window, used, pool.num_blocks, peak, group.token_bytes * BLOCK_SIZE)

    def used_blocks(self) -> list[int]:
        """KV blocks that are held, of each group."""
        return [pool.num_blocks - pool.free_count for pool in self.blocks.pools]

    @property
    def steps(self) -> int:
        """Native calls since the start."""
        return self._runner.steps

    @property
    def num_running(self) -> int:
        return len(self._scheduler.running)

    @property
    def num_waiting(self) -> int:
        return len(self._scheduler.waiting)

    @property
    def busy(self) -> bool:
        """Whether requests are running or waiting."""
        return bool(self._active)

    def wait(self, streams: Items[Stream]) -> None:
        """Return when one of the streams has something for its caller, or after a step. Runs a step if no other thread does.

        Raises: what a device says when it fails, after which every request has ended with it; RuntimeError from inside of a step.
        """
        self._check_open()
        for stream in streams:
            if stream.running.has_news:
                return
        worked = self._turn.run(self._step)
        if worked is None:
            self._turn.sleep()
        elif not worked and not self._inbox:
            self._turn.sleep(IDLE_SECONDS, idle=True)

    def exclusively(self, body: Callable[[], Any]) -> Any:
        """Run `body` between two steps, with what callers have asked for taken in. Waits for no more than the step in progress.

        Raises: RuntimeError from inside of a step. A ValueError of the body means that it changed nothing.
        """
        self._check_open()
        return self._turn.visit(partial(self._between_steps, body))

    def close(self) -> None:
        """End every request with an error. The step in progress ends first."""
        if not self._closed:
            self._turn.visit(self._close)

    def _close(self) -> None:
        self._closed = "the model is closed; load it again"
        with contextlib.suppress(Exception):  # of a device that has failed
            self._begin()
        self._fail_all(ValueError(self._closed))
        if self._trace is not None:
            self._trace.finish()

    # ---- in a turn -----------------------------------------------------------------------------------------------------------
    def _step(self) -> bool:
        """Take in what was asked for and run one native call. False: there is nothing to run."""
        self._check_open()
        try:
            self._begin()
            worked = self._run()
        except EVERYBODYS as error:
            self._fail_all(error)
            raise
        self._dirty = False
        return worked

    def _between_steps(self, body: Callable[[], Any]) -> Any:
        self._check_open()
        try:
            self._begin()
        except EVERYBODYS as error:
            self._fail_all(error)
            raise
        try:
            result = body()
        except ValueError:
            self._dirty = False
            raise
        self._dirty = False
        return result

    def _begin(self) -> None:
        if self._dirty:
            self._recover()
        self._ends.settle()
        self._dirty = True
        self._drain()

    def _run(self) -> bool:
        began = time.perf_counter_ns()
        schedule = self._runner.ahead() or self._scheduler.schedule()
        scheduled = time.perf_counter_ns()
        preempted = [(sequence.request.number, len(sequence.tokens)) for sequence in schedule.preempted]
        self._preemptions += len(schedule.preempted)
        if schedule.preempted:
            self.caches.spill()  # a cache that nobody uses makes room before the next request has to
        if schedule.failed:
            self._fail(schedule.failed)
        if not schedule.entries:
            return bool(schedule.failed)
        ended = self._runner.run(schedule, self._go_ahead if self._scheduler.goes_ahead else None)
        self._scheduler.advance(schedule)
        self.meter.saw(self.used_blocks())
        if self._trace is not None:
            self._trace.took(schedule, began, time.perf_counter_ns())
        held_back, self._runner.held_back = self._runner.held_back, []
        for running in held_back:
            self._park(running)
        for running in ended:
            self._end(running)
        self._measure(schedule, began, scheduled, preempted)
        return True

    def _go_ahead(self, schedule: Schedule) -> Schedule | None:
        """What follows a schedule that is under way, unless somebody asks for something first."""
        if self._inbox or self._dropped or self._turn.awaited:
            return None
        return self._scheduler.ahead(schedule)

    def _measure(self, schedule: Schedule, began: int, scheduled: int, preempted: list[tuple[int, int]]) -> None:
        """Behind a step."""
        runner = self._runner
        times = StepTimes(began, scheduled, runner.prepared, runner.submitted, runner.done, time.perf_counter_ns())
        self.meter.step(times, len(schedule.entries), schedule.rows, runner.prompt_tokens, runner.generated_tokens)
        if self._trace is not None:
            self._trace.step(schedule, times, runner.launch_times, preempted)

    def _fail(self, sequences: list[Any]) -> None:
        """Sequences that got no blocks end, unless prompt caches make room: then they try again."""
        spilled = not all(sequence.lost for sequence in sequences) and self.caches.spill()
        for sequence in sequences:
            if sequence.lost or not spilled:
                what = f"the KV cache has too few free blocks for a sequence of {len(sequence.tokens)} tokens; load with a larger kv_memory"
                if sequence.lost:
                    what = "an interrupt lost the keys and values of a prompt cache whose tokens are not known; load the cache again"
                sequence.request.error = RuntimeError(what)
                self._end(sequence.request)

    def _recover(self) -> None:
        """A turn was left in the middle, by Ctrl-C for one: outputs and token lists are the truth, all else is built anew from them."""
        self._runner.drain()
        ended = [running for running in self._active.values() if running.restore()]
        self._scheduler.reset(self.caches.held())
        for running in ended:
            self._end(running)
        self._parked = []
        for running in list(self._active.values()):
            sequence = running.sequence
            if sequence.state is State.FINISHED:  # its end was interrupted
                self._finish(running)
            elif sequence not in self._scheduler or sequence.lost:
                self._enter(running)
            if running.done:
                continue
            if running.waits:
                self._park(running)
            else:
                self._scheduler.unpark(sequence)

    def _drain(self) -> None:
        inbox, dropped = self._inbox, self._dropped
        while inbox or dropped:
            if inbox:
                inbox[0]()
                inbox.popleft()
            else:
                dropped[0].message()
                dropped.popleft()
        if self._parked:
            self._unpark()
        if self._trace is not None and not self._active:
            self._trace.idle()

    def _add(self, running: RunningRequest) -> None:
        if id(running) not in self._active and not running.done:
            self._active[id(running)] = running
            self._enter(running)

    def _enter(self, running: RunningRequest) -> None:
        """Hand a request to the scheduler, with what its prompt cache has."""
        sequence = running.sequence
        if sequence not in self._scheduler:
            self.blocks.open(sequence)  # an interrupt may have left something there
            sequence.computed = 0
        try:
            if running.cache is not None:
                self.caches.lend(running.cache, sequence)
                sequence.lost = False
            if sequence not in self._scheduler:
                self._scheduler.add(sequence)
        except ValueError as error:
            running.error = error
            self.blocks.release(sequence)
            self._end(running)

    def _park(self, running: RunningRequest) -> None:
        self._scheduler.park(running.sequence)
        self._parked.append(running)

    def _unpark(self) -> None:
        """Let those go on whose callers have done what they waited for."""
        waiting = []
        for running in self._parked:
            if running.picked is not None and not running.done:
                self._take_pick(running, *running.picked)
            if running.done:
                continue
            if running.waits:
                waiting.append(running)
            else:
                self._scheduler.unpark(running.sequence)
        self._parked = waiting

    def _take_pick(self, running: RunningRequest, place: int, token: int) -> None:
        tokens = running.sequence.tokens
        if len(tokens) == place:  # else it is there already
            tokens.append(token)
            self._runner.generated_tokens += 1
            if running.finish_reason(token, len(tokens)):
                self._end(running)

    def _end(self, running: RunningRequest, how: str = "finished") -> None:
        """Give a request's blocks back, to its prompt cache if it has one. how: see Ends."""
        if id(running) in self._active and not running.done:
            if running.cache is not None and running.sequence in self._scheduler:
                self.caches.take_back(running.cache, running.sequence)
            self._scheduler.finish(running.sequence)
        self._finish(running, how)

    def _finish(self, running: RunningRequest, how: str = "finished") -> None:
        if id(running) in self._active:
            how = "failed" if running.error is not None else how
            self._ends.add(running.number, how)
            if self._trace is not None:
                self._trace.ended(running, how)
        running.done = True
        running.sequence.request = None  # they name each other: without this, its prompt cache would wait for Python's collector
        self._active.pop(id(running), None)

    def _give_up(self, running: RunningRequest) -> None:
        running.owner = None
        self._end(running, "cancelled")
        if running.cache is not None and not running.released:
            untaken = len(running.outputs) - running.taken
            self.caches.forget(running.cache, len(running.sequence.tokens) - untaken)
        self._release_cache(running)

    def _release_cache(self, running: RunningRequest) -> None:
        if running.cache is not None and not running.released:
            running.cache.in_use = False
            running.released = True

    def _fail_all(self, error: Exception) -> None:
        """Every request ends with `error`. What they held is given back when the next turn recovers."""
        self._dirty = True
        for running in list(self._active.values()):
            running.error = running.error or _copied(error)
            running.sequence.state = State.FINISHED
            self._finish(running)

    # ---- both --------------------------------------------------------------------------------------------------------------
    def _check_open(self) -> None:
        if self._closed:
            raise ValueError(self._closed)

    def _after_fork(self) -> None:
        self._closed = "this process was forked after the model was loaded; load the model in the process that uses it"
        self._turn = Turn()
        self._trace = None
        self.native.abandon()


def _copied(error: Exception) -> Exception:
    """For another thread to raise: each adds its own traceback."""
    try:
        other = copy.copy(error)
    except Exception:  # a class with a constructor of its own
        other = RuntimeError(f"{type(error).__name__}: {error}")
    other.__cause__ = error.__cause__
    return other


def _after_fork() -> None:
    for engine in list(_ENGINES):
        engine._after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
