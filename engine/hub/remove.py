"""Removing a model from the hub's cache."""
from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from metalstep.hub.cache import repositories, storage
from metalstep.hub.errors import HubError
from metalstep.hub.names import hub_name
from metalstep.packaged_models import PACKAGED


@dataclass(frozen=True)
class Removal:
    """What `execute` deletes: the folder of a repository, all its commits and files. freed: bytes."""

    repo: str
    folder: Path
    freed: int

    def execute(self) -> None:
        """Not through huggingface_hub's delete_revisions: it goes by commits, and a copy of the repository has the same ones."""
        shutil.rmtree(self.folder)


def removal(cache: Path, name: str) -> Removal:
    """What removing `name` means. Nothing is deleted yet. Raises: HubError for what is not a repository in the cache."""
    if name in PACKAGED:
        raise HubError(f"{name} is in a Python package; remove it with `pip uninstall {PACKAGED[name][1].partition('==')[0]}`")
    found = hub_name(name)
    if found is None:
        raise HubError(f"{name!r} is no model of the hub's cache; remove files of your own yourself")
    if found.quant or found.file:
        raise HubError(f"{name} is one file of {found.repo}, which is removed whole; `metalstep models rm {found.repo}`")
    folder = storage(cache, found.repo)
    if not folder.is_dir():
        known = ", ".join(repo for repo, _ in repositories(cache)) or "nothing"
        raise HubError(f"{found.repo} is not in the cache {cache}; there is {known}")
    files = (file for part in ("blobs", "snapshots") for file in (folder / part).rglob("*") if not file.is_symlink() and file.is_file())
    return Removal(found.repo, folder, sum(file.stat().st_size for file in files))
