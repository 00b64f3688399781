"""An engine whose keys and values are fingerprints of what they depend on, so that a wrong block is seen at once."""
from dataclasses import dataclass, field

from metalstep.scheduler import BlockTables, KVBlocks, Schedule, Scheduler, Sequence, State

STOP = 2  # the other tokens are 0 and 1: few, so that requests share prefixes


@dataclass(eq=False)
class Request:
    """What the engine knows of a sequence. prints[i]: the fingerprint of position i, which depends on all tokens up to it."""

    root: tuple[int, int, int]  # differs where equal tokens give other keys and values
    base: int = 0  # positions that tokens do not give again
    parks: bool = False
    prints: list[int] = field(default_factory=list)
    prompt_rows: set[int] = field(default_factory=set)  # with prompt_logprobs: rows that gave a result
    pending: int | None = None  # token that the caller picks
    outcome: str = ""


def extend_prints(prints, root, tokens):
    for i in range(len(prints), len(tokens)):
        prints.append(hash((prints[-1] if i else root, tokens[i])))


def next_token(fingerprint):
    return STOP if fingerprint % 61 == 0 else fingerprint % 2


def reference(root, tokens, total):
    """Tokens of the whole request, computed alone."""
    tokens, prints = list(tokens), []
    while len(tokens) < total:
        extend_prints(prints, root, tokens)
        tokens.append(next_token(prints[-1]))
        if tokens[-1] == STOP:
            break
    return tokens


class SimulatedEngine:
    """Steps a Scheduler over cells keyed by (group, block, offset), and holds every law that a step must keep."""

    def __init__(self, blocks: KVBlocks, **limits):
        self.blocks = blocks
        self.scheduler = Scheduler(blocks, on_evict=self.save, **limits)
        self.cells: dict[tuple[int, int, int], int] = {}
        self.live: list[Sequence] = []
        self.done: list[Sequence] = []
        self.caches: list[tuple[BlockTables, list[int], int]] = []
        self.last_first_admitted = -1
        self.seen: set[Sequence] = set()
        self.steps = 0
        # What the device runs already, what it will have given, and each sequence's tokens behind that.
        self.ahead: tuple[Schedule, dict[Sequence, list[int]], dict[Sequence, list[int]]] | None = None

    # ---- requests -------------------------------------------------------------------------------------------------------
    def add(self, tokens, new_tokens, *, root=0, parks=False, source=None, **options):
        """A request of its own, or one that continues the first `source[1]` tokens of the prompt cache source[0]."""
        recomputable = options.get("recomputable", True)
        root = (root, options.get("window", 0), options.get("keep", 0)) if recomputable else (root, 0, 0)
        request = Request(root, parks=parks, base=0 if recomputable else source[1])
        sequence = Sequence(
            tokens=list(tokens), prompt_len=len(tokens), max_tokens_total=len(tokens) + new_tokens, request=request, **options
        )
        extend_prints(request.prints, root, sequence.tokens)
        if source is not None:
            self.blocks.fork(source[0], sequence, source[1])
        self.live.append(sequence)
        self.scheduler.add(sequence)
        return sequence

    def end(self, sequence, outcome):
        self.scheduler.finish(sequence)
        sequence.request.outcome = outcome
        self.live.remove(sequence)
        self.done.append(sequence)

    def pick(self, sequence):
        """The caller of a parked sequence has picked its token."""
        token, sequence.request.pending = sequence.request.pending, None
        sequence.tokens.append(token)
        extend_prints(sequence.request.prints, sequence.request.root, sequence.tokens)
        self.scheduler.unpark(sequence)
        if token == STOP or len(sequence.tokens) >= sequence.max_tokens_total:
            self.end(sequence, "finished")

    # ---- prompt caches --------------------------------------------------------------------------------------------------
    def keep(self, sequence):
        """A prompt cache of what a sequence has computed."""
        cache = BlockTables(window=sequence.window, keep=sequence.keep)
        self.blocks.fork(sequence, cache)
        self.caches.append((cache, sequence.tokens[: cache.computed], sequence.request.root[0]))

    def load(self, tokens, root):
        """A prompt cache whose content comes from elsewhere: not what these tokens give."""
        cache = BlockTables()
        self.blocks.open(cache)
        if self.blocks.reserve(cache, min(len(tokens), self.blocks.max_rows)):
            tokens = tokens[: cache.room]
            cache.computed = len(tokens)
            prints = []
            extend_prints(prints, (root, 0, 0), tokens)
            for group in range(len(self.blocks.groups)):
                for position, value in enumerate(prints):
                    self.cells[self.cell(cache, group, position)] = value
            self.caches.append((cache, tokens, root))

    def drop(self, index):
        self.blocks.release(self.caches.pop(index)[0])

    def held(self):
        return [cache for cache, _, _ in self.caches]

    def save(self, sequence):
        """on_evict: what its blocks hold, as a snapshot."""
        size = self.blocks.block_size
        return [
            [[self.cells.get((group, block, i)) for i in range(size)] for block in self.blocks.filled(sequence, group)]
            for group in range(len(self.blocks.groups))
        ]

    # ---- a step ---------------------------------------------------------------------------------------------------------
    def step(self, act=lambda stage: None):
        """One turn. `act` is called between its stages and may raise."""
        ahead, self.ahead = self.ahead, None
        if ahead is not None:
            schedule, sampled, fed = ahead
            if any(entry.sequence in self.live for entry in schedule.entries):
                self.steps += 1
                self.go_ahead(schedule, act, fed)
                schedule.entries = [entry for entry in schedule.entries if entry.sequence in self.live]
                self.finish(schedule, sampled, act)
                return schedule
        waiting = [s for s in self.scheduler.waiting if not s.lost]
        schedule = self.scheduler.schedule()
        self.steps += 1
        self.check_order(schedule, waiting)
        act("scheduled")
        for sequence in schedule.failed:
            self.end(sequence, "failed")
        size = self.blocks.block_size
        for sequence in schedule.restored:
            for group, content in enumerate(sequence.snapshot):
                for block, values in zip(self.blocks.filled(sequence, group), content, strict=True):
                    self.cells.update({(group, block, i): value for i, value in enumerate(values)})
        for group, source, target in schedule.copies:
            for i in range(size):
                self.cells[group, target, i] = self.cells.get((group, source, i))
        fed = {entry.sequence: list(entry.sequence.tokens) for entry in schedule.entries}
        sampled = self.run(schedule, act, fed)
        self.go_ahead(schedule, act, fed)
        self.finish(schedule, sampled, act)
        return schedule

    def go_ahead(self, schedule, act, fed):
        """Run what follows a schedule that nobody has looked at yet: the device is done with it before anybody does."""
        if self.scheduler.goes_ahead and not any(entry.sequence.request.parks for entry in schedule.entries):
            following = self.scheduler.ahead(schedule)
            if following is not None:
                self.ahead = following, self.run(following, act, fed), fed

    def finish(self, schedule, sampled, act):
        """The results of a run."""
        for entry in schedule.entries:
            self.take(entry, sampled.get(entry.sequence, []))
        act("appended")
        self.scheduler.advance(schedule)
        act("advanced")
        for entry in schedule.entries:
            sequence = entry.sequence
            if sequence in self.live and self.ended(sequence):
                self.end(sequence, "finished")

    def run(self, schedule, act, fed):
        """Write, read back, sample: `steps` times, and on past the end of a sequence, as a device does that learns of it late.

        fed: each sequence's tokens as the device has them.
        """
        prints = {e.sequence: list(e.sequence.request.prints) for e in schedule.entries}
        sampled: dict[Sequence, list[int]] = {}
        for k in range(schedule.steps):
            rows = []
            for entry in schedule.entries:
                first = min(entry.first + k, entry.limit - 1) if schedule.steps > 1 else entry.first
                rows.append((entry, first, first + entry.count, entry.first + k < entry.limit or schedule.steps == 1))
            for entry, first, last, writes in rows:
                sequence = entry.sequence
                extend_prints(prints[sequence], sequence.request.root, fed[sequence])
                assert first >= sequence.request.base, "what tokens do not give again is computed from tokens"
                for position in range(first, last) if writes else ():
                    for group in range(len(self.blocks.groups)):
                        self.cells[self.cell(sequence, group, position)] = prints[sequence][position]
            act("written")
            for entry, first, last, writes in rows:
                sequence = entry.sequence
                for position in {first, last - 1} if writes else ():
                    self.check_row(sequence, position, prints[sequence])
                if entry.samples and writes:
                    token = next_token(prints[sequence][last - 1])
                    fed[sequence].append(token)
                    sampled.setdefault(sequence, []).append(token)
        return sampled

    def take(self, entry, sampled):
        sequence, request = entry.sequence, entry.sequence.request
        assert entry.samples == (entry.first + entry.count == len(sequence.tokens))
        if sequence.prompt_logprobs:
            rows = set(range(entry.first + entry.count - entry.wanted, entry.first + entry.count)) & set(range(sequence.prompt_len))
            request.prompt_rows |= rows
        for token in sampled:
            if request.parks:
                request.pending = token
                self.scheduler.park(sequence)
            elif not self.ended(sequence):
                sequence.tokens.append(token)
        extend_prints(request.prints, request.root, sequence.tokens)

    @staticmethod
    def ended(sequence):
        generated = sequence.tokens[sequence.prompt_len :]
        return STOP in generated or len(sequence.tokens) >= sequence.max_tokens_total

    def cell(self, tables, group, position):
        index, offset = divmod(position, self.blocks.block_size)
        assert not tables.gone(group, index), f"position {position} is written to a block that was given back"
        return group, tables.tables[group][index], offset

    # ---- laws -----------------------------------------------------------------------------------------------------------
    def check_row(self, sequence, position, prints):
        """Reading the tables back gives this sequence's own content at every position that the row sees."""
        for group, spec in enumerate(self.blocks.groups):
            for seen in range(position + 1):
                if spec.window is not None and seen <= position - spec.window:
                    continue
                if sequence.window and sequence.keep <= seen <= position - (sequence.window - sequence.keep):
                    continue
                assert self.cells.get(self.cell(sequence, group, seen)) == prints[seen], f"position {seen} reads another's content"

    def check_order(self, schedule, waiting):
        scheduler, entries = self.scheduler, schedule.entries
        in_step = {entry.sequence for entry in entries}
        assert len(in_step) == len(entries), "a sequence is in the step twice"
        assert schedule.rows == sum(e.count for e in entries) <= scheduler.max_rows
        assert schedule.results == sum(e.wanted for e in entries) <= scheduler.max_results
        work = [s for s in scheduler.running if not s.parked]
        for sequence in work:
            plain = len(sequence.tokens) - sequence.computed == 1 and not sequence.prompt_logprobs
            assert not plain or sequence in in_step, "a decode has no row"
        assert not work or work[0] in in_step, "the oldest that runs has no row"
        assert entries or schedule.failed or scheduler.idle, "nothing is scheduled though there is work"
        assert self.caches or all(s.lost for s in schedule.failed), "a request fails though no prompt cache holds blocks"
        for entry in entries:
            sequence = entry.sequence
            assert 1 <= entry.count <= max(1, sequence.prefill_rows) and entry.first == sequence.computed
            assert sequence.state is State.RUNNING and not sequence.parked
            assert entry.first + entry.count <= entry.limit <= sequence.max_tokens_total
            assert entry.first + entry.count <= min(map(len, sequence.tables)) * self.blocks.block_size
            if schedule.steps > 1:
                assert entry.count == 1 and schedule.steps <= (sequence.decode_steps or 1)
        left = [s.arrival for s in waiting if not s.parked and s not in schedule.admitted and s not in schedule.failed]
        assert not left or all(s.arrival < min(left) for s in schedule.admitted), "a later request overtakes"
        for sequence in schedule.admitted:
            if sequence not in self.seen:
                assert sequence.arrival > self.last_first_admitted, "requests are not admitted in their order"
                self.last_first_admitted = sequence.arrival
                self.seen.add(sequence)

    def check(self):
        self.scheduler.check(self.held())

    def check_finished(self, sequence):
        request = sequence.request
        prompt = sequence.tokens[: sequence.prompt_len]
        assert sequence.tokens == reference(request.root, prompt, sequence.max_tokens_total)
        if sequence.prompt_logprobs:
            assert request.prompt_rows == set(range(sequence.prompt_len)), "a row of the prompt gave no result"
