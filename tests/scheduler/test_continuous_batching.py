"""Random arrivals, cancels, parks, prompt caches and interrupts: every request ends with the tokens it would have alone."""
import sys
from contextlib import contextmanager, suppress

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from simulated_engine import SimulatedEngine

import metalstep.scheduler
from metalstep.scheduler import GroupSpec, KVBlocks, Sequence, State

FOLDER = metalstep.scheduler.__path__[0]
SMALL = st.integers(0, 2)
ELSEWHERE = 1  # root of prompt caches that no tokens give
STAGES = ["scheduled", "written", "appended", "advanced"]
PROMPTS = st.one_of(
    st.lists(SMALL, min_size=1, max_size=24),
    st.tuples(st.integers(4, 24), st.lists(SMALL, max_size=3)).map(lambda p: ([0, 1] * 12)[: p[0]] + p[1]),  # with common prefixes
)
REQUESTS = st.fixed_dictionaries(
    {
        "tokens": PROMPTS,
        "new_tokens": st.integers(1, 40),
        "window": st.sampled_from([(0, 0)] * 4 + [(6, 0), (9, 2), (8, 5)]),
        "flag": st.sampled_from(["", "", "", "parks", "prompt_logprobs", "uncacheable"]),
        "prefill_rows": st.integers(1, 10),
        "decode_steps": st.sampled_from([None, None, 2]),
    }
)


@contextmanager
def interrupt(after):
    """A KeyboardInterrupt before the `after`-th bytecode of the scheduler's package; 0: none."""
    left = after

    def trace(frame, event, argument):
        nonlocal left
        if not frame.f_code.co_filename.startswith(FOLDER):
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
        return trace

    previous = sys.gettrace()
    sys._getframe().f_trace_opcodes = True  # Python 3.12 traces bytecodes only if a frame asked for it before settrace
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(previous)


class ContinuousBatching(RuleBasedStateMachine):
    @initialize(
        blocks=st.integers(6, 24),
        windows=st.sampled_from([(None,), (None,), (None, 6), (5,), (1, None, 9)]),
        max_seqs=st.sampled_from([1, 3, 4, 5]),
        rows=st.integers(0, 12),
        results=st.integers(0, 4),
        steps=st.sampled_from([1, 1, 3, 8]),
        ahead=st.booleans(),
    )
    def start(self, blocks, windows, max_seqs, rows, results, steps, ahead):
        groups = [GroupSpec(window, blocks) for window in windows]
        limits = dict(max_seqs=max_seqs, max_rows=max_seqs + rows, max_results=max_seqs + results, decode_steps=steps)
        self.engine = SimulatedEngine(KVBlocks(groups, 4, max(2, steps, max_seqs + rows)), goes_ahead=ahead, **limits)
        self.tokens = 0

    def add(self, tokens, new_tokens, **options):
        blocks = self.engine.blocks
        probe = Sequence(tokens=[], prompt_len=0, max_tokens_total=0, window=options.get("window", 0), keep=options.get("keep", 0))
        if blocks.fits(probe, len(tokens) + new_tokens):
            self.engine.add(tokens, new_tokens, **options)
            self.tokens += len(tokens) + new_tokens

    @rule(requests=st.lists(REQUESTS, min_size=1, max_size=4))
    def arrive(self, requests):
        for request in requests:
            (window, keep), flag = request["window"], request["flag"]
            self.add(
                request["tokens"], request["new_tokens"], window=window, keep=keep, prefill_rows=request["prefill_rows"],
                parks=flag == "parks", prompt_logprobs=flag == "prompt_logprobs", cacheable=flag != "uncacheable",
                decode_steps=1 if flag == "parks" else request["decode_steps"],
            )  # fmt: skip

    @rule(times=st.integers(1, 20))
    def steps(self, times):
        for _ in range(times):
            self.engine.step()
            self.engine.check()

    @precondition(lambda self: self.engine.live)
    @rule(data=st.data())
    def cancel(self, data):
        self.engine.end(data.draw(st.sampled_from(self.engine.live)), "cancelled")

    @rule(data=st.data())
    def pick(self, data):
        parked = [s for s in self.engine.live if s.parked]
        if parked:
            self.engine.pick(data.draw(st.sampled_from(parked)))

    @rule(data=st.data())
    def keep_prompt_cache(self, data):
        computed = [s for s in self.engine.scheduler.running if s.computed and s.recomputable]
        if computed and len(self.engine.caches) < 2:
            self.engine.keep(data.draw(st.sampled_from(computed)))

    @rule(tokens=st.lists(SMALL, min_size=1, max_size=20))
    def load_prompt_cache(self, tokens):
        if len(self.engine.caches) < 2:
            self.engine.load(tokens, ELSEWHERE)

    @rule(data=st.data(), more=st.lists(SMALL, min_size=1, max_size=6), new_tokens=st.integers(1, 10), window=st.sampled_from([0, 7]))
    def continue_prompt_cache(self, data, more, new_tokens, window):
        if self.engine.caches:
            cache, tokens, root = data.draw(st.sampled_from(self.engine.caches))
            length = data.draw(st.integers(1, len(tokens)))
            own = root != ELSEWHERE
            window = (cache.window, cache.keep) if own else (window, 0)
            probe = Sequence(tokens=[], prompt_len=0, max_tokens_total=0, window=window[0], keep=window[1])
            if (own or not window[0] or length <= window[0]) and self.engine.blocks.can_continue(cache, probe, length):
                self.add(
                    tokens[:length] + more, new_tokens, window=window[0], keep=window[1], root=root,
                    source=(cache, length), cacheable=own, recomputable=own,
                )  # fmt: skip

    @precondition(lambda self: self.engine.caches)
    @rule(data=st.data())
    def drop_prompt_cache(self, data):
        self.engine.drop(data.draw(st.integers(0, len(self.engine.caches) - 1)))

    @rule(stage=st.sampled_from([*STAGES, "anywhere", "anywhere"]), after=st.integers(1, 2500), again=st.integers(1, 600))
    def interrupted_step(self, stage, after, again):
        """A KeyboardInterrupt out of a step: between its stages, or between any two bytecodes, and then in reset too."""

        def act(at):
            if at == stage:
                raise KeyboardInterrupt

        try:
            with interrupt(after if stage == "anywhere" else 0):
                self.engine.step(act)
        except KeyboardInterrupt:
            with suppress(KeyboardInterrupt), interrupt(again):
                self.engine.scheduler.reset(self.engine.held())
            self.recover()

    def recover(self):
        engine = self.engine
        engine.ahead = None
        engine.scheduler.reset(engine.held())
        engine.check()
        for sequence in list(engine.live):
            if engine.ended(sequence):
                engine.end(sequence, "finished")
            elif sequence.lost or sequence.state is State.FINISHED:  # the interrupt came while a failed one was finished
                engine.end(sequence, "failed")
            elif sequence.parked and sequence.request.pending is None:
                engine.scheduler.unpark(sequence)

    @invariant()
    def nothing_leaks(self):
        if hasattr(self, "engine"):
            self.engine.check()

    def teardown(self):
        """With callers that answer at once, everything ends in a bounded number of steps, and the pools are free again."""
        if not hasattr(self, "engine"):
            return
        engine = self.engine
        bound = engine.steps + 20 + 8 * self.tokens
        while engine.live:
            for sequence in [s for s in engine.live if s.parked]:
                engine.pick(sequence)
            if engine.live:
                engine.step()
                engine.check()
            assert engine.steps < bound, "requests do not end"
        for sequence in engine.done:
            if sequence.request.outcome == "finished":
                engine.check_finished(sequence)
        while engine.caches:
            engine.drop(0)
        assert engine.blocks.free_counts() == [group.num_blocks for group in engine.blocks.groups]


ContinuousBatching.TestCase.settings = settings(
    max_examples=80, stateful_step_count=40, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much]
)
TestContinuousBatching = ContinuousBatching.TestCase
