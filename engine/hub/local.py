"""What MODEL stands for, as a path on this machine."""
from __future__ import annotations

from pathlib import Path

from metalstep.hub.download import find
from metalstep.hub.errors import HubError
from metalstep.hub.names import HubName, expected, hub_name
from metalstep.packaged_models import PACKAGED, not_installed, packaged_file


def local_path(name: str, revision: str | None = None) -> Path:
    """A packaged model's file, a path, or what a Hugging Face id names, downloaded where it is not in the cache.

    A file or directory wins over an id of the same name. Raises: HubError saying what to install, download or correct.
    """
    place = placed(name)
    if isinstance(place, HubName):
        return find(place, revision).path
    if revision is not None:
        raise HubError(f"a revision is of a Hugging Face id, and {name!r} is {_kind(name)}; leave the revision {revision!r} out")
    return place


def placed(name: str) -> Path | HubName:
    """`name` as what is on this machine, or as what it is called on the hub. Raises: HubError for what is neither."""
    if name in PACKAGED:
        path = packaged_file(name)
        if path is None:
            raise HubError(not_installed(name))
        return path
    path = Path(name).expanduser()
    if path.exists():
        return path
    found = hub_name(name)
    if found is None:
        raise HubError(
            f"{name!r} does not exist; expected {', '.join(map(repr, PACKAGED))}, a .gguf file, a directory of an mlx-lm model, or "
            f"{expected(name)}"
        )
    return found


def _kind(name: str) -> str:
    return "a packaged model" if name in PACKAGED else "a path here"
