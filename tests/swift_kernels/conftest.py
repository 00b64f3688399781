"""A CUDA device on a driver and a compiler that are not there (fake_cuda.c)."""
import gc

import pytest
from cuda_fake import Fake, build, opened


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return build(tmp_path_factory.mktemp("fake"))


@pytest.fixture
def fake(library, tmp_path, monkeypatch):
    """The fake, and the end of each test: all that was made of it is freed, in the right way."""
    fake = Fake(library, tmp_path, monkeypatch)
    yield fake
    gc.collect()
    misuse = ("no context", "not pinned", "freed while", "unloaded while")
    assert [line for line in fake.log() if line.startswith(misuse) or line.endswith("outside of a graph")] == []
    assert len(fake.log("retain")) == len(fake.log("release"))
    assert all(line.endswith("0 memory, 0 pinned, 0 events, 0 streams, 0 graphs, 0 execs, 0 modules") for line in fake.log("release")[-1:])


@pytest.fixture
def cuda(fake):
    with opened() as device:
        yield device
