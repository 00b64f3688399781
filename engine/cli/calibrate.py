"""`metalstep calibrate`: the mean of a model's keys, which KV schemes take off before they encode."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from metalstep.choices import DEVICES, DeviceNames
from metalstep.cli.bench_output import progress
from metalstep.cli.errors import CommandError
from metalstep.cli.eval import read_text
from metalstep.cli.parser import MODEL_HELP, Parser, counted, memory, positive

EXAMPLES = [
    "metalstep calibrate --model smollm2",
    "metalstep calibrate --model model.gguf --text book.txt --tokens 8192",
    "metalstep calibrate --model smollm2 --json > key_means.json",
]


def parser() -> Parser:
    p = Parser(
        "metalstep calibrate",
        "Measure the mean of each layer's keys over a text and keep it beside the model (or in metalstep's cache folder). A KV scheme with "
        "few bits for keys then encodes what is left without it, which is much less where keys share a large offset (Qwen2, Qwen2.5).",
        EXAMPLES,
    )
    p.add_argument("--model", required=True, metavar="MODEL", help=MODEL_HELP)
    p.add_argument("--text", metavar="FILE", help="text to run over, - for stdin (default: Python's heapq.__about__)")
    p.add_argument("--tokens", type=positive, metavar="N", help="tokens of the text that are used (default: all)")
    p.add_argument("--json", action="store_true", help="the same as JSON")
    p.add_argument("--threads", type=positive, metavar="N", help="threads of the host device (default: all that it may use)")
    p.add_argument("--kv-memory", type=memory, metavar="SIZE", help="memory of the KV cache while it runs: 2GB, or 0.2 of what is free")
    p.add_argument("--device", choices=DeviceNames(name for name in DEVICES if name != "eager"), help="where the model runs")
    return p


def main(argv: list[str]) -> int:
    """measure the mean of a model's keys, which KV schemes with few bits take off"""
    args = parser().parse_args(argv)
    from metalstep import key_means
    from metalstep.bench.prompts import TEXT
    from metalstep.eval.calibrate import calibrate

    text = TEXT if args.text is None else read_text(args.text)
    options = {name: getattr(args, name) for name in ("device", "threads", "kv_memory") if getattr(args, name) is not None}
    path, layers, about = calibrate(args.model, text, tokens=args.tokens, progress=progress, **options)
    means = {layer: found.mean for layer, found in layers.items()}
    try:
        saved = key_means.save(path, means, about)
    except OSError as error:
        raise CommandError(f"the means cannot be written ({error})", "set METALSTEP_CACHE to a folder that can be written") from None
    progress("")
    result = report(args.model, saved, layers, about)
    print(json.dumps(result, indent=2) if args.json else "\n".join(describe(result)))
    return 0


def report(model: str, saved: Path, layers: dict[object, Any], about: dict[str, str]) -> dict[str, Any]:
    """What was measured, without the means themselves. ratio: a mean's length over the rms length of what is left; see describe."""
    import numpy as np

    from metalstep import key_means

    return {
        "model": model,
        "file": str(saved),
        "tokens": int(about["tokens"]),
        "text_sha256": about["text_sha256"],
        "fingerprint": key_means.fingerprint({layer: found.mean for layer, found in layers.items()}),
        "layers": [
            {
                "layer": str(layer),
                "mean": [float(np.linalg.norm(mean)) for mean in found.mean.astype(np.float64)],
                "residual": [float(x) for x in found.residual],
                "ratio": [float(x) for x in found.ratios],
            }
            for layer, found in layers.items()
        ],
    }


def describe(result: dict[str, Any]) -> list[str]:
    """The report in lines to read."""
    import numpy as np

    from metalstep.eval.calibrate import MATTERS

    lines = [
        f"model      {result['model']}",
        f"text       {counted(result['tokens'], 'token')}, sha256 {result['text_sha256'][:12]}",
        f"saved      {result['file']}",
        "",
        f"{'layer':>8} {'heads':>5} {'|mean|':>9} {'residual':>9} {'ratio':>7} {'largest':>8}",
    ]
    above = 0
    for layer in result["layers"]:
        mean, residual = (float(np.sqrt(np.mean(np.square(layer[name])))) for name in ("mean", "residual"))
        ratio = mean / residual if residual else float("inf") if mean else 0.0
        above += max(layer["ratio"]) > MATTERS
        lines.append(f"{layer['layer']:>8} {len(layer['mean']):5} {mean:9.3f} {residual:9.3f} {ratio:7.2f} {max(layer['ratio']):8.2f}")
    return [
        *lines,
        "",
        "|mean|: length of the mean key; residual: rms length of a key less the mean, both rms over heads; largest: ratio of one head.",
        f"{counted(above, 'layer')} of {len(result['layers'])} {'has' if above == 1 else 'have'} a head with a ratio above {MATTERS:g}: "
        + (
            "there the squared error of encoded keys falls to a half or less with these means."
            if above
            else "centring changes little for this model."
        ),
    ]
