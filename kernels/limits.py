"""What a device reads and computes at most: a stream of memory, multiply-adds in registers. Benchmarks measure other kernels by it."""
from __future__ import annotations

from metalstep.kernels import params
from metalstep.kernels.launch import Buffer, Launch

KINDS = {
    "read": params.MS_LIMIT_READ,
    "fma": params.MS_LIMIT_FMA,
    "dot_int16": params.MS_LIMIT_DOT_INT16,
    "dot_int8": params.MS_LIMIT_DOT_INT8,
}
WORD = 4  # bytes


def launches(kind: str, words: Buffer, out: Buffer, *, rounds: int) -> list[Launch]:
    """Each thread reads its share of `words` `rounds` times, or computes MS_LIMITS_MACS multiply-adds as often.

    kind: read; fma, float32 multiply-adds; dot_int16 or dot_int8, the products of quantised linears with activations of so many bits,
    whose operands are the first MS_LIMITS_OPERANDS words. Shapes: words uint32 [..], out uint32 [threads or more].
    out: of each thread, the sum of what it read modulo 2^32, or a result that keeps the arithmetic from being left out.
    Raises: ValueError for an unknown kind, or buffers that are too short or of another dtype.
    """
    if kind not in KINDS:
        raise ValueError(f"limits: kind is {kind!r}, expected one of {', '.join(KINDS)}")
    for name, buffer in (("words", words), ("out", out)):
        if buffer.dtype != "uint32":
            raise ValueError(f"limits: {name} has dtype {buffer.dtype}, expected uint32")
    least = 1 if kind == "read" else params.MS_LIMITS_OPERANDS
    if words.nbytes < WORD * least:
        raise ValueError(f"limits: words has {words.nbytes // WORD} elements, expected {least} or more")
    if not 1 <= rounds <= params.MS_LIMITS_MAX_ROUNDS:
        raise ValueError(f"limits: rounds is {rounds}, expected 1 to {params.MS_LIMITS_MAX_ROUNDS}")
    constants = params.pack(
        "MSLimitsParams", kind=KINDS[kind], words=words.nbytes // WORD, rounds=rounds, results=out.nbytes // WORD
    )
    return [Launch("limits", [words, out], constants, grid=(1, 1, 1), threads=(1, 1, 1))]
