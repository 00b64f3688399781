"""A model of the hub brought here: from the cache where it is whole, else downloaded."""
from __future__ import annotations

import queue
import shutil
import threading
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from metalstep.hub import choose
from metalstep.hub.cache import CachedModel, cached_commit, cached_model, check_revision, storage, whole, write_ref
from metalstep.hub.client import TRIES, Hub, Listing, RemoteFile
from metalstep.hub.errors import HubError, UnreachableError
from metalstep.hub.names import COMMIT, HubName
from metalstep.hub.places import CachePlace, FolderPlace, Place
from metalstep.hub.progress import Progress, size
from metalstep.hub.transfer import Stopped, disk_error, fetch, kept

WORKERS = 4  # files at a time: one connection seldom fills a fast line
SPARE = 16 << 20  # bytes that are left on the disk
HTTP_LIMIT = 50 * 1000**3  # bytes: the hub serves larger files through huggingface_hub's Xet client alone


@dataclass(frozen=True)
class Found:
    """path: a folder or a .gguf file. downloaded: bytes that came over the network just now."""

    path: Path
    commit: str
    downloaded: int = 0


def find(name: HubName, revision: str | None = None, hub: Hub | None = None) -> Found:
    """The model in the hub's cache, downloaded where it is not whole there or the hub has another commit for `revision`.

    Without a network, the last commit that was downloaded, with a warning; with HF_HUB_OFFLINE, without one and without a request.
    Raises: HubError.
    """
    hub = hub or Hub()
    if revision is not None:
        check_revision(revision)
    cached = cached_model(hub.cache, name, revision)
    if hub.offline:
        if cached is None:
            raise HubError(_offline(hub, name, revision))
        return Found(cached.path, cached.commit)
    if cached is not None and revision is not None and COMMIT.fullmatch(revision):  # a commit never changes
        return Found(cached.path, cached.commit)
    try:
        listing = hub.listing(name.repo, revision, TRIES if cached is None else 1)
    except HubError as error:
        if cached is None or not _as_good(error):
            raise _or_path(error, name) from error.__cause__
        warnings.warn(_used_anyway(error, name, cached), stacklevel=2)
        return Found(cached.path, cached.commit)
    place = CachePlace(hub, name.repo, listing.commit)
    if (there := _whole(place, name, listing)) is not None:
        write_ref(place.root, revision, listing.commit)
        return Found(there, listing.commit)
    path, received = _bring(hub, name, listing, place)
    write_ref(place.root, revision, listing.commit)
    return Found(path, listing.commit, received)


def find_in_folder(name: HubName, folder: Path, revision: str | None = None, hub: Hub | None = None) -> Found:
    """The model's files in a folder of the user's, downloaded where they are not there or differ. Raises: HubError."""
    hub = hub or Hub()
    if revision is not None:
        check_revision(revision)
    if hub.offline:
        raise HubError(f"HF_HUB_OFFLINE is set, so {name} cannot be downloaded to {folder}; unset it")
    try:
        listing = hub.listing(name.repo, revision, TRIES)
    except HubError as error:
        raise _or_path(error, name) from error.__cause__
    path, received = _bring(hub, name, listing, FolderPlace(folder))
    return Found(path, listing.commit, received)


def _as_good(error: HubError) -> bool:
    """Whether the copy in the cache may stand for what the hub does not give; a wrong revision says so instead."""
    return isinstance(error, UnreachableError) or "has no revision" not in str(error)


def _used_anyway(error: HubError, name: HubName, cached: CachedModel) -> str:
    reason = str(error).rpartition("; ")[0]
    return (
        f"{reason}. Using {name} at commit {cached.commit[:12]}, which is in the cache; HF_HUB_OFFLINE=1 does so without asking the hub"
    )


def _or_path(error: HubError, name: HubName) -> HubError:
    """`error`, which also says that there is no such file or folder, as a mistyped path looks like a name."""
    if "the hub has no model" not in str(error):
        return error
    return HubError(f"there is no file or folder {str(name)!r} here, and {error}")


def _offline(hub: Hub, name: HubName, revision: str | None) -> str:
    folder = storage(hub.cache, name.repo)
    at = f" at revision {revision!r}" if revision else ""
    if (commit := cached_commit(folder, revision)) is None or not (folder / "snapshots" / commit).is_dir():
        return f"HF_HUB_OFFLINE is set and {name}{at} is not in the cache ({hub.cache}); unset it to download the model"
    return f"HF_HUB_OFFLINE is set and {name}{at} is not whole in the cache ({hub.cache}); unset it to download the rest"


def _whole(place: CachePlace, name: HubName, listing: Listing) -> Path | None:
    """The model in the cache, where it has everything that the repository has for it."""
    if choose.is_gguf(name, listing.files):  # of its files the one that would be downloaded, not another that is here
        path = place.path(choose.gguf_file(name, listing.files))
        return path if path.is_file() else None
    there = whole(place.root, name, listing.commit)
    if there is None or any(choose.is_small(file) and not place.path(file).is_file() for file in listing.files):
        return None
    return there.path


def _bring(hub: Hub, name: HubName, listing: Listing, place: Place) -> tuple[Path, int]:
    """Download what `place` lacks of the model; (where it is, bytes received)."""
    repo, commit, files = name.repo, listing.commit, listing.files
    small: list[str] = []
    if choose.is_gguf(name, files):
        file = choose.gguf_file(name, files)
        weights, path = [file], place.path(file)
        what = str(name) if name.file else f"{repo}, {file}{_others(name, file, listing)}"
    else:
        small, weights = choose.directory_files(repo, files, lambda: _index(hub, name, listing, place))
        what, path = repo, place.path("config.json").parent
    lacking = [[files[name] for name in group if not place.has(files[name])] for group in (small, weights)]
    sizes = [(file.size or 0, kept(place.partial(file), file) if file.etag else 0) for group in lacking for file in group]
    total, before = sum(nbytes for nbytes, _ in sizes), sum(have for _, have in sizes)
    if not sizes:
        return path, 0
    _check_space(place.root, total - before, repo)
    progress = Progress(f"{what}, commit {commit[:7]}", total, before)
    progress.begin()
    for group in lacking:  # what the weights are no use without comes first, so that weights in a snapshot mean a whole one
        _together(group, _one(hub, repo, commit, place, progress), progress)
    progress.end()
    return path, max(progress.done - before, 0)  # another process may have brought some of it


def _others(name: HubName, file: str, listing: Listing) -> str:
    if name.quant:
        return ""
    others = [label for other in choose.gguf_files(listing.files) if other != file and (label := choose.quant_label(other))]
    return f" (there are also {', '.join(dict.fromkeys(others))})" if others else ""


def _index(hub: Hub, name: HubName, listing: Listing, place: Place) -> bytes:
    """The index of the weights, which says what else to download."""
    file = listing.files[choose.INDEX]
    if place.has(file):
        return place.path(choose.INDEX).read_bytes()
    return hub.small(name.repo, listing.commit, choose.INDEX)


def _check_space(root: Path, needed: int, repo: str) -> None:
    """Raises: HubError where the disk has too little for `needed` bytes more."""
    folder = root
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed + SPARE > free:
        raise HubError(
            f"{repo} needs {size(needed + SPARE)} more on the disk of {root}, which has {size(free)} free; free some space (`metalstep "
            "models` lists what is here), or name another disk with HF_HOME or --local-dir"
        )


def _one(hub: Hub, repo: str, commit: str, place: Place, progress: Progress) -> Callable[[RemoteFile, threading.Event], None]:
    """What downloads one file."""

    def bring(file: RemoteFile, stop: threading.Event) -> None:
        try:
            with place.lock(file) if file.etag else nullcontext():
                if file.etag and (file.size or 0) <= HTTP_LIMIT and not place.ready(file):
                    fetch(hub, repo, commit, file, place.partial(file), progress, stop)
                    place.finish(file)
            place.link(file)
        except HubError:
            raise
        except OSError as error:  # folders, locks, links; the file's own bytes have their errors
            raise disk_error(error, place.root, repo) from error

    return bring


def _together(files: list[RemoteFile], bring: Callable[[RemoteFile, threading.Event], None], progress: Progress) -> None:
    """`bring` each file, some at a time. Raises: HubError, the first; KeyboardInterrupt, with what was received kept."""
    stop, results, waiting = threading.Event(), queue.SimpleQueue[BaseException | None](), iter(files)
    lock = threading.Lock()

    def work() -> None:
        while not stop.is_set():
            with lock:
                file = next(waiting, None)
            if file is None:
                return
            try:
                bring(file, stop)
                results.put(None)
            except BaseException as error:  # raised again where the download was asked for
                results.put(error)
                return

    # Daemons: a connection that hangs must not keep an interrupted process alive.
    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(WORKERS, len(files)))]
    try:
        for thread in threads:  # in `try`: Ctrl-C while they start has to stop those that have, which would go on and keep their locks
            thread.start()
        for _ in files:
            error = results.get()
            if error is not None:
                raise error
    except BaseException as error:
        stop.set()
        for thread in threads:
            if thread.is_alive():  # one that has not begun cannot be joined, and brings nothing when it does
                thread.join(1.0)
        if isinstance(error, KeyboardInterrupt | Stopped):
            progress.say(f"stopped: {size(progress.done)} of {size(progress.total)} are kept, and the same command goes on from there")
        elif isinstance(error, HubError):
            progress.say(f"failed at {size(progress.done)} of {size(progress.total)}")
        raise
