"""Engines that take turns: who is measured, on what, in which order."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metalstep.bench.peers import Peer, model_for, peers_python
from metalstep.bench.prompts import Prompts
from metalstep.checkpoint import open_checkpoint

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Contender:
    """An engine with one choice of its settings. setting: that choice in words; empty where there is none to make."""

    engine: str
    setting: str = ""
    settings: tuple[tuple[str, Any], ...] = ()

    @property
    def name(self) -> str:
        return f"{self.engine}, {self.setting}" if self.setting else self.engine


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


Runs = dict[tuple[Case, Contender], list[dict[str, Any]]]


def contenders(engines: Sequence[str], *, decode_steps: int = 1, ubatches: Sequence[int] = (512,)) -> list[Contender]:
    """The engines, llama.cpp once per choice: flash attention on and off, and how many rows it computes at once.

    Which is the better depends on the machine; a ratio takes the better one of a run.
    """
    out = []
    for engine in engines:
        if engine == "llama.cpp":
            for flash in (True, False):
                for ubatch in ubatches:
                    words = f"flash {'on' if flash else 'off'}" + (f", ubatch {ubatch}" if len(ubatches) > 1 else "")
                    out.append(Contender(engine, words, (("flash_attention", flash), ("ubatch", ubatch))))
        elif engine == "metalstep" and decode_steps > 1:
            out.append(Contender(engine, f"{decode_steps} steps", (("decode_steps", decode_steps),)))
        else:
            out.append(Contender(engine))
    return out


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
) -> Runs:
    """`pairs` rounds, in each every case, in each every contender of `field(case)` on the same prompts, fresh ones each time.

    A round before the first is not counted.
    """
    runs: Runs = {(case, contender): [] for case in cases for contender in field(case)}
    for round_number in range(pairs + 1):
        for case in cases:
            texts = prompts.take(case.batch, case.prompt)
            for contender in turns(field(case), round_number):
                progress(f"round {round_number} of {pairs}: {contender.name}, {case.batch} × {case.prompt} tokens")
                result = measure(contender, texts, case)
                if round_number:
                    runs[case, contender].append(result)
    return runs


@dataclass(frozen=True)
class Workers:
    """The engines' processes by name, and prompts of the model's tokens."""

    peers: dict[str, Peer]
    prompts: Prompts

    def measure(self, contender: Contender, prompts: list[list[int]], case: Case) -> dict[str, Any]:
        return self.peers[contender.engine].measure(prompts, case.tokens, dict(contender.settings))

    @property
    def heads(self) -> list[dict[str, Any]]:
        """What each says of itself; metalstep's first."""
        return [peer.head for peer in self.peers.values()]


@contextmanager
def workers(
    model: str,
    engines: Sequence[str],
    *,
    max_context: int,
    threads: int,
    options: dict[str, Any],
    peers_path: str | None,
    progress: Progress,
) -> Iterator[Workers]:
    """Start a process per engine. options: what metalstep loads with. Raises: PeerError for one that cannot be started."""
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="metalstep-bench-")))
        pythons = {engine: peers_python(engine, peers_path) for engine in engines}
        checkpoint = open_checkpoint(model)
        stack.callback(checkpoint.close)
        prompts = Prompts.of(checkpoint.tokenizer(None))
        peers = {}
        for engine in engines:
            progress(f"loading {engine}")
            path = model_for(engine, checkpoint, model, scratch)
            own = options if engine == "metalstep" else {}
            peers[engine] = Peer(engine, pythons[engine], path, threads, max_context, own)
            stack.callback(peers[engine].close)
        yield Workers(peers, prompts)
