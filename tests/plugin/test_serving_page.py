"""The programs of docs/serving.md run as they are printed, against a server."""
from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pytest
    from server import Server

PAGE = Path(__file__).resolve().parents[2] / "docs" / "serving.md"
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
ADDRESS = "http://127.0.0.1:8000"


def test_the_programs_of_the_page_run(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    """In order and in one namespace, as a reader would type them."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for number, block in enumerate(BLOCK.findall(PAGE.read_text(encoding="utf-8")), 1):
        exec(compile(block.replace(ADDRESS, server.url), f"serving.md, block {number}", "exec"), names)
    said = capsys.readouterr().out
    assert said.count("The capital of France is Paris.") >= 2  # the openai package and anthropic's
    assert "{'city': 'Paris'" in said
    assert "It rains in Paris." in said


def test_the_command_of_the_page_gets_an_answer(server: Server) -> None:
    """The page's own `curl` line, at the server's address."""
    text = PAGE.read_text(encoding="utf-8")
    [command] = re.findall(r"^\$ (curl .*?[^\\])\n", text, re.MULTILINE | re.DOTALL)
    done = subprocess.run(["bash", "-c", command.replace(ADDRESS, server.url)], capture_output=True, text=True, timeout=120)
    assert json.loads(done.stdout)["choices"][0]["message"]["content"] == "The capital of France is Paris."
