"""Pictures of benchmarks, from their JSON alone: what --plot draws and what the report shows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from metalstep.plot.bars import Bar, Bars


def chart(result: dict[str, Any]) -> Bars:
    """Of a result of decode, prefill, serve, kernels or kv. Raises: ValueError for another one."""
    drawn: dict[str, Callable[[dict[str, Any]], Bars]] = {
        "decode": _decode, "prefill": _prefill, "serve": _serve, "kernels": _kernels, "kv": _kv
    }  # fmt: skip
    name = result.get("benchmark")
    if name not in drawn:
        raise ValueError(f"a result of {name!r}, expected one of {', '.join(drawn)}; others have no picture")
    return drawn[name](result)


def about(result: dict[str, Any], model: str | None = None) -> str:
    """Model, machine and date."""
    here = result["machine"]
    where = result.get("gpu") or f"{here['cpu']}, {here['cpus']} CPUs"
    return f"{model or result['model']} · {where} · {here['date']} · median, line: lowest to highest sample"


def bar(summed: dict[str, Any] | None) -> Bar | None:
    """Of a `summary`."""
    return None if summed is None else Bar(summed["median"], min(summed["samples"]), max(summed["samples"]))


def grouped(rows: Sequence[tuple[str, str, Bar | None]]) -> tuple[list[str], list[tuple[str, list[Bar | None]]]]:
    """Groups and series, in the order in which they first appear, of (group, series, bar)."""
    groups, names = list(dict.fromkeys(row[0] for row in rows)), list(dict.fromkeys(row[1] for row in rows))
    known = {(group, name): found for group, name, found in rows}
    return groups, [(name, [known.get((group, name)) for group in groups]) for name in names]


def contender(row: dict[str, Any]) -> str:
    return f"{row['engine']}, {row['setting']}" if row["setting"] else row["engine"]


def _decode(result: dict[str, Any]) -> Bars:
    rows = [
        (f"batch {row['batch']}, prompt {row['prompt_tokens']}", contender(row), bar(row["decode_tok_s"])) for row in result["cases"]
    ]
    return Bars("Decode speed, all sequences together", about(result), "tokens per second", *grouped(rows))


def _prefill(result: dict[str, Any]) -> Bars:
    rows = [(f"prompt of {row['prompt_tokens']}", contender(row), bar(row["prompt_tok_s"])) for row in result["cases"]]
    return Bars("Speed of prompts, to the first token", about(result), "prompt tokens per second", *grouped(rows))


def _serve(result: dict[str, Any]) -> Bars:
    rows = [(f"{row['streams']} stream{'s' * (row['streams'] > 1)}", row["contender"], bar(row["tok_s"])) for row in result["cases"]]
    return Bars("Server over HTTP, all streams together", about(result), "tokens per second", *grouped(rows))


def _kv(result: dict[str, Any]) -> Bars:
    rows = [
        (f"batch {row['batch']}, context {row['context']}", row["scheme"], bar(row)) for row in result["rows"] if row["what"] == "decode"
    ]
    return Bars("Decode speed by KV scheme, all sequences together", about(result), "tokens per second", *grouped(rows))


def _kernels(result: dict[str, Any]) -> Bars:
    """Where limits are measured: how much of them is reached, by MLX's ops too; elsewhere GB/s."""
    model = f"shape {result['shape']}, {result['weights']}"
    rows: list[tuple[str, str, Bar | None]] = []
    if not result.get("limits"):
        for row in result["rows"]:
            times = row["run_us"]
            speeds = [row["bytes"] / us / 1e3 for us in (times["median"], max(times["samples"]), min(times["samples"]))]
            rows.append((row["name"], "metalstep", Bar(*speeds)))
        return Bars(f"Kernels on {result['device']}", about(result, model), "GB/s of the bytes that a case must move", *grouped(rows))
    for row in result["rows"]:
        rows.append((row["name"], "metalstep", reached(row["limit_us"], row["run_us"])))
        if row.get("mlx"):
            rows.append((row["name"], "MLX's op", reached(row["limit_us"], row["mlx"]["run_us"])))
    axis = "% of what this machine's memory, cache or arithmetic allows, as measured"
    return Bars("Kernels of the host device", about(result, model), axis, *grouped(rows))


def reached(limit_us: float, times: dict[str, Any] | None) -> Bar | None:
    """Per cent of a limit."""
    if times is None:
        return None
    return Bar(*(100 * limit_us / us for us in (times["median"], max(times["samples"]), min(times["samples"]))))
