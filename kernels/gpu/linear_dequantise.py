"""Weights of a linear as float16 matrices, several in one launch: a kernel per set of formats."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from metalstep.kernels import params
from metalstep.kernels.gpu.generated import choose, named
from metalstep.kernels.gpu.linear import weight_format
from metalstep.kernels.gpu.linear_text import Format
from metalstep.kernels.launch import Buffer, Launch
from metalstep.kernels.linear import PackedWeight

ALIGN = 16  # bytes: of a weight's place, written so many at a time
THREADS = 256
VALUES = {1: 32, 2: 16, 3: 32, 4: 8, 5: 32, 6: 16, 8: 8, 16: 8, 32: 8}  # by bits, read at once: whole words, and 16 bytes of result or more
THREAD_VALUES = 32  # that a thread has read before it waits for the launch in front of it
GROUP_VALUES = THREADS * THREAD_VALUES
MAX_WEIGHTS = 9  # of a launch: three buffers each, of 31 that a Metal kernel binds


def launches(weights: Sequence[tuple[PackedWeight, Buffer]]) -> list[Launch]:
    """Write each weight to its place in one buffer, float16 [n, k] at a multiple of 16 bytes. k is a multiple of 8.

    Raises: ValueError for a weight that no kernel reads, or a place that is no such multiple.
    """
    for weight, place in weights:
        if weight.k % 8 or place.offset % ALIGN:
            raise ValueError(f"linear: a weight of k = {weight.k} for byte {place.offset}, expected multiples of 8 and {ALIGN}")
    return [_launch(weights[i : i + MAX_WEIGHTS]) for i in range(0, len(weights), MAX_WEIGHTS)]


@dataclass
class _Text:
    """What a launch grows by, weight by weight."""

    bindings: list[Buffer] = field(default_factory=list)
    types: list[str] = field(default_factory=list)
    parts: list[bytes] = field(default_factory=list)
    body: list[str] = field(default_factory=list)
    groups: int = 0

    def add(self, fmt: Format, weights: Sequence[tuple[PackedWeight, Buffer]], first_byte: int, *, last: bool) -> None:
        """The weights of one format, a branch of the kernel."""
        fields = ("words", "scales", "biases")[: len(fmt.members)] if len(fmt.members) > 1 else ("elements",)
        first_part = len(self.parts)
        names: dict[str, list[str]] = {name: [] for name in fields}  # of the weights' parameters
        for weight, place in weights:
            chunks, at = weight.n * weight.k // fmt.values, (place.offset - first_byte) // ALIGN
            self.parts.append(params.pack("MSGpuDequantisePart", chunks=chunks, first_group=self.groups, first=at))
            self.groups += -(-chunks * fmt.values // GROUP_VALUES)
            for name, member, buffer in zip(fields, fmt.members, (weight.buffer, weight.scales, weight.biases), strict=False):
                assert buffer is not None
                names[name].append(f"b{len(self.bindings)}")
                self.bindings.append(buffer)
                self.types.append(member)
        self.body += [
            f"  {'} else ' if first_part else ''}{'' if last else f'if (part < {len(self.parts)}) '}{{",
            f"    {fmt.text} weight;",
            *(f"    weight.{name} = {choose('part', first_part, of)};" for name, of in names.items()),
            f"    const uint first = (tg.x - parts[part].first_group) * {GROUP_VALUES // fmt.values};",
            f"    ms_weight_run<{fmt.values}, {THREAD_VALUES // fmt.values}, {fmt.text}> run;",
            f"    ms_read_run<{THREADS}>(run, weight, first, parts[part].chunks, tid);",
            "    MS_WAIT_PREVIOUS(out);",
            "    MS_LAUNCH_NEXT;",
            f"    ms_write_run<{THREADS}>(out + ulong(parts[part].first) * 8, run, first, parts[part].chunks, tid);",
        ]


def _launch(weights: Sequence[tuple[PackedWeight, Buffer]]) -> Launch:
    by_format: dict[Format, list[tuple[PackedWeight, Buffer]]] = {}
    for weight, place in weights:
        by_format.setdefault(weight_format(weight, {weight.bits: (VALUES[weight.bits],)}, 1), []).append((weight, place))
    first_byte = min(place.offset for _, place in weights)
    text = _Text()
    for number, (fmt, own) in enumerate(by_format.items()):
        text.add(fmt, own, first_byte, last=number == len(by_format) - 1)
    count = len(text.types)
    lines = [
        f"[[kernel, max_total_threads_per_threadgroup({THREADS})]] void KERNEL_NAME(",
        *(f"    device const {name}* b{i} [[buffer({i})]]," for i, name in enumerate(text.types)),
        f"    device half* out [[buffer({count})]],",
        f"    constant MSGpuDequantisePart* parts [[buffer({count + 1})]],",
        "    uint3 tg [[threadgroup_position_in_grid]],",
        "    uint tid [[thread_index_in_threadgroup]]) {",
        "  uint part = 0;",
        *(f"  if (tg.x >= parts[{i}].first_group) part = {i};" for i in range(1, len(text.parts))),
        *text.body,
        "  }",
        "}",
    ]
    name, code = named("linear_dequantise", lines)
    bindings = [*text.bindings, replace(weights[0][1], offset=first_byte)]
    return Launch(name, bindings, b"".join(text.parts), grid=(text.groups, 1, 1), threads=(THREADS, 1, 1), code=code)
