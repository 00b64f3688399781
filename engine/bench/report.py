"""A page of results, written from their JSON alone: tables and pictures that cannot say anything else than the numbers do."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from metalstep.bench.charts import chart, contender
from metalstep.plot.bars import svg

BEGIN, END = "<!-- results: metalstep bench report writes this part -->", "<!-- end of results -->"
DRAWN = ("decode", "prefill", "serve", "kernels", "kv")


def write_report(page: Path, folder: Path, *, check: bool = False) -> list[Path]:
    """Write the results in `folder` into `page`, between its marks, and a picture beside each JSON that has one.

    check: change nothing. Returns the files that differ from what the JSON says. Raises: ValueError for a page without the marks or a file
    that is no result; OSError.
    """
    named = {path.stem: read(path) for path in sorted(folder.glob("*.json"))}
    if not named:
        raise ValueError(f"{folder}: there is no result; write one with `metalstep bench decode --out {folder}/decode.json`")
    before = page.read_text("utf-8")
    head, begin, rest = before.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{page}: it has no place for results; put {BEGIN} and {END} into it, each on its own line")
    parts = [section(name, result, f"{folder.name}/{name}") for name, result in ordered(named)]
    body = "\n".join(parts)
    files = {page: f"{head}{BEGIN}\n\n{body}\n{END}{tail}"}
    files |= {folder / f"{name}.svg": svg(chart(result)) for name, result in named.items() if result["benchmark"] in DRAWN}
    changed = [path for path, text in files.items() if not path.exists() or path.read_text("utf-8") != text]
    if not check:
        for path in changed:
            path.write_text(files[path], "utf-8")
    return changed


def read(path: Path) -> dict[str, Any]:
    """A benchmark's --json or --out. Raises: ValueError."""
    try:
        result = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: no JSON ({error}); write it again with --out") from None
    if not isinstance(result, dict) or result.get("benchmark") not in SECTIONS:
        raise ValueError(f"{path}: expected a result of metalstep bench {', '.join(SECTIONS)}; write it with --out, or move it elsewhere")
    return result


def ordered(named: dict[str, dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """GPUs behind the processor, each with its benchmarks in the order of SECTIONS."""
    kinds = list(SECTIONS)
    return sorted(named.items(), key=lambda entry: (entry[1].get("gpu") or "", kinds.index(entry[1]["benchmark"]), entry[0]))


def section(name: str, result: dict[str, Any], stem: str) -> str:
    """A heading, where and how it was measured, a table, the picture and the JSON."""
    here = result["machine"]
    cores = f" on {here['cores']} cores" if here["cores"] else ""
    title, rows = SECTIONS[result["benchmark"]]
    gpu, on = (f"{result['gpu']} · ", f" on {result['gpu']}") if result.get("gpu") else ("", "")
    lines = [
        f"### {title}{on}{'' if name == result['benchmark'] else ' (' + name + ')'}",
        "",
        f"{here['date']} · {gpu}{here['cpu']}, {here['cpus']} CPUs{cores}, {here['memory_gib']:g} GiB, {here['os']}",
        "",
        ", ".join(f"{key} {value}" for key, value in result["versions"].items()),
        "",
        "<!-- not run: takes minutes -->",
        "```console",
        f"$ {result['command']}",
        "```",
        "",
    ]
    lines += [line for text in result["warnings"] for line in (f"The machine was busy: {text}.", "")]
    lines += [*rows(result), ""]
    if result["benchmark"] in DRAWN:
        lines += [f"![{title}]({stem}.svg)", ""]
    lines += [f"Every sample: [{Path(stem).name}.json]({stem}.json).", ""]
    return "\n".join(lines)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in [columns, ["---"] * len(columns), *rows]]


def spread(summed: dict[str, Any] | None, digits: int = 1) -> str:
    """`median (lowest to highest, n)`."""
    if summed is None:
        return ""
    low, high = min(summed["samples"]), max(summed["samples"])
    return f"{summed['median']:,.{digits}f} ({low:,.{digits}f} to {high:,.{digits}f}, {summed['n']})"


def times(ratio: dict[str, Any] | None) -> str:
    return "" if ratio is None else f"{ratio['of_medians']:.2f}, {ratio['median_of_pairs']:.2f}"


def engines(result: dict[str, Any]) -> list[str]:
    model = f"{result['model']}: " if result.get("gpu") else ""
    return [f"{model}{', '.join(head['version'] for head in result['engines'])}. Not timed: {result['not_timed']}.", ""]


def decode_rows(result: dict[str, Any]) -> list[str]:
    over = {(row["batch"], row["prompt_tokens"], row["against"]): row for row in result["ratios"]}
    rows = []
    for row in result["cases"]:
        ratio = over.get((row["batch"], row["prompt_tokens"], row["engine"]))
        better = ratio is not None and ratio["decode"]["setting"] == row["setting"]
        rows.append(
            [str(row["batch"]), str(row["prompt_tokens"]), contender(row), spread(row["decode_tok_s"]), spread(row["ttft_ms"]),
             times(ratio["decode"]) if better and ratio else ""]
        )  # fmt: skip
    columns = ["batch", "prompt", "engine", "decode, tok/s: median (range, n)", "TTFT, ms", "metalstep to it: of medians, of pairs"]
    return [*engines(result), *table(columns, rows), *also_rows(result), *busy_rows(result), *left_out(result)]


def also_rows(result: dict[str, Any]) -> list[str]:
    """metalstep with other settings over itself."""
    if not result.get("also"):
        return []
    rows = [
        [str(row["batch"]), str(row["prompt_tokens"]), row["setting"], times(row["decode"]), times(row["ttft"])] for row in result["also"]
    ]
    return ["", "metalstep with other settings over itself, above 1 is faster (of medians, of pairs):", "",
            *table(["batch", "prompt", "with", "decode", "TTFT"], rows)]  # fmt: skip


def busy_rows(result: dict[str, Any]) -> list[str]:
    """A step on the GPU alone, against a decode's time per step."""
    rows = [
        [str(row["batch"]), str(row["prompt_tokens"]), spread(row["device_step_us"]), f"{row['busy']:.1%}"]
        for row in result["cases"] if "busy" in row
    ]  # fmt: skip
    if not rows:
        return []
    columns = ["batch", "prompt", "a step on the GPU alone, µs", "GPU busy during a decode"]
    return ["", "Steps behind each other, timed on the GPU without what the host does between them:", "", *table(columns, rows)]


def left_out(result: dict[str, Any]) -> list[str]:
    """The cases without numbers."""
    lines = []
    for reason in dict.fromkeys(row["reason"] for row in result.get("left_out", ())):
        rows = [row for row in result["left_out"] if row["reason"] == reason]
        names = [f"{row['batch']} × {row['prompt_tokens']:,}" if "batch" in row else f"{row['prompt_tokens']:,}" for row in rows]
        lines += ["", f"Left out: {', '.join(names)} tokens ({reason})."]
    return lines


def prefill_rows(result: dict[str, Any]) -> list[str]:
    over = {(row["prompt_tokens"], row["against"]): row["prefill"] for row in result["ratios"]}
    rows = []
    for row in result["cases"]:
        ratio = over.get((row["prompt_tokens"], row["engine"]))
        better = ratio is not None and ratio["setting"] == row["setting"]
        rows.append([str(row["prompt_tokens"]), contender(row), spread(row["prompt_tok_s"]), times(ratio) if better else ""])
    lines = [*engines(result), *table(["prompt", "engine", "tok/s: median (range, n)", "metalstep to it: of medians, of pairs"], rows)]
    if others := [[str(row["prompt_tokens"]), row["setting"], times(row["prefill"])] for row in result.get("also", ())]:
        lines += ["", "metalstep with other settings over itself, above 1 is faster (of medians, of pairs):", ""]
        lines += table(["prompt", "with", "speed"], others)
    return lines + left_out(result)


def serve_rows(result: dict[str, Any]) -> list[str]:
    over = {(row["streams"], row["against"]): row["tok_s"] for row in result["ratios"]}
    rows = [
        [str(row["streams"]), row["contender"], spread(row["tok_s"]), f"{row['ttft_ms']['median']:.1f}", f"{row['itl_ms']['median']:.2f}",
         times(over.get((row["streams"], row["contender"])))]
        for row in result["cases"]
    ]  # fmt: skip
    servers = [
        f"{row['name']}: ready in {row['ready_s']['median']:.1f} s, "
        f"{row['memory_ready']['pss_mib'] or row['memory_ready']['rss_mib']:.0f} MiB, idle {row['idle_cpu']:.1%} of a core."
        for row in result["servers"]
    ]
    columns = ["streams", "contender", "tok/s: median (range, n)", "TTFT, ms", "ITL, ms", "the server to it: of medians, of pairs"]
    return [" ".join(servers) + f" Not timed: {result['not_timed']}.", "", *table(columns, rows)]


def kernel_rows(result: dict[str, Any]) -> list[str]:
    lines = [f"Shape {result['shape']}, weights {result['weights']}, device {result['device']}. Not timed: {result['not_timed']}.", ""]
    if result.get("limits"):
        keys = ("memory_gb_s", "cache_gb_s", "fp32_gflop_s", "int16_gmac_s", "int8_gmac_s")
        facts = [[str(row["threads"]), *(f"{row[key]:.1f}" for key in keys)] for row in result["limits"]]
        columns = ["threads", "memory, GB/s", "second-level cache, GB/s", "fp32, GFLOP/s", "int16, GMAC/s", "int8, GMAC/s"]
        lines += ["What the machine allows, measured in the same run:", "", *table(columns, facts), ""]
    rows = []
    for row in result["rows"]:
        computes = f"{row['gmac_s']:.1f} GMAC/s" if "gmac_s" in row else f"{row['gflop_s']:.1f} GFLOP/s" if "gflop_s" in row else ""
        limit = f"{row['fraction']:.0%} of {row['limit']}" if row.get("limit") else ""
        mlx = row.get("mlx") or {"ops": None, "run_us": None, "ratio": None}
        rows.append([row["name"], spread(row["run_us"]), f"{row['gb_s']:.1f}", computes, limit, spread(mlx["run_us"]), times(mlx["ratio"])])
    columns = ["case", "µs: median (range, n)", "GB/s", "computes", "of the limit", "MLX's op, µs", "speed over it: of medians, of pairs"]
    return [*lines, *table(columns, rows)]


def kv_rows(result: dict[str, Any]) -> list[str]:
    rows = [
        [row["what"], str(row["batch"]), str(row["context"]), row["scheme"], f"{result['schemes'][row['scheme']]['bytes_per_token']:,}",
         f"{spread(row)} {'tok/s' if row['what'] == 'decode' else 'ms'}", times(row["speed"])]
        for row in result["rows"]
    ]  # fmt: skip
    columns = ["what", "batch", "context", "scheme", "bytes per token", "median (range, n)", "speed over none: of medians, of pairs"]
    return table(columns, rows)


def quality_rows(result: dict[str, Any]) -> list[str]:
    names = {"kld_mean": "KLD mean, nats", "kld_max": "KLD max, nats", "top1": "top-1 agreement", "perplexity": "perplexity",
             "perplexity_mlx_f32": "MLX float32's", "logits_rms": "logits, rms difference"}  # fmt: skip
    known = [key for key in names if key in result]
    return table(["tokens", *(names[key] for key in known)], [[str(result["tokens"]), *(f"{result[key]:.6g}" for key in known)]])


def launch_rows(result: dict[str, Any]) -> list[str]:
    rows = [
        [row["ops"], str(row["count"]), f"{row['us']:.1f}", f"{row['gb_s']:.1f}", f"{row['gmac_s']:.1f}"]
        for row in sorted(result["rows"], key=lambda row: -row["us"])
    ]
    return table(["computes", "launches", "µs", "GB/s", "GMAC/s"], rows)


def sampling_rows(result: dict[str, Any]) -> list[str]:
    rows = [[row["name"], ", ".join(row["on"]), spread(row["step_us"]), f"{row['extra_us']:.1f}"] for row in result["rows"]]
    return table(["set", "what is on", "µs per step: median (range, n)", "more than greedy, µs"], rows)


SECTIONS: dict[str, tuple[str, Callable[[dict[str, Any]], list[str]]]] = {
    "decode": ("Decode", decode_rows),
    "prefill": ("Prompts", prefill_rows),
    "serve": ("Serving", serve_rows),
    "kernels": ("Kernels", kernel_rows),
    "kv": ("KV schemes", kv_rows),
    "quality": ("Quality", quality_rows),
    "launches": ("Launches of a step", launch_rows),
    "sampling": ("Sampling", sampling_rows),
}
