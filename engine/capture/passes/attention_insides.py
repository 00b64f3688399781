"""Attention insides: what a decode row's queries and new keys go through before attention is done inside of its launch."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from metalstep.capture.graph import Graph, Node, Value
from metalstep.capture.passes.fuse import fuse
from metalstep.capture.passes.kinds import is_contiguous, root, row_part, row_shape, row_size, row_strides


@dataclass(frozen=True)
class Path:
    """A row of heads on its way from `source` (a part of a stored row) into attention: at most a norm per head, then a rotation."""

    source: Value
    norm: Node | None
    rope: Node | None


@dataclass(frozen=True)
class Inside:
    """What happens to a layer's new row; see kernels/gpu/attention.py."""

    q: Path
    k: Path
    v: Path


def attention_insides(graph: Graph) -> Graph:
    """Saves a launch per layer (q and k norms, rotations, cache write) where each row of a step is the newest of its own sequence."""
    uses = graph.uses()
    for node in [n for n in graph.nodes if n.op == "attention"]:
        before = {root(v).node for v in node.inputs if root(v).node and root(v).node.op == "row_program"}  # type: ignore[union-attr]
        if len(before) != 1:
            continue
        (program,) = before
        assert program is not None
        if all(_reads_only(v, node, uses) for v in program.outputs) and find_inside([*program.parts, node]) is not None:
            fuse([program, node], "attention", uses, **node.attrs)
    return graph.sweep()


def find_inside(body: Sequence[Node]) -> Inside | None:
    """The paths of an attention node at the end of `body`, or None when the body does anything else or more."""
    attention, made = body[-1], {v: n for n in body for v in n.outputs}
    writes = [n for n in body if n.op == "kv_write"]
    given = dict(zip(attention.attrs["in"], attention.inputs, strict=True))
    if len(writes) != 1 or attention.attrs.get("mla") or attention.attrs.get("chunk"):
        return None
    write = writes[0]
    if attention.attrs["layer"] != write.attrs["layer"] or any(root(given[name]) not in write.outputs for name in ("k", "v")):
        return None
    paths = [_path(value, made) for value in (given["q"], *write.inputs[:2])]
    found = [path for path in paths if path is not None]
    used = {n for path in found for n in (path.norm, path.rope)}
    others = [n for n in body if n.op not in ("view", "kv_write", "attention") and n not in used]
    if len(found) < 3 or others or found[2].norm or found[2].rope or _differ(found[0].rope, found[1].rope):
        return None
    q, k, v = found
    return Inside(q, k, v)


def _path(value: Value, made: dict[Value, Node]) -> Path | None:
    norm = rope = None
    heads, dim = value.shape[1], value.shape[-1]
    while root(value) in made:
        if row_size(root(value)) != heads * dim or not is_contiguous(row_shape(value), row_strides(value)):
            return None
        node = made[root(value)]
        if node.op == "rope" and rope is None and norm is None:
            rope = node
        elif node.op == "rms_norm" and norm is None and node.out.shape[-1] == dim:
            norm = node
        else:
            return None
        value = node.inputs[0]
    return Path(value, norm, rope) if row_part(value) is not None and row_size(value) == heads * dim else None


def _differ(a: Node | None, b: Node | None) -> bool:
    """Whether two rotations need different angles or pairs."""
    if a is None or b is None:
        return a is not b
    names = ("dims", "base", "scale", "traditional")
    return any(a.attrs[name] != b.attrs[name] for name in names) or a.inputs[1:] != b.inputs[1:]


def _reads_only(value: Value, reader: Node, uses: dict[Any, Any]) -> bool:
    for other, _ in uses[value]:
        behind = [r for r, _ in uses[other.out]] if other is not None and other.op == "view" else [other]
        if any(r is not reader for r in behind):
            return False
    return True
