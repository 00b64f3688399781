"""`metalstep download`: a model of the Hugging Face Hub to this machine."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

from metalstep.cli.errors import CommandError, split_hint
from metalstep.cli.parser import Parser
from metalstep.packaged_models import PACKAGED, not_installed, packaged_file

EXAMPLES = (
    "metalstep download mlx-community/Qwen3-0.6B-4bit",
    "metalstep download unsloth/Qwen3-0.6B-GGUF:Q8_0",
    "metalstep download unsloth/Qwen3-0.6B-GGUF/Qwen3-0.6B-Q4_K_M.gguf",
    "metalstep download owner/name --revision v1.0 --json",
    "metalstep download owner/name --local-dir models/name",
)


def parser() -> Parser:
    p = Parser(
        "metalstep download",
        "Download a model, only the files that are needed to run it, into the cache that all tools of the hub share. A download that was "
        "interrupted goes on where it stopped. The path goes to stdout, all else to stderr. HF_TOKEN, HF_HOME, HF_HUB_CACHE, HF_ENDPOINT "
        "and HF_HUB_OFFLINE work as for huggingface_hub.",
        EXAMPLES,
    )
    p.add_argument(
        "model", metavar="MODEL", help="owner/name; of GGUF files owner/name:QUANT (owner/name:Q4_K_M) or owner/name/file.gguf"
    )
    p.add_argument("--revision", metavar="REV", help="branch, tag or commit (default: main)")
    p.add_argument("--local-dir", type=Path, metavar="DIR", help="put the files there instead of into the cache")
    p.add_argument("--json", action="store_true", help="print path, commit, size and what the model is as JSON")
    return p


def main(argv: list[str]) -> int:
    """download a model of the Hugging Face Hub, or the rest of one"""
    args = parser().parse_args(argv)
    from metalstep.hub.download import Found, find, find_in_folder
    from metalstep.hub.names import expected, hub_name

    name = hub_name(args.model)
    if (here := _here(args.model)) is not None:
        if args.revision or args.local_dir:
            raise CommandError(f"{args.model} is on this machine: nothing to download", "leave --revision and --local-dir out")
        found = Found(here, "")
    elif name is None:
        raise CommandError(f"{args.model!r} is no name of a model on the hub", f"name {expected(args.model)}")
    elif args.local_dir is None:
        found = find(name, args.revision)
    else:
        found = find_in_folder(name, args.local_dir.expanduser(), args.revision)
    answer = described(args, found.path, found.commit, found.downloaded)
    print(json.dumps(answer, indent=2) if args.json else found.path)
    if not args.json:
        state = "downloaded" if found.downloaded else "is here already"
        at = f", commit {found.commit[:12]}" if found.commit else ""
        print(f"{args.model} {state}{at}\nhint: {answer['run']}", file=sys.stderr)
    return 0


def _here(model: str) -> Path | None:
    """Where a packaged model or a path is; None for a name of the hub."""
    path = packaged_file(model) if model in PACKAGED else Path(model).expanduser()
    if path is None:
        raise CommandError(*split_hint(not_installed(model)))
    return path if path.exists() else None


def described(args: Any, path: Path, commit: str, downloaded: int) -> dict[str, Any]:
    """What `--json` prints."""
    from metalstep.hub.describe import describe_directory, describe_gguf

    about = describe_directory(path) if path.is_dir() else describe_gguf(path)
    named = [args.model, *(["--revision", args.revision] if args.revision else [])] if args.local_dir is None else [str(path)]
    return {
        "model": args.model,
        "path": str(path),
        "revision": (args.revision or "main") if commit else None,
        "commit": commit or None,
        "downloaded_bytes": downloaded,
        **about.facts(),
        "run": f"metalstep chat --model {shlex.join(named)}",
    }
