"""Where downloaded files go: into the hub's cache, as huggingface_hub lays it out, or into a folder of the user's."""
from __future__ import annotations

import os
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from metalstep.hub.cache import PARTIAL, storage
from metalstep.hub.client import Hub, RemoteFile
from metalstep.hub.errors import HubError, explained, library
from metalstep.hub.transfer import file_digest


class Place(ABC):
    """root: the folder on whose disk the files are."""

    root: Path

    @abstractmethod
    def path(self, file: str) -> Path:
        """Where the file is once it is whole."""

    @abstractmethod
    def has(self, file: RemoteFile) -> bool:
        """Whether the file is there and whole."""

    @abstractmethod
    def content(self, file: RemoteFile) -> Path:
        """Where its bytes are once they are whole."""

    @abstractmethod
    def ready(self, file: RemoteFile) -> bool:
        """Whether its bytes are whole, though perhaps not under its name yet."""

    @abstractmethod
    def partial(self, file: RemoteFile) -> Path:
        """Where its bytes are until then."""

    def finish(self, file: RemoteFile) -> None:
        """Put the whole partial in its place."""
        self.partial(file).replace(self.content(file))

    @abstractmethod
    def link(self, file: RemoteFile) -> None:
        """Give the content the file's name. Raises: HubError."""

    def lock(self, file: RemoteFile) -> AbstractContextManager[Any]:
        """Held while a file is written, so that two processes do not write the same."""
        return nullcontext()


class CachePlace(Place):
    """A snapshot in the hub's cache: content in blobs/, by its hash, and links to it by name."""

    def __init__(self, hub: Hub, repo: str, commit: str):
        self.hub, self.repo, self.commit = hub, repo, commit
        self.root = storage(hub.cache, repo)

    def path(self, file: str) -> Path:
        return self.root / "snapshots" / self.commit / file

    def has(self, file: RemoteFile) -> bool:
        return self.path(file.name).is_file()

    def content(self, file: RemoteFile) -> Path:
        return self.root / "blobs" / (file.etag or "")

    def ready(self, file: RemoteFile) -> bool:
        return self.content(file).is_file()

    def partial(self, file: RemoteFile) -> Path:
        return self.content(file).with_name(f"{file.etag}{PARTIAL}")

    def lock(self, file: RemoteFile) -> AbstractContextManager[Any]:
        folder = self.hub.cache / ".locks" / self.root.name  # huggingface_hub's own
        folder.mkdir(parents=True, exist_ok=True)
        lock: AbstractContextManager[Any] = library("utils").WeakFileLock(folder / f"{file.etag}.lock")
        return lock

    def link(self, file: RemoteFile) -> None:
        """The file's name in the snapshot, and its content too where that is not in blobs/: of a file that HTTP does not serve."""
        if file.etag and self.ready(file) and _linked(self.path(file.name), self.content(file)):
            return
        from huggingface_hub import hf_hub_download

        try:
            hf_hub_download(
                self.repo, file.name, revision=self.commit, cache_dir=self.hub.cache, endpoint=self.hub.endpoint, library_name="metalstep"
            )
        except Exception as error:  # of huggingface_hub, of its HTTP client, of the disk
            raise explained(error, self.repo, self.hub.endpoint, self.commit, file.name) from error


def _linked(path: Path, content: Path) -> bool:
    """Make `path` a link to `content`, as huggingface_hub does; False on a disk without links, where huggingface_hub copies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_symlink() and not path.exists():  # to content that was removed
        path.unlink(missing_ok=True)
    try:
        path.symlink_to(os.path.relpath(content, path.parent))
    except FileExistsError:  # another process has linked it just now
        pass
    except OSError:
        return False
    return path.is_file()


class FolderPlace(Place):
    """A folder with the files under their names in the repository."""

    def __init__(self, folder: Path):
        self.root = folder
        if folder.exists() and not folder.is_dir():
            raise HubError(f"{folder} is a file; name a folder, which need not exist")

    def path(self, file: str) -> Path:
        return self.root / file

    def has(self, file: RemoteFile) -> bool:
        path = self.path(file.name)
        return path.is_file() and (file.size is None or path.stat().st_size == file.size) and file_digest(path, file) == file.etag

    def partial(self, file: RemoteFile) -> Path:
        return self.path(file.name).with_name(f".{Path(file.name).name}.{(file.etag or '')[:12]}{PARTIAL}")

    def content(self, file: RemoteFile) -> Path:
        return self.path(file.name)

    def ready(self, file: RemoteFile) -> bool:
        return self.has(file)

    def link(self, file: RemoteFile) -> None:
        if not self.path(file.name).is_file():
            raise HubError(
                f"{file.name} is too large for HTTP, or the hub names no hash of it, so it goes to the hub's cache alone; leave "
                "--local-dir out"
            )
