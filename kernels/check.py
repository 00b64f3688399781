"""Checks of an op's arguments. Each raises ValueError saying what was wrong, what was expected and why."""
from __future__ import annotations

from collections.abc import Sequence

from metalstep.kernels.launch import Buffer


def shape(op: str, name: str, buffer: Buffer, expected: Sequence[int], why: str) -> None:
    """`buffer` has the `expected` shape; `why` names where that comes from ("x's last axis")."""
    if buffer.shape != tuple(expected):
        raise ValueError(f"{op}: {name} has shape {buffer.shape}, expected {tuple(expected)} ({why})")


def dtype(op: str, name: str, buffer: Buffer, expected: Sequence[str]) -> None:
    """`buffer` has one of the `expected` dtypes."""
    if buffer.dtype not in expected:
        raise ValueError(f"{op}: {name} is {buffer.dtype}, expected {' or '.join(expected)}")


def divides(op: str, name: str, value: int, by_name: str, by: int) -> None:
    """`value` is a positive multiple of `by`."""
    if by < 1 or value < 1 or value % by:
        raise ValueError(f"{op}: {name} is {value}, expected a positive multiple of {by_name}, which is {by}")
