"""`metalstep top` on a real server: what it says is what the server has counted."""
from __future__ import annotations

import json
import threading
from typing import TYPE_CHECKING

from ask import answer, complete
from conftest import MODEL

from metalstep.cli.main import main

if TYPE_CHECKING:
    import pytest
    from openai import OpenAI
    from server import Server


def test_a_sample_of_a_server_at_work(server: Server, client: OpenAI, capsys: pytest.CaptureFixture[str]) -> None:
    asking = threading.Thread(target=lambda: answer(client, MODEL, complete("Watched: once upon a time", 60)))
    asking.start()
    assert main(["top", server.url, "--once", "--json", "--interval", "0.5"]) == 0
    asking.join()
    found = json.loads(capsys.readouterr().out)
    assert found["model"] == MODEL and 0 <= found["kv_cache_usage"] <= 1 and 0 <= found["prefix_hit_rate"] <= 1
    assert main(["top", server.url, "--once", "--json", "--interval", "0.1"]) == 0
    later = json.loads(capsys.readouterr().out)
    assert later["generation_tokens"] >= found["generation_tokens"] and later["generation_tokens"] >= 60
    assert later["ttft_ms"]["p50"] > 0 and later["itl_ms"]["p50"] > 0
    assert later["ended"]
