"""A stub hub with small models, and what asks it."""
from __future__ import annotations

from pathlib import Path

import pytest
from hub_models import write_models
from stub_hub import StubHub

from metalstep.hub import client
from metalstep.hub.client import Hub


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the stub hub serves."""
    return write_models(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="session")
def running(served: Path):
    hub = StubHub(served).start()
    yield hub
    hub.stop()


@pytest.fixture
def stub(running: StubHub) -> StubHub:
    """The stub without faults, its counts at zero."""
    running.reset()
    running.tags.clear()
    return running


@pytest.fixture
def hub(stub: StubHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """What asks the stub, with an empty cache, no token and no waiting between tries."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_DISABLE_IMPLICIT_TOKEN", "0")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(client, "FIRST_WAIT", 0.01)
    return Hub(stub.url, tmp_path / "cache", False)
