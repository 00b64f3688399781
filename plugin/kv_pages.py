"""How layers' caches lie in the pages that vLLM hands out: all of one size, each with one block of tokens of every layer of a part.

vLLM counts a page's bytes and nothing else, so a part is told to it as one layer that has them all: sums stay exact where layers have
different codecs, and no page is rounded up or put together with others in a way that the engine does not know.
"""
from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from metalstep.explain import codec_runs
from metalstep.kv_cache import CacheGroup, LayerShape
from metalstep.kv_plane import BLOCK_SIZE

Counts = Counter[LayerShape]  # layers by what they store


@dataclass(frozen=True)
class Pages:
    """parts: groups of layers with a block table each; a page holds a block of any one of them. token_bytes: of a page, per token.
    longest: of a sequence, in tokens. longest_bytes: that it takes, with all padding."""

    parts: list[CacheGroup]
    token_bytes: int
    longest: int
    longest_bytes: int

    @property
    def used(self) -> float:
        """The part of the pages' bytes that layers store in, where every part has as many."""
        return sum(part.token_bytes for part in self.parts) / (len(self.parts) * self.token_bytes)


def divide(groups: Sequence[CacheGroup], *, context: int, in_flight: int) -> Pages:
    """The division in which the longest sequence takes the fewest bytes; of equal ones, that with the fewest parts.

    Layers that see everything and layers with windows need different numbers of blocks, out of one pool: a page is as large as the
    largest part. The group that is cheapest in one part stays whole, as vLLM puts parts together where there are several of each sort.
    context: tokens of the longest sequence. in_flight: tokens of one that are computed at once.
    """
    if not groups:
        return Pages([], 0, context, 0)  # a model of states alone
    kept = [context if group.window is None else min(context, group.window - 1 + in_flight + BLOCK_SIZE) for group in groups]
    kinds = [Counter(map(stored, group.layers.values())) for group in groups]
    best: tuple[int, int, tuple[int, ...]] | None = None
    for numbers in itertools.product(*(range(1, len(group.layers) + 1) for group in groups)):
        if min(numbers) == 1:
            cost = page_bytes(kinds, numbers) * sum(n * tokens for n, tokens in zip(numbers, kept, strict=True))
            best = min(best or (cost, sum(numbers), numbers), (cost, sum(numbers), numbers))
    assert best is not None
    parts = [part for group, number in zip(groups, best[2], strict=True) for part in _deal(group, number)]
    return Pages(parts, page_bytes(kinds, best[2]), context, best[0])


def page_bytes(kinds: Sequence[Counts], numbers: Sequence[int]) -> int:
    """Per token. Planes of one sort of vectors are shared between parts, those of different sorts are not (PagedKVCache, one_pool)."""
    sorts = set().union(*kinds)
    return sum(sort.token_bytes * max(math.ceil(kind[sort] / n) for kind, n in zip(kinds, numbers, strict=True)) for sort in sorts)


def stored(shape: LayerShape) -> LayerShape:
    """What layers have in common that can take turns in the same planes."""
    return replace(shape, shiftable=True)


def _deal(group: CacheGroup, number: int) -> list[CacheGroup]:
    """`number` parts of a group, each with its share of every sort of layers, in the model's order."""
    sorts = list(dict.fromkeys(map(stored, group.layers.values())))
    by_sort = sorted(group.layers, key=lambda layer: sorts.index(stored(group.layers[layer])))
    place = {layer: i % number for i, layer in enumerate(by_sort)}
    return [CacheGroup(group.window, {layer: shape for layer, shape in group.layers.items() if place[layer] == i}) for i in range(number)]


def part_name(part: CacheGroup) -> str:
    """What vLLM knows it by: a name of its own for each."""
    first, count = next(iter(part.layers)), len(part.layers)
    return f"layers.{first}" + (f"+{count - 1}" if count > 1 else "")


def cache_lines(cache: dict[str, Any], pages: Pages, plain: Pages) -> list[str]:
    """For the log: what explain_cache says, and what the pages are. plain: those that float16 would have."""
    lines = [
        f"KV cache {cache['effective']}: {cache['bytes_per_token']:,} bytes per token, {cache['capacity']:.2f} times the tokens of float16 "
        f"({'; '.join(codec_runs(cache))})"
    ]
    if cache["scheme"] != "none" and cache["keys_can_be_centred"]:
        layers = cache["centred_layers"]
        lines.append(
            f"KV cache: keys of {layers} layers are centred"
            if layers
            else "KV cache: keys are not centred; `metalstep calibrate` measures by what, once for a model"
        )
    if len(pages.parts) > 1:
        lines.append(
            f"KV cache: {len(pages.parts)} parts of the layers take turns in pages of {pages.token_bytes:,} bytes per token, "
            f"{100 * (1 - pages.used):.0f} % of them padding: {pages.longest:,} tokens of a sequence take {pages.longest_bytes:,} bytes, "
            f"{plain.longest_bytes / pages.longest_bytes:.2f} times as many tokens fit as with float16"
        )
    return lines
