"""Command lines of `metalstep serve` and `setup vllm` as README and docs/ print them: vLLM's own parser takes them, and the plugin."""
from __future__ import annotations

import sys
from pathlib import Path

import pytest

from metalstep.plugin import options, serve, setup_vllm
from metalstep.plugin.refusals import check_arguments

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "docs"))
from markdown_blocks import PAGES, blocks, indented, sessions
from printed_commands import parts_of


def printed() -> list[tuple[str, list[str]]]:
    """(place, arguments behind `metalstep`) of each printed call of a command that is the plugin's."""
    found = []
    for page in PAGES:
        lines = [(str(block), line) for block in blocks(page) if block.language == "console" for line, _ in sessions(block)]
        lines += [(str(block), line) for block in indented(page) for line in block.text.replace("\\\n", " ").splitlines()]
        for place, line in lines:
            for parts in parts_of(line):
                if parts[0].endswith("metalstep") and parts[1:2] in (["serve"], ["setup"]):
                    found.append((place, parts[1:]))
    return found


@pytest.mark.parametrize(("place", "arguments"), printed(), ids=lambda value: value if isinstance(value, str) else None)
def test_a_printed_command_is_taken(place: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["metalstep"])
    if arguments[0] == "setup":
        setup_vllm.parser().parse_args(arguments[1:])
        return
    args, _ = serve.parse(arguments[1:])
    check_arguments(args)
    options.parse_options(args.additional_config, args.kv_cache_dtype)


def test_there_are_some() -> None:
    assert len(printed()) >= 8
