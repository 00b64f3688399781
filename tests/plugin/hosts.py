"""Two machines of a test: network namespaces with a cable between them, or, for who may not make those, this machine twice."""
from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Host:
    """address: as the other one sees it. run: what stands before a command that is to run there."""

    address: str
    run: tuple[str, ...] = ()


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    names = [f"ms-test-{os.getpid()}-{i}" for i in range(2)]
    if not _ip("netns", "add", names[0]):
        yield Host("127.0.0.1"), Host("127.0.0.1")
        return
    first, second = (Host(f"10.97.31.{i + 1}", ("ip", "netns", "exec", name)) for i, name in enumerate(names))
    try:
        _must("netns", "add", names[1])
        _must("link", "add", "ms-a", "netns", names[0], "type", "veth", "peer", "name", "ms-b", "netns", names[1])
        for name, device, host in zip(names, ("ms-a", "ms-b"), (first, second), strict=True):
            _must("-n", name, "address", "add", f"{host.address}/24", "dev", device)
            for link in (device, "lo"):
                _must("-n", name, "link", "set", link, "up")
        yield first, second
    finally:
        for name in names:
            _ip("netns", "del", name)


def _ip(*arguments: str) -> bool:
    try:
        return subprocess.run(["ip", *arguments], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


def _must(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
