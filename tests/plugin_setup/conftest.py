import pytest
from small_sdist import DROPPED, KEPT, OTHERS, write_sdist

from metalstep.plugin import pure_wheel


@pytest.fixture
def sdist(tmp_path):
    """A source archive of a small vLLM."""
    (tmp_path / "sdist").mkdir()
    return write_sdist(tmp_path / "sdist" / pure_wheel.SDIST, KEPT | DROPPED | OTHERS)
