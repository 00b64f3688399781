"""What a server counts, as /metrics has it for Prometheus."""
from __future__ import annotations


def sums(text: str) -> dict[str, float]:
    """Counters and gauges by name, summed over their labels. text: the body of /metrics."""
    found: dict[str, float] = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            name = name.partition("{")[0]
            found[name] = found.get(name, 0.0) + float(value)
    return found
