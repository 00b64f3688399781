"""One file from the hub: resumed where an earlier download stopped, and its content checked.

huggingface_hub deletes what an interrupted download had of a file, and compares sizes alone. Here the bytes stay in `….incomplete`, where
older versions of it look too, the rest is asked for by range, and the whole must have the sha256 that the hub names.
"""
from __future__ import annotations

import errno
import hashlib
import re
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from metalstep.hub.client import TRIES, Hub, RemoteFile, wait_before
from metalstep.hub.errors import HubError, explained, is_transport
from metalstep.hub.progress import Progress, size

CHUNK = 1 << 20  # bytes that are hashed at a time
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
SHA256 = re.compile(r"[0-9a-f]{64}")


class Stopped(Exception):
    """The download was told to stop."""


def kept(partial: Path, file: RemoteFile) -> int:
    """Bytes of `file` that an earlier download left."""
    try:
        have = partial.stat().st_size
    except OSError:
        return 0
    return have if file.size is None or have <= file.size else 0


def digest(file: RemoteFile, size: int) -> Any:
    """The hash whose hexadecimal form is the file's etag: sha256 of a large file, git's of a small one with `size` bytes."""
    if SHA256.fullmatch(file.etag or ""):
        return hashlib.sha256()
    return hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)


def fetch(hub: Hub, repo: str, commit: str, file: RemoteFile, partial: Path, progress: Progress, stop: threading.Event) -> None:
    """Fill `partial` with the content of `file`. What it had before counts in `progress` already.

    Raises: HubError; `partial` then has what was received. Stopped likewise.
    """
    partial.parent.mkdir(parents=True, exist_ok=True)
    failures, again = 0, False
    while True:
        before = kept(partial, file)
        try:
            _receive(hub, repo, commit, file, partial, progress, stop)
        except OSError as error:
            if not _retried(error):
                own = error.errno is not None and not hasattr(error, "response")  # of the disk
                raise disk_error(error, partial.parent, repo) if own else explained(
                    error, repo, hub.endpoint, commit, file.name
                ) from error
            failures = 1 if kept(partial, file) > before else failures + 1
            _wait(error, failures, hub, repo, file, stop)
            continue
        except (Stopped, HubError):
            raise
        except Exception as error:  # of the HTTP client
            failures = 1 if kept(partial, file) > before else failures + 1
            if not _retried(error):
                raise explained(error, repo, hub.endpoint, commit, file.name) from error
            _wait(error, failures, hub, repo, file, stop)
            continue
        if _matches(partial, file):
            return
        have = kept(partial, file)
        progress.add(-have)
        partial.unlink()
        if before == 0 or again:  # all of it came just now
            raise HubError(
                f"{repo}: {file.name} has another content than the hub says ({size(have)} received, the hash differs), so it was thrown "
                "away; try again, and check proxies and mirrors on the way (HF_ENDPOINT)"
            )
        again = True


def _receive(hub: Hub, repo: str, commit: str, file: RemoteFile, partial: Path, progress: Progress, stop: threading.Event) -> None:
    start = kept(partial, file)
    if start and start == file.size:
        return
    with ExitStack() as stack:
        response = stack.enter_context(hub.stream(repo, commit, file.name, start))
        resumed = response.status_code == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {start}-")
        if start and not resumed:
            progress.add(-start)
        out = stack.enter_context(partial.open("ab" if resumed else "wb", buffering=0))
        received = start if resumed else 0
        for chunk in response.iter_bytes():
            if stop.is_set():
                raise Stopped
            view = memoryview(chunk)
            while view:  # a disk that fills up takes a part
                written = out.write(view)
                progress.add(written)
                view = view[written:]
            received += len(chunk)
            if file.size is not None and received > file.size:
                raise HubError(
                    f"{repo}: {file.name} is longer than the {file.size:,} bytes that the hub says; try again, and check HF_ENDPOINT"
                )
    if file.size is not None and received < file.size:
        raise TimeoutError(f"the connection ended after {received:,} of {file.size:,} bytes")


def _retried(error: Exception) -> bool:
    return is_transport(error) or isinstance(error, TimeoutError) or wait_before(error, 1) is not None


def _wait(error: Exception, failures: int, hub: Hub, repo: str, file: RemoteFile, stop: threading.Event) -> None:
    """Wait before the next try. Raises: HubError after too many without a byte between them; Stopped."""
    wait = wait_before(error, failures)
    if wait is None and isinstance(error, TimeoutError):
        wait = 1.0
    if failures >= TRIES or wait is None:
        raise explained(error, repo, hub.endpoint, file=file.name) from error
    until = time.monotonic() + wait
    while (left := until - time.monotonic()) > 0:
        if stop.wait(min(left, 1.0)):
            raise Stopped


def _matches(partial: Path, file: RemoteFile) -> bool:
    if file.size is not None and partial.stat().st_size != file.size:
        return False
    return file_digest(partial, file) == file.etag


def file_digest(path: Path, file: RemoteFile) -> str:
    """The hash of a file here, of the kind that `file` has."""
    found = digest(file, path.stat().st_size)
    with path.open("rb") as data:
        while chunk := data.read(CHUNK):
            found.update(chunk)
    return str(found.hexdigest())


def disk_error(error: OSError, folder: Path, repo: str) -> HubError:
    """What a failed write means, and that nothing is lost."""
    if error.errno in FULL:
        return HubError(
            f"the disk of {folder} is full ({error.strerror}), and what came so far is kept; free some space (`metalstep models` lists "
            f"what is here) and run the same command again, which goes on with {repo} where it stopped"
        )
    return HubError(
        f"{folder} cannot be written to ({error.strerror or error}); check its permissions, or name another folder with HF_HOME or "
        "--local-dir"
    )
