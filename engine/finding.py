"""One line of `metalstep doctor`: what a check found, and what to do about it."""
from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

OK, WARN, FAIL = "ok", "warn", "fail"
SLOW = "slow"  # of what works and could be faster


@dataclass
class Finding:
    """status: ok; warn, where something that not everybody needs is missing; fail, where models cannot run as they should.

    found: in words. hint: what to do, None where nothing is to be done. facts: the same in numbers, for the report; JSON types only.
    """

    name: str
    status: str
    found: str
    hint: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0  # that the check took
