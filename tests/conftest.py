"""Settings that every test shares."""
import importlib.util
import os
from collections import Counter

import pytest
from gpu_device import KIND, SIMULATED
from hypothesis import settings

if SIMULATED and KIND == "nvidia":
    from nvidia_simulator import nvidia_simulator  # noqa: F401  # of all tests

settings.register_profile("metalstep", deadline=None, derandomize=True)
settings.register_profile("random", deadline=None, derandomize=False, print_blob=True)  # make test-random
settings.load_profile("metalstep")

# Tests of the plugin inside of vLLM need vLLM's environment: `make test-vllm`.
collect_ignore = [] if importlib.util.find_spec("vllm") else ["plugin"]


def pytest_addoption(parser):
    parser.addoption("--every", type=int, default=1, metavar="N", help="of each file's tests only every N-th")


def pytest_collection_modifyitems(config, items):
    """Another GPU than the simulated one, or what is taken for one: tests of the simulator itself are not for it. --every N: see above."""
    other_gpu = not SIMULATED or KIND == "nvidia"
    wanted, count = [], Counter()
    for item in items:
        if not (other_gpu and item.get_closest_marker("simulator")):
            if count[item.path] % config.getoption("--every") == 0:
                wanted.append(item)
            count[item.path] += 1
    if len(wanted) < len(items):
        kept = set(wanted)
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = wanted


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """In CI every tool is installed: a skipped test there hides something, so it fails."""
    outcome = yield
    report = outcome.get_result()
    if report.skipped and os.environ.get("CI"):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was skipped in CI: {report.longrepr}"
