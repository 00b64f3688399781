"""Engines that take turns: who is measured, on what, in which order."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metalstep import kv_scheme
from metalstep.bench.peers import Peer, is_gpu, model_for, peers_python
from metalstep.bench.prompts import Prompts
from metalstep.bench.subject import Subject
from metalstep.checkpoint import open_checkpoint
from metalstep.choices import KV_DTYPES

SAMPLED, INVARIANT = "sampled", "invariant"
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Contender:
    """An engine with one choice of its settings. setting: that choice in words; empty where there is none to make. variant: of the model
    as metalstep has loaded it, in a process of its own."""

    engine: str
    setting: str = ""
    settings: tuple[tuple[str, Any], ...] = ()
    variant: str = ""

    @property
    def name(self) -> str:
        return f"{self.engine}, {self.setting}" if self.setting else self.engine

    @property
    def process(self) -> str:
        """The name of the process that it runs in."""
        return f"{self.engine}, {self.variant}" if self.variant else self.engine


@dataclass(frozen=True)
class Case:
    """`batch` prompts of `prompt` tokens each, decoded together for `tokens` tokens behind their first."""

    batch: int
    prompt: int
    tokens: int

    @property
    def positions(self) -> int:
        """Tokens of one sequence at its end."""
        return self.prompt + self.tokens + 1

    @property
    def name(self) -> str:
        return f"{self.batch} × {self.prompt} tokens"


Runs = dict[tuple[Case, Contender], list[dict[str, Any]]]


def contenders(
    engines: Sequence[str],
    *,
    decode_steps: int = 1,
    ubatches: Sequence[int] = (512,),
    call: str = "steps",
    also: Sequence[str] = (),
) -> list[Contender]:
    """The engines, llama.cpp once per choice: flash attention on and off, and how many rows it computes at once.

    Which is the better depends on the machine; a ratio takes the better one of a run. call: steps or batch_generate, of metalstep. also:
    metalstep once more with each of these, "sampled" (worker.SAMPLED) or what `variant_options` knows.
    """
    out = []
    for engine in engines:
        if engine == "llama.cpp":
            for flash in (True, False):
                for ubatch in ubatches:
                    words = f"flash {'on' if flash else 'off'}" + (f", ubatch {ubatch}" if len(ubatches) > 1 else "")
                    out.append(Contender(engine, words, (("flash_attention", flash), ("ubatch", ubatch))))
        elif engine == "metalstep":
            common: tuple[tuple[str, Any], ...] = (("call", call),) if call != "steps" else ()
            steps = f"{decode_steps} steps" if decode_steps > 1 else ""
            common += (("decode_steps", decode_steps),) if steps else ()
            out.append(Contender(engine, steps, common))
            for name in also:
                words = ", ".join(filter(None, [steps, name]))
                sampled = name == SAMPLED
                out.append(Contender(engine, words, (*common, ("sampled", True)) if sampled else common, "" if sampled else name))
        else:
            out.append(Contender(engine))
    return out


def variant_options(name: str) -> dict[str, Any]:
    """What metalstep loads with for a variant: "invariant", a type of the KV cache, or a KV scheme. Raises: ValueError."""
    if name == INVARIANT:
        return {"batch_invariant": True}
    if name in KV_DTYPES:
        return {"kv_dtype": name}
    kv_scheme.parse(name)
    return {"kv_scheme": name}


def turns(order: Sequence[Contender], round_number: int) -> Sequence[Contender]:
    """Every other round runs backwards: none is always the one behind a hot or a cold neighbour."""
    return order if round_number % 2 else order[::-1]


def alternate(
    measure: Callable[[Contender, list[list[int]], Case], dict[str, Any]],
    prompts: Prompts,
    cases: Sequence[Case],
    field: Callable[[Case], Sequence[Contender]],
    pairs: int,
    progress: Progress,
    *,
    seconds: float | None = None,
    measured: Callable[[Case, Contender, dict[str, Any]], None] = lambda *_: None,
) -> Runs:
    """`pairs` rounds, in each every case, in each every contender of `field(case)` on the same prompts, fresh ones each time; metalstep's
    further contenders in one process get prompts of their own.

    A round before the first is not counted: much is compiled in it. seconds, from its end: a case does not begin another round that would
    end later, if the one before is a guide; a case without a round that counts is not in the result. measured: told of each run that
    counts.
    """
    runs: Runs = {(case, contender): [] for case in cases for contender in field(case)}
    began = time.monotonic()
    took = dict.fromkeys(cases, 0.0)
    for round_number in range(pairs + 1):
        if round_number == 1:
            began = time.monotonic()
        for case in cases:
            before = time.monotonic()
            # The second round says how long one takes without a compiler.
            if round_number > 1 and seconds is not None and before - began + took[case] > seconds:
                continue
            texts = prompts.take(case.batch, case.prompt)
            order = turns(field(case), round_number)
            for place, contender in enumerate(order):
                progress(f"round {round_number} of {pairs}: {contender.name}, {case.name}")
                # One process has a prompt in its prefix cache once it has seen it.
                known = contender.engine == "metalstep" and any(contender.process == before.process for before in order[:place])
                result = measure(contender, prompts.take(case.batch, case.prompt) if known else texts, case)
                if round_number:
                    runs[case, contender].append(result)
                    measured(case, contender, result)
            took[case] = time.monotonic() - before
    return {entry: samples for entry, samples in runs.items() if samples}


@dataclass(frozen=True)
class Workers:
    """The engines' processes by name, and prompts of the model's tokens."""

    peers: dict[str, Peer]
    prompts: Prompts

    def measure(self, contender: Contender, prompts: list[list[int]], case: Case) -> dict[str, Any]:
        return self.peers[contender.process].measure(prompts, case.tokens, dict(contender.settings))

    def device_steps(self, case: Case) -> list[float]:
        """Seconds of metalstep's step in this case on the device alone."""
        return self.peers["metalstep"].device_steps(self.prompts.take(case.batch, case.prompt), case.tokens)

    def head_of(self, contender: Contender) -> dict[str, Any]:
        """What its process says of itself."""
        return self.peers[contender.process].head

    @property
    def heads(self) -> list[dict[str, Any]]:
        """What each engine says of itself; metalstep's first."""
        return [peer.head for name, peer in self.peers.items() if name == peer.name]


@contextmanager
def workers(
    subject: Subject,
    engines: Sequence[str],
    *,
    max_context: int,
    threads: int,
    options: dict[str, Any],
    peers_path: str | None,
    progress: Progress,
    variants: Mapping[str, dict[str, Any]] | None = None,
) -> Iterator[Workers]:
    """Start a process per engine. options: what metalstep loads with. variants: by name, what it loads with in processes beside that one,
    besides `options`. Raises: PeerError for one that cannot be started."""
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="metalstep-bench-")))
        pythons = {engine: peers_python(engine, peers_path) for engine in engines}
        checkpoint = open_checkpoint(subject.model)
        stack.callback(checkpoint.close)
        prompts = Prompts.of(checkpoint.tokenizer(None))
        peers: dict[str, Peer] = {}

        def start(name: str, engine: str, own: dict[str, Any]) -> None:
            path = model_for(engine, checkpoint, subject.model, scratch, device=options.get("device"))
            peers[name] = Peer(engine, pythons[engine], path, threads, max_context, own)
            stack.callback(peers[name].close)
            if not is_gpu(options.get("device")):  # on a processor they would slow each other down
                wait(name)

        def wait(name: str) -> None:
            progress(f"loading {name}")
            peers[name].wait()

        for engine in engines:
            start(engine, engine, options if engine == "metalstep" else {})
        for variant, own in (variants or {}).items():
            start(Contender("metalstep", variant=variant).process, "metalstep", {**options, **own})
        for name in peers:
            wait(name)
        yield Workers(peers, prompts)
