"""Where metalstep keeps what it can make again."""
from __future__ import annotations

import os
import platform
from pathlib import Path


def cache_folder() -> Path:
    """As the launcher's CacheFolder.swift finds it."""
    if chosen := os.environ.get("METALSTEP_CACHE"):
        return Path(chosen)
    mac = platform.system() == "Darwin"
    return (Path.home() / "Library" / "Caches" if mac else xdg_cache()) / "metalstep"


def xdg_cache() -> Path:
    """The user's cache folder outside of macOS."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
