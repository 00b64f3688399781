"""Settings that every test shares."""
import importlib.util
import os

import pytest
from hypothesis import settings

settings.register_profile("metalstep", deadline=None, derandomize=True)
settings.load_profile("metalstep")

# Tests of the plugin inside of vLLM need vLLM's environment: `make test-vllm`.
collect_ignore = [] if importlib.util.find_spec("vllm") else ["plugin"]


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """In CI every tool is installed: a skipped test there hides something, so it fails."""
    outcome = yield
    report = outcome.get_result()
    if report.skipped and os.environ.get("CI"):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was skipped in CI: {report.longrepr}"
