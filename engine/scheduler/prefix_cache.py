"""Digests of full blocks. A block's keys and values depend on every token before it, so digests are chained."""
from __future__ import annotations

import hashlib
import struct
from array import array

from metalstep.scheduler.sequence import Sequence

DIGEST_BYTES = 16  # 2^64 blocks before two of them are likely to meet


def chain_digests(sequence: Sequence, count: int, block_size: int) -> list[bytes]:
    """The digests of the first `count` full blocks of `sequence`, which keeps them: each is made once.

    digest_i = blake2b(digest_{i-1}, the block's token ids as int32); digest_{-1} is made of the salt and of the sequence's window,
    because rows that see less make other keys and values.
    """
    digests = sequence.digests
    done = len(digests)
    if done < count:
        data = array("i", sequence.tokens[done * block_size : count * block_size]).tobytes()
        digest = digests[-1] if digests else _digest(struct.pack("II", sequence.window, sequence.keep) + sequence.salt)
        width = block_size * 4
        for start in range(0, len(data), width):
            digest = _digest(digest + data[start : start + width])
            digests.append(digest)
    return digests[:count]


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest()
