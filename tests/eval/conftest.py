"""The packaged model, loaded once, and a text of this repository."""
import gc
from pathlib import Path

import pytest

import metalstep


@pytest.fixture(scope="package")
def smollm2():
    """SmolLM2-135M-Instruct on the host device with a float16 cache: (model, tokenizer)."""
    model, tokenizer = metalstep.load("smollm2", strict=True, threads=1, max_context=1024)
    with model:
        yield model, tokenizer
    gc.collect()


@pytest.fixture(scope="session")
def prose():
    """A text of some thousand tokens."""
    return Path(__file__).parents[2] / "docs" / "design.md"
