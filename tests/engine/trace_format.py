"""Chrome's Trace Event Format, as far as a checker needs it."""
from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

Event = dict[str, Any]
KEYS = {  # of each phase that is used
    "M": {"name", "pid", "tid", "args"},
    "X": {"name", "pid", "tid", "ts", "dur"},
    "C": {"name", "pid", "ts", "args"},
    "b": {"name", "pid", "ts", "cat", "id"},
    "e": {"name", "pid", "ts", "cat", "id"},
    "n": {"name", "pid", "ts", "cat", "id"},
}
SLACK = 0.002  # µs: times have three decimals, and a sum of two of them is rounded


def read(path: Path) -> list[Event]:
    """A trace, with or without its closing bracket."""
    text = path.read_text()
    return json.loads(text if text.rstrip().endswith("]") else f"{text}]")


def check(events: list[Event]) -> None:
    """Raises: AssertionError for what a viewer would refuse or show wrongly."""
    assert events[0]["name"] == "process_name"
    threads = {(event["pid"], event["tid"]) for event in events if event["ph"] == "M" and event["name"] == "thread_name"}
    spans, parts = defaultdict(list), defaultdict(list)
    for event in events:
        assert KEYS[event["ph"]] <= set(event), event
        assert isinstance(event["name"], str) and event["name"] and isinstance(event["pid"], int)
        if event["ph"] == "C":
            assert event["args"] and all(isinstance(value, int | float) for value in event["args"].values()), event
        if event["ph"] == "X":
            assert event["dur"] >= 0 and (event["pid"], event["tid"]) in threads, event
            spans[event["pid"], event["tid"]].append(event)
        if event["ph"] in "ben":
            parts[event["pid"], event["cat"], event["id"]].append(event)
    for thread in spans.values():
        check_nesting(thread)
    for own in parts.values():
        check_pairs(own)


def check_nesting(spans: list[Event]) -> None:
    """Of one thread: of two spans, one is inside of the other or they do not meet."""
    open_until: list[float] = []
    for span in sorted(spans, key=lambda span: (span["ts"], -span["dur"])):
        end = span["ts"] + span["dur"]
        while open_until and span["ts"] >= open_until[-1] - SLACK:
            open_until.pop()
        assert not open_until or end <= open_until[-1] + SLACK, f"{span} begins in a span and ends behind it"
        open_until.append(end)


def check_pairs(parts: list[Event]) -> None:
    """Of one id: what begins ends, in order."""
    begun: list[Event] = []
    for part in sorted(parts, key=lambda part: part["ts"]):  # stable: what is simultaneous stands in the file's order
        if part["ph"] == "b":
            begun.append(part)
        elif part["ph"] == "e":
            assert begun and begun.pop()["name"] == part["name"], part
        else:
            assert begun, part
    assert not begun, begun


def inside(span: Event, outer: Event) -> bool:
    return (
        (span["pid"], span["tid"]) == (outer["pid"], outer["tid"])
        and span["ts"] >= outer["ts"] - SLACK
        and span["ts"] + span["dur"] <= outer["ts"] + outer["dur"] + SLACK
    )
